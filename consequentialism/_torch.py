"""torch's private parts under names that say what they do: a release that moves them breaks this file alone."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx import _symbolic_trace

SECOND_DERIVATIVE = (  # csrc/autograd.cpp says the same
    "consequentialism: trying to differentiate twice an emended gradient, which is @once_differentiable: it has no "
    "derivative. consequentialism.revert(model) gives back torch's own layers, whose gradients have one"
)

FORWARD_MODE = (
    "consequentialism: an emended layer has no forward-mode derivative (torch.func.jvp, jacfwd, hessian, linearize); "
    "consequentialism.revert(model) gives back torch's own layers, which have one"
)
JACOBIAN = (
    "consequentialism: an emended gradient is no row of a Jacobian, so torch.func.jacrev, and vmap over a vjp, cannot "
    "be taken over the parameters of an emended layer; consequentialism.revert(model) gives back torch's own layers"
)


def is_exporting() -> bool:
    """Whether torch.export runs. Under torch.compile, torch 2.11 answers its public question with True always."""
    return torch.compiler._is_exporting_flag


def is_traced_by_fx() -> bool:
    """Whether `torch.fx.symbolic_trace` runs, to which parameters are names."""
    return _symbolic_trace._is_fx_tracing_flag


def tracer() -> Any:
    """What traces or fakes this call, by `torch.jit.trace`, torch.compile or torch.export; None: nothing."""
    found = torch._C._get_tracing_state() or torch._guards.TracingContext.try_get()
    return found or torch._guards.detect_fake_mode()


def transforms_active() -> bool:
    """Whether a torch.func transform is running."""
    return torch._C._are_functorch_transforms_active()


def transform_levels() -> tuple[tuple[Any, int], ...]:
    """The kind and the number of every torch.func transform that is running, the outermost first."""
    stack = torch._C._functorch.get_interpreter_stack() or []
    return tuple((level.key(), level.level()) for level in stack)


def grad_levels() -> int:
    """How many of the running torch.func transforms record gradients."""
    return sum(kind == torch._C._functorch.TransformType.Grad for kind, _ in transform_levels())


def new_vmap_level(levels: Sequence[tuple[Any, int]]) -> bool:
    """Whether a vmap is running that is not one of ``levels``, as `transform_levels` gave them."""
    return any(
        level not in levels and level[0] == torch._C._functorch.TransformType.Vmap for level in transform_levels()
    )


def tangents_exist() -> bool:
    """Whether there may be tensors with a tangent of forward-mode differentiation."""
    return forward_ad._current_level >= 0


def is_dual(tensor: Tensor | None) -> bool:
    """Whether a tensor carries a tangent of forward-mode differentiation."""
    return tangents_exist() and tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None


def will_run(node: Any) -> bool:
    """Whether the backward that is running will come to this node of the graph."""
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # torch's way to say that torch.autograd.grad asks for the gradient of this leaf
        return True


def is_asked_for(leaf: Any) -> bool:
    """Whether the backward that is running is `torch.autograd.grad`, asked for the gradient of this leaf's node."""
    try:
        torch._C._will_engine_execute_node(leaf)
    except RuntimeError:
        return True
    return False


def needed_gradients(ctx: Any, count: int) -> tuple[bool, ...]:
    """Whether the running backward needs the gradient of each of the first ``count`` inputs of a Function.

    ``ctx.needs_input_grad`` says what forward could have been asked for: more than `torch.autograd.grad` of one input.
    """
    needed = ctx.needs_input_grad[:count]
    if torch.compiler.is_compiling() or transforms_active() or not backward_is_running():
        return needed
    edges = ctx.next_functions  # of tensors alone: a bias that is None has none
    return tuple(need and will_run(edges[i][0]) for i, need in enumerate(needed))


def backward_is_running() -> bool:
    """Whether the autograd engine is; compiled autograd runs what the engine would have, without it."""
    return torch._C._current_graph_task_id() != -1


def backward_number() -> int:
    """The number of the backward that is running."""
    return torch._C._current_graph_task_id()


