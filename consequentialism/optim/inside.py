"""One step of the optimizer inside on gradients in coordinates, and its answer applied to the weights."""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .. import _torch
from .at_once import AtOnce
from .memory import KEYS, State
from .outputs import KEYS as OUTPUT_KEYS
from .outputs import Outputs, left_multiplied, moment_of
from .rules import Rule, decay_of, share_of
from .steps import Entry, local, muon, rule_for, sgd
from .steps import Rule as Step
from .units import Unit

if TYPE_CHECKING:
    from .emended import Emended

POSITION = "position"  # the state of optimizers that keep a place in the coordinates


class Part(NamedTuple):
    """A weight with a gradient, the bias beside it, and their groups."""

    unit: Unit
    root: Any  # S; None where another rank keeps it, until it is fetched
    parameters: list[Any]  # the weight and, where it has a gradient, the bias
    groups: list[dict[str, Any]]
    decays: list[str]
    left: Tensor | None = None  # L, where its outputs have a root too
    maximizes: bool = False  # of groups that do not say it themselves

    def gradients(self) -> list[Tensor]:
        """``L [g | g_bias] S`` in the gradients' type, coupled decay counted."""
        own = [local(parameter.grad) for parameter in self.parameters]
        if "coupled" in self.decays:
            own = [gradient + decay for gradient, decay in zip(own, self.coupled(), strict=True)]
        multiplied = self.left_multiplied(self.multiplied(own))
        return [product.to(gradient.dtype) for product, gradient in zip(multiplied, own, strict=True)]

    def left_multiplied(self, values: Sequence[Tensor]) -> Sequence[Tensor]:
        """``L [values]``, the values themselves where there is no L."""
        return values if self.left is None else left_multiplied(self.unit, self.left, values)

    def coupled(self) -> list[Any]:
        """The decay that is added to each gradient, where it is coupled."""
        return [
            local(parameter) * (group["weight_decay"] * (-1 if group.get("maximize", self.maximizes) else 1))
            if decay == "coupled"
            else 0
            for parameter, group, decay in zip(self.parameters, self.groups, self.decays, strict=True)
        ]

    def multiplied(self, values: Sequence[Tensor]) -> list[Tensor]:
        """``[values] S`` in S's type."""
        product, column = self.unit.multiply(self.root, values[0], values[1] if len(values) > 1 else None)
        return [product] if column is None else [product, column]

    def shares(self) -> list[Any]:
        """The share of each parameter that its decay leaves, where that is not coupled."""
        pairs = zip(self.groups, self.decays, strict=True)
        return [share_of(decay, group) for group, decay in pairs]

    def apply(self, changes: Sequence[Tensor], shares: Sequence[Any]) -> None:
        """``W <- share * W + L change S^T``."""
        self.unit.add_product_(self.root, self.parameters, self.left_multiplied(changes), shares)


Rooted = Callable[[Sequence[Part]], Iterable[Part]]  # the parts, each with its root


def parts_of(
    units: Sequence[Unit], states: Sequence[State], groups: dict[int, Any], rule: Rule, optimizer: torch.optim.Optimizer
) -> list[Part]:
    """The units whose weights have gradients; they are those that they were.

    Raises:
        ValueError: A group with a weight decay of which nothing is known.
    """
    parts = []
    maximizes = bool(getattr(optimizer, "maximize", False))  # where pytorch_optimizer's have it
    acts: dict[int, str] = {}  # the decay of each group
    for unit, state in zip(units, states, strict=True):
        weight: Any = unit.own
        gradient, bias = weight.grad, unit.bias
        if gradient is None or id(weight) not in groups:
            continue
        if gradient.layout != torch.strided:
            raise ValueError(f"layer {unit.name!r} has a sparse gradient; leave it out by filter_fn")
        parameters = [weight]
        if bias is not None and bias.grad is not None and id(bias) in groups:
            parameters.append(bias)
        own = [groups[id(parameter)] for parameter in parameters]
        root = state["root"].view(unit.slot.shape) if "root" in state else None
        for group in own:
            if id(group) not in acts:
                acts[id(group)] = decay_of(rule, group, type(optimizer).__name__)
        decays = [acts[id(group)] for group in own]
        parts.append(Part(unit, root, parameters, own, decays, state.get("output_root"), maximizes))
    return parts


def root_outputs(optimizer: torch.optim.Optimizer, parts: Sequence[Part], how: Outputs, steps: int) -> None:
    """Take this step's gradients, of the ``steps``-th one, into every ``B``, and make every ``L`` anew."""
    sides = [
        (
            part.unit,
            optimizer.state[part.unit.weight],
            moment_of(part.unit, part.multiplied([local(p.grad) for p in part.parameters])),
        )
        for part in parts
        if part.left is not None
    ]
    how.take(sides, steps)


