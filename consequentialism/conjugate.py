"""Conjugate gradients on the ridge system: emended gradients from matrix products alone, without a factor.

``Z (G + c I) = B`` is solved for all rows of ``B`` at once, each with its own step lengths: one product of ``B``'s
shape with ``G`` an iteration, a fixed number of them, nothing that the host waits for. An iteration predicts what the
steps so far change, ``Z G``, and emends what is left of ``B``; the first gives the plain gradient times the best step.

After ``k`` iterations, with ``kappa`` the condition number of ``G + c I`` and ``|E|^2 = trace(E (G + c I) E^T)``,

    |Z_k - Z| <= 2 ((sqrt(kappa) - 1) / (sqrt(kappa) + 1))^k |Z|,    kappa <= 1 + min(N, I) / damping

and `error_bound` sharpens it by what the trace says of the largest eigenvalues. What it leaves out on purpose: a start
other than zero (it costs the product of one iteration and gains less), preconditioning by the diagonal (it helps
badly scaled inputs and harms correlated ones), and coupling the rows of ``B`` (fewer iterations, but each then has
a QR of its own). Measured: ``docs/solvers.md``.

Source: Hestenes and Stiefel, J. Res. Natl. Bur. Stand. 49 (1952); the bounds are in Axelsson, Iterative Solution
Methods (1994), chapter 13.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .options import DampingMode, Form, Options, Scale
from .reference import compute_dtype, emended_dtype, float32_is_enough


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
    """``a / b``, and 0 where ``b`` is: nothing is left to do there. NaN stays NaN."""
    return torch.where(b == 0, torch.zeros_like(a), a / b)


def solve_gram(
    gram: Tensor,
    right: Tensor,
    damping: float,
    damping_mode: DampingMode,
    scale: Scale,
    rank: int,
    rows: int,
    iterations: int,
) -> Tensor:
    """``right * scale * (G + c I)^-1 [..., R, n]``: `reference.factor` applied to ``right``, without the factor.

    Any leading dimensions are a batch, such as the groups of a convolution.

    Args:
        gram: Symmetric ``[..., n, n]``, of which every entry is read.
        right: ``[..., R, n]``, of the Gram's type.
        rank: ``min(N, I)``, what a relative damping is relative to.
        rows: The multiplier of ``scale="nlms"``.

    Zero where the trace is zero and NaN where it is not finite.
    """
    diagonal = gram.diagonal(dim1=-2, dim2=-1)  # [..., n]
    ridge = _ridge(diagonal, damping, damping_mode, rank)
    matrix = gram / ridge.unit
    matrix.diagonal(dim1=-2, dim2=-1).add_((ridge.c / ridge.unit).squeeze(-1))
    return _scaled_solve(lambda v: v @ matrix, right, ridge, scale, rows, iterations)


def solve_rows(
    x: Tensor,
    form: Form,
    right: Tensor,
    damping: float,
    damping_mode: DampingMode,
    scale: Scale,
    iterations: int,
) -> Tensor:
    """`solve_gram` with the Gram of ``x [N, I]``, which is never there: two products with ``x`` an iteration.

    Args:
        x: With the bias's column of ones, if there is a bias.
        right: ``[R, N]`` (dual) or ``[R, I]`` (primal), of x's type.
    """
    inner = x.T if form == "dual" else x  # the Gram is inner^T inner
    ridge = _ridge(inner.square().sum(0), damping, damping_mode, max(min(x.shape), 1))

    def times(v: Tensor) -> Tensor:
        return torch.addcmul((v @ inner.T / ridge.unit) @ inner, v, ridge.c / ridge.unit)

    return _scaled_solve(times, right, ridge, scale, x.shape[0], iterations)


class _Ridge(NamedTuple):
    """``[..., 1, 1]`` each: the ridge, the Gram's mean eigenvalue, and their sum, the system's unit."""

    c: Tensor
    mean: Tensor
    unit: Tensor


def _ridge(diagonal: Tensor, damping: float, damping_mode: DampingMode, rank: int) -> _Ridge:
    """From the Gram's diagonal ``[..., n]``; a trace of zero gets a ridge of 1."""
    order = max(diagonal.shape[-1], 1)
    mean = (diagonal / order).sum(-1)[..., None, None]  # divided first: the trace itself may overflow
    c = mean * (damping * order / rank) if damping_mode == "relative" else torch.full_like(mean, damping)
    c = torch.where(mean == 0, torch.ones_like(c), c)
    return _Ridge(c, mean, mean + c)


