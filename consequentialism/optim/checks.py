"""Checks of `Emended`'s arguments and layers: an error names the argument, the value and what is allowed."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .. import _torch
from ..errors import shown
from ..nn.module import EmendedModule
from ..options import as_count, as_number, check_choice
from ..solve.root import KINDS
from .memory import KEYS
from .outputs import KEYS as OUTPUT_KEYS
from .record import FOLLOW
from .rules import UNKNOWN, Rule, decay_of, rule_of, why_refused
from .units import Unit


def check_optimizer(optimizer: Any) -> None:
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {shown(optimizer)}")
    refused, name = why_refused(optimizer), type(optimizer).__name__
    if refused is not None:
        raise ValueError(f"optimizer: {name} cannot be stepped in coordinates, for {refused}")
    if any(group.get("differentiable") for group in optimizer.param_groups):
        raise ValueError("optimizer: differentiable=True cannot be stepped in coordinates")


def check_model(model: Any, filter_fn: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {shown(model)}")
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"filter_fn must be callable or None, got {filter_fn!r} ({type(filter_fn).__name__})")


def checked_numbers(
    damping: Any, exponent: Any, memory: Any, refresh_every: Any, block: Any
) -> tuple[float, float | None, float, int | None, int | None]:
    """The arguments of these names as Python's own numbers."""
    damping, memory = as_number("damping", damping), as_number("memory", memory)
    exponent = None if exponent is None else as_number("exponent", exponent, "a number or None")
    if not damping > 0:
        raise ValueError(f"damping must be above 0, got {damping!r}")
    if exponent is not None and not 0 < exponent <= 1:
        raise ValueError(f"exponent must be above 0 and at most 1, or None, got {exponent!r}")
    if not 0 <= memory < 1:
        raise ValueError(f"memory must be at least 0 and below 1, got {memory!r}")
    allowed = "an integer of at least 1 or None"
    every, most = (
        None if value is None else as_count(name, value, allowed)
        for name, value in (("refresh_every", refresh_every), ("block", block))
    )
    return damping, exponent, memory, every, most


def check_rate(name: str, lr: Any) -> None:
    """Raise unless ``lr`` is a finite number of at least 0, or a tensor with one element."""
    if isinstance(lr, Tensor):
        if lr.numel() != 1 or lr.requires_grad:
            raise ValueError(f"{name} must be a tensor with one element and without gradient, got {lr!r}")
        if lr.device.type != "cpu":
            return
        lr = lr.item()
    if not 0 <= as_number(name, lr, "a number or a tensor") < math.inf:
        raise ValueError(f"{name} must be finite and at least 0, got {lr!r}")


def check_root(root: str, exponent: float) -> None:
    """Raise where there is no such root, or none of that exponent."""
    check_choice("root", root, KINDS)
    if root == "cholesky" and exponent != 0.5:
        raise ValueError(
            f"root='cholesky' needs exponent=0.5, got exponent {exponent!r} (1/4 is the default of optimizers that "
            "orthogonalise)"
        )


def check_process_group(group: Any) -> None:
    if group is None or (isinstance(group, str) and group == "auto"):
        return
    if isinstance(group, str) or not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        raise TypeError(
            f"process_group must be 'auto', None or a process group, got {group!r} ({type(group).__name__})"
        )


def check_shard_state(shard_state: Any, group: Any, optimizer: torch.optim.Optimizer) -> None:
    """Raise where nothing can be divided among ranks, or a rank may need a root while the others do not send it."""
    if not isinstance(shard_state, bool):
        raise TypeError(f"shard_state must be True or False, got {shard_state!r} ({type(shard_state).__name__})")
    if not shard_state:
        return
    if group is None:
        raise ValueError("shard_state=True divides the state among ranks, of which process_group=None has one")
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            "shard_state=True divides the state among the ranks of torch.distributed, which is not initialised: call "
            "torch.distributed.init_process_group first"
        )
    if rule_of(optimizer).reads == "position":
        raise ValueError(
            f"shard_state=True: {type(optimizer).__name__} moves the weights in train() and eval(), which one rank may "
            "call alone, and needs every root for it"
        )


def checked_outputs(exponent: Any, damping: Any) -> tuple[float, float]:
    """``output_exponent`` and ``output_damping`` as Python's own numbers."""
    exponent, damping = as_number("output_exponent", exponent), as_number("output_damping", damping)
    if not 0 <= exponent <= 1:
        raise ValueError(f"output_exponent must be at least 0 and at most 1, got {exponent!r}")
    if not (damping > 0 and math.isfinite(damping)):
        raise ValueError(f"output_damping must be above 0 and finite, got {damping!r}")
    return exponent, damping


def check_outputs(exponent: float, input_damping: float, shard_state: bool) -> None:
    """Raise where roots of outputs are asked for that nothing makes."""
    if exponent and math.isinf(input_damping):
        raise ValueError(f"output_exponent must be 0 with damping=inf, the plain optimizer, got {exponent!r}")
    if exponent and shard_state:
        raise ValueError(
            f"output_exponent must be 0 with shard_state=True, which divides no roots of outputs, got {exponent!r}"
        )


