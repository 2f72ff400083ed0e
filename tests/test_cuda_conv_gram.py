"""The CUDA Gram of convolutions on the host: the kernels' own source, run by the shim."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cuda_shim
import pytest
import torch
from cases import BF16, DTYPES, F16, F32, F64, error_of, randn
from test_conv_gram import EMPTY, GRAMS, LAYOUTS, empty_gram, naive
from test_cuda_input_gram import CUDA, SUMS, TYPE_CODE
from torch import Tensor

SOURCES = [
    *(CUDA / name for name in ("conv_gram.cu", "conv_gram_plan.cpp", "input_gram_plan.cpp", "patch_copy.cu")),
    Path(cuda_shim.__file__).with_name("conv_calls.cu"),
]
# Of the product in terms of tensor core types; test_cuda_input_gram.py looks closer.
ALLOWED = {F64: 1e-14, F32: 2e-6, BF16: 2e-6, F16: 2e-6}
BUDGET = 2**26
LARGE = ("many channels", "depthwise", "groups")  # of many tiles or groups, which take long here


@pytest.fixture(scope="module")
def shim() -> cuda_shim.Library:
    return cuda_shim.load(SOURCES)


def numbers_of(x: Tensor, arguments: Any) -> Tensor:
    """The geometry as the shim takes it, in three dimensions."""
    *sizes, groups = arguments
    spatial = x.ndim - 2

    def three(numbers: tuple[int, ...], fill: int) -> list[int]:
        return [fill] * (3 - spatial) + list(numbers)

    kernel, stride, padding, dilation = sizes
    triples = (x.shape[2:], 1), (kernel, 1), (stride, 1), (padding, 0), (dilation, 1)
    return torch.tensor([x.shape[0], x.shape[1], groups, *(n for one, fill in triples for n in three(one, fill))])


def strides_of(x: Tensor) -> Tensor:
    return torch.tensor([*x.stride()[:2], *[0] * (5 - x.ndim), *x.stride()[2:]])


def plan(
    shim: cuda_shim.Library,
    x: Tensor,
    arguments: Any,
    bias: bool,
    *,
    wide: bool = False,
    budget: int = BUDGET,
    tile: int = 0,
    splits: int = 0,
) -> dict[str, int]:
    names = ("tile", "cluster", "splits", "blocks", "padded", "workspace", "samples", "along", "lines")
    numbers = shim.guarded(numbers_of(x, arguments), "numbers")
    shape = (bias, TYPE_CODE[x.dtype], wide, budget, tile, splits)
    values = shim.run("call_conv_gram_plan", shim.empty(9, dtype=torch.int64), numbers, *shape, seeds=(0,))[0]
    return dict(zip(names, values.tolist(), strict=True))


def gram(
    shim: cuda_shim.Library,
    x: Tensor,
    arguments: Any,
    bias: bool,
    *,
    wide: bool = False,
    tf32: bool = False,
    budget: int = BUDGET,
    tile: int = 0,
    splits: int = 0,
    seeds: tuple[int, ...] = (0, 1),
) -> Tensor:
    """The Gram of ``x``, which may have gaps between its numbers. Negative splits: in a cluster."""
    made = plan(shim, x, arguments, bias, wide=wide, budget=budget, tile=tile, splits=splits)
    kernel, *_, groups = arguments
    n = x.shape[1] // groups * torch.Size(kernel).numel() + bias
    extent = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
    buffer = x.as_strided((extent,), (1,))
    results = shim.run(
        "call_conv_gram",
        shim.guarded(buffer, "x"),
        shim.guarded(strides_of(x), "strides"),
        shim.guarded(numbers_of(x, arguments), "numbers"),
        shim.empty(groups, n, n, dtype=F64 if wide else SUMS[x.dtype], name="gram"),
        shim.empty(made["padded"], dtype=torch.uint8, name="padded"),
        shim.empty(made["workspace"], dtype=torch.uint8, name="workspace"),
        *(bias, TYPE_CODE[x.dtype], wide, tf32, budget, tile, splits),
        seeds=seeds,
    )
    return results[3]


def assert_right(own: Tensor, x: Tensor, arguments: Any, bias: bool, allowed: float) -> None:
    expected = naive(x, arguments, bias)
    assert own.shape == expected.shape
    assert error_of(own, expected) <= allowed
    assert torch.equal(own, own.mT)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", GRAMS)
def test_geometries(shim: cuda_shim.Library, name: str, dtype: torch.dtype) -> None:
    """As planned; in pieces of samples, and of one line of positions each; in splits, and in a cluster."""
    size, *arguments = GRAMS[name]
    x = randn(*size, dtype=dtype)
    cases: list[tuple[bool, dict[str, int]]] = [(False, {"budget": 5000})]
    if name not in LARGE:
        cases += [(True, {}), (True, {"budget": 1, "tile": 64, "splits": 3})]
    for bias, options in cases:
        own = gram(shim, x, arguments, bias, **options, seeds=(0,))
        assert own.dtype == SUMS[dtype]
        assert_right(own, x, arguments, bias, ALLOWED[dtype])
    if name not in LARGE:
        split = gram(shim, x, arguments, True, tile=64, splits=2)
        assert_right(split, x, arguments, True, ALLOWED[dtype])
        assert torch.equal(gram(shim, x, arguments, True, tile=64, splits=-2, seeds=(0,)), split)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["1d", "2d stride", "depthwise", "3d"])
def test_layouts(shim: cuda_shim.Library, name: str, layout: str) -> None:
    size, *arguments = GRAMS[name]
    x = LAYOUTS[layout](randn(*size, dtype=BF16))
    assert_right(gram(shim, x, arguments, True), x, arguments, True, ALLOWED[BF16])


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7, 9, 33])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_channels(shim: cuda_shim.Library, dtype: torch.dtype, channels: int) -> None:
    """Copies of every size, and channels that are rounded up."""
    x, arguments = randn(2, 2 * channels, 5, 6, dtype=dtype), ((2, 3), (1, 2), (1, 0), (1, 1), 2)
    assert_right(gram(shim, x, arguments, True, seeds=(0,)), x, arguments, True, ALLOWED[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [name for name in EMPTY if name != "no samples"])  # which launch nothing
def test_without_a_number(shim: cuda_shim.Library, name: str, dtype: torch.dtype) -> None:
    size, *arguments = EMPTY[name]
    x = torch.zeros(size, dtype=dtype)
    for bias in (True, False) if size[1] else (True,):  # without either there is no Gram
        expected = empty_gram(size, arguments, bias)
        for options in ({}, {"budget": 1}, {"wide": True}):
            own = gram(shim, x, arguments, bias, **options, seeds=(0,))
            assert torch.equal(own.double(), expected)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_large_tiles(shim: cuda_shim.Library, dtype: torch.dtype) -> None:
    x, arguments = randn(2, 24, 6, 5, dtype=dtype), ((3, 3), (1, 1), (1, 1), (1, 1), 1)
    for splits in (1, -2):
        assert_right(gram(shim, x, arguments, True, tile=128, splits=splits), x, arguments, True, ALLOWED[dtype])


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_wide(shim: cuda_shim.Library, dtype: torch.dtype) -> None:
    """Narrow x, sums in float64."""
    size, *arguments = GRAMS["2d"]
    x = randn(*size, dtype=dtype)
    own = gram(shim, x, arguments, True, wide=True)
    assert own.dtype == F64
    assert_right(own, x, arguments, True, ALLOWED[F64])


def test_tf32(shim: cuda_shim.Library) -> None:
    size, *arguments = GRAMS["2d"]
    x = randn(*size, dtype=F32)
    own = gram(shim, x, arguments, True, tf32=True)
    assert_right(own, x, arguments, True, 1e-3)
    assert error_of(own, naive(x, arguments, True)) > 1e-6


def test_not_finite(shim: cuda_shim.Library) -> None:
    """Rows and columns of inputs that meet it, and no others: padding channels and partial tiles do not spread it."""
    x, arguments = randn(1, 3, 4, 4, dtype=BF16), ((1, 1), (1, 1), (0, 0), (1, 1), 1)
    x[0, 1, 3, 3] = torch.nan
    own = gram(shim, x, arguments, True, seeds=(0,))
    assert own.isnan()[0].tolist() == [[i == 1 or j == 1 for j in range(4)] for i in range(4)]


def test_pieces_keep_to_the_budget(shim: cuda_shim.Library) -> None:
    arguments = ((3, 3), (1, 1), (1, 1), (1, 1), 1)
    x = torch.empty(256, 64, 32, 32, dtype=BF16)
    whole = plan(shim, x, arguments, True)
    assert (whole["tile"], whole["samples"], whole["lines"]) == (128, 256, 32)
    assert 100 <= whole["blocks"] <= 132
    assert whole["cluster"] == whole["splits"] > 1
    some = plan(shim, x, arguments, True, budget=2**20)
    assert (some["samples"], some["lines"]) == (7, 32)
    lines = plan(shim, x, arguments, True, budget=2**15)
    assert (lines["samples"], lines["along"], lines["lines"]) == (1, 1, 5)
    for made, budget in ((whole, BUDGET), (some, 2**20), (lines, 2**15)):
        assert made["padded"] <= budget