def turn(optimizer: torch.optim.Optimizer, units: Sequence[Unit], rule: Rule) -> bool:
    """Whether a step in coordinates that any orthogonal matrix has turned is the turned step: with any root it is then
    the same. Exactly torch's SGD and Muon and `Muon` are known for it, without a momentum: that is in the coordinates
    of earlier roots, and roots of two kinds do not turn alike from a refresh to the next.

    Not where a layer's weight and bias have other options, but for their decay, which is on the weights, or a bias has
    no gradients; nor where an optimizer that orthogonalises has a matrix whose rows have roots of their own, as grouped
    convolutions have.
    """
    if rule_for(optimizer) not in (sgd, muon) and not hasattr(optimizer, "emended_rule"):
        return False
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    own = [unit for unit in units if id(unit.weight) in groups]
    if any(groups[id(unit.weight)]["momentum"] != 0 for unit in own):
        return False
    if rule.orthogonalises:
        return all(unit.groups == 1 for unit in units)
    names = [name for name in optimizer.defaults if name != "weight_decay"]
    for unit in own:
        weight, bias = groups[id(unit.weight)], groups.get(id(unit.bias))
        if bias is None:
            continue
        if bias is not weight and any(bias[name] != weight[name] for name in names):
            return False
        if unit.bias is not None and not unit.bias.requires_grad:
            return False
    return True


@contextlib.contextmanager
def without_gradients(parameters: Iterable[Any]) -> Iterator[None]:
    """Their gradients are not seen within."""
    hidden = [(parameter, parameter.grad) for parameter in parameters]
    try:
        for parameter, _ in hidden:
            parameter.grad = None
        yield
    finally:
        for parameter, gradient in hidden:
            parameter.grad = gradient


