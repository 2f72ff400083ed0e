"""What torch.compile sees of an emended layer: torch's own forward, and one op in backward that plans when it runs.

A plan depends on the number of rows and on the damping. Were it made while a graph is traced, the graph would hold
for its range of rows alone, layer by layer, and for one damping. So nothing is planned there: forward keeps ``x``, as
torch's own layer does, and an op whose result has the weight's shape, whatever the plan, does the rest. A damping that
changes between steps reaches the op as a tensor, data like ``x``. Loaded when the first layer is traced.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from .. import _torch
from ..backend import dispatch
from ..options import DampingMode, Options, Scale, Solver
from ..solve import cost
from .conv import Needs, conv_gradients
from .conv import prepare as prepare_conv
from .geometry import Geometry, geometry_of
from .linear import full_precision, once_differentiable, plain_linear, prepare

# The arguments that say how, the last of every op here; `options_of` takes them.
SETTINGS = (
    "float damping, str damping_mode, str scale, str backend, str solver, int iterations, Tensor? varying_damping"
)
_library = torch.library.Library("consequentialism", "FRAGMENT")


def settings_of(options: Options) -> tuple[Any, ...]:
    """The last arguments of an op. A damping that is a symbol of the graph goes as a tensor, a constant as it is."""
    from torch.fx.experimental.symbolic_shapes import has_static_value  # loaded where something is compiled

    damping, varying = options.damping, None
    if not has_static_value(damping):  # a product, of all ways the one that does not make the compiler ask for it
        damping, varying = 1.0, torch.ones((), dtype=torch.float64, device="cpu") * damping
    rest = options.damping_mode, options.scale, options.backend, options.solver, options.iterations
    return (damping, *rest, varying)


def options_of(
    damping: float,
    damping_mode: str,
    scale: str,
    backend: str,
    solver: str,
    iterations: int,
    varying_damping: Tensor | None,
) -> Options:
    """The options that `settings_of` was given. Its tensor is on the CPU, so that nothing waits for a device."""
    return Options(
        damping=damping if varying_damping is None else varying_damping.item(),
        damping_mode=cast(DampingMode, damping_mode),
        scale=cast(Scale, scale),
        backend=backend,
        solver=cast(Solver, solver),
        iterations=iterations,
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, options: Options) -> Tensor:
    """`functional.emended_linear_with` in a traced graph, of checked arguments."""
    dispatch.select(options.backend, x)  # what cannot serve the call says so now, not in backward
    return TracedLinear.apply(x, weight, bias, *settings_of(options))


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, options: Options) -> Tensor:
    """A convolution of either kind in a traced graph, of checked arguments; ``x [B, C, *spatial]``."""
    dispatch.select(options.backend, x)
    return TracedConv.apply(x, weight, bias, geometry, options.patch_bytes, *settings_of(options))


def conv_weight_grad(x: Tensor, dy: Tensor, geometry: Geometry, bias: bool, options: Options) -> tuple[Tensor, Tensor]:
    """`functional.emended_conv_weight_grad` in a traced graph; ``db`` is empty without a bias."""
    arguments = (*geometry.arguments(), bias, options.patch_bytes, *settings_of(options))
    return torch.ops.consequentialism.emended_conv_weight_grad(x, dy, *arguments)


def linear_weight_grad(x: Tensor, dy: Tensor, bias: bool, options: Options) -> tuple[Tensor, Tensor | None]:
    """`functional.emended_weight_grad` in a traced graph."""
    dw, db = torch.ops.consequentialism.emended_weight_grad(x, dy, bias, True, bias, *settings_of(options))
    return dw, db if bias else None


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


def _weight_grad(
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


def add_op(name: str, arguments: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define an op of ``arguments`` and `SETTINGS` that returns ``dw`` and ``db``, and has no derivative."""
    _library.define(f"{name}({arguments}, {SETTINGS}) -> (Tensor, Tensor)")
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    _library.impl(name, fake, "Meta")
    torch.library.register_autograd(f"consequentialism::{name}", _refuse_derivative, lib=_library)


def _refuse_derivative(ctx: Any, *gradients: Tensor) -> None:
    raise RuntimeError(_torch.SECOND_DERIVATIVE)


def _fake_weight_grad(
    x: Tensor, dy: Tensor, bias: bool, need_weight: bool, need_bias: bool, *settings: Any
) -> tuple[Tensor, Tensor]:
    inputs, outputs = x.shape[-1], dy.shape[-1]
    return dy.new_empty((outputs, inputs) if need_weight else 0), dy.new_empty(outputs if need_bias else 0)


add_op(
    "emended_weight_grad",
    "Tensor x, Tensor dy, bool bias, bool need_weight, bool need_bias",
    _weight_grad,
    _fake_weight_grad,
)


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


def _conv_weight_grad(
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


def _fake_conv_weight_grad(
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
    *settings: Any,
) -> tuple[Tensor, Tensor]:
    geometry = geometry_of(kernel, stride, padding, dilation, groups, transposed, output_padding)
    shape = geometry.weight_shape(x.shape[1], dy.shape[1])
    return dy.new_empty(shape), dy.new_empty(dy.shape[1] if bias else 0)


add_op(
    "emended_conv_weight_grad",
    "Tensor x, Tensor dy, SymInt[] kernel, SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups, "
    "bool transposed, SymInt[] output_padding, bool bias, SymInt patch_bytes",
    _conv_weight_grad,
    _fake_conv_weight_grad,
)
