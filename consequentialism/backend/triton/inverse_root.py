"""A step's product of symmetric matrices that commute: the upper triangle in tiles, mirrored."""

from __future__ import annotations

import triton
import triton.language as tl

from .language import add_product, element, load, store


@triton.jit
def symmetric_product_kernel(
    a,
    b,
    c,
    out,
    order,
    alpha: tl.float64,
    beta: tl.float64,
    gamma: tl.float64,
    ADDS: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``out = alpha a b + beta c + gamma I`` of matrices ``[batch, order, order]``; without ADDS ``a b``."""
    row = tl.program_id(0)
    column = tl.program_id(1)
    if row <= column:
        SUM: tl.constexpr = out.dtype.element_ty
        offset = tl.program_id(2).to(tl.int64) * order * order
        rows = row * TILE + tl.arange(0, TILE)
        columns = column * TILE + tl.arange(0, TILE)
        steps = tl.arange(0, DEPTH)
        sums = tl.full([TILE, TILE], 0, SUM)
        for inner in range(0, order, DEPTH):
            valid = (inner + steps < order)[None, :]
            left = load(
                element(a + offset, rows[:, None], (inner + steps)[None, :], order, 1), (rows < order)[:, None] & valid
            )
            right = load(
                element(b + offset, columns[:, None], (inner + steps)[None, :], order, 1),
                (columns < order)[:, None] & valid,
            )
            sums = add_product(sums, left, tl.trans(right), PRECISION)
        upper = (rows[:, None] <= columns[None, :]) & (columns < order)[None, :]
        if ADDS:
            before = load(element(c + offset, rows[:, None], columns[None, :], order, 1), upper)
            sums = tl.full([], alpha, tl.float64).to(SUM) * sums + tl.full([], beta, tl.float64).to(SUM) * before
            sums += tl.where(rows[:, None] == columns[None, :], tl.full([], gamma, tl.float64).to(SUM), 0)
        store(element(out + offset, rows[:, None], columns[None, :], order, 1), sums, upper)
        store(element(out + offset, rows[:, None], columns[None, :], 1, order), sums, upper)
