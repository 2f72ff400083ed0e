"""True input gradients, emended weight and bias gradients: the one place that owns the derivative.

What depends on ``x`` alone is computed in forward (`prepare`); backward is stock matrix products
(`weight_grad`), so compilers, graphs and transforms see nothing unusual.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from . import _torch, conjugate, cost, distributed, reference
from .cost import Plan
from .options import DampingMode, Form, Options, Scale

LARGEST_INVERSE = {torch.float32: 1e25, torch.float64: 1e200}  # kLargestInverse in csrc/autograd.cpp; see `in_range`


class Fused(NamedTuple):
    """In the place of a form: all is left to one op in backward, which needs ``x`` and this."""

    bias: bool
    damping: float
    damping_mode: DampingMode
    scale: Scale


class Prepared(NamedTuple):
    """What forward keeps for `weight_grad`: ``inverse``, ``emended``, ``system`` or nothing, as the plan says."""

    form: Form | Fused
    inverse: Tensor | None = None  # [n, n]
    emended: Tensor | None = None  # [N, I]
    column: Tensor | None = None  # [N], the emended column of ones: db = dy^T column
    system: conjugate.System | None = None  # solved in backward
    gram: Tensor | None = None  # [n, n], the system's, where it is stored
    unit: Tensor | None = None  # 0-dimensional: the inverse is that of x / unit

    def keeps_x(self) -> bool:
        """Whether backward reads ``x``."""
        return self.inverse is not None or self.system is not None or isinstance(self.form, Fused)


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
    backend: Any,
    need_weight: bool,
    need_bias: bool,
    plan: Plan | None = None,
) -> Prepared:
    """Everything that does not depend on ``dy``.

    Args:
        x: ``[N, I]``, ``N > 0``, detached.
        bias: Whether the layer has a bias, which then stands in the Gram.
        outputs: ``O``.
        plan: As `cost.plan` has chosen it, or None to choose it here. Ranks that share a batch choose when they meet.
    """
    if options.process_group is not None:
        emended, column = distributed.emended_input(x, bias, outputs, options, backend)
        return keep_emended("dual", emended, column, need_weight, need_bias)
    if plan is None:
        plan = cost.plan(x, bias, outputs, options)
    if plan.solver == "cg":
        system = conjugate.System(bias, options)
        return Prepared(plan.form, system=system, gram=system.gram(x, backend) if plan.gram == "stored" else None)
    if plan.applied_to == "fused":
        return Prepared(Fused(bias, options.damping, options.damping_mode, options.scale))
    arguments = (x, bias, plan.form, options.damping, options.damping_mode, options.scale)
    if plan.applied_to == "input":
        emended, column = backend.emended_input(*arguments)
        return keep_emended(plan.form, emended, column, need_weight, need_bias)
    unit = None
    if (
        not bias
        and options.damping_mode == "relative"
        and (torch.compiler.is_compiling() or _torch.transforms_active())
    ):
        # Nobody can look there whether the inverse is in range, and only without a bias can that of x / unit be taken.
        unit = reference.unit_of(x, bias, options.damping_mode)
        arguments = (x / unit, *arguments[1:])
    inverse = backend.input_inverse(*arguments)
    if unit is None and not in_range(inverse):
        emended, column = backend.emended_input(*arguments)
        return keep_emended(plan.form, emended, column, need_weight, need_bias)
    kept = keep_inverse(plan.form, inverse, x, need_weight)
    return kept._replace(unit=None if options.scale == "gradient" else unit)


def in_range(inverse: Tensor) -> bool:
    """Whether products with an inverse ``[n, n]`` neither overflow nor lose digits; True where the host cannot look.

    It is of the size of ``1 / x^2``, which may leave the type's range where the emended input, ``1 / x``, does not.
    """
    if inverse.device.type != "cpu" or type(inverse) is not Tensor or inverse.numel() == 0:
        return True
    if torch.compiler.is_compiling() or _torch.transforms_active():
        return True
    largest = LARGEST_INVERSE[inverse.dtype]
    least, most = torch.aminmax(inverse.diagonal())  # it is positive definite
    return 1 / largest < least.item() and most.item() < largest


def keep_emended(form: Form, emended: Tensor, column: Tensor, need_weight: bool, need_bias: bool) -> Prepared:
    """What of an emended input, ``[N, I]`` and its column ``[N]``, is needed."""
    return Prepared(form, None, emended if need_weight else None, column if need_bias else None)


def keep_inverse(form: Form, inverse: Tensor, x: Tensor, need_weight: bool) -> Prepared:
    """What of an inverse ``[n, n]`` is needed: itself, or its part for the bias alone."""
    if need_weight:
        return Prepared(form, inverse)
    return Prepared(form, None, None, emended_ones(inverse, x, form))


def emended_ones(inverse: Tensor, x: Tensor, form: Form) -> Tensor:
    """The emended input's column for the bias alone, ``[N]``, from the inverse with the bias in it."""
    if form == "dual":
        return inverse.sum(1)
    border = inverse[-1]
    return x.to(inverse.dtype) @ border[:-1] + border[-1]


