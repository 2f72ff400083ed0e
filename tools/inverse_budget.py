"""Where the predicted time of one float32 inverse on CUDA goes: sums over the steps of csrc/cuda/damped_inverse.cuh and
damped_inverse_resident.cuh of the counts in csrc/cuda/cycles.txt.

    python tools/inverse_budget.py              a row an order, microseconds of an H100 at 1.755 GHz

A prediction, not a measurement. A step takes as long as the slowest of: the chain of its first warp, the rounds of the
other warps, what shared memory takes to feed their products. Assumed beside the counts: the constants below. Left out:
the launch, the loads of the Gram and the stores of the inverse, barriers of a block (some 40 cycles each), bank
conflicts, misses of the instruction cache, and what warps that share a quarter of a processor take from each other.
"""

from __future__ import annotations

from typing import NamedTuple

import cuda_cycles
from cuda_cycles import Count

GIGAHERTZ = 1.755
SHARED = 384  # cycles of shared memory for a product: 96 reads of 16 bytes a lane, of one warp, 4 cycles each
SHARED_PAIR = 512  # for two that share an operand: 128
PAIR = 1.45  # of a product's latency, for such two
CLUSTER_BARRIER = 1200
L2_LATENCY = 300
L2_BYTES = 64  # a cycle, for one processor
TILE_BYTES = 32 * 36 * 4
CLUSTER_WARPS = 8  # of a block
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
    half_of_rows: int

    @classmethod
    def of(cls, counts: Counts) -> Pieces:
        names = ("factor_tile", "scale_factor", "substitute_forward", "substitute_backward")
        products = ("product_of_rows", "product_of_columns", "half_product_of_rows")
        return cls(*(counts[f"{name}_piece<float>"].cycles for name in (*names, *products)))


def rounds(tasks: int, warps: int) -> int:
    return -(-tasks // max(warps, 1))


def products(count: int, warps: int, latency: int) -> int:
    """Cycles of so many products that are free of each other, by the warps of one block."""
    return max(rounds(count, warps) * latency, count * SHARED)


def row_of_factor(one: Pieces, first: bool, updates: int, panels: int, warps: int) -> float:
    """A step of the factor in a block that factors its tile: the first warp's chain, beside it the others' products of
    the row before, and their solutions of the row, which end a group of rows after the factor at the earliest. The
    tile's own product is half the last warp's, who comes to the others, of which it has the fewest, later."""
    others = max(warps - 1, 1)
    half = 0 if first else one.half_of_rows
    chain = half + one.factor
    rest = products(updates, others, one.of_rows)
    helper = half + updates // others * one.of_rows
    if panels == 0:
        return max(chain, rest, helper)
    ends = max(chain + one.forward / FOLLOWED, rest + one.forward, helper + panels // others * one.forward)
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
        factor += row_of_factor(one, k == 0, updates, panels, warps)
    inverse = rounds(tiles, warps) * one.scale
    for k in range(tiles):
        inverse += rounds(tiles - k, warps) * one.backward
        for first in range(0, k, warps):
            inverse += products(min(warps, k - first) * (tiles - k), warps, one.of_columns)
    lengths = [tiles - j for j in range(tiles) for _ in range(j + 1)]  # of the sum that tile (i, j) is
    shares = [sum(lengths[warp::warps]) for warp in range(warps)]
    return Budget(factor, inverse, max(max(shares) * one.of_columns, sum(lengths) * SHARED))


def cluster(order: int, blocks: int, counts: Counts) -> Budget:
    """By a cluster whose blocks keep their tiles in shared memory; the slowest block of each step, and a barrier."""
    one, tiles, warps = Pieces.of(counts), -(-order // 32), CLUSTER_WARPS
    rows = 4 if blocks == 16 else 2
    columns = blocks // rows
    grid = [(row, column) for row in range(rows) for column in range(columns)]

    def own(first: int, line: int, lines: int) -> int:
        return sum(i % lines == line for i in range(first, tiles))

    def fetched(count: int) -> float:
        return L2_LATENCY + count * TILE_BYTES / L2_BYTES

    def step_of_factor(row: int, column: int, k: int) -> float:
        fetch = fetched(own(k, row, rows) + own(k, column, columns) + 1) if k > 0 else 0
        updates = sum(
            i % rows == row and j % columns == column for j in range(k + 1, tiles) for i in range(k, j + 1) if k > 0
        )
        if row != k % rows:
            return fetch + products(updates, warps, one.of_rows)
        return fetch + row_of_factor(one, k == 0, updates, own(k + 1, column, columns), warps)

    def step_of_inverse(row: int, column: int, k: int) -> float:
        solved = own(k, column, columns)
        above = own(0, row, rows) - own(k, row, rows)
        cycles = rounds(solved, warps) * one.backward if row == k % rows else 0
        return cycles + (fetched(solved) + products(above * solved, warps, one.of_columns) if k > 0 else 0)

    factor = sum(max(step_of_factor(*place, k) for place in grid) + CLUSTER_BARRIER for k in range(tiles))
    inverse = sum(max(step_of_inverse(*place, k) for place in grid) + CLUSTER_BARRIER for k in range(tiles))
    return Budget(factor, inverse, square_of_cluster(tiles, blocks, one.of_columns))


def square_of_cluster(tiles: int, blocks: int, latency: int) -> float:
    """All warps take turns over the blocks, there and back; two tiles at once where each has several to make."""
    turns = blocks * CLUSTER_WARPS
    pairs = tiles * (tiles + 1) // 2 > 4 * turns
    tasks = [(tiles - j, min(1 + pairs, j + 1 - i)) for j in range(tiles) for i in range(0, j + 1, 1 + pairs)]
    warp_cycles, shared_cycles = [0.0] * turns, [0.0] * blocks
    for index, (length, width) in enumerate(tasks):
        turn = index % turns
        turn = turn if index // turns % 2 == 0 else turns - 1 - turn
        warp_cycles[turn] += length * latency * (PAIR if width == 2 else 1)
        shared_cycles[turn % blocks] += length * (SHARED_PAIR if width == 2 else SHARED)
    return max(*warp_cycles, *shared_cycles)


def main() -> None:
    counts, _ = cuda_cycles.read_table(cuda_cycles.TABLE.read_text())
    ways = [*((order, 1) for order in (32, 64, 128, 256, 288)), *((order, 8) for order in (320, 384, 512, 1024, 1025))]
    for order, blocks in [*ways, *((order, 16) for order in (320, 384, 512, 1024, 1025))]:
        made = block(order, counts) if blocks == 1 else cluster(order, blocks, counts)
        parts = ", ".join(f"{name} {value / GIGAHERTZ / 1000:.1f}" for name, value in made._asdict().items())
        print(f"order {order}, blocks {blocks}: {made.microseconds:.0f} us ({parts})")


if __name__ == "__main__":
    main()
