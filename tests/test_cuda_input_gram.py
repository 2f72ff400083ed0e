"""The CUDA Gram kernel on the host: the kernel's own source, run by the shim."""

from __future__ import annotations

import itertools
from pathlib import Path

import cuda_shim
import pytest
import torch
from cases import BF16, DTYPES, F16, F32, F64, KINDS, SHAPES, error_of, make_input, randn
from torch import Tensor

import consequentialism as cw

CUDA = cuda_shim.ROOT / "csrc" / "cuda"
SOURCES = [
    *(CUDA / name for name in ("input_gram.cu", "input_gram_plan.cpp", "emended_input.cu", "emended_input_plan.cpp")),
    CUDA / "warpgroup_gram.cu",
    Path(cuda_shim.__file__).with_name("matrix_calls.cu"),
]
OPTIONS = ["-DCONSEQUENTIALISM_WARPGROUPS"]
TYPE_CODE = {F64: 0, F32: 1, BF16: 2, F16: 3}
SUMS = {F64: F64, F32: F32, BF16: F32, F16: F32}
FLOOR = {F64: 1e-15, F32: 2e-7}
HOPPER_SHARED, AMPERE_SHARED, ADA_SHARED = 232448, 166912, 101376
MAX_GRID = 2**31 - 1
PLAN_SIZES = (0, 1, 2, 7, 31, 33, 63, 64, 65, 127, 128, 129, 191, 193, 255, 257, 500, 576, 784, 1000, 1024, 1025)
LARGE_PLAN_SIZES = (2047, 2304, 4096, 4097, 8192, 11008, 20000)


@pytest.fixture(scope="module")
def shim() -> cuda_shim.Library:
    return cuda_shim.load(SOURCES, OPTIONS)


def tf32(x: Tensor) -> Tensor:
    """float32 to the nearest TF32, ties away from zero."""
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(F32)


def terms_of(x: Tensor, dtype: torch.dtype, count: int) -> list[Tensor]:
    """float32 ``x`` as a sum of terms, the largest first, of bfloat16 or float16, or of TF32 for float32."""
    terms = []
    for _ in range(count):
        terms.append(tf32(x) if dtype == F32 else x.to(dtype).float())
        x = x - terms[-1]
    return terms


def product(a: list[Tensor], b: list[Tensor], depth: int = 32) -> Tensor:
    """What tensor cores make of ``a b`` given in terms: exact products, summed and rounded by stages."""
    orders = max(len(a), len(b))
    sums = torch.zeros(a[0].shape[0], b[0].shape[1])
    for k in range(0, a[0].shape[1], depth):
        exact = sum(
            left[:, k : k + depth].double() @ right[k : k + depth].double()
            for i, left in enumerate(a)
            for j, right in enumerate(b)
            if i + j < orders
        )
        sums = sums + torch.as_tensor(exact).float()
    return sums


def rounded_like(x: Tensor, dtype: torch.dtype, stride: int, offset: int) -> tuple[Tensor, Tensor]:
    """The values of ``x`` in dtype as float64, and a buffer that holds them with NaN around."""
    rows, inputs = x.shape
    buffer = torch.full((offset + rows * stride,), torch.nan, dtype=dtype)
    own = buffer[offset:].view(rows, stride)[:, :inputs]
    own.copy_(x)
    return own.double(), buffer


def gram(
    shim: cuda_shim.Library,
    x: Tensor,  # [N, I], float64
    dtype: torch.dtype,
    *,
    bias: bool = False,
    primal: bool = False,
    tf32: bool = False,
    wide: bool = False,
    tile: int = 0,
    splits: int = 0,
    stride: int | None = None,
    offset: int = 0,
    seeds: tuple[int, ...] = (0, 1),
) -> tuple[Tensor, Tensor]:
    """The Gram, and the values of ``x`` that it is of. Negative splits: in a cluster."""
    rows, inputs = x.shape
    stride = inputs if stride is None else stride
    values, buffer = rounded_like(x, dtype, stride, offset)
    code = TYPE_CODE[dtype]
    ((*_, workspace, _),) = plans(shim, [(rows, inputs)], bias, primal, dtype, wide, tile=tile, splits=splits)
    n = inputs + bias if primal else rows
    sums = F64 if wide else SUMS[dtype]
    results = shim.run(
        "call_gram",
        shim.guarded(buffer, "x"),
        shim.empty(n, n, dtype=sums, name="gram"),
        shim.empty(workspace, dtype=torch.uint8, name="workspace"),
        *(code, wide, offset, rows, inputs, stride, bias, primal, tf32, tile, splits),
        seeds=seeds,
    )
    return results[1], values