def forbid_derivative(gradients: Sequence[Tensor | None], sources: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The gradients, whose own differentiation is an error with respect to whatever ``sources`` were computed from."""
    count = len(gradients) + len(sources)
    error: Any = torch._C._functions.DelayedError(SECOND_DERIVATIVE.encode(), count)  # type: ignore[attr-defined]
    fresh = (None if one is None else one.detach().requires_grad_() for one in gradients)
    return list(error(*fresh, *sources)[: len(gradients)])


def autograd_kernel(op: Any, backward: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel that `torch.library.register_autograd` would register, given its dispatch keys and the arguments."""
    from torch._library.autograd import Info, make_autograd_impl

    return make_autograd_impl(op, Info(backward, None))


def not_a_view(tensor: Tensor) -> Tensor:
    """A tensor with the same memory that autograd takes for no view."""
    return torch.ops.aten._unsafe_view.default(tensor, tensor.shape)


@functools.cache  # at the first use, because it imports the compiler
def outside_graphs(function: Callable[..., Any], reason: str) -> Callable[..., Any]:
    """The function, which torch.compile then never traces; ``reason`` is what a full graph's error says."""
    return torch.compiler.disable(function, reason=reason)


def has_kernel(operator: str, dispatch_key: str) -> bool:
    """Whether an operator such as ``consequentialism::damped_inverse`` has a kernel for a key such as ``CPU``."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(operator, dispatch_key)


def has_op(operator: str) -> bool:
    """Whether an operator such as ``consequentialism::damped_inverse`` is defined."""
    return torch._C._dispatch_has_kernel(operator)


def without_memory(cls: Any, like: Tensor) -> Any:
    """An instance of a subclass of Tensor with the shape, the type and the device of ``like``, and no memory."""
    return Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype, device=like.device)  # type: ignore[attr-defined]


def is_dtensor(tensor: Tensor) -> bool:
    """Whether a tensor is sharded; told by name, because the module of DTensor is slow to import."""
    return type(tensor).__name__ == "DTensor"


def constant_while_tracing(function: Callable[..., Any]) -> None:
    """`torch.compiler.assume_constant_result` without its import of the compiler."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]


def never_inlined(function: Any, reason: str) -> None:
    """Never trace a call of the function as a part of its caller's graph; ``reason`` is what a full graph's error says.

    Unlike `outside_graphs` it does not import the compiler, which may still trace the function on its own.
    """
    function._torchdynamo_disable = True
    function._torchdynamo_disable_msg = reason


def saved_tensors_have_hooks() -> bool:
    """Whether hooks of this thread, such as a checkpoint's, take over what a forward saves."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def version_witness(tensor: Tensor) -> Tensor | None:
    """A tensor without memory that shares the version of another, so that its ``_version`` tells of changes to that.

    None for tensors made in inference mode, which have no version.
    """
    if tensor.is_inference():
        return None
    witness = tensor.detach()
    witness.data = tensor.new_empty(0)
    return witness


def is_capturing() -> bool:
    """Whether a CUDA graph is being captured on the current stream."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def fused_adamw_(
    weights: list[Tensor],
    gradients: list[Tensor],
    moments: list[list[Tensor]],
    steps: list[Tensor],
    group: dict[str, Any],
    decay: float,
) -> None:
    """AdamW's step on weights of one type and device, by one kernel.

    Args:
        moments: The first and second ones and, with ``amsgrad``, the largest second ones.
        steps: How many there are, this one counted.
        group: Adam's options.
        decay: Instead of the group's ``weight_decay``.
    """
    beta1, beta2 = group["betas"]
    mean, square, *largest = moments
    torch._fused_adamw_(
        weights,
        gradients,
        mean,
        square,
        largest[0] if group["amsgrad"] else [],
        steps,
        lr=float(group["lr"]),
        beta1=float(beta1),
        beta2=float(beta2),
        weight_decay=decay,
        eps=float(group["eps"]),
        amsgrad=group["amsgrad"],
        maximize=group["maximize"],
    )