def check_weights(units: Sequence[Unit]) -> None:
    moved = [unit.name for unit in units if unit.weight is not unit.own]
    if moved:
        raise RuntimeError(
            f"consequentialism.optim.Emended: the weights of {', '.join(map(repr, moved[:5]))} were replaced or tied "
            "after it was made; make the optimizer then"
        )


def check_moved(units: Sequence[Unit], states: Mapping[Any, Any]) -> None:
    """Raise where a weight has another type or device than at its last step, and state was left behind.

    After `check_weights`, by which the weights are those that they were. Roots of another type alone serve on: products
    are in their type. State of the weight's shape tells, and other state where there is none, as Adafactor's rows and
    columns: beside a quantized moment there are scales that are float32 whatever the weight is.
    """
    for unit in units:
        weight = unit.own
        before, now = unit.stepped_as, (weight.dtype, weight.device)
        if before is None or before == now:
            continue
        kept = [
            value
            for key, value in states.get(weight, {}).items()
            if isinstance(value, Tensor) and value.ndim and key not in (*KEYS, *OUTPUT_KEYS)
        ]
        telling = [value for value in kept if value.shape == weight.shape] or kept
        if any((value.dtype, value.device) == before for value in telling) or before[1] != now[1]:
            raise RuntimeError(
                f"consequentialism.optim.Emended: layer {unit.name!r} was {before[0]} on {before[1]} at its last step "
                f"and is {now[0]} on {now[1]} now, where the optimizer's state did not follow: {FOLLOW}"
            )


def check_converted(units: Sequence[Unit]) -> None:
    converted = [unit.name for unit in units if isinstance(unit.module, EmendedModule)]
    if converted:
        raise ValueError(
            f"model: layers {', '.join(map(repr, converted[:5]))} are emended by consequentialism.convert already, and "
            "a gradient is emended once; consequentialism.revert(model) first, or leave them out by filter_fn"
        )


def check_decay(units: Sequence[Unit], groups: Mapping[int, Any], rule: Rule, name: str) -> None:
    """Whether the weight decay of the units' groups, by the ids of their parameters, can act on ``W``.

    An optimizer of which nothing is known is announced.
    """
    for parameter in [p for unit in units for p in (unit.weight, unit.bias) if p is not None]:
        decay_of(rule, groups[id(parameter)], name)
    if rule is UNKNOWN:
        warnings.warn(
            f"consequentialism.optim.Emended: nothing is known of {name}, and it is taken for one that adds to a "
            "parameter whatever its value, as Adam does. One that reads the weights' size, as Adafactor, or keeps "
            f"other positions, as Prodigy, would step wrongly: say once which it is by "
            f"consequentialism.optim.declare({name}, decay=..., reads='change', 'weights' or 'position')",
            UserWarning,
            stacklevel=4,
        )


def check_one_process(units: Sequence[Unit], model: nn.Module, process_group: Any) -> None:
    wrapped = any(isinstance(module, DistributedDataParallel) for module in model.modules())
    sharded = any(_torch.is_dtensor(unit.weight) for unit in units)
    if process_group is None and (wrapped or sharded):
        which = "DistributedDataParallel" if wrapped else "a device mesh"
        raise ValueError(
            f"process_group must not be None with {which}: replicas with roots of their own would drift apart; use "
            "process_group='auto'"
        )


def warn_of_other_coordinates(saved: Mapping[Any, Any], loaded: bool, rooted: bool, output_exponent: float) -> None:
    """Announce a state whose moments are in other coordinates than the optimizer that loads it.

    Args:
        saved: Each parameter's state.
        loaded: Whether there are coordinates in it that are taken.
        rooted: Whether the optimizer has layers in coordinates.
        output_exponent: Its own.
    """
    states = [state for state in saved.values() if isinstance(state, dict)]
    plain = not any("root" in state for state in states)
    with_outputs = any("output_root" in state for state in states)
    if saved and not loaded and plain == rooted:
        what = "plain optimizer" if plain else "optimizer in coordinates"
        now = "the coordinates begin anew" if plain else "moments in its coordinates are taken for plain ones"
        message = f"the {what} saved this state; {now}"
    elif loaded and with_outputs != (output_exponent != 0):
        message = (
            f"an optimizer {'with' if with_outputs else 'without'} an output_exponent saved this state, here it is "
            f"{output_exponent}; moments in its coordinates are taken for those in ours"
        )
    else:
        return
    warnings.warn(f"consequentialism.optim.Emended: {message}", UserWarning, stacklevel=4)


def warn_of_unseen(names: Sequence[str], stacklevel: int) -> None:
    """Warn of the layers named, of which no rank has recorded an input."""
    if names:
        warnings.warn(
            f"consequentialism.optim.Emended has seen no input of {', '.join(map(repr, names))}, which have gradients: "
            "their own forward did not run, ran in eval mode or without a row, was compiled before the optimizer was "
            "made, or had inputs whose Gram or root is not finite. They are stepped plainly",
            UserWarning,
            stacklevel=stacklevel,
        )
