"""Conjugate gradients on the primal ridge system: an emended gradient from matrix products alone, without a factor.

``Z (G + c I) = B`` with ``G = x^T x [I, I]`` and ``B = dy^T x [O, I]``, the plain gradient, is solved for all rows of
``B`` at once, each with its own step lengths: a fixed number of iterations, a product of ``B``'s shape with ``G`` each,
and nothing that the host waits for. An iteration predicts what the steps so far change, ``Z G``, and emends what is
left; the first gives the plain gradient times the best step length, row by row.

After ``k`` iterations, with ``kappa`` the condition number of ``G + c I`` and ``|E|^2 = trace(E (G + c I) E^T)``,

    |Z_k - Z| <= 2 ((sqrt(kappa) - 1) / (sqrt(kappa) + 1))^k |Z|,    kappa <= 1 + min(N, I) / damping

and `error_bound` sharpens it by what the trace says of the largest eigenvalues. In the norm of `torch.linalg.norm` the
error falls with every iteration, and ``Z_k`` grows, to ``Z`` from below: stopping early is a smaller step, never one
that overshoots. The dual system has no such bound (stopped early, ``dw`` was off by up to 80 times its length), so it
is not used. Nor are: a start other than zero (it costs the product of one iteration and gains no more than that),
preconditioning by the diagonal (it helps badly scaled inputs and harms correlated ones), a coupling of the rows
of ``B`` (fewer iterations, each with a QR factorisation). Measured: ``docs/solvers.md``.

Source: Hestenes and Stiefel, J. Res. Natl. Bur. Stand. 49 (1952); Steihaug, SIAM J. Numer. Anal. 20 (1983), for the
growth of ``Z_k``; Axelsson, Iterative Solution Methods (1994), chapter 13, for the bounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..backend.protocol import Ops
from ..backend.reference import limited_damping, out_of_unit, separate, unit_of
from ..options import Ridge, Scale


def error_bound(ratio: float, iterations: int) -> float:
    """The largest ``|Z_k - Z| / |Z|`` at ``ratio = min(N, I) / damping``, in the norm of the module's docstring.

    The ``j + 1``-th eigenvalue of ``G / c`` is at most ``trace(G) / c / (j + 1) = ratio / (j + 1)``. The residual's
    polynomial may spend ``j`` of its ``k`` roots on the ``j`` largest; Chebyshev's with the others sees the rest. The
    bound is the least over ``j``.
    """
    least = 1.0
    for removed in range(iterations):
        root = math.sqrt(1 + ratio / (removed + 1))
        least = min(least, 2 * ((root - 1) / (root + 1)) ** (iterations - removed))
    return least


def solve(times: Callable[[Tensor], Tensor], right: Tensor, iterations: int) -> Tensor:
    """``right A^-1`` by conjugate gradients, for a symmetric positive definite ``A``.

    Args:
        times: ``v -> v A`` for ``v [..., R, n]``.
        right: ``[..., R, n]``, of a size that its square has no overflow.
        iterations: How many; what has converged before stays as it is.
    """
    solution = direction = torch.zeros_like(right)
    residual = right
    size = _dot(residual, residual)  # [..., R, 1]
    previous = torch.ones_like(size)
    for _ in range(iterations):
        direction = torch.addcmul(residual, _ratio(size, previous), direction)
        image = times(direction)
        step = _ratio(size, _dot(direction, image))
        solution = torch.addcmul(solution, step, direction)
        residual = torch.addcmul(residual, step, image, value=-1)
        size, previous = _dot(residual, residual), size
    return solution


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1, keepdim=True)


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """``a / b``, and 0 where ``b`` is 0 or has four bits left or fewer: nothing is left to do there. NaN stays NaN."""
    few_bits = torch.finfo(b.dtype).tiny * torch.finfo(b.dtype).eps * 2**4
    return torch.where(b.abs() < few_bits, torch.zeros_like(a), a / b)


def solve_gram(
    gram: Tensor,
    right: Tensor,
    ridge: Ridge,
    rank: int,
    rows: int,
    iterations: int,
    unit: Tensor | None = None,
) -> Tensor:
    """``right * scale * (G + c I)^-1 [..., R, n]``: `damped_inverse` applied to ``right``, without the factor.

    Any leading dimensions are a batch, such as the groups of a convolution.

    Args:
        gram: Symmetric ``[..., n, n]``, of which every entry is read.
        right: ``[..., R, n]``, of the Gram's type.
        rank: ``min(N, I)``, what a relative damping is relative to.
        rows: The multiplier of ``scale="nlms"``.
        unit: Where the Gram is that of ``x / unit``: an absolute damping is meant for that of ``x``.

    Zero where the trace is zero and NaN where it is not finite.
    """
    diagonal = gram.diagonal(dim1=-2, dim2=-1)  # [..., n]
    shift = _shift(diagonal, ridge, rank, unit)
    matrix = gram / shift.unit
    matrix.diagonal(dim1=-2, dim2=-1).add_((shift.c / shift.unit).squeeze(-1))
    return _scaled_solve(lambda v: v @ matrix, right, shift, ridge.scale, rows, iterations)


def solve_rows(
    x: Tensor,
    right: Tensor,
    ridge: Ridge,
    iterations: int,
    unit: Tensor | None = None,
) -> Tensor:
    """`solve_gram` with ``G = x^T x``, which is never there: two products with ``x`` an iteration.

    Args:
        x: ``[N, I]``, with the bias's column of ones, if there is a bias.
        right: ``[R, I]``, of x's type.
    """
    shift = _shift(x.square().sum(0), ridge, max(min(x.shape), 1), unit)

    def times(v: Tensor) -> Tensor:
        return torch.addcmul((v @ x.T / shift.unit) @ x, v, shift.c / shift.unit)

    return _scaled_solve(times, right, shift, ridge.scale, x.shape[0], iterations)


class _Shift(NamedTuple):
    """``[..., 1, 1]`` each: the ridge, the Gram's mean eigenvalue, and their sum, the system's unit."""

    c: Tensor
    mean: Tensor
    unit: Tensor
    excess: float  # of the inverse, whose ridge was limited


def _shift(diagonal: Tensor, ridge: Ridge, rank: int, unit: Tensor | None) -> _Shift:
    """The ridge, from the Gram's diagonal ``[..., n]``; 1 where the trace is zero."""
    damping, excess = limited_damping(ridge.damping, ridge.damping_mode, diagonal.dtype)
    order = max(diagonal.shape[-1], 1)
    mean = (diagonal / order).sum(-1)[..., None, None]  # divided first: the trace itself may overflow
    c = mean * (damping * order / rank) if ridge.damping_mode == "relative" else torch.full_like(mean, damping)
    if ridge.damping_mode == "absolute" and unit is not None:
        c = c / unit / unit
    c = torch.where(mean == 0, torch.ones_like(c), c)
    return _Shift(c, mean, mean + c, excess)


