"""The step of one layer inside backward: what an emended linear layer of `FusedSGD` does in forward and backward."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import _torch
from ..autograd.kept import EmendedInput, Kept, restored
from ..autograd.linear import full_precision, keep, plain_linear, prepare
from ..backend import dispatch
from ..backend.reference import poison_of, poisoned
from ..functional.checks import check_linear
from ..functional.linear import autocast
from ..options import Options
from ..precision import compute_dtype, emended_dtype
from ..samples import ratio
from ..solve import cost

if TYPE_CHECKING:
    from .fused_sgd import LayerStep


def updated_linear(x: Tensor, weight: Tensor, bias: Tensor | None, options: Options, step: LayerStep) -> Tensor:
    """``x W^T + b`` of a layer that ``step`` belongs to; backward steps the weights in place.

    Raises:
        RuntimeError: Where that cannot be right; the message says what and why.
        TypeError, ValueError: As `consequentialism.emended_linear`.
    """
    step.check_forward(weight, bias, options)
    cast_x, cast_weight, cast_bias = autocast(x, weight.detach(), None if bias is None else bias.detach())
    check_linear(cast_x, cast_weight, cast_bias)
    rows = math.prod(cast_x.shape[:-1])
    kept: Kept = EmendedInput(None, None)
    if rows > 0:
        with torch.no_grad(), full_precision(cast_x.device.type):
            kept = prepare(
                cast_x.detach().reshape(rows, cast_x.shape[-1]),
                bias is not None,
                weight.shape[0],
                options,
                dispatch.select(options.backend, cast_x),
                weight.requires_grad,
                bias is not None and bias.requires_grad,
                cost.plan(cast_x, bias is not None, weight.shape[0], options),
            )
    views = weight.view_as(weight), None if bias is None else bias.view_as(bias)
    by = ratio(options, rows, weight)
    return UpdatedLinear.apply(cast_x, *views, cast_weight, cast_bias, step, by, *kept.flat())


class UpdatedLinear(torch.autograd.Function):
    """``x W^T + b`` whose backward steps ``W`` and ``b`` instead of returning their gradients; see `FusedSGD`.

    The parameters come twice. First as views of them, through which backward learns whether anybody wants their
    gradients (the engine answers that only for what lies above a leaf); then detached, in the type computed in.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, _, _, weight, bias, ctx.step, ctx.ratio, *flat = inputs
        keep(ctx, x, weight, *flat)
        ctx.step.used_by(ctx)
        return plain_linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.step.backward(ctx, dy), *(None,) * 10


def updated_linear_backward(ctx: Any, dy: Tensor) -> Tensor | None:
    """The input's gradient ``[..., I]`` where it is needed; after that, the step."""
    wants_weight, wants_bias = ctx.step.begin(ctx)
    x, weight, *tensors = ctx.saved_tensors
    with full_precision(dy.device.type):
        dx = dy @ weight if _torch.needed_gradients(ctx, 1)[0] else None
    rows = math.prod(dy.shape[:-1])
    if rows > 0 and (wants_weight or wants_bias):
        flat_x = None if x is None else x.reshape(rows, x.shape[-1])
        kept = restored(ctx.kind, ctx.static, *tensors)
        with full_precision(dy.device.type):
            ctx.step.update(wants_weight, wants_bias, kept, flat_x, dy.reshape(rows, dy.shape[-1]), ctx.ratio)
    return dx


def update(
    weight: Tensor | None, bias: Tensor | None, kept: Kept, x: Tensor | None, dy: Tensor, lr: float | Tensor
) -> None:
    """``W <- W - lr*dw`` and ``b <- b - lr*db`` in place, without a ``dw`` in memory; each is left alone where None.

    One product adds to the weight where all types are the same. Where ``dw`` is rounded or multiplied on its way, which
    autocast, float16, conjugate gradients and the primal inverse on the gradient's side need, it is there one eighth
    at a time.

    Args:
        weight: ``[O, I]``.
        bias: ``[O]``.
        x: ``[N, I]``; read only where ``kept`` keeps it.
        dy: ``[N, O]``, ``N > 0``. One infinity or NaN makes every weight NaN, as the gradient would be.
        lr: A number, or a 0-dimensional tensor on the weight's device, which the host does not read.
    """
    errors, alpha = _scaled(dy, lr)
    kept.step_(weight, bias, x, errors, alpha)


def _scaled(dy: Tensor, lr: float | Tensor) -> tuple[Tensor, float]:
    """Errors and a number whose product is ``-lr * dy``, NaN everywhere where one entry of ``dy`` is not finite."""
    if isinstance(lr, Tensor):
        dy = dy.to(emended_dtype(dy.dtype))  # lr times a float16 may leave its range
        return dy * (poison_of(dy).to(compute_dtype(dy.dtype)) - lr), 1.0
    if dy.device.type != "cpu" or type(dy) is not Tensor:  # a fake tensor has nothing to look at
        dy = poisoned(dy)
    elif not math.isfinite(dy.sum().item()) and not dy.isfinite().all():  # a sum of finite entries may overflow
        dy = torch.full_like(dy, math.nan)
    return (dy, -lr) if lr else (0 * dy, 1.0)  # with alpha=0 a product is skipped, and a NaN with it
