"""Cases of whole steps: a layer forward and backward, a layer with its update, a network's training step."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import consequentialism as cw

from .case import Case, Target, Work
from .providers import Build, conv_layers, linear_layers
from .roofline import DTYPES, Minimum
from .shapes import ConvShape, LinearShape, NetworkShape
from .timing import Device
from .verify import (
    BOUNDS,
    NETWORK_BOUNDS,
    Update,
    conv_results,
    linear_results,
    network_grads,
    relative_error,
    update,
    weight_grads,
)

EAGER_ROWS, EAGER_SPEEDUP = 128, 5.0  # up to so many rows, so much faster than the stock operations, eager
RATE = 1e-6  # of training steps that are timed: the weights hardly move


def linear_case(op: str, shape: LinearShape, dtype_name: str, device: Device) -> Case:
    """Forward and backward of a linear layer, with the input's gradient."""
    rows, inputs, outputs = shape[:3]

    truths: dict[str, list[Tensor]] = {}

    def build(name: str, kind: Build) -> Work:
        return _layer_work(
            lambda **make: kind(inputs, outputs, **make),
            ((rows, inputs), (rows, outputs), (outputs, inputs)),
            _once(truths, update(name), linear_results),
            _make(dtype_name, device),
        )

    case = _case(op, shape, dtype_name, device, _builds(build, linear_layers(device)))
    if shape.target is not None and device.type == "cuda" and rows <= EAGER_ROWS:
        case.targets += (Target(("consequentialism", "graph"), ("stock", "eager"), 1 / EAGER_SPEEDUP),)
    return case


def conv_case(op: str, shape: ConvShape, dtype_name: str, device: Device) -> Case:
    """Forward and backward of a convolution, with the input's gradient."""
    arguments = (shape.channels, shape.outputs, shape.kernel, shape.stride, shape.padding, 1, shape.groups)

    truths: dict[str, list[Tensor]] = {}

    def build(name: str, kind: Build) -> Work:
        return _layer_work(
            lambda **make: kind(*arguments, **make),
            (shape.input_size, shape.output_size, shape.weight_size),
            _once(truths, update(name), functools.partial(conv_results, shape)),
            _make(dtype_name, device),
        )

    kinds = conv_layers(device)
    if shape.stride > 1 or shape.groups > 1:
        kinds.pop("displaced", None)
    return _case(op, shape, dtype_name, device, _builds(build, kinds))


def _once(
    truths: dict[str, list[Tensor]], kind: Update, results: Callable[..., list[Tensor]]
) -> Callable[..., list[Tensor]]:
    """The truth of an update, computed for the first of its providers: all have the same tensors."""

    def expected(*tensors: Tensor) -> list[Tensor]:
        if kind not in truths:
            truths[kind] = results(kind, *tensors)
        return truths[kind]

    return expected


def _make(dtype_name: str, device: Device) -> dict[str, Any]:
    return {"device": device.type, "dtype": DTYPES[dtype_name]}


def _targets(provider: str, target: float | None, device: Device) -> tuple[Target, ...]:
    mode = device.modes[0]
    return () if target is None else (Target((provider, mode), ("plain", mode), target),)


def _case(
    op: str,
    shape: LinearShape | ConvShape | NetworkShape,
    dtype_name: str,
    device: Device,
    builds: dict[str, Callable[[], Work]],
    bounds: dict[str, float] = BOUNDS,
) -> Case:
    size = DTYPES[dtype_name].itemsize
    return Case(
        op,
        shape.name,
        dtype_name,
        builds,
        "plain",
        bounds[dtype_name],
        device.modes,
        shape.plain(size),
        shape.emended(size),
        _targets("consequentialism", shape.target, device),
    )


def _builds(build: Callable[[str, Build], Work], kinds: dict[str, Build]) -> dict[str, Callable[[], Work]]:
    return {name: functools.partial(build, name, kind) for name, kind in kinds.items()}


