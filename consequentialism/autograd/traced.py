"""What torch.compile sees of an emended layer: torch's own forward, and one op in backward that plans when it runs.

A plan depends on the number of rows and on the damping. Were it made while a graph is traced, the graph would hold
for its range of rows alone, layer by layer, and for one damping. So nothing is planned there: forward keeps ``x``, as
torch's own layer does, and an op whose result has the weight's shape, whatever the plan, does the rest. A damping that
changes between steps reaches the op as a tensor, data like ``x``. Loaded when the first layer is traced.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..backend import dispatch
from ..options import Options
from ..solve import cost
from .conv import Needs, conv_gradients
from .conv import prepare as prepare_conv
from .geometry import Geometry, geometry_of
from .linear import full_precision, once_differentiable, plain_linear, prepare
from .traced_ops import options_of, settings_of


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, options: Options) -> Tensor:
    """`functional.emended_linear_with` in a traced graph, of checked arguments."""
    dispatch.select(options.backend, x)  # what cannot serve the call says so now, not in backward
    return TracedLinear.apply(x, weight, bias, *settings_of(options))


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, options: Options) -> Tensor:
    """A convolution of either kind in a traced graph, of checked arguments; ``x [B, C, *spatial]``."""
    dispatch.select(options.backend, x)
    return TracedConv.apply(x, weight, bias, geometry, options.patch_bytes, *settings_of(options))


class TracedLinear(torch.autograd.Function):
    """``x W^T + b`` with the true gradient of ``x`` and the emended gradients of ``W`` and ``b``.

    The arguments after the bias are `settings_of`'s.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *settings: Any) -> Tensor:
        *ctx.settings, varying_damping = settings
        ctx.bias = bias is not None
        ctx.save_for_backward(x, weight, varying_damping)
        return plain_linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, varying_damping = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        dw = db = None
        with full_precision(dy.device.type):
            dx = dy @ weight if needs_x else None
            if needs_weight or needs_bias:
                dw, db = torch.ops.consequentialism.emended_weight_grad(
                    x, dy, ctx.bias, needs_weight, needs_bias, *ctx.settings, varying_damping
                )
        return dx, dw if needs_weight else None, db if needs_bias else None, *(None,) * 7


def emended_weight_grad(
    x: Tensor, dy: Tensor, bias: bool, need_weight: bool, need_bias: bool, *settings: Any
) -> tuple[Tensor, Tensor]:
    """``dw [O, I]`` and ``db [O]`` of ``x [..., I]`` and ``dy [..., O]``, each empty where it is not needed."""
    rows, inputs, outputs = math.prod(x.shape[:-1]), x.shape[-1], dy.shape[-1]
    dw, db = dy.new_zeros(outputs, inputs), dy.new_zeros(outputs)
    if rows > 0:
        options = options_of(*settings)
        backend = dispatch.select(options.backend, x)
        x, dy = x.reshape(rows, inputs), dy.reshape(rows, outputs)
        with torch.no_grad(), full_precision(x.device.type):
            plan = cost.plan(x, bias, outputs, options, backend.LIMITS.fused_rows if need_weight else 0)
            kept = prepare(x, bias, outputs, options, backend, need_weight, need_bias, plan)
            own_dw, own_db = kept.weight_grad(x, dy, backend, need_weight, need_bias)
        dw, db = dw if own_dw is None else own_dw, db if own_db is None else own_db
    return fresh(dw if need_weight else dw.new_empty(0), db if need_bias else db.new_empty(0))


def fresh(dw: Tensor, db: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients, contiguous and each in memory of its own, as a graph expects of an op's results."""
    shared = dw.untyped_storage().data_ptr() == db.untyped_storage().data_ptr()
    return dw.contiguous(), db.clone() if shared else db.contiguous()


class TracedConv(torch.autograd.Function):
    """`EmendedConv` in a traced graph, with one op in backward; the geometry stands before the settings."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, *settings: Any) -> Tensor:
        *ctx.settings, varying_damping = settings
        ctx.bias, ctx.geometry = bias is not None, geometry
        ctx.save_for_backward(x, weight, varying_damping)
        return geometry.forward(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, varying_damping = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        dx = dw = db = None
        with full_precision(dy.device.type):
            if needs_x:
                dx, _, _ = ctx.geometry.backward(dy, x, weight, (True, False, False))
            if needs_weight or needs_bias:
                op = torch.ops.consequentialism.emended_conv_weight_grad
                dw, db = op(x, dy, *ctx.geometry.arguments(), ctx.bias, *ctx.settings, varying_damping)
        return dx, dw if needs_weight else None, db if needs_bias else None, *(None,) * 9


def emended_conv_weight_grad(
    x: Tensor,
    dy: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    transposed: bool,
    output_padding: list[int],
    bias: bool,
    patch_bytes: int,
    *settings: Any,
) -> tuple[Tensor, Tensor]:
    """``dw``, of the weight's shape, and ``db [O]``, empty without a bias, of ``x`` and ``dy [B, O, *positions]``."""
    geometry = geometry_of(kernel, stride, padding, dilation, groups, transposed, output_padding)
    weight = dy.new_zeros(geometry.weight_shape(x.shape[1], dy.shape[1]))
    if x.shape[0] == 0:
        return weight, dy.new_zeros(dy.shape[1] if bias else 0)
    options = replace(options_of(*settings), patch_bytes=patch_bytes)
    with torch.no_grad(), full_precision(x.device.type):
        kept = prepare_conv(x, geometry, bias, dy.shape[1], options)
        needs = Needs(False, True, bias)
        _, dw, db = conv_gradients(kept, x, weight, dy, bias, geometry, patch_bytes, options.scale, needs)
    assert dw is not None
    return fresh(dw, dy.new_empty(0) if db is None else db)
