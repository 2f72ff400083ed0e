"""The ops of steps in emended coordinates on tensors: checks, allocation and launches."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...precision import compute_dtype
from ..reference.coordinates import block_order, steps_of
from . import plans
from .checks import FLOATING_TYPES, check_x
from .decayed_gram import decayed_gram_kernel, reduce_decayed_gram_kernel
from .inverse_root import symmetric_product_kernel
from .launch import _exact, _on_device, _precision
from .plans import ceil_div
from .root_product import root_product_kernel

_REDUCE_TILE = 32


def decayed_gram(gram: Tensor, x: Tensor, bias: bool, memory: float, beta: float) -> Tensor:
    _check_decayed_gram(gram, x, bias, memory, beta)
    blocks, order, _ = gram.shape
    rows, inputs = x.shape
    if rows == 0 or order == 0:
        return gram * memory if memory != 0 else torch.zeros_like(gram)
    gram = gram.contiguous()
    size = block_order(inputs, blocks, False)
    plan = plans.plan_decayed_gram(size, rows, blocks, x.element_size())
    make = gram.new_empty if order * blocks == inputs + bias else gram.new_zeros  # zero where a block is smaller
    fresh = make(gram.shape)
    sums = fresh if plan.splits == 1 else make(plan.splits, *gram.shape)
    along = max(1, ceil_div(size, plan.tile))
    decays = memory != 0
    with _on_device(x):
        decayed_gram_kernel[along, along, plan.splits * blocks](
            x, gram, sums, rows, inputs, blocks, *x.stride(), order, plan.length, float(memory), float(beta),
            BIAS=bias, DECAYS=decays, WHOLE=plan.splits == 1, TILE=plan.tile, DEPTH=plan.depth,
            PRECISION=_precision(x.dtype), num_warps=plan.warps, num_stages=plan.stages,
        )  # fmt: skip
        if plan.splits > 1:
            tiles = ceil_div(order, _REDUCE_TILE)
            reduce_decayed_gram_kernel[tiles, tiles, blocks](
                sums, gram, fresh, order, plan.splits, float(memory), float(beta), DECAYS=decays, TILE=_REDUCE_TILE
            )
    return fresh


def inverse_root(matrix: Tensor, root: int, coefficients: Sequence[float]) -> Tensor:
    """Every product of all matrices is one launch."""
    _check_inverse_root(matrix, root, coefficients)
    order = matrix.shape[-1]
    if matrix.numel() == 0 or not coefficients:
        return torch.eye(order).to(matrix).expand_as(matrix).clone()
    given = matrix.reshape(-1, order, order).contiguous()
    plan = plans.plan_symmetric(order, given.element_size())
    along = ceil_div(order, plan.tile)

    def product(out: Tensor, a: Tensor, b: Tensor, alpha: float = 1.0, beta: float = 0.0, gamma: float = 0.0) -> Tensor:
        """``alpha a b + beta a + gamma I``."""
        symmetric_product_kernel[along, along, given.shape[0]](
            a, b, a, out, order, alpha, beta, gamma,
            ADDS=(alpha, beta, gamma) != (1, 0, 0), TILE=plan.tile, DEPTH=plan.depth, PRECISION=_exact(matrix.dtype),
            num_warps=plan.warps, num_stages=plan.stages,
        )  # fmt: skip
        return out

    turn, *powers = given.new_empty(3, *given.shape)
    currents, founds = given.new_empty(2, *given.shape), given.new_empty(2, *given.shape)
    current, found = given, founds[0]
    with _on_device(matrix):
        for step, (last, a, b, c) in enumerate(steps_of(coefficients)):
            by = product(turn if step else found, current, current, c, b, a)
            if step:
                found = product(founds[step % 2], found, by)
            if last:
                break
            raised = by
            for i in range(root.bit_length() - 1):
                raised = product(powers[i % 2], raised, raised)
            current = product(currents[step % 2], raised, current)
    return found.clone().view(matrix.shape)  # not the room of both


def root_product(rows: Tensor, root: Tensor) -> Tensor:
    _check_root_product(rows, root)
    product = root.new_empty(rows.shape)
    _multiply(product, rows, root, 1.0, False)
    return product


def add_root_product_(weight: Tensor, rows: Tensor, root: Tensor, alpha: float) -> None:
    _check_root_product(rows, root)
    if weight.shape != rows.shape:
        raise ValueError(
            f"weight and rows must have the same shape, got weight {list(weight.shape)} and rows {list(rows.shape)}"
        )
    if weight.stride(2) == 1 or weight.shape[2] <= 1:
        _multiply(weight, rows, root, alpha, True)
    else:
        whole = weight.contiguous()
        _multiply(whole, rows, root, alpha, True)
        weight.copy_(whole)


def _multiply(out: Tensor, rows: Tensor, root: Tensor, alpha: float, adds: bool) -> None:
    """``out <- alpha rows S``, plus out where it ``adds``; out's rows are contiguous."""
    if out.numel() == 0:
        return
    batch, count, order = rows.shape
    dtype = rows.dtype
    rows = rows.to(root.dtype) if root.dtype == torch.float64 else rows
    rows, root = (one if one.stride(2) == 1 else one.contiguous() for one in (rows, root))
    multiplied = rows.dtype if rows.dtype == torch.bfloat16 else root.dtype
    plan = plans.plan_emend(count, order, multiplied.itemsize)
    programs = ceil_div(count, plan.rows) * ceil_div(order, plan.inputs)
    precision = _exact(dtype) if dtype == torch.float16 else _precision(multiplied)
    with _on_device(rows):
        root_product_kernel[programs, batch](
            rows, root, out, count, order, *rows.stride()[:2], *root.stride()[:2], *out.stride()[:2], float(alpha),
            ADDS=adds, TILE_N=plan.rows, TILE_I=plan.inputs, DEPTH=plan.depth, PRECISION=precision,
            num_warps=plan.warps, num_stages=plan.stages,
        )  # fmt: skip