def _scaled_solve(
    times: Callable[[Tensor], Tensor], right: Tensor, shift: _Shift, scale: Scale, rows: int, iterations: int
) -> Tensor:
    """``right * scale * (G + c I)^-1`` from ``times``, ``v -> v (G + c I) / unit``, whatever the units of ``right``."""
    size = right.abs().sum(-1, keepdim=True)  # [..., R, 1]
    solution = solve(times, right / torch.where(size == 0, torch.ones_like(size), size), iterations)
    solution = solution * (size / shift.unit)
    if scale == "nlms":
        solution = solution * rows
    if scale == "gradient":
        solution = solution * shift.c
    elif shift.excess != 1:
        solution = solution * shift.excess
    solution = torch.where(shift.mean == 0, torch.zeros_like(solution), solution)
    return torch.where(shift.mean.isfinite(), solution, torch.full_like(solution, torch.nan))


class System(NamedTuple):
    """A layer's primal system, which backward solves."""

    bias: bool  # whether the Gram has one; its gradient may still not be wanted
    ridge: Ridge
    iterations: int
    dtype: torch.dtype  # of the Gram and the iterates, as the plan says

    def scaled(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``x / unit [N, I]`` in the Gram's type, and the unit, as `reference.unit_of`."""
        x = x.to(self.dtype)
        unit = unit_of(x, self.bias, self.ridge.damping_mode)
        return x / unit, unit

    def gram(self, x: Tensor, backend: Ops) -> Tensor:
        """``x^T x / unit^2 [I, I]``, with the bias's column."""
        x, unit = self.scaled(x)
        gram = backend.input_gram(x, self.bias, "primal")
        if self.bias:
            gram[-1] /= unit
            gram[:, -1] /= unit
        return gram


def weight_grad(
    system: System, gram: Tensor | None, x: Tensor, dy: Tensor, backend: Ops
) -> tuple[Tensor, Tensor | None]:
    """``dw [O, I] = (dy^T x) (x^T x + c I)^-1`` by conjugate gradients, and ``db [O]`` where there is a bias.

    Args:
        gram: `System.gram` of ``x``; None for products with ``x`` in its place.
        x: ``[N, I]``.
        dy: ``[N, O]``. One infinity or NaN makes every entry NaN.
    """
    bias, ridge, iterations, _ = system
    dtype = dy.dtype
    x, unit = system.scaled(x)
    plain, plain_bias = backend.weight_grad(dy.to(x.dtype), x, x.new_ones(x.shape[0] if bias else 0))
    right = torch.cat([plain, plain_bias[:, None] / unit], dim=1) if bias else plain  # [O, I]
    if gram is None:
        rows = torch.cat([x, x.new_ones(x.shape[0], 1) / unit], dim=1) if bias else x
        solution = solve_rows(rows, right, ridge, iterations, unit)
    else:
        rank = max(min(x.shape[0], right.shape[1]), 1)
        solution = solve_gram(gram, right, ridge, rank, x.shape[0], iterations, unit)
    solution = out_of_unit(solution, unit, ridge.scale).to(dtype)
    return separate(solution) if bias else (solution, None)
