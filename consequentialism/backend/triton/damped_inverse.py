"""The inverse of a symmetric positive definite matrix: A = U^T U, V = U^-1, A^-1 = V V^T.

One program factors one matrix in tiles of `TILE` x `TILE`, which lie in memory that only it writes; then all programs
multiply V V^T. Left-looking: a strip of U is finished with one pass over what stands above it, products taken away
one after the other, as where rows lean on one direction the first leaves little, which then rounds well. V solves
U V = I, not V U = I, and V V^T is summed from the last column to the first: each keeps digits on duplicate rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .language import add_product, ceil_div, element, helper, reciprocal_root, subtract_product, sum_over

# What becomes of an inverse: `state` [3] holds one of these, the multiplier, and the ridge.
INVERTED = tl.constexpr(0)
ZERO = tl.constexpr(1)
NOT_FINITE = tl.constexpr(2)
DIAGONAL = tl.constexpr(3)
KEPT = tl.constexpr(4)  # the inverse is there already


@helper
def factor_tile(tile, count, TILE: tl.constexpr):
    """``U^-1`` of ``tile [TILE, TILE] = U^T U``, upper triangular, and whether every pivot was positive.

    From row ``count`` on, the tile is an identity.
    """
    line = tl.arange(0, TILE)
    rows = line[:, None]
    columns = line[None, :]
    reciprocals = tl.full([TILE], 1, tile.dtype)
    works = 1
    for i in range(count):
        row = sum_over(tl.where(rows == i, tile, 0), axis=0)
        column = sum_over(tl.where(columns == i, tile, 0), axis=1)  # the same numbers: the tile stays symmetric
        pivot = sum_over(tl.where(line == i, row, 0), axis=0)
        works = tl.where((pivot > 0) & (pivot < float("inf")), works, 0)
        reciprocal = reciprocal_root(pivot)
        reciprocals = tl.where(line == i, reciprocal, reciprocals)
        row *= reciprocal
        column *= reciprocal
        tile -= tl.where(rows > i, column[:, None], 0) * tl.where(columns > i, row[None, :], 0)
        tile = tl.where(rows == i, row[None, :], tile)
    upper = tl.where(rows <= columns, tile, 0)
    inverse = tl.where(rows == columns, 1, 0).to(tile.dtype)
    for step in range(count):
        i = count - 1 - step
        reciprocal = sum_over(tl.where(line == i, reciprocals, 0), axis=0)
        row = sum_over(tl.where(rows == i, inverse, 0), axis=0) * reciprocal
        column = sum_over(tl.where(columns == i, upper, 0), axis=1)
        inverse -= tl.where(rows < i, column[:, None], 0) * row[None, :]
        inverse = tl.where(rows == i, row[None, :], inverse)
    return inverse, works


@helper
def factor_matrix(
    gram,
    order,
    stride,
    ridge,
    upper,
    inverse,
    size,
    TILE: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``inverse [size, size] <- U^-1`` of ``gram [order, order] + ridge I``; whether it worked.

    ``size`` is the order, rounded up to tiles; ``upper`` and ``inverse`` belong to this program. Below the tiles of the
    diagonal neither is written.
    """
    line = tl.arange(0, TILE)
    wide = tl.arange(0, WIDE)
    tiles = size // TILE
    works = 1
    for k in range(tiles):
        row = k * TILE + line
        inside = (row < order)[:, None] & (row < order)[None, :]
        tile = tl.load(element(gram, row[:, None], row[None, :], stride, 1), mask=inside, other=0)
        diagonal = line[:, None] == line[None, :]
        tile += tl.where(diagonal, tl.where((row < order)[:, None], ridge, 1), 0).to(tile.dtype)
        for m in range(k):
            above = tl.load(element(upper, (m * TILE + line)[:, None], row[None, :], size, 1))
            tile = subtract_product(tile, tl.trans(above), above, PRECISION)
        small, worked = factor_tile(tile, tl.minimum(order - k * TILE, TILE), TILE)
        works = works * worked
        tl.store(element(inverse, row[:, None], row[None, :], size, 1), small)
        for first in range((k + 1) * TILE, size, WIDE):
            column = first + wide
            mask = (row < order)[:, None] & (column < order)[None, :]
            strip = tl.load(element(gram, row[:, None], column[None, :], stride, 1), mask=mask, other=0)
            for m in range(k):
                left = tl.load(element(upper, (m * TILE + line)[:, None], row[None, :], size, 1))
                right = tl.load(
                    element(upper, (m * TILE + line)[:, None], column[None, :], size, 1),
                    mask=(column < size)[None, :],
                    other=0,
                )
                strip = subtract_product(strip, tl.trans(left), right, PRECISION)
            strip = tl.dot(tl.trans(small), strip, input_precision=PRECISION, out_dtype=strip.dtype)
            tl.store(element(upper, row[:, None], column[None, :], size, 1), strip, mask=(column < size)[None, :])
        tl.debug_barrier()
    for step in range(tiles):
        k = tiles - 1 - step
        row = k * TILE + line
        small = tl.load(element(inverse, row[:, None], row[None, :], size, 1))
        for first in range((k + 1) * TILE, size, WIDE):
            column = first + wide
            strip = tl.full([TILE, WIDE], 0, small.dtype)
            last = tl.minimum((first + WIDE) // TILE, tiles) - 1
            for back in range(last - k):
                m = (last - back) * TILE + line
                left = tl.load(element(upper, row[:, None], m[None, :], size, 1))
                right = tl.load(
                    element(inverse, m[:, None], column[None, :], size, 1),
                    mask=(m[:, None] <= column[None, :]) & (column < size)[None, :],
                    other=0,
                )
                strip = subtract_product(strip, left, right, PRECISION)
            strip = tl.dot(small, strip, input_precision=PRECISION, out_dtype=strip.dtype)
            tl.store(element(inverse, row[:, None], column[None, :], size, 1), strip, mask=(column < size)[None, :])
        tl.debug_barrier()
    return works


@helper
def inverse_tile(
    inverse,
    first_row,
    first_column,
    size,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``[TILE, TILE]`` entries of V V^T."""
    row = first_row + tl.arange(0, TILE)
    column = first_column + tl.arange(0, TILE)
    sums = tl.full([TILE, TILE], 0, inverse.dtype.element_ty)
    begin = tl.maximum(first_row, first_column) // DEPTH
    count = ceil_div(size, DEPTH)
    for step in range(count - begin):
        k = (count - 1 - step) * DEPTH + tl.arange(0, DEPTH)
        left = tl.load(
            element(inverse, row[:, None], k[None, :], size, 1),
            mask=(row[:, None] <= k[None, :]) & (k < size)[None, :],
            other=0,
        )
        right = tl.load(
            element(inverse, column[:, None], k[None, :], size, 1),
            mask=(column[:, None] <= k[None, :]) & (k < size)[None, :],
            other=0,
        )
        sums = add_product(sums, left, tl.trans(right), PRECISION)
    return sums


@helper
def trace_of(gram, order, stride, LINE: tl.constexpr):
    """The sum of the diagonal of ``gram [order, order]``."""
    line = tl.arange(0, LINE)
    sums = tl.full([LINE], 0, gram.dtype.element_ty)
    for first in range(0, order, LINE):
        k = first + line
        sums += tl.load(element(gram, k, k, stride, 1), mask=k < order, other=0)
    return sum_over(sums, axis=0)


@helper
def inverse_with_retries(
    gram,
    order,
    stride,
    upper,
    inverse,
    size,
    damping,
    rank,
    multiplier,
    broken_before,
    breakdowns,
    counted,
    RELATIVE: tl.constexpr,
    BY_RIDGE: tl.constexpr,
    RETRY: tl.constexpr,
    RETRIES: tl.constexpr,
    TILE: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``inverse <- V [size, size]`` of ``gram [order, order]``; what came of it, the multiplier and the ridge.

    A factor that breaks down is tried again with 10, 100, ... times the ridge, and counted once where ``counted``. With
    RETRY the first attempt was made elsewhere, and ``broken_before`` points to whether it broke down.
    """
    SUM: tl.constexpr = gram.dtype.element_ty
    trace = trace_of(gram, order, stride, 128)
    ridge = tl.full([], damping, tl.float64)
    if RELATIVE:
        ridge = ridge * trace.to(tl.float64) / tl.full([], rank, tl.float64)
    times = tl.full([], multiplier, tl.float64)
    if BY_RIDGE:
        times *= ridge
    outcome = tl.where(trace == 0, ZERO, tl.where(trace - trace == 0, INVERTED, NOT_FINITE))
    attempts = tl.where(outcome == INVERTED, RETRIES + 1, 0)
    attempt = 0
    grown = ridge
    if RETRY:
        if (attempts > 0) & (tl.load(broken_before) == 0):
            outcome = outcome * 0 + KEPT
            attempts = attempts * 0
        if counted & (attempts > 0):
            tl.atomic_add(breakdowns, 1)
        attempt = 1
        grown *= 10
    while attempt < attempts:
        works = factor_matrix(gram, order, stride, grown.to(SUM), upper, inverse, size, TILE, WIDE, PRECISION)
        if works == 1:
            attempts = attempts * 0
        else:
            if counted & (attempt == 0):
                tl.atomic_add(breakdowns, 1)
            if attempt == RETRIES:
                outcome = outcome * 0 + DIAGONAL
        attempt += 1
        grown *= 10
    return outcome, times.to(SUM), ridge.to(SUM)


@triton.jit(do_not_specialize=["order", "stride"])
def damped_inverse_kernel(
    gram,
    upper,
    inverse,
    state,
    broken_before,
    breakdowns,
    order,
    stride,
    size,
    damping: tl.float64,
    rank: tl.float64,
    multiplier: tl.float64,
    RELATIVE: tl.constexpr,
    BY_RIDGE: tl.constexpr,
    RETRY: tl.constexpr,
    RETRIES: tl.constexpr,
    TILE: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``inverse <- V [size, size]`` and ``state [3]``, of each ``gram [order, order]`` of a batch.

    ``upper`` is room of the same size as ``inverse``.
    """
    matrix = tl.program_id(0).to(tl.int64)
    state += matrix * 3
    outcome, times, ridge = inverse_with_retries(
        gram + matrix * order * stride, order, stride, upper + matrix * size * size, inverse + matrix * size * size,
        size, damping, rank, multiplier, broken_before + matrix, breakdowns, matrix >= 0,
        RELATIVE, BY_RIDGE, RETRY, RETRIES, TILE, WIDE, PRECISION,
    )  # fmt: skip
    tl.store(state, outcome.to(times.dtype))
    tl.store(state + 1, times)
    tl.store(state + 2, ridge)


@helper
def outcome_tile(
    gram,
    inverse,
    outcome,
    multiplier,
    ridge,
    first_row,
    first_column,
    order,
    stride,
    size,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``[TILE, TILE]`` entries of the multiplier times V V^T, or of what `outcome` says in its place."""
    row = (first_row + tl.arange(0, TILE))[:, None]
    column = (first_column + tl.arange(0, TILE))[None, :]
    sums = tl.full([TILE, TILE], 0, gram.dtype.element_ty)
    if outcome == INVERTED:
        sums = inverse_tile(inverse, first_row, first_column, size, TILE, DEPTH, PRECISION)
    elif outcome == DIAGONAL:
        on_diagonal = row == column
        entries = tl.load(element(gram, row, column, stride, 1), mask=on_diagonal & (row < order), other=1)
        sums = tl.where(on_diagonal, 1 / (entries + ridge), 0)
    elif outcome == NOT_FINITE:
        sums += float("nan")
    return tl.where(outcome == ZERO, 0, sums * multiplier)


@triton.jit(do_not_specialize=["order", "stride"])
def multiply_kernel(
    gram,
    inverse,
    state,
    result,
    order,
    stride,
    size,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``result [order, order]`` of each matrix of a batch, from what `damped_inverse_kernel` left."""
    matrix = tl.program_id(2).to(tl.int64)
    first_row = tl.program_id(0) * TILE
    first_column = tl.program_id(1) * TILE
    state += matrix * 3
    outcome = tl.load(state)
    if (first_row <= first_column) & (outcome != KEPT):
        result += matrix * order * order
        sums = outcome_tile(
            gram + matrix * order * stride, inverse + matrix * size * size, outcome, tl.load(state + 1),
            tl.load(state + 2), first_row, first_column, order, stride, size, TILE, DEPTH, PRECISION,
        )  # fmt: skip
        row = (first_row + tl.arange(0, TILE))[:, None]
        column = (first_column + tl.arange(0, TILE))[None, :]
        mask = (row <= column) & (column < order)  # of a tile on the diagonal, one triangle and its mirror
        tl.store(element(result, row, column, order, 1), sums, mask=mask)
        tl.store(element(result, column, row, order, 1), sums, mask=mask)
