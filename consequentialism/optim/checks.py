"""Checks of the arguments of `Emended`: an error names the argument, the value and what is allowed."""

from __future__ import annotations

import numbers
from typing import Any

import torch
import torch.distributed as dist

from .rules import rule_of


def check_optimizer(optimizer: Any) -> None:
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {optimizer!r} ({type(optimizer).__name__})")
    reason = rule_of(optimizer).refused
    if reason is not None:
        raise ValueError(f"optimizer: {type(optimizer).__name__} cannot be stepped in coordinates, for {reason}")
    if any(group.get("differentiable") for group in optimizer.param_groups):
        raise ValueError("optimizer: differentiable=True cannot be stepped in coordinates")


def check_numbers(damping: Any, exponent: Any, memory: Any, refresh_every: Any, block: Any) -> None:
    for name, value in (
        ("damping", damping),
        ("memory", memory),
        *([("exponent", exponent)] if exponent is not None else []),
    ):
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"{name} must be a number, got {value!r} ({type(value).__name__})")
    if not damping > 0:
        raise ValueError(f"damping must be above 0, got {damping!r}")
    if exponent is not None and not 0 < exponent <= 1:
        raise ValueError(f"exponent must be above 0 and at most 1, or None, got {exponent!r}")
    if not 0 <= memory < 1:
        raise ValueError(f"memory must be at least 0 and below 1, got {memory!r}")
    for name, value in (("refresh_every", refresh_every), ("block", block)):
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise TypeError(f"{name} must be an integer of at least 1 or None, got {value!r} ({type(value).__name__})")
        if value < 1:  # type: ignore[operator]
            raise ValueError(f"{name} must be at least 1, got {value!r}")


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
