"""Modules with several weights of their own, of which those are stepped in coordinates whose input is the module's own.

`torch.nn.MultiheadAttention` multiplies its query, key and value by ``in_proj_weight``, which is three linear layers
one over the other; recurrent layers multiply their input by the lowest ``weight_ih``. What the other weights are
multiplied with arises inside and is seen by nobody outside: they are stepped plainly, and named.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .layers import Kind

ATTENTION_INPUTS = ("query", "key", "value")
RECURRENT = (nn.RNN, nn.LSTM, nn.GRU)
CELLS = (nn.RNNCell, nn.LSTMCell, nn.GRUCell)


class AttentionInput(Kind):
    """Queries', keys' and values' projections in one weight ``[3 E, E]``: a group each, with its own input's Gram."""

    name = "the input projection of an attention"
    groups = 3
    weight_name = "in_proj_weight"
    bias_name = "in_proj_bias"

    def view(self, weight: Tensor) -> Tensor:
        return weight.unflatten(0, (3, -1))

    def inputs_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
        return tuple(_argument(args, kwargs, i) for i in range(3))


class AttentionPart(Kind):
    """The projection of queries, keys or values where each has a weight of its own; their bias is one for all three."""

    name = "an input projection of an attention"

    def __init__(self, module: nn.Module, index: int) -> None:
        super().__init__(module)
        self.index = index
        self.weight_name = f"{'qkv'[index]}_proj_weight"

    def bias(self, module: nn.Module) -> Any:
        return None

    def inputs_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
        return (_argument(args, kwargs, self.index),)


class RecurrentInput(Kind):
    """The weight ``[gates * H, I]`` that a recurrent layer, or one step of one, multiplies its own input by."""

    name = "the input projection of a recurrent layer"

    def __init__(self, module: nn.Module, suffix: str) -> None:
        super().__init__(module)
        self.weight_name, self.bias_name = f"weight_ih{suffix}", f"bias_ih{suffix}"

    def inputs_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
        (x,) = super().inputs_of(args, kwargs)
        return (x.data if isinstance(x, nn.utils.rnn.PackedSequence) else x,)


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any], index: int) -> Tensor:
    return args[index] if index < len(args) else kwargs[ATTENTION_INPUTS[index]]


def composite_kinds(module: nn.Module) -> tuple[list[Kind], str | None]:
    """The weights of such a module that can be stepped in coordinates, and why its others cannot; none of another."""
    forward = type(module).forward
    if isinstance(module, nn.MultiheadAttention):
        if forward is not nn.MultiheadAttention.forward or "forward" in module.__dict__:
            return [], "its forward is not torch's own"
        whole = module.in_proj_weight is not None
        kinds: list[Kind] = [AttentionInput(module)] if whole else [AttentionPart(module, i) for i in range(3)]
        return kinds, "MultiheadAttention's out_proj: its input arises inside"
    for classes, suffixes in ((RECURRENT, ("_l0", "_l0_reverse")), (CELLS, ("",))):
        for plain in classes:
            if isinstance(module, plain):
                if forward is not plain.forward or "forward" in module.__dict__:
                    return [], "its forward is not torch's own"
                found = [s for s in suffixes if f"weight_ih{s}" in module._parameters]
                reason = f"{plain.__name__}'s recurrent weights and upper layers: their inputs arise inside"
                return [RecurrentInput(module, suffix) for suffix in found], reason
    return [], None
