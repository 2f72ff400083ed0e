"""How each kernel is launched: tiles, warps and stages, by shape and type alone.

A plan follows a fixed rule instead of being timed at the first call: timing waits for the device, cannot be captured in
a CUDA graph, and two runs that pick different depths or splits would not agree to the bit. The candidates of an op are
all that its rule can pick; tests compile each and hold it to the chip's registers and shared memory.
"""

from __future__ import annotations

from typing import NamedTuple

PROCESSORS = 132  # of an H100; more or fewer only move the point at which tiles grow


class GramPlan(NamedTuple):
    """``splits`` of the inner index, ``length`` each, and the tiles of ``x x^T``."""

    tile: int
    depth: int
    warps: int
    stages: int
    splits: int = 1
    length: int = 0


class EmendPlan(NamedTuple):
    """Tiles of the emended input, ``[rows, inputs]``, and the depth of a step."""

    rows: int
    inputs: int
    depth: int
    warps: int
    stages: int


def ceil_div(a: int, b: int) -> int:
    """``a / b``, rounded up."""
    return -(-a // b)


# By the bytes of what is multiplied: 2 (half types), 4 (float32), 8 (float64).
GRAM_SMALL = {2: GramPlan(32, 64, 4, 3), 4: GramPlan(32, 32, 4, 3), 8: GramPlan(32, 32, 4, 2)}
GRAM_LARGE = {2: GramPlan(64, 64, 8, 3), 4: GramPlan(64, 32, 8, 3), 8: GramPlan(64, 32, 8, 2)}
EMEND_SMALL = {2: EmendPlan(32, 32, 32, 4, 2), 4: EmendPlan(32, 32, 32, 4, 2), 8: EmendPlan(32, 32, 32, 4, 2)}
EMEND_LARGE = {2: EmendPlan(64, 64, 32, 4, 2), 4: EmendPlan(64, 64, 32, 4, 2), 8: EmendPlan(64, 64, 32, 8, 2)}
EMEND_CANDIDATES = {size: (EMEND_SMALL[size], EMEND_LARGE[size]) for size in (2, 4, 8)}
GRAM_HUGE = {2: GramPlan(128, 32, 8, 3)}
GRAM_CANDIDATES = {size: [t[size] for t in (GRAM_SMALL, GRAM_LARGE, GRAM_HUGE) if size in t] for size in (2, 4, 8)}
MIN_LENGTH = 256  # of a split: less does not pay for the sum over splits


def _tiles(outer: int, plan: GramPlan) -> int:
    along = ceil_div(max(outer, 1), plan.tile)
    return along * (along + 1) // 2


def _most_splits(inner: int) -> int:
    return max(1, inner // MIN_LENGTH)


def _split(plan: GramPlan, outer: int, inner: int, grams: int = 1) -> GramPlan:
    """As many splits as fill the chip once."""
    splits = min(_most_splits(inner), max(1, PROCESSORS // (grams * _tiles(outer, plan))))
    length = ceil_div(ceil_div(max(inner, 1), splits), plan.depth) * plan.depth
    return plan._replace(splits=ceil_div(max(inner, 1), length), length=length)


def plan_gram(outer: int, inner: int, element_bytes: int) -> GramPlan:
    """For the Gram of an operand ``[outer, inner]``, multiplied in a type of so many bytes."""
    plan = GRAM_SMALL[element_bytes]
    if outer > plan.tile:
        plan = GRAM_LARGE[element_bytes]
    huge = GRAM_HUGE.get(element_bytes)
    # Rows that start anywhere need addresses for each element, which the largest tile has no registers for.
    aligned = outer % 16 == 0 and inner % 16 == 0
    if huge is not None and aligned and outer > huge.tile and _tiles(outer, huge) * _most_splits(inner) >= PROCESSORS:
        plan = huge
    return _split(plan, outer, inner)


# A patch's entries are addressed one by one.
CONV_GRAM = {2: GramPlan(64, 32, 8, 1), 4: GramPlan(32, 32, 4, 1), 8: GramPlan(32, 32, 4, 1)}


def plan_conv_gram(groups: int, entries: int, rows: int, element_bytes: int) -> GramPlan:
    """For the Grams of so many groups, of ``rows`` patches of so many entries each."""
    return _split(CONV_GRAM[element_bytes], entries, rows, groups)


def plan_emend(rows: int, inputs: int, element_bytes: int) -> EmendPlan:
    """For an emended input ``[rows, inputs]``, multiplied in a type of so many bytes."""
    large = EMEND_LARGE[element_bytes]
    enough = ceil_div(rows, large.rows) * ceil_div(inputs, large.inputs) >= PROCESSORS
    return large if enough else EMEND_SMALL[element_bytes]


class FactorPlan(NamedTuple):
    """Rows that are factored in registers, the columns of a strip, and the warps of the one program of a matrix."""

    tile: int
    wide: int
    warps: int


MAX_FACTOR_ORDER = 256  # what one program factors in less time than cuSOLVER takes (a prediction)
FACTOR_SMALL = {4: FactorPlan(32, 32, 4), 8: FactorPlan(16, 32, 4)}
FACTOR_LARGE = {4: FactorPlan(32, 64, 8), 8: FactorPlan(16, 32, 4)}
FACTOR_CANDIDATES = {size: sorted({FACTOR_SMALL[size], FACTOR_LARGE[size]}) for size in (4, 8)}
MULTIPLY_TILE = 32


def plan_factor(order: int, element_bytes: int) -> FactorPlan:
    """For matrices ``[order, order]``, float32 or float64."""
    return FACTOR_SMALL[element_bytes] if order <= 64 else FACTOR_LARGE[element_bytes]


class FusedPlan(NamedTuple):
    """Rows that a program holds, and its tile of dw, ``[outputs, inputs]``."""

    size: int
    inputs: int
    outputs: int
    depth: int
    warps: int


MAX_FUSED_ROWS = 64
FUSED_CANDIDATES = {
    4: (FusedPlan(32, 32, 64, 32, 4), FusedPlan(64, 32, 64, 32, 8)),
    8: (FusedPlan(32, 32, 64, 32, 8), FusedPlan(64, 32, 64, 32, 8)),
}


def plan_fused(rows: int, element_bytes: int) -> FusedPlan | None:
    """For a gradient of so many rows, or None where a program cannot hold them."""
    fitting = (plan for plan in FUSED_CANDIDATES[element_bytes] if plan.size >= rows)
    return next(fitting, None)
