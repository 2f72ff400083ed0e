"""When an emended layer takes torch's own forward: where nothing is recorded, and in exported or traced models."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from .. import _torch
from ..options import Options

if TYPE_CHECKING:
    from ..nn.module import EmendedModule

EXPORT_WARNING = (
    "consequentialism: torch's own layers stand in this exported program, so training it uses the plain gradient, not "
    "the emended one. Train the model itself and export it afterwards; export under torch.no_grad() what is for "
    "inference only"
)


def is_plain(layer: EmendedModule, input: Any) -> bool:
    """Whether torch's own forward serves this call."""
    if is_exported() or isinstance(input, Proxy):
        return True
    if _torch.transforms_active():  # a wrapper's requires_grad says nothing about the outer levels
        return False
    return not (torch.is_grad_enabled() and is_trained(layer))


def is_exported(trained: bool = False) -> bool:
    """Whether the model is exported or traced just now; a warning then says what becomes of what is ``trained``."""
    if torch.compiler.is_compiling():
        if not _torch.is_exporting():
            return False
        if trained:
            from torch._dynamo.comptime import comptime

            comptime(_announce, _announce)
        return True
    if not torch.jit.is_tracing():
        return False
    if trained:
        _announce()
    return True


def is_traced(options: Options) -> bool:
    """Whether a compiler traces this call, and can: the ranks of a process group meet elsewhere."""
    return torch.compiler.is_compiling() and options.process_group is None


def is_trained(layer: EmendedModule) -> bool:
    """Whether weight or bias may want a gradient; one that is computed or replaced may."""
    parameters = layer._parameters
    weight = parameters.get(layer.weight_name)
    if weight is None or weight.requires_grad:
        return True
    bias = parameters.get(layer.bias_name)
    return bias is not None and bias.requires_grad


def plain_forward(layer: EmendedModule, input: Any, forward: Callable[[Tensor], Tensor]) -> Any:
    """``forward(input)``, torch's own, where `is_plain`.

    Raises:
        TypeError, ValueError: What torch refuses, in this package's words where it has any.
    """
    if isinstance(input, Proxy):
        return leaf(layer, input)
    is_exported(torch.is_grad_enabled() and is_trained(layer))
    if torch.compiler.is_compiling():
        return forward(input)
    try:
        return forward(input)
    except Exception:
        layer.check_input(input)
        raise


def leaf(layer: EmendedModule, input: Proxy, *more: Any) -> Any:
    """A call of the layer itself in the graph of ``torch.fx``, as of torch's own layers.

    A model that is one emended layer has no name that a graph could call: it is traced as the ``layer`` of a module,
    which takes its place as ``tracer.root``.
    """
    tracer: Any = input.tracer
    if type(tracer).__module__.startswith(("torch.ao.", "torchao.")):
        raise TypeError(refusal(layer, "a quantiser"))
    owner = next(base for base in type(layer).__mro__ if "forward" in vars(base))
    if not (owner.__module__.startswith("consequentialism.") or "_emended_form" in vars(owner)):
        raise TypeError(
            f"consequentialism: torch.fx would trace the forward of {owner.__name__}, a subclass of an emended layer, "
            "and run it once more with the layer: hold the emended layer as a submodule instead, use a Tracer whose "
            "is_leaf_module is True for emended layers, or call consequentialism.revert(model) first"
        )
    if tracer.root is layer:
        tracer.root = nn.Module().train(layer.training)
        tracer.root.add_module("layer", layer)
        tracer.submodule_paths = {module: name for name, module in tracer.root.named_modules()}
    elif layer._forward_hooks or layer._forward_pre_hooks:
        raise TypeError(
            f"consequentialism: torch.fx would trace the hooks of an emended layer ({type(layer).__name__}) and run "
            "them once more with it: remove them, use a Tracer whose is_leaf_module is True for emended layers, or "
            "call consequentialism.revert(model) first"
        )
    return tracer.create_proxy("call_module", tracer.path_of_module(layer), (input, *more), {})


def call(input: Proxy, function: Callable[..., Any], arguments: tuple[Any, ...], options: Mapping[str, Any]) -> Any:
    """A call of a function of this package in the graph of ``torch.fx``."""
    return input.tracer.create_proxy("call_function", function, arguments, dict(options))


def refusal(layer: object, rewriter: str) -> str:
    """What to do before a tool that knows torch's own classes only."""
    return (
        f"{rewriter} does not know emended layers ({type(layer).__name__}): call consequentialism.revert(model) first, "
        "which gives torch's own classes with the same parameters"
    )


class _Nothing:
    """The state in which nothing has been announced so far."""


_announced: weakref.ref[Any] = weakref.ref(_Nothing())  # what traced when the last warning was given


def _announce(_: object = None) -> None:
    """Warn, once in an export or trace. With an argument, called by torch.compile's tracer."""
    global _announced
    current = _torch.tracer()
    if current is not None and current is _announced():
        return
    if current is not None:
        _announced = weakref.ref(current)
    warnings.warn(EXPORT_WARNING, UserWarning, stacklevel=2)
