"""Products of warpgroups on the host: the stand-in's own semantics, and the Gram's kernel that is made of them."""

from __future__ import annotations

import itertools
from pathlib import Path

import cuda_shim
import pytest
import torch
from cases import BF16, F16, F32, make_input, randn
from test_cuda_input_gram import HOPPER_SHARED, OPTIONS, SOURCES, assert_right, gram, plans
from torch import Tensor

TILE = 256  # of columns; that of warpgroups
CHAIN = 2048
SHARED = 4 * (128 + TILE) * 128 + 1024
FORMS = pytest.mark.parametrize("primal", [False, True], ids=["dual", "primal"])
MISTAKES = {
    "no fence of copies": r"whose copy by thread \d+ is not fenced",
    "no wait for copies": r"whose copy by thread \d+ is not waited for",
    "no fence of sums": "without warpgroup_fence",
    "reads early": "",
    "writes sums in flight": r"sum 5 of lane \d+ was touched while in flight",
    "overwrites an operand": "",
    "never waits": "exits with products",
    "other products in a warp": "warps 0 and 2 of a warpgroup have issued other products",
    "another swizzle": "a product's descriptor with swizzle 3 and base offset 0",
    "other descriptors in a lane": "differ between lanes 0 and 9",
    "panels that are not aligned": "",
}


@pytest.fixture(scope="module")
def shim() -> cuda_shim.Library:
    return cuda_shim.load(SOURCES, OPTIONS)


@pytest.fixture(scope="module")
def products() -> cuda_shim.Library:
    return cuda_shim.load([Path(cuda_shim.__file__).with_name("warpgroup_calls.cu")])


def product(
    products: cuda_shim.Library, outer_major: bool, mistake: int, seeds: tuple[int, ...] = (0,)
) -> tuple[Tensor, Tensor]:
    """The kernel's ``a b^T``, and the right one."""
    a, b = randn(64, 64).to(BF16), randn(TILE, 64, seed=1).to(BF16)
    stored = [one.T.contiguous() if outer_major else one for one in (a, b)]
    guarded = [products.guarded(one, name) for one, name in zip(stored, "ab", strict=True)]
    out = products.run(
        "call_product", *guarded, products.empty(64, TILE, name="out"), outer_major, mistake, seeds=seeds
    )
    return out[2], a.double() @ b.double().T


