"""True input gradients, emended weight and bias gradients: the one place that owns the derivative.

What depends on ``x`` alone is computed in forward (`prepare`); backward is stock matrix products (`kept`), so
compilers, graphs and transforms see nothing unusual.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import _torch
from ..backend import reference
from ..backend.protocol import Backend
from ..options import Options
from ..solve import conjugate, cost, distributed
from ..solve.cost import Plan
from .kept import Conjugate, FusedCall, Inverse, Kept, keep_emended, keep_inverse, restored

LARGEST_INVERSE = {torch.float32: 1e25, torch.float64: 1e200}  # kLargestInverse in csrc/autograd.cpp; see `in_range`


# Asked for once: torch.compile of torch 2.11 does not see through the question.
_AUTOCAST_DEVICES = frozenset(
    name
    for name in ("cpu", "cuda", "hpu", "ipu", "maia", "mps", "mtia", "privateuseone", "xla", "xpu")
    if torch.amp.is_autocast_available(name)
)


def autocasts(device_type: str) -> bool:
    """Whether autocast is on; some types of device, such as meta, know none."""
    return device_type in _AUTOCAST_DEVICES and torch.is_autocast_enabled(device_type)


def full_precision(device_type: str) -> AbstractContextManager[Any]:
    """Keeps autocast from computing with an inverse in a half type."""
    if autocasts(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def prepare(
    x: Tensor,
    bias: bool,
    outputs: int,
    options: Options,
    backend: Backend,
    need_weight: bool,
    need_bias: bool,
    plan: Plan | None = None,
) -> Kept:
    """Everything that does not depend on ``dy``.

    Args:
        x: ``[N, I]``, ``N > 0``, detached.
        bias: Whether the layer has a bias, which then stands in the Gram.
        outputs: ``O``.
        plan: As `cost.plan` has chosen it, or None to choose it here. Ranks that share a batch choose when they meet.
    """
    if options.process_group is not None:
        emended, column = distributed.emended_input(x, bias, outputs, options, backend)
        return keep_emended(emended, column, need_weight, need_bias)
    if plan is None:
        plan = cost.plan(x, bias, outputs, options)
    if plan.solver == "cg":
        system = conjugate.System(bias, options.ridge, options.iterations, plan.dtype)
        return Conjugate(system, system.gram(x, backend) if plan.gram == "stored" else None)
    if plan.applied_to == "fused":
        return FusedCall(bias, options.ridge)
    arguments = (x, bias, plan.form, *options.ridge, *plan.type)
    if plan.applied_to == "input":
        emended, column = backend.emended_input(*arguments)
        return keep_emended(emended, column, need_weight, need_bias)
    unit = None
    if not bias and options.damping_mode == "relative" and _torch.transforms_active():
        # Nobody can look there whether the inverse is in range, and only without a bias can that of x / unit be taken.
        unit = reference.unit_of(x, bias, options.damping_mode)
        arguments = (x / unit, *arguments[1:])
    inverse = backend.gram_inverse(*arguments)
    if unit is None and not in_range(inverse):
        emended, column = backend.emended_input(*arguments)
        return keep_emended(emended, column, need_weight, need_bias)
    return keep_inverse(Inverse(inverse, plan.form, None if options.scale == "gradient" else unit), x, need_weight)


def in_range(inverse: Tensor) -> bool:
    """Whether products with an inverse ``[n, n]`` neither overflow nor lose digits; True where the host cannot look.

    It is of the size of ``1 / x^2``, which may leave the type's range where the emended input, ``1 / x``, does not.
    """
    if inverse.device.type != "cpu" or type(inverse) is not Tensor or inverse.numel() == 0:
        return True
    if _torch.transforms_active():
        return True
    largest = LARGEST_INVERSE[inverse.dtype]
    least, most = torch.aminmax(inverse.diagonal())  # it is positive definite
    return 1 / largest < least.item() and most.item() < largest


def once_differentiable(backward: Callable[..., tuple[Tensor | None, ...]]) -> Callable[..., tuple[Tensor | None, ...]]:
    """Makes differentiating what ``backward`` returns an error.

    torch's decorator of that name does so only where ``dy`` has a history of its own. The input's gradient ``dy W``
    depends on ``W`` without one too, and would lose that term silently.

    Zeros stand for a ``dy`` that is None, which eager mode makes zeros of itself and compiled autograd hands on; the
    output's shape is then what `keep_output` kept.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            shape, dtype, device = ctx.output
            dy = torch.zeros(shape, dtype=dtype, device=device)
        with torch.no_grad():
            gradients = backward(ctx, dy)
        # torch.func asks for a graph always, and has its own refusal; a compiler's backward has no second one.
        transformed = torch.compiler.is_compiling() or _torch.transforms_active()
        if transformed or not torch.is_grad_enabled():
            return gradients
        return tuple(_torch.forbid_derivative(gradients, (dy,)))

    return wrapper


