"""The input second moment over time, and when its root is made anew.

In ``optimizer.state[weight]``, for layers that share an input the same tensors:

- ``input_gram``: ``A``, the mean of ``x^T x`` over rows, older ones forgotten by the factor ``memory`` a refresh.
- ``root``: ``S``, with ``S S^T = ((A + c I) / t)^-2s``.
- ``gram_rows``: how many rows stand in ``A``, forgotten likewise; a convolution's samples with ``scale="nlms"``.
- ``emended_steps``: how many steps there were, which says when the next refresh is due.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..backend import dispatch
from ..precision import widest_dtype
from ..solve.gram import Gram, sum_over
from ..solve.root import Method
from .steps import local
from .units import Unit

KEYS = ("input_gram", "root", "gram_rows", "emended_steps")
State = dict[str, Any]
Roots = Callable[[Sequence[Unit], Sequence[Gram]], list[Tensor]]
ROOM = 2**22  # entries of moments whose roots are made together, where there are more than one


def steps_to_refresh(steps: int, every: int) -> int:
    """How many steps there are until a refresh is due, 0 where it is now, after ``steps`` of them.

    One in ``every``, and before that after 0, 1, 2, 4, 8, ... steps.
    """
    if 0 < steps < every:
        return min(1 << (steps - 1).bit_length(), every) - steps
    return -steps % every


def fresh_state(unit: Unit) -> State:
    """Before the first refresh: no rows, and the identity for a root."""
    slot, shape = unit.slot, unit.stored_shape()
    moment = torch.zeros(shape, dtype=slot.dtype, device=slot.device)
    if unit.diagonal:
        root = torch.ones_like(moment)
    else:
        root = torch.eye(shape[-1], dtype=slot.dtype, device=slot.device).expand(shape).clone()
    rows = torch.zeros((), dtype=widest_dtype(slot.device.type), device=slot.device)
    return {"input_gram": moment, "root": root, "gram_rows": rows, "emended_steps": torch.zeros((), dtype=torch.int64)}


def refresh(units: Sequence[Unit], states: Sequence[State], memory: float, roots: Roots, groups: Sequence[Any]) -> None:
    """Take what was recorded into every ``A``, and make every ``S`` anew.

    Args:
        units: All of them, with open slots.
        states: Their states; tensors that units begin or cease to share are new, the others are written to.
        memory: What the older rows are multiplied by.
        roots: Each ``S`` of units alike and their ``A``.
        groups: The process groups that the weights' replicas and shards belong to, one after the other.
    """
    take_in(units, states, _sharing(units, states, groups), memory, roots)


def take_in(
    units: Sequence[Unit], states: Sequence[State], shared: Sequence[list[int]], memory: float, roots: Roots
) -> None:
    """Fold the slots of the units named, by what they share, into their ``A``, and make their ``S`` anew."""
    for batch in _batches(units, shared):
        owners = [units[members[0]] for members in batch]
        if all(unit.slot.folded for unit in owners):  # before a failure
            continue
        before = [states[members[0]] for members in batch]
        fresh = [
            Gram(state["input_gram"], state["gram_rows"]).decayed(memory, _window(unit))
            for unit, state in zip(owners, before, strict=True)
        ]
        made = roots(owners, fresh)
        written = []
        for members, state, moment, root in zip(batch, before, fresh, made, strict=True):
            usable = root.sum().isfinite()
            own = {"input_gram": moment.matrix, "gram_rows": moment.count, "root": root}
            alone = all(i in members for i, other in enumerate(states) if other.get("root") is state["root"])
            # In place where nobody else has it, so that a captured step between refreshes sees it.
            places = {key: state[key] if alone else state[key].clone() for key in own}
            if usable.device.type == "cpu" and bool(usable):  # nothing is to be waited for
                values = list(own.values())
            else:
                values = [torch.where(usable, value, places[key]) for key, value in own.items()]
            written.append((members, places, values))
        for members, places, values in written:  # nothing here asks for memory, and so nothing fails
            for place, value in zip(places.values(), values, strict=True):
                place.copy_(value)
            for member in members:
                states[member].update(places)
                units[member].slot.folded = True


def roots_of(
    units: Sequence[Unit], moments: Sequence[Gram], how: tuple[float, float, bool], method: Method
) -> list[Tensor]:
    """``S`` of each ``A``, all of one shape, with the stored shape.

    Args:
        how: Damping, exponent, and whether ``A + c I`` is divided by its mean.
        method: Of those that are no diagonals.
    """
    one, ops = units[0], dispatch.for_coordinates(moments[0].matrix)
    matrices = [moment.matrix.view(one.slot.shape) for moment in moments]
    columns = one.blocks.columns
    if one.diagonal:
        made = [Gram(own, moment.count).root(ops, columns, *how) for own, moment in zip(matrices, moments, strict=True)]
    else:
        joined = Gram(torch.cat(matrices), moments[0].count)
        made = list(joined.root(ops, columns, *how, method).split(one.groups))
    return [root.view(moment.matrix.shape) for root, moment in zip(made, moments, strict=True)]


def _batches(units: Sequence[Unit], shared: Sequence[list[int]]) -> list[list[list[int]]]:
    """The units that share a moment, by moments of one kind whose roots are made together."""
    alike: dict[Any, list[list[int]]] = {}
    for members in shared:
        unit = units[members[0]]
        kind = (unit.slot.shape, unit.blocks.columns, unit.slot.dtype, unit.slot.device)
        alike.setdefault(kind, []).append(members)
    batches = []
    for (shape, *_), same in alike.items():
        each = max(ROOM // max(math.prod(shape), 1), 1)
        batches += [same[i : i + each] for i in range(0, len(same), each)]
    return batches


def _window(unit: Unit) -> Gram:
    """The Gram that was recorded since the last step."""
    assert unit.slot.gram is not None
    return unit.slot.gram


def _sharing(units: Sequence[Unit], states: Sequence[State], groups: Sequence[Any]) -> list[list[int]]:
    """The units by what they share, their slots summed over the groups.

    Units share ``A`` where they did before, or both begin, and where they have seen the same since. Ranks agree on
    that: over several, what is equal is found after the sum; a rank on which a member has seen something else says so
    beside the sum, and the members' own Grams are then summed too.
    """
    before = together(units, [id(state["input_gram"]) if int(state["emended_steps"]) else None for state in states])
    if groups and not units[0].slot.summed:
        _sum_over(groups, units, states, before)
        for unit in units:
            unit.slot.summed = True
    return seen_alike(units, before, bool(groups))


def together(units: Sequence[Unit], moments: Sequence[Any]) -> list[list[int]]:
    """Units that share a moment until now; those that begin are together where their shapes are the same.

    Args:
        moments: Equal for units that share one; None for a unit that begins.
    """
    classes: dict[Any, list[int]] = {}
    for i, (unit, moment) in enumerate(zip(units, moments, strict=True)):
        alike = (unit.kind.layout(), unit.stored_shape(), unit.blocks.columns, unit.slot.dtype, unit.slot.device)
        classes.setdefault(alike if moment is None else moment, []).append(i)
    return list(classes.values())


def seen_alike(units: Sequence[Unit], before: Sequence[list[int]], summed: bool) -> list[list[int]]:
    """The units, of those that were together, that have seen the same rows since the last step.

    Args:
        summed: Whether the ranks' rows stand in the slots.
    """
    shared: list[list[int]] = []
    for members in before:
        classes: list[list[int]] = []
        for member in members:
            own = next((c for c in classes if _equal(units[c[0]], units[member], summed)), None)
            if own is None:
                classes.append([member])
            else:
                own.append(member)
        shared += classes
    return shared


def _equal(one: Unit, other: Unit, summed: bool) -> bool:
    """Whether two units have seen the same rows since the last step."""
    first, second = one.slot, other.slot
    if one is other:
        return True
    if not summed and not first.is_traced() and not second.is_traced():
        return first.calls == second.calls
    return _window(one).equals(_window(other))


def _sum_over(groups: Sequence[Any], units: Sequence[Unit], states: Sequence[State], before: list[list[int]]) -> None:
    """Sum the slots over all ranks, those of units that share a moment once."""
    shared = [members for members in before if len(members) > 1 and int(states[members[0]]["emended_steps"]) > 0]
    leaders, followers = [members[0] for members in shared], [members[1:] for members in shared]
    single = [i for members in before if members not in shared for i in members]
    flags = torch.tensor(
        [
            float(any(not _equal(units[leader], units[i], False) for i in rest))
            for leader, rest in zip(leaders, followers, strict=True)
        ],
        dtype=torch.float64,
    )
    sum_over([_window(units[i]) for i in (*leaders, *single)], groups, flags)
    late = [i for flag, rest in zip(flags.tolist(), followers, strict=True) if flag for i in rest]
    if late:
        sum_over([_window(units[i]) for i in late], groups, flags[:0])
    for flag, leader, rest in zip(flags.tolist(), leaders, followers, strict=True):
        for i in () if flag else rest:
            units[i].slot.gram = units[leader].slot.gram


def same(one: State, other: State) -> bool:
    """Whether two loaded states are of one moment."""
    names = ("input_gram", "root", "gram_rows")
    return all(one[n].shape == other[n].shape and one[n].dtype == other[n].dtype for n in names) and all(
        one[n].device == other[n].device and torch.equal(one[n], other[n]) for n in names
    )


def loaded_states(units: Sequence[Unit], numbers: dict[int, Any], saved: dict[Any, Any]) -> list[State]:
    """The states of the units, checked, or none where a plain optimizer saved them all.

    Args:
        numbers: Those of the parameters in what was saved, by their ids.
        saved: The states by number.

    Raises:
        ValueError: A state that does not fit, or one of other layers.
    """
    own = {numbers[id(unit.weight)]: unit for unit in units}
    theirs = [number for number, state in saved.items() if isinstance(state, dict) and "input_gram" in state]
    loaded, missing = [], []
    for number, unit in own.items():
        state = saved.get(number, {})
        if all(key in state for key in KEYS):
            loaded.append(checked_state(unit, state))
        else:
            missing.append(unit.name)
    more = [number for number in theirs if number not in own]
    if (missing and theirs) or (more and units):
        without = f"no coordinates of layers {', '.join(map(repr, missing))}" if missing else ""
        beyond = (
            f"coordinates of parameters {', '.join(map(repr, more))}, which are stepped plainly here" if more else ""
        )
        raise ValueError(
            f"state_dict has {' and '.join(filter(None, (without, beyond)))}: an optimizer with other layers saved it"
        )
    return loaded


def _number(unit: Unit, state: State, key: str, allowed: str, whole: bool) -> float:
    """A number of a state, at least 0."""
    value = state[key]
    if not isinstance(value, (int, float)) and not (isinstance(value, Tensor) and value.numel() == 1):
        raise ValueError(f"state_dict: {key} of layer {unit.name!r} must be {allowed}, got {value!r}")
    number = float(local(value))
    if not 0 <= number < math.inf or (whole and not number.is_integer()):
        raise ValueError(f"state_dict: {key} of layer {unit.name!r} must be {allowed}, got {number}")
    return number


def checked_count(unit: Unit, state: State, key: str) -> int:
    """A count of a saved state."""
    return int(_number(unit, state, key, "a whole number of at least 0", whole=True))


def checked_tensor(unit: Unit, state: State, key: str, shape: tuple[int, ...], other: str) -> Tensor:
    """A copy of a saved state's tensor in the unit's type on its device.

    Args:
        other: What of it another shape would come from.

    Raises:
        ValueError: No tensor of real numbers, another shape, NaN or infinity.
    """
    value = local(state[key])
    if not (isinstance(value, Tensor) and value.is_floating_point()):
        found = value.dtype if isinstance(value, Tensor) else f"{value!r} ({type(value).__name__})"
        raise ValueError(f"state_dict: {key} of layer {unit.name!r} must be a tensor of real numbers, got {found}")
    if tuple(value.shape) != shape:
        raise ValueError(
            f"state_dict: {key} of layer {unit.name!r} must have the shape {list(shape)}, got "
            f"{list(value.shape)}: it was saved with another {other}"
        )
    if not bool(value.isfinite().all()):
        raise ValueError(f"state_dict: {key} of layer {unit.name!r} has NaN or infinity")
    dtype, device = unit.place()
    return value.detach().to(device, dtype, copy=True)


def checked_state(unit: Unit, state: State) -> State:
    """Copies in the unit's type on its device."""
    _, device = unit.place()
    keys = ("input_gram", "root")
    own: State = {key: checked_tensor(unit, state, key, unit.stored_shape(), "block, bias or layer") for key in keys}
    rows = _number(unit, state, "gram_rows", "finite and at least 0", whole=False)
    own["gram_rows"] = torch.tensor(rows, dtype=widest_dtype(device.type), device=device)
    own["emended_steps"] = torch.as_tensor(checked_count(unit, state, "emended_steps"))
    return own