def _check_decayed_gram(gram: Tensor, x: Tensor, bias: bool, memory: float, beta: float) -> None:
    check_x(x)
    if gram.ndim != 3 or gram.shape[0] < 1 or gram.shape[1] != gram.shape[2]:
        raise ValueError(f"gram must have the shape [n, b, b], got {list(gram.shape)}")
    if gram.dtype != compute_dtype(x.dtype):
        raise TypeError(f"gram must be {compute_dtype(x.dtype)} for x of {x.dtype}, got {gram.dtype}")
    order = block_order(x.shape[1], gram.shape[0], bias)
    if gram.shape[1] != order:
        raise ValueError(
            f"gram [n, b, b] must have b = {order} for {gram.shape[0]} blocks of x {list(x.shape)}"
            f"{' with a bias' if bias else ''}, got {list(gram.shape)}"
        )
    for name, value in (("memory", memory), ("beta", beta)):
        if not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got {value}")


def _check_inverse_root(matrix: Tensor, root: int, coefficients: Sequence[float]) -> None:
    if matrix.ndim < 2 or matrix.shape[-2] != matrix.shape[-1]:
        raise ValueError(f"matrix must have the shape [..., n, n], got {list(matrix.shape)}")
    if matrix.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"matrix must be float32 or float64, got {matrix.dtype}")
    if root < 2 or root & (root - 1):
        raise ValueError(f"root must be a power of 2 of at least 2, got {root}")
    if len(coefficients) % 3:
        raise ValueError(f"coefficients must be three for each step, got {len(coefficients)}")


def _check_root_product(rows: Tensor, root: Tensor) -> None:
    if rows.ndim != 3:
        raise ValueError(f"rows must have the shape [B, O, n], got {list(rows.shape)}")
    if root.ndim != 3 or root.shape != (rows.shape[0], rows.shape[2], rows.shape[2]):
        raise ValueError(
            f"root must have the shape [B, n, n] for rows [B, O, n], got root {list(root.shape)} and rows "
            f"{list(rows.shape)}"
        )
    if root.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"root must be float32 or float64, got {root.dtype}")
    if rows.dtype not in FLOATING_TYPES:
        raise TypeError(f"rows must be floating-point, got {rows.dtype}")
