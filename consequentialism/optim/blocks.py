"""`Blocks`: how the inputs of a second moment are cut, and products with the root that is made of it.

``A [groups, n, b, b]`` holds the diagonal blocks of each group's second moment; the trace and the ridge are those of
the whole group. Blocks of unequal size are padded with zeros, which nothing reads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..backend.reference.coordinates import block_order, block_spans


class Blocks:
    """How ``I`` inputs are cut into blocks of nearly equal size; a bias's column of ones stands in the last.

    Args:
        inputs: ``I`` without the bias's.
        bias: Whether there is a column for it.
        block: The most inputs of a block.
        step: Inputs that belong together, as a channel's entries of a convolution's kernel. Where ``I / step`` has a
            divisor that allows it, blocks are of whole ones and of equal size.
    """

    def __init__(self, inputs: int, bias: bool, block: int, step: int = 1) -> None:
        least = max(math.ceil(inputs / block), 1)
        even = (n for n in range(least, 2 * least + 1) if step > 1 and inputs % (step * n) == 0)
        aligned = next(even, None)
        self.count = least if aligned is None else aligned
        self.aligned = aligned is not None
        self.bias = bias
        self.inputs = inputs
        self.columns = inputs + bias
        self.spans = block_spans(inputs, self.count)
        self.order = block_order(inputs, self.count, bias)

    def of(self, gram: Tensor) -> Tensor:
        """The blocks ``[groups, n, b, b]`` of a whole Gram ``[groups, I, I]``, the bias's column counted."""
        if self.count == 1:
            return gram[:, None]
        cut = gram.new_zeros(gram.shape[0], self.count, self.order, self.order)
        for i, (begin, end) in enumerate(self.with_bias()):
            cut[:, i, : end - begin, : end - begin] = gram[:, begin:end, begin:end]
        return cut

    def with_bias(self) -> list[tuple[int, int]]:
        """The spans, the last one with the bias's column."""
        (begin, end), *before = reversed(self.spans)
        return [*reversed(before), (begin, end + self.bias)]


def right_multiply(
    rows: Tensor, column: Tensor | None, root: Tensor, spans: Sequence[tuple[int, int]]
) -> tuple[Tensor, Tensor | None]:
    """``[rows | column] S``, cut again into rows and the bias's column, both fresh.

    Args:
        rows: ``[groups, O, I]``.
        column: ``[groups, O]``, the bias's; None: zeros, of which nothing is wanted.
        root: ``S [groups, n, b, b]`` or a diagonal ``[I]``.
        spans: Where each block's inputs begin and end, the bias's column not counted.
    """
    if root.ndim == 1:
        return rows * root, None
    if len(spans) == 1:
        size = rows.shape[2]
        product = torch.bmm(rows, root[:, 0, :size, :size])
    else:
        product = rows.new_empty(rows.shape)
        for i, (begin, end) in enumerate(spans):
            product[..., begin:end] = torch.bmm(rows[..., begin:end], root[:, i, : end - begin, : end - begin])
    if column is None:
        return product, None
    begin, end = spans[-1]
    above, beside, corner = _edge(root, end - begin)
    product[..., begin:].addcmul_(column[..., None], beside[:, None])
    return product, (column * corner).add_(torch.bmm(rows[..., begin:], above[..., None])[..., 0])


def add_right_multiplied_(
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    column: Tensor | None,
    root: Tensor,
    spans: Sequence[tuple[int, int]],
    share: float,
) -> None:
    """``[weight | bias] <- [share * weight | bias] + [rows | column] S`` in place, all of one type.

    Args:
        weight: ``[groups, O, I]``, a view.
        bias: ``[groups, O]``, a view, where there is a column.
        rows, column, root, spans: As `right_multiply`.
        share: What decay leaves.
    """
    if root.ndim == 1:
        weight.mul_(share).addcmul_(rows, root)
        return
    if rows.shape[1] == 1:  # a matrix-vector product would round the weight once for each input
        change, edge = right_multiply(rows, column, root, spans)
        weight.mul_(share).add_(change)
        if bias is not None and edge is not None:
            bias.add_(edge)
        return
    for i, (begin, end) in enumerate(spans):
        square = root[:, i, : end - begin, : end - begin]
        weight[..., begin:end].baddbmm_(rows[..., begin:end], square, beta=share)
    if column is None or bias is None:
        return
    begin, end = spans[-1]
    above, beside, corner = _edge(root, end - begin)
    weight[..., begin:].addcmul_(column[..., None], beside[:, None])
    bias.addcmul_(column, corner).add_(torch.bmm(rows[..., begin:], above[..., None])[..., 0])


def _edge(root: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The bias's column and row in the last block, ``[groups, size]`` each, and where they meet, ``[groups, 1]``."""
    return root[:, -1, :size, size], root[:, -1, size, :size], root[:, -1, size, size:]
