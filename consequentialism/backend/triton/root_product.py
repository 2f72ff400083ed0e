"""Rows times the symmetric root S, batched: what an optimizer sees, and what its answer does to the weights."""

from __future__ import annotations

import triton
import triton.language as tl

from .emended_input import add_emended
from .language import ceil_div, element, load, store


@triton.jit
def root_product_kernel(
    rows,
    root,
    out,
    count,
    order,
    rows_each,
    stride_row,
    root_each,
    root_row,
    out_each,
    out_row,
    alpha: tl.float64,
    ADDS: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_I: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``out [batch, count, order] = alpha rows S``, plus out where it ADDS, a tile of ``[TILE_N, TILE_I]`` each."""
    SUM: tl.constexpr = root.dtype.element_ty
    batch = tl.program_id(1).to(tl.int64)
    tiles = ceil_div(order, TILE_I)
    row = (tl.program_id(0) // tiles) * TILE_N + tl.arange(0, TILE_N)
    column = (tl.program_id(0) % tiles) * TILE_I + tl.arange(0, TILE_I)
    step = tl.arange(0, DEPTH)
    rows += batch * rows_each
    root += batch * root_each
    out += batch * out_each
    sums = tl.full([TILE_N, TILE_I], 0, SUM)
    for begin in range(0, order, DEPTH):
        k = begin + step
        a = load(element(rows, row[:, None], k[None, :], stride_row, 1), (row < count)[:, None] & (k < order)[None, :])
        kept = (k < order)[:, None] & (column < order)[None, :]
        b = load(element(root, k[:, None], column[None, :], root_row, 1), kept)
        sums = add_emended(sums, b, a, rows.dtype.element_ty, False, PRECISION)
    inside = (row < count)[:, None] & (column < order)[None, :]
    to = element(out, row[:, None], column[None, :], out_row, 1)
    sums = tl.full([], alpha, tl.float64).to(SUM) * sums
    if ADDS:
        sums += load(to, inside).to(SUM)
    store(to, sums, inside)
