"""The optimizer inside, a few weights at a time: steps of our own with torch's numbers and less memory.

A rule takes what the optimizer sees of some parameters, ``g S``, keeps torch's own state, and gives what it wants to
add to their coordinates. It may write to the gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _torch

Group = dict[str, Any]


class Entry(NamedTuple):
    """A parameter, its gradient as the optimizer sees it, torch's state of it and its group."""

    parameter: Tensor
    gradient: Tensor
    state: dict[str, Any]
    group: Group


Rule = Callable[[Sequence[Entry]], list[Tensor]]


def local(tensor: Any) -> Tensor:
    """This rank's part."""
    return tensor.to_local() if _torch.is_dtensor(tensor) else tensor


def rule_for(optimizer: torch.optim.Optimizer) -> Rule | None:
    """Our own step for exactly torch's SGD, RMSprop, Adam, AdamW and Muon; None for others."""
    plain = {torch.optim.SGD: sgd, torch.optim.RMSprop: rmsprop, torch.optim.Adam: adam, torch.optim.AdamW: adam}
    if hasattr(torch.optim, "Muon"):
        plain[torch.optim.Muon] = muon
    return plain.get(type(optimizer), getattr(optimizer, "emended_rule", None))


def rule_in(rule: Rule, group: Group) -> Rule:
    """The rule of one group, where a rule serves groups of several kinds."""
    return (muon if group["use_muon"] else adam) if rule is muon_with_adam else rule


def sgd(entries: Sequence[Entry]) -> list[Tensor]:
    """SGD's steps."""
    return [_sgd(*entry) for entry in entries]


def _sgd(parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: Group) -> Tensor:
    """``-lr * m`` with torch's momentum, dampening and Nesterov's form; without momentum ``-lr * g``."""
    if group["maximize"]:
        gradient.neg_()
    momentum = group["momentum"]
    if momentum != 0:
        kept = state.get("momentum_buffer")
        if kept is None:
            state["momentum_buffer"] = torch.empty_like(parameter)
            kept = local(state["momentum_buffer"]).copy_(gradient)
        else:
            kept = local(kept).mul_(momentum).add_(gradient, alpha=1 - group["dampening"])
        gradient = gradient.add_(kept, alpha=momentum) if group["nesterov"] else kept
    return gradient * -group["lr"]


def rmsprop(entries: Sequence[Entry]) -> list[Tensor]:
    """RMSprop's steps without their decay."""
    return [_rmsprop(*entry) for entry in entries]


def _rmsprop(parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: Group) -> Tensor:
    names = {"square_avg": True, "momentum_buffer": group["momentum"] > 0, "grad_avg": group["centered"]}
    if "step" not in state:
        device = gradient.device if group["capturable"] else "cpu"
        state["step"] = torch.zeros((), dtype=_count_dtype(), device=device)
        kept = [name for name, there in names.items() if there]
        state.update({name: torch.zeros_like(parameter, memory_format=torch.preserve_format) for name in kept})
    state["step"] += 1
    if group["maximize"]:
        gradient.neg_()
    alpha = group["alpha"]
    square = local(state["square_avg"]).mul_(alpha).addcmul_(gradient, gradient, value=1 - alpha)
    if names["grad_avg"]:
        mean = local(state["grad_avg"]).lerp_(gradient, 1 - alpha)
        square = square.addcmul(mean, mean, value=-1)
    change = gradient.div_(square.sqrt().add_(group["eps"]))
    if names["momentum_buffer"]:
        change = local(state["momentum_buffer"]).mul_(group["momentum"]).add_(change)
    return change * -group["lr"]


def adam(entries: Sequence[Entry]) -> list[Tensor]:
    """Adam's and AdamW's steps without their decay: by torch's fused kernel where it serves."""
    for entry in entries:
        _begin_adam(*entry)
    one_group = all(entry.group is entries[0].group for entry in entries)
    if not (one_group and all(_is_fused(*entry) for entry in entries)):
        return [_adam(*entry) for entry in entries]
    changes = [torch.zeros_like(entry.gradient) for entry in entries]
    _fused_adamw_(changes, entries, 0.0)
    return changes


def adamw_(entries: Sequence[Entry]) -> list[Entry]:
    """AdamW's steps on the parameters of one group; those are left that torch's fused kernel does not serve."""
    for entry in entries:
        _begin_adam(*entry)
    served = [entry for entry in entries if _is_fused(*entry)]
    if served:
        decay = float(served[0].group["weight_decay"])
        _fused_adamw_([local(entry.parameter) for entry in served], served, decay)
    return [entry for entry in entries if not _is_fused(*entry)]


def _begin_adam(parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: Group) -> None:
    """Torch's state, where there is none."""
    if "step" in state:
        return
    on_device = group["capturable"] or group["fused"]
    dtype = torch.float32 if group["fused"] else _count_dtype()
    state["step"] = torch.zeros((), dtype=dtype, device=gradient.device if on_device else "cpu")
    state.update({name: torch.zeros_like(parameter, memory_format=torch.preserve_format) for name in _moments(group)})


