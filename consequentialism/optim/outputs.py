"""The side of the outputs: a root ``L`` of the second moment of a weight's gradient, beside ``S`` of its inputs'.

In ``optimizer.state[weight]``, where `Emended` has an ``output_exponent``; of embeddings there are none, nor of weights
with one output a group, whose ``L`` would be a number:

- ``output_gram``: ``B [groups, n, b, b]``, the sum of ``(g S)(g S)^T`` over the steps in which ``L`` was made, older
  ones forgotten by the factor ``memory`` a step; diagonal blocks of at most `BLOCK` outputs each.
- ``output_root``: ``L``, of the same shape.
- ``output_steps``: how many steps there were when they were made.

Only ratios of ``B`` count, for ``L`` is relative to its trace: gradients need no unit, and no number of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _torch
from ..backend import dispatch
from ..backend.reference.coordinates import block_spans
from ..solve.root import eigen_power, method, power
from .blocks import Blocks
from .memory import ROOM, State, checked_count, checked_tensor
from .units import Unit

KEYS = ("output_gram", "output_root", "output_steps")
TENSORS = KEYS[:2]
BLOCK = 64  # outputs of a block: one step's gradient says little of more

Side = tuple[Unit, State, Tensor]  # a weight, its state, and the moment of this step's gradient


class Outputs(NamedTuple):
    """How ``L = ((B + c I) / t)^-q`` is made, with ``t = trace(B) / O`` and ``c = damping * t``.

    Attributes:
        exponent: ``q``.
        damping: Relative to ``t``.
        memory: What older gradients' moments are multiplied by in a step.
    """

    exponent: float
    damping: float
    memory: float

    def check(self, units: Sequence[Unit]) -> None:
        """Raise where a rank has not all of a weight's outputs."""
        sharded = [unit.name for unit in units if _torch.is_dtensor(unit.weight)]
        if sharded:
            raise ValueError(
                "output_exponent must be 0 where a rank has some outputs alone, as those of sharded weights: "
                f"{', '.join(map(repr, sharded[:5]))}"
            )

    def complete(self, unit: Unit, state: dict[str, Any]) -> None:
        """Put what a weight's state lacks into it: no gradients seen, and the identity."""
        if not has_root(unit) or "output_root" in state:
            return
        shape, slot = _shape(unit), unit.slot
        eye = torch.eye(shape[-1], dtype=slot.dtype, device=slot.device)
        moment = torch.zeros(shape, dtype=slot.dtype, device=slot.device)
        steps = torch.zeros((), dtype=torch.int64)
        state.update(output_gram=moment, output_root=eye.expand(shape).clone(), output_steps=steps)

    def checked_state(self, unit: Unit, state: State) -> State:
        """Copies of a saved state's in the unit's type on its device; nothing where it has none.

        Raises:
            ValueError: Some of them alone, another shape, NaN or infinity, steps that were not taken.
        """
        missing = [key for key in KEYS if key not in state]
        if not has_root(unit) or len(missing) == len(KEYS):
            return {}
        if missing:
            raise ValueError(f"state_dict has no {', '.join(missing)} of layer {unit.name!r}")
        own: State = {key: checked_tensor(unit, state, key, _shape(unit), "layer") for key in TENSORS}
        steps, most = (checked_count(unit, state, key) for key in ("output_steps", "emended_steps"))
        if steps > most:
            raise ValueError(
                f"state_dict: output_steps of layer {unit.name!r} must be at most emended_steps, {most}, got {steps}"
            )
        own["output_steps"] = torch.as_tensor(steps)
        return own

    def take(self, sides: Sequence[Side], steps: int) -> None:
        """Take a step's moments into every ``B``, and make every ``L`` anew; in place.

        Nothing of a gradient that is not finite enters; where all were zero, ``L`` stays as it was.

        Args:
            steps: How many there were, this one counted.
        """
        for alike in _batches(sides):
            self._take_alike(alike, steps)
            for _, state, _ in alike:
                state["output_steps"].fill_(steps)

    def _take_alike(self, sides: Sequence[Side], steps: int) -> None:
        """`take` of blocks ``[k, b, b]`` of one order, those of a weight's group one after the other."""
        fresh = torch.cat([moment.flatten(0, 1) for *_, moment in sides])
        before, roots = (torch.cat([state[key].flatten(0, 1) for _, state, _ in sides]) for key in TENSORS)
        sizes = [(unit.groups, _blocks(unit)) for unit, *_ in sides]
        counts = [groups * blocks.count for groups, blocks in sizes]
        lengths = torch.tensor([blocks.count for groups, blocks in sizes for _ in range(groups)])
        owner = torch.repeat_interleave(torch.arange(len(lengths)), lengths).to(fresh.device)

        def of_blocks(values: Sequence[float]) -> Tensor:
            """A number of each weight as one ``[k, 1, 1]`` of its blocks."""
            spread = torch.tensor(values, dtype=fresh.dtype).repeat_interleave(torch.tensor(counts))
            return spread.to(fresh.device)[:, None, None]

        def traces(moments: Tensor) -> Tensor:
            """Of each block's group."""
            each = moments.diagonal(dim1=-2, dim2=-1).sum(-1)
            return each.new_zeros(len(lengths)).index_add_(0, owner, each)[owner][:, None, None]

        kept = of_blocks([self.memory ** (steps - int(state["output_steps"])) for _, state, _ in sides])
        moments = torch.where(traces(fresh).isfinite(), torch.addcmul(fresh, before, kept), before)
        mean = traces(moments) / of_blocks([float(blocks.inputs) for _, blocks in sizes])
        alive = mean > 0
        scaled = moments / torch.where(alive, mean, 1)
        made = self._roots_of(scaled, max(blocks.inputs for _, blocks in sizes))
        roots = torch.where(alive & made.sum((1, 2), keepdim=True).isfinite(), made, roots)
        for (_, state, _), *values in zip(sides, moments.split(counts), roots.split(counts), strict=True):
            for key, value in zip(TENSORS, values, strict=True):
                state[key].copy_(value.view(state[key].shape))

    def _roots_of(self, scaled: Tensor, outputs: int) -> Tensor:
        """``(B + damping I)^-q`` of blocks ``[k, b, b]`` with traces of at most ``outputs``."""
        if method(self.exponent, scaled.device.type) == "eigenvalues":
            # In float32 where the ridge is far above what rounding does to eigenvalues: L then errs by up to 7e-5.
            narrow = self.damping >= 1e-4 * outputs
            return eigen_power(scaled, self.damping, self.exponent, scaled.dtype if narrow else None)
        return power(dispatch.for_coordinates(scaled), scaled, self.damping, self.exponent, outputs)


