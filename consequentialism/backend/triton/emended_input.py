"""The emended input: the symmetric inverse P times x (dual) or x times P (primal), with the bias's column."""

from __future__ import annotations

import triton
import triton.language as tl

from .language import add_product, ceil_div, element, helper, load, round_to, store, sum_over


@helper
def add_emended(
    sums,
    inverse,
    x,
    stored: tl.constexpr,
    INVERSE_FIRST: tl.constexpr,
    PRECISION: tl.constexpr,
    TERMS: tl.constexpr = 3,
):
    """``sums + P x`` or ``sums + x P``, of tiles of P in float32 or float64 and of x, which is float64 where P is.

    ``stored`` is x's type in memory.

    bfloat16 meets P in TERMS terms of bfloat16, two or three, which keep 16 or 24 bits, the smallest first. float16,
    whose range is too small for P, is multiplied as float32.
    """
    if stored == tl.bfloat16:
        high = round_to(inverse, tl.bfloat16)
        rest = inverse - high.to(tl.float32)
        middle = round_to(rest, tl.bfloat16)
        if TERMS == 3:
            low = round_to(rest - middle.to(tl.float32), tl.bfloat16)
            if INVERSE_FIRST:
                sums += tl.dot(high, x, tl.dot(middle, x, tl.dot(low, x)))
            else:
                sums += tl.dot(x, high, tl.dot(x, middle, tl.dot(x, low)))
        elif INVERSE_FIRST:
            sums += tl.dot(high, x, tl.dot(middle, x))
        else:
            sums += tl.dot(x, high, tl.dot(x, middle))
    elif INVERSE_FIRST:
        sums = add_product(sums, inverse, x.to(inverse.dtype), PRECISION)
    else:
        sums = add_product(sums, x.to(inverse.dtype), inverse, PRECISION)
    return sums


@triton.jit
def emended_input_kernel(
    inverse,
    x,
    emended,
    column,
    rows,
    inputs,
    stride_row,
    stride_column,
    BIAS: tl.constexpr,
    PRIMAL: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_I: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
    TERMS: tl.constexpr,
):
    """``emended [N, I]`` and ``column [N]``, a tile of ``[TILE_N, TILE_I]`` each; P is ``[n, n]``, contiguous."""
    SUM: tl.constexpr = inverse.dtype.element_ty
    tiles = tl.maximum(ceil_div(inputs, TILE_I), 1)
    row = (tl.program_id(0) // tiles) * TILE_N + tl.arange(0, TILE_N)
    first = tl.program_id(0) % tiles
    input_ = first * TILE_I + tl.arange(0, TILE_I)
    step = tl.arange(0, DEPTH)
    order = inputs + BIAS if PRIMAL else rows
    inner = inputs if PRIMAL else rows
    sums = tl.full([TILE_N, TILE_I], 0, SUM)
    ones = tl.full([TILE_N], 0, SUM)
    for begin in range(0, inner, DEPTH):
        k = begin + step
        if PRIMAL:
            a = load(
                element(x, row[:, None], k[None, :], stride_row, stride_column),
                (row < rows)[:, None] & (k < inputs)[None, :],
            )
            b = load(
                element(inverse, k[:, None], input_[None, :], order, 1),
                (k < inputs)[:, None] & (input_ < inputs)[None, :],
            )
            sums = add_emended(sums, b, a, x.dtype.element_ty, False, PRECISION, TERMS)
            if BIAS:
                border = tl.load(element(inverse, inputs + 0 * k, k, order, 1), mask=k < inputs, other=0)
                ones += sum_over(a.to(SUM) * border[None, :], axis=1)
        else:
            a = load(element(inverse, row[:, None], k[None, :], order, 1), (row < rows)[:, None] & (k < rows)[None, :])
            b = load(
                element(x, k[:, None], input_[None, :], stride_row, stride_column),
                (k < rows)[:, None] & (input_ < inputs)[None, :],
            )
            sums = add_emended(sums, a, b, x.dtype.element_ty, True, PRECISION, TERMS)
            if BIAS:
                ones += sum_over(a, axis=1)
    if BIAS and PRIMAL:  # the column of ones meets P's last row
        last = inverse + inputs.to(tl.int64) * order
        sums += tl.load(last + input_, mask=input_ < inputs, other=0)[None, :]
        ones += tl.load(last + inputs)
    inside = (row < rows)[:, None] & (input_ < inputs)[None, :]
    store(element(emended, row[:, None], input_[None, :], inputs, 1), sums, inside)
    if BIAS and first == 0:
        store(column + row, ones, row < rows)
