"""The CUDA kernels of steps in emended coordinates on the host: their own source, run by the shim."""

from __future__ import annotations

from pathlib import Path

import cuda_shim
import pytest
import torch
from cases import BF16, DTYPES, F16, F32, F64, error_of, randn
from test_coordinates_ops import blocks_of, by_eigenvalues, positive
from test_cuda_input_gram import CUDA, OPTIONS, SUMS, TYPE_CODE, rounded_like
from torch import Tensor

from consequentialism.backend.reference import coordinates
from consequentialism.solve import root as solve

NAMES = ("decayed_gram", "inverse_root", "root_product")
SOURCES = [
    *(CUDA / f"{name}.cu" for name in (*NAMES, "warpgroup_gram")),
    *(CUDA / f"{name}_plan.cpp" for name in (*NAMES, "input_gram", "emended_input")),
    Path(cuda_shim.__file__).with_name("coordinates_calls.cu"),
]
# Of the product in terms of tensor core types; test_cuda_input_gram.py and test_cuda_emended_input.py look closer.
ALLOWED = {F64: 1e-14, F32: 2e-6, BF16: 2e-6, F16: 2e-6}
ROUNDED = {F64: 1e-14, F32: 2e-6, BF16: 4e-3, F16: 5e-4}  # a weight of that type


@pytest.fixture(scope="module")
def shim() -> cuda_shim.Library:
    return cuda_shim.load(SOURCES, options=["-O2", *OPTIONS])


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=F64)