def keep_output(ctx: Any, output: Tensor) -> Tensor:
    """The output itself, whose gradient may be None; see `once_differentiable`."""
    ctx.output = output.shape, output.dtype, output.device
    return output


def refuse_jacobian(ctx: Any, first: int) -> None:
    """Raise where torch.func asks for a Jacobian with respect to an emended parameter.

    Args:
        ctx: Of a Function whose ``setup_context`` kept ``levels``.
        first: The place of the first parameter among its inputs; the second follows it.
    """
    if any(ctx.needs_input_grad[first : first + 2]) and _torch.new_vmap_level(ctx.levels):
        raise RuntimeError(_torch.JACOBIAN)


def plain_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`torch.nn.functional.linear` whose output is no view: views that a Function returns refuse in-place changes."""
    y = F.linear(x, weight, bias)
    return y if y.ndim == 2 else _torch.not_a_view(y)


@once_differentiable
def _linear_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, *tensors = ctx.saved_tensors
    needs_x, needs_weight, needs_bias = _torch.needed_gradients(ctx, 3)
    dw = db = None
    with full_precision(dy.device.type):
        dx = dy @ weight if needs_x else None
        if ctx.ready is not None:
            ctx.ready.wait(tensors)
        if needs_weight or needs_bias:
            rows = math.prod(dy.shape[:-1])
            flat_x = None if x is None else x.reshape(rows, x.shape[-1])
            flat_dy = dy.reshape(rows, dy.shape[-1])
            kept = restored(ctx.kind, ctx.static, *tensors)
            dw, db = kept.weight_grad(flat_x, flat_dy, ctx.backend, needs_weight, needs_bias)
    return dx, dw, db, *(None,) * 6


class EmendedLinear(torch.autograd.Function):
    """``x W^T + b`` with the true gradient of ``x`` and the emended gradients of ``W`` and ``b``.

    The arguments after the bias are the backend that serves backward, what that waits for (a `side_stream.Ready`, or
    None), and what forward keeps, flat.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        _save(ctx, inputs)
        return keep_output(ctx, plain_linear(*inputs[:3]))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return _linear_backward(ctx, dy)


class TransformableEmendedLinear(EmendedLinear):
    """`EmendedLinear` for torch.func's transforms, which want ``setup_context``; it costs some 20 us a call more."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> Tensor:  # type: ignore[override]
        return plain_linear(*inputs[:3])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _save(ctx, inputs)
        keep_output(ctx, output)
        ctx.levels = _torch.transform_levels()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        refuse_jacobian(ctx, 1)
        return _linear_backward(ctx, dy)

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Tensor:
        raise RuntimeError(_torch.FORWARD_MODE)


def _save(ctx: Any, inputs: tuple[Any, ...]) -> None:
    x, weight, _, ctx.backend, ctx.ready, *flat = inputs
    keep(ctx, x, weight, *flat)


def keep(
    ctx: Any, x: Tensor, weight: Tensor, kind: str, static: tuple[Any, ...], first: Tensor | None, second: Tensor | None
) -> None:
    """Save what backward reads; what forward keeps is given flat."""
    ctx.kind, ctx.static = kind, static
    kept_x = x if restored(kind, static, first, second).keeps_x() else None
    kept_weight = weight if ctx.needs_input_grad[0] else None
    ctx.save_for_backward(kept_x, kept_weight, first, second)
