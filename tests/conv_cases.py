"""What the tests of convolutions share: layers over the argument space, and the oracle."""

from __future__ import annotations

from typing import Any

import torch
from cases import F64, Gradients
from torch import Tensor, nn
from torch.nn import functional as F

import consequentialism as cw

EMENDED = {1: cw.Conv1d, 2: cw.Conv2d, 3: cw.Conv3d}
PLAIN = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}

# Batch, channels in and out, size, and the layer's arguments: both forms, both ways to sum a Gram, small Grams.
Case = tuple[int, int, int, tuple[int, ...], dict[str, Any]]
CASES: dict[str, Case] = {
    "1d": (5, 3, 4, (17,), {"kernel_size": 3, "padding": 1}),
    "1d stride": (4, 2, 6, (20,), {"kernel_size": 5, "stride": 3, "groups": 2}),
    "2d": (4, 3, 5, (8, 7), {"kernel_size": 3, "padding": 1}),
    "2d wide": (3, 20, 5, (9, 8), {"kernel_size": 3, "padding": 1}),
    "2d wide, no padding": (3, 17, 5, (9, 8), {"kernel_size": (3, 2), "dilation": (1, 2)}),
    "2d few rows": (1, 6, 5, (4, 5), {"kernel_size": 3}),
    "2d few rows, groups": (1, 6, 4, (4, 4), {"kernel_size": 3, "groups": 2, "bias": False}),
    "2d stride": (3, 3, 4, (11, 12), {"kernel_size": (5, 3), "stride": (2, 3), "padding": (2, 1)}),
    "2d same": (3, 4, 4, (7, 6), {"kernel_size": (4, 3), "padding": "same", "dilation": (1, 2)}),
    "2d valid": (3, 4, 4, (7, 6), {"kernel_size": 2, "padding": "valid", "groups": 4}),
    "depthwise": (3, 6, 12, (9, 8), {"kernel_size": 3, "padding": 1, "groups": 6}),
    "pointwise": (3, 6, 5, (5, 4), {"kernel_size": 1, "bias": False}),
    "pointwise stride": (3, 40, 5, (5, 4), {"kernel_size": 1, "stride": 2}),
    "reflect": (3, 3, 4, (7, 6), {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"}),
    "replicate": (3, 3, 4, (7, 6), {"kernel_size": 3, "padding": (2, 1), "padding_mode": "replicate"}),
    "circular": (3, 3, 4, (7, 6), {"kernel_size": 4, "padding": "same", "padding_mode": "circular"}),
    "3d": (2, 2, 3, (5, 4, 6), {"kernel_size": (2, 3, 2), "padding": (1, 0, 1)}),
    "3d wide": (2, 16, 3, (4, 5, 4), {"kernel_size": 2, "padding": 1, "bias": False}),
    "3d stride": (2, 4, 4, (6, 5, 7), {"kernel_size": 2, "stride": (1, 2, 3), "dilation": 2, "groups": 2}),
}


def layers(case: Case, **options: Any) -> tuple[nn.Module, nn.Module]:
    """An emended layer and torch's, with the same parameters."""
    _, inputs, outputs, size, arguments = case
    torch.manual_seed(0)
    own = EMENDED[len(size)](inputs, outputs, **arguments, **options)
    plain = PLAIN[len(size)](
        inputs, outputs, **arguments, **{k: v for k, v in options.items() if k in ("dtype", "device")}
    )
    plain.load_state_dict(own.state_dict())
    return own, plain


def padded(layer: nn.Module, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """``x [B, C, *spatial]`` with all padding but that by zeros, and the zero padding that is left."""
    spatial = len(layer.kernel_size)
    if layer.padding_mode != "zeros":
        return F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode), (0,) * spatial
    if layer.padding == "same":
        totals = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        return F.pad(x, [side for t in reversed(totals) for side in (t // 2, t - t // 2)]), (0,) * spatial
    return x, (0,) * spatial if layer.padding == "valid" else layer.padding


def conv_oracle(layer: nn.Module, x: Tensor, dy: Tensor, **options: Any) -> Gradients:
    """The linear formula on unfolded patches, in float64 on the values as they are."""
    for name in ("backend", "patch_bytes"):
        options.pop(name, None)
    x, padding = padded(layer, x.detach().double().cpu())
    arguments = (layer.kernel_size, layer.stride, padding, layer.dilation, layer.groups, layer.bias is not None)
    return cw.reference.emended_conv_weight_grad(x, dy.detach().to(F64).cpu(), *arguments, **options)


def conv_gradients(layer: nn.Module) -> Gradients:
    return layer.weight.grad, None if layer.bias is None else layer.bias.grad
