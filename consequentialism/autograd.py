"""True input gradients, emended weight and bias gradients: the one place that owns the derivative.

What depends on ``x`` alone is computed in forward (`prepare`); backward is stock matrix products
(`weight_grad`), so compilers, graphs and transforms see nothing unusual.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from . import cost, dispatch, distributed
from .options import Form, Options


class Prepared(NamedTuple):
    """What forward keeps for `weight_grad`: ``inverse``, or ``emended`` and ``column``, as the plan says."""

    form: Form
    inverse: Tensor | None = None  # [n, n]
    emended: Tensor | None = None  # [N, I]
    column: Tensor | None = None  # [N], the emended column of ones: db = dy^T column


def prepare(x: Tensor, bias: bool, outputs: int, options: Options, need_weight: bool, need_bias: bool) -> Prepared:
    """Everything that does not depend on ``dy``.

    Args:
        x: ``[N, I]``, ``N > 0``, detached.
        bias: Whether the layer has a bias, which then stands in the Gram.
        outputs: ``O``, for the cost model.
    """
    if options.process_group is not None:
        emended, column = distributed.emended_input(x, bias, options)
        return Prepared("dual", None, emended if need_weight else None, column if need_bias else None)
    plan = cost.choose(x.shape[0], x.shape[1] + bias, outputs, x.dtype, options)
    backend = dispatch.select(options.backend, x)
    arguments = (x, bias, plan.form, options.damping, options.damping_mode, options.scale)
    if plan.applied_to == "input":
        emended, column = backend.emended_input(*arguments)
        return Prepared(plan.form, None, emended if need_weight else None, column if need_bias else None)
    inverse = backend.input_inverse(*arguments)
    if need_weight:
        return Prepared(plan.form, inverse)
    return Prepared(plan.form, None, None, emended_ones(inverse, x, plan.form))


def emended_ones(inverse: Tensor, x: Tensor, form: Form) -> Tensor:
    """The emended input's column for the bias alone, ``[N]``, from the inverse with the bias in it."""
    if form == "dual":
        return inverse.sum(1)
    border = inverse[-1]
    return x.to(inverse.dtype) @ border[:-1] + border[-1]


def weight_grad(
    prepared: Prepared, x: Tensor, dy: Tensor, need_weight: bool, need_bias: bool
) -> tuple[Tensor | None, Tensor | None]:
    """``dw [O, I]`` and ``db [O]`` in the type computed in, each None where it is not needed.

    Args:
        x: ``[N, I]``; read only where ``prepared`` keeps an inverse.
        dy: ``[N, O]``. An infinity becomes NaN, so that the result is NaN, never a finite number.
    """
    dy = torch.add(dy, dy, alpha=0)
    form, inverse, emended, column = prepared
    if inverse is None:
        dw = dy.to(emended.dtype).T @ emended if emended is not None else None
        db = dy.to(column.dtype).T @ column if column is not None else None
        return dw, db
    x, dy = x.to(inverse.dtype), dy.to(inverse.dtype)
    if form == "dual":
        errors = inverse @ dy  # [N, O]; P is symmetric
        return errors.T @ x, errors.sum(0) if need_bias else None
    plain = dy.T @ x  # [O, I]
    inputs = x.shape[1]
    if inverse.shape[0] == inputs:
        return plain @ inverse, None
    plain_bias, border = dy.sum(0), inverse[-1, :-1]  # [O], [I]
    dw = (plain @ inverse[:-1, :-1]).addr_(plain_bias, border)
    db = plain @ border + plain_bias * inverse[-1, -1] if need_bias else None
    return dw, db


class EmendedLinear(torch.autograd.Function):
    """``x W^T + b`` with the true gradient of ``x`` and the emended gradients of ``W`` and ``b``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        inverse: Tensor | None,
        emended: Tensor | None,
        column: Tensor | None,
        form: Form,
    ) -> Tensor:
        return F.linear(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, inverse, emended, column, form = inputs
        needs_x = ctx.needs_input_grad[0]
        ctx.form = form
        ctx.save_for_backward(x if inverse is not None else None, weight if needs_x else None, inverse, emended, column)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse, emended, column = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        with torch.autocast(dy.device.type, enabled=False):
            dx = dy @ weight if needs_x else None
            dw = db = None
            if needs_weight or needs_bias:
                flat_x = x.reshape(-1, x.shape[-1]) if x is not None else x
                prepared = Prepared(ctx.form, inverse, emended, column)
                dw, db = weight_grad(prepared, flat_x, dy.reshape(-1, dy.shape[-1]), needs_weight, needs_bias)
                dw = dw.to(dy.dtype) if dw is not None else None
                db = db.to(dy.dtype) if db is not None else None
        return dx, dw, db, None, None, None, None
