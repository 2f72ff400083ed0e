"""Checks of the arguments of emended layers and functions: an error names the argument, the value, what is allowed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _torch

FLOATING_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_differentiable(transformed: bool, *tensors: Tensor | None) -> None:
    """Refuse forward mode, and the torch.func transforms under which the gradient would silently be the plain one."""
    if not transformed:
        if _torch.tangents_exist() and any(_torch.is_dual(tensor) for tensor in tensors):
            raise RuntimeError(_torch.FORWARD_MODE)
        return
    if torch.compiler.is_compiling():
        raise RuntimeError(
            "consequentialism: torch.compile over a torch.func transform drops the emended gradient and would use "
            "the plain one; compile without the transform, or run the transform eagerly"
        )
    if _torch.grad_levels() > 1:
        raise RuntimeError(f"{_torch.SECOND_DERIVATIVE}. torch.func.grad and its like cannot be nested over it")


def check_floating(name: str, tensor: Any) -> None:
    """Raise unless ``tensor`` is a dense tensor of one of `FLOATING_TYPES`."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {tensor!r} ({type(tensor).__name__})")
    if _torch.is_dtensor(tensor):
        raise TypeError(f"{name} is a DTensor, which is not supported; use {name}.to_local()")
    if tensor.dtype not in FLOATING_TYPES:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got {tensor.layout}")


def check_match(first: str, a: Tensor, second: str, b: Tensor) -> None:
    """Raise unless two tensors have the same type and device."""
    if a.dtype != b.dtype:
        raise TypeError(f"{first} and {second} must have the same type, got {a.dtype} and {b.dtype}")
    if a.device != b.device:
        raise ValueError(f"{first} and {second} must be on the same device, got {a.device} and {b.device}")


def check_linear(x: Tensor, weight: Tensor, bias: Tensor | None, names: tuple[str, str] = ("weight", "bias")) -> None:
    """Raise unless ``x [..., I]``, ``weight [O, I]`` and ``bias [O]`` are those of a linear layer."""
    weight_name, bias_name = names
    check_floating("x", x)
    check_floating(weight_name, weight)
    check_match("x", x, weight_name, weight)
    if weight.ndim != 2:
        raise ValueError(f"{weight_name} must have the shape [O, I], got {list(weight.shape)}")
    if x.ndim == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"x [..., I] and {weight_name} [O, I] must have the same I, got x {list(x.shape)} "
            f"and {weight_name} {list(weight.shape)}"
        )
    if bias is None:
        return
    check_floating(bias_name, bias)
    check_match("x", x, bias_name, bias)
    if bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{bias_name} must have the shape [O] of {weight_name} [O, I], got {bias_name} {list(bias.shape)} "
            f"and {weight_name} {list(weight.shape)}"
        )


def check_conv(x: Tensor, weight: Tensor, bias: Tensor | None, weight_shape: str) -> None:
    """Raise unless types and devices agree and the weight is that of 1 to 3 spatial dimensions."""
    check_floating("x", x)
    check_floating("weight", weight)
    check_match("x", x, "weight", weight)
    if weight.ndim not in (3, 4, 5):
        raise ValueError(f"weight must have the shape {weight_shape}, 3 to 5 dimensions, got {list(weight.shape)}")
    if bias is not None:
        check_floating("bias", bias)
        check_match("x", x, "bias", bias)
