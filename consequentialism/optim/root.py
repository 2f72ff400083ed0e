"""The root ``S = ((A + c I) / t)^-s`` of an input second moment, and products with it.

``A [groups, n, b, b]`` holds the diagonal blocks of each group's second moment; the trace and the ridge are those of
the whole group. Blocks of unequal size are padded with zeros, which nothing reads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..backend import dispatch
from ..backend.coordinates import block_order, block_spans
from ..solve import root as solve


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


def moment_root(
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
    """``(B + damping I)^-s [..., b, b]`` of symmetric ``B``, its trace at most ``columns``; `solve.root` says how."""
    how = solve.method(exponent, scaled.device.type)
    if how == "eigenvalues":
        return eigen_power(scaled, damping, exponent)
    if how == "cholesky":
        return cholesky_inverse(scaled, damping)
    return iterated_power(scaled, damping, round(1 / exponent), columns)


def eigen_power(scaled: Tensor, damping: float, exponent: float) -> Tensor:
    """The reference of `power`: eigenvalues in float64. What is not finite is taken for zero."""
    wide = scaled if scaled.device.type == "mps" else scaled.double()
    wide = torch.where(wide.isfinite(), wide, 0)
    values, vectors = torch.linalg.eigh(wide)
    powers = (values.clamp(min=0) + damping).pow(-exponent)
    return ((vectors * powers[..., None, :]) @ vectors.mT).to(scaled.dtype)


def cholesky_inverse(scaled: Tensor, damping: float) -> Tensor:
    """`power` with ``s = 1``, in float64 where the device has it; NaN where a factor breaks down."""
    wide = scaled if scaled.device.type == "mps" else scaled.double()
    eye = torch.eye(wide.shape[-1], dtype=wide.dtype, device=wide.device)
    lower, info = torch.linalg.cholesky_ex(wide + damping * eye)
    inverse = torch.cholesky_solve(eye.expand_as(lower), lower)  # waits for nothing, on a GPU either
    return torch.where((info == 0)[..., None, None], inverse, torch.nan).to(scaled.dtype)


def iterated_power(scaled: Tensor, damping: float, root: int, columns: int) -> Tensor:
    """`power` with ``s = 1/root`` by the backend's `inverse_root`: it waits for nothing.

    The ridge bounds the smallest eigenvalue, the trace the largest, and so both fix the steps beforehand.
    """
    order = scaled.shape[-1]
    work = scaled.to(solve.work_dtype(1 + columns / damping, scaled.dtype, scaled.device.type), copy=True)
    work.diagonal(dim1=-2, dim2=-1).add_(damping)
    norm = torch.linalg.matrix_norm(work, keepdim=True)  # Frobenius's, at least the largest eigenvalue
    low = damping / (columns + damping * math.sqrt(order))
    plan = solve.plan(root, low, work.dtype)
    result = dispatch.for_coordinates(work).inverse_root(work.div_(norm), plan.root, plan.coefficients)
    return result.mul_(norm.pow(-1 / root)).to(scaled.dtype)


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
