"""``memory * A + beta * x^T x`` of diagonal blocks: as the input Gram, decay and scale where it is written."""

from __future__ import annotations

import triton
import triton.language as tl

from .input_gram import input_gram_tile
from .language import element, helper, store


@helper
def block_begin(inputs, blocks, index):
    """The input at which a block begins; the next block begins where it ends."""
    more = inputs % blocks
    return index * (inputs // blocks) + tl.minimum(index, more)


@helper
def decayed(sums, before, pointers, mask, memory, beta, DECAYS: tl.constexpr):
    """``memory * before + beta * sums``; before is not read unless it DECAYS. ``pointers`` are offsets."""
    sums = sums * beta.to(sums.dtype)
    if DECAYS:
        sums += memory.to(sums.dtype) * tl.load(before + pointers, mask=mask, other=0)
    return sums


@triton.jit
def decayed_gram_kernel(
    x,
    before,
    gram,
    rows,
    inputs,
    blocks,
    stride_row,
    stride_column,
    order,
    depth,
    memory: tl.float64,
    beta: tl.float64,
    BIAS: tl.constexpr,
    DECAYS: tl.constexpr,
    WHOLE: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of one split of one block: ``gram [blocks, order, order]``, all of it, decayed, where WHOLE, else the
    upper triangles of ``[splits, blocks, order, order]``."""
    row = tl.program_id(0)
    column = tl.program_id(1)
    split = tl.program_id(2) // blocks
    block = tl.program_id(2) % blocks
    if row <= column:
        SUM: tl.constexpr = gram.dtype.element_ty
        first = block_begin(inputs, blocks, block)
        size = block_begin(inputs, blocks, block + 1) - first
        begin = split * depth
        end = tl.minimum(begin + depth, rows)
        sums, column_sums = input_gram_tile(
            x + first.to(tl.int64) * stride_column, size, begin, end, stride_column, stride_row, row * TILE,
            column * TILE, TILE, DEPTH, SUM, PRECISION,
        )  # fmt: skip
        memory = tl.full([], memory, tl.float64)
        beta = tl.full([], beta, tl.float64)
        gram += tl.program_id(2).to(tl.int64) * order * order
        before += block.to(tl.int64) * order * order
        across = (row * TILE + tl.arange(0, TILE)).to(tl.int64)
        along = (column * TILE + tl.arange(0, TILE)).to(tl.int64)
        upper = (across[:, None] <= along[None, :]) & (along < size)[None, :]
        if WHOLE:
            places = across[:, None] * order + along[None, :]
            sums = decayed(sums, before, places, upper, memory, beta, DECAYS)
        store(element(gram, across[:, None], along[None, :], order, 1), sums, upper)
        if WHOLE:
            store(element(gram, across[:, None], along[None, :], 1, order), sums, upper)
        if BIAS and row == column and block == blocks - 1:
            edge = size.to(tl.int64) + 0 * across
            inside = across < size
            if WHOLE:
                column_sums = decayed(column_sums, before, across * order + edge, inside, memory, beta, DECAYS)
            store(element(gram, across, edge, order, 1), column_sums, inside)
            if WHOLE:
                store(element(gram, across, edge, 1, order), column_sums, inside)
            if row == 0:
                corner = tl.full([1], 0, SUM) + (end - begin).to(SUM)
                place = tl.arange(0, 1).to(tl.int64) + size.to(tl.int64) * (order + 1)
                if WHOLE:
                    corner = decayed(corner, before, place, place >= 0, memory, beta, DECAYS)
                tl.store(gram + place, corner)


@triton.jit(do_not_specialize=["order", "splits"])
def reduce_decayed_gram_kernel(
    partial, before, gram, order, splits, memory: tl.float64, beta: tl.float64, DECAYS: tl.constexpr, TILE: tl.constexpr
):
    """``gram [blocks, order, order]``, decayed, from upper triangles ``partial [splits, blocks, order, order]``."""
    entries = order.to(tl.int64) * order
    partial += tl.program_id(2) * entries
    gram += tl.program_id(2) * entries
    before += tl.program_id(2) * entries
    rows = tl.program_id(0) * TILE + tl.arange(0, TILE)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    mask = (rows < order)[:, None] & (columns < order)[None, :]
    low = tl.minimum(rows[:, None], columns[None, :])
    high = tl.maximum(rows[:, None], columns[None, :])
    sums = tl.full([TILE, TILE], 0, gram.dtype.element_ty)
    for _ in range(splits):
        sums += tl.load(element(partial, low, high, order, 1), mask=mask, other=0)
        partial += tl.num_programs(2) * entries
    places = low.to(tl.int64) * order + high
    memory = tl.full([], memory, tl.float64)
    beta = tl.full([], beta, tl.float64)
    sums = decayed(sums, before, places, mask, memory, beta, DECAYS)
    tl.store(element(gram, rows[:, None], columns[None, :], order, 1), sums, mask=mask)
