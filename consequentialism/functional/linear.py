"""The functional forms: emended linear map, emended weight gradient, and the consequence of an update."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy
from torch.nn import functional as F
from typing_extensions import Unpack

from .. import _torch
from ..autograd import side_stream, traced_ops
from ..autograd.linear import EmendedLinear, TransformableEmendedLinear, autocasts, full_precision, prepare
from ..backend import compiled as ops
from ..backend import dispatch, reference
from ..backend.protocol import Backend
from ..options import Options, OptionsDict, options_from
from ..samples import counted, ratio, scaled
from ..solve import cost
from . import plain_path
from .checks import check_differentiable, check_floating, check_linear, check_match


def emended_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, **options: Unpack[OptionsDict]) -> Tensor:
    """Compute ``y = x W^T + b``, whose backward gives emended gradients to ``weight`` and ``bias``.

    The gradient of ``x`` is the true one. The gradient of the weight is ``dw = dy^T (x x^T + c I)^-1 x`` instead of
    ``dy^T x``; a bias counts as one more input that is always 1. The output is that of `torch.nn.functional.linear`.

    Args:
        x: ``[..., I]``; all leading dimensions are rows.
        weight: ``[O, I]``.
        bias: ``[O]`` or None.
        **options: The fields of `consequentialism.Options`. ``scale="nlms"`` multiplies by ``samples`` where that is
            given, else by the number of rows.

    Returns:
        ``[..., O]``.

    Raises:
        TypeError: An argument of the wrong type, or types that differ.
        ValueError: Shapes that do not fit, or an option out of its range.
        RuntimeError: A backend named by the user that cannot serve the call.

    Source: arXiv 2003.05164; ``csrc/ops.cpp`` has the ops.
    """
    settings = options_from(options)
    if isinstance(x, Proxy):
        return plain_path.call(x, emended_linear, (x, weight, bias), options)
    return emended_linear_with(x, weight, bias, settings)


def emended_linear_with(x: Tensor, weight: Tensor, bias: Tensor | None, options: Options) -> Tensor:
    """`emended_linear` with its options as one object."""
    if options.samples is not None and options.process_group is None and isinstance(x, Tensor):
        weight, bias, options = counted(weight, bias, options, math.prod(x.shape[:-1]))
    x, weight, bias = autocast(x, weight, bias)
    check_linear(x, weight, bias)
    # Inside a torch.func transform a wrapper's requires_grad says nothing about the outer levels.
    transformed = _torch.transforms_active()
    recording = torch.is_grad_enabled()
    need_weight = transformed or (recording and weight.requires_grad)
    need_bias = bias is not None and (transformed or (recording and bias.requires_grad))
    if not (need_weight or need_bias) or plain_path.is_exported(True):
        return F.linear(x, weight, bias)
    check_differentiable(transformed, x, weight, bias)
    if plain_path.is_traced(options):
        from ..autograd import traced

        return traced.linear(x, weight, bias, options)
    rows = math.prod(x.shape[:-1])
    if rows == 0 and options.process_group is None:
        return F.linear(x, weight, bias)
    backend = dispatch.select(options.backend, x)
    scope = side_stream.scope_of(x, options, need_weight)
    plan: cost.Plan | None = None
    if options.process_group is None:  # what runs beside forward is not left to backward
        fused_rows = backend.LIMITS.fused_rows if need_weight and not transformed and scope is None else 0
        plan = cost.plan(x, bias is not None, weight.shape[0], options, fused_rows)
    if plan is not None and not transformed and scope is None and serves_whole(backend, plan):
        return ops.emended_linear(x, weight, bias, plan.form, plan.applied_to, *options.ridge, *plan.type)
    with torch.no_grad(), full_precision(x.device.type):
        read = x.detach().reshape(rows, x.shape[-1])
        how = (bias is not None, weight.shape[0], options, backend, need_weight, need_bias, plan)
        prepared, ready = side_stream.run(scope, read, lambda: prepare(read, *how))
    function = TransformableEmendedLinear if transformed else EmendedLinear
    return function.apply(x, weight, bias, backend, ready, *prepared.flat())


def serves_whole(backend: Backend, plan: cost.Plan) -> bool:
    """Whether one op serves both forward and backward of a call."""
    return backend.LIMITS.derivative and plan.solver == "cholesky"


def compiled_plan(
    x: Tensor, has_bias: bool, outputs: int, options: Options, need_weight: bool
) -> tuple[Any, ...] | None:
    """What ``csrc/linear_forward.cpp`` remembers for calls with these options and sizes.

    Args:
        options: Without a batch's own ``samples`` and without a process group, which must not be kept alive.

    Returns:
        The last arguments of the compiled ``emended_linear``, or None where that op does not serve such calls.
    """
    backend = dispatch.select(options.backend, x)
    plan = cost.plan(x, has_bias, outputs, options, backend.LIMITS.fused_rows if need_weight else 0)
    return (plan.form, plan.applied_to, *options.ridge, *plan.type) if serves_whole(backend, plan) else None


if ops.module is not None:
    ops.module.set_planner(compiled_plan)


def emended_weight_grad(
    x: Tensor, dy: Tensor, *, bias: bool = True, **options: Unpack[OptionsDict]
) -> tuple[Tensor, Tensor | None]:
    """Compute the emended gradients of a linear layer, ``dw = dy^T (x x^T + c I)^-1 x`` and ``db``.

    Args:
        x: The layer's input, ``[..., I]``.
        dy: The loss's gradient with respect to the layer's output, ``[..., O]``, of x's type.
        bias: Whether the layer has a bias. Every row of ``x`` then has one more input that is always 1.
        **options: The fields of `consequentialism.Options`. ``scale="nlms"`` multiplies by ``samples`` where that is
            given, else by the number of rows.

    Returns:
        ``dw [O, I]`` and ``db [O]`` or None, in x's type.

    Raises:
        TypeError, ValueError, RuntimeError: As `emended_linear`.
    """
    settings = options_from(options)
    check_floating("x", x)
    check_floating("dy", dy)
    if not isinstance(bias, bool):
        raise TypeError(f"bias must be True or False, got {bias!r} ({type(bias).__name__})")
    check_match("x", x, "dy", dy)
    if x.ndim == 0 or dy.ndim == 0 or x.shape[:-1] != dy.shape[:-1]:
        raise ValueError(
            f"x [..., I] and dy [..., O] must have the same leading dimensions, got x {list(x.shape)} "
            f"and dy {list(dy.shape)}"
        )
    rows, inputs, outputs = math.prod(x.shape[:-1]), x.shape[-1], dy.shape[-1]
    if rows == 0 and settings.process_group is None:
        return x.new_zeros(outputs, inputs), x.new_zeros(outputs) if bias else None
    with torch.no_grad(), full_precision(x.device.type):
        x, dy = x.reshape(rows, inputs), dy.reshape(rows, outputs)
        dw: Tensor | None
        if plain_path.is_traced(settings):
            dw, db = traced_ops.linear_weight_grad(x, dy, bias, settings)
        else:
            backend = dispatch.select(settings.backend, x)
            plan = None
            if settings.process_group is None:
                plan = cost.plan(x, bias, outputs, settings, backend.LIMITS.fused_rows)
            prepared = prepare(x, bias, outputs, settings, backend, True, bias, plan)
            dw, db = prepared.weight_grad(x, dy, backend, True, bias)
        assert dw is not None
        by = ratio(settings, rows, x) if settings.process_group is None else None
        if by is not None:
            dw, db = scaled(dw, by), None if db is None else scaled(db, by)
        return dw, db


def predict_change(x: Tensor, dw: Tensor, db: Tensor | None = None) -> Tensor:
    """Compute the consequence of an update, ``x dw^T + db``.

    A step ``W <- W - lr*dw``, ``b <- b - lr*db`` changes the layer's output by ``-lr`` times this.

    Args:
        x: The layer's input, ``[N, I]`` or with more leading dimensions.
        dw: ``[O, I]``.
        db: ``[O]`` or None.

    Returns:
        ``[N, O]``, or with x's leading dimensions.

    Raises:
        TypeError, ValueError: As `emended_linear`.
    """
    check_linear(x, dw, db, names=("dw", "db"))
    return reference.predict_change(x, dw, db)


def autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors as autocast would hand them to `torch.nn.functional.linear`."""
    device = tensors[0].device.type if isinstance(tensors[0], Tensor) else "cpu"
    if not autocasts(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    castable = (torch.float16, torch.bfloat16, torch.float32)
    return tuple(t.to(dtype) if isinstance(t, Tensor) and t.dtype in castable else t for t in tensors)
