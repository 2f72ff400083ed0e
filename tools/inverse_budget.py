"""Where the predicted time of one float32 inverse on CUDA goes: sums over the steps of csrc/cuda/damped_inverse.cuh,
damped_inverse_resident.cuh and factored_inverse.cuh of the counts in csrc/cuda/cycles.txt.

    python tools/inverse_budget.py              a row an order, microseconds of an H100 at 1.755 GHz

A prediction, not a measurement. A step takes as long as the slowest of: the chain of its first warp, the rounds of the
other warps, what shared memory takes to feed their products. Assumed beside the counts: the constants below. Left out:
the first launch, the loads of the Gram and the stores of the inverse, barriers of a block (some 40 cycles each), bank
conflicts, what shared memory takes to feed substitutions, misses of the instruction cache, and, but for a strip's
products, what warps that share a quarter of a processor take from each other.
"""

from __future__ import annotations

from typing import NamedTuple

import cuda_cycles
from cuda_cycles import Count

GIGAHERTZ = 1.755
SHARED = 384  # cycles of shared memory for a product: 96 reads of 16 bytes a lane, of one warp, 4 cycles each
SHARED_PAIR = 512  # for two that share an operand: 128
PAIR = 1.45  # of a product's latency, for such two
PAIRS_FROM = 13  # rows of tiles that are left
SHARED_GROUP = 544  # for a warp's three tiles by a strip of 16: 112 such reads, and 12 KiB that come to be read
SHARED_SQUARE = 576  # for a product of V V^T by two warps: 64 such reads of each, and 8 KiB
CLUSTER_BARRIER = 1200
L2_LATENCY = 300
L2_BYTES = 64  # a cycle, for one processor
TILE_BYTES = 32 * 36 * 4
CLUSTER_WARPS = 8  # of a block
GROUP = 3  # tiles of a column that a warp of a strip's block works on
PROCESSORS = 132
QUARTERS = 4  # of a processor, each issues one instruction a cycle
LAUNCH = 3500  # from the end of one launch to the work of the next
HELPERS = 2  # of the first warp, in its tile's product
FOLLOWED = 4  # groups of rows, of which the last is left when a tile is factored
Counts = dict[str, Count]


class Budget(NamedTuple):
    """Cycles of the three parts: ``A = U^T U``, ``V = U^-1``, ``V V^T``."""

    factor: float
    inverse: float
    square: float

    @property
    def microseconds(self) -> float:
        return sum(self) / GIGAHERTZ / 1000


class Pieces(NamedTuple):
    factor: int
    scale: int
    forward: int
    backward: int
    of_rows: int
    of_columns: int
    quarter: int
    strip: int
    of_group: int
    of_square: int

    @classmethod
    def of(cls, counts: Counts) -> Pieces:
        names = ("factor_tile", "scale_factor", "substitute_forward", "substitute_backward")
        products = ("product_of_rows", "product_of_columns", "quarter_product")
        of_strips = ("solve_strip", "product_of_group", "product_of_square")
        return cls(*(counts[f"{name}_piece<float>"].cycles for name in (*names, *products, *of_strips)))


