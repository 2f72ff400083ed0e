"""Cases of the ops of steps in emended coordinates, against torch's own operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from consequentialism.solve import root as solve

from .case import Case
from .op_cases import single_op_case
from .roofline import DTYPES, Minimum
from .shapes import LinearShape, Order
from .timing import Device

MEMORY, BETA = 0.95, 0.05
ROOT, DAMPING = 4, 0.03


def decayed_gram_case(op: str, shape: LinearShape, dtype_name: str, device: Device) -> Case:
    """``memory * A + beta * x1^T x1 [I + 1, I + 1]`` of ``x [N, I]`` with a bias, in one block."""
    rows, inputs = shape.rows, shape.inputs
    dtype, size = DTYPES[dtype_name], DTYPES[dtype_name].itemsize
    wide = torch.promote_types(dtype, torch.float32)

    def tensors() -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        x = torch.randn(rows, inputs, device=device.type, dtype=dtype)
        before = torch.eye(inputs + 1, device=device.type, dtype=wide)[None]
        return x, before

    def of_rows(x: Tensor, before: Tensor) -> Tensor:
        ones = torch.cat([x, x.new_ones(rows, 1)], 1).to(before.dtype)
        return torch.addmm(before[0], ones.T, ones, beta=MEMORY, alpha=BETA)[None]

    n = inputs + 1
    return single_op_case(
        op,
        shape,
        dtype_name,
        device,
        ("torch", lambda x, before: lambda: of_rows(x, before)),
        lambda module, x, before: lambda: module.decayed_gram(before, x, True, MEMORY, BETA),
        tensors,
        lambda x, before: [of_rows(x.double(), before.double())],
        Minimum(1.0 * size * rows * inputs + 2.0 * wide.itemsize * n * n, 1.0 * n * n * rows),
    )


def inverse_root_case(op: str, shape: Order, dtype_name: str, device: Device) -> Case:
    """``M^(-1/4)`` of a decaying spectrum with the default damping, by torch's eigenvalues in float64."""
    n, dtype = shape.order, DTYPES[dtype_name]

    def tensors() -> tuple[Tensor]:
        torch.manual_seed(0)
        x = torch.randn(2 * n, n, dtype=torch.float64) * torch.arange(1, n + 1, dtype=torch.float64) ** -0.7
        moment = x.T @ x
        moment = moment * n / moment.trace() + DAMPING * torch.eye(n, dtype=torch.float64)
        return ((moment / moment.norm()).to(device.type, dtype),)

    def by_eigenvalues(matrix: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(matrix.double())
        return (vectors * values.pow(-1 / ROOT)) @ vectors.T

    def own(module: Any, matrix: Tensor) -> Callable[[], Tensor]:
        plan = solve.plan(ROOT, DAMPING / (n + DAMPING * n**0.5), dtype)
        return lambda: module.inverse_root(matrix, plan.root, plan.coefficients)

    products = 4 * len(solve.plan(ROOT, DAMPING / (n + DAMPING * n**0.5), dtype).coefficients) // 3
    return single_op_case(
        op,
        shape,
        dtype_name,
        device,
        ("torch", lambda matrix: lambda: by_eigenvalues(matrix).to(dtype)),
        own,
        tensors,
        lambda matrix: [by_eigenvalues(matrix)],
        Minimum(2.0 * dtype.itemsize * n * n, 1.0 * products * n**3),
    )


def root_product_case(op: str, shape: LinearShape, dtype_name: str, device: Device) -> Case:
    """``g S [O, I]`` of a gradient and a float32 root."""
    outputs, inputs = shape.outputs, shape.inputs
    dtype, size = DTYPES[dtype_name], DTYPES[dtype_name].itemsize
    wide = torch.promote_types(dtype, torch.float32)

    def tensors() -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        root = torch.randn(inputs, inputs, device=device.type, dtype=torch.float32).to(wide)
        rows = torch.randn(1, outputs, inputs, device=device.type, dtype=dtype)
        return rows, (root + root.T)[None]

    return single_op_case(
        op,
        shape,
        dtype_name,
        device,
        ("torch", lambda rows, root: lambda: rows.to(root.dtype) @ root),
        lambda module, rows, root: lambda: module.root_product(rows, root),
        tensors,
        lambda rows, root: [rows.double() @ root.double()],
        Minimum(1.0 * (size + wide.itemsize) * outputs * inputs + wide.itemsize * inputs**2, 2.0 * outputs * inputs**2),
    )
