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


def bias_grad(shim: cuda_shim.Library, dy: Tensor, column: Tensor | None, outputs: int) -> tuple[Tensor | None, Tensor]:
    """``db [O]`` and the flags, of dy's first ``outputs`` columns."""
    rows, stride = dy.shape
    flags = shim.empty(-(-outputs // 32), dtype=torch.int32, name="broken")
    own = None if column is None else shim.empty(outputs, dtype=dy.dtype, name="db")
    held = None if column is None else shim.guarded(column, "column")
    results = shim.run(
        f"call_bias_grad_{NAMES[dy.dtype]}", shim.guarded(dy, "dy"), held, own, flags, rows, outputs, stride
    )
    return (None if column is None else results[-2]), results[-1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "outputs"), [(1, 1), (7, 31), (16, 32), (17, 33), (40, 100)])
def test_bias_grad(shim: cuda_shim.Library, rows: int, outputs: int, dtype: torch.dtype) -> None:
    dy, column = randn(rows, outputs, dtype=dtype), randn(rows, seed=1, dtype=F64 if dtype == F64 else F32)
    db, broken = bias_grad(shim, dy, column, outputs)
    assert_close("db", db, dy.double().T @ column.double(), ROUNDING[dtype])
    assert broken.tolist() == [0] * len(broken)
    nothing, broken = bias_grad(shim, dy, None, outputs)
    assert nothing is None
    assert broken.tolist() == [0] * len(broken)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("row", "output"), [(0, 0), (16, 31), (39, 32), (25, 99)])
def test_flags_name_the_columns(shim: cuda_shim.Library, row: int, output: int, value: float) -> None:
    dy = randn(40, 100, dtype=F32)
    dy[row, output] = value
    for column in (torch.zeros(40), None):
        _, broken = bias_grad(shim, dy, column, 100)
        assert [bool(flag) for flag in broken] == [block == output // 32 for block in range(4)]


def test_row_stride(shim: cuda_shim.Library) -> None:
    dy = randn(20, 50, dtype=F32)
    dy[:, 40:] = math.nan  # not this layer's
    db, broken = bias_grad(shim, dy, torch.ones(20), 40)
    assert_close("db", db, dy[:, :40].double().sum(0), ROUNDING[F32])
    assert broken.tolist() == [0, 0]


def test_large_values_are_finite(shim: cuda_shim.Library) -> None:
    dy = torch.full((40, 3), 3e38)  # their sum is not
    _, broken = bias_grad(shim, dy, torch.ones(40), 3)
    assert broken.tolist() == [0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (33, 40), (100, 3)])
def test_poison(shim: cuda_shim.Library, outputs: int, inputs: int, dtype: torch.dtype) -> None:
    dw, db = randn(outputs, inputs, dtype=dtype), randn(outputs, seed=1, dtype=dtype)
    flags = torch.zeros(-(-outputs // 32), dtype=torch.int32)
    name, count = f"call_poison_{NAMES[dtype]}", outputs * inputs
    arguments = (shim.guarded(dw, "dw"), shim.guarded(db, "db"))
    own = shim.run(name, *arguments, shim.guarded(flags, "broken"), count, outputs)
    assert torch.equal(own[0], dw)
    assert torch.equal(own[1], db)
    flags[-1] = 1
    own = shim.run(name, *arguments, shim.guarded(flags, "broken"), count, outputs)
    assert own[0].isnan().all()
    assert own[1].isnan().all()
    own = shim.run(name, arguments[0], None, shim.guarded(flags, "broken"), count, outputs)
    assert own[0].isnan().all()


def test_nothing_to_do(shim: cuda_shim.Library) -> None:
    shim.reset_counts()
    bias_grad(shim, torch.empty(4, 0), None, 0)
    assert shim.launches == 0
