"""What steps in coordinates must know of the optimizer inside: its weight decay, and what it reads of a parameter.

`known` has the table; here are what a user declares, and what an optimizer's groups and attributes say.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .known import KNOWN, Decay, Reads, Rule

DECAYS: tuple[Decay, ...] = ("coupled", "decoupled", "proximal", "within", "none")
READS: tuple[Reads, ...] = ("change", "weights", "position")
# What packages call an option that makes the decay decoupled.
_DECOUPLING = (
    "decoupled_weight_decay",
    "weight_decouple",
    "decouple_weight_decay",
    "decouple_wd",
    "decoupled_decay",
    "decoupled",
    "decouple",
    "adam_wd",
    "no_prox",
)
_INNER = ("optimizer", "base_optimizer", "optim")  # of an optimizer, the one that it wraps
_DECLARED: dict[type, Rule] = {}
UNKNOWN = Rule()


def declare(
    cls: type[torch.optim.Optimizer], *, decay: Decay, orthogonalises: bool = False, reads: Reads = "change"
) -> None:
    """Say to `Emended` what it must know of an optimizer's class, and of those derived from it.

    Args:
        cls: A subclass of `torch.optim.Optimizer`.
        decay: What ``weight_decay`` does: ``"coupled"``, it is added to the gradient; ``"decoupled"``, the weights are
            multiplied by ``1 - lr * weight_decay``; ``"proximal"``, weights and step are divided by ``1 + lr *
            weight_decay``, as Adan's; ``"within"``, it is a part of the update that the class scales, as LAMB's, and
            must be 0 in coordinates; ``"none"``, the class has none.
        orthogonalises: Whether its update is an orthogonal matrix, as Muon's; the exponent is then 1/4.
        reads: What it makes of a parameter's value: ``"change"``, nothing but adding to it; ``"weights"``, it reads
            their size, as Adafactor; ``"position"``, it keeps other positions beside it, as schedule-free optimizers.

    Raises:
        TypeError, ValueError: An argument of the wrong type or out of its range.
    """
    if not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)):
        raise TypeError(f"cls must be a subclass of torch.optim.Optimizer, got {cls!r} ({type(cls).__name__})")
    for name, value, allowed in (("decay", decay, DECAYS), ("reads", reads, READS)):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    if not isinstance(orthogonalises, bool):
        raise TypeError(f"orthogonalises must be True or False, got {orthogonalises!r}")
    _DECLARED[cls] = Rule(decay, orthogonalises, reads)


class Defaults(NamedTuple):
    """What an optimizer in coordinates takes where nothing else is said."""

    exponent: float
    refresh_every: int
    block: int


def defaults_of(rule: Rule) -> Defaults:
    """Measured on the character GPT: Adam needs a tenth more steps with roots refreshed five times less often, or in
    blocks of half the inputs; Muon does not."""
    return Defaults(0.25, 25, 128) if rule.orthogonalises else Defaults(0.5, 10, 256)


def rule_of(optimizer: torch.optim.Optimizer) -> Rule:
    """The rule of an optimizer: declared, or known of its class or the nearest of its bases; or `UNKNOWN`."""
    for base in type(optimizer).__mro__:
        if base in _DECLARED:
            return _DECLARED[base]
        rule = KNOWN.get((base.__module__.partition(".")[0], base.__qualname__))
        if rule is not None:
            own = any(getattr(optimizer, name, False) for name in rule.without)
            return rule._replace(decay=None) if own else _as_its_attributes_say(rule, optimizer)
    return UNKNOWN


def _as_its_attributes_say(rule: Rule, optimizer: torch.optim.Optimizer) -> Rule:
    """Apex and DeepSpeed keep the option outside of the groups."""
    mode = vars(optimizer).get("adam_w_mode")
    return rule if mode is None or rule.decay != "decoupled" or mode else rule._replace(decay="coupled")


def why_refused(optimizer: torch.optim.Optimizer) -> str | None:
    """Why an optimizer cannot be stepped in coordinates: its rule's reason, or, where nothing is known of it, what its
    methods and attributes say."""
    rule = rule_of(optimizer)
    if rule is not UNKNOWN:
        return rule.refused
    for name in _INNER:
        if isinstance(inner := vars(optimizer).get(name), torch.optim.Optimizer):
            return f"it wraps another optimizer: give the {type(inner).__name__} to Emended, and Emended to it"
    methods = type(optimizer)
    if hasattr(methods, "first_step") and hasattr(methods, "second_step"):
        return "it takes two gradients a step, at two places"
    if hasattr(methods, "update_hessian"):
        return KNOWN["pytorch_optimizer", "SophiaH"].refused
    closure = inspect.signature(methods.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        return KNOWN["torch", "LBFGS"].refused
    return None


def decay_of(rule: Rule, group: dict[str, Any], name: str) -> Decay:
    """How the ``weight_decay`` of a parameter group acts.

    Raises:
        ValueError: Nothing is known of it, or it cannot act beside steps in coordinates.
    """
    decay = group.get("weight_decay")
    if not _is_on(decay):
        return "none"
    acts = _act_of(decay, rule, group, name)
    if acts in ("decoupled", "proximal") and group.get("lr", 0) is None:
        raise ValueError(f"optimizer: weight_decay={decay!r} of {name} needs a learning rate; set lr, got None")
    return acts


def _act_of(decay: Any, rule: Rule, group: dict[str, Any], name: str) -> Decay:
    """How a ``weight_decay`` other than 0 acts."""
    option = next((key for key in rule.without if group.get(key)), None)
    if option is not None:
        raise ValueError(
            f"optimizer: it is not known what weight_decay={decay!r} of {name} is in coordinates with "
            f"{option}={group[option]!r}; set one of them to 0"
        )
    for option, only in rule.only_with:
        if option in group and group[option] != only:
            raise ValueError(
                f"optimizer: it is not known what weight_decay={decay!r} of {name} is in coordinates with "
                f"{option}={group[option]!r}; set {option} to {only!r} or weight_decay to 0"
            )
    if rule.reads == "position":
        raise ValueError(
            f"optimizer: weight_decay of {name} acts on several places in the coordinates; set it to 0, got {decay!r}"
        )
    key = next((key for key in _DECOUPLING if key in group), None)
    if key is not None and group[key]:
        return "decoupled"
    if rule.decay == "within":
        raise ValueError(
            f"optimizer: weight_decay={decay!r} of {name} is a part of the update that it scales, which is another one "
            "in coordinates; set it to 0"
        )
    if rule.decay == "coupled" and group.get("decouple_lr"):
        return "decoupled"
    if key is not None and rule.decay != "proximal":
        return "coupled"
    if rule.decay is None:
        raise ValueError(
            f"optimizer: it is not known what weight_decay={decay!r} does in {name}. Say it once by "
            f"consequentialism.optim.declare({name}, decay='decoupled') (or 'coupled', added to the gradient), or set "
            "it to 0"
        )
    return rule.decay


def share_of(decay: str, group: dict[str, Any]) -> Any:
    """The factor by which a decay of that kind multiplies the weights."""
    if decay == "proximal":
        return 1 / (2 - kept_share(group))
    return kept_share(group) if decay == "decoupled" else 1


def _is_on(decay: Any) -> bool:
    return isinstance(decay, Tensor) or bool(decay)


def kept_share(group: dict[str, Any]) -> Any:
    """The factor by which decoupled decay multiplies the weights."""
    if group.get("fixed_decay"):
        return 1 - group["weight_decay"]
    if group.get("decouple_lr"):  # optimi's
        return 1 - group["lr"] / group["max_lr"] * group["weight_decay"]
    return 1 - group["lr"] * group["weight_decay"]
