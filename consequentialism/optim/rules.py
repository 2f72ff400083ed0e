"""What steps in coordinates must know of the optimizer inside: its weight decay, and what it reads of a parameter."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Decay = Literal["coupled", "decoupled", "none"]
Reads = Literal["change", "weights", "position"]

DECAYS: tuple[Decay, ...] = ("coupled", "decoupled", "none")
READS: tuple[Reads, ...] = ("change", "weights", "position")


class Rule(NamedTuple):
    """The properties of a class of optimizers that steps in coordinates depend on.

    Attributes:
        decay: Of its ``weight_decay``: added to the gradient, taken from the weights, or there is none.
        orthogonalises: Whether it makes its update orthogonal, as Muon.
        reads: What its parameter stands for: a zero that becomes the change; the weights, where it reads their size; or
            a position in the coordinates, where it keeps others to compare it with.
        refused: Why it cannot be wrapped.
    """

    decay: Decay | None = None
    orthogonalises: bool = False
    reads: Reads = "change"
    refused: str | None = None


_MOVES = "it moves the parameters within a step and asks for the loss there"
_KNOWN: dict[str, Rule] = {
    "torch.optim.SGD": Rule("coupled"),
    "torch.optim.Adam": Rule("coupled"),
    "torch.optim.AdamW": Rule("decoupled"),
    "torch.optim.NAdam": Rule("coupled"),
    "torch.optim.RAdam": Rule("coupled"),
    "torch.optim.Adamax": Rule("coupled"),
    "torch.optim.Adagrad": Rule("coupled"),
    "torch.optim.Adadelta": Rule("coupled"),
    "torch.optim.RMSprop": Rule("coupled"),
    "torch.optim.Rprop": Rule("none"),
    "torch.optim.ASGD": Rule("coupled", reads="weights"),
    "torch.optim.Adafactor": Rule("decoupled", reads="weights"),
    "torch.optim.Muon": Rule("decoupled", orthogonalises=True),
    "torch.optim.LBFGS": Rule(refused=_MOVES),
    "torch.optim.SparseAdam": Rule(refused="it takes sparse gradients alone, which have no rows to multiply"),
    "consequentialism.optim.fused_sgd.FusedSGD": Rule(refused="it steps inside backward, before there is a gradient"),
    "consequentialism.optim.emended.Emended": Rule(refused="it steps in coordinates already"),
    "consequentialism.optim.muon.MuonWithAdamW": Rule("decoupled", orthogonalises=True),
    "pytorch_optimizer.optimizer.schedulefree.ScheduleFreeSGD": Rule("coupled", reads="position"),
    "pytorch_optimizer.optimizer.schedulefree.ScheduleFreeAdamW": Rule("coupled", reads="position"),
    "pytorch_optimizer.optimizer.schedulefree.ScheduleFreeRAdam": Rule("coupled", reads="position"),
    "pytorch_optimizer.optimizer.soap.SOAP": Rule("decoupled"),
    "pytorch_optimizer.optimizer.muon.base.MuonBase": Rule(orthogonalises=True),
    "pytorch_optimizer.optimizer.lion.Lion": Rule("decoupled"),
    "pytorch_optimizer.optimizer.adafactor.AdaFactor": Rule("decoupled", reads="weights"),
    "pytorch_optimizer.optimizer.dadapt.DAdaptAdaGrad": Rule("coupled", reads="position"),
    "pytorch_optimizer.optimizer.dadapt.DAdaptSGD": Rule("coupled", reads="position"),
    "pytorch_optimizer.optimizer.prodigy.Prodigy": Rule("coupled", reads="position"),
    "prodigyopt.prodigy.Prodigy": Rule("coupled", reads="position"),
    "schedulefree.sgd_schedulefree.SGDScheduleFree": Rule("coupled", reads="position"),
    "schedulefree.adamw_schedulefree.AdamWScheduleFree": Rule("coupled", reads="position"),
}
_DECLARED: dict[type, Rule] = {}
UNKNOWN = Rule()


def declare(
    cls: type[torch.optim.Optimizer], *, decay: Decay, orthogonalises: bool = False, reads: Reads = "change"
) -> None:
    """Say to `Emended` what it must know of an optimizer's class, and of those derived from it.

    Args:
        cls: A subclass of `torch.optim.Optimizer`.
        decay: What ``weight_decay`` does: ``"coupled"``, it is added to the gradient; ``"decoupled"``, the weights are
            multiplied by ``1 - lr * weight_decay``; ``"none"``, the class has none.
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
        module = "torch.optim" if base.__module__.startswith("torch.optim.") else base.__module__
        rule = _DECLARED.get(base) or _KNOWN.get(f"{module}.{base.__qualname__}")
        if rule is not None:
            return rule
    return UNKNOWN


def decay_of(rule: Rule, group: dict[str, Any], name: str) -> Decay:
    """How the ``weight_decay`` of a parameter group acts.

    Raises:
        ValueError: Nothing is known of it.
    """
    if not _is_on(group.get("weight_decay")):
        return "none"
    for key in ("decoupled_weight_decay", "weight_decouple"):  # torch's word, and pytorch_optimizer's
        if key in group:
            return "decoupled" if group[key] else "coupled"
    if rule.decay is None:
        raise ValueError(
            f"optimizer: it is not known what weight_decay={group['weight_decay']!r} does in {name}. Say it once by "
            f"consequentialism.optim.declare({name}, decay='decoupled') (or 'coupled', added to the gradient), or set "
            "it to 0"
        )
    return rule.decay


def _is_on(decay: Any) -> bool:
    return isinstance(decay, Tensor) or bool(decay)


def kept_share(group: dict[str, Any]) -> Any:
    """The factor by which decoupled decay multiplies the weights."""
    if group.get("fixed_decay"):
        return 1 - group["weight_decay"]
    return 1 - group["lr"] * group["weight_decay"]
