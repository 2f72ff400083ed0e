"""The CUDA kernel that computes a whole weight gradient in one launch, on the host: its own source, run by the shim."""

from __future__ import annotations

import ctypes
import itertools
import math
from pathlib import Path
from typing import Any, NamedTuple

import cuda_shim
import pytest
import torch
from cases import (
    BF16,
    DTYPES,
    F16,
    F32,
    F64,
    FACTOR,
    FLOOR,
    KINDS,
    SHAPES,
    TOLERANCE,
    Gradients,
    Shape,
    assert_close,
    assert_grads_close,
    assert_identical,
    error_of,
    join,
    make_input,
    oracle,
    randn,
    relative_ridge,
    with_ones,
)
from test_cuda_input_gram import ADA_SHARED, AMPERE_SHARED, HOPPER_SHARED, PLAN_SIZES, TYPE_CODE, rounded_like
from torch import Tensor

import consequentialism as cw

SOURCES = [
    *(cuda_shim.ROOT / "csrc" / "cuda" / name for name in ("fused_weight_grad.cu", "fused_weight_grad_plan.cpp")),
    Path(cuda_shim.__file__).with_name("fused_weight_grad_calls.cu"),
]
PLANNED, RECOMPUTE, COOPERATIVE = 0, 1, 2
VARIANTS = pytest.mark.parametrize("variant", [RECOMPUTE, COOPERATIVE], ids=["recompute", "cooperative"])
MOST_ROWS = {F64: 64, F32: 128, BF16: 128, F16: 128}
PROCESSORS = 5  # of the device that the shim is taken for: few blocks, several tiles of dy each
EXTRA_SHAPES: tuple[Shape, ...] = ((64, 200, 130), (128, 190, 70), (100, 64, 300), (17, 65, 1))


class Plan(NamedTuple):
    variant: int
    tile: int
    slices: int
    groups: int
    group_tiles: int
    splits: int
    depth: int
    shared_bytes: int
    workspace_bytes: int
    reason: str


@pytest.fixture(scope="module")
def shim() -> cuda_shim.Library:
    return cuda_shim.load(SOURCES)


def plans(
    shim: cuda_shim.Library,
    shapes: list[Shape],
    dtype: torch.dtype,
    *,
    bias: bool = True,
    shared: int = HOPPER_SHARED,
    processors: int = 132,
    variant: int = PLANNED,
    splits: int = 1,
) -> list[Plan]:
    results = shim.run(
        "call_fused_plans",
        shim.guarded(torch.tensor(shapes), "shapes"),
        shim.empty(len(shapes), 9, dtype=torch.int64, name="plans"),
        shim.empty(len(shapes), 64, dtype=torch.uint8, name="reasons"),
        *(len(shapes), bias, TYPE_CODE[dtype], shared, processors, variant, splits),
        seeds=(0,),
    )
    reasons = [bytes(row.tolist()).rstrip(b"\0").decode() for row in results[2]]
    return [Plan(*numbers, reason) for numbers, reason in zip(results[1].tolist(), reasons, strict=True)]


def fused(
    shim: cuda_shim.Library,
    x: Tensor,  # [N, I], float64
    dy: Tensor,  # [N, O], float64
    dtype: torch.dtype,
    *,
    variant: int = RECOMPUTE,
    splits: int = 3,
    processors: int = PROCESSORS,
    bias: bool = True,
    damping: float = 1.0,
    damping_mode: str = "relative",
    scale: str = "nlms",
    tf32: bool = False,
    padding: int = 0,
    offset: int = 0,
    seeds: tuple[int, ...] = (0, 1),
) -> tuple[Gradients, int]:
    """``dw`` and ``db`` in dtype, and how many factors broke down. Rows of x and dy lie ``padding`` apart."""
    (rows, inputs), outputs = x.shape, dy.shape[1]
    (plan,) = plans(
        shim, [(rows, inputs, outputs)], dtype, bias=bias, processors=processors, variant=variant, splits=splits
    )
    _, held_x = rounded_like(x, dtype, inputs + padding, offset)
    _, held_dy = rounded_like(dy, dtype, outputs + padding, offset)
    counters = shim.guarded(torch.zeros(2, dtype=torch.int32), "counters")
    results = shim.run(
        "call_fused",
        shim.guarded(held_x, "x"),
        shim.guarded(held_dy, "dy"),
        shim.empty(outputs, inputs, dtype=dtype, name="dw"),
        shim.empty(outputs, dtype=dtype, name="db") if bias else None,
        shim.empty(plan.workspace_bytes, dtype=torch.uint8, name="workspace"),
        counters,
        shim.guarded(torch.zeros(1, dtype=torch.int32), "breakdowns"),
        *(TYPE_CODE[dtype], offset, rows, inputs, outputs, inputs + padding, outputs + padding, tf32, damping),
        *(float(min(rows, inputs + bias)), float(rows if scale == "nlms" else 1)),
        *(damping_mode == "relative", scale == "gradient", processors, variant, splits),
        seeds=seeds,
    )
    barrier, ticket = results[-2].tolist()
    assert barrier & 0x7FFFFFFF == 0, "the barrier is not ready for the next launch"
    assert ticket == 0, "the ticket is not ready for the next launch"
    return (results[2], results[3] if bias else None), int(results[-1])


