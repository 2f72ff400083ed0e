"""The CUDA damped_inverse kernels on the host: the kernel's own source, run by the shim."""

from __future__ import annotations

import ctypes
import math
from itertools import product
from pathlib import Path
from typing import NamedTuple

import cuda_cycles
import cuda_shim
import inverse_budget
import pytest
import torch
from cases import F32, F64, FACTOR, FLOOR, KINDS, assert_close, error_of, make_input, randn
from torch import Tensor

import consequentialism as cw

CUDA = cuda_shim.ROOT / "csrc" / "cuda"
SOURCES = [
    CUDA / "damped_inverse.cu",
    CUDA / "factored_inverse.cu",
    CUDA / "damped_inverse_plan.cpp",
    Path(cuda_shim.__file__).with_name("damped_inverse_calls.cu"),
]
SHARED = 232448  # of a block, sm_90
TOO_LITTLE = 200  # shared memory for no tile: the cluster's kernel, whatever the order
NONE, BLOCK, RESIDENT, CLUSTER = 0, 1, 2, 3


@pytest.fixture(scope="module")
def shim() -> cuda_shim.Library:
    return cuda_shim.load(SOURCES)


# Shared memory, and blocks of a resident cluster: one block, a cluster in global memory, resident ones.
WAYS = ((SHARED, 0), (TOO_LITTLE, 0), (SHARED, 8), (SHARED, 16))


def tile_bytes(dtype: torch.dtype) -> int:
    return 32 * (32 * (4 if dtype == F32 else 8) + 16)


