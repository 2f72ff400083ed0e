"""`Sharding`: each ``A`` and ``S`` on one rank of those that share the weights, which the others ask for ``S``.

On a refresh every weight's Gram goes to the rank that keeps its moment, which alone makes the root; in a step each root
is sent to all, one on its way while the one before it is used, and given back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .. import _torch
from . import memory
from .inside import Part
from .units import Unit

KEPT = ("input_gram", "root")  # of a weight's state, by its owner alone; the rest is on every rank


def groups_of(process_group: Any, units: Sequence[Unit], model: nn.Module) -> list[Any]:
    """The groups over which Grams are summed, one after the other.

    Args:
        process_group: As `Emended`'s.
    """
    if process_group is None or not (dist.is_available() and dist.is_initialized()):
        return []
    if process_group != "auto":
        return [process_group]
    weights: list[Any] = [unit.weight for unit in units]
    meshes = {weight.device_mesh: None for weight in weights if _torch.is_dtensor(weight)}
    if meshes:
        (mesh, *others) = meshes
        if others:
            raise ValueError("process_group: the weights belong to several meshes; give the group that shares them")
        return [group for group in mesh.get_all_groups() if dist.get_world_size(group) > 1]
    wrapped = [m for m in model.modules() if isinstance(m, DistributedDataParallel)]
    group = wrapped[0].process_group if wrapped else dist.group.WORLD
    return [group] if dist.get_world_size(group) > 1 else []


class Place(NamedTuple):
    """Weights that share a moment, by their ids, and the rank of the group that keeps it."""

    weights: list[int]
    owner: int


class Sharding:
    """Who keeps what, which all ranks know, and how it gets to the others.

    Attributes:
        process_groups: Gives the groups that share the weights; the ranks of the last one divide the moments among
            them, and those of the others keep copies.
        places: In the order in which roots are sent. A moment stays where it was first put: moments are dealt out at
            the first refresh, when it is known which weights share one, the largest first, each to the rank that has
            least.
    """

    def __init__(self, process_groups: Callable[[], list[Any]]) -> None:
        self.process_groups = process_groups
        self.places: list[Place] = []
        self._whole: dict[int, memory.State] | None = None  # what was consolidated here, by the weights' ids

    def rank(self) -> int:
        groups = self.process_groups()
        return dist.get_rank(groups[-1]) if groups else 0

    def ranks(self) -> int:
        groups = self.process_groups()
        return dist.get_world_size(groups[-1]) if groups else 1

    def fresh_state(self, unit: Unit) -> memory.State:
        """What every rank has of a weight before the first refresh: no rows."""
        return {key: value for key, value in memory.fresh_state(unit).items() if key not in KEPT}

    def refresh(self, units: Sequence[Unit], states: Sequence[memory.State], decay: float, roots: memory.Roots) -> None:
        """`memory.refresh`, each moment by its owner."""
        self._whole = None
        groups, rank = self.process_groups(), self.rank()
        if not units[0].slot.summed:
            self.places = self._dealt_out(units, self._shared(units, states, groups))
            self._reduce(units, groups)
            for unit in units:
                unit.slot.summed = True
        index = {id(unit.weight): i for i, unit in enumerate(units)}
        own = [[index[weight] for weight in place.weights] for place in self.places if place.owner == rank]
        for i in (i for members in own for i in members):
            if "root" not in states[i]:
                states[i].update({key: value for key, value in memory.fresh_state(units[i]).items() if key in KEPT})
        memory.take_in(units, states, own, decay, roots)
        self._share_rows(units, states, groups)

    def _shared(
        self, units: Sequence[Unit], states: Sequence[memory.State], groups: Sequence[Any]
    ) -> dict[int, list[int]]:
        """The units by what they share: on every rank they have seen the same. By the first of each."""
        known = {weight: place for place, own in enumerate(self.places) for weight in own.weights}
        moments = [
            known.get(id(unit.weight), ("new", i) if int(state["emended_steps"]) else None)
            for i, (unit, state) in enumerate(zip(units, states, strict=True))
        ]
        first = torch.empty(len(units), dtype=torch.int64, device=units[0].slot.device)
        for members in memory.seen_alike(units, memory.together(units, moments), False):
            first[members] = members[0]
        for group in groups:
            found = [torch.empty_like(first) for _ in range(dist.get_world_size(group))]
            dist.all_gather(found, first, group=group)
            columns = torch.stack(found, 1).tolist()
            first = torch.tensor([columns.index(column) for column in columns], device=first.device)
        shared: dict[int, list[int]] = {}
        for i, leader in enumerate(first.tolist()):
            shared.setdefault(leader, []).append(i)
        return shared

    def _dealt_out(self, units: Sequence[Unit], shared: dict[int, list[int]]) -> list[Place]:
        """What is shared, each with its owner: as before, or the rank that has least."""
        owners = {weight: place.owner for place in self.places for weight in place.weights}
        load = [0] * self.ranks()
        found: dict[int, int] = {}
        for leader in sorted(shared, key=lambda i: (id(units[i].weight) not in owners, -_size(units[i]), i)):
            owner = owners.get(id(units[leader].weight))
            found[leader] = load.index(min(load)) if owner is None else owner
            load[found[leader]] += _size(units[leader])
        return [Place([id(units[i].weight) for i in members], found[leader]) for leader, members in shared.items()]

    def _reduce(self, units: Sequence[Unit], groups: Sequence[Any]) -> None:
        """Sum each moment's Gram to its owner, all counts to everybody."""
        by_weight = {id(unit.weight): unit for unit in units}
        leaders = [(by_weight[place.weights[0]].slot.gram, place.owner) for place in self.places]
        counts = torch.cat([gram.count for gram, _ in leaders])  # type: ignore[union-attr, misc]
        for group in reversed(groups):
            dist.all_reduce(counts, group=group)
        for (gram, owner), count in zip(leaders, counts.split(1), strict=True):
            assert gram is not None
            for group in groups[-1:]:
                dist.reduce(gram.matrix, group=group, group_dst=owner)
            if owner == self.rank():
                for group in groups[:-1]:
                    dist.all_reduce(gram.matrix, group=group)
            gram.count = count

    def _share_rows(self, units: Sequence[Unit], states: Sequence[memory.State], groups: Sequence[Any]) -> None:
        """Tell all ranks how many rows stand in each moment: its owner takes none of a Gram that is not finite."""
        index, rank = {id(unit.weight): i for i, unit in enumerate(units)}, self.rank()
        kept = [states[index[place.weights[0]]]["gram_rows"] for place in self.places]
        rows = torch.stack(
            [own if place.owner == rank else own * 0 for own, place in zip(kept, self.places, strict=True)]
        )
        for group in groups[-1:]:
            dist.all_reduce(rows, group=group)
        for place, own in zip(self.places, rows.unbind(), strict=True):
            for i in (index[weight] for weight in place.weights):
                if place.owner != rank:
                    states[i]["gram_rows"] = own.clone()
                units[i].slot.folded = True

    def in_order(self, parts: Sequence[Part]) -> list[Part]:
        """The parts as their roots will come."""
        order = {weight: i for i, place in enumerate(self.places) for weight in place.weights}
        return sorted(parts, key=lambda part: order.get(id(part.unit.weight), len(order)))

    def rooted(self, units: Sequence[Unit], states: Sequence[memory.State], parts: Sequence[Part]) -> Iterator[Part]:
        """The parts, `in_order`, each with its root. Every rank takes part, whatever parts it has itself."""
        self._whole = None
        by_weight = {id(unit.weight): (unit, state) for unit, state in zip(units, states, strict=True)}
        waiting = {id(part.unit.weight): part for part in parts}
        coming = self._sent(by_weight, 0)
        for i, place in enumerate(self.places):
            root, sending = coming
            coming = self._sent(by_weight, i + 1)
            if sending is not None:
                sending.wait()
            for weight in place.weights:
                if weight in waiting:
                    part = waiting.pop(weight)
                    yield part._replace(root=root.view(part.unit.slot.shape))
        for part in waiting.values():  # before the first refresh
            root = memory.fresh_state(part.unit)["root"]
            yield part._replace(root=root.view(part.unit.slot.shape))

    def _sent(self, by_weight: dict[int, tuple[Unit, memory.State]], place: int) -> tuple[Any, Any]:
        """A place's root, or room for it, and what is to be waited for; nothing after the last."""
        if place == len(self.places):
            return None, None
        unit, state = by_weight[self.places[place].weights[0]]
        return self._broadcast(unit, state, "root", self.places[place].owner, True)

    def _broadcast(
        self, unit: Unit, state: memory.State, key: str, owner: int, async_op: bool
    ) -> tuple[Tensor, dist.Work | None]:
        if owner == self.rank():
            tensor = state[key].contiguous()
        else:
            tensor = torch.empty(unit.stored_shape(), dtype=unit.slot.dtype, device=unit.slot.device)
        groups = self.process_groups()
        work = dist.broadcast(tensor, group=groups[-1], group_src=owner, async_op=async_op) if groups else None
        return tensor, work

    def consolidate(self, units: Sequence[Unit], states: Sequence[memory.State], to: int | None) -> None:
        """Bring every moment and root to the CPU of one rank of the group, or of all."""
        by_weight = {id(unit.weight): (unit, state) for unit, state in zip(units, states, strict=True)}
        whole: dict[int, memory.State] = {}
        for place in self.places:
            unit, state = by_weight[place.weights[0]]
            found = {key: self._broadcast(unit, state, key, place.owner, False)[0] for key in KEPT}
            if to is None or to == self.rank():
                found = {key: tensor.to("cpu", copy=True) for key, tensor in found.items()}
                whole.update({weight: found for weight in place.weights})
        self._whole = whole if to is None or to == self.rank() else None

    def complete(self, state_dict: dict[str, Any], units: Sequence[Unit], own: Sequence[Tensor]) -> None:
        """Put what other ranks keep into a state of the optimizer's parameters ``own``.

        Raises:
            RuntimeError: It was not consolidated here since the last step.
        """
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        numbers = {id(p): i for i, p in zip(saved, own, strict=True)}
        known = {weight for place in self.places for weight in place.weights}
        for unit in units:
            weight, number = id(unit.weight), numbers[id(unit.weight)]
            state = state_dict["state"].get(number)
            if state is None or "root" in state:
                continue
            if weight in known and self._whole is None:
                raise RuntimeError(
                    "consequentialism.optim.Emended with shard_state=True: this rank keeps its share of the state "
                    "alone; call consolidate_state_dict(to=0) on all ranks before state_dict() on that one, or "
                    "consolidate_state_dict(to=None) before it on all"
                )
            rest = memory.fresh_state(unit) if self._whole is None or weight not in known else self._whole[weight]
            state_dict["state"][number] = {**state, **{key: rest[key] for key in KEPT}}

    def forget(self, units: Sequence[Unit]) -> None:
        """Of these weights, as before the first refresh; all ranks forget the same."""
        gone = {id(unit.weight) for unit in units}
        kept = [place._replace(weights=[w for w in place.weights if w not in gone]) for place in self.places]
        self._whole, self.places = None, [place for place in kept if place.weights]

    def keep(self, units: Sequence[Unit], states: Sequence[memory.State]) -> None:
        """Deal out states that all ranks have loaded: of the others' moments this rank keeps nothing."""
        self.forget(units)
        shared: dict[int, list[int]] = {}
        for i, state in enumerate(states):
            leader = next(j for j, other in enumerate(states) if other["root"] is state["root"])
            shared.setdefault(leader, []).append(i)
        self.places = self._dealt_out(units, shared)
        rank = self.rank()
        for place, members in zip(self.places, shared.values(), strict=True):
            for i in members if place.owner != rank else ():
                for key in KEPT:
                    del states[i][key]


def _size(unit: Unit) -> int:
    return math.prod(unit.slot.shape) * unit.slot.dtype.itemsize