@VARIANTS
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shapes(shim: cuda_shim.Library, dtype: torch.dtype, bias: bool, variant: int) -> None:
    for rows, inputs, outputs in SHAPES + EXTRA_SHAPES:
        if rows > min(MOST_ROWS[dtype], inputs + bias):
            continue
        x, dy = make_input("random", rows, inputs).to(dtype), randn(rows, outputs, seed=3, dtype=dtype)
        shim.reset_counts()
        own, breakdowns = fused(shim, x.double(), dy.double(), dtype, variant=variant, bias=bias)
        assert shim.launches == 2
        assert own[0].dtype == dtype
        assert_grads_close(own, oracle(x, dy, bias), TOLERANCE[dtype])
        assert breakdowns == 0


@VARIANTS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_and_alignment(shim: cuda_shim.Library, dtype: torch.dtype, variant: int) -> None:
    for inputs, padding, offset in ((66, 0, 1), (66, 14, 0), (66, 1, 0), (66, 6, 8), (67, 5, 3)):
        x, dy = make_input("random", 20, inputs).to(dtype), randn(20, inputs + 6, seed=3, dtype=dtype)
        own, _ = fused(
            shim, x.double(), dy.double(), dtype, variant=variant, padding=padding, offset=offset,
            seeds=cuda_shim.SEEDS,
        )  # fmt: skip
        assert_grads_close(own, oracle(x, dy), TOLERANCE[dtype])


def inverted(x: Tensor, dy: Tensor, c: float) -> Tensor:
    """The kernel's expression in plain PyTorch: ``dy^T (P [x, 1])`` with the inverse ``P``, half types in float32."""
    rows = with_ones(x.float(), True)
    lower = torch.linalg.cholesky(rows @ rows.T + c * torch.eye(x.shape[0]))
    return (dy.float().T @ (torch.cholesky_inverse(lower) @ rows)).to(x.dtype)


@VARIANTS
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_error_against_plain_pytorch(shim: cuda_shim.Library, dtype: torch.dtype, kind: str, variant: int) -> None:
    """Down to the damping below which the work is done in float64, by other kernels."""
    rows, inputs = 24, 40
    for damping in (1.0, rows / cw.reference.max_float32_condition(rows, inputs, dtype)):
        squares = {"own": 0.0, "plain": 0.0}
        for draw in range(3):
            x = make_input(kind, rows, inputs, seed=10 * draw).to(dtype)
            dy = randn(rows, 10, seed=10 * draw + 9, dtype=dtype)
            options: dict[str, Any] = {"damping": damping, "scale": "raw"}
            own, _ = fused(shim, x.double(), dy.double(), dtype, variant=variant, **options, seeds=(0,))
            expected = join(*oracle(x, dy, **options))
            squares["own"] += error_of(join(*own), expected) ** 2
            squares["plain"] += error_of(inverted(x, dy, relative_ridge(x, True, damping)), expected) ** 2
        error, allowed = math.sqrt(squares["own"] / 3), FACTOR * math.sqrt(squares["plain"] / 3) + FLOOR[dtype]
        assert error <= allowed, f"damping {damping}: relative error {error:.3g}, allowed {allowed:.3g}"