def strip_bytes(along: int, dtype: torch.dtype, line: int = 64) -> int:
    """Shared memory of a block that inverts 16 columns: tiles and strips, and for each further warp two stages of 96
    lines."""
    size = torch.empty((), dtype=dtype).element_size()
    return 4 * tile_bytes(dtype) + 4 * 32 * 16 * size + -(-max(along - 2, 0) // 3) * 2 * 96 * (line + 16)


class Plan(NamedTuple):
    team: int
    threads: int  # of a block
    blocks: int
    shared: int  # bytes of a block
    workspace: int  # bytes
    room: int  # tiles of its own that a resident block has in shared memory
    line: int  # bytes of a row in the stages of the strips that follow a resident cluster


def plan(
    shim: cuda_shim.Library,
    n: int,
    dtype: torch.dtype,
    shared: int = SHARED,
    clusters: bool = True,
    resident: int = 0,
    forced: bool = False,
    count: int = 1,
    at_once: int = 16,
) -> Plan:
    """``resident``: blocks of a resident cluster, of which ``at_once`` of 8 run at once."""
    size = torch.empty((), dtype=dtype).element_size()
    arguments = (shim.empty(7, dtype=torch.int64), n, count, size, shared, clusters, resident, at_once, forced)
    (made,) = shim.run("call_plan_damped_inverse", *arguments, seeds=(0,))
    return Plan(*map(int, made))


def invert(
    shim: cuda_shim.Library,
    grams: Tensor,  # [count, n, n]
    *,
    damping: float = 1.0,
    rank: int | None = None,
    factor: float = 1.0,
    relative: bool = True,
    scaled_by_c: bool = False,
    shared: int = SHARED,
    resident: int = 0,
    tall: bool = False,
    only_if: int | None = None,
    padding: int = 0,
    seeds: tuple[int, ...] = cuda_shim.SEEDS,
) -> tuple[Tensor, int]:
    """The inverses ``[count, n, n]`` and the number of breakdowns. ``resident``: by a resident cluster of so many
    blocks, and ``tall``: blocks that make four tiles of the square."""
    count, n, _ = grams.shape
    workspace = plan(shim, n, grams.dtype, shared, resident=resident, forced=resident > 0).workspace
    arguments = (
        shim.guarded(grams, "gram"),
        shim.empty(count, n, n + padding, dtype=grams.dtype, name="inverse"),
        shim.guarded(torch.tensor([only_if], dtype=torch.int32), "only_if") if only_if is not None else None,
        shim.empty(count * workspace, dtype=torch.uint8, name="workspace", alignment=128),
        shim.guarded(torch.zeros(1, dtype=torch.int32), "breakdowns"),
    )
    name = {F32: "call_damped_inverse_float", F64: "call_damped_inverse_double"}[grams.dtype]
    rank = n if rank is None else rank
    options = (count, n, padding, shared, resident, tall, damping, float(rank), factor, relative, scaled_by_c)
    results = shim.run(name, *arguments, *options, seeds=seeds)
    return results[1], int(results[-1])


def gram_of(kind: str, n: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    x = make_input(kind, n, 2 * n + 1, seed)
    return (x @ x.T).to(dtype)


ORDERS = (1, 2, 31, 32, 33, 63, 64, 65, 96, 127, 129)


@pytest.mark.parametrize(("n", "dtype"), [*product(ORDERS, [F32, F64]), (192, F64), (288, F32)], ids=str)
def test_block(shim: cuda_shim.Library, n: int, dtype: torch.dtype) -> None:
    gram = gram_of("random", n, dtype)
    assert plan(shim, n, dtype)[0] == BLOCK
    shim.reset_counts()
    own, breakdowns = invert(shim, gram[None], factor=3.0, seeds=(0, 1))
    assert shim.launches == 2
    expected = cw.reference.damped_inverse(gram.double(), 1.0, "relative", "raw", n, n) * 3
    assert_close("inverse", own[0], expected, 1e-12 if dtype == F64 else 2e-6)
    assert torch.equal(own[0], own[0].T)
    assert breakdowns == 0


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("n", [1, 33, 100, 290])
def test_cluster(shim: cuda_shim.Library, n: int, dtype: torch.dtype) -> None:
    gram = gram_of("random", n, dtype)
    own, _ = invert(shim, gram[None], shared=TOO_LITTLE, seeds=(0, 1))
    expected = cw.reference.damped_inverse(gram.double(), 1.0, "relative", "raw", n, n)
    assert_close("inverse", own[0], expected, 1e-12 if dtype == F64 else 2e-6)


@pytest.mark.parametrize(
    ("n", "dtype", "blocks"),
    [*product((1, 33, 64, 130, 257), [F32], [8, 16]), *product((33, 130), [F64], [8, 16])],
    ids=str,
)
def test_resident_cluster_gives_a_blocks_bits(shim: cuda_shim.Library, n: int, dtype: torch.dtype, blocks: int) -> None:
    gram = gram_of("low_rank", n, dtype)
    expected, _ = invert(shim, gram[None], damping=0.01, seeds=(0,))
    for tall in (False, True):
        own, breakdowns = invert(shim, gram[None], damping=0.01, resident=blocks, tall=tall)
        assert torch.equal(own, expected)
        assert breakdowns == 0


@pytest.mark.parametrize(("n", "dtype", "blocks"), [(290, F32, 8), (270, F64, 8), (450, F32, 16)], ids=str)
def test_resident_cluster_gives_the_bits_of_one_in_global_memory(
    shim: cuda_shim.Library, n: int, dtype: torch.dtype, blocks: int
) -> None:
    assert plan(shim, n, dtype, resident=16)[:3] == (RESIDENT, 256, blocks)
    gram = gram_of("random", n, dtype)
    expected, _ = invert(shim, gram[None], seeds=(0,))
    own, _ = invert(shim, gram[None], resident=blocks, seeds=(1,))
    assert torch.equal(own, expected)


@pytest.mark.parametrize(("n", "dtype", "blocks"), [(270, F32, 8), (270, F64, 8)], ids=str)
def test_resident_tiles_without_room_lie_in_global_memory(
    shim: cuda_shim.Library, n: int, dtype: torch.dtype, blocks: int
) -> None:
    along = -(-n // 32)
    rows = 2 if blocks == 8 else 4
    panels = -(-along // rows) - (-along // (blocks // rows)) + 1
    gram = gram_of("random", n, dtype)
    expected, _ = invert(shim, gram[None], seeds=(0,))
    shared = 16 * tile_bytes(dtype)
    made = plan(shim, n, dtype, shared=shared, resident=blocks, forced=True)
    assert made.room == 16 - panels < plan(shim, n, dtype, resident=blocks, forced=True).room
    own, _ = invert(shim, gram[None], shared=shared, resident=blocks)
    assert torch.equal(own, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("damping", [1.0, 1e-2])
def test_error_against_lapack(shim: cuda_shim.Library, kind: str, damping: float) -> None:
    """What the gradient sees, P x, is as accurate as with torch's Cholesky inverse of the same type."""
    own_errors, plain_errors = [], []
    for n in (40, 90):
        for draw in range(4):
            x = make_input(kind, n, n // 2, seed=10 * draw)
            gram = (x @ x.T).to(F32)
            c = damping * gram.double().trace() / n
            expected = torch.linalg.solve(gram.double() + c * torch.eye(n, dtype=F64), x)
            own, _ = invert(shim, gram[None], damping=damping, seeds=(0,))
            lower = torch.linalg.cholesky(gram + (c * torch.eye(n)).float())
            own_errors.append(error_of(own[0] @ x.float(), expected))
            plain_errors.append(error_of(torch.cholesky_inverse(lower) @ x.float(), expected))
    own_error, plain_error = (math.sqrt(sum(e * e for e in errors)) for errors in (own_errors, plain_errors))
    assert own_error <= FACTOR * plain_error + FLOOR[F32]


def test_right_residual_in_float64(shim: cuda_shim.Library) -> None:
    # x x^T of rank 3: an inverse of which only the left residual is small loses a hundred times the accuracy here.
    worst = 0.0
    for seed in range(6):
        x = make_input("low_rank", 64, 24, seed=seed)
        gram = x @ x.T
        c = 1e-6 * float(gram.trace()) / 24
        own, _ = invert(shim, gram[None], damping=c, relative=False, seeds=(0,))
        lower = torch.linalg.cholesky(gram + c * torch.eye(64, dtype=F64))
        worst = max(worst, error_of(own[0] @ x, torch.cholesky_inverse(lower) @ x))
    assert worst < 2e-8


def test_batch_of_different_matrices(shim: cuda_shim.Library) -> None:
    grams = torch.stack([gram_of("random", 48, F32, seed) * (10.0**seed) for seed in range(5)])
    shim.reset_counts()
    own, _ = invert(shim, grams)
    assert shim.launches == len(cuda_shim.SEEDS)
    for gram, inverse in zip(grams, own, strict=True):
        assert_close(
            "inverse", inverse, cw.reference.damped_inverse(gram.double(), 1.0, "relative", "raw", 48, 48), 2e-6
        )
    alone, _ = invert(shim, grams[3:4])
    assert torch.equal(alone[0], own[3])


@pytest.mark.parametrize(("count", "resident"), [(3, 0), (32, 0), (3, 8), (3, 16)])
def test_batch_of_clusters_keeps_the_matrices_apart(shim: cuda_shim.Library, count: int, resident: int) -> None:
    grams = torch.stack([gram_of("random", 34, F32, seed) * (10.0 ** (seed % 5)) for seed in range(count)])
    grams[1, 0, 0] = math.nan
    shim.reset_counts()
    own, _ = invert(shim, grams, shared=SHARED if resident else TOO_LITTLE, resident=resident, seeds=(0,))
    assert shim.launches == (3 if resident else 1)  # factor, inverse of the triangle, square
    for i, (gram, inverse) in enumerate(zip(grams, own, strict=True)):
        if i == 1:
            assert inverse.isnan().all()
            continue
        assert_close(
            "inverse", inverse, cw.reference.damped_inverse(gram.double(), 1.0, "relative", "raw", 34, 34), 2e-6
        )


@pytest.mark.parametrize(("dtype", "exponents"), [(F32, (-131, -110, 110, 126)), (F64, (-1027, 1000, 1022))], ids=str)
def test_ends_of_the_range(shim: cuda_shim.Library, dtype: torch.dtype, exponents: list[int]) -> None:
    # Pivots near the least normal number, below it and near the largest: reciprocals lose digits or overflow.
    gram = torch.tensor([[1.5, 0.25], [0.25, 1.0]], dtype=dtype)
    plain, _ = invert(shim, gram[None], scaled_by_c=True, seeds=(0,))
    for exponent in exponents:
        scaled = torch.ldexp(gram, torch.tensor(exponent // 2)).ldexp(torch.tensor(exponent - exponent // 2))
        own, breakdowns = invert(shim, scaled[None], scaled_by_c=True, seeds=(0,))
        assert breakdowns == 0
        assert_close("inverse times c", own, plain.double(), 4 * torch.finfo(dtype).eps)


def test_a_launch_takes_32_matrices(shim: cuda_shim.Library) -> None:
    grams = torch.eye(3).expand(32, 3, 3).contiguous()
    own, _ = invert(shim, grams, seeds=(0,))
    assert_close("inverse", own, torch.eye(3).expand(32, 3, 3) / 2, 1e-6)
    with pytest.raises(cuda_shim.ShimError):
        invert(shim, torch.eye(3).expand(33, 3, 3).contiguous(), seeds=(0,))


@pytest.mark.parametrize(("n", "shared", "resident"), [(5, SHARED, 0), *((70, *way) for way in WAYS)])
def test_options(shim: cuda_shim.Library, n: int, shared: int, resident: int) -> None:
    gram = gram_of("random", n, F32)
    wide = gram.double()
    own, _ = invert(shim, gram[None], damping=0.5, relative=False, shared=shared, resident=resident)
    assert_close("absolute", own[0], cw.reference.damped_inverse(wide, 0.5, "absolute", "raw", n, n), 2e-5)
    own, _ = invert(shim, gram[None], damping=0.5, rank=n // 2, scaled_by_c=True, shared=shared, resident=resident)
    assert_close("times c", own[0], cw.reference.damped_inverse(wide, 0.5, "relative", "gradient", n // 2, n), 2e-6)


@pytest.mark.parametrize(("n", "shared", "resident"), [(1, SHARED, 0), *((70, *way) for way in WAYS)])
def test_trace_zero_or_not_finite(shim: cuda_shim.Library, n: int, shared: int, resident: int) -> None:
    own, breakdowns = invert(shim, torch.zeros(1, n, n), shared=shared, resident=resident)
    assert torch.equal(own, torch.zeros(1, n, n))
    for value in (math.nan, math.inf, -math.inf):
        gram = gram_of("random", n, F32)
        gram[n - 1, n - 1] = value
        own, breakdowns = invert(shim, gram[None], shared=shared, resident=resident)
        assert own.isnan().all()
    assert breakdowns == 0


@pytest.mark.parametrize(("shared", "resident"), WAYS)
@pytest.mark.parametrize("bad", [0, 40, 69])
def test_breakdown_is_retried_with_more_damping(shim: cuda_shim.Library, bad: int, shared: int, resident: int) -> None:
    # One eigenvalue of -5: a ridge of 1 breaks down there, a ridge of 10 works.
    gram = torch.eye(70)
    gram[bad, bad] = -5
    own, breakdowns = invert(shim, gram[None], relative=False, shared=shared, resident=resident)
    assert_close("inverse", own[0], torch.linalg.inv(gram + 10 * torch.eye(70)), 1e-6)
    assert breakdowns == 1
    # No ridge up to 1000 works: the diagonal.
    gram[bad, bad] = -5000
    own, breakdowns = invert(shim, gram[None], relative=False, shared=shared, resident=resident)
    assert_close("inverse", own[0], torch.diag(1 / (gram.diagonal() + 1)), 1e-6)
    assert breakdowns == 1


@pytest.mark.parametrize(("shared", "resident"), WAYS)
@pytest.mark.parametrize("broken", [None, math.nan, -5000.0])
def test_padded_rows(shim: cuda_shim.Library, broken: float | None, shared: int, resident: int) -> None:
    grams = torch.stack([gram_of("random", 37, F32, seed) for seed in range(2)])
    if broken is not None:
        grams[1, 3, 3] = broken
    own, _ = invert(shim, grams, shared=shared, resident=resident, seeds=(0, 1))
    padded, _ = invert(shim, grams, shared=shared, resident=resident, padding=3, seeds=(0, 1))
    assert torch.equal(padded[:, :, :37].nan_to_num(nan=1e30), own.nan_to_num(nan=1e30))
    assert padded[:, :, 37:].isnan().all()  # untouched


def test_only_if(shim: cuda_shim.Library) -> None:
    gram = gram_of("random", 33, F32)
    own, breakdowns = invert(shim, gram[None], only_if=0)
    assert own.isnan().all()  # untouched
    assert breakdowns == 0
    own, breakdowns = invert(shim, gram[None], only_if=7, damping=0.1)
    assert_close("inverse", own[0], cw.reference.damped_inverse(gram.double(), 1.0, "relative", "raw", 33, 33), 2e-6)
    assert breakdowns == 1  # the first attempt, made elsewhere


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize(("shared", "clusters"), [(232448, True), (166912, False), (49152, True), (0, False)])
def test_plan_never_asks_for_more_than_there_is(
    shim: cuda_shim.Library, dtype: torch.dtype, shared: int, clusters: bool
) -> None:
    for n in range(0, 1100):
        team, threads, blocks, shared_bytes, workspace, *_ = plan(shim, n, dtype, shared, clusters)
        if team == NONE:
            assert n == 0 or n > 1056 or not clusters
            continue
        along = -(-n // 32)
        needed = 128 + (along * (along + 1) // 2 + 1) * tile_bytes(dtype)
        assert threads % 32 == 0
        assert 32 <= threads <= (512 if dtype == F32 and team == BLOCK else 256)
        assert shared_bytes <= shared
        assert (team == BLOCK) == (needed <= shared)
        assert (shared_bytes if team == BLOCK else workspace) == needed
        assert blocks == (1 if team == BLOCK else 8)


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize(("shared", "largest"), [(SHARED, 16), (SHARED, 8), (101376, 8)])
def test_resident_plan(shim: cuda_shim.Library, dtype: torch.dtype, shared: int, largest: int) -> None:
    """What a block holds fits, and all of it where it may; else the first columns of its tiles lie elsewhere."""
    for n in range(1, 1100, 13):
        made = plan(shim, n, dtype, shared, resident=largest)
        without = plan(shim, n, dtype, shared)
        blocks = largest if n > (448 if dtype == F32 else 384) else 8
        along, rows = -(-n // 32), 4 if blocks == 16 else 2
        columns = blocks // rows
        panels = -(-along // rows) - (-along // columns) + 1
        if made.team != RESIDENT:
            assert made == without
            narrowest = strip_bytes(along, dtype, 32 if dtype == F32 else 64)
            assert made.team != CLUSTER or panels > shared // tile_bytes(dtype) or narrowest > shared
            continue
        assert without.team == CLUSTER or (without.team, dtype) == (BLOCK, F32)
        assert (made.threads, made.blocks) == (256, blocks)
        tiles = made.shared // tile_bytes(dtype)
        assert made.shared <= shared
        assert made.shared % tile_bytes(dtype) == 0
        assert made.room == tiles - panels >= 0
        assert strip_bytes(along, dtype, made.line) <= shared
        assert made.line == (64 if strip_bytes(along, dtype) <= shared else 32)
        own = [0] * made.blocks
        for j in range(along):
            for i in range(j + 1):
                own[i % rows + j % columns * rows] += 1
        assert made.room >= max(own) or tiles == shared // tile_bytes(dtype)
        assert made.workspace == 128 + (along * (along + 1) + 2) * tile_bytes(dtype)


def test_every_resident_order_fits(shim: cuda_shim.Library) -> None:
    """On Hopper no order up to 1056 lacks shared memory for what follows the factor."""
    for dtype in (F32, F64):
        assert all(plan(shim, n, dtype, resident=16).team != CLUSTER for n in range(1, 1057))


def test_largest_resident_orders_with_99_kb(shim: cuda_shim.Library) -> None:
    """Float32 to 448 by strips with wide stages, to 832 with narrow ones; float64 to 352, without narrow ones."""
    lines = [plan(shim, n, F32, 101376, resident=8).line for n in (1, 160, 161, 448, 449, 832, 833, 1056)]
    assert lines == [0, 0, 64, 64, 32, 32, 0, 0]
    teams = [plan(shim, n, F64, 101376, resident=8).team for n in (352, 353)]
    assert teams == [RESIDENT, CLUSTER]


@pytest.mark.parametrize(("n", "shared"), [(130, 36000), (257, 60000), (449, 101376)])
def test_strips_with_narrow_stages_give_the_same_bits(shim: cuda_shim.Library, n: int, shared: int) -> None:
    lines = [plan(shim, n, F32, room, resident=8, forced=True).line for room in (shared, SHARED)]
    assert lines == [32, 64]
    gram = gram_of("random", n, F32)
    expected, _ = invert(shim, gram[None], resident=8, seeds=(0,))
    own, _ = invert(shim, gram[None], shared=shared, resident=8, seeds=(0, 1) if n < 449 else (1,))
    assert torch.equal(own, expected)


def test_room_of_resident_clusters(shim: cuda_shim.Library) -> None:
    """On Hopper shared memory holds all tiles up to 896 in float32 and 640 in float64, most of them at 1025."""

    def most_own(n: int, rows: int, columns: int) -> int:
        along = -(-n // 32)
        return max(
            sum(1 for j in range(c, along, columns) for i in range(r, j + 1, rows))
            for r, c in product(range(rows), range(columns))
        )

    for n, dtype, rows, columns in ((448, F32, 2, 4), (896, F32, 4, 4), (384, F64, 2, 4), (640, F64, 4, 4)):
        assert plan(shim, n, dtype, resident=16).room >= most_own(n, rows, columns)
    assert plan(shim, 1025, F32, resident=16).room == 31 < most_own(1025, 4, 4) == 45


def test_capacity_of_a_block(shim: cuda_shim.Library) -> None:
    """One block holds float32 to some 288, float64 to 192."""
    assert plan(shim, 288, F32)[0] == BLOCK
    assert plan(shim, 192, F64)[0] == BLOCK
    assert plan(shim, 1024, F32)[0] == plan(shim, 1024, F64)[0] == CLUSTER
    assert plan(shim, 1025, F32)[0] == CLUSTER  # 1024 inputs and their bias


def test_a_cluster_where_it_is_predicted_to_be_clearly_faster_than_a_block(shim: cuda_shim.Library) -> None:
    counts, _ = cuda_cycles.read_table(cuda_cycles.TABLE.read_text())
    taken = []
    for n in range(1, 289):
        faster = 10 * sum(inverse_budget.cluster(n, 8, counts)) < 9 * sum(inverse_budget.block(n, counts))
        made = plan(shim, n, F32, resident=16)
        assert made[::2][:2] == ((RESIDENT, 8) if faster else (BLOCK, 1)), n
        taken.append(faster)
        assert plan(shim, n, F32).team == plan(shim, n, F32, resident=6).team == BLOCK  # a chip without such clusters
    assert set(taken) == {False, True}
    assert all(plan(shim, n, F64, resident=16).team == BLOCK for n in range(1, 193))  # no sums are made of float64


def test_clusters_take_several_matrices_where_all_run_at_once(shim: cuda_shim.Library) -> None:
    # Of 132 processors, whatever their groups.
    for at_once in (16, 13, 1):
        counts = (1, at_once, at_once + 1, 32)
        teams = [plan(shim, 256, F32, resident=16, count=count, at_once=at_once).team for count in counts]
        assert teams == [RESIDENT, RESIDENT, BLOCK, BLOCK], at_once
    assert plan(shim, 512, F32, resident=16, count=32).team == RESIDENT  # a block has no room


def test_a_team_that_is_named_serves_or_has_no_room(shim: cuda_shim.Library) -> None:
    def named(n: int, element_bytes: int, cluster: bool) -> tuple[int, int]:
        arguments = (shim.empty(2, dtype=torch.int64), n, element_bytes, cluster)
        (made,) = shim.run("call_plan_damped_inverse_by", *arguments, seeds=(0,))
        return int(made[0]), int(made[1])

    assert [named(n, 4, False) for n in (0, 1, 288, 289)] == [(NONE, 0), (BLOCK, 1), (BLOCK, 1), (NONE, 0)]
    assert [named(n, 4, True) for n in (0, 1, 448, 449, 1056, 1057)] == [
        (NONE, 0),
        *((RESIDENT, blocks) for blocks in (8, 8, 16, 16)),
        (NONE, 0),
    ]
    assert [named(n, 8, False) for n in (192, 193)] == [(BLOCK, 1), (NONE, 0)]


def test_refusals(shim: cuda_shim.Library) -> None:
    with pytest.raises(cuda_shim.ShimError):
        invert(shim, randn(1, 1057, 1057, dtype=F32), seeds=(0,))


def test_a_smaller_launch_leaves_the_limit_of_shared_memory(shim: cuda_shim.Library) -> None:
    # The limit belongs to the kernel: lowered, it refuses a larger launch that another host thread is about to make.
    shim.reset_counts()
    for order in (160, 128):
        invert(shim, torch.eye(order).expand(1, order, order), seeds=(0,))
    assert shim.launches == 2
    assert shim.attributes_set <= 1


def clusters_run(shim: cuda_shim.Library) -> list[int]:
    """Whether clusters run, of how many resident blocks they may be, and how many of 8 such run at once."""
    (answer,) = shim.run("call_clusters_run", shim.empty(3, dtype=torch.int64), seeds=(0,))
    numbers: list[int] = answer.tolist()
    return numbers


def test_no_module_is_left_for_a_capture_to_load(shim: cuda_shim.Library) -> None:
    # One kernel of damped_inverse.cu, and one of factored_inverse.cu, which a resident cluster's launch needs as well.
    shim.reset_counts()
    clusters_run(shim)
    assert shim.kernels_asked == 2


@pytest.mark.parametrize(
    ("ptx_version", "groups", "processors", "expected", "resident", "at_once"),
    [
        (90, 1, 16, True, 16, 2),
        (100, 16, 18, True, 16, 32),
        (90, 7, 15, True, 8, 7),  # 105 processors, of which 13 clusters of 8 would be, had they no groups
        (120, 1, 8, True, 8, 1),
        (110, 3, 6, True, 6, 0),  # small blocks of a cluster share a processor, those with all its shared memory do not
        (90, 1, 1, False, 0, 0),
        (80, 1, 16, False, 0, 0),
        (86, 1, 16, False, 0, 0),
        (90, 0, 16, False, 0, 0),
    ],
)
def test_clusters_only_where_they_were_compiled_and_fit(
    shim: cuda_shim.Library, ptx_version: int, groups: int, processors: int, expected: bool, resident: int, at_once: int
) -> None:
    # What a driver makes of PTX for 8.0 takes each block for a cluster of its own, on a chip that has clusters too: it
    # would read items eight times beyond the last.
    set_device = shim.call.shim_set_device
    set_device(*map(ctypes.c_int64, (ptx_version, groups, processors)))
    try:
        answer = clusters_run(shim)
    finally:
        set_device(*map(ctypes.c_int64, (90, 1, 16)))
    assert answer == [expected, resident, at_once]
    assert (plan(shim, 400, F32, clusters=expected).team == CLUSTER) == expected
    assert (plan(shim, 400, F32, clusters=expected, resident=resident).team == RESIDENT) == (resident >= 8)


OUT_OF_MEMORY, INVALID_CLUSTER_SIZE = 2, 912


@pytest.mark.parametrize("queries_right", [0, 1])
def test_only_an_error_that_speaks_of_clusters_means_that_none_fit(shim: cuda_shim.Library, queries_right: int) -> None:
    # The answer is kept for the life of the process: no other error may become one.
    fail_query = shim.call.shim_fail_query

    try:
        fail_query(*map(ctypes.c_int64, (queries_right, OUT_OF_MEMORY)))
        with pytest.raises(cuda_shim.ShimError, match=f"error {OUT_OF_MEMORY}"):
            clusters_run(shim)
        fail_query(*map(ctypes.c_int64, (queries_right, INVALID_CLUSTER_SIZE)))
        assert clusters_run(shim) == [[0, 16, 2], [1, 8, 2]][queries_right]
    finally:
        fail_query(*map(ctypes.c_int64, (-1, 0)))
    assert clusters_run(shim) == [1, 16, 2]