def plans(
    shim: cuda_shim.Library,
    shapes: list[tuple[int, int]],
    bias: bool,
    primal: bool,
    dtype: torch.dtype,
    wide: bool = False,
    shared: int = HOPPER_SHARED,
    processors: int = 132,
    clusters: int = 16,
    warpgroups: bool = False,
    tile: int = 0,
    splits: int = 0,
) -> list[list[int]]:
    """tile, splits, depth, blocks, reduce_blocks, shared_bytes, workspace_bytes, cluster for each shape.

    clusters: Of how many blocks the device has room for one.
    """
    results = shim.run(
        "call_gram_plans",
        shim.guarded(torch.tensor(shapes), "shapes"),
        shim.empty(len(shapes), 8, dtype=torch.int64, name="plans"),
        *(len(shapes), bias, primal, TYPE_CODE[dtype], wide, shared, processors, clusters, warpgroups, tile, splits),
        seeds=(0,),
    )
    made: list[list[int]] = results[1].tolist()
    return made


def emulated(values: Tensor, dtype: torch.dtype, bias: bool, primal: bool, tf32: bool) -> Tensor:
    """The kernel's precision policy in PyTorch."""
    if dtype == F64:
        return cw.reference.input_gram(values, bias, "primal" if primal else "dual")
    rows = values.float()
    if primal and bias:
        rows = torch.cat([rows, torch.ones(rows.shape[0], 1)], dim=1)
    left = rows.T.contiguous() if primal else rows
    terms = terms_of(left, dtype, 1 if dtype != F32 or tf32 else 2)
    return product(terms, [term.T for term in terms]) + (1 if bias and not primal else 0)


def assert_right(
    own: Tensor, values: Tensor, dtype: torch.dtype, bias: bool, primal: bool, tf32: bool = False, wide: bool = False
) -> None:
    expected = cw.reference.input_gram(values, bias, "primal" if primal else "dual")
    policy = F64 if wide else dtype
    allowed = 2 * error_of(emulated(values, policy, bias, primal, tf32), expected) + FLOOR[SUMS[policy]]
    assert own.dtype == SUMS[policy]
    assert own.shape == expected.shape
    assert error_of(own, expected) <= allowed, f"{error_of(own, expected):.3g}, allowed {allowed:.3g}"
    assert torch.equal(own, own.T)


FORMS = pytest.mark.parametrize("primal", [False, True], ids=["dual", "primal"])


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@FORMS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shapes(shim: cuda_shim.Library, dtype: torch.dtype, primal: bool, bias: bool) -> None:
    for rows, inputs, _ in SHAPES:
        own, values = gram(shim, make_input("random", rows, inputs), dtype, bias=bias, primal=primal)
        assert_right(own, values, dtype, bias, primal)


@FORMS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bias_alone(shim: cuda_shim.Library, dtype: torch.dtype, primal: bool) -> None:
    for rows in (1, 70):
        own, _ = gram(shim, torch.zeros(rows, 0), dtype, bias=True, primal=primal)
        assert torch.equal(own, torch.full((1, 1), rows) if primal else torch.ones(rows, rows))


@FORMS
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("shape", [(40, 70), (130, 70), (129, 65), (257, 40)])
def test_large_tiles(shim: cuda_shim.Library, dtype: torch.dtype, primal: bool, shape: tuple[int, int]) -> None:
    x = make_input("random", *(reversed(shape) if primal else shape))
    for bias, splits in ((False, 1), (True, 2)):
        own, values = gram(shim, x, dtype, bias=bias, primal=primal, tile=128, splits=splits, seeds=(0, 1))
        assert_right(own, values, dtype, bias, primal)


@FORMS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_splits(shim: cuda_shim.Library, dtype: torch.dtype, primal: bool, bias: bool) -> None:
    for outer, inner, splits in ((7, 65, 2), (70, 300, 3), (33, 129, 100)):
        x = make_input("random", *((inner, outer) if primal else (outer, inner)))
        shim.reset_counts()
        own, values = gram(shim, x, dtype, bias=bias, primal=primal, tile=64, splits=splits, seeds=cuda_shim.SEEDS)
        assert shim.launches == 2 * len(cuda_shim.SEEDS)
        assert_right(own, values, dtype, bias, primal)