def decayed(
    shim: cuda_shim.Library,
    x: Tensor,
    dtype: torch.dtype,
    blocks: int,
    bias: bool,
    memory: float,
    *,
    tile: int = 0,
    splits: int = 0,
    stride: int | None = None,
    offset: int = 0,
    seeds: tuple[int, ...] = (0, 1),
) -> tuple[Tensor, Tensor]:
    """The kernel's ``memory * A + 0.5 x^T x``, and what it ought to be."""
    rows, inputs = x.shape
    values, buffer = rounded_like(x, dtype, inputs if stride is None else stride, offset)
    before = blocks_of(randn(rows, inputs, seed=5), blocks, bias).to(SUMS[dtype])
    shape = (TYPE_CODE[dtype], rows, inputs, blocks, bias, tile, splits)
    plan = shim.run("call_decayed_gram_plan", shim.empty(7, dtype=torch.int64, name="plan"), *shape, seeds=(0,))[0]
    results = shim.run(
        "call_decayed_gram",
        shim.guarded(before, "before"),
        shim.guarded(buffer, "x"),
        shim.guarded(doubles(memory, 0.5), "factors"),
        shim.empty(*before.shape, dtype=before.dtype, name="gram"),
        shim.empty(int(plan[6]), dtype=torch.uint8, name="workspace"),
        *(TYPE_CODE[dtype], offset, rows, inputs, inputs if stride is None else stride, blocks, bias, False),
        *(tile, splits),
        seeds=seeds,
    )
    return results[3], memory * before.double() + 0.5 * blocks_of(values, blocks, bias)


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decayed_gram(shim: cuda_shim.Library, dtype: torch.dtype, bias: bool) -> None:
    for rows, inputs, blocks in ((1, 1, 1), (5, 7, 2), (70, 65, 1), (65, 130, 3), (33, 9, 4)):
        for memory in (0.0, 0.75):
            own, expected = decayed(shim, randn(rows, inputs), dtype, blocks, bias, memory)
            assert own.dtype == SUMS[dtype]
            assert torch.equal(own, own.mT)
            assert error_of(own, expected) <= ALLOWED[dtype], (rows, inputs, blocks, memory)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decayed_gram_in_splits(shim: cuda_shim.Library, dtype: torch.dtype) -> None:
    for rows, inputs, blocks, splits in ((300, 70, 2, 3), (129, 33, 1, 100), (130, 9, 4, 2)):
        shim.reset_counts()
        own, expected = decayed(
            shim, randn(rows, inputs), dtype, blocks, True, 0.9, tile=64, splits=splits, seeds=cuda_shim.SEEDS
        )
        assert shim.launches == 2 * len(cuda_shim.SEEDS)
        assert torch.equal(own, own.mT)
        assert error_of(own, expected) <= ALLOWED[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decayed_gram_in_a_cluster(shim: cuda_shim.Library, dtype: torch.dtype) -> None:
    for rows, inputs, blocks, splits in ((300, 70, 2, 3), (130, 9, 4, 2)):
        shim.reset_counts()
        own, expected = decayed(
            shim, randn(rows, inputs), dtype, blocks, True, 0.9, tile=64, splits=-splits, seeds=cuda_shim.SEEDS
        )
        assert shim.launches == len(cuda_shim.SEEDS)
        assert torch.equal(own, own.mT)
        assert error_of(own, expected) <= ALLOWED[dtype]


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_decayed_gram_in_large_tiles_at_any_alignment(shim: cuda_shim.Library, dtype: torch.dtype) -> None:
    for inputs, blocks, stride, offset in ((140, 1, 140, 0), (150, 2, 153, 3), (270, 2, 272, 0)):
        own, expected = decayed(
            shim, randn(40, inputs), dtype, blocks, True, 0.5, tile=128, splits=1, stride=stride, offset=offset
        )
        assert error_of(own, expected) <= ALLOWED[dtype]


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_decayed_gram_by_warpgroups(shim: cuda_shim.Library, dtype: torch.dtype) -> None:
    """Blocks of several tiles and of a part of one, the bias in the last; partial Grams and clusters."""
    for rows, inputs, blocks, splits, bias in ((70, 272, 2, 1, True), (300, 40, 1, 2, True), (200, 24, 3, -2, False)):
        for memory in (0.0, 0.75):
            own, expected = decayed(
                shim, randn(rows, inputs), dtype, blocks, bias, memory, tile=256, splits=splits, seeds=cuda_shim.SEEDS
            )
            assert torch.equal(own, own.mT)
            assert error_of(own, expected) <= ALLOWED[dtype], (rows, inputs, blocks, memory)


def test_decayed_gram_fills_the_chip(shim: cuda_shim.Library) -> None:
    for rows, inputs, blocks in ((65536, 768, 1), (65536, 768, 3), (4096, 1024, 4), (65536, 64, 1)):
        arguments = (TYPE_CODE[BF16], rows, inputs, blocks, False, 0, 0)
        plan = shim.run("call_decayed_gram_plan", shim.empty(7, dtype=torch.int64), *arguments, seeds=(0,))[0]
        assert 60 <= int(plan[3]) * blocks <= 400
        assert int(plan[6]) <= 128 * 2**20


def root_of(
    shim: cuda_shim.Library, matrix: Tensor, root: int, low: float, tile: int, seeds: tuple[int, ...] = (0, 1)
) -> Tensor:
    batch, order = matrix.shape[:2]
    plan = solve.plan(root, low, matrix.dtype)
    shape = (TYPE_CODE[matrix.dtype], batch, order)
    room = shim.run("call_inverse_root_plan", shim.empty(5, dtype=torch.int64), *shape, tile, seeds=(0,))[0]
    results = shim.run(
        "call_inverse_root",
        shim.guarded(matrix, "matrix"),
        shim.guarded(doubles(*plan.coefficients), "coefficients"),
        shim.empty(*matrix.shape, dtype=matrix.dtype, name="result"),
        shim.empty(int(room[4]), dtype=torch.uint8, name="workspace"),
        *(*shape, root, len(plan.coefficients) // 3, tile),
        seeds=seeds,
    )
    return results[2]


@pytest.mark.parametrize("root", solve.ROOTS)
@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
def test_inverse_root(shim: cuda_shim.Library, dtype: torch.dtype, root: int) -> None:
    for batch, order, low in ((1, 1, 0.5), (2, 17, 0.1), *(((1, 66, 0.1),) if (root, dtype) == (2, F32) else ())):
        matrix = positive(batch, order, low, dtype)
        own = root_of(shim, matrix, root, low * 0.9, 0, (0, 1) if order < 66 else (0,))
        expected = by_eigenvalues(matrix, -1 / root)
        plain = 1e-11 if dtype == F64 else error_of(by_eigenvalues(matrix, -1 / root, F32), expected)
        assert torch.equal(own, own.mT)
        assert error_of(own, expected) <= 2 * plain + (0 if dtype == F64 else 1e-6)


def test_inverse_root_of_large_tiles(shim: cuda_shim.Library) -> None:
    """Two of them, with eigenvalues near 1, for which few steps do."""
    matrix = positive(1, 132, 0.9, F32)
    own = root_of(shim, matrix, 2, 0.89, 128, (0,))
    assert error_of(own, by_eigenvalues(matrix, -0.5)) <= 2e-6


def test_inverse_root_passes_on_what_is_not_a_number(shim: cuda_shim.Library) -> None:
    matrix = positive(2, 9, 0.1, F32)
    matrix[0, 3, 3] = torch.nan
    own = root_of(shim, matrix, 4, 0.09, 0)
    assert own[0].isnan().any()
    assert error_of(own[1], by_eigenvalues(matrix[1], -0.25)) <= 2e-6


def multiplied(
    shim: cuda_shim.Library,
    rows: Tensor,
    root: Tensor,
    out: Tensor | None,
    strides: tuple[int, ...] | None = None,
    *,
    tile: int = 0,
) -> Tensor:
    batch, count, order = rows.shape
    kept = torch.full(rows.shape, torch.nan, dtype=root.dtype) if out is None else out
    lines = (order, count * order, order, order * order, order, count * order) if strides is None else strides
    results = shim.run(
        "call_root_product",
        shim.guarded(rows, "rows"),
        shim.guarded(root, "root"),
        shim.guarded(doubles(1.0 if out is None else -0.5), "factors"),
        shim.guarded(kept, "out"),
        shim.guarded(torch.tensor(lines), "strides"),
        *(TYPE_CODE[rows.dtype], kept.dtype != root.dtype, out is not None, batch, count, order, tile),
        seeds=(0, 1),
    )
    return results[3]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_root_product(shim: cuda_shim.Library, dtype: torch.dtype) -> None:
    for batch, count, order in ((1, 1, 1), (2, 5, 7), (1, 33, 31), (2, 64, 65), (1, 66, 130)):
        rows, root = randn(batch, count, order).to(dtype), positive(batch, order, 0.01, SUMS[dtype])
        expected = rows.double() @ root.double()
        assert error_of(multiplied(shim, rows, root, None), expected) <= ALLOWED[dtype]
        for kind in {SUMS[dtype], dtype}:
            weight = randn(batch, count, order, seed=1).to(kind)
            own = multiplied(shim, rows, root, weight)
            assert own.dtype == kind
            assert error_of(own, weight.double() - 0.5 * expected) <= ROUNDED[kind]


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_root_product_in_large_tiles(shim: cuda_shim.Library, dtype: torch.dtype) -> None:
    rows, root = randn(1, 130, 140).to(dtype), positive(1, 140, 0.01, F32)
    own = multiplied(shim, rows, root, None, tile=128)
    assert error_of(own, rows.double() @ root.double()) <= ALLOWED[dtype]


def test_blocks_are_the_ones_of_the_reference(shim: cuda_shim.Library) -> None:
    """Columns that no block counts twice or leaves out."""
    x = torch.eye(11)
    own, _ = decayed(shim, x, F32, 3, True, 0.0)
    spans = coordinates.block_spans(11, 3)
    sizes = [end - begin for begin, end in spans]
    assert own.diagonal(dim1=1, dim2=2).sum(1).tolist() == [sizes[0] / 2, sizes[1] / 2, sizes[2] / 2 + 11 / 2]
