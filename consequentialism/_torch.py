"""torch's private parts by what they do: a release of torch that moves them breaks this file alone."""

from __future__ import annotations

from typing import Any

import torch


def transforms_active() -> bool:
    """Whether a torch.func transform is running."""
    return torch._C._are_functorch_transforms_active()


def will_run(node: Any) -> bool:
    """Whether the backward that is running will come to this node of the graph."""
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # torch's way to say that torch.autograd.grad asks for the gradient of this leaf
        return True


def needed_gradients(ctx: Any, count: int) -> tuple[bool, ...]:
    """Of the first ``count`` inputs of an autograd Function, which gradients the backward that is running needs.

    ``ctx.needs_input_grad`` says what forward could have been asked for: more than `torch.autograd.grad` of one input.
    """
    needed = ctx.needs_input_grad[:count]
    if torch.compiler.is_compiling() or transforms_active() or not backward_is_running():
        return needed
    return tuple(need and will_run(node) for need, (node, _) in zip(needed, ctx.next_functions, strict=False))


def backward_is_running() -> bool:
    """Whether the autograd engine is; compiled autograd runs what the engine would have, without it."""
    return torch._C._current_graph_task_id() != -1