def _count_dtype() -> torch.dtype:
    """The type of torch's counts of steps."""
    return torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32


def _moments(group: Group) -> tuple[str, ...]:
    return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")[: 3 if group["amsgrad"] else 2]


def _is_fused(parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: Group) -> bool:
    """Whether torch's fused kernel for the CPU serves: it keeps scalars in float32, and knows no strides."""
    if gradient.device.type != "cpu" or gradient.dtype != torch.float32 or group["fused"] is False:
        return False
    if group["capturable"] or state["step"].dtype != torch.float32:
        return False
    tensors = [local(parameter), gradient, *[local(state[name]) for name in _moments(group)]]
    return all([own.dtype == torch.float32 and own.is_contiguous() for own in tensors])


def _fused_adamw_(weights: list[Tensor], entries: Sequence[Entry], decay: float) -> None:
    """Steps of ``weights`` with the states, gradients and group of the entries."""
    group = entries[0].group
    gradients, steps = [entry.gradient for entry in entries], [entry.state["step"] for entry in entries]
    for step in steps:
        step += 1
    moments = [[local(entry.state[name]) for entry in entries] for name in _moments(group)]
    _torch.fused_adamw_(weights, gradients, moments, steps, group, decay)


def _adam(parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: Group) -> Tensor:
    if group["maximize"]:
        gradient.neg_()
    state["step"] += 1
    on_host = state["step"].device.type == "cpu" and not group["capturable"]
    step = state["step"].item() if on_host else state["step"]
    beta1, beta2 = group["betas"]
    mean = local(state["exp_avg"]).lerp_(gradient, 1 - beta1)
    square = local(state["exp_avg_sq"]).mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    if group["amsgrad"]:
        square = torch.maximum(local(state["max_exp_avg_sq"]), square, out=local(state["max_exp_avg_sq"]))
    first, second = 1 - beta1**step, 1 - beta2**step
    root = second.sqrt() if isinstance(second, Tensor) else math.sqrt(second)
    denominator = torch.sqrt(square, out=gradient).div_(root).add_(group["eps"])
    return torch.div(mean, denominator, out=denominator).mul_(-group["lr"] / first)


def muon_with_adam(entries: Sequence[Entry]) -> list[Tensor]:
    """Muon's or Adam's steps without their decay, as the group's ``use_muon`` says; a bias has the weight's."""
    return rule_in(muon_with_adam, entries[0].group)(entries)


def muon(entries: Sequence[Entry]) -> list[Tensor]:
    """Muon's steps without their decay."""
    return [_muon(*entry) for entry in entries]


def _muon(parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: Group) -> Tensor:
    """A step without its decay: ``-lr * orthogonalised(m)``, of a matrix or a convolution's as a matrix."""
    if "momentum_buffer" not in state:
        state["momentum_buffer"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    momentum = group["momentum"]
    kept = local(state["momentum_buffer"]).lerp_(gradient, 1 - momentum)
    wanted = gradient.lerp_(kept, momentum) if group["nesterov"] else kept
    shard: Any = None
    if _torch.is_dtensor(parameter):
        from .units import Shard

        shard = Shard(parameter)
        wanted = shard.gathered(wanted)
    matrix = wanted.flatten(1)
    parts = group.get("parts", 1)
    update = torch.cat([_orthogonal_step(part, group) for part in matrix.chunk(parts)]) if parts > 1 else None
    update = _orthogonal_step(matrix, group) if update is None else update
    update = update.view(wanted.shape)
    return update if shard is None else shard.own(update)


def _orthogonal_step(matrix: Tensor, group: Group) -> Tensor:
    rate = -group["lr"] * size_factor(matrix.shape, group["adjust_lr_fn"])
    return orthogonalised(matrix, group["ns_coefficients"], group["ns_steps"], group["eps"]).mul_(rate)


def size_factor(shape: torch.Size, adjust: str | None) -> float:
    """The factor of Muon's rate for a matrix ``[O, I]``, as torch's."""
    outputs, inputs = shape
    if adjust == "match_rms_adamw":
        return 0.2 * math.sqrt(max(outputs, inputs))
    return math.sqrt(max(1, outputs / inputs))


def orthogonalised(matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Muon's ``U V^T`` of ``matrix = U D V^T``, roughly, by Newton and Schulz's quintic iteration.

    On a GPU in bfloat16, as torch's; elsewhere in the matrix's type, float32 for half-precision types.
    """
    a, b, c = coefficients
    half = matrix.device.type == "cuda" and matrix.dtype != torch.float64
    wide = matrix.float() if matrix.dtype in (torch.float16, torch.bfloat16) else matrix
    work = matrix.bfloat16() if half else wide
    tall = matrix.shape[0] > matrix.shape[1]
    work = work.mT if tall else work
    work = work / work.norm().clamp(min=eps)
    for _ in range(steps):
        gram = work @ work.mT
        work = torch.addmm(work, torch.addmm(gram, gram, gram, beta=b, alpha=c), work, beta=a)
    work = work.mT if tall else work
    return work.to(matrix.dtype)
