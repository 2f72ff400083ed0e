"""How ``S`` with ``S S^T = (B + c I)^-2s`` is made, by which method and in which type, decided here; and its iteration.

Where it is symmetric, ``S = (B + c I)^-s``; at ``s = 1/2`` it may be triangular, a Cholesky factor's inverse.

The coupled iteration for an inverse root of order ``p``, ``s = 1/p``, is ``X <- X T`` and ``M <- T^p M`` from ``X = I``
and an ``M`` with eigenvalues in ``[low, 1]``; where all become 1, X is ``M^(-1/p)``. ``T`` is a quadratic polynomial in
M, in each step the one whose ``|1 - m^(1/p) T(m)|`` is smallest over all ``m`` that M may then have: products alone, a
number of them that the ridge fixes beforehand, and no look at the matrix.

Source: Guo and Higham, "A Schur-Newton method for the matrix pth root and its inverse" (2006), for the coupled form;
Amsel et al., "The Polar Express" (2025), for taking the minimax polynomial in each step (there for ``p = 2``).
"""

from __future__ import annotations

import functools
import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..backend.protocol import CoordinateOps
from ..precision import root_dtype, widest_dtype

Method = Literal["iteration", "eigenvalues", "cholesky", "factor"]
Kind = Literal["auto", "symmetric", "cholesky"]

KINDS: tuple[Kind, ...] = ("auto", "symmetric", "cholesky")

ROOTS = (2, 4, 8)  # orders that the iteration takes: T^p is then a few squarings
TOLERANCE = {torch.float32: 1e-7, torch.float64: 1e-15}
LEAF = 72  # the order of triangular matrices that are not cut: above 64 with a bias
NEAR_ONE = 1e-3  # where Taylor's polynomial about the middle is the minimax one but for rounding


class Plan(NamedTuple):
    """``T = a I + b M + c M^2`` of each step, ``(a, b, c)`` one after the other, for an inverse root of this order."""

    root: int
    coefficients: list[float]


def method(exponent: float, device_type: str, kind: Kind = "symmetric", turns: bool = False) -> Method:
    """The method by which ``S`` is made: "factor" makes it triangular, the others symmetric.

    Args:
        exponent: Above 0 and at most 1.
        device_type: The type of device. On the host, eigenvalues in float64 are more accurate and as fast on one thread
            (the iteration in float32 takes .59 to 1.20 of their seconds, measured at orders 64 to 1024). On a GPU they
            would make the host wait.
        kind: `Emended`'s ``root``. ``"auto"`` is triangular on the host where that changes nothing, because it takes a
            fifth of the eigenvalues' seconds (measured at orders 129 to 513).
        turns: Whether the step is the same with any ``S``.
    """
    if kind == "cholesky" or (kind == "auto" and turns and exponent == 0.5 and device_type == "cpu"):
        return "factor"
    if exponent == 1:
        return "cholesky"
    return "iteration" if device_type != "cpu" and exponent in (1 / order for order in ROOTS) else "eigenvalues"


def power(
    ops: CoordinateOps, scaled: Tensor, damping: float, exponent: float, columns: int, how: Method | None = None
) -> Tensor:
    """``S [..., b, b]`` with ``S S^T = (B + damping I)^-2s`` of symmetric ``B``, its trace at most ``columns``.

    Args:
        how: As `method` says; None: for a symmetric one.
    """
    how = how or method(exponent, scaled.device.type)
    if how == "factor":
        return inverse_factor(scaled, damping)
    if how == "eigenvalues":
        return eigen_power(scaled, damping, exponent)
    if how == "cholesky":
        return cholesky_inverse(scaled, damping)
    return iterated_power(ops, scaled, damping, round(1 / exponent), columns)


def eigen_power(scaled: Tensor, damping: float, exponent: float, dtype: torch.dtype | None = None) -> Tensor:
    """The reference of `power`: by eigenvalues in ``dtype``, None: in float64. What is not finite is taken for zero.

    In float32 it takes half the time at order 257, and steps over micro-batches and over their union then differ by
    1e-3: the root's largest eigenvalues are off by the Gram's largest times the precision.
    """
    values, vectors = torch.linalg.eigh(_finite(scaled.to(dtype or widest_dtype(scaled.device.type))))
    powers = (values.clamp(min=0) + damping).pow(-exponent)
    vectors = vectors.to(scaled.dtype)  # the product rounds no more than its result is
    return (vectors * powers.to(scaled.dtype)[..., None, :]) @ vectors.mT


