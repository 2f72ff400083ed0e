"""Types and accuracy: every backend against the float64 oracle, on inputs good and bad."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch
from cases import (
    ACCURACY_SHAPES,
    BACKENDS,
    BF16,
    CONDITION_FACTOR,
    DAMPINGS,
    DTYPES,
    F16,
    F32,
    F64,
    FACTOR,
    FLOOR,
    HALF_TYPES,
    ILL_CONDITIONED,
    KINDS,
    SHAPES,
    SMALL_SHAPES,
    TOLERANCE,
    Gradients,
    Shape,
    assert_close,
    assert_grads_close,
    assert_identical,
    device_of,
    error_of,
    join,
    make_input,
    oracle,
    randn,
    relative_ridge,
    solved,
)
from torch import Tensor

import consequentialism as cw

DRAWS = 3
DRAWS_INTERPRETED = 1  # a call takes seconds there


def emended(backend: str, x: Tensor, dy: Tensor, bias: bool = True, **options: Any) -> Gradients:
    device = device_of(backend)
    return cw.emended_weight_grad(x.to(device), dy.to(device), bias=bias, backend=backend, **options)


def rms(errors: list[float]) -> float:
    return math.sqrt(sum(error**2 for error in errors) / len(errors))


@pytest.mark.parametrize(
    ("shape", "scale"), [*product(SHAPES, ["nlms"]), *product(SMALL_SHAPES, ["raw", "gradient"])], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_types(backend: str, dtype: torch.dtype, shape: Shape, scale: str) -> None:
    rows, inputs, outputs = shape
    x, dy = randn(rows, inputs, dtype=dtype), randn(rows, outputs, seed=1, dtype=dtype)
    for bias in (True, False):
        own = emended(backend, x, dy, bias, scale=scale)
        assert own[0].dtype == dtype
        assert (own[1] is None) == (not bias)
        assert own[1] is None or own[1].dtype == dtype
        assert_grads_close(own, oracle(x, dy, bias, scale=scale), TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("dtype", "damping"), [*product([F32], DAMPINGS), *product(HALF_TYPES, DAMPINGS[::2])], ids=str
)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_error_against_plain_pytorch(backend: str, dtype: torch.dtype, kind: str, damping: float) -> None:
    check_error(backend, dtype, kind, [(shape, damping) for shape in ACCURACY_SHAPES])


def check_error(backend: str, dtype: torch.dtype, kind: str, cases: list[tuple[Shape, float]]) -> None:
    """Off by at most twice what plain PyTorch is, and rounding, at each shape and relative damping."""
    misses = []
    draws = DRAWS_INTERPRETED if device_of(backend) == "cpu" and backend == "triton" else DRAWS
    for (rows, inputs, outputs), damping in cases:
        for bias in (True, False):
            own_errors, plain_errors = [], []
            for draw in range(draws):
                x = make_input(kind, rows, inputs, seed=10 * draw).to(dtype)
                dy = randn(rows, outputs, seed=10 * draw + 9, dtype=dtype)
                expected = join(*oracle(x, dy, bias, damping=damping, scale="raw"))
                plain = solved(x, dy, bias, relative_ridge(x, bias, damping))
                own = emended(backend, x, dy, bias, damping=damping, scale="raw")
                own_errors.append(error_of(join(*own), expected))
                plain_errors.append(error_of(join(*plain), expected))
            allowed = FACTOR * rms(plain_errors) + FLOOR[dtype]
            if not rms(own_errors) <= allowed:
                misses.append(f"{rows}x{inputs}x{outputs} bias={bias}: {rms(own_errors):.2g}, allowed {allowed:.2g}")
    assert not misses, "dw: " + "; ".join(misses)


@pytest.mark.parametrize(
    ("dtype", "shapes"),
    [(F32, ACCURACY_SHAPES[1:3]), (BF16, ACCURACY_SHAPES), (F16, ACCURACY_SHAPES)],
    ids=["float32", "bfloat16", "float16"],
)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_error_where_float32_is_just_enough(
    backend: str, dtype: torch.dtype, shapes: tuple[Shape, ...], kind: str
) -> None:
    # float32 with fewer rows than inputs is off by up to 2.6 times the allowed on exact duplicates, some 1e-5.
    cases = []
    for shape in shapes:
        rows, inputs, _ = shape
        damping = (min(rows, inputs) + 1) / cw.reference.max_float32_condition(rows, inputs, dtype)
        assert cw.reference.float32_is_enough(rows, inputs + 1, dtype, damping, "relative")
        cases.append((shape, damping))
    check_error(backend, dtype, kind, cases)


@pytest.mark.parametrize("damping", DAMPINGS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_float64_error_is_rounding_times_condition(backend: str, kind: str, damping: float) -> None:
    # The oracle is no more precise than what it judges here, so the bound is that of any stable solution.
    for rows, inputs, outputs in ACCURACY_SHAPES:
        x, dy = make_input(kind, rows, inputs), randn(rows, outputs, seed=9)
        for bias in (True, False):
            condition = 1 + min(rows, inputs + bias) / damping
            expected = solved(x, dy, bias, relative_ridge(x, bias, damping))
            own = emended(backend, x, dy, bias, damping=damping, scale="raw")
            bound = CONDITION_FACTOR * condition * torch.finfo(F64).eps
            assert_close(f"dw {rows}x{inputs}x{outputs}", join(*own), join(*expected), bound)


@pytest.mark.parametrize("damping", DAMPINGS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_is_accurate_on_bad_inputs(backend: str, kind: str, damping: float) -> None:
    misses = []
    for rows, inputs, outputs in ACCURACY_SHAPES:
        x, dy = make_input(kind, rows, inputs).to(F32), randn(rows, outputs, seed=9, dtype=F32)
        for bias in (True, False):
            expected = join(*oracle(x, dy, bias, damping=damping))
            error = error_of(join(*emended(backend, x, dy, bias, damping=damping)), expected)
            if not error <= ILL_CONDITIONED:
                misses.append(f"{rows}x{inputs}x{outputs} bias={bias}: {error:.2g}")
    assert not misses, f"dw: relative errors above {ILL_CONDITIONED}: " + "; ".join(misses)


@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_types_have_a_wide_gram(backend: str, dtype: torch.dtype) -> None:
    # The Gram rounded to the type of x is far off on correlated rows; this is what must not happen.
    x, dy = make_input("correlated", 64, 100).to(dtype), randn(64, 5, seed=1, dtype=dtype)
    expected = join(*oracle(x, dy, False, damping=1e-3))
    rounded = (x.double() @ x.double().T).to(dtype).double()
    c = relative_ridge(x, False, 1e-3)
    narrow = 64 * dy.double().T @ torch.linalg.solve(rounded + c * torch.eye(64, dtype=F64), x.double())
    assert error_of(narrow, expected) > 10 * TOLERANCE[dtype]
    own = join(*emended(backend, x, dy, False, damping=1e-3))
    assert_close("dw", own, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("factor", [1e-18, 1e-12, 1e12, 1e18])
@pytest.mark.parametrize("shape", SMALL_SHAPES, ids=str)
def test_float32_range_of_inputs(shape: Shape, factor: float) -> None:
    # x x^T leaves float32's range long before x does; relative damping does not depend on the unit of x.
    rows, inputs, outputs = shape
    x, dy = (factor * randn(rows, inputs)).to(F32), randn(rows, outputs, seed=1, dtype=F32)
    own = cw.emended_weight_grad(x, dy, bias=False, scale="raw")
    assert_grads_close(own, oracle(x, dy, False, scale="raw"), TOLERANCE[F32])


@pytest.mark.parametrize("damping", [1e-30, 1e-12, 1e-6, 1e6, 1e30])
@pytest.mark.parametrize("backend", BACKENDS)
def test_absolute_damping_of_any_size(backend: str, damping: float) -> None:
    x, dy = randn(6, 9, dtype=F32), randn(6, 3, seed=1, dtype=F32)  # independent rows: c may be nothing
    options = {"damping": damping, "damping_mode": "absolute"}
    own = emended(backend, x, dy, False, scale="gradient" if damping > 1 else "raw", **options)
    expected = oracle(x, dy, False, scale="gradient" if damping > 1 else "raw", **options)
    assert_grads_close(own, expected, TOLERANCE[F32])


@pytest.mark.parametrize("damping", [1e153, 1e155, 1e300])
def test_absolute_damping_whose_square_leaves_float64(damping: float) -> None:
    x, dy = randn(6, 9), randn(6, 3, seed=1)
    for bias in (True, False):  # of plain backpropagation's size, which it then is
        dw, _ = cw.emended_weight_grad(x, dy, bias=bias, damping=damping, damping_mode="absolute", scale="gradient")
        assert_close("dw", dw, dy.T @ x, TOLERANCE[F64])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SMALL_SHAPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_loss_scaling_commutes(backend: str, shape: Shape, dtype: torch.dtype) -> None:
    rows, inputs, outputs = shape
    # Away from float16's subnormal numbers, where a product by a power of two rounds.
    x, dy = randn(rows, inputs, dtype=dtype), 8 * randn(rows, outputs, seed=1, dtype=dtype)
    x, dy = (x, dy.clamp(-16, 16)) if dtype == F16 else (x, dy)
    own = emended(backend, x, dy)
    scaled = emended(backend, x, 128 * dy)
    for name, a, b in zip(("dw", "db"), own, scaled, strict=True):
        assert a is not None
        assert b is not None
        normal = a.abs() > 100 * torch.finfo(dtype).tiny
        assert_identical(f"{name} of a scaled loss", b[normal], 128 * a[normal])
        assert normal.float().mean() > 0.9


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_bitwise_deterministic(backend: str, shape: Shape, dtype: torch.dtype) -> None:
    rows, inputs, outputs = shape
    x, dy = randn(rows, inputs, dtype=dtype), randn(rows, outputs, seed=1, dtype=dtype)
    first = emended(backend, x, dy)
    for _ in range(2):
        # Another allocation in between, so that equal results do not come from equal leftovers.
        poison = torch.full((rows + 1, inputs + 1), math.nan)
        again = emended(backend, x.clone(), dy.clone())
        assert_identical("dw", again[0], first[0])
        assert_identical("db", again[1], first[1])
        del poison
