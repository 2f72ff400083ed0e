"""The ops of a traced emended layer: schemas, fakes, and implementations that are loaded when one is first called.

They are defined when the package is imported, because an exported program may name them in a process that has traced
nothing. `traced` has the implementations, and says what the ops are for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from .. import _torch
from ..options import DampingMode, Options, Scale, Solver
from .geometry import Geometry, geometry_of

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


def conv_weight_grad(x: Tensor, dy: Tensor, geometry: Geometry, bias: bool, options: Options) -> tuple[Tensor, Tensor]:
    """`functional.emended_conv_weight_grad` in a traced graph; ``db`` is empty without a bias."""
    arguments = (*geometry.arguments(), bias, options.patch_bytes, *settings_of(options))
    return torch.ops.consequentialism.emended_conv_weight_grad(x, dy, *arguments)


def linear_weight_grad(x: Tensor, dy: Tensor, bias: bool, options: Options) -> tuple[Tensor, Tensor | None]:
    """`functional.emended_weight_grad` in a traced graph."""
    dw, db = torch.ops.consequentialism.emended_weight_grad(x, dy, bias, True, bias, *settings_of(options))
    return dw, db if bias else None


def _fake_weight_grad(
    x: Tensor, dy: Tensor, bias: bool, need_weight: bool, need_bias: bool, *settings: Any
) -> tuple[Tensor, Tensor]:
    inputs, outputs = x.shape[-1], dy.shape[-1]
    return dy.new_empty((outputs, inputs) if need_weight else 0), dy.new_empty(outputs if need_bias else 0)


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


def _late(name: str) -> Callable[..., Any]:
    """The implementation of an op, from `traced`."""

    def implementation(*arguments: Any) -> tuple[Tensor, Tensor]:
        from . import traced

        return getattr(traced, name)(*arguments)

    return implementation


def _without_derivative(name: str) -> Callable[..., Any]:
    """The autograd kernel of an op that has no derivative, made when it is first called: making one is slow."""

    made: list[Callable[..., Any]] = []

    def kernel(keys: Any, *arguments: Any) -> Any:
        if not made:
            made.append(_torch.autograd_kernel(getattr(torch.ops.consequentialism, name).default, _refuse_derivative))
        return made[-1](keys, *arguments)

    return kernel


def _refuse_derivative(ctx: Any, *gradients: Tensor) -> None:
    raise RuntimeError(_torch.SECOND_DERIVATIVE)


def _define(name: str, arguments: str, fake: Callable[..., Any]) -> None:
    """Define an op of ``arguments`` and `SETTINGS` that returns ``dw`` and ``db``, and has no derivative."""
    _library.define(f"{name}({arguments}, {SETTINGS}) -> (Tensor, Tensor)")
    _library.impl(name, _late(name), "CompositeExplicitAutograd")
    _library.impl(name, fake, "Meta")
    _library.impl(name, _without_derivative(name), "Autograd", with_keyset=True)


_define("emended_weight_grad", "Tensor x, Tensor dy, bool bias, bool need_weight, bool need_bias", _fake_weight_grad)
_define(
    "emended_conv_weight_grad",
    "Tensor x, Tensor dy, SymInt[] kernel, SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups, "
    "bool transposed, SymInt[] output_padding, bool bias, SymInt patch_bytes",
    _fake_conv_weight_grad,
)