def _finite(matrix: Tensor) -> Tensor:
    """The matrix, zero where it is not finite. The host looks at one sum where it has it."""
    if matrix.device.type == "cpu" and math.isfinite(matrix.sum().item()):
        return matrix
    return torch.where(matrix.isfinite(), matrix, 0)


def inverse_factor(scaled: Tensor, damping: float) -> Tensor:
    """The upper triangular ``S``, its diagonal positive, with ``S S^T = (B + damping I)^-1``: of the factor ``L`` the
    inverse, transposed. In float64 where the device has it.

    Where rounding leaves ``B`` an eigenvalue below ``-damping``, the host takes it for zero; a GPU, which is not waited
    for, gives NaN. So it does, on both, where ``B`` is not finite.
    """
    damped = scaled.to(widest_dtype(scaled.device.type), copy=True)
    damped.diagonal(dim1=-2, dim2=-1).add_(damping)
    lower, info = torch.linalg.cholesky_ex(damped)
    served = (info == 0)[..., None, None]
    if scaled.device.type != "cpu":
        lower = torch.where(served, lower, torch.nan)
    elif not bool(served.all()):
        lower = torch.where(served, lower, _factor_of_eigenvalues(scaled, damping))
    return _inverse_of_lower(lower).mT.to(scaled.dtype)


def _factor_of_eigenvalues(scaled: Tensor, damping: float) -> Tensor:
    """``L`` of the matrix whose eigenvalues below 0 are 0, plus the ridge: what is orthogonal drops out of its root."""
    wide = scaled.to(widest_dtype(scaled.device.type))
    values, vectors = torch.linalg.eigh(torch.where(wide.isfinite(), wide, 0))
    upper = torch.linalg.qr((values.clamp(min=0) + damping).sqrt()[..., None] * vectors.mT).R
    lower = (upper * upper.diagonal(dim1=-2, dim2=-1).sign()[..., None]).mT
    return torch.where(wide.isfinite().all(-1).all(-1)[..., None, None], lower, torch.nan)


def _inverse_of_lower(lower: Tensor) -> Tensor:
    """``L^-1``, by halves: LAPACK's solution for all columns of I takes twice the time at order 257."""
    order = lower.shape[-1]
    if order <= LEAF:
        eye = torch.eye(order, dtype=lower.dtype, device=lower.device)
        return torch.linalg.solve_triangular(lower, eye.expand_as(lower), upper=False)
    half = order // 2
    inverse = torch.zeros_like(lower)
    first, last = _inverse_of_lower(lower[..., :half, :half]), _inverse_of_lower(lower[..., half:, half:])
    inverse[..., :half, :half], inverse[..., half:, half:] = first, last
    inverse[..., half:, :half] = (last @ lower[..., half:, :half] @ first).neg_()
    return inverse


def cholesky_inverse(scaled: Tensor, damping: float) -> Tensor:
    """`power` with ``s = 1``, in float64 where the device has it.

    Where a factor breaks down, the host takes eigenvalues below 0 for 0; a GPU, which is not waited for, gives NaN.
    """
    wide = scaled.to(widest_dtype(scaled.device.type))
    eye = torch.eye(wide.shape[-1], dtype=wide.dtype, device=wide.device)
    lower, info = torch.linalg.cholesky_ex(wide + damping * eye)
    inverse = torch.cholesky_solve(eye.expand_as(lower), lower)  # waits for nothing, on a GPU either
    served = (info == 0)[..., None, None]
    if scaled.device.type != "cpu" or bool(served.all()):
        return torch.where(served, inverse, torch.nan).to(scaled.dtype)
    of_eigenvalues = torch.where(
        wide.isfinite().all(-1).all(-1)[..., None, None], eigen_power(wide, damping, 1), torch.nan
    )
    return torch.where(served, inverse, of_eigenvalues).to(scaled.dtype)