@VARIANTS
@pytest.mark.parametrize("size", [1e-22, 1e-20, 1e-18, 1e12, 1e19, 1e20])
def test_what_float32_cannot_square_is_right_or_nan(shim: cuda_shim.Library, size: float, variant: int) -> None:
    x, dy = (size * randn(6, 9)).to(F32), randn(6, 3, seed=1, dtype=F32)
    (dw, _), _ = fused(shim, x.double(), dy.double(), F32, variant=variant, bias=False, scale="raw", seeds=(0,))
    if 1e-18 <= size <= 1e12:
        assert_close("dw", dw, oracle(x, dy, False, scale="raw")[0], TOLERANCE[F32])
    else:
        assert dw.isnan().all()


@VARIANTS
def test_float64_on_bad_inputs(shim: cuda_shim.Library, variant: int) -> None:
    for kind in KINDS:
        x, dy = make_input(kind, 24, 40), randn(24, 10, seed=3)
        own, _ = fused(shim, x, dy, F64, variant=variant, damping=1e-2, seeds=(0,))
        assert_grads_close(own, oracle(x, dy, damping=1e-2), 1e-9)


@VARIANTS
def test_tf32(shim: cuda_shim.Library, variant: int) -> None:
    for rows in (30, 90):
        x, dy = make_input("random", rows, 130).to(F32), randn(rows, 66, seed=3, dtype=F32)
        own, _ = fused(shim, x.double(), dy.double(), F32, variant=variant, tf32=True, seeds=(0,))
        assert_grads_close(own, oracle(x, dy), 1e-2)
        assert error_of(own[0], oracle(x, dy)[0]) > 1e-5


@VARIANTS
@pytest.mark.parametrize("options", [
    {"damping": 0.5, "damping_mode": "absolute", "scale": "raw"},
    {"damping": 0.3, "scale": "raw"},
    {"damping": 0.3, "scale": "gradient"},
    {"damping": 5.0, "damping_mode": "absolute", "scale": "gradient"},
])  # fmt: skip
def test_options(shim: cuda_shim.Library, options: dict[str, Any], variant: int) -> None:
    for rows, inputs in ((30, 80), (70, 90)):
        x, dy = make_input("random", rows, inputs).to(F32), randn(rows, 33, seed=3, dtype=F32)
        own, _ = fused(shim, x.double(), dy.double(), F32, variant=variant, **options, seeds=(0,))
        assert_grads_close(own, oracle(x, dy, **options), 1e-4)


@VARIANTS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_not_finite(shim: cuda_shim.Library, dtype: torch.dtype, value: float, variant: int) -> None:
    """Wherever it stands, all is NaN: the blocks that never see it too."""
    for name, row, column in (("x", 0, 0), ("x", 19, 129), ("dy", 0, 0), ("dy", 19, 199), ("dy", 7, 64)):
        given = {"x": randn(20, 130), "dy": randn(20, 200, seed=1)}
        given[name][row, column] = value
        own, _ = fused(shim, given["x"], given["dy"], dtype, variant=variant, seeds=cuda_shim.SEEDS)
        assert own[0].isnan().all(), name
        assert own[1] is not None
        assert own[1].isnan().all(), name


@VARIANTS
def test_dy_not_finite_where_x_is_zero(shim: cuda_shim.Library, variant: int) -> None:
    dy = randn(20, 200)
    dy[3, 70] = math.inf
    own, _ = fused(shim, torch.zeros(20, 130, dtype=F64), dy, F32, variant=variant, bias=False)
    assert own[0].isnan().all()


@VARIANTS
def test_finite_sums_that_overflow_poison_nothing(shim: cuda_shim.Library, variant: int) -> None:
    x, dy = 1e-3 * randn(20, 70), torch.zeros(20, 130, dtype=F64)
    dy[:, 5] = 3e38
    own, _ = fused(shim, x, dy, F32, variant=variant, bias=False)
    assert not own[0][5].isfinite().any()
    assert not own[0][:5].any()
    assert not own[0][6:].any()