def _scaled_solve(
    times: Callable[[Tensor], Tensor], right: Tensor, ridge: _Ridge, scale: Scale, rows: int, iterations: int
) -> Tensor:
    """``right * scale * (G + c I)^-1`` from ``times``, ``v -> v (G + c I) / unit``, whatever the units of ``right``."""
    size = right.abs().sum(-1, keepdim=True)  # [..., R, 1]
    solution = solve(times, right / torch.where(size == 0, torch.ones_like(size), size), iterations)
    solution = solution * (size / ridge.unit)
    if scale == "nlms":
        solution = solution * rows
    elif scale == "gradient":
        solution = solution * ridge.c
    solution = torch.where(ridge.mean == 0, torch.zeros_like(solution), solution)
    return torch.where(ridge.mean.isfinite(), solution, torch.full_like(solution, torch.nan))


class System(NamedTuple):
    """A linear layer's system, as backward needs it to solve on the gradient's side."""

    form: Form
    bias: bool  # whether the Gram has one; its gradient may still not be wanted
    options: Options

    def gram(self, x: Tensor, backend: Any) -> Tensor:
        """``x x^T [N, N]`` (dual) or ``x^T x [I, I]`` (primal), with the bias's column, in the type that it needs."""
        return backend.input_gram(x.to(wide_dtype(x, self.bias, self.options)), self.bias, self.form)


def wide_dtype(x: Tensor, bias: bool, options: Options) -> torch.dtype:
    """The type that Gram and iterates need: float64 where the direct solution would take it too."""
    rank = max(min(x.shape[0], x.shape[1] + bias), 1)
    enough = float32_is_enough(rank, options.damping, options.damping_mode)
    return compute_dtype(x.dtype) if enough or x.device.type == "mps" else torch.float64


def with_ones(x: Tensor, bias: bool) -> Tensor:
    """``x [N, I]`` with the bias's column of ones."""
    return torch.cat([x, x.new_ones(x.shape[0], 1)], dim=1) if bias else x


def emended_input(x: Tensor, bias: bool, form: Form, options: Options, backend: Any) -> tuple[Tensor, Tensor]:
    """`reference.emended_input` by conjugate gradients: ``y [N, I]`` and its column for the bias ``[N]``."""
    rows = with_ones(x.to(wide_dtype(x, bias, options)), bias)
    rank = max(min(rows.shape), 1)
    right = rows.T if form == "dual" else rows
    emended = solve_gram(
        System(form, bias, options).gram(x, backend), right, *_settings(options), rank, x.shape[0], options.iterations
    )
    if form == "dual":
        emended = emended.T
    kept, narrow = emended_dtype(x.dtype), compute_dtype(x.dtype)
    column = emended[:, -1] if bias else emended.new_zeros(0)
    return emended[:, : x.shape[1]].to(kept).contiguous(), column.to(narrow).contiguous()


def emended_ones(x: Tensor, form: Form, options: Options) -> Tensor:
    """The emended input's column for the bias alone, ``[N]``: one right-hand side."""
    rows = with_ones(x.to(wide_dtype(x, True, options)), True)
    if form == "dual":
        right = rows[:, -1:].T  # [1, N]
    else:
        right = torch.zeros_like(rows[:1])  # [1, I]
        right[:, -1] = 1
    column = solve_rows(rows, form, right, *_settings(options), options.iterations)[0]
    return (column if form == "dual" else rows @ column).to(compute_dtype(x.dtype))


def weight_grad(
    system: System, gram: Tensor | None, x: Tensor, dy: Tensor, backend: Any, need_bias: bool
) -> tuple[Tensor, Tensor | None]:
    """``dw [O, I] = dy^T (x x^T + c I)^-1 x`` (dual) ``= (dy^T x) (x^T x + c I)^-1`` (primal), and ``db [O]``.

    Args:
        gram: The system's Gram; None for products with ``x`` in its place.
        x: ``[N, I]``.
        dy: ``[N, O]``. One infinity or NaN makes every entry NaN.
    """
    form, bias, options = system
    dtype = dy.dtype
    wide = wide_dtype(x, bias, options)
    x, dy = x.to(wide), dy.to(wide)

    def solved(right: Tensor) -> Tensor:
        if gram is None:
            return solve_rows(with_ones(x, bias), form, right, *_settings(options), options.iterations)
        rank = max(min(x.shape[0], x.shape[1] + bias), 1)
        return solve_gram(gram, right, *_settings(options), rank, x.shape[0], options.iterations)

    if form == "dual":
        dw, db = backend.weight_grad(solved(dy.T).T, x, x.new_ones(x.shape[0] if bias else 0))
    else:
        plain, plain_bias = backend.weight_grad(dy, x, x.new_ones(x.shape[0] if bias else 0))
        dw = solved(torch.cat([plain, plain_bias[:, None]], dim=1) if bias else plain)
        dw, db = dw[:, : x.shape[1]], dw[:, -1]
    return dw.to(dtype).contiguous(), db.to(dtype) if need_bias else None


def _settings(options: Options) -> tuple[float, DampingMode, Scale]:
    return options.damping, options.damping_mode, options.scale