@FORMS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_clusters(shim: cuda_shim.Library, dtype: torch.dtype, primal: bool, bias: bool) -> None:
    """One launch, and the same bits as from partial Grams: the sums have the same order."""
    for outer, inner, splits in ((7, 130, 2), (70, 300, 3), (33, 1024, 8)):
        x = make_input("random", *((inner, outer) if primal else (outer, inner)))
        shim.reset_counts()
        own, values = gram(shim, x, dtype, bias=bias, primal=primal, tile=64, splits=-splits, seeds=cuda_shim.SEEDS)
        assert shim.launches == len(cuda_shim.SEEDS)
        assert_right(own, values, dtype, bias, primal)
        other, _ = gram(shim, x, dtype, bias=bias, primal=primal, tile=64, splits=splits, seeds=(0,))
        assert torch.equal(own, other)


@FORMS
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_clusters_of_large_tiles(shim: cuda_shim.Library, dtype: torch.dtype, primal: bool) -> None:
    x = make_input("random", *((200, 150) if primal else (150, 200)))
    own, values = gram(shim, x, dtype, bias=True, primal=primal, tile=128, splits=-4)
    assert_right(own, values, dtype, True, primal)


@FORMS
def test_tf32(shim: cuda_shim.Library, primal: bool) -> None:
    for rows, inputs in ((33, 31), (129, 65)):
        x = make_input("random", rows, inputs)
        for tile in (64, 128):
            own, values = gram(shim, x, F32, bias=True, primal=primal, tf32=True, tile=tile, splits=1)
            assert_right(own, values, F32, True, primal, tf32=True)
            assert error_of(own, cw.reference.input_gram(values, True, "primal" if primal else "dual")) > 1e-6


@FORMS
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_wide(shim: cuda_shim.Library, dtype: torch.dtype, primal: bool) -> None:
    """Narrow x, sums in float64."""
    for rows, inputs in ((1, 1), (33, 31), (64, 72), (65, 130)):
        x = make_input("random", rows, inputs)
        own, values = gram(shim, x, dtype, bias=True, primal=primal, wide=True)
        assert_right(own, values, dtype, True, primal, wide=True)


@FORMS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_and_alignment(shim: cuda_shim.Library, dtype: torch.dtype, primal: bool) -> None:
    for inputs, stride, offset in ((48, 48, 1), (48, 64, 0), (48, 49, 0), (50, 64, 0), (50, 64, 8), (50, 57, 3)):
        x = make_input("random", 67, inputs)
        own, values = gram(
            shim, x, dtype, bias=True, primal=primal, stride=stride, offset=offset, seeds=cuda_shim.SEEDS
        )
        assert_right(own, values, dtype, True, primal)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kinds(shim: cuda_shim.Library, dtype: torch.dtype, kind: str) -> None:
    for rows, inputs, primal in ((24, 90, False), (90, 24, True)):
        own, values = gram(shim, make_input(kind, rows, inputs), dtype, bias=True, primal=primal)
        assert_right(own, values, dtype, True, primal)


@FORMS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_not_finite(shim: cuda_shim.Library, dtype: torch.dtype, primal: bool, value: float) -> None:
    x = randn(5, 9)
    x[4, 8] = value
    own, _ = gram(shim, x, dtype, bias=True, primal=primal, seeds=(0,))
    place = 8 if primal else 4
    assert not own[place].isfinite().any()
    assert own[:place, :place].isfinite().all()


def test_all_of_the_chip_adds_up_the_same(shim: cuda_shim.Library) -> None:
    """However many blocks share the sum, the Gram is as accurate."""
    x = make_input("shifted", 8, 1500)
    for splits in (1, 2, 5, 24):
        own, values = gram(shim, x, F32, tile=64, splits=splits, seeds=(0,))
        assert_right(own, values, F32, False, False)


