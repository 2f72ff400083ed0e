"""The weights that are stepped in coordinates: which layers use each, and products of its gradient with the root."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

from .. import _torch
from ..precision import moment_dtype
from .blocks import Blocks, add_right_multiplied_, right_multiply
from .composite import composite_kinds
from .layers import Kind, Lookup, kind_of
from .record import Slot
from .steps import local

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Unit:
    """One weight, with the bias of its layer where the optimizer has both.

    Attributes:
        name: Of the first layer that uses it.
        uses: The layers with their kinds.
        with_bias: Whether the bias is a column of the coordinates.
        groups: Of a convolution.
        blocks: How the inputs are cut.
        own: The weight as it was found.
        met: Whether a refresh has seen its gradients.
        stepped_as: The weight's type and device at its last step, whose state the optimizer has; None before that.
    """

    def __init__(self, names: list[str], uses: list[tuple[nn.Module, Kind]], with_bias: bool, block: int) -> None:
        self.name, self.names = names[0], names
        self.uses = uses
        self.with_bias = with_bias
        self.module, self.kind = uses[0]
        weight: Any = self.weight
        self.groups = self.kind.groups
        self.diagonal = isinstance(self.kind, Lookup)
        size = 2**62 if self.diagonal else block
        self.blocks = Blocks(self.kind.inputs(weight), with_bias, size, self.kind.inputs_together)
        square = (self.groups, self.blocks.count, self.blocks.order, self.blocks.order)
        shape = (self.blocks.inputs,) if self.diagonal else square
        self.own = weight
        self.met = False
        self.stepped_as: tuple[torch.dtype, torch.device] | None = None
        self.slot = Slot(shape, *self.place())
        self.check_sharding()

    def succeed(self, former: Unit | None) -> None:
        """Go on where an earlier unit of the weight, if any, left off, unless its coordinates were others."""
        if former is not None and former.slot.shape == self.slot.shape:
            self.slot, self.met, self.stepped_as = former.slot, former.met, former.stepped_as

    def place(self) -> tuple[torch.dtype, torch.device]:
        """The type and device of moments and roots beside the weight as it is now."""
        return moment_dtype(self.weight.dtype), local(self.weight).device

    @property
    def weight(self) -> Tensor:
        return self.kind.weight(self.module)

    @property
    def bias(self) -> Tensor | None:
        return self.kind.bias(self.module) if self.with_bias else None

    def stored_shape(self) -> tuple[int, ...]:
        """The shape of ``input_gram`` and ``root``: ``[V]``, ``[I, I]``, or with the groups or blocks before."""
        shape = self.slot.shape
        return shape if self.diagonal else tuple(n for n in shape[:2] if n != 1) + shape[2:]

    def check_sharding(self) -> None:
        """Raise where a mesh splits the weight in a way that no root follows."""
        for placement in getattr(self.weight, "placements", ()):
            if not (placement.is_replicate() or placement.is_shard(0)):
                raise ValueError(
                    f"layer {self.name!r}: its weight is sharded as {placement}; steps in coordinates know shards of "
                    "the first dimension (fully_shard, column-wise tensor parallelism); leave it out by filter_fn"
                )

    def multiply(self, root: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """``[weight | bias] S`` of gradients or changes with the shapes of this rank's parameters, in S's type."""
        whole = self.weight
        if not _torch.is_dtensor(whole):
            return self._multiplied(root, weight, bias)
        shard = Shard(whole)
        if self.diagonal:
            return weight * root[shard.begin : shard.begin + weight.shape[0], None], None
        if self.kind.outputs_first:
            return self._rows_multiplied(root, shard, weight, bias)
        weight, owner = shard.gathered(weight), self.bias
        if bias is None or owner is None:
            return shard.own(self._multiplied(root, weight, None)[0]), None
        beside = Shard(owner)
        product, column = self._multiplied(root, weight, beside.gathered(bias))
        assert column is not None
        return shard.own(product), beside.own(column)

    def transposed(self, root: Tensor) -> Tensor:
        """``S^T``, by which what the optimizer adds is multiplied."""
        return root if self.diagonal else root.mT

    def add_product_(
        self, root: Tensor, parameters: Sequence[Any], changes: Sequence[Tensor], shares: Sequence[Any]
    ) -> None:
        """``W <- share * W + change S^T`` of the weight, and of the bias where there are two parameters."""
        root = self.transposed(root)
        own = [local(parameter) for parameter in parameters]
        rows = None if own[0] is not parameters[0] else self._rows(own[0], root, changes)
        in_product = rows is not None and not isinstance(shares[0], Tensor)
        for value, share in list(zip(own, shares, strict=True))[in_product:]:
            if isinstance(share, Tensor) or share != 1:
                value.mul_(share)
        if rows is None:
            product, column = self.multiply(root, changes[0], changes[1] if len(changes) > 1 else None)
            own[0].add_(product)
            if column is not None:
                own[1].add_(column)
            return
        bias, column = (x[1].view(self.groups, -1) if len(x) > 1 else None for x in (own, changes))
        change, share = self.kind.view(changes[0]).flatten(2), shares[0] if in_product else 1
        add_right_multiplied_(rows, bias, change, column, root, self.blocks.spans, share)

    def _rows(self, weight: Tensor, root: Tensor, changes: Sequence[Tensor]) -> Tensor | None:
        """A weight as a view ``[groups, O, I]``, where there is one and products need no other type."""
        if weight.numel() == 0 or any(value.dtype != root.dtype for value in (weight, *changes)):
            return None
        view = self.kind.view(weight)
        if view.ndim == 3:
            return view
        return view.flatten(2) if self.kind.outputs_first and weight.is_contiguous() else None

    def _multiplied(self, root: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if weight.numel() == 0:
            return weight.to(root.dtype), None if bias is None else bias.to(root.dtype)
        view = self.kind.view(weight)
        rows = view.to(root.dtype).flatten(2)
        column = None if bias is None else bias.to(root.dtype).view(self.groups, -1)
        product, column = right_multiply(rows, column, root, self.blocks.spans)
        column = None if bias is None or column is None else column.reshape(-1)
        if self.kind.outputs_first:
            return product.reshape(weight.shape), column
        result = torch.empty_like(weight, dtype=root.dtype)
        own = self.kind.view(result)
        own.copy_(product.view(own.shape))
        return result, column

    def _rows_multiplied(
        self, root: Tensor, shard: Shard, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Rows of any of the groups, each with its own group's root."""
        if weight.shape[0] == 0:
            return weight.to(root.dtype), None if bias is None else bias.to(root.dtype)
        rows, column = weight.to(root.dtype).flatten(1)[None], None if bias is None else bias.to(root.dtype)[None]
        if self.groups > 1:
            places = torch.arange(shard.begin, shard.begin + weight.shape[0], device=weight.device)
            root = root[places // (shard.size // self.groups)]
            rows, column = rows.movedim(0, 1), None if column is None else column.mT
        product, column = right_multiply(rows, column, root, self.blocks.spans)
        return product.reshape(weight.shape), None if bias is None or column is None else column.reshape(-1)


class Shard:
    """Where this rank's rows of a sharded parameter stand in it."""

    def __init__(self, parameter: Any) -> None:
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        self.parameter = parameter
        self.size = parameter.shape[0]
        shape, offset = compute_local_shape_and_global_offset(
            parameter.shape, parameter.device_mesh, parameter.placements
        )
        self.begin, self.rows = offset[0], shape[0]

    def gathered(self, own: Tensor) -> Tensor:
        """All ranks' rows of what this rank has its own of."""
        from torch.distributed.tensor import DTensor

        like = self.parameter
        whole = DTensor.from_local(
            own, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
        )
        return whole.full_tensor()

    def own(self, whole: Tensor) -> Tensor:
        """This rank's rows."""
        return whole[self.begin : self.begin + self.rows]


def find_units(
    model: nn.Module,
    owned: set[int],
    filter_fn: Callable[[nn.Module, str], bool] | None,
    block: int,
    with_biases: bool,
) -> tuple[list[Unit], dict[str, str]]:
    """The weights that can be stepped in coordinates, and why the other layers are left alone, by name.

    Args:
        owned: The ids of the optimizer's parameters.
        filter_fn: Says which layers to take.
        block: The most inputs of a block.
        with_biases: Whether biases belong to the coordinates.

    Raises:
        ValueError: A weight that two layers use differently.
    """
    attention = (m for m in model.modules() if isinstance(m, nn.MultiheadAttention))
    inside = {id(inner) for m in attention for inner in m.modules() if inner is not m}
    holders = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    uses: dict[int, list[tuple[str, nn.Module, Kind]]] = {}
    left_alone: dict[str, str] = {}
    for name, module in model.named_modules():
        name = name.replace("_orig_mod.", "").removeprefix("_orig_mod")
        kinds, rest = composite_kinds(module)
        kind = None if id(module) in inside or kinds or rest else kind_of(module)
        found = [*kinds] if kind is None else [kind]
        if any(isinstance(own, Kind) for own in found) and filter_fn is not None and not filter_fn(module, name):
            continue
        if rest is not None:
            left_alone[name] = rest
        elif not found and id(module) not in inside and (matrices := _unknown_matrices(module, owned)):
            left_alone[name] = (
                f"{', '.join(matrices)} of {type(module).__name__}: no layer is called whose input could be seen; "
                "consequentialism.register says which of torch's layers its forward computes, if one"
            )
        for own in found:
            reason = own if isinstance(own, str) else _obstacle(own.weight(module), owned)
            if reason is not None or isinstance(own, str):
                left_alone[name] = str(reason)
            else:
                uses.setdefault(id(own.weight(module)), []).append((name, module, own))
    units = []
    for users in uses.values():
        linear = [user for user in users if not isinstance(user[2], Lookup)] or users
        _check_uses(linear)
        names, layers = [name for name, *_ in linear], [(module, kind) for _, module, kind in linear]
        bias = layers[0][1].bias(layers[0][0])
        alone = len(layers) == 1 and isinstance(bias, nn.Parameter) and holders[id(bias)] == 1
        with_bias = with_biases and alone and id(bias) in owned and bias.requires_grad and bias.ndim == 1
        units.append(Unit(names, layers, with_bias, block))
    return units, left_alone


def _unknown_matrices(module: nn.Module, owned: set[int]) -> list[str]:
    """A module's own parameters that the optimizer has, with two dimensions or more."""
    if isinstance(module, ParametrizationList):  # the parametrised module is named
        return []
    own = module._parameters.items()
    return [name for name, p in own if p is not None and id(p) in owned and not is_lazy(p) and p.ndim >= 2]


def _obstacle(weight: Any, owned: set[int]) -> str | None:
    if not isinstance(weight, nn.Parameter):
        return "its weight is computed, not a parameter"
    if is_lazy(weight):
        return "its weight has no shape yet; make the optimizer after the first forward"
    if id(weight) not in owned:
        return "the optimizer has not its weight"
    if weight.dtype not in FLOATS:
        return f"its weight is {weight.dtype}"
    return "its weight is empty" if weight.numel() == 0 else None


def _check_uses(users: list[tuple[str, nn.Module, Kind]]) -> None:
    first, _, kind = users[0]
    for name, _, other in users[1:]:
        if other.layout() != kind.layout():
            raise ValueError(
                f"layers {first!r} and {name!r} use one weight differently, as {kind.name} and as {other.name}: no "
                "root serves both; leave them out by filter_fn, or untie them"
            )
