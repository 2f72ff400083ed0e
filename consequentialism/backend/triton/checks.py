"""Arguments of the ops, as ``csrc/checks.h`` checks them for the compiled ones."""

from __future__ import annotations

import torch
from torch import Tensor

from ...options import DAMPING_MODES, SCALES, check_choice, check_damping

FORMS = ("dual", "primal")
LIMIT = 2**31  # of a size; elements are addressed with 64 bits
FLOATING_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_x(x: Tensor, name: str = "x", shape: str = "[N, I]") -> None:
    """Raise unless ``x`` is a floating-point matrix."""
    if x.ndim != 2:
        raise ValueError(f"{name} must have the shape {shape}, got {list(x.shape)}")
    if x.dtype not in FLOATING_TYPES:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
    if max(x.shape) >= LIMIT:
        raise ValueError(f"{name} {shape} must have fewer than 2^31 rows and columns, got {list(x.shape)}")


def check_form(form: str) -> None:
    """Raise unless ``form`` is known."""
    check_choice("form", form, FORMS)


def check_options(damping: float, damping_mode: str, scale: str) -> None:
    """Raise unless a damped inverse can be asked for so."""
    check_damping(damping)
    check_choice("damping_mode", damping_mode, DAMPING_MODES)
    check_choice("scale", scale, SCALES)


def check_gram(gram: Tensor, rank: int) -> None:
    """Raise unless ``gram`` is ``[..., n, n]`` and its rank positive."""
    if gram.ndim < 2 or gram.shape[-2] != gram.shape[-1]:
        raise ValueError(f"gram must have the shape [..., n, n], got {list(gram.shape)}")
    if gram.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"gram must be float32 or float64, got {gram.dtype}")
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")


def check_weight_grad(dy: Tensor, rows: Tensor, column: Tensor) -> None:
    """Raise unless ``dy``, ``rows`` and ``column`` have the same N."""
    check_x(dy, "dy", "[N, O]")
    check_x(rows, "rows")
    if dy.shape[0] != rows.shape[0]:
        raise ValueError(
            f"dy [N, O] and rows [N, I] must have the same N, got dy {list(dy.shape)} and rows {list(rows.shape)}"
        )
    if column.ndim != 1 or column.shape[0] not in (0, rows.shape[0]):
        raise ValueError(
            f"column must have the shape [N] or [0], got column {list(column.shape)} and rows {list(rows.shape)}"
        )


def check_fused(x: Tensor, dy: Tensor) -> None:
    """Raise unless ``dy`` is an output gradient of ``x``."""
    check_x(x)
    check_x(dy, "dy", "[N, O]")
    if dy.dtype != x.dtype:
        raise TypeError(f"x and dy must have the same type, got {x.dtype} and {dy.dtype}")
    if dy.shape[0] != x.shape[0]:
        raise ValueError(f"x [N, I] and dy [N, O] must have the same N, got x {list(x.shape)} and dy {list(dy.shape)}")