def rounds(tasks: int, warps: int) -> int:
    return -(-tasks // max(warps, 1))


def turns(tasks: list[int], warps: int, latency: int) -> list[float]:
    """Cycles of each of the warps that take turns at these products, one or two at once."""
    cycles = [0.0] * max(warps, 1)
    for index, width in enumerate(tasks):
        cycles[index % len(cycles)] += latency * (PAIR if width == 2 else 1)
    return cycles


def products(tasks: list[int], warps: int, latency: int) -> float:
    """Cycles of the warps of one block for these products, which are free of each other."""
    return max(*turns(tasks, warps, latency), sum(SHARED_PAIR if width == 2 else SHARED for width in tasks))


def row_of_factor(one: Pieces, first: bool, updates: list[int], panels: int, warps: int) -> float:
    """A step of the factor in a block that factors its tile: the first warp's chain, beside it the others' products of
    the row before, and their solutions of the row, which end a group of rows after the factor at the earliest. Of the
    tile's own product two quarters are the last warps', who come to the others, of which they have the fewest, later.
    """
    others = max(warps - 1, 1)
    quarter = 0 if first else one.quarter
    chain = quarter + one.factor
    rest = products(updates, others, one.of_rows)
    updated, solved = turns(updates, others, one.of_rows), turns([1] * panels, others, one.forward)
    helpers = [quarter + updated[warp] + solved[warp] for warp in range(max(others - HELPERS, 0), others)]
    if panels == 0:
        return max(chain, rest, *helpers)
    ends = max(chain + one.forward / FOLLOWED, rest + one.forward, *helpers)
    return ends + max(rounds(panels, others) - 1, 0) * one.forward


def block(order: int, counts: Counts) -> Budget:
    """By one block, up to order 288."""
    one, tiles, warps = Pieces.of(counts), -(-order // 32), 1
    while warps < min(16, tiles * (tiles + 1) // 2):
        warps *= 2
    factor = 0.0
    for k in range(tiles):
        panels = tiles - 1 - k
        updates = panels + panels * (panels + 1) // 2 if k > 0 else 0
        factor += row_of_factor(one, k == 0, [1] * updates, panels, warps)
    inverse = rounds(tiles, warps) * one.scale
    for k in range(tiles):
        inverse += rounds(tiles - k, warps) * one.backward
        for first in range(0, k, warps):
            inverse += products([1] * (min(warps, k - first) * (tiles - k)), warps, one.of_columns)
    lengths = [tiles - j for j in range(tiles) for _ in range(j + 1)]  # of the sum that tile (i, j) is
    shares = [sum(lengths[warp::warps]) for warp in range(warps)]
    return Budget(factor, inverse, max(max(shares) * one.of_columns, sum(lengths) * SHARED))


def cluster(order: int, blocks: int, counts: Counts) -> Budget:
    """The factor by a cluster whose blocks keep their tiles in shared memory: the slowest block of each step, and a
    barrier. The rest by all processors."""
    one, tiles, warps = Pieces.of(counts), -(-order // 32), CLUSTER_WARPS
    rows = 4 if blocks == 16 else 2
    columns = blocks // rows
    grid = [(row, column) for row in range(rows) for column in range(columns)]

    def own(first: int, line: int, lines: int) -> int:
        return sum(i % lines == line for i in range(first, tiles))

    def fetched(count: int) -> float:
        return L2_LATENCY + count * TILE_BYTES / L2_BYTES

    def updates(row: int, column: int, k: int) -> list[int]:
        """First those of row k, then of each column the rest, by twos where many are left."""
        solves = row == k % rows
        own_columns = [j for j in range(k + 1, tiles) if j % columns == column]
        tasks = [1] * len(own_columns) if solves else []
        for j in own_columns:
            count = sum(i % rows == row for i in range(k + solves, j + 1))
            pairs = count // 2 if tiles - k >= PAIRS_FROM else 0
            tasks += [2] * pairs + [1] * (count - 2 * pairs)
        return tasks

    def step_of_factor(row: int, column: int, k: int) -> float:
        fetch = fetched(own(k, row, rows) + own(k, column, columns) + 1) if k > 0 else 0
        tasks = updates(row, column, k) if k > 0 else []
        if row != k % rows:
            return fetch + products(tasks, warps, one.of_rows)
        return fetch + row_of_factor(one, k == 0, tasks, own(k + 1, column, columns), warps)

    factor = sum(max(step_of_factor(*place, k) for place in grid) + CLUSTER_BARRIER for k in range(tiles))
    issued = counts["product_of_group_piece<float>"].instructions
    return Budget(factor, longest_strip(tiles, one, issued), square(tiles, one))


def longest_strip(tiles: int, one: Pieces, issued: int) -> float:
    """The last column of tiles; all others are done before. A step is the slower of its first warp and the others."""
    cycles: float = LAUNCH + L2_LATENCY + one.backward
    for k in range(tiles - 1, 0, -1):
        groups = rounds(k - 1, GROUP)
        shared, copied = groups * SHARED_GROUP, (k - 1) * TILE_BYTES / L2_BYTES
        others = max(one.of_group, rounds(groups, QUARTERS) * issued, shared, copied) if groups else 0
        cycles += max(one.strip, others)
    return cycles


def square(tiles: int, one: Pieces) -> float:
    """A block for each tile, all at once, dealt to the processors in turn: the longest sum or the fullest of them."""
    lengths = [tiles - j for j in range(tiles) for _ in range(j + 1)]
    fullest = max(sum(lengths[processor::PROCESSORS]) for processor in range(PROCESSORS))
    return LAUNCH + max(L2_LATENCY + tiles * one.of_square, fullest * SHARED_SQUARE)


def main() -> None:
    counts, _ = cuda_cycles.read_table(cuda_cycles.TABLE.read_text())
    ways = [*((order, 1) for order in (32, 64, 128, 256, 288)), *((order, 8) for order in (320, 384, 512, 1024, 1025))]
    for order, blocks in [*ways, *((order, 16) for order in (320, 384, 512, 1024, 1025))]:
        made = block(order, counts) if blocks == 1 else cluster(order, blocks, counts)
        parts = ", ".join(f"{name} {value / GIGAHERTZ / 1000:.1f}" for name, value in made._asdict().items())
        print(f"order {order}, blocks {blocks}: {made.microseconds:.0f} us ({parts})")


if __name__ == "__main__":
    main()
