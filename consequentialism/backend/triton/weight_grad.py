"""The bias's gradient, and NaN everywhere where one entry of dy is not finite; dw itself is a stock product."""

from __future__ import annotations

import triton
import triton.language as tl

from .language import ceil_div, element, load, store, sum_over


@triton.jit(do_not_specialize=["rows", "outputs"])
def bias_grad_kernel(
    dy,
    column,
    db,
    broken,
    rows,
    outputs,
    stride_row,
    stride_column,
    HAS_COLUMN: tl.constexpr,
    SUM: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_O: tl.constexpr,
):
    """``db = dy^T column [O]``, a tile of outputs each, and whether the tile has an entry that is not finite."""
    output = tl.program_id(0) * TILE_O + tl.arange(0, TILE_O)
    sums = tl.full([TILE_O], 0, SUM)
    bad = tl.full([TILE_O], 0, tl.int32)
    for first in range(0, rows, TILE_N):
        row = first + tl.arange(0, TILE_N)
        errors = load(
            element(dy, row[:, None], output[None, :], stride_row, stride_column),
            (row < rows)[:, None] & (output < outputs)[None, :],
        ).to(SUM)
        bad += sum_over((errors - errors != 0).to(tl.int32), axis=0)
        if HAS_COLUMN:
            weight = tl.load(column + row, mask=row < rows, other=0)
            sums += sum_over(errors * weight[:, None], axis=0)
    tl.store(broken + tl.program_id(0), sum_over(bad, axis=0))
    if HAS_COLUMN:
        store(db + output, sums, output < outputs)


@triton.jit(do_not_specialize=["flags", "entries", "outputs", "programs"])
def poison_kernel(
    dw,
    db,
    broken,
    flags,
    entries,
    outputs,
    programs,
    HAS_COLUMN: tl.constexpr,
    FLAGS: tl.constexpr,
    LINE: tl.constexpr,
):
    """Fill ``dw`` and ``db`` with NaN where one of the ``flags`` in ``broken`` is set."""
    bad = tl.full([FLAGS], 0, tl.int32)
    for first in range(0, flags, FLAGS):
        flag = first + tl.arange(0, FLAGS)
        bad |= (tl.load(broken + flag, mask=flag < flags, other=0) != 0).to(tl.int32)
    if sum_over(bad, axis=0) > 0:
        values = tl.full([LINE], float("nan"), tl.float32)
        for part in range(tl.program_id(0), ceil_div(entries, LINE), programs):
            entry = tl.cast(part, tl.int64) * LINE + tl.arange(0, LINE)
            store(dw + entry, values, entry < entries)
        if HAS_COLUMN:
            for part in range(tl.program_id(0), ceil_div(outputs, LINE), programs):
                output = part * LINE + tl.arange(0, LINE)
                store(db + output, values, output < outputs)
