"""One launch for few rows: every program recomputes Gram and factor, and writes its tile of dw.

No program waits for another, so the result does not depend on their order. Gram and factor lie in memory of the
program's own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .damped_inverse import inverse_with_retries, outcome_tile
from .emended_input import add_emended
from .input_gram import input_gram_tile
from .language import add_product, ceil_div, element, load, round_to, store, sum_over


@triton.jit(do_not_specialize=["rows", "inputs", "outputs", "groups"])
def fused_weight_grad_kernel(
    x,
    dy,
    dw,
    db,
    room,
    breakdowns,
    rows,
    inputs,
    outputs,
    groups,
    x_row,
    x_column,
    dy_row,
    dy_column,
    damping: tl.float64,
    rank: tl.float64,
    multiplier: tl.float64,
    BIAS: tl.constexpr,
    RELATIVE: tl.constexpr,
    BY_RIDGE: tl.constexpr,
    RETRIES: tl.constexpr,
    SIZE: tl.constexpr,
    TILE_I: tl.constexpr,
    TILE_O: tl.constexpr,
    DEPTH: tl.constexpr,
    TILE: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``dw [O, I]``, of which a program writes TILE_I columns and each of so many ``groups`` of rows; and ``db [O]``.

    Args:
        room: ``[programs, 3, SIZE, SIZE]``, in the type of Gram and factor; ``SIZE`` is at least ``rows``.
    """
    SUM: tl.constexpr = room.dtype.element_ty
    program = tl.program_id(0)
    tiles = ceil_div(inputs, TILE_I)
    gram = room + program.to(tl.int64) * 3 * SIZE * SIZE
    upper = gram + SIZE * SIZE
    inverse = upper + SIZE * SIZE
    row = tl.arange(0, SIZE)
    entries, _ = input_gram_tile(x, rows, 0, inputs, x_row, x_column, 0, 0, SIZE, DEPTH, SUM, PRECISION)
    if BIAS:
        entries += 1
    tl.store(gram + row[:, None] * SIZE + row[None, :], entries)
    tl.debug_barrier()
    outcome, times, ridge = inverse_with_retries(
        gram, rows, SIZE, upper, inverse, SIZE, damping, rank, multiplier, breakdowns, breakdowns, program == 0,
        RELATIVE, BY_RIDGE, False, RETRIES, TILE, WIDE, PRECISION,
    )  # fmt: skip
    whole = outcome_tile(gram, inverse, outcome, times, ridge, 0, 0, rows, SIZE, SIZE, SIZE, TILE, PRECISION)
    whole = tl.where((row < rows)[:, None] & (row < rows)[None, :], whole, 0)

    bad = tl.full([SIZE], 0, tl.int32)  # one entry of dy that is not finite makes everything NaN
    for first in range(0, outputs, TILE_O):
        output = first + tl.arange(0, TILE_O)
        errors = load(
            element(dy, row[:, None], output[None, :], dy_row, dy_column),
            (row < rows)[:, None] & (output < outputs)[None, :],
        ).to(SUM)
        bad += sum_over((errors - errors != 0).to(tl.int32), axis=1)
    poison = tl.where(sum_over(bad, axis=0) > 0, float("nan"), 0.0).to(SUM)

    column = (program % tiles) * TILE_I + tl.arange(0, TILE_I)
    own = load(
        element(x, row[:, None], column[None, :], x_row, x_column),
        (row < rows)[:, None] & (column < inputs)[None, :],
    )
    emended = add_emended(tl.full([SIZE, TILE_I], 0, SUM), whole, own, x.dtype.element_ty, True, PRECISION)
    ones = sum_over(whole, axis=1)
    for part in range(program // tiles, ceil_div(outputs, TILE_O), groups):
        output = part * TILE_O + tl.arange(0, TILE_O)
        errors = load(
            element(dy, row[:, None], output[None, :], dy_row, dy_column),
            (row < rows)[:, None] & (output < outputs)[None, :],
        )
        gradient = tl.full([TILE_O, TILE_I], 0, SUM)
        if x.dtype.element_ty == tl.bfloat16:
            gradient += tl.dot(tl.trans(errors), round_to(emended, tl.bfloat16))
        else:
            gradient = add_product(gradient, tl.trans(errors.to(SUM)), emended.to(SUM), PRECISION)
        store(
            element(dw, output[:, None], column[None, :], inputs, 1),
            gradient + poison,
            (output < outputs)[:, None] & (column < inputs)[None, :],
        )
        if BIAS and program % tiles == 0:
            total = sum_over(errors.to(SUM) * ones[:, None], axis=0) + poison
            store(db + output, total, output < outputs)
