"""Steps of many parameters by one call of a compiled operator, without Python between the products.

It serves torch's SGD, RMSprop, Adam and Muon on the host, in float32 and float64. What it does not serve, and the first
step of each parameter, which makes its state, is left to the optimizer itself and to `inside.step_weight_by_weight`,
whose numbers are the same but for rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..backend import compiled
from . import steps
from .layers import Kind, Lookup, TransposedConvolution, TransposedLinear
from .rules import decay_of, rule_of, share_of
from .steps import Group, Rule

if TYPE_CHECKING:
    from .inside import Part

Roots = tuple[Tensor | None, Tensor | None]  # S and L of a weight, those that it has
PLAIN, ROWS, COLUMNS, DIAGONAL = range(4)  # how a weight lies beside its root, as in csrc/cpu/coordinate_step.cpp


class Operator(NamedTuple):
    """One of `schemas.STEP_OPS`, and what it takes of torch's state and of a group's options.

    Attributes:
        lists: The keys of the state whose tensors it takes, in the order of its arguments.
        keys: Those that there are with a group's options.
        numbers: Its last arguments, one for all parameters.
        without: Options that it does not know.
        factor: Of a parameter's rate; None where it is none that the operator serves.
    """

    name: str
    lists: tuple[str, ...]
    keys: Callable[[Group], tuple[str, ...]]
    numbers: Callable[[Group], tuple[Any, ...]]
    without: tuple[str, ...]
    factor: Callable[[Tensor, Group], float | None] = lambda parameter, group: 1


def _muon_factor(parameter: Tensor, group: Group) -> float | None:
    """Of the matrices that stand one above the other in a parameter."""
    parts = group.get("parts", 1)
    if parameter.ndim < 2 or parameter.numel() == 0 or parameter.shape[0] % parts:
        return None
    rows = parameter.shape[0]
    return steps.size_factor(torch.Size((rows // parts, parameter.numel() // rows)), group["adjust_lr_fn"])


OPERATORS: dict[Rule, Operator] = {
    steps.sgd: Operator(
        "sgd_step_",
        ("momentum_buffer",),
        lambda group: ("momentum_buffer",) if group["momentum"] else (),
        lambda group: (group["momentum"], group["dampening"], group["nesterov"]),
        ("maximize", "differentiable"),
    ),
    steps.rmsprop: Operator(
        "rmsprop_step_",
        ("square_avg", "momentum_buffer", "step"),
        lambda group: ("square_avg", "momentum_buffer", "step") if group["momentum"] > 0 else ("square_avg", "step"),
        lambda group: (group["alpha"], group["momentum"], group["eps"]),
        ("maximize", "differentiable", "capturable", "centered"),
    ),
    steps.adam: Operator(
        "adam_step_",
        ("exp_avg", "exp_avg_sq", "step"),
        lambda group: ("exp_avg", "exp_avg_sq", "step"),
        lambda group: (*group["betas"], group["eps"]),
        ("maximize", "differentiable", "capturable", "amsgrad"),
    ),
    steps.muon: Operator(
        "muon_step_",
        ("momentum_buffer",),
        lambda group: ("momentum_buffer",),
        lambda group: (
            group["momentum"],
            group["nesterov"],
            tuple(group["ns_coefficients"]),
            group["ns_steps"],
            group["eps"],
            group.get("parts", 1),
        ),
        (),
        _muon_factor,
    ),
}


class Options(NamedTuple):
    """What one group says in this step.

    Attributes:
        numbers: With the operator, what the parameters of one call have in common.
        kept: By decoupled decay.
    """

    operator: Operator
    keys: tuple[str, ...]
    numbers: tuple[Any, ...]
    kept: float
    coupled: float
    rate: float


class Call:
    """One call of an operator: its parameters have one type, and options that differ in rate and decay alone.

    Attributes:
        entries: Of each parameter itself, its gradient, the tensors of its state, and the last three of its options.
    """

    def __init__(self, options: Options) -> None:
        self.operator, self.numbers = options.operator, options.numbers
        self.keys = ("parameter", "gradient", *options.keys)
        self.entries: list[tuple[Any, ...]] = []
        self.roots: list[Tensor] = []
        self.output_roots: list[Tensor] = []
        self.kinds: list[int] = []
        self.members: list[int] = []

    def add(self, kind: int, roots: Roots, entries: Sequence[tuple[Any, ...]]) -> None:
        """A weight, alone or with its bias."""
        self.kinds.append(kind)
        self.members.append(len(entries))
        for own, root in zip((self.roots, self.output_roots), roots, strict=True):
            if root is not None:
                own.append(root)
        self.entries += entries

    def take(self) -> None:
        """Take the steps."""
        operator = self.operator
        *tensors, kept, coupled, rates = zip(*self.entries, strict=True)
        by_key = dict(zip(self.keys, tensors, strict=True))
        lists = [by_key.get(key, ()) for key in ("parameter", "gradient", *operator.lists)]
        call = getattr(torch.ops.consequentialism, operator.name).default
        call(*lists, self.roots, self.output_roots, self.kinds, self.members, kept, coupled, rates, *self.numbers)


class AtOnce:
    """What of a step one call serves, found anew in each: users change groups, parameters and states in between.

    Attributes:
        others: The parameters without coordinates that are served.
        all_others: Whether those are all that there are.
        left: The parts that are not.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, parts: Sequence[Part], rule: Rule, together: bool) -> None:
        """Find it out.

        Args:
            together: Whether parts may be stepped in another order than one by one, as they are given.
        """
        self.others: list[Tensor] = []
        self.all_others = False
        self.left: list[Part] = list(parts)
        self._calls: dict[Any, Call] = {}
        if "cpu" not in compiled.step_device_types or not isinstance(optimizer.state, dict):
            return
        self._found = _entries_of(optimizer, rule)
        if together:
            self.left = [part for part in parts if not self._takes_part(part)]
        inside = {id(parameter) for part in parts for parameter in part.parameters}
        waiting = [
            parameter
            for group in optimizer.param_groups
            for parameter in group["params"]
            if id(parameter) not in inside and parameter.grad is not None
        ]
        self.others = [parameter for parameter in waiting if self._takes(PLAIN, (None, None), (parameter,))]
        self.all_others = len(self.others) == len(waiting)

    def _takes_part(self, part: Part) -> bool:
        unit, parameters = part.unit, part.parameters
        kind = _kind_of(unit.kind, parameters[0])
        if kind is None or part.root is None:
            return False
        if unit.with_bias and len(parameters) == 1:  # a column without a gradient
            return False
        return self._takes(kind, (part.root, part.left), parameters)

    def _takes(self, kind: int, roots: Roots, parameters: Sequence[Tensor]) -> bool:
        """Whether a weight, alone or with its bias, is served; it is then in one of the calls."""
        dtype, entries, same = parameters[0].dtype, [], None
        for root in roots:
            if root is not None and root.dtype is not dtype:
                return False
        for parameter in parameters:
            options, entry = self._found.get(id(parameter), (None, ()))
            if options is None or parameter.dtype is not dtype:
                return False
            key = options.operator.name, options.numbers, dtype
            if same not in (None, key):
                return False
            same = key
            entries.append(entry)
        call = self._calls.get(same)
        if call is None:
            assert options is not None
            call = self._calls[same] = Call(options)
        call.add(kind, roots, entries)
        return True

    def take(self) -> None:
        """Take the steps."""
        for call in self._calls.values():
            call.take()


