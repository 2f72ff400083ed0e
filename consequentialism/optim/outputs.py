"""The side of the outputs: a root ``L`` of the second moment of a weight's gradient, beside ``S`` of its inputs'.

In ``optimizer.state[weight]``, where `Emended` has an ``output_exponent``; of embeddings there is neither:

- ``output_gram``: ``B [groups, n, b, b]``, the sum of ``(g S)(g S)^T`` over the steps in which ``L`` was made, older
  ones forgotten by the factor ``memory`` a step; diagonal blocks of at most `BLOCK` outputs each.
- ``output_root``: ``L``, of the same shape.

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
from .memory import ROOM, State
from .steps import local
from .units import Unit

KEYS = ("output_gram", "output_root")
BLOCK = 64  # outputs of a block: one step's gradient says little of more


Side = tuple[Unit, State, Sequence[Tensor]]  # a weight, its state, and [g | g_bias] S, the bias's beside the weight's


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
        if unit.diagonal or KEYS[1] in state:
            return
        shape, slot = _shape(unit), unit.slot
        eye = torch.eye(shape[-1], dtype=slot.dtype, device=slot.device)
        moment = torch.zeros(shape, dtype=slot.dtype, device=slot.device)
        state.update(output_gram=moment, output_root=eye.expand(shape).clone())

    def checked_state(self, unit: Unit, state: dict[str, Any]) -> dict[str, Any]:
        """Copies of a saved state's in the unit's type on its device; nothing where it has none.

        Raises:
            ValueError: Another shape, NaN or infinity.
        """
        if unit.diagonal or any(key not in state for key in KEYS):
            return {}
        own = {}
        for key in KEYS:
            value = local(state[key])
            if tuple(value.shape) != _shape(unit):
                raise ValueError(
                    f"state_dict: {key} of layer {unit.name!r} must have the shape {list(_shape(unit))}, got "
                    f"{list(value.shape)}: it was saved with another layer"
                )
            if not bool(value.isfinite().all()):
                raise ValueError(f"state_dict: {key} of layer {unit.name!r} has NaN or infinity")
            own[key] = value.detach().to(unit.slot.device, unit.slot.dtype, copy=True)
        return own

    def take(self, sides: Sequence[Side], steps: int) -> None:
        """Take a step's gradients into every ``B``, and make every ``L`` anew; in place.

        Nothing of a gradient that is not finite enters; where all were zero, ``L`` stays as it was.

        Args:
            steps: How many there were since ``B`` was taken last, this one counted.
        """
        for alike in _batches(sides):
            self._take_alike(alike, self.memory**steps)

    def _take_alike(self, sides: Sequence[Side], kept: float) -> None:
        """`take` of blocks ``[k, b, b]`` of one order, those of a weight's group one after the other."""
        fresh = torch.cat([_moment(unit, gradients).flatten(0, 1) for unit, _, gradients in sides])
        before, roots = (torch.cat([state[key].flatten(0, 1) for _, state, _ in sides]) for key in KEYS)
        sizes = [(unit.groups, _blocks(unit)) for unit, _, _ in sides]
        lengths = [blocks.count for groups, blocks in sizes for _ in range(groups)]
        outputs = torch.tensor([float(blocks.inputs) for groups, blocks in sizes for _ in range(groups * blocks.count)])
        owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        together = (owner == owner[:, None]).to(fresh.device)

        def traces(moments: Tensor) -> Tensor:
            """Of each block's group."""
            return torch.where(together, moments.diagonal(dim1=-2, dim2=-1).sum(-1), 0).sum(1)[:, None, None]

        moments = torch.where(traces(fresh).isfinite(), torch.add(fresh, before, alpha=kept), before)
        mean = traces(moments) / outputs.to(fresh)[:, None, None]
        alive = mean > 0
        scaled = moments / torch.where(alive, mean, 1)
        made = self._roots_of(scaled, max(blocks.inputs for _, blocks in sizes))
        roots = torch.where(alive & made.sum((1, 2), keepdim=True).isfinite(), made, roots)
        counts = [groups * blocks.count for groups, blocks in sizes]
        for (_, state, _), *values in zip(sides, moments.split(counts), roots.split(counts), strict=True):
            for key, value in zip(KEYS, values, strict=True):
                state[key].copy_(value.view(state[key].shape))

    def _roots_of(self, scaled: Tensor, outputs: int) -> Tensor:
        """``(B + damping I)^-q`` of blocks ``[k, b, b]`` with traces of at most ``outputs``."""
        if method(self.exponent, scaled.device.type) == "eigenvalues":
            # In float32 too: what rounding does to an eigenvalue is far below a ridge that is no smaller than 1e-3.
            return eigen_power(scaled, self.damping, self.exponent, scaled.dtype if self.damping >= 1e-3 else None)
        return power(dispatch.for_coordinates(scaled), scaled, self.damping, self.exponent, outputs)


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
    result = product
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
        moment = side[1][KEYS[0]]
        alike = batches.setdefault((moment.shape[-1], moment.dtype, moment.device), [[]])
        if alike[-1] and sum(state[KEYS[0]].numel() for _, state, _ in alike[-1]) + moment.numel() > ROOM:
            alike.append([])
        alike[-1].append(side)
    return [batch for alike in batches.values() for batch in alike]


def _moment(unit: Unit, gradients: Sequence[Tensor]) -> Tensor:
    """The diagonal blocks ``[groups, n, b, b]`` of ``G G^T``, a bias's gradient a column of ``G``."""
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
