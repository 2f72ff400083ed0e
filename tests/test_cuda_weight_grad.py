"""The CUDA kernels around the product dw = dy^T y, on the host: the bias's gradient, and NaN where dy is not finite."""

from __future__ import annotations

import math
from pathlib import Path

import cuda_shim
import pytest
import torch
from cases import BF16, DTYPES, F16, F32, F64, assert_close, randn
from torch import Tensor

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


def plan(shim: cuda_shim.Library, dy: Tensor, outputs: int, offset: int = 0) -> list[int]:
    """The vector, the number of splits and of flags, of the first ``outputs`` columns from element ``offset`` on."""
    rows, stride = dy.shape
    made = shim.empty(3, dtype=torch.int64)
    name = f"call_plan_bias_grad_{NAMES[dy.dtype]}"
    result = shim.run(name, shim.guarded(dy, "dy"), made, rows, outputs, stride, offset, seeds=(0,))
    return [int(value) for value in result[1]]


def bias_grad(
    shim: cuda_shim.Library, dy: Tensor, column: Tensor | None, outputs: int, dw: Tensor | None = None, offset: int = 0
) -> tuple[Tensor | None, Tensor, Tensor]:
    """``db [O]``, the flags and ``dw``, of the first ``outputs`` columns of dy from its element ``offset`` on."""
    rows, stride = dy.shape
    _, splits, count = plan(shim, dy, outputs, offset)
    dw = randn(outputs, 3, dtype=dy.dtype) if dw is None else dw
    wide = F64 if dy.dtype == F64 else F32
    flags, held_dw = shim.empty(count, dtype=torch.int32, name="broken"), shim.guarded(dw, "dw")
    held = partial = db = None
    if column is not None:
        held = shim.guarded(column, "column")
        partial = shim.empty(splits, outputs, dtype=wide, name="partial")
        db = shim.empty(outputs, dtype=dy.dtype, name="db")
    arguments = (shim.guarded(dy, "dy"), held, partial, flags, held_dw, db)
    results = shim.run(f"call_bias_grad_{NAMES[dy.dtype]}", *arguments, rows, outputs, stride, offset, dw.numel())
    if column is None:
        return None, results[1], results[2]
    return results[-1], results[-3], results[-2]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "outputs"), [(1, 1), (7, 31), (16, 32), (17, 33), (40, 104), (65, 8), (300, 264), (129, 100)]
)
def test_bias_grad(shim: cuda_shim.Library, rows: int, outputs: int, dtype: torch.dtype) -> None:
    dy, column = randn(rows, outputs, dtype=dtype), randn(rows, seed=1, dtype=F64 if dtype == F64 else F32)
    assert plan(shim, dy, outputs)[0] == (VECTOR[dtype] if outputs % VECTOR[dtype] == 0 else 1)
    dw = randn(outputs, 3, dtype=dtype)
    db, broken, own = bias_grad(shim, dy, column, outputs, dw)
    assert_close("db", db, dy.double().T @ column.double(), ROUNDING[dtype])
    assert broken.tolist() == [0] * len(broken)
    assert torch.equal(own, dw)
    nothing, broken, own = bias_grad(shim, dy, None, outputs, dw)
    assert nothing is None
    assert broken.tolist() == [0] * len(broken)
    assert torch.equal(own, dw)


@pytest.mark.parametrize(
    ("rows", "outputs", "splits"), [(1, 128, 1), (65, 128, 2), (1000, 128, 6), (1000, 300, 2), (1000, 2000, 1)]
)
def test_rows_are_split_for_two_blocks_a_processor(
    shim: cuda_shim.Library, rows: int, outputs: int, splits: int
) -> None:
    assert plan(shim, torch.empty(rows, outputs), outputs)[1:] == [splits, splits * -(-outputs // 128)]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("row", "output"), [(0, 0), (63, 127), (64, 128), (150, 203)])
def test_what_is_not_finite_poisons_all(shim: cuda_shim.Library, row: int, output: int, value: float) -> None:
    dy = randn(151, 204, dtype=F32)
    dy[row, output] = value
    for column in (torch.zeros(151), None):
        db, broken, dw = bias_grad(shim, dy, column, 204)
        assert [bool(flag) for flag in broken] == [
            (split, block) == (row // 64, output // 128) for split in range(3) for block in range(2)
        ]
        assert dw.isnan().all()
        assert db is None or db.isnan().all()


@pytest.mark.parametrize(("stride", "offset", "vector"), [(48, 0, 4), (50, 0, 1), (48, 4, 4), (48, 3, 1)])
def test_rows_apart_and_off_alignment(shim: cuda_shim.Library, stride: int, offset: int, vector: int) -> None:
    dy = torch.full((20, stride), math.nan)  # what is not this layer's
    own = randn(20, 40, dtype=F32)
    dy[:, offset : offset + 40] = own
    assert plan(shim, dy, 40, offset)[0] == vector
    db, broken, _ = bias_grad(shim, dy, torch.ones(20), 40, offset=offset)
    assert_close("db", db, own.double().sum(0), ROUNDING[F32])
    assert broken.tolist() == [0] * len(broken)


def test_large_values_are_finite(shim: cuda_shim.Library) -> None:
    dy = torch.full((40, 3), 3e38)  # their sum is not
    _, broken, dw = bias_grad(shim, dy, torch.ones(40), 3)
    assert broken.tolist() == [0]
    assert dw.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (33, 40), (100, 300)])
def test_poison_reaches_all_of_dw(shim: cuda_shim.Library, outputs: int, inputs: int, dtype: torch.dtype) -> None:
    dy, dw = randn(2, outputs, dtype=dtype), randn(outputs, inputs, dtype=dtype)
    dy[1, -1] = math.inf
    _, _, own = bias_grad(shim, dy, None, outputs, dw)
    assert own.isnan().all()


def test_no_rows_and_nothing_to_do(shim: cuda_shim.Library) -> None:
    db, broken, _ = bias_grad(shim, torch.empty(0, 5), torch.empty(0), 5)
    assert db is not None
    assert db.tolist() == [0] * 5
    assert broken.tolist() == [0]
    shim.reset_counts()
    bias_grad(shim, torch.empty(4, 0), None, 0)
    assert shim.launches == 0
