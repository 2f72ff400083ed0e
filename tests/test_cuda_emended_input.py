"""The CUDA kernel that applies an inverse, on the host: the kernel's own source, run by the shim."""

from __future__ import annotations

import itertools
import math

import cuda_shim
import pytest
import torch
from cases import BF16, DTYPES, F16, F32, F64, KINDS, SHAPES, error_of, make_input, randn
from test_cuda_input_gram import (
    ADA_SHARED,
    AMPERE_SHARED,
    FORMS,
    HOPPER_SHARED,
    LARGE_PLAN_SIZES,
    MAX_GRID,
    OPTIONS,
    PLAN_SIZES,
    SOURCES,
    SUMS,
    TYPE_CODE,
    product,
    rounded_like,
    terms_of,
)
from torch import Tensor

import consequentialism as cw
from consequentialism.precision import MAX_TWO_TERMS_CONDITION

TWO_TERMS_CONDITION = float(MAX_TWO_TERMS_CONDITION)  # Triton's too; kTwoTermsCondition in csrc/cuda/emended_input.h
FLOOR = {F64: 1e-15, F32: 3e-7, BF16: 1e-4, F16: 3e-7}  # of y, by the type of x
OUTPUT = {F64: F64, F32: F32, BF16: BF16, F16: F32}
Emended = tuple[Tensor, Tensor | None]  # y [N, I], column [N]


@pytest.fixture(scope="module")
def shim() -> cuda_shim.Library:
    return cuda_shim.load(SOURCES, OPTIONS)


def inverse_of(values: Tensor, bias: bool, primal: bool, damping: float = 1e-2) -> Tensor:
    form = "primal" if primal else "dual"
    gram = cw.reference.input_gram(values, bias, form)
    rank = min(values.shape[0], values.shape[1] + bias)
    return cw.reference.damped_inverse(gram, damping, "relative", "raw", rank, values.shape[0])


def emend(
    shim: cuda_shim.Library,
    x: Tensor,  # [N, I], float64
    dtype: torch.dtype,
    *,
    bias: bool = False,
    primal: bool = False,
    tf32: bool = False,
    wide: bool = False,
    tile: int = 0,
    stride: int | None = None,
    offset: int = 0,
    damping: float = 1e-2,
    inverse: Tensor | None = None,
    condition: float = math.inf,
    padding: int = 0,
    seeds: tuple[int, ...] = (0, 1),
) -> tuple[Emended, Tensor, Tensor]:
    """The emended input, the inverse as the kernel had it, and the values of ``x``."""
    rows, inputs = x.shape
    stride = inputs if stride is None else stride
    values, buffer = rounded_like(x, dtype, stride, offset)
    if inverse is None:
        inverse = inverse_of(values, bias, primal, damping)
    inverse = inverse.to(F64 if wide else SUMS[dtype])
    results = shim.run(
        "call_emend",
        shim.guarded(torch.nn.functional.pad(inverse, (0, padding), value=math.nan), "inverse"),
        shim.guarded(buffer, "x"),
        shim.empty(rows, inputs, dtype=OUTPUT[dtype], name="y"),
        shim.empty(rows, dtype=SUMS[dtype], name="column") if bias else None,
        *(TYPE_CODE[dtype], wide, offset, rows, inputs, stride, bias, primal, tf32, tile, condition, padding),
        seeds=seeds,
    )
    return (results[2], results[3] if bias else None), inverse, values


def emulated(
    inverse: Tensor, values: Tensor, dtype: torch.dtype, bias: bool, primal: bool, tf32: bool, of_p: int = 3
) -> Emended:
    """The kernel's precision policy in PyTorch."""
    if inverse.dtype == F64:
        y, column = cw.reference.apply_inverse(inverse, values, bias, "primal" if primal else "dual")
        return y.to(OUTPUT[dtype]), column.to(SUMS[dtype])
    inputs = values.shape[1]
    terms, count_x, count_p = {F32: (F32, 2, 2), BF16: (BF16, 1, of_p), F16: (F32, 1, 2)}[dtype]
    if tf32 and dtype == F32:
        count_x = count_p = 1
    ones = torch.ones(values.shape[0], bias)
    p = terms_of(inverse, terms, count_p)
    if primal:
        rows = terms_of(values.float(), terms, count_x)
        y = product(rows, [term[:inputs] for term in p])
        if bias:
            y = y + inverse[inputs]
    else:
        y = product(p, terms_of(torch.cat([values.float(), ones], dim=1), terms, count_x))
    return y[:, :inputs].to(OUTPUT[dtype]), y[:, inputs:].flatten()


