"""The CUDA kernels around the product dw = dy^T y, on the host: the bias's gradient, NaN, and float16's unit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import cuda_shim
import pytest
import torch
from cases import BF16, DTYPES, F16, F32, F64, FACTOR, FLOOR, KINDS, assert_close, error_of, make_input, oracle, randn
from torch import Tensor

import consequentialism as cw
from consequentialism.options import Scale
from consequentialism.precision import float16_unit

SOURCES = [
    cuda_shim.ROOT / "csrc" / "cuda" / "weight_grad.cu",
    Path(cuda_shim.__file__).with_name("weight_grad_calls.cu"),
]
NAMES = {F32: "float", F64: "double", BF16: "bfloat16", F16: "float16"}
ROUNDING = {F64: 1e-14, F32: 1e-6, BF16: 5e-3, F16: 1e-3}


@pytest.fixture(scope="module")
def shim() -> cuda_shim.Library:
    return cuda_shim.load(SOURCES)


VECTOR = {F64: 2, F32: 4, BF16: 8, F16: 8}  # elements of 16 bytes


class Plan(NamedTuple):
    """Elements read at once, strips of columns, sets of them, splits of the rows, partial sums."""

    vector: int
    strips: int
    sets: int
    splits: int
    partials: int


def plan(shim: cuda_shim.Library, dy: Tensor, outputs: int, offset: int = 0) -> Plan:
    """Of the first ``outputs`` columns of dy from its element ``offset`` on."""
    rows, stride = dy.shape
    made = shim.empty(5, dtype=torch.int64)
    name = f"call_plan_bias_grad_{NAMES[dy.dtype]}"
    result = shim.run(name, shim.guarded(dy, "dy"), made, rows, outputs, stride, offset, seeds=(0,))
    return Plan(*result[1].tolist())


def bias_grad(
    shim: cuda_shim.Library, dy: Tensor, column: Tensor | None, outputs: int, dw: Tensor | None = None, offset: int = 0
) -> tuple[Tensor | None, Tensor]:
    """``db [O]`` and ``dw``, of the first ``outputs`` columns of dy from its element ``offset`` on."""
    rows, stride = dy.shape
    dw = randn(outputs, 3, dtype=dy.dtype) if dw is None else dw
    counters = shim.guarded(torch.zeros(32, dtype=torch.int32), "counters")
    held = partial = db = None
    if column is not None:
        held = shim.guarded(column, "column")
        wide = F64 if dy.dtype == F64 else F32
        partial = shim.empty(plan(shim, dy, outputs, offset).partials, dtype=wide, name="partial")
        db = shim.empty(outputs, dtype=dy.dtype, name="db")
    arguments = (shim.guarded(dy, "dy"), held, partial, counters, shim.guarded(dw, "dw"), db)
    results = shim.run(f"call_bias_grad_{NAMES[dy.dtype]}", *arguments, rows, outputs, stride, offset, dw.numel())
    *_, counted, own = results if column is None else results[:-1]
    assert counted.tolist() == [0] * 32, "the counters are not ready for the next launch"
    return None if column is None else results[-1], own


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "outputs"), [(1, 1), (7, 31), (16, 32), (17, 33), (40, 104), (65, 8), (300, 264), (129, 100)]
)
def test_bias_grad(shim: cuda_shim.Library, rows: int, outputs: int, dtype: torch.dtype) -> None:
    dy, column = randn(rows, outputs, dtype=dtype), randn(rows, seed=1, dtype=F64 if dtype == F64 else F32)
    assert plan(shim, dy, outputs).vector == (VECTOR[dtype] if outputs % VECTOR[dtype] == 0 else 1)
    dw = randn(outputs, 3, dtype=dtype)
    shim.reset_counts()
    db, own = bias_grad(shim, dy, column, outputs, dw)
    assert shim.launches == len(cuda_shim.SEEDS)  # one each
    assert_close("db", db, dy.double().T @ column.double(), ROUNDING[dtype])
    assert torch.equal(own, dw)
    nothing, own = bias_grad(shim, dy, None, outputs, dw)
    assert nothing is None
    assert torch.equal(own, dw)


@pytest.mark.parametrize(
    ("rows", "outputs", "splits"), [(1, 128, 1), (65, 128, 2), (1000, 128, 6), (1000, 300, 2), (1000, 2000, 1)]
)
def test_rows_are_split_for_two_blocks_a_processor(
    shim: cuda_shim.Library, rows: int, outputs: int, splits: int
) -> None:
    strips = -(-outputs // 128)
    partials = splits * outputs if splits > 1 else 0
    assert plan(shim, torch.empty(rows, outputs), outputs) == (4, strips, strips, splits, partials)


@pytest.mark.parametrize("column", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("outputs", [961, 1100, 2000])
def test_strips_share_a_ticket(shim: cuda_shim.Library, outputs: int, column: bool) -> None:
    """More strips than tickets, some sets with one strip more than others."""
    dy = randn(3, outputs + 1, dtype=F32)[:, 1:].contiguous()
    held = torch.zeros(3, outputs + 2)
    held[:, 1:-1] = dy
    made = plan(shim, held, outputs, 1)
    assert (made.vector, made.strips, made.sets) == (1, -(-outputs // 32), 30)
    db, _ = bias_grad(shim, held, torch.ones(3) if column else None, outputs, offset=1)
    assert db is None or assert_close("db", db, dy.double().sum(0), ROUNDING[F32]) is None
    for output in (0, outputs - 1):
        spoiled = held.clone()
        spoiled[1, 1 + output] = math.inf
        db, dw = bias_grad(shim, spoiled, torch.ones(3) if column else None, outputs, offset=1)
        assert dw.isnan().all()
        assert db is None or db.isnan().all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("row", "output"), [(0, 0), (63, 127), (64, 128), (150, 203)])
def test_what_is_not_finite_poisons_all(shim: cuda_shim.Library, row: int, output: int, value: float) -> None:
    dy = randn(151, 204, dtype=F32)
    assert plan(shim, dy, 204)[1:4] == (2, 2, 3)
    dy[row, output] = value
    for column in (torch.zeros(151), None):
        db, dw = bias_grad(shim, dy, column, 204)
        assert dw.isnan().all()
        assert db is None or db.isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_poison_follows_the_splits_of_one_strip(shim: cuda_shim.Library, dtype: torch.dtype) -> None:
    """One block adds the splits up and poisons: other threads write NaN than have written the sums."""
    outputs = 32 * VECTOR[dtype]
    dy = randn(300, outputs, dtype=dtype)
    assert plan(shim, dy, outputs)[1:4] == (1, 1, 5)
    dy[0, 0] = math.inf
    db, dw = bias_grad(shim, dy, torch.ones(300, dtype=F64 if dtype == F64 else F32), outputs)
    assert db is not None
    assert db.isnan().all()
    assert dw.isnan().all()


def test_several_values_are_not_finite(shim: cuda_shim.Library) -> None:
    dy = randn(151, 204, dtype=F32)
    dy[::50, ::40] = math.inf
    db, dw = bias_grad(shim, dy, torch.ones(151), 204)
    assert db is not None
    assert db.isnan().all()
    assert dw.isnan().all()


@pytest.mark.parametrize(("stride", "offset", "vector"), [(48, 0, 4), (50, 0, 1), (48, 4, 4), (48, 3, 1)])
def test_rows_apart_and_off_alignment(shim: cuda_shim.Library, stride: int, offset: int, vector: int) -> None:
    dy = torch.full((20, stride), math.nan)  # what is not this layer's
    own = randn(20, 40, dtype=F32)
    dy[:, offset : offset + 40] = own
    assert plan(shim, dy, 40, offset).vector == vector
    db, dw = bias_grad(shim, dy, torch.ones(20), 40, offset=offset)
    assert_close("db", db, own.double().sum(0), ROUNDING[F32])
    assert dw.isfinite().all()


def test_large_values_are_finite(shim: cuda_shim.Library) -> None:
    dy = torch.full((40, 3), 3e38)  # their sum is not
    db, dw = bias_grad(shim, dy, torch.ones(40), 3)
    assert db is not None
    assert db.isinf().all()
    assert dw.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (33, 40), (100, 300), (7, 11)])
def test_poison_reaches_all_of_dw(shim: cuda_shim.Library, outputs: int, inputs: int, dtype: torch.dtype) -> None:
    dy, dw = randn(2, outputs, dtype=dtype), randn(outputs, inputs, dtype=dtype)
    dy[1, -1] = math.inf
    _, own = bias_grad(shim, dy, None, outputs, dw)
    assert own.isnan().all()


def test_no_rows_and_nothing_to_do(shim: cuda_shim.Library) -> None:
    db, _ = bias_grad(shim, torch.empty(0, 5), torch.empty(0), 5)
    assert db is not None
    assert db.tolist() == [0] * 5
    shim.reset_counts()
    bias_grad(shim, torch.empty(4, 0), None, 0)
    assert shim.launches == 0


def narrowed(shim: cuda_shim.Library, y: Tensor, offset: int = 0) -> tuple[Tensor, Tensor]:
    """``y / unit`` in float16 and the unit, of the elements of ``y`` from ``offset`` on."""
    count = y.numel() - offset
    plan = shim.empty(2, dtype=torch.int64)
    halves = shim.empty(y.numel(), dtype=F16, name="narrowed")
    blocks = int(shim.run("call_plan_pass", shim.guarded(y, "y"), halves, plan, count, offset, seeds=(0,))[2][1])
    largest, unit = shim.empty(blocks, name="largest"), shim.empty(1, name="unit")
    result = shim.run("call_narrow", shim.guarded(y, "y"), largest, halves, unit, count, offset)
    return result[2][offset:], result[3]


def half_product(shim: cuda_shim.Library, dy: Tensor, y: Tensor) -> Tensor:
    """``dy^T y`` of a float16 ``dy`` by the kernels, with the device's product by torch: float16 in, float32 sums."""
    halves, unit = narrowed(shim, y.flatten())
    product = dy.float().T @ halves.view(y.shape).float()
    dw = shim.empty(*product.shape, dtype=F16, name="dw")
    arguments = (shim.guarded(product, "product"), shim.guarded(unit, "unit"), dw, product.numel(), 0)
    return shim.run("call_widen", *arguments)[2]