def weight_grad(
    prepared: Prepared, x: Tensor | None, dy: Tensor, backend: Any, need_weight: bool, need_bias: bool
) -> tuple[Tensor | None, Tensor | None]:
    """``dw [O, I]`` and ``db [O]``, each None where it is not needed.

    Args:
        x: ``[N, I]``; read only where ``prepared`` keeps it.
        dy: ``[N, O]``.
    """
    form, inverse, emended, column, system, gram, unit = prepared
    if isinstance(form, Fused):
        assert x is not None
        dw, db = backend.fused_weight_grad(x, dy, *form)
        return dw if need_weight else None, db if need_bias else None
    if system is not None:
        assert x is not None
        dw, db = conjugate.weight_grad(system, gram, x, dy, backend)
        return dw if need_weight else None, db if need_bias else None
    if inverse is not None and not need_weight:  # the bias's gradient alone
        assert x is not None
        column = emended_ones(inverse, x, form)
        inverse = None
    if inverse is None:
        emended = emended if need_weight else None
        column = column if need_bias else None
        if dy.shape[0] == 0:  # a rank without rows in a distributed batch; an empty column would mean no bias
            dw = None if emended is None else dy.new_zeros(dy.shape[1], emended.shape[1])
            return dw, None if column is None else dy.new_zeros(dy.shape[1])
        if emended is None:
            assert column is not None
            return None, backend.weight_grad(dy, column[:, None], column)[1]
        nothing = emended.new_empty(0)
        dw, db = backend.weight_grad(dy, emended, nothing if column is None else column)
        return dw, None if column is None else db
    assert x is not None
    ones = inverse.new_ones(x.shape[0] if need_bias else 0)
    if form == "dual":
        dw, db = backend.weight_grad(inverse @ dy, x, ones)  # P is symmetric: dw = (P dy)^T x
        return dw if unit is None else dw / unit / unit, db if need_bias else None
    has_bias = inverse.shape[0] > x.shape[1]
    plain, plain_bias = backend.weight_grad(dy, x, inverse.new_ones(x.shape[0] if has_bias else 0))
    if not has_bias:
        dw = plain @ inverse
        return dw if unit is None else dw / unit / unit, None
    border = inverse[-1, :-1]
    dw = torch.addr(plain @ inverse[:-1, :-1], plain_bias, border)
    return dw, plain @ border + plain_bias * inverse[-1, -1] if need_bias else None


def once_differentiable(backward: Callable[..., tuple[Tensor | None, ...]]) -> Callable[..., tuple[Tensor | None, ...]]:
    """Makes differentiating what ``backward`` returns an error.

    torch's decorator of that name does so only where ``dy`` has a history of its own. The input's gradient ``dy W``
    depends on ``W`` without one too, and would lose that term silently.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            gradients = backward(ctx, *grads)
        # torch.func asks for a graph always, and has its own refusal; a compiler's backward has no second one.
        transformed = torch.compiler.is_compiling() or _torch.transforms_active()
        if transformed or not torch.is_grad_enabled():
            return gradients
        return tuple(_torch.forbid_derivative(gradients, grads))

    return wrapper


def refuse_jacobian(ctx: Any, first: int) -> None:
    """Raise where torch.func asks for a Jacobian with respect to an emended parameter.

    Args:
        ctx: Of a Function whose ``setup_context`` kept ``levels``.
        first: The place of the first parameter among its inputs; the second follows it.
    """
    if any(ctx.needs_input_grad[first : first + 2]) and _torch.new_vmap_level(ctx.levels):
        raise RuntimeError(_torch.JACOBIAN)


def plain_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`torch.nn.functional.linear`, whose output is no view: one that a Function returned could not change in place."""
    y = F.linear(x, weight, bias)
    return y if y.ndim == 2 else _torch.not_a_view(y)


@once_differentiable
def _linear_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, inverse, emended, column, gram, unit = ctx.saved_tensors
    needs_x, needs_weight, needs_bias = _torch.needed_gradients(ctx, 3)
    dw = db = None
    with full_precision(dy.device.type):
        dx = dy @ weight if needs_x else None
        if needs_weight or needs_bias:
            rows = math.prod(dy.shape[:-1])
            flat_x = None if x is None else x.reshape(rows, x.shape[-1])
            prepared = Prepared(ctx.form, inverse, emended, column, ctx.system, gram, unit)
            flat_dy = dy.reshape(rows, dy.shape[-1])
            dw, db = weight_grad(prepared, flat_x, flat_dy, ctx.backend, needs_weight, needs_bias)
    return dx, dw, db, *(None,) * 8


class EmendedLinear(torch.autograd.Function):
    """``x W^T + b`` with the true gradient of ``x`` and the emended gradients of ``W`` and ``b``.

    The arguments after the bias are the backend that serves `weight_grad`, and those of `Prepared`.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        _save(ctx, inputs)
        return plain_linear(*inputs[:3])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return _linear_backward(ctx, dy)


class TransformableEmendedLinear(EmendedLinear):
    """The same for torch.func's transforms, which want ``setup_context``; it costs 80 us a call more."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> Tensor:  # type: ignore[override]
        return plain_linear(*inputs[:3])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _save(ctx, inputs)
        ctx.levels = _torch.transform_levels()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        refuse_jacobian(ctx, 1)
        return _linear_backward(ctx, dy)

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Tensor:
        raise RuntimeError(_torch.FORWARD_MODE)


def _save(ctx: Any, inputs: tuple[Any, ...]) -> None:
    x, weight, _, ctx.backend, *rest = inputs
    keep(ctx, x, weight, Prepared(*rest))


def keep(ctx: Any, x: Tensor, weight: Tensor, prepared: Prepared) -> None:
    """Save what backward reads."""
    ctx.form, inverse, emended, column, ctx.system, gram, unit = prepared
    kept_x = x if prepared.keeps_x() else None
    kept_weight = weight if ctx.needs_input_grad[0] else None
    ctx.save_for_backward(kept_x, kept_weight, inverse, emended, column, gram, unit)
