"""The root ``S = ((A + c I) / t)^-s`` of an input second moment, and products with it.

``A [groups, n, b, b]`` holds the diagonal blocks of each group's second moment; the trace and the ridge are those of
the whole group. Blocks of unequal size are padded with zeros, which nothing reads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

ITERATIONS_AFTER = 6  # of Newton and Schulz, once the smallest eigenvalue has grown to about 1


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
        each, more = divmod(inputs, self.count)
        sizes = [each + (i < more) for i in range(self.count)]
        self.bias = bias
        self.inputs = inputs
        self.columns = inputs + bias
        ends = [sum(sizes[: i + 1]) for i in range(self.count)]
        self.spans = [(end - size, end) for end, size in zip(ends, sizes, strict=True)]
        self.order = max(sizes[0], sizes[-1] + bias)

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


def inverse_root(
    moment: Tensor, columns: int, damping: float, exponent: float, divided: bool, factor: float = 1.0
) -> Tensor:
    """``S = ((A + c I) / t)^-s`` with ``c = damping * t`` and ``t = trace(A) / I``, or without the division by ``t``.

    Args:
        moment: ``A [groups, n, b, b]`` or, of an embedding, its diagonal ``[V]``.
        columns: ``I``, the bias's column counted.
        damping: Relative to ``t``.
        exponent: ``s``.
        divided: Whether ``A + c I`` is divided by ``t``.
        factor: What ``A`` is multiplied by first, for ``divided=False``.

    Returns:
        Of A's shape and type. The identity where the trace is zero, NaN where ``A`` is not finite.
    """
    if moment.ndim == 1:
        t = moment.sum() / columns
        root = (moment / t + damping).pow(-exponent)
        alive = t != 0
        eye = torch.ones_like(moment)
    else:
        t = moment.diagonal(dim1=-2, dim2=-1).sum((-2, -1)) / columns
        t = t[:, None, None, None]
        alive = t != 0
        scaled = moment / torch.where(alive & t.isfinite(), t, 1)
        root = power(scaled, damping, exponent, columns)
        eye = torch.eye(moment.shape[-1], dtype=moment.dtype, device=moment.device)
    if not divided:
        root = root * (factor * t).pow(-exponent)
    root = torch.where(alive, root, eye)
    return torch.where(t.isfinite(), root, torch.nan)


def power(scaled: Tensor, damping: float, exponent: float, columns: int) -> Tensor:
    """``(B + damping I)^-s [..., b, b]`` of symmetric ``B`` whose trace is at most ``columns``.

    By eigenvalues in float64 where the host computes them (measured: 2.4 to 7 times as fast there as Newton and
    Schulz's iterations in float32, from order 64 to 1024), else by iterations that wait for nothing.
    """
    iterated = scaled.device.type != "cpu" and float(1 / exponent).is_integer()
    if iterated:
        work = scaled.to(torch.float32 if scaled.dtype != torch.float64 else torch.float64)
        return newton_schulz(work, damping, int(1 / exponent), columns).to(scaled.dtype)
    return eigen_power(scaled, damping, exponent)


def eigen_power(scaled: Tensor, damping: float, exponent: float) -> Tensor:
    """The reference of `power`: eigenvalues in float64. What is not finite is taken for zero."""
    wide = scaled if scaled.device.type == "mps" else scaled.double()
    wide = torch.where(wide.isfinite(), wide, 0)
    values, vectors = torch.linalg.eigh(wide)
    powers = (values.clamp(min=0) + damping).pow(-exponent)
    return ((vectors * powers[..., None, :]) @ vectors.mT).to(scaled.dtype)


def newton_schulz(scaled: Tensor, damping: float, order: int, columns: int) -> Tensor:
    """``(B + damping I)^(-1/order)`` by the coupled Newton iteration: products alone, a fixed number of them.

    ``M <- T^p M`` and ``X <- X T`` with ``T = ((p + 1) I - M) / p``, from ``M = (B + damping I) / z``, ``X = z^(-1/p)``
    and ``z = |B + damping I|``. The ridge bounds the smallest eigenvalue, and so the number of steps, beforehand.
    """
    eye = torch.eye(scaled.shape[-1], dtype=scaled.dtype, device=scaled.device)
    matrix = scaled + damping * eye
    norm = torch.linalg.matrix_norm(matrix, keepdim=True)
    largest = columns + damping * math.sqrt(scaled.shape[-1])
    growth = order * math.log1p(1 / order)
    steps = math.ceil(math.log(max(largest / damping, 1.0)) / growth) + ITERATIONS_AFTER
    matrix = matrix / norm
    result = eye * norm.pow(-1 / order)
    for _ in range(steps):
        turn = ((order + 1) * eye - matrix) / order
        result = result @ turn
        matrix = torch.linalg.matrix_power(turn, order) @ matrix
        matrix = (matrix + matrix.mT) / 2
    return result


def right_multiply(
    rows: Tensor, column: Tensor | None, root: Tensor, spans: Sequence[tuple[int, int]]
) -> tuple[Tensor, Tensor | None]:
    """``[rows | column] S``, cut again into rows and the bias's column: views of one fresh tensor.

    Args:
        rows: ``[groups, O, I]``.
        column: ``[groups, O]``, the bias's, or None.
        root: ``S [groups, n, b, b]`` or a diagonal ``[I]``.
        spans: Where each block's inputs begin and end, the bias's column not counted.
    """
    if root.ndim == 1:
        return rows * root, None
    if len(spans) == 1:
        whole = rows if column is None else torch.cat([rows, column[..., None]], -1)
        product = torch.bmm(whole, root[:, 0])
    else:
        product = rows.new_empty(*rows.shape[:2], rows.shape[2] + (column is not None))
        for i, (begin, end) in enumerate(spans):
            part, size = rows[..., begin:end], end - begin
            if column is not None and i == len(spans) - 1:
                part, size = torch.cat([part, column[..., None]], -1), size + 1
            product[..., begin : begin + size] = torch.bmm(part, root[:, i, :size, :size])
    if column is None:
        return product, None
    return product[..., :-1], product[..., -1]
