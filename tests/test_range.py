"""Inputs whose squares leave their type's range, and ridges that do: right wherever the gradient itself is in range."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from cases import BF16, F16, F32, F64, assert_close, assert_grads_close, oracle, randn
from torch import Tensor, nn

import consequentialism as cw
from consequentialism.optim import FusedSGD

pytestmark = pytest.mark.usefixtures("fresh_compiler")

# Rows, inputs, outputs: each plan of the cost model.
SHAPES = ((4, 9, 40), (8, 5, 12), (4, 9, 2), (8, 5, 3))
PATHS = ("eager", "reference", "cg", "FusedSGD", "function", "torch.func", "torch.compile")
EXPONENTS = {F32: (-66, -40, 40, 63, 83), BF16: (-66, 63), F64: (-560, -300, 300, 530)}  # of two
BOUND = {F32: 2e-5, BF16: 1e-2, F64: 1e-10}


def gradient(path: str, x: Tensor, dy: Tensor, bias: bool, **options: Any) -> Tensor:
    """``dw`` by one of the paths that a gradient can take."""
    if path == "function":
        return cw.emended_weight_grad(x, dy, bias=bias, **options)[0]
    outputs, inputs = dy.shape[1], x.shape[1]
    if path == "torch.func":
        weight = x.new_zeros(outputs, inputs)
        ones = x.new_zeros(outputs) if bias else None
        return torch.func.grad(lambda w: (cw.emended_linear(x, w, ones, **options) * dy).sum())(weight)
    more: dict[str, Any] = {"reference": {"backend": "reference"}, "cg": {"solver": "cg", "iterations": 40}}.get(
        path, {}
    )
    layers = nn.Linear(inputs, outputs, bias, dtype=x.dtype), nn.Linear(outputs, 1, dtype=x.dtype)
    nn.init.zeros_(layers[0].weight)
    model = cw.convert(nn.Sequential(*layers), **options, **more)
    layer = model[0]
    if path == "FusedSGD":
        optimizer = FusedSGD(model[:1], 1.0)
        layer(x).backward(dy)
        optimizer.step()
        return -layer.weight.detach()
    run = torch.compile(layer, backend="aot_eager", fullgraph=True) if path == "torch.compile" else layer
    run(x).backward(dy)
    assert layer.weight.grad is not None
    return layer.weight.grad


@pytest.mark.parametrize("scale", ["nlms", "raw", "gradient"])
@pytest.mark.parametrize("dtype", EXPONENTS, ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_the_gradient_does_not_see_the_unit(path: str, dtype: torch.dtype, scale: str) -> None:
    # A power of two rounds nothing, so that emending x * unit must give that of x, divided or multiplied by the unit.
    shapes, exponents = SHAPES, EXPONENTS[dtype]
    if path == "torch.compile":
        shapes, exponents = SHAPES[:1] + SHAPES[3:], exponents[:1]
    for rows, inputs, outputs in shapes:
        x, dy = randn(rows, inputs, dtype=dtype), randn(rows, outputs, seed=1, dtype=dtype)
        expected = oracle(x, dy, False, scale=scale)[0]
        for exponent in exponents:
            unit = 2.0**exponent
            own = gradient(path, (x.double() * unit).to(dtype), dy, False, scale=scale)
            assert own.dtype == dtype
            own = own.double() / unit if scale == "gradient" else own.double() * unit
            assert_close(f"dw at 2^{exponent} {rows, inputs, outputs}", own, expected, BOUND[dtype])


@pytest.mark.parametrize("damping_mode", ["relative", "absolute"])
@pytest.mark.parametrize("path", PATHS[:6])
def test_with_a_bias_or_an_absolute_ridge(path: str, damping_mode: str) -> None:
    # Beside a column of ones, and beside a ridge of 1, a small x is a small x; float64 holds its squares.
    for rows, inputs, outputs in SHAPES:
        for bias in (True, False):
            options = {"damping_mode": damping_mode, "damping": 1.0}
            x, dy = randn(rows, inputs, dtype=F32) * 2.0**-66, randn(rows, outputs, seed=1, dtype=F32)
            if not bias and damping_mode == "relative":
                continue
            own = gradient(path, x, dy, bias, **options)
            assert_close("dw", own.double() * 2.0**66, oracle(x, dy, bias, **options)[0] * 2.0**66, BOUND[F32])


@pytest.mark.parametrize("path", ["eager", "reference", "FusedSGD", "function"])
def test_a_large_input_with_a_bias(path: str) -> None:
    for rows, inputs, outputs in SHAPES:
        x, dy = randn(rows, inputs, dtype=F32), randn(rows, outputs, seed=1, dtype=F32)
        own = gradient(path, x * 2.0**66, dy, True)
        assert_close("dw", own.double() * 2.0**66, oracle(x, dy, False)[0] * 1.0, 1e-5 if rows < inputs else math.inf)
        assert_close("dw", own, oracle(x.double() * 2.0**66, dy, True)[0], BOUND[F32])


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
@pytest.mark.parametrize("solver", ["cholesky", "cg"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_ridge_that_overflows_is_plain_backpropagation(backend: str, solver: str, dtype: torch.dtype) -> None:
    for damping in (1e30, 1e38, 1e300, 1.7e308):
        for rows, inputs, outputs in SHAPES:
            x, dy = randn(rows, inputs, dtype=dtype), randn(rows, outputs, seed=1, dtype=dtype)
            options: dict[str, Any] = {"damping": damping, "scale": "gradient", "backend": backend, "solver": solver}
            bound = {F32: 1e-6, F64: 1e-12, BF16: 1e-2, F16: 1e-3}[dtype]
            for bias in (True, False):
                plain = cw.reference.plain_weight_grad(x.double(), dy.double(), bias)
                assert_grads_close(cw.emended_weight_grad(x, dy, bias=bias, **options), plain, bound)
            if dtype == F32:
                dw, _ = cw.emended_weight_grad(x, dy, **{**options, "scale": "raw"})
                assert dw.isfinite().all()


def test_a_trace_of_zero_is_still_no_step() -> None:
    for path in PATHS[:6]:
        for rows, inputs, outputs in SHAPES:
            dw = gradient(path, torch.zeros(rows, inputs), randn(rows, outputs, dtype=F32), False)
            assert_close(path, dw, torch.zeros(outputs, inputs), 0.0)


def test_one_nan_still_makes_all_nan() -> None:
    for path in PATHS[:6]:
        for value in (math.nan, math.inf):
            x = randn(8, 5, dtype=F32)
            x[0, 0] = value
            assert gradient(path, x, randn(8, 3, dtype=F32), False).isnan().all(), (path, value)


def test_a_whole_network_of_small_numbers_trains() -> None:
    model = cw.convert(nn.Sequential(nn.Linear(6, 5, bias=False), nn.Linear(5, 3, bias=False)))
    twin = copy.deepcopy(model)
    x, dy = randn(9, 6, dtype=F32), randn(9, 3, seed=1, dtype=F32)
    model(x * 2.0**-70).backward(dy)
    twin(x).backward(dy)
    for own, expected in zip(model.parameters(), twin.parameters(), strict=True):
        assert own.grad is not None
        assert expected.grad is not None
        assert_close("dw", own.grad * 2.0**-70, expected.grad, BOUND[F32])