def has_root(unit: Unit) -> bool:
    """Whether a weight's outputs have a root."""
    return not unit.diagonal and unit.kind.view(unit.weight).shape[1] > 1


def left_multiplied(unit: Unit, root: Tensor, values: Sequence[Tensor]) -> list[Tensor]:
    """``L [values]`` of a weight's gradient or change and the bias's, with their shapes, in L's type.

    Args:
        root: ``L [groups, n, b, b]``.
    """
    rows, column = _as_rows(unit, [value.to(root.dtype) for value in values])
    product = rows.new_empty(rows.shape)
    beside = None if column is None else column.new_empty(column.shape)
    for i, (begin, end) in enumerate(block_spans(rows.shape[1], root.shape[1])):
        square = root[:, i, : end - begin, : end - begin]
        product[:, begin:end] = torch.bmm(square, rows[:, begin:end])
        if column is not None and beside is not None:
            beside[:, begin:end] = torch.bmm(square, column[:, begin:end, None])[..., 0]
    if unit.kind.outputs_first and values[0].is_contiguous():
        result = product.view(values[0].shape)
    else:
        result = torch.empty_like(values[0], dtype=root.dtype)
        own = unit.kind.view(result)
        own.copy_(product.view(own.shape))
    return [result] if beside is None else [result, beside.view(-1)]


def _blocks(unit: Unit) -> Blocks:
    """How a weight's outputs are cut, those of each group."""
    return Blocks(unit.kind.view(unit.weight).shape[1], False, BLOCK)


def _shape(unit: Unit) -> tuple[int, ...]:
    blocks = _blocks(unit)
    return unit.groups, blocks.count, blocks.order, blocks.order


def _batches(sides: Sequence[Side]) -> list[list[Side]]:
    """Those whose blocks are made together: of one order, and not too many."""
    batches: dict[Any, list[list[Side]]] = {}
    for side in sides:
        moment = side[1]["output_gram"]
        alike = batches.setdefault((moment.shape[-1], moment.dtype, moment.device), [[]])
        if alike[-1] and sum(state["output_gram"].numel() for _, state, _ in alike[-1]) + moment.numel() > ROOM:
            alike.append([])
        alike[-1].append(side)
    return [batch for alike in batches.values() for batch in alike]


def moment_of(unit: Unit, gradients: Sequence[Tensor]) -> Tensor:
    """The diagonal blocks ``[groups, n, b, b]`` of ``G G^T`` with ``G = [g | g_bias] S``, the bias's a column."""
    rows, column = _as_rows(unit, gradients)
    whole = rows if column is None else torch.cat([rows, column[..., None]], -1)
    blocks = _blocks(unit)
    groups, count, order = unit.groups, blocks.count, blocks.order
    if count * order == blocks.inputs:
        equal = whole.reshape(groups * count, order, whole.shape[-1])
        return torch.bmm(equal, equal.mT).view(groups, count, order, order)
    cut = whole.new_zeros(groups, count, order, order)
    for i, (begin, end) in enumerate(blocks.spans):
        own = whole[:, begin:end]
        cut[:, i, : end - begin, : end - begin] = torch.bmm(own, own.mT)
    return cut


def _as_rows(unit: Unit, values: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """A weight's values as ``[groups, O, I]``, and the bias's as ``[groups, O]`` where there are two."""
    rows = unit.kind.view(values[0]).flatten(2)
    return rows, values[1].reshape(unit.groups, -1) if len(values) > 1 else None