@VARIANTS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_trace(shim: cuda_shim.Library, dtype: torch.dtype, variant: int) -> None:
    own, breakdowns = fused(shim, torch.zeros(20, 130, dtype=F64), randn(20, 70), dtype, variant=variant, bias=False)
    assert not own[0].any()
    assert breakdowns == 0


@VARIANTS
@pytest.mark.parametrize("rows", [20, 70])
def test_breakdown_is_retried_and_counted_once(shim: cuda_shim.Library, rows: int, variant: int) -> None:
    # Duplicate rows: their Gram's ridge of 1e-9 is lost in float32, and a pivot with it.
    x, dy = torch.full((rows, 130), 3.0, dtype=F64), randn(rows, 200, seed=1)
    own, breakdowns = fused(
        shim, x, dy, F32, variant=variant, damping=1e-6, damping_mode="absolute", scale="raw", seeds=cuda_shim.SEEDS
    )
    assert breakdowns == 1
    assert own[0].isfinite().all()
    assert own[1] is not None
    assert own[1].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_block_or_many(shim: cuda_shim.Library, dtype: torch.dtype) -> None:
    """However the outputs are dealt out, the same bits: an entry is summed in one order."""
    x, dy = randn(20, 70), randn(20, 300, seed=1)
    own = [fused(shim, x, dy, dtype, processors=count, seeds=(0,))[0] for count in (2, 7, 30)]
    for other in own[1:]:
        assert_identical("dw", other[0], own[0][0])
        assert_identical("db", other[1], own[0][1])


def test_splits(shim: cuda_shim.Library) -> None:
    x, dy = randn(20, 300).to(F32), randn(20, 70, seed=1, dtype=F32)
    for splits in (1, 2, 4, 100):
        own, _ = fused(
            shim, x.double(), dy.double(), F32, variant=COOPERATIVE, splits=splits, processors=12, seeds=(0, 2)
        )
        assert_grads_close(own, oracle(x, dy), TOLERANCE[F32])


PLAN_SHAPES: list[Shape] = list(
    itertools.product((*range(0, 10), 31, 32, 33, *range(63, 67), *range(126, 131), 500), PLAN_SIZES, PLAN_SIZES)
)


@pytest.mark.parametrize("variant", [PLANNED, RECOMPUTE, COOPERATIVE])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shared", "processors"),
    [(HOPPER_SHARED, 132), (HOPPER_SHARED, 16), (AMPERE_SHARED, 108), (ADA_SHARED, 128), (49152, 20), (0, 1)],
)
def test_plan_is_one_the_device_takes(
    shim: cuda_shim.Library, dtype: torch.dtype, shared: int, processors: int, variant: int
) -> None:
    size = torch.empty((), dtype=dtype).element_size()
    large: list[Shape] = [(64, 8448, 8448), (128, 8449, 3), (128, 200000, 3), (128, 3, 200000)]
    shapes = PLAN_SHAPES + large
    made = plans(shim, shapes, dtype, shared=shared, processors=processors, variant=variant, splits=7)
    for (rows, inputs, outputs), plan in zip(shapes, made, strict=True):
        if plan.variant == 0:
            assert plan.reason
            if shared == HOPPER_SHARED:
                most = min(MOST_ROWS[dtype], inputs + 1)
                assert min(rows, inputs, outputs) == 0 or rows > most or inputs > 64 * processors
            continue
        assert plan.reason == ""
        assert variant in (PLANNED, plan.variant)
        assert plan.tile in (64, 128)
        assert rows <= plan.tile
        assert plan.shared_bytes <= shared
        assert plan.slices * plan.groups <= processors
        assert (plan.slices - 1) * 64 < inputs <= plan.slices * 64
        covered = plan.group_tiles * 64
        assert (plan.groups - 1) * covered < outputs <= plan.groups * covered
        assert (plan.splits - 1) * plan.depth < inputs <= plan.splits * plan.depth
        assert plan.depth * size % 128 == 0
        if plan.variant == RECOMPUTE:
            assert plan.splits == 1
            assert plan.workspace_bytes == 0
        else:
            assert plan.splits <= plan.slices * plan.groups
            assert plan.workspace_bytes == plan.splits * plan.tile**2 * (8 if dtype == F64 else 4)