class OwnStep:
    """A hook that warns, once, where the optimizer inside is stepped in the place of the one in coordinates."""

    def __init__(self, emended: Emended) -> None:
        self.emended = weakref.ref(emended)

    def __call__(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        outer = self.emended()
        if outer is None or not outer.units:
            return
        self.emended = lambda: None  # type: ignore[assignment]
        warnings.warn(
            f"consequentialism.optim.Emended: the {type(optimizer).__name__} inside is stepped itself, plainly; step "
            "the Emended optimizer in its place, also by GradScaler.step",
            UserWarning,
            stacklevel=3,
        )


@contextlib.contextmanager
def hooks_around(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """The optimizer's own step hooks run before and after all that is done within, with the gradients in place."""
    before, after = optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks
    for hook in list(before.values()):
        if not isinstance(hook, OwnStep):
            hook(optimizer, (), {})
    optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks = before, after
    for hook in list(after.values()):
        hook(optimizer, (), {})


def step_weight_by_weight(
    optimizer: torch.optim.Optimizer, parts: Sequence[Part], step: Step, rooted: Rooted = iter
) -> None:
    """Our own step for the weights in coordinates, the optimizer's for the rest."""
    at_once = AtOnce(optimizer, parts, step, together=rooted is iter)  # ranks send each other roots in one order
    # A scheduler looks whether its optimizer steps, by a method of its own in the place of that.
    if not at_once.all_others or "step" in vars(optimizer):
        with without_gradients([*(parameter for part in parts for parameter in part.parameters), *at_once.others]):
            optimizer.step()
    at_once.take()
    for part in rooted(at_once.left):
        triples = zip(part.parameters, part.gradients(), part.groups, strict=True)
        changes = step([Entry(p, gradient, optimizer.state[p], group) for p, gradient, group in triples])
        part.apply(changes, part.shares())


def step_all(
    optimizer: torch.optim.Optimizer,
    parts: Sequence[Part],
    states: Sequence[State],
    rule: Rule,
    rooted: Rooted = iter,
) -> None:
    """The optimizer's own step, on values that stand for places in the coordinates.

    Most optimizers only add to a parameter: it is then zero and becomes the change, and rounding takes nothing of it.
    """
    # Contiguous, as fused optimizers take them for granted.
    gradients = [gradient.contiguous() for part in rooted(parts) for gradient in part.gradients()]
    if rule.reads == "weights":  # the optimizer will add the coupled decay once more
        again = [decay for part in parts for decay in part.coupled()]
        gradients = [gradient - decay for gradient, decay in zip(gradients, again, strict=True)]
    parameters = [parameter for part in parts for parameter in part.parameters]
    positions = rule.reads == "position"
    with standing_in(optimizer, parameters, gradients, states, rule) as changes:
        memory = [_asgd_memory(optimizer, p) for p in parameters] if _is_asgd(optimizer) else None
        optimizer.step()
        done = changes()
    begin = 0
    for part in rooted(parts):
        end = begin + len(part.parameters)
        shares: list[Any] = [1] * len(part.parameters) if positions else part.shares()
        if memory is not None:
            shares = [share for share, _ in memory[begin:end]]
        own, stood = done[begin:end], [local(p).clone() for p in part.parameters] if rule.reads == "weights" else []
        if rule.reads == "weights":
            own = [change + before * (1 - share) for change, before, share in zip(own, stood, shares, strict=True)]
        part.apply(own, shares)
        if memory is not None:
            for parameter, before, change, (share, mu) in zip(
                part.parameters, stood, own, memory[begin:end], strict=True
            ):
                inner = before * share + change
                local(optimizer.state[parameter]["ax"]).add_((local(parameter) - inner) * mu)
        begin = end


def moved(
    optimizer: torch.optim.Optimizer,
    units: Sequence[Unit],
    states: Sequence[State],
    rule: Rule,
    method: Callable[[], Any],
) -> Any:
    """What ``method`` returns, which moves the parameters that keep a position: by its change in coordinates."""
    state = optimizer.state
    pairs = [(u, p) for u in units for p in (u.weight, u.bias) if p is not None and POSITION in state[p]]
    with standing_in(optimizer, [p for _, p in pairs], [], states, rule) as changes:
        result = method()
        done = dict(zip((id(p) for _, p in pairs), changes(), strict=True))
    for unit, own_state in zip(units, states, strict=True):
        own = [p for u, p in pairs if u is unit]
        if own:
            root = unit.transposed(own_state["root"].view(unit.slot.shape))
            part = Part(unit, root, own, [], [], own_state.get("output_root"))
            changes = part.multiplied(part.left_multiplied([done[id(p)] for p in own]))
            for parameter, change in zip(own, changes, strict=True):
                local(parameter).add_(change)
    return result


class standing_in:
    """Parameters hold what the optimizer is to see, and the states nothing of ours; all as it was afterwards.

    Entered, it gives a function for the changes so far, one for each parameter.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: Sequence[Any],
        gradients: Sequence[Tensor],
        states: Sequence[State],
        rule: Rule,
    ) -> None:
        self.optimizer, self.parameters, self.gradients, self.states, self.rule = (
            optimizer,
            parameters,
            gradients,
            states,
            rule,
        )

    def __enter__(self) -> Any:
        rule, parameters = self.rule, self.parameters
        self.plain = [parameter.grad for parameter in parameters]
        self.weights = [local(parameter).clone() for parameter in parameters]
        self.positions = [self._position(parameter) for parameter in parameters] if rule.reads == "position" else []
        self.ours = [{key: state.pop(key) for key in (*KEYS, *OUTPUT_KEYS) if key in state} for state in self.states]
        for parameter, gradient in zip(parameters, self.gradients, strict=False):
            parameter.grad = _like(parameter, gradient)
        for i, parameter in enumerate(parameters):
            if rule.reads == "change":
                local(parameter).zero_()
            elif rule.reads == "position":
                local(parameter).copy_(self.positions[i])
                if self.gradients:
                    self.optimizer.state[parameter].pop(POSITION, None)
        return self.changes

    def _position(self, parameter: Any) -> Tensor:
        position = self.optimizer.state[parameter].get(POSITION)
        return local(parameter).clone() if position is None else local(position)

    def changes(self) -> list[Tensor]:
        """The change that the optimizer has made to each parameter."""
        now = [local(parameter) for parameter in self.parameters]
        if self.rule.reads == "change":
            return [own.clone() for own in now]
        begins = self.positions if self.rule.reads == "position" else self.weights
        changes = [own - begin for own, begin in zip(now, begins, strict=True)]
        if self.rule.reads == "position":
            self.positions = [own.clone() for own in now]
        return changes

    def __exit__(self, *_: object) -> None:
        for parameter, weight, gradient in zip(self.parameters, self.weights, self.plain, strict=True):
            local(parameter).copy_(weight)
            parameter.grad = gradient
        for state, ours in zip(self.states, self.ours, strict=True):
            state.update(ours)
        for parameter, position in zip(self.parameters, self.positions, strict=False):
            self.optimizer.state[parameter][POSITION] = _like(parameter, position)


def _like(parameter: Any, own: Tensor) -> Tensor:
    """This rank's part as a tensor that is sharded as the parameter is."""
    if not _torch.is_dtensor(parameter):
        return own
    from torch.distributed.tensor import DTensor

    places = parameter.device_mesh, parameter.placements
    return DTensor.from_local(own, *places, run_check=False, shape=parameter.shape, stride=parameter.stride())


def _is_asgd(optimizer: torch.optim.Optimizer) -> bool:
    return isinstance(optimizer, torch.optim.ASGD)


def _asgd_memory(optimizer: torch.optim.Optimizer, parameter: Any) -> tuple[Any, Any]:
    """The number that ASGD multiplies the weights by in its next step, and how much of them its average takes."""
    group = next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
    state = optimizer.state.get(parameter, {})
    eta, mu = state.get("eta"), state.get("mu")
    rate = group["lr"] if eta is None else _number(eta)
    return 1 - group["lambd"] * rate, 1 if mu is None else _number(mu)


def _number(value: Tensor) -> Any:
    """Its value, read where the host has it, before it changes."""
    return value.item() if value.device.type == "cpu" else value.clone()
