"""Steps of many parameters by one call of a compiled operator, without Python between the products.

It serves torch's SGD, RMSprop and Adam on the host, in float32 and float64. What it does not serve, and the first step
of each parameter, which makes its state, is left to the optimizer itself and to `inside.step_weight_by_weight`, whose
numbers are the same but for rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..backend import compiled
from . import steps
from .layers import Kind, Lookup, TransposedConvolution, TransposedLinear
from .rules import decay_of, kept_share, rule_of
from .steps import Group, Rule

if TYPE_CHECKING:
    from .inside import Part

OWN = (Tensor, nn.Parameter)
PLAIN, ROWS, COLUMNS, DIAGONAL = range(4)  # how a weight lies beside its root, as in csrc/cpu/coordinate_step.cpp


class Operator(NamedTuple):
    """One of `schemas.STEP_OPS`, and what it takes of torch's state and of a group's options.

    Attributes:
        lists: The keys of the state whose tensors it takes, in the order of its arguments.
        keys: Those that there are with a group's options.
        numbers: Its last arguments, one for all parameters.
        without: Options that it does not know.
    """

    name: str
    lists: tuple[str, ...]
    keys: Callable[[Group], tuple[str, ...]]
    numbers: Callable[[Group], tuple[Any, ...]]
    without: tuple[str, ...]


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
}


class Options(NamedTuple):
    """What one group says in this step."""

    keys: tuple[str, ...]
    numbers: tuple[Any, ...]
    kept: float
    coupled: float
    rate: float


class Call:
    """The arguments of one call: its parameters have one type, and options that differ in rate and decay alone."""

    def __init__(self, options: Options) -> None:
        self.numbers = options.numbers
        self.tensors: dict[str, list[Tensor]] = {key: [] for key in ("parameter", "gradient", *options.keys)}
        self.roots: list[Tensor] = []
        self.kinds: list[int] = []
        self.members: list[int] = []
        self.floats: tuple[list[float], list[float], list[float]] = ([], [], [])  # kept, coupled, rates

    def add(self, kind: int, root: Tensor | None, owners: Sequence[tuple[list[Tensor], Options]]) -> None:
        """A weight, alone or with its bias."""
        self.kinds.append(kind)
        self.members.append(len(owners))
        if root is not None:
            self.roots.append(root)
        for tensors, options in owners:
            for own, tensor in zip(self.tensors.values(), tensors, strict=True):
                own.append(tensor)
            for numbers, number in zip(self.floats, options[2:], strict=True):
                numbers.append(number)

    def take(self, operator: Operator) -> None:
        """Take the steps."""
        lists = [self.tensors.get(key, []) for key in ("parameter", "gradient", *operator.lists)]
        call = getattr(torch.ops.consequentialism, operator.name).default
        call(*lists, self.roots, self.kinds, self.members, *self.floats, *self.numbers)


class AtOnce:
    """What of a step one call serves, found anew in each: users change groups, parameters and states in between.

    Attributes:
        others: The parameters without coordinates that are served.
        left: The parts that are not.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, parts: Sequence[Part], rule: Rule, together: bool) -> None:
        """Find it out.

        Args:
            together: Whether parts may be stepped in another order than one by one, as they are given.
        """
        self.others: list[Tensor] = []
        self.left: list[Part] = list(parts)
        self._calls: dict[Any, Call] = {}
        operator = OPERATORS.get(rule)
        if operator is None or "cpu" not in compiled.step_device_types:
            return
        self._operator, self._state = operator, optimizer.state
        decay, name = rule_of(optimizer), type(optimizer).__name__
        self._options = {
            id(group): _options(operator, group, decay_of(decay, group, name)) for group in optimizer.param_groups
        }
        self.left = [part for part in parts if not (together and self._takes_part(part))]
        inside = {id(parameter) for part in parts for parameter in part.parameters}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                waits = parameter.grad is not None and id(parameter) not in inside
                if waits and self._takes(PLAIN, None, (parameter,), (group,)):
                    self.others.append(parameter)

    def _takes_part(self, part: Part) -> bool:
        unit, parameters = part.unit, part.parameters
        kind = _kind_of(unit.kind, parameters[0])
        if kind is None or part.root is None:
            return False
        if kind != DIAGONAL and unit.with_bias and len(parameters) == 1:  # a column without a gradient
            return False
        return self._takes(kind, part.root, parameters, part.groups)

    def _takes(self, kind: int, root: Tensor | None, parameters: Sequence[Tensor], groups: Sequence[Group]) -> bool:
        """Whether a weight, alone or with its bias, is served; it is then in one of the calls."""
        dtype = parameters[0].dtype
        if dtype not in (torch.float32, torch.float64) or (root is not None and root.dtype != dtype):
            return False
        owners: list[tuple[list[Any], Options]] = []
        for parameter, group in zip(parameters, groups, strict=True):
            options, state = self._options[id(group)], self._state.get(parameter)
            if options is None or state is None:
                return False
            tensors = [parameter, parameter.grad, *[state.get(key) for key in options.keys]]
            if not _are_dense(tensors, dtype, options.keys[-1:] == ("step",)):
                return False
            owners.append((tensors, options))
        numbers = owners[0][1].numbers
        if any(options.numbers != numbers for _, options in owners[1:]):
            return False
        call = self._calls.setdefault((dtype, numbers), Call(owners[0][1]))
        call.add(kind, root, owners)
        return True

    def take(self) -> None:
        """Take the steps."""
        for call in self._calls.values():
            call.take(self._operator)


def _options(operator: Operator, group: Group, decay: str) -> Options | None:
    """None where the operator does not serve the group."""
    numbers = operator.numbers(group)
    if any(group.get(name) for name in operator.without):
        return None
    if any(isinstance(value, Tensor) for value in (*numbers, group["lr"], group["weight_decay"])):
        return None
    kept = kept_share(group) if decay == "decoupled" else 1
    coupled = group["weight_decay"] if decay == "coupled" else 0
    return Options(operator.keys(group), numbers, kept, coupled, group["lr"])


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


def _are_dense(tensors: Sequence[Any], dtype: torch.dtype, counted: bool) -> bool:
    """Whether they are torch's own, on the host, of one type, a count at the end excepted, and without gaps."""
    if tensors[0].device.type != "cpu":
        return False
    for tensor in tensors:
        if type(tensor) not in OWN or tensor.layout != torch.strided or not tensor.is_contiguous():
            return False
        if tensor.dtype != dtype and not (counted and tensor is tensors[-1]):
            return False
    return True
