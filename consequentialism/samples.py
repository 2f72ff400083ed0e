"""What ``scale="nlms"`` multiplies by where the caller says it: ``samples``, the number that the loss divides by.

Every path of a layer multiplies by its default, the rows or the batch size. The ratio of the two is applied to the
gradients of weight and bias after that, so that it is one for all paths and the input's gradient stays the true one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .options import Options
from .precision import compute_dtype


def count(samples: int | Tensor, device: torch.device) -> Tensor:
    """``samples`` as a 0-dimensional tensor, a mask as its sum. The host reads nothing."""
    if not isinstance(samples, Tensor):
        return torch.full((), samples, dtype=torch.int64, device=device)
    samples = samples.detach()
    if samples.ndim == 0:
        return samples.to(torch.int64) if samples.dtype == torch.bool else samples
    return samples.sum(dtype=compute_dtype(samples.dtype) if samples.is_floating_point() else torch.int64)


def ratio(options: Options, default: int, like: Tensor) -> Tensor | None:
    """``samples / default``, 0-dimensional, or None where ``default`` is what counts.

    Args:
        default: What ``scale="nlms"`` multiplies by otherwise.
        like: A tensor with the type of the gradient and on its device.
    """
    if options.samples is None or options.scale != "nlms":
        return None
    samples = count(options.samples, like.device)
    if samples.device.type != "cpu":  # a number on the CPU goes with every device, without a copy
        samples = samples.to(like.device)
    return samples.to(compute_dtype(like.dtype)) / max(default, 1)


def scaled(gradient: Tensor, by: Tensor) -> Tensor:
    """``gradient * by``, rounded once."""
    return (gradient.to(compute_dtype(gradient.dtype)) * by).to(gradient.dtype)


def counted(
    weight: Tensor, bias: Tensor | None, options: Options, default: int
) -> tuple[Tensor, Tensor | None, Options]:
    """The parameters, whose gradients are multiplied by `ratio`, and the options without ``samples``."""
    by = ratio(options, default, weight)
    if by is not None:
        weight = ScaledGradient.apply(weight, by)
        bias = None if bias is None else ScaledGradient.apply(bias, by)
    return weight, bias, options.changed(samples=None)


class ScaledGradient(torch.autograd.Function):
    """The identity, whose backward multiplies by a 0-dimensional tensor."""

    generate_vmap_rule = True

    @staticmethod
    def forward(parameter: Tensor, by: Tensor) -> Tensor:
        return parameter.view_as(parameter)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (by,) = ctx.saved_tensors
        return scaled(gradient, by), None
