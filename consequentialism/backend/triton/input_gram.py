"""The input Gram, ``x x^T`` or ``x^T x``: the upper triangle in tiles, split over the inner index.

An operand is ``[outer, inner]``: x itself (dual) or ``x^T`` (primal), which only swaps two strides. Splits are summed
in their order by a second kernel, so that results are the same from run to run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .language import add_product, element, helper, load, store, sum_over


@helper
def input_gram_tile(
    x,
    outer,
    begin,
    end,
    stride_outer,
    stride_inner,
    first_row,
    first_column,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
    SUM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``[TILE, TILE]`` entries of the Gram over inner in [begin, end), and the sums of the rows, ``[TILE]``."""
    rows = first_row + tl.arange(0, TILE)
    columns = first_column + tl.arange(0, TILE)
    steps = tl.arange(0, DEPTH)
    sums = tl.full([TILE, TILE], 0, SUM)
    row_sums = tl.full([TILE], 0, SUM)
    for inner in range(begin, end, DEPTH):
        valid = (inner + steps < end)[None, :]
        a = load(
            element(x, rows[:, None], (inner + steps)[None, :], stride_outer, stride_inner),
            (rows < outer)[:, None] & valid,
        )
        b = load(
            element(x, columns[:, None], (inner + steps)[None, :], stride_outer, stride_inner),
            (columns < outer)[:, None] & valid,
        )
        sums = add_product(sums, a, tl.trans(b), PRECISION)
        row_sums += sum_over(a.to(SUM), axis=1)
    return sums, row_sums


@triton.jit
def input_gram_kernel(
    x,
    gram,
    outer,
    inner,
    stride_outer,
    stride_inner,
    order,
    depth,
    BIAS: tl.constexpr,
    PRIMAL: tl.constexpr,
    MIRRORED: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of one split: ``gram [splits, order, order]``, the upper triangle, or all of it where MIRRORED."""
    row = tl.program_id(0)
    column = tl.program_id(1)
    split = tl.program_id(2)
    if row <= column:
        SUM: tl.constexpr = gram.dtype.element_ty
        begin = split * depth
        end = tl.minimum(begin + depth, inner)
        sums, row_sums = input_gram_tile(
            x, outer, begin, end, stride_outer, stride_inner, row * TILE, column * TILE, TILE, DEPTH, SUM, PRECISION
        )
        gram += split.to(tl.int64) * order * order
        rows = row * TILE + tl.arange(0, TILE)
        columns = column * TILE + tl.arange(0, TILE)
        if BIAS and not PRIMAL:
            sums += tl.where(split == 0, 1.0, 0.0).to(SUM)  # the column of ones adds 1 to each entry
        upper = (rows[:, None] <= columns[None, :]) & (columns < outer)[None, :]
        store(element(gram, rows[:, None], columns[None, :], order, 1), sums, upper)
        if MIRRORED:
            store(element(gram, rows[:, None], columns[None, :], 1, order), sums, upper)
        if BIAS and PRIMAL and row == column:
            store(element(gram, rows, outer + 0 * rows, order, 1), row_sums, rows < outer)
            if MIRRORED:
                store(element(gram, rows, outer + 0 * rows, 1, order), row_sums, rows < outer)
            if row == 0:
                tl.store(gram + order.to(tl.int64) * order - 1, (end - begin).to(SUM))


@triton.jit(do_not_specialize=["order", "splits"])
def reduce_gram_kernel(partial, gram, order, splits, TILE: tl.constexpr):
    """``gram [groups, order, order]``, from the upper triangles of ``partial [splits, groups, order, order]``."""
    entries = order.to(tl.int64) * order
    partial += tl.program_id(2) * entries
    gram += tl.program_id(2) * entries
    rows = tl.program_id(0) * TILE + tl.arange(0, TILE)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    mask = (rows < order)[:, None] & (columns < order)[None, :]
    low = tl.minimum(rows[:, None], columns[None, :])
    high = tl.maximum(rows[:, None], columns[None, :])
    sums = tl.full([TILE, TILE], 0, gram.dtype.element_ty)
    for _ in range(splits):
        sums += tl.load(element(partial, low, high, order, 1), mask=mask, other=0)
        partial += tl.num_programs(2) * entries
    tl.store(element(gram, rows[:, None], columns[None, :], order, 1), sums, mask=mask)