def assert_right(
    own: Emended,
    inverse: Tensor,
    values: Tensor,
    dtype: torch.dtype,
    bias: bool,
    primal: bool,
    tf32: bool = False,
) -> None:
    form = "primal" if primal else "dual"
    y, column = cw.reference.apply_inverse(inverse.double(), values, bias, form)
    terms = cw.reference.apply_inverse(inverse.double().abs(), values.abs(), bias, form)  # what is summed, and cancels
    policy = emulated(inverse, values, dtype, bias, primal, tf32)
    assert own[0].dtype == OUTPUT[dtype]
    cancels = float(terms[0].norm() / y.norm()) if dtype == F64 else 1.0  # the oracle itself is in float64
    allowed = 2 * error_of(policy[0], y) + FLOOR[dtype] * cancels
    assert error_of(own[0], y) <= allowed, f"y: {error_of(own[0], y):.3g}, allowed {allowed:.3g}"
    if own[1] is None:
        return
    size = float(terms[1].norm())
    error = float((own[1].double() - column).norm()) / size
    allowed = 2 * float((policy[1].double() - column).norm()) / size + FLOOR[SUMS[dtype]]
    assert error <= allowed, f"column: {error:.3g}, allowed {allowed:.3g}"


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@FORMS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shapes(shim: cuda_shim.Library, dtype: torch.dtype, primal: bool, bias: bool) -> None:
    for rows, inputs, _ in SHAPES:
        shim.reset_counts()
        result = emend(shim, make_input("random", rows, inputs), dtype, bias=bias, primal=primal)
        assert shim.launches == 2
        assert_right(*result, dtype, bias, primal)


@FORMS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bias_alone(shim: cuda_shim.Library, dtype: torch.dtype, primal: bool) -> None:
    for rows in (1, 70):
        n = 1 if primal else rows
        (y, column), inverse, values = emend(
            shim, torch.zeros(rows, 0), dtype, bias=True, primal=primal, inverse=torch.eye(n, dtype=F64) + 1 / 3
        )
        assert y.shape == (rows, 0)
        expected = cw.reference.apply_inverse(inverse.double(), values, True, "primal" if primal else "dual")[1]
        assert column is not None
        assert error_of(column, expected) <= FLOOR[SUMS[dtype]]


@FORMS
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_large_tiles(shim: cuda_shim.Library, dtype: torch.dtype, primal: bool) -> None:
    for shape in ((40, 70), (130, 131), (129, 264)):
        x = make_input("random", *(reversed(shape) if primal else shape))
        result = emend(shim, x, dtype, bias=True, primal=primal, tile=128)
        assert_right(*result, dtype, True, primal)


@FORMS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_padded_inverse(shim: cuda_shim.Library, dtype: torch.dtype, primal: bool) -> None:
    """Rows of P that begin at multiples of 16 bytes are copied so: the same bits, whatever pads them."""
    x = make_input("random", 70, 68 if primal else 131)
    order = 69 if primal else 70
    (plain, plain_column), _, _ = emend(shim, x, dtype, bias=True, primal=primal)
    (y, column), _, _ = emend(shim, x, dtype, bias=True, primal=primal, padding=-order % 4)
    assert torch.equal(y, plain)
    assert column is not None
    assert torch.equal(column, plain_column)


@FORMS
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tile", [64, 128])
def test_two_terms_where_the_condition_allows(shim: cuda_shim.Library, tile: int, kind: str, primal: bool) -> None:
    """bfloat16's P at the limit: the error is its own rounding's all the same."""
    rows, inputs = (90, 40) if primal else (40, 90)
    x, rank = make_input(kind, rows, inputs), 40 + primal  # with the bias's column
    options = {"bias": True, "primal": primal, "tile": tile, "damping": rank / TWO_TERMS_CONDITION}
    (three, three_column), inverse, values = emend(shim, x, BF16, **options, condition=1.01 * TWO_TERMS_CONDITION)
    (two, two_column), _, _ = emend(shim, x, BF16, **options, condition=TWO_TERMS_CONDITION)
    assert_right((three, three_column), inverse, values, BF16, True, primal)
    y, column = cw.reference.apply_inverse(inverse.double(), values, True, "primal" if primal else "dual")
    policy = emulated(inverse, values, BF16, True, primal, False, of_p=2)
    assert error_of(two, policy[0]) <= error_of(two, y)  # it is that what was computed
    assert not torch.equal(two_column, three_column)
    assert error_of(two, y) <= 1.25 * error_of(three, y)
    assert error_of(two_column, column) <= 4e-3  # a bfloat16's rounding


