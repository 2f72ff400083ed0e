"""Comparison of every result with float64: the plain gradients, the emended ones, and the peer's own update."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

import consequentialism as cw

from .shapes import ConvShape

# Of the relative error: of a layer's results and of an op's; and of a network's, where each layer rounds what it
# hands on.
BOUNDS = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 1e-2, "float16": 1e-2}
NETWORK_BOUNDS = {"float64": 1e-8, "float32": 1e-3, "bfloat16": 0.1, "float16": 0.1}
ISAAC_LA = 1.0  # the peer's damping; that of the mean of the rows' squares, like our default
Update = Literal["plain", "emended", "isaac"]
CHUNK = 8  # samples whose patches are unfolded at once


def relative_error(own: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    """The largest ``||own - expected|| / ||expected||``; NaN where one is."""
    errors = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(own, expected, strict=True)]
    return max(errors, key=lambda e: (e != e, e))


def update(provider: str) -> Update:
    """Which update a provider's layer computes."""
    return {"plain": "plain", "isaac": "isaac"}.get(provider, "emended")  # type: ignore[return-value]


def weight_grads(kind: Update, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """``dw [O, I]`` and ``db [O]`` in float64 of an update of a linear layer."""
    x, dy = x.detach().double(), dy.double()
    if kind == "plain":
        dw, db = cw.reference.plain_weight_grad(x, dy)
    elif kind == "isaac":  # la*N * emended(c = la*N), of the weight alone
        ridge = ISAAC_LA * x.shape[0]
        dw, _ = cw.reference.emended_weight_grad(x, dy, False, damping=ridge, damping_mode="absolute", scale="gradient")
        db = dy.sum(0)
    else:
        dw, db = cw.reference.emended_weight_grad(x, dy)
    assert db is not None
    return dw, db


def linear_results(kind: Update, x: Tensor, dy: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
    """``y``, ``dx``, ``dw`` and ``db`` in float64."""
    wide = weight.double()
    y, dx = F.linear(x.detach().double(), wide, bias.double()), dy.double() @ wide
    return [y, dx, *weight_grads(kind, x, dy)]


def conv_results(shape: ConvShape, kind: Update, x: Tensor, dy: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
    """``y``, ``dx``, ``dw`` and ``db`` in float64, a few samples at a time."""
    groups, outputs, inputs = shape.groups, shape.outputs // shape.groups, shape.inputs
    gram = x.new_zeros(groups, inputs + 1, inputs + 1, dtype=torch.float64)
    plain = x.new_zeros(groups, inputs + 1, outputs, dtype=torch.float64)
    ys, dxs = [], []
    flat = weight.double().reshape(groups, outputs, inputs)
    for some, errors in zip(x.detach().split(CHUNK), dy.split(CHUNK), strict=True):
        patches = F.unfold(some.double(), shape.kernel, 1, shape.padding, shape.stride)
        patches = patches.unflatten(1, (groups, inputs))  # [B, G, I, P]
        wide = errors.double().reshape(len(some), groups, outputs, -1)  # [B, G, O, P]
        y = (flat @ patches).flatten(1, 2) + bias.double()[:, None]
        ys.append(y.reshape(errors.shape))
        dpatches = (flat.mT @ wide).flatten(1, 2)
        dxs.append(F.fold(dpatches, some.shape[2:], shape.kernel, 1, shape.padding, shape.stride))
        rows = torch.cat([patches, torch.ones_like(patches[:, :, :1])], 2).transpose(0, 1)
        rows = rows.transpose(1, 2).flatten(2)  # [G, I + 1, B * P]
        wide = wide.permute(1, 0, 3, 2).flatten(1, 2)  # [G, B * P, O]
        gram += rows @ rows.mT
        plain += rows @ wide
    dw = plain
    if kind != "plain":
        c = gram.diagonal(dim1=1, dim2=2).sum(1) / min(inputs + 1, shape.batch * shape.positions**2)
        damped = gram + c[:, None, None] * torch.eye(inputs + 1, dtype=gram.dtype, device=gram.device)
        dw = shape.batch * torch.linalg.solve(damped, plain)
    dw = dw.mT  # [G, O, I + 1]
    return [torch.cat(ys), torch.cat(dxs), dw[..., :-1].reshape(weight.shape), dw[..., -1].flatten()]


def network_grads(kind: Update, weights: list[Tensor], x: Tensor, labels: Tensor) -> list[Tensor]:
    """``dw, db, ...`` of a perceptron with cross-entropy, in float64, by the layers' true inputs and errors."""
    rows, errors, now = [], [], x.double()
    for layer in range(0, len(weights), 2):
        rows.append(now.detach())
        now = F.linear(now, weights[layer].double(), weights[layer + 1].double()).requires_grad_()
        errors.append(now)
        now = now.relu()
    loss = F.cross_entropy(errors[-1], labels)
    dys = torch.autograd.grad(loss, errors)
    return [one for x, dy in zip(rows, dys, strict=True) for one in weight_grads(kind, x, dy)]