def iterated_power(ops: CoordinateOps, scaled: Tensor, damping: float, root: int, columns: int) -> Tensor:
    """`power` with ``s = 1/root`` by the backend's `inverse_root`: it waits for nothing.

    The ridge bounds the smallest eigenvalue, the trace the largest, and so both fix the steps beforehand.
    """
    order = scaled.shape[-1]
    work = scaled.to(root_dtype(1 + columns / damping, scaled.dtype, scaled.device.type), copy=True)
    work.diagonal(dim1=-2, dim2=-1).add_(damping)
    norm = torch.linalg.matrix_norm(work, keepdim=True)  # Frobenius's, at least the largest eigenvalue
    low = damping / (columns + damping * math.sqrt(order))
    steps = plan(root, low, work.dtype)
    result = ops.inverse_root(work.div_(norm), steps.root, steps.coefficients)
    return result.mul_(norm.pow(-1 / root)).to(scaled.dtype)


@functools.lru_cache(maxsize=256)
def plan(root: int, low: float, dtype: torch.dtype) -> Plan:
    """The steps for eigenvalues in ``[low, 1]``, as many as the type's digits need.

    Args:
        root: ``p``.
        low: Above 0.
    """
    coefficients: list[float] = []
    while True:
        a, b, c, error = _minimax(root, low) if low < 1 - NEAR_ONE else _taylor(root, low)
        done = error <= TOLERANCE[dtype]
        largest = 1.0 if done else 1 + error  # of T m^(1/p); the last step's values lie about 1
        coefficients += [a / largest, b / largest, c / largest]
        if done:
            return Plan(root, coefficients)
        low = ((1 - error) / (1 + error)) ** root


def _minimax(root: int, low: float) -> tuple[float, float, float, float]:
    """``a, b, c`` with the least ``max |1 - m^(1/p) (a + b m + c m^2)|`` over ``[low, 1]``, and that maximum.

    Remez's exchange. The four points where it is taken are the ends and the two zeros of the derivative,
    ``a / p + (1 + 1/p) b m + (2 + 1/p) c m^2``.
    """
    s = 1 / root
    points = [low, low ** (2 / 3), low ** (1 / 3), 1.0]
    for _ in range(100):
        rows = [[m**s, m ** (1 + s), m ** (2 + s), sign, 1.0] for m, sign in zip(points, (1, -1, 1, -1), strict=True)]
        a, b, c, error = _solve(rows)
        half, square = (1 + s) * b / (2 * (2 + s) * c), a * s / ((2 + s) * c)
        far = -half + math.copysign(math.sqrt(max(half * half - square, 0.0)), -half)
        inner = sorted((square / far, far))
        moved = max(abs(new / old - 1) for new, old in zip(inner, points[1:3], strict=True))
        points[1:3] = [min(max(m, low), 1.0) for m in inner]
        if moved < 1e-12:
            break
    return a, b, c, abs(error)


def _taylor(root: int, low: float) -> tuple[float, float, float, float]:
    """The coefficients of `_minimax` about the middle of ``[low, 1]``, a short interval."""
    s, middle = 1 / root, (1 + low) / 2
    scale = middle**-s
    c = scale * s * (s + 1) / 2
    b = -scale * s - 2 * c
    a = scale - b - c
    width = (1 - low) / (2 * middle)
    return a, b / middle, c / middle**2, s * (s + 1) * (s + 2) / 6 * width**3


def _solve(rows: list[list[float]]) -> list[float]:
    """The solution of a linear system, its right side in the last column, by Gauss's elimination."""
    n = len(rows)
    for i in range(n):
        pivot = max(range(i, n), key=lambda r: abs(rows[r][i]))
        rows[i], rows[pivot] = rows[pivot], rows[i]
        for r in range(n):
            if r != i:
                share = rows[r][i] / rows[i][i]
                rows[r] = [value - share * top for value, top in zip(rows[r], rows[i], strict=True)]
    return [row[n] / row[i] for i, row in enumerate(rows)]