def _layer_work(
    kind: Callable[..., nn.Module],
    sizes: tuple[tuple[int, ...], ...],
    expected: Callable[..., list[Tensor]],
    make: dict[str, Any],
) -> Work:
    """A layer's step on inputs, errors and weights of these ``sizes``, the same for every provider."""
    torch.manual_seed(0)
    x, dy, weight = (torch.randn(size, **make) for size in sizes)
    weight /= weight[0].numel() ** 0.5
    bias = torch.randn(len(weight), **make)
    layer: Any = kind(**make)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    x.requires_grad_()

    def free() -> None:
        x.grad = layer.weight.grad = layer.bias.grad = None

    def run() -> None:
        free()
        layer(x).backward(dy)

    def error() -> float:
        free()
        y = layer(x)
        y.backward(dy)
        own = [y.detach(), x.grad, layer.weight.grad, layer.bias.grad]
        return relative_error([one for one in own if one is not None], expected(x, dy, weight, bias))

    return Work(run, error, free)


def sgd(model: nn.Module, device: Device) -> torch.optim.Optimizer:
    """torch's fused SGD. The one for the CPU is wrong in bfloat16 (torch 2.13)."""
    return torch.optim.SGD(model.parameters(), lr=RATE, fused=device.type == "cuda")


def step_case(op: str, shape: LinearShape, dtype_name: str, device: Device) -> Case:
    """A whole step of SGD on one linear layer: forward, backward with the input's gradient, update."""
    rows, inputs, outputs = shape[:3]
    make = _make(dtype_name, device)

    def build(name: str, kind: Build) -> Work:
        torch.manual_seed(0)
        x = torch.randn(rows, inputs, **make).requires_grad_()
        dy = torch.randn(rows, outputs, **make)
        layer = kind(inputs, outputs, **make)
        optimizer: Any
        if name == "fused":
            optimizer = cw.optim.FusedSGD(layer, torch.tensor(RATE, device=device.type))
        else:
            optimizer = sgd(layer, device)

        def free() -> None:
            x.grad = None
            optimizer.zero_grad()

        def run() -> None:
            free()
            layer(x).backward(dy)
            optimizer.step()

        def error() -> float:
            # From zero, with a rate of 1, the weights after a step are the gradient itself.
            with torch.no_grad():
                for parameter in layer.parameters():
                    parameter.zero_()
            set_rate(1.0)
            run()
            set_rate(RATE)
            return relative_error([-p.detach() for p in layer.parameters()], weight_grads(update(name), x, dy))

        def set_rate(value: float) -> None:
            for group in optimizer.param_groups:
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(value)
                else:
                    group["lr"] = value

        return Work(run, error, free)

    kinds = linear_layers(device)
    chosen = {name: kinds[name] for name in ("plain", "consequentialism")}
    chosen["fused"] = kinds["consequentialism"]
    case = _case(op, shape, dtype_name, device, _builds(build, chosen))
    weights = DTYPES[dtype_name].itemsize * inputs * outputs
    # The update reads dw and writes the weights, except where it takes the place of the gradient.
    case.least = Minimum(case.least.bytes + 2.0 * weights, case.least.flops)
    case.targets = _targets("fused", shape.target, device)
    return case


def network_case(op: str, shape: NetworkShape, dtype_name: str, device: Device) -> Case:
    """A training step of a multi-layer perceptron with cross-entropy and torch's SGD."""
    make = _make(dtype_name, device)

    def build(name: str, kind: Build) -> Work:
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        for _, inputs, outputs, _ in shape.layers:
            layers += [kind(inputs, outputs, **make), nn.ReLU()]
        model = nn.Sequential(*layers[:-1])
        x = torch.randn(shape.rows, shape.widths[0], **make)
        labels = torch.randint(shape.widths[-1], (shape.rows,), device=device.type)
        optimizer = sgd(model, device)

        def loss() -> Tensor:
            return F.cross_entropy(model(x).to(torch.promote_types(x.dtype, torch.float32)), labels)

        def run() -> None:
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()

        def error() -> float:
            own = torch.autograd.grad(loss(), list(model.parameters()))
            expected = network_grads(update(name), [p.detach() for p in model.parameters()], x, labels)
            return relative_error([torch.cat([g.flatten() for g in own])], [torch.cat([g.flatten() for g in expected])])

        return Work(run, error, optimizer.zero_grad)

    kinds = linear_layers(device)
    chosen = {name: kinds[name] for name in ("plain", "consequentialism", "triton", "stock", "isaac")}
    return _case(op, shape, dtype_name, device, _builds(build, chosen), NETWORK_BOUNDS)