def test_plan_refuses_with_a_reason(shim: cuda_shim.Library) -> None:
    cases: list[tuple[Shape, torch.dtype, int, str]] = [
        ((129, 200, 10), F32, HOPPER_SHARED, "more rows than 128"),
        ((12, 10, 10), F32, HOPPER_SHARED, "more rows than inputs"),
        ((65, 100, 10), F64, HOPPER_SHARED, "more rows than 64 in float64"),
        ((8, 8449, 10), F32, HOPPER_SHARED, "more inputs than 64 a processor"),
        ((8, 10, 10), F32, 1000, "more shared memory than a block has"),
        ((8, 0, 10), F32, HOPPER_SHARED, "x or dy is empty"),
        ((8, 10, 0), F32, HOPPER_SHARED, "x or dy is empty"),
        ((0, 10, 10), F32, HOPPER_SHARED, "x or dy is empty"),
    ]
    for shape, dtype, shared, reason in cases:
        (plan,) = plans(shim, [shape], dtype, shared=shared)
        assert (plan.variant, plan.reason) == (0, reason)


def test_plan_meets_where_recomputing_reads_more(shim: cuda_shim.Library) -> None:
    """The predicted choice: a Gram over few inputs is computed by all, over many it is shared."""
    near, far = plans(shim, [(64, 256, 1024), (128, 4096, 1024)], F32)
    assert near.variant == RECOMPUTE
    assert far.variant == COOPERATIVE
    assert 2 <= far.splits <= 32


def test_refusals(shim: cuda_shim.Library) -> None:
    for rows, dtype in ((129, F32), (65, F64)):
        with pytest.raises(cuda_shim.ShimError):
            fused(shim, randn(rows, 200), randn(rows, 3), dtype, seeds=(0,))


def test_a_device_that_cannot_hold_all_blocks_at_once_recomputes(shim: cuda_shim.Library) -> None:
    # As in a green context, whose processors are fewer than the device says.
    x, dy = make_input("random", 64, 400), randn(64, 5, seed=1)
    (plan,) = plans(shim, [(64, 400, 5)], F64, processors=7)
    assert plan.variant == COOPERATIVE
    expected, _ = fused(shim, x, dy, F64, variant=RECOMPUTE, processors=7, seeds=(0,))
    shim.call.shim_set_resident_blocks(6)
    try:
        own, _ = fused(shim, x, dy, F64, variant=PLANNED, processors=7, seeds=(0,))
        with pytest.raises(cuda_shim.ShimError, match="more blocks than can be resident"):  # asked for by name
            fused(shim, x, dy, F64, variant=COOPERATIVE, processors=7, seeds=(0,))
    finally:
        shim.call.shim_set_resident_blocks(132)
    assert torch.equal(own[0], expected[0])
    assert torch.equal(own[1], expected[1])


def stream_slots(shim: cuda_shim.Library, streams: int, captures: int = 0, destroyed: bool = False) -> list[list[int]]:
    """Those of two launches on each stream."""
    place = shim.empty(2, streams, dtype=torch.int64)
    slots: list[list[int]] = shim.run("call_stream_slots", place, captures, streams, destroyed, seeds=(0,))[0].tolist()
    return slots


def test_a_capture_takes_no_slot_of_a_stream(shim: cuda_shim.Library) -> None:
    # A graph that is captured again and again would use them up, and each later launch would need memory of its own.
    slots, streams = 1024, 1026
    own = stream_slots(shim, streams, captures=3 * slots)
    assert own == [[*range(slots), -1, -1]] * 2


def test_a_streams_handle_that_is_used_again_has_another_slot(shim: cuda_shim.Library) -> None:
    # A stream may be destroyed while its launches run; their counters are not the next one's.
    assert stream_slots(shim, 3, destroyed=True) == [[0, 1, 2], [3, 4, 5]]


def test_a_stream_whose_id_is_not_told_takes_no_slot(shim: cuda_shim.Library) -> None:
    invalid_value = 1
    shim.call.shim_fail_query(*map(ctypes.c_int64, (1, invalid_value)))
    try:
        assert stream_slots(shim, 3) == [[0, -1, 1], [0, 2, 1]]
    finally:
        shim.call.shim_fail_query(*map(ctypes.c_int64, (-1, 0)))
