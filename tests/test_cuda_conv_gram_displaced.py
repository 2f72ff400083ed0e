"""The CUDA Gram of convolutions from displaced products, on the host: the kernels' own source, run by the shim."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import cuda_shim
import pytest
import torch
from cases import BF16, DTYPES, F16, F32, F64, error_of, randn
from test_conv_gram import LAYOUTS, naive
from test_cuda_conv_gram import ALLOWED, BUDGET, assert_right, numbers_of, strides_of
from test_cuda_input_gram import CUDA, SUMS, TYPE_CODE
from torch import Tensor

SOURCES = [
    *(CUDA / name for name in ("conv_gram_displaced.cu", "conv_gram_displaced_plan.cpp", "conv_gram_plan.cpp")),
    *(CUDA / name for name in ("input_gram_plan.cpp", "patch_copy.cu")),
    Path(cuda_shim.__file__).with_name("conv_displaced_calls.cu"),
]


def arguments(kernel: tuple[int, ...], padding: tuple[int, ...], groups: int = 1) -> Any:
    one = (1,) * len(kernel)
    return kernel, one, padding, one, groups


GEOMETRIES: dict[str, tuple[tuple[int, ...], Any]] = {
    "1d": ((3, 6, 19), arguments((3,), (1,))),
    "1d even": ((2, 5, 9), arguments((4,), (0,))),
    "1d as long as the image": ((2, 3, 5), arguments((3,), (0,))),
    "2d": ((3, 8, 7, 9), arguments((3, 3), (1, 1))),
    "2d without padding": ((2, 4, 6, 7), arguments((3, 3), (0, 0))),
    "2d uneven": ((3, 8, 7, 9), arguments((3, 2), (1, 0))),
    "2d narrow": ((3, 4, 7, 9), arguments((3, 1), (1, 0))),
    "2d wide": ((2, 3, 4, 12), arguments((1, 5), (0, 2))),
    "2d long": ((2, 3, 9, 8), arguments((5, 4), (2, 1))),
    "padding above the kernel": ((2, 5, 3, 4), arguments((2, 2), (3, 4))),
    "groups": ((3, 20, 6, 5), arguments((3, 3), (1, 1), 2)),
    "many channels": ((3, 68, 4, 5), arguments((3, 2), (1, 0))),
    "3d": ((2, 4, 4, 5, 6), arguments((2, 3, 2), (1, 1, 0))),
}


class Plan(NamedTuple):
    tile: int
    sources: int
    targets: int
    cells: int
    samples: int
    depth: int
    pieces: int
    tiles: int
    padded: int
    workspace: int


@pytest.fixture(scope="module")
def shim() -> cuda_shim.Library:
    return cuda_shim.load(SOURCES)


def plan(
    shim: cuda_shim.Library,
    x: Tensor,
    geometry: Any,
    *,
    wide: bool = False,
    budget: int = BUDGET,
    processors: int = 132,
) -> Plan:
    numbers = shim.guarded(numbers_of(x, geometry), "numbers")
    values = shim.empty(10, dtype=torch.int64)
    shape = (TYPE_CODE[x.dtype], wide, budget, processors)
    return Plan(*shim.run("call_displaced_plan", values, numbers, *shape, seeds=(0,))[0].tolist())


def gram(
    shim: cuda_shim.Library,
    x: Tensor,
    geometry: Any,
    bias: bool,
    *,
    wide: bool = False,
    tf32: bool = False,
    budget: int = BUDGET,
    processors: int = 132,
    seeds: tuple[int, ...] = (0,),
) -> Tensor:
    """The Gram of ``x``, which may have gaps between its numbers."""
    made = plan(shim, x, geometry, wide=wide, budget=budget, processors=processors)
    kernel, *_, groups = geometry
    n = x.shape[1] // groups * torch.Size(kernel).numel() + bias
    extent = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    results = shim.run(
        "call_conv_gram_displaced",
        shim.guarded(x.as_strided((extent,), (1,)), "x"),
        shim.guarded(strides_of(x), "strides"),
        shim.guarded(numbers_of(x, geometry), "numbers"),
        shim.empty(groups, n, n, dtype=F64 if wide else SUMS[x.dtype], name="gram"),
        shim.empty(made.padded, dtype=torch.uint8, name="padded"),
        shim.empty(made.workspace, dtype=torch.uint8, name="workspace"),
        *(bias, TYPE_CODE[x.dtype], wide, tf32, budget, processors),
        seeds=seeds,
    )
    return results[3]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_geometries(shim: cuda_shim.Library, name: str, dtype: torch.dtype) -> None:
    size, geometry = GEOMETRIES[name]
    x = randn(*size, dtype=dtype)
    own = gram(shim, x, geometry, True)
    assert own.dtype == SUMS[dtype]
    assert_right(own, x, geometry, True, ALLOWED[dtype])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(shim: cuda_shim.Library, layout: str) -> None:
    size, geometry = GEOMETRIES["2d"]
    x = LAYOUTS[layout](randn(*size, dtype=BF16))
    assert_right(gram(shim, x, geometry, False), x, geometry, False, ALLOWED[BF16])


@pytest.mark.parametrize("dtype", [F64, BF16], ids=str)
@pytest.mark.parametrize("name", ["1d", "2d", "groups", "3d"])
def test_splits_and_pieces_of_the_batch(shim: cuda_shim.Library, name: str, dtype: torch.dtype) -> None:
    """Two samples at a time, of three and of an odd number, and cells in several pieces."""
    size, geometry = GEOMETRIES[name]
    x = randn(5, *size[1:], dtype=dtype)
    whole = plan(shim, x, geometry)
    budget = whole.padded * 3 // 5
    made = plan(shim, x, geometry, budget=budget)
    assert 1 <= made.samples < whole.samples == 5
    assert made.padded <= budget
    assert whole.pieces > whole.cells or name != "2d" or dtype != F64
    assert_right(gram(shim, x, geometry, True, budget=budget), x, geometry, True, ALLOWED[dtype])


def test_order_of_threads_and_blocks(shim: cuda_shim.Library) -> None:
    """The same bits in every order: `shim.run` compares them."""
    size, geometry = GEOMETRIES["2d uneven"]
    x = randn(*size, dtype=F32)
    assert_right(gram(shim, x, geometry, True, seeds=(0, 1, 2)), x, geometry, True, ALLOWED[F32])


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_wide(shim: cuda_shim.Library, dtype: torch.dtype) -> None:
    """Narrow x, sums in float64."""
    size, geometry = GEOMETRIES["2d"]
    x = randn(*size, dtype=dtype)
    own = gram(shim, x, geometry, True, wide=True)
    assert own.dtype == F64
    assert_right(own, x, geometry, True, ALLOWED[F64])


def test_tf32(shim: cuda_shim.Library) -> None:
    size, geometry = GEOMETRIES["2d"]
    x = randn(*size, dtype=F32)
    own = gram(shim, x, geometry, True, tf32=True)
    assert_right(own, x, geometry, True, 1e-3)
    assert error_of(own, naive(x, geometry, True)) > 1e-6


def test_what_is_not_finite_shows(shim: cuda_shim.Library) -> None:
    """Wherever a tap meets it, and nowhere else; only its products with padding may be left out."""
    size, geometry = GEOMETRIES["2d"]
    x = randn(*size, dtype=BF16)
    x[1, 3, 0, 8] = torch.inf
    bad, expected = ~gram(shim, x, geometry, True).isfinite(), ~naive(x, geometry, True).isfinite()
    assert torch.equal(bad.diagonal(dim1=1, dim2=2), expected.diagonal(dim1=1, dim2=2))
    assert not (bad & ~expected).any()


def test_plans(shim: cuda_shim.Library) -> None:
    usual = torch.empty(256, 64, 32, 32, dtype=BF16)
    made = plan(shim, usual, arguments((3, 3), (1, 1)))
    # Two sources and eight targets of 64 channels; lines that lie in the padding are no cells.
    assert made[:5] == (128, 2, 8, 15, 256)
    assert (made.tiles, made.pieces) == (4, 41)
    assert made.padded <= BUDGET
    large = plan(shim, torch.empty(8, 256, 14, 14, dtype=BF16), arguments((3, 3), (1, 1)))
    assert large[:5] == (128, 1, 13, 9, 8)
    assert large.tiles == 2 * 26


@pytest.mark.parametrize(
    ("size", "geometry", "budget"),
    [
        ((2, 4, 9, 9), ((3, 3), (2, 1), (1, 1), (1, 1), 1), BUDGET),
        ((2, 4, 9, 9), ((3, 3), (1, 1), (1, 1), (1, 2), 1), BUDGET),
        ((2, 4, 4, 9), arguments((3, 3), (0, 0)), BUDGET),  # no core
        ((2, 4, 9, 9), arguments((1, 1), (0, 0)), BUDGET),
        ((2, 0, 9, 9), arguments((3, 3), (1, 1)), BUDGET),
        ((2, 4, 9, 9), arguments((3, 3), (1, 1)), 1000),  # not one sample fits
        ((2, 4, 40, 40), arguments((13, 13), (0, 0)), BUDGET),  # more displacements than a launch takes
    ],
)
def test_without_a_plan(shim: cuda_shim.Library, size: tuple[int, ...], geometry: Any, budget: int) -> None:
    assert plan(shim, torch.empty(size, dtype=BF16), geometry, budget=budget).tile == 0
