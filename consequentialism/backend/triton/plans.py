"""How each kernel is launched: tiles, warps and stages, by shape and type; and which of them `tune` may time.

Whatever decides in which order numbers are added follows a fixed rule of shape and type, or two runs would not agree to
the bit: splits, depths, tiles (64 rows of a product take a warpgroup's instruction on a Hopper chip, fewer do not), and
warps where a kernel sums across threads. What is left to time are the stages of a pipeline and, in a dual Gram, which
sums nothing across threads, the warps. `make test` and `make triton-compile` compile all that a rule or the tuner can
pick, and check that it fits the chip's registers and shared memory and that a launch's candidates sum in one order.

Not timed: launches below TUNED_PRODUCTS or of small tiles, which are over in microseconds or bound by memory, while to
compile a candidate takes a second; factor and fused kernel, which sum the Gram's trace across threads, so that their
warps are fixed, have no pipeline (their loops wait for one another's memory), and count breakdowns, once a launch; a
convolution's Gram of half types, which compiles to the same instructions for any number of stages; and a weight
gradient, which is a stock product and two kernels that read and write once.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

PROCESSORS = 132  # of an H100; more or fewer only move the point at which tiles grow


class Candidate(Protocol):
    """The part of a plan that `tune` looks at."""

    @property
    def warps(self) -> int: ...
    @property
    def stages(self) -> int: ...


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


# By the bytes of what is multiplied: 2 (half-precision types), 4 (float32), 8 (float64).
GRAM_SMALL = {2: GramPlan(32, 64, 4, 4), 4: GramPlan(32, 32, 4, 3), 8: GramPlan(32, 32, 4, 2)}
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
    """The number of splits that fills the chip once."""
    splits = min(_most_splits(inner), max(1, PROCESSORS // (grams * _tiles(outer, plan))))
    length = ceil_div(ceil_div(max(inner, 1), splits), plan.depth) * plan.depth
    return plan._replace(splits=ceil_div(max(inner, 1), length), length=length)


def plan_gram(outer: int, inner: int, element_bytes: int) -> GramPlan:
    """The plan for the Gram of an operand ``[outer, inner]``, multiplied in a type of so many bytes."""
    plan = GRAM_SMALL[element_bytes]
    if outer > plan.tile:
        plan = GRAM_LARGE[element_bytes]
    huge = GRAM_HUGE.get(element_bytes)
    # Rows that start anywhere need addresses for each element, which the largest tile has no registers for.
    aligned = outer % 16 == 0 and inner % 16 == 0
    if huge is not None and aligned and outer > huge.tile and _tiles(outer, huge) * _most_splits(inner) >= PROCESSORS:
        plan = huge
    return _split(plan, outer, inner)


def plan_decayed_gram(size: int, rows: int, blocks: int, element_bytes: int) -> GramPlan:
    """The plan for the Grams of ``blocks`` blocks of ``size`` columns each, over ``rows`` rows."""
    plan = GRAM_SMALL[element_bytes]
    if size > plan.tile:
        plan = GRAM_LARGE[element_bytes]
    return _split(plan, size, rows, blocks)


def plan_symmetric(order: int, element_bytes: int) -> GramPlan:
    """The plan for products of symmetric matrices ``[order, order]``, float32 or float64."""
    small = GRAM_SMALL[element_bytes]
    return small if order <= small.tile else GRAM_LARGE[element_bytes]


# A patch's entries are addressed one by one.
CONV_GRAM = {2: GramPlan(64, 32, 8, 1), 4: GramPlan(32, 32, 4, 1), 8: GramPlan(32, 32, 4, 1)}


def plan_conv_gram(groups: int, entries: int, rows: int, element_bytes: int) -> GramPlan:
    """The plan for the Grams of ``groups`` groups, of ``rows`` patches of ``entries`` entries each."""
    return _split(CONV_GRAM[element_bytes], entries, rows, groups)


def plan_emend(rows: int, inputs: int, element_bytes: int) -> EmendPlan:
    """The plan for an emended input ``[rows, inputs]``, multiplied in a type of so many bytes."""
    large = EMEND_LARGE[element_bytes]
    enough = ceil_div(rows, large.rows) * ceil_div(inputs, large.inputs) >= PROCESSORS
    return large if enough else EMEND_SMALL[element_bytes]


TUNED_PRODUCTS = 2**26  # multiplications of a launch
# By bytes; four of float64 would not fit into the 99 KB that a block has on the smallest of the chips (8.6, 8.9, 12.0).
STAGES = {2: (2, 3, 4), 4: (2, 3, 4), 8: (2, 3)}
CONV_STAGES = {2: (1,), 4: (1, 3), 8: (1, 3)}


def gram_candidates(plan: GramPlan, outer: int, inner: int, element_bytes: int, primal: bool) -> tuple[GramPlan, ...]:
    """``plan``, of `plan_gram`, and what may be timed beside it."""
    if plan.tile < 64 or outer * outer * inner < TUNED_PRODUCTS:
        return (plan,)
    others = [plan._replace(stages=stages) for stages in STAGES[element_bytes] if stages != plan.stages]
    if not primal and plan.tile == 64 and element_bytes < 8:  # larger tiles of fewer warps spill
        others.append(plan._replace(warps=plan.warps // 2))
    return (plan, *others)


def conv_gram_candidates(plan: GramPlan, entries: int, rows: int, element_bytes: int) -> tuple[GramPlan, ...]:
    """``plan``, of `plan_conv_gram`, and what may be timed beside it."""
    if entries * entries * rows < TUNED_PRODUCTS:
        return (plan,)
    return tuple(plan._replace(stages=stages) for stages in CONV_STAGES[element_bytes])


def emend_candidates(plan: EmendPlan, rows: int, inputs: int, order: int, element_bytes: int) -> tuple[EmendPlan, ...]:
    """``plan``, of `plan_emend`, and what may be timed beside it."""
    if plan.rows < 64 or rows * inputs * order < TUNED_PRODUCTS:
        return (plan,)
    return (plan, *(plan._replace(stages=stages) for stages in STAGES[element_bytes] if stages != plan.stages))


class InversePlan(NamedTuple):
    """Rows that are factored in registers, the columns of a strip, and the warps of the one program of a matrix."""

    tile: int
    wide: int
    warps: int


MAX_INVERSE_ORDER = 256  # what one program factors in less time than cuSOLVER takes (a prediction)
INVERSE_SMALL = {4: InversePlan(32, 32, 4), 8: InversePlan(16, 32, 4)}
INVERSE_LARGE = {4: InversePlan(32, 64, 8), 8: InversePlan(16, 32, 4)}
INVERSE_CANDIDATES = {size: sorted({INVERSE_SMALL[size], INVERSE_LARGE[size]}) for size in (4, 8)}
MULTIPLY_TILE = 32


def plan_damped_inverse(order: int, element_bytes: int) -> InversePlan:
    """The plan for inverses of matrices ``[order, order]``, float32 or float64."""
    return INVERSE_SMALL[element_bytes] if order <= 64 else INVERSE_LARGE[element_bytes]


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
    """The plan for a gradient of ``rows`` rows, or None where a program cannot hold them."""
    fitting = (plan for plan in FUSED_CANDIDATES[element_bytes] if plan.size >= rows)
    return next(fitting, None)