def _entries_of(optimizer: torch.optim.Optimizer, rule: Rule) -> dict[int, tuple[Options, tuple[Any, ...]]]:
    """The options and the entry in `Call` of each parameter that an operator serves, by the parameter's id."""
    decay, name = rule_of(optimizer), type(optimizer).__name__
    found: dict[int, tuple[Options, tuple[Any, ...]]] = {}
    for group in optimizer.param_groups:
        options = _options(rule, group, decay_of(decay, group, name))
        if options is None:
            continue
        _, keys, _, kept, coupled, rate = options
        own, factor_of = list(group["params"]), options.operator.factor
        for parameter, tensors in zip(own, compiled.step_tensors(own, optimizer.state, keys), strict=True):
            factor = None if tensors is None else factor_of(parameter, group)
            if tensors is not None and factor is not None:
                found[id(parameter)] = options, (*tensors, kept, coupled, rate * factor)
    return found


def _options(rule: Rule, group: Group, decay: str) -> Options | None:
    """None where no operator serves the group."""
    operator = OPERATORS.get(steps.rule_in(rule, group))
    if operator is None or any(group.get(name) for name in operator.without):
        return None
    numbers = operator.numbers(group)
    if any(isinstance(value, Tensor) for value in (*numbers, group["lr"], group["weight_decay"])):
        return None
    kept = share_of(decay, group)
    coupled = group["weight_decay"] if decay == "coupled" else 0
    return Options(operator, operator.keys(group), numbers, kept, coupled, group["lr"])


def _kind_of(kind: Kind, weight: Tensor) -> int | None:
    """How the operator finds the weight's rows, or None."""
    if isinstance(kind, Lookup):
        return DIAGONAL
    if isinstance(kind, TransposedConvolution):
        return None
    one_output = weight.shape[1 if isinstance(kind, TransposedLinear) else 0] == kind.groups
    if one_output:  # a matrix-vector product would round the weight once for each input
        return None
    return COLUMNS if isinstance(kind, TransposedLinear) else ROWS
