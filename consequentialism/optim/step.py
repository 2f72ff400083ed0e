"""The step of one layer inside backward: what an emended linear layer of `FusedSGD` does in forward and backward."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import _torch, conjugate, cost, dispatch, reference
from ..autograd import Fused, Prepared, emended_ones, full_precision, keep, plain_linear, prepare
from ..functional import autocast, check_linear
from ..options import Options
from ..precision import compute_dtype, emended_dtype
from ..samples import ratio

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
    prepared = Prepared("dual")
    if rows > 0:
        with torch.no_grad(), full_precision(cast_x.device.type):
            prepared = prepare(
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
    return UpdatedLinear.apply(cast_x, *views, cast_weight, cast_bias, step, ratio(options, rows, weight), *prepared)


class UpdatedLinear(torch.autograd.Function):
    """``x W^T + b`` whose backward steps ``W`` and ``b`` instead of returning their gradients; see `FusedSGD`.

    The parameters come twice. First as views of them, through which backward learns whether anybody wants their
    gradients (the engine answers that only for what lies above a leaf); then detached, in the type computed in.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, _, _, weight, bias, ctx.step, ctx.ratio, *rest = inputs
        keep(ctx, x, weight, Prepared(*rest))
        ctx.step.used_by(ctx)
        return plain_linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.step.backward(ctx, dy), *(None,) * 13


def updated_linear_backward(ctx: Any, dy: Tensor) -> Tensor | None:
    """The input's gradient ``[..., I]`` where it is needed; after that, the step."""
    wants_weight, wants_bias = ctx.step.begin(ctx)
    x, weight, inverse, emended, column, gram, unit = ctx.saved_tensors
    with full_precision(dy.device.type):
        dx = dy @ weight if _torch.needed_gradients(ctx, 1)[0] else None
    rows = math.prod(dy.shape[:-1])
    if rows > 0 and (wants_weight or wants_bias):
        flat_x = None if x is None else x.reshape(rows, x.shape[-1])
        prepared = Prepared(ctx.form, inverse, emended, column, ctx.system, gram, unit)
        with full_precision(dy.device.type):
            ctx.step.update(wants_weight, wants_bias, prepared, flat_x, dy.reshape(rows, dy.shape[-1]), ctx.ratio)
    return dx


def update(
    weight: Tensor | None, bias: Tensor | None, prepared: Prepared, x: Tensor | None, dy: Tensor, lr: float | Tensor
) -> None:
    """``W <- W - lr*dw`` and ``b <- b - lr*db`` in place, without a ``dw`` in memory; each is left alone where None.

    One product adds to the weight where all types are the same. Where ``dw`` is rounded or multiplied on its way, which
    autocast, float16, conjugate gradients and the primal inverse on the gradient's side need, it is there one eighth
    at a time.

    Args:
        weight: ``[O, I]``.
        bias: ``[O]``.
        x: ``[N, I]``; read only where ``prepared`` keeps an inverse or a system.
        dy: ``[N, O]``, ``N > 0``. One infinity or NaN makes every weight NaN, as the gradient would be.
        lr: A number, or a 0-dimensional tensor on the weight's device, which the host does not read.
    """
    form, inverse, emended, column, system, gram, unit = prepared
    assert not isinstance(form, Fused), "a step has no dw to compute"
    assert unit is None, "a step is never traced"
    errors, alpha = _scaled(dy, lr)
    if system is not None:
        assert x is not None
        for part in _blocks(errors.t()):
            dw, db = conjugate.weight_grad(system, gram, x, errors[:, part], reference)
            if weight is not None:
                weight[part].add_(dw, alpha=alpha)
            if bias is not None and db is not None:
                bias[part].add_(db, alpha=alpha)
        return
    if bias is not None:
        if inverse is not None:
            assert x is not None
            column = emended_ones(inverse, x, form)
        assert column is not None
        bias.add_(errors.to(column.dtype).t() @ column, alpha=alpha)
    if weight is None:
        return
    if inverse is None:
        assert emended is not None
        _add_product(weight, errors, emended, alpha)
    elif form == "dual":
        assert x is not None
        _add_product(weight, inverse @ errors, x, alpha)  # P is symmetric: dw = (P dy)^T x
    else:
        assert x is not None
        inputs = x.shape[1]
        for rows in _blocks(weight):
            some = errors[:, rows]  # [N, o]
            weight[rows].addmm_(some.t() @ x, inverse[:inputs, :inputs], alpha=alpha)
            if inverse.shape[0] > inputs:
                weight[rows].addr_(some.sum(0), inverse[-1, :-1], alpha=alpha)


def _scaled(dy: Tensor, lr: float | Tensor) -> tuple[Tensor, float]:
    """Errors and a number whose product is ``-lr * dy``, NaN everywhere where one entry of ``dy`` is not finite."""
    if isinstance(lr, Tensor):
        dy = dy.to(emended_dtype(dy.dtype))  # lr times a float16 may leave its range
        return dy * ((0 * dy).sum().to(compute_dtype(dy.dtype)) - lr), 1.0
    if dy.device.type != "cpu" or type(dy) is not Tensor:  # a fake tensor has nothing to look at
        dy = dy + (0 * dy).sum()
    elif not math.isfinite(dy.sum().item()) and not dy.isfinite().all():  # a sum of finite entries may overflow
        dy = torch.full_like(dy, math.nan)
    return (dy, -lr) if lr else (0 * dy, 1.0)  # with alpha=0 a product is skipped, and a NaN with it


def _add_product(weight: Tensor, errors: Tensor, rows: Tensor, alpha: float) -> None:
    """``weight [O, I] += alpha * errors^T rows``, of ``errors [N, O]`` and ``rows [N, I]``."""
    if weight.dtype == rows.dtype == errors.dtype:
        weight.addmm_(errors.t(), rows, alpha=alpha)
        return
    errors = errors.to(rows.dtype)
    for some in _blocks(weight):
        weight[some].add_(errors[:, some].t() @ rows, alpha=alpha)


def _blocks(weight: Tensor) -> Iterator[slice]:
    """The rows of ``weight [O, ...]`` in at most eight parts."""
    outputs = weight.shape[0]
    size = max(1, math.ceil(outputs / 8))
    return (slice(begin, begin + size) for begin in range(0, outputs, size))
