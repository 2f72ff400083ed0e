"""The primal Gram of a convolution's patches, gathered by index: they are written nowhere.

A patch's entry ``i`` is ``(channel, k0, k1, k2)``, the last the fastest, and row ``n`` is ``(sample, p0, p1, p2)``;
fewer spatial dimensions are led by ones.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .language import add_product, element, helper, load, store, sum_over


@helper
def place_of_entry(entry, K0: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr):
    """``channel, k0, k1, k2`` of entries of a patch."""
    return entry // (K0 * K1 * K2), entry // (K1 * K2) % K0, entry // K2 % K1, entry % K2


@helper
def load_patches(
    x, entry, entries, row, end, p0, p1, p2, dilation, stride, padding, size, strides,
    K0: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr,
):  # fmt: skip
    """``[entries, rows]`` of the patches, 0 in the padding."""
    channel, k0, k1, k2 = place_of_entry(entry, K0, K1, K2)
    s0 = (k0 * dilation[0])[:, None] + (row // (p1 * p2) % p0 * stride[0] - padding[0])[None, :]
    s1 = (k1 * dilation[1])[:, None] + (row // p2 % p1 * stride[1] - padding[1])[None, :]
    s2 = (k2 * dilation[2])[:, None] + (row % p2 * stride[2] - padding[2])[None, :]
    inside = (entry < entries)[:, None] & (row < end)[None, :]
    inside = inside & (s0 >= 0) & (s0 < size[0]) & (s1 >= 0) & (s1 < size[1]) & (s2 >= 0) & (s2 < size[2])
    pointers = element(x, (row // (p0 * p1 * p2))[None, :], channel[:, None], strides[0], strides[1])
    pointers = element(pointers, s0, s1, strides[2], strides[3]) + s2.to(tl.int64) * strides[4]
    return load(pointers, inside)


@triton.jit
def conv_gram_kernel(
    x, gram, entries, rows, order, length, splits, channels, p0, p1, p2,
    dilation0, dilation1, dilation2, stride0, stride1, stride2, padding0, padding1, padding2,
    size0, size1, size2, x0, x1, x2, x3, x4,
    BIAS: tl.constexpr, MIRRORED: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr,
    TILE: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of one split of a group: ``gram [splits, groups, order, order]``, as `input_gram_kernel` writes it."""
    first_row = tl.program_id(0) * TILE
    first_column = tl.program_id(1) * TILE
    split = tl.program_id(2) % splits
    group = tl.program_id(2) // splits
    groups = tl.num_programs(2) // splits
    if first_row <= first_column:
        SUM: tl.constexpr = gram.dtype.element_ty
        line = first_row + tl.arange(0, TILE)
        column = first_column + tl.arange(0, TILE)
        x += group.to(tl.int64) * channels * x1
        begin = split * length
        end = tl.minimum(begin + length, rows)
        sums = tl.full([TILE, TILE], 0, SUM)
        line_sums = tl.full([TILE], 0, SUM)
        dilation = (dilation0, dilation1, dilation2)
        stride = (stride0, stride1, stride2)
        padding = (padding0, padding1, padding2)
        size = (size0, size1, size2)
        strides = (x0, x1, x2, x3, x4)
        for first in range(begin, end, DEPTH):
            row = first + tl.arange(0, DEPTH)
            a = load_patches(
                x, line, entries, row, end, p0, p1, p2, dilation, stride, padding, size, strides, K0, K1, K2
            )
            b = load_patches(
                x, column, entries, row, end, p0, p1, p2, dilation, stride, padding, size, strides, K0, K1, K2
            )
            sums = add_product(sums, a, tl.trans(b), PRECISION)
            if BIAS:
                line_sums += sum_over(a.to(SUM), axis=1)
        gram += (split.to(tl.int64) * groups + group) * order * order
        upper = (line[:, None] <= column[None, :]) & (column < entries)[None, :]
        store(element(gram, line[:, None], column[None, :], order, 1), sums, upper)
        if MIRRORED:
            store(element(gram, line[:, None], column[None, :], 1, order), sums, upper)
        if BIAS and first_row == first_column:
            store(element(gram, line, entries + 0 * line, order, 1), line_sums, line < entries)
            if MIRRORED:
                store(element(gram, line, entries + 0 * line, 1, order), line_sums, line < entries)
            if first_row == 0:
                tl.store(gram + order.to(tl.int64) * order - 1, (end - begin).to(SUM))