@pytest.mark.parametrize("tile", [64, 128])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_one_block(shim: cuda_shim.Library, dtype: torch.dtype, tile: int) -> None:
    """`block_gram` and `block_apply`, of which kernels for small N are made."""
    for rows, inputs in ((1, 1), (40, 70), (64, 136), (100, 65)):
        if rows > tile:
            continue
        values, buffer = rounded_like(make_input("random", rows, inputs), dtype, inputs, 0)
        results = shim.run(
            "call_block",
            shim.guarded(buffer, "x"),
            shim.empty(rows, rows, name="gram"),
            shim.empty(rows, inputs, name="y"),
            shim.empty(rows, name="column"),
            *(TYPE_CODE[dtype], rows, inputs, tile),
        )
        own, y, column = results[1:]
        assert_right(own, values, dtype, True, False)
        assert error_of(y, own.double() @ values) <= 1e-6
        assert error_of(column, own.double().sum(1)) <= 1e-6


@FORMS
@pytest.mark.parametrize("wide", [False, True], ids=["narrow", "wide"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shared", [HOPPER_SHARED, AMPERE_SHARED, ADA_SHARED, 40000, 0])
def test_plan_is_one_the_device_takes(
    shim: cuda_shim.Library, dtype: torch.dtype, wide: bool, primal: bool, shared: int
) -> None:
    shapes = list(itertools.product(PLAN_SIZES + LARGE_PLAN_SIZES, repeat=2))
    clusters = 16 if shared == HOPPER_SHARED else 0
    made = plans(shim, shapes, True, primal, dtype, wide, shared, clusters=clusters)
    sum_bytes = 8 if wide or dtype == F64 else 4
    for (rows, inputs), plan in zip(shapes, made, strict=True):
        tile, splits, depth, blocks, reduce_blocks, shared_bytes, workspace, cluster = plan
        if tile == 0:
            assert shared <= 61440
            continue
        outer, inner, order = (inputs, rows, inputs + 1) if primal else (rows, inputs, rows)
        along = max(1, -(-outer // tile))
        assert tile == 64 or (tile == 128 and sum_bytes == 4)
        assert shared_bytes <= shared
        assert (splits - 1) * depth < max(inner, 1) <= splits * depth
        assert depth * torch.empty((), dtype=dtype).element_size() % 128 == 0
        assert blocks == along * (along + 1) // 2 * splits <= MAX_GRID
        reduced = -(-order // 32)
        assert cluster in ((1, splits) if clusters and splits <= 8 else (1,))
        assert reduce_blocks == (0 if splits == cluster else reduced * (reduced + 1) // 2)
        assert workspace == (0 if splits == cluster else splits * order * order * sum_bytes)
        assert workspace <= 128 * 2**20


@pytest.mark.parametrize("warpgroups", [False, True], ids=["warps", "warpgroups"])
@pytest.mark.parametrize("most", [0, 1, 2, 5, 8])
def test_cluster_is_one_the_device_has_room_for(shim: cuda_shim.Library, most: int, warpgroups: bool) -> None:
    # Each of its blocks may take a processor, and a small chip's or a slice's have less than 8 beside one another.
    shapes = [(256, 4096), (512, 4096), (64, 784), (128, 1024), (1024, 1024)]
    made = plans(shim, shapes, False, False, BF16, processors=132, clusters=most, warpgroups=warpgroups)
    assert all(plan[7] <= max(most, 1) for plan in made)
    assert any(plan[7] > 1 for plan in made) == (most > 1)


def test_plan_fills_the_chip(shim: cuda_shim.Library) -> None:
    shapes = [(256, 4096), (512, 4096), (1024, 4096)]
    for plan in plans(shim, shapes, False, False, BF16, clusters=0):
        assert plan[3] >= 100
    for plan in plans(shim, shapes, False, False, BF16):  # one launch, at the price of a few blocks
        assert plan[3] >= 80
        assert 1 < plan[7] == plan[1]
    (long,) = plans(shim, [(65536, 256)], False, True, BF16)  # for which 8 splits would be too few
    assert long[7] == 1
    assert long[3] >= 100
    (conv,) = plans(shim, [(262144, 576)], True, True, BF16)
    assert conv[0] == 128
    assert 100 <= conv[3] <= 132


def test_refusals(shim: cuda_shim.Library) -> None:
    with pytest.raises(cuda_shim.ShimError):
        gram(shim, randn(3, 3), F64, tile=128, splits=1, seeds=(0,))
    with pytest.raises(cuda_shim.ShimError):
        gram(shim, randn(3, 3), F32, tile=32, splits=1, seeds=(0,))