@pytest.mark.parametrize("outer_major", [False, True], ids=["inner", "outer"])
def test_a_product_by_its_descriptors(products: cuda_shim.Library, outer_major: bool) -> None:
    own, expected = product(products, outer_major, 0, cuda_shim.SEEDS)
    torch.testing.assert_close(own.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("outer_major", [False, True], ids=["inner", "outer"])
@pytest.mark.parametrize("mistake", range(1, 1 + len(MISTAKES)), ids=list(MISTAKES))
def test_a_mistake_is_seen(products: cuda_shim.Library, mistake: int, outer_major: bool) -> None:
    message = list(MISTAKES.values())[mistake - 1]
    if message:
        with pytest.raises(cuda_shim.ShimError, match=message):
            product(products, outer_major, mistake)
        return
    own, expected = product(products, outer_major, mistake)
    wrong = own[0, :128].isnan() if mistake == 4 else ~torch.isclose(own.double(), expected, rtol=1e-2, atol=1e-2)
    assert wrong.double().mean() > 0.4


def test_descriptor_has_the_documented_bits(products: cuda_shim.Library) -> None:
    """In units of 16 bytes: start address, bits 0-13; leading offset, 16-29; stride, 32-45; 128-byte swizzle, 62-63."""
    (words,) = products.run("call_descriptor", products.empty(1, dtype=torch.int64, name="words"), seeds=(0,))
    assert int(words[0]) == 0x2C4 | 0x200 << 16 | 0x40 << 32 | 1 << 62


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@FORMS
def test_gram(shim: cuda_shim.Library, primal: bool, dtype: torch.dtype) -> None:
    """Ragged in every direction: tiles, panels, chunks of 16 bytes, stages; fewer stages than the pipeline has too."""
    for outer, inner in ((1, 1), (7, 65), (130, 200), (300, 40)):
        rows, inputs = (inner, outer) if primal else (outer, inner)
        x = make_input("random", rows, inputs)
        own, values = gram(
            shim, x, dtype, bias=outer != 130, primal=primal, tile=TILE, splits=1, stride=inputs + -inputs % 8
        )
        assert_right(own, values, dtype, outer != 130, primal)


@FORMS
def test_gram_in_any_order_of_the_threads(shim: cuda_shim.Library, primal: bool) -> None:
    """Several tiles; a pipeline that comes round; a cluster."""
    for outer, inner, splits in ((136, 72, 2), (16, 400, 1), (20, 300, -3)):
        x = make_input("random", *((inner, outer) if primal else (outer, inner)))
        stride = x.shape[1] + -x.shape[1] % 8
        own, values = gram(
            shim, x, BF16, bias=True, primal=primal, tile=TILE, splits=splits, stride=stride, seeds=cuda_shim.SEEDS
        )
        assert_right(own, values, BF16, True, primal)


@FORMS
def test_cluster_has_the_bits_of_partial_grams(shim: cuda_shim.Library, primal: bool) -> None:
    x = make_input("random", *((600, 40) if primal else (40, 600)))
    results = []
    for splits in (4, -4):
        shim.reset_counts()
        results.append(gram(shim, x, BF16, bias=True, primal=primal, tile=TILE, splits=splits, seeds=(0,))[0])
        assert shim.launches == (2 if splits > 0 else 1)
    assert torch.equal(*results)


@FORMS
def test_chains_are_added_in_float32(shim: cuda_shim.Library, primal: bool) -> None:
    x = make_input("random", *((CHAIN + 70, 9) if primal else (9, CHAIN + 70)))
    stride = x.shape[1] + -x.shape[1] % 8
    own, values = gram(shim, x, BF16, bias=True, primal=primal, tile=TILE, splits=1, stride=stride, seeds=(0,))
    assert_right(own, values, BF16, True, primal)


@FORMS
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite(shim: cuda_shim.Library, primal: bool, value: float) -> None:
    x = randn(8, 16)
    x[4, 6] = value
    own, _ = gram(shim, x, BF16, bias=True, primal=primal, tile=TILE, splits=1, seeds=(0,))
    place = 6 if primal else 4
    rest = [i for i in range(own.shape[0]) if i != place]
    assert not own[place].isfinite().any()
    assert own[rest][:, rest].isfinite().all()


def test_zero_rows_and_strides(shim: cuda_shim.Library) -> None:
    x = randn(20, 48)
    x[3] = x[17] = 0
    for offset, stride in ((0, 48), (8, 64)):
        own, values = gram(shim, x, F16, tile=TILE, splits=1, stride=stride, offset=offset)
        assert_right(own, values, F16, False, False)
        assert not own[[3, 17]].any()


@pytest.mark.parametrize(("stride", "offset"), [(49, 0), (48, 1), (52, 0)])
def test_rows_that_are_not_aligned_are_refused(shim: cuda_shim.Library, stride: int, offset: int) -> None:
    with pytest.raises(cuda_shim.ShimError, match="error 1,"):
        gram(shim, randn(20, 48), BF16, tile=TILE, splits=1, stride=stride, offset=offset)


@FORMS
def test_plan(shim: cuda_shim.Library, primal: bool) -> None:
    """Warpgroups where they are predicted to take less time: not for few rows, other types or other devices."""
    sizes = (1, 64, 128, 129, 512, 784, 1024, 1025, 4096, 11008, 65536)
    shapes = [shape for shape in itertools.product(sizes, repeat=2) if shape[primal] <= 11008]
    made = dict(zip(shapes, plans(shim, shapes, True, primal, BF16, warpgroups=True), strict=True))
    for shape, (tile, splits, depth, blocks, reduced, shared, workspace, cluster) in made.items():
        outer, inner = shape[primal], shape[not primal]
        if tile != TILE:
            continue
        rows = -(-outer // 128)
        tiles = sum(min(2 * column + 2, rows) for column in range(-(-outer // TILE)))
        assert outer > 256, shape
        assert blocks == tiles * splits
        assert depth % 64 == 0
        assert (splits - 1) * depth < inner <= splits * depth
        assert shared == SHARED
        assert cluster == 1 or (cluster == splits <= 8 and depth <= CHAIN)
        assert (reduced == 0) == (splits == cluster and depth <= CHAIN)
        assert workspace == (0 if reduced == 0 else splits * (outer + primal) ** 2 * 4)
    large = (8192, 1024) if primal else (1024, 4096)
    assert plans(shim, [large], True, primal, BF16, warpgroups=True)[0][0] == TILE
    for dtype, wide, shared in ((F32, False, HOPPER_SHARED), (BF16, True, HOPPER_SHARED), (BF16, False, SHARED - 1)):
        assert plans(shim, [large], True, primal, dtype, wide, shared, warpgroups=True)[0][0] != TILE
    assert plans(shim, [large], True, primal, BF16, warpgroups=False)[0][0] != TILE