@FORMS
@pytest.mark.parametrize("dtype", [F64, F32, F16], ids=str)
def test_other_types_take_no_notice_of_the_condition(shim: cuda_shim.Library, dtype: torch.dtype, primal: bool) -> None:
    x = make_input("random", 40, 30)
    results = [emend(shim, x, dtype, bias=True, primal=primal, condition=condition)[0] for condition in (1.0, math.inf)]
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@FORMS
def test_tf32(shim: cuda_shim.Library, primal: bool) -> None:
    for tile in (64, 128):
        result = emend(shim, make_input("random", 65, 70), F32, bias=True, primal=primal, tf32=True, tile=tile)
        assert_right(*result, F32, True, primal, tf32=True)


@FORMS
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_wide(shim: cuda_shim.Library, dtype: torch.dtype, primal: bool) -> None:
    """Narrow x with a float64 inverse."""
    for rows, inputs in ((1, 1), (33, 31), (64, 72), (65, 130)):
        x = make_input("near_duplicates", rows, inputs)
        result = emend(shim, x, dtype, bias=True, primal=primal, wide=True, damping=1e-6)
        assert_right(*result, dtype, True, primal)


@FORMS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_and_alignment(shim: cuda_shim.Library, dtype: torch.dtype, primal: bool) -> None:
    for inputs, stride, offset in ((48, 48, 1), (48, 64, 0), (48, 49, 0), (50, 64, 0), (50, 64, 8), (50, 57, 3)):
        x = make_input("random", 67, inputs)
        result = emend(shim, x, dtype, bias=True, primal=primal, stride=stride, offset=offset, seeds=cuda_shim.SEEDS)
        assert_right(*result, dtype, True, primal)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kinds(shim: cuda_shim.Library, dtype: torch.dtype, kind: str) -> None:
    for rows, inputs, primal in ((24, 90, False), (90, 24, True)):
        result = emend(shim, make_input(kind, rows, inputs), dtype, bias=True, primal=primal)
        assert_right(*result, dtype, True, primal)


@FORMS
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_inverse_beyond_the_range_of_float16(
    shim: cuda_shim.Library, dtype: torch.dtype, primal: bool, scale: float
) -> None:
    x = make_input("random", 20, 24)
    inverse = inverse_of(x.to(dtype).double(), True, primal) * scale
    result = emend(shim, x, dtype, bias=True, primal=primal, inverse=inverse)
    assert_right(*result, dtype, True, primal)


@FORMS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_not_finite(shim: cuda_shim.Library, dtype: torch.dtype, primal: bool) -> None:
    """A NaN inverse, of an x that is not finite, makes all NaN."""
    n = 10 if primal else 5
    inverse = torch.full((n, n), torch.nan, dtype=F64)
    (y, column), _, _ = emend(shim, randn(5, 9), dtype, bias=True, primal=primal, inverse=inverse, seeds=(0,))
    assert column is not None
    assert y.isnan().all()
    assert column.isnan().all()


@FORMS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_inverse(shim: cuda_shim.Library, dtype: torch.dtype, primal: bool) -> None:
    n = 10 if primal else 5
    (y, column), _, _ = emend(
        shim, torch.zeros(5, 9), dtype, bias=True, primal=primal, inverse=torch.zeros(n, n, dtype=F64), seeds=(0,)
    )
    assert column is not None
    assert not y.any()
    assert not column.any()


@FORMS
@pytest.mark.parametrize("wide", [False, True], ids=["narrow", "wide"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shared", [HOPPER_SHARED, AMPERE_SHARED, ADA_SHARED, 40000, 0])
def test_plan_is_one_the_device_takes(
    shim: cuda_shim.Library, dtype: torch.dtype, wide: bool, primal: bool, shared: int
) -> None:
    shapes = list(itertools.product(PLAN_SIZES + LARGE_PLAN_SIZES, repeat=2))
    results = shim.run(
        "call_emend_plans",
        shim.guarded(torch.tensor(shapes), "shapes"),
        shim.empty(len(shapes), 3, dtype=torch.int64, name="plans"),
        *(len(shapes), True, primal, TYPE_CODE[dtype], wide, shared, 132),
        seeds=(0,),
    )
    for (rows, inputs), (tile, blocks, shared_bytes) in zip(shapes, results[1].tolist(), strict=True):
        if tile == 0:
            assert shared <= 61440
            continue
        assert tile == 64 or (tile == 128 and not wide and dtype != F64)
        assert shared_bytes <= shared
        assert blocks == -(-rows // tile) * max(1, -(-inputs // tile)) <= MAX_GRID


def test_refusals(shim: cuda_shim.Library) -> None:
    with pytest.raises(cuda_shim.ShimError):
        emend(shim, randn(3, 3), F64, tile=128, seeds=(0,))
    with pytest.raises(cuda_shim.ShimError):
        emend(shim, randn(3, 3), F32, tile=32, seeds=(0,))