SCALES = (1.0, 2.0**-140, 1e-38, 1e-20, 1e-6, 70000.0, 1e20, 3e38)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(("rows", "inputs"), [(1, 1), (7, 31), (40, 104), (65, 1000)])
def test_a_power_of_two_brings_y_into_the_range_of_float16(
    shim: cuda_shim.Library, rows: int, inputs: int, scale: float
) -> None:
    y = (randn(rows, inputs).clamp(-1, 1) * scale).float()
    halves, unit = narrowed(shim, y.flatten())
    mantissa, exponent = torch.frexp(unit)
    assert mantissa.item() == 0.5
    assert unit.item() == float16_unit(y).item()  # what Triton's backend takes
    assert exponent.item() >= -125
    exact = y.double() / unit.double()
    top = exact.abs().max().item()
    assert 2.0**14 <= top < 2.0**15 or (scale < 1e-37 and 0 < top < 2.0**15)
    assert_close("y", halves.view(y.shape), exact, 2.0**-11)


def test_zeros_have_a_unit(shim: cuda_shim.Library) -> None:
    halves, unit = narrowed(shim, torch.zeros(40))
    assert unit.tolist() == [1]
    assert halves.tolist() == [0] * 40


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 5000, 12002])
def test_a_y_that_is_not_finite_has_none(shim: cuda_shim.Library, value: float, place: int) -> None:
    y = randn(12003, dtype=F32)
    y[place] = value
    assert narrowed(shim, y)[1].isnan().all()
    dw = half_product(shim, randn(3, 5, dtype=F16), y[: 12003 // 3 * 3].view(3, -1))
    assert dw.isnan().all()


@pytest.mark.parametrize(("offset", "count", "vector"), [(0, 400, 4), (0, 401, 1), (4, 400, 4), (2, 400, 1)])
def test_passes_off_alignment(shim: cuda_shim.Library, offset: int, count: int, vector: int) -> None:
    y = torch.full((offset + count,), math.nan)  # what lies before is not y's
    y[offset:] = randn(count, dtype=F32)
    plan, halves = shim.empty(2, dtype=torch.int64), shim.empty(offset + count, dtype=F16)
    made = shim.run("call_plan_pass", shim.guarded(y, "y"), halves, plan, count, offset, seeds=(0,))[2]
    assert made.tolist()[0] == vector
    found, unit = narrowed(shim, y, offset)
    assert_close("y", found.double() * unit.double(), y[offset:], 2.0**-11)
    dw = shim.empty(offset + count, dtype=F16, name="dw")
    wide = shim.run("call_widen", shim.guarded(y, "product"), shim.guarded(torch.ones(1)), dw, count, offset)[2]
    assert torch.equal(wide[offset:], y[offset:].half())


# How large an input, how large the errors, and the scale: y is then in float16's range, above it, below it, in it.
NASTY: dict[str, tuple[float, float, Scale]] = {
    "usual": (1.0, 1.0, "raw"),
    "small inputs": (1e-5, 1e-6, "raw"),
    "large inputs": (6e4, 6e4, "raw"),
    "scaled losses": (1.0, 6e3, "gradient"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", NASTY)
def test_float16_product_is_as_accurate_as_with_float32(shim: cuda_shim.Library, size: str, kind: str) -> None:
    of_x, of_dy, scale = NASTY[size]
    rows, inputs, outputs = 24, 40, 10
    x = make_input(kind, rows, inputs)
    x = (x * of_x / x.abs().max()).half()
    dy = (randn(rows, outputs, seed=1).clamp(-1, 1) * of_dy).half()
    y, _ = cw.reference.emended_input(x, False, "dual", 1e-2, "relative", scale, F64)
    assert y.dtype == F32
    expected, _ = oracle(x, dy, bias=False, damping=1e-2, scale=scale)
    plain = error_of((dy.float().T @ y).half(), expected)
    assert plain < FLOOR[F16]  # dw is in float16's range
    assert error_of(half_product(shim, dy, y), expected) <= FACTOR * plain


def test_columns_far_apart(shim: cuda_shim.Library) -> None:
    # Each column is right for itself, as far as float16 could hold it beside the largest.
    y = randn(30, 40, dtype=F32) * torch.logspace(0, -7, 40)
    dy = randn(30, 9, seed=1, dtype=F16)
    own, expected = half_product(shim, dy, y * 1e30), dy.double().T @ y.double()
    assert own.isinf().any()
    own = half_product(shim, dy, y)
    for i in range(40):
        held = expected[:, i].abs().max() * 2.0**-11 + 2.0**-24
        assert (own[:, i].double() - expected[:, i]).abs().max() <= 2 * held, i


@pytest.mark.parametrize(
    ("inputs", "outputs"), [(1, 4194304), (784, 5120), (4096, 1024), (4097, 768), (16384, 256), (100000, 256)]
)
def test_sums_of_a_product_stay_in_the_cache(shim: cuda_shim.Library, inputs: int, outputs: int) -> None:
    made = shim.run("call_outputs_at_once", shim.empty(1, dtype=torch.int64), inputs, seeds=(0,))[0]
    assert made.tolist() == [outputs]
