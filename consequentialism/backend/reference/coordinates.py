"""The ops of steps in emended coordinates, in plain PyTorch: the decayed Gram, the inverse root, products with it.

Every other backend is tested against these functions, which `reference` has too. ``N`` rows, ``I`` inputs, with a
bias's; ``n`` diagonal blocks of order ``b``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def block_spans(inputs: int, blocks: int) -> list[tuple[int, int]]:
    """The begin and end of each block, where inputs are cut into blocks of nearly equal size, the larger ones first."""
    each, more = divmod(inputs, blocks)
    ends = [(i + 1) * each + min(i + 1, more) for i in range(blocks)]
    return list(zip([0, *ends], ends, strict=False))


def block_order(inputs: int, blocks: int, bias: bool) -> int:
    """``b``: the largest block's inputs, the last one's with the bias's one."""
    each, more = divmod(inputs, blocks)
    return max(each + (more > 0), each + bias)


def decayed_gram(gram: Tensor, x: Tensor, bias: bool, memory: float, beta: float) -> Tensor:
    """``memory * A + beta * x^T x [n, b, b]``, of the diagonal blocks of ``x^T x`` alone.

    Args:
        gram: ``A [n, b, b]``, symmetric, in float64 for a float64 ``x``, else float32; not read with ``memory=0``.
        x: ``[N, I]`` without the bias's column of ones, which stands in the last block.
        memory: The forgetting factor of recursive least squares.
        beta: What the new rows count.

    Returns:
        Fresh; zero where a block is smaller than ``b``.
    """
    blocks, order = gram.shape[0], gram.shape[-1]
    rows = x.to(gram.dtype)
    fresh = gram.new_zeros(gram.shape) if memory == 0 else gram * memory
    spans = block_spans(x.shape[1], blocks)
    for i, (begin, end) in enumerate(spans):
        part = rows[:, begin:end]
        if bias and i == blocks - 1:
            part = torch.cat([part, part.new_ones(part.shape[0], 1)], 1)
        size = part.shape[1]
        assert size <= order
        fresh[i, :size, :size] += beta * (part.T @ part)
    return fresh


def steps_of(coefficients: Sequence[float]) -> Iterator[tuple[bool, float, float, float]]:
    """Whether a step is the last, and its ``a, b, c``."""
    for k in range(0, len(coefficients), 3):
        a, b, c = coefficients[k : k + 3]
        yield k + 3 == len(coefficients), a, b, c


def inverse_root(matrix: Tensor, root: int, coefficients: Sequence[float]) -> Tensor:
    """``M^(-1/root) [..., n, n]`` of symmetric M with eigenvalues above 0, at most 1, by `solve.root`'s iteration.

    ``X <- X T`` and ``M <- T^root M`` with ``T = a I + b M + c M^2``, from ``X = I``. All are polynomials in M, so
    products of them are symmetric, and are made so.

    Args:
        root: A power of 2.
        coefficients: ``a, b, c`` of one step after the other.
    """
    result = None
    for last, a, b, c in steps_of(coefficients):
        turn = c * _product(matrix, matrix) + b * matrix
        turn.diagonal(dim1=-2, dim2=-1).add_(a)
        result = turn if result is None else _product(result, turn)
        if not last:
            power = turn
            for _ in range(root.bit_length() - 1):
                power = _product(power, power)
            matrix = _product(power, matrix)
    return torch.eye(matrix.shape[-1]).to(matrix).expand_as(matrix).clone() if result is None else result


def _product(a: Tensor, b: Tensor) -> Tensor:
    product = a @ b
    return (product + product.mT) / 2


def root_product(rows: Tensor, root: Tensor) -> Tensor:
    """``rows S [B, O, n]`` in S's type.

    Args:
        rows: ``[B, O, n]``, of any floating-point type.
        root: ``S [B, n, n]``, symmetric, float32 or float64.
    """
    return rows.to(root.dtype) @ root


def add_root_product_(weight: Tensor, rows: Tensor, root: Tensor, alpha: float) -> None:
    """``W <- W + alpha * rows S``, rounded once to W's type; `root_product` says the shapes.

    Args:
        weight: ``W [B, O, n]``, changed.
    """
    weight.copy_(weight.to(root.dtype) + alpha * root_product(rows, root))
