"""Convolutions of inputs whose squares leave their type's range: right wherever the gradient itself is in range."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import BF16, F32, F64, assert_close, assert_grads_close, randn
from conv_cases import CASES, conv_gradients, conv_oracle, layers
from torch import Tensor, nn
from torch.func import functional_call, grad

import consequentialism as cw

EXPONENTS = {F32: (-66, -40, 63, 83), BF16: (-66, 63), F64: (-560, 530)}  # of two
BOUND = {F32: 2e-5, BF16: 1e-2, F64: 1e-10}
SOME = ("2d", "2d few rows", "2d wide", "depthwise", "1d stride", "3d")
PATHS: dict[str, dict[str, Any]] = {
    "eager": {},
    "reference": {"backend": "reference"},
    "conjugate gradients": {"solver": "cg", "iterations": 60},
    "wide Gram": {"damping": 1e-4},
    "torch.func": {},
    "function": {},
}


def gradient(path: str, layer: nn.Module, x: Tensor, dy: Tensor) -> Tensor:
    """``dw`` by one of the paths that a gradient can take."""
    if path == "torch.func":
        parameters = {name: p.detach() for name, p in layer.named_parameters()}
        return grad(lambda p: (functional_call(layer, p, (x,)) * dy).sum())(parameters)["weight"]
    if path == "function":
        options = {"damping": layer.damping, "scale": layer.scale, "bias": layer.bias is not None}
        arguments = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
        return cw.emended_conv_weight_grad(x, dy, layer.kernel_size, groups=layer.groups, **arguments, **options)[0]
    return torch.autograd.grad(layer(x), layer.weight, dy)[0]


def without_bias(case: str) -> Any:
    *sizes, arguments = CASES[case]
    return (*sizes, {**arguments, "bias": False})


@pytest.mark.parametrize("scale", ["nlms", "gradient"])
@pytest.mark.parametrize("dtype", EXPONENTS, ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_the_gradient_does_not_see_the_unit(path: str, dtype: torch.dtype, scale: str) -> None:
    # A power of two rounds nothing, so that emending x * unit must give that of x, divided or multiplied by the unit.
    for case in SOME:
        layer, _ = layers(without_bias(case), dtype=dtype, scale=scale, **PATHS[path])
        x = randn(CASES[case][0], CASES[case][1], *CASES[case][3], dtype=dtype)
        dy = randn(*layer(x).shape, seed=1, dtype=dtype)
        expected = conv_oracle(layer, x, dy, scale=scale, damping=layer.damping)[0]
        for exponent in EXPONENTS[dtype]:
            unit = 2.0**exponent
            own = gradient(path, layer, (x.double() * unit).to(dtype), dy)
            own = own.double() / unit if scale == "gradient" else own.double() * unit
            assert_close(f"dw at 2^{exponent} of {case}", own, expected, BOUND[dtype])


LARGE = [(path, mode) for path in ("eager", "reference", "wide Gram") for mode in ("relative", "absolute")]


# Conjugate gradients do not converge at the condition number that an absolute ridge leaves here.
@pytest.mark.parametrize(("path", "damping_mode"), [*LARGE, ("conjugate gradients", "relative")])
def test_a_large_input_with_a_bias(path: str, damping_mode: str) -> None:
    for case in SOME:
        layer, _ = layers(CASES[case], dtype=F32, damping_mode=damping_mode, **PATHS[path])
        x = randn(CASES[case][0], CASES[case][1], *CASES[case][3], dtype=F32) * 2.0**54
        y = layer(x)
        dy = randn(*y.shape, seed=1, dtype=F32) * 2.0**90
        y.backward(dy)
        expected = conv_oracle(layer, x, dy, damping_mode=damping_mode, damping=layer.damping)
        assert_grads_close(conv_gradients(layer), expected, BOUND[F32])


def test_each_group_has_its_unit() -> None:
    x, dy = randn(3, 4, 7, 7, dtype=F32), randn(3, 6, 5, 5, seed=1, dtype=F32)
    units = torch.tensor([2.0**-60, 2.0**-60, 2.0**60, 2.0**60])[:, None, None]
    expected = cw.emended_conv_weight_grad(x, dy, 3, groups=2, bias=False)[0]
    own = cw.emended_conv_weight_grad(x * units, dy, 3, groups=2, bias=False)[0]
    assert_close("dw of the first", own[:3].double() * 2.0**-60, expected[:3], BOUND[F32])
    assert_close("dw of the second", own[3:].double() * 2.0**60, expected[3:], BOUND[F32])


@pytest.mark.parametrize("needed", [("bias",), ("weight",)])
def test_one_gradient_alone(needed: tuple[str, ...]) -> None:
    for case in ("2d", "2d few rows", "depthwise"):
        layer, _ = layers(CASES[case], dtype=F32)
        x = randn(CASES[case][0], CASES[case][1], *CASES[case][3], dtype=F32) * 2.0**54
        dy = randn(*layer(x).shape, seed=1, dtype=F32) * 2.0**90
        expected = dict(zip(("weight", "bias"), conv_oracle(layer, x, dy), strict=True))
        for name in needed:
            (own,) = torch.autograd.grad(layer(x), layer.get_parameter(name), dy)
            assert_close(name, own, expected[name], BOUND[F32])


def test_one_nan_still_makes_all_nan() -> None:
    for value in (math.nan, math.inf):
        for case in SOME:
            layer, _ = layers(CASES[case], dtype=F32)
            x = randn(CASES[case][0], CASES[case][1], *CASES[case][3], dtype=F32) * 2.0**66
            x.view(-1)[x[0].numel() // 2] = value
            y = layer(x)
            y.backward(torch.ones_like(y))
            for own in conv_gradients(layer):
                assert own is None or own.isnan().all(), case
