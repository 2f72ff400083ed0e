"""What the layers of a model are to steps in coordinates: how each kind makes rows, and how its weight lies as rows."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..autograd.geometry import Geometry, normalized, normalized_transposed
from ..backend import dispatch, reference
from ..nn.conv import sides_of
from ..nn.module import EmendedModule
from ..nn.registry import DEFAULTS, Form, form_of
from ..options import Options
from ..precision import compute_dtype
from .blocks import Blocks

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Kind:
    """A linear layer with a weight ``[O, I]``; the other kinds differ in its methods.

    Attributes:
        name: In messages; equal for layers that use a weight in the same way.
    """

    name = "a linear layer"
    groups = 1
    inputs_together = 1  # of the rows, which blocks keep together where they can
    outputs_first = True  # whether the weight's first dimension is that of the outputs

    weight_name = "weight"
    bias_name = "bias"

    def __init__(self, module: Any) -> None:
        """Take a layer, or something with its settings; the kind keeps nothing of it."""

    def weight(self, module: nn.Module) -> Any:
        return module._parameters.get(self.weight_name)

    def bias(self, module: nn.Module) -> Any:
        return module._parameters.get(self.bias_name)

    def inputs_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
        """The inputs among forward's arguments that meet the weight: one tensor, or one for each group."""
        return (args[0] if args else next(iter(kwargs.values())),)

    def view(self, weight: Tensor) -> Tensor:
        """The weight as ``[groups, O/groups, ...]``, of which the last dimensions are the inputs; always a view."""
        return weight[None]

    def signature(self) -> tuple[Any, ...]:
        """Equal for layers that make the same rows of the same input and whose weights lie alike."""
        return (self.name,)

    def layout(self) -> tuple[Any, ...]:
        """Equal for layers whose rows have the same meaning for a weight that they share."""
        return (self.name, self.groups)

    def inputs(self, weight: Tensor) -> int:
        """``I`` without the bias's."""
        return math.prod(self.view(weight).shape[2:])

    def scale_count(self, x: Tensor, rows: int, per_sample: bool) -> int:
        """The number that the Gram is divided by: its rows, or with ``per_sample`` a convolution's samples."""
        return rows

    def gram(self, x: Tensor, blocks: Blocks, dtype: torch.dtype) -> tuple[Tensor, int]:
        """``x^T x`` of the rows, ``[groups, n, b, b]`` in ``dtype``, and how many there are."""
        rows = x.reshape(-1, x.shape[-1])
        rows = rows.to(dtype) if dtype == torch.float64 else rows
        nothing = rows.new_empty(blocks.count, blocks.order, blocks.order, dtype=compute_dtype(rows.dtype))
        gram = dispatch.for_coordinates(rows).decayed_gram(nothing, rows, blocks.bias, 0.0, 1.0)
        return gram.to(dtype)[None], rows.shape[0]


class TransposedLinear(Kind):
    """A linear layer with a weight ``[I, O]``, as `transformers`' ``Conv1D``."""

    name = "a linear layer with a transposed weight"
    outputs_first = False

    def view(self, weight: Tensor) -> Tensor:
        return weight.T[None]


class Convolution(Kind):
    """Its rows are patches."""

    name = "a convolution"

    def __init__(self, own: Any) -> None:
        super().__init__(own)
        self.groups = own.groups
        self.geometry = (own.stride, own.padding, own.dilation, own.groups)
        self.kernel = tuple(own.kernel_size)
        self.inputs_together = math.prod(self.kernel)
        padded = own.padding_mode != "zeros"
        self.padding_mode = own.padding_mode if padded else None
        self.sides = sides_of(own, self.kernel) if padded else []

    def signature(self) -> tuple[Any, ...]:
        return (self.name, self.kernel, self.geometry, self.padding_mode)

    def view(self, weight: Tensor) -> Tensor:
        return weight.unflatten(0, (self.groups, -1))

    def scale_count(self, x: Tensor, rows: int, per_sample: bool) -> int:
        if not per_sample:
            return rows
        return x.shape[0] if x.ndim == len(self.kernel) + 2 else 1

    def gram(self, x: Tensor, blocks: Blocks, dtype: torch.dtype) -> tuple[Tensor, int]:
        batch = x if x.ndim == len(self.kernel) + 2 else x[None]
        stride, padding, dilation, groups = self.geometry
        if self.padding_mode is not None:
            batch, padding = F.pad(batch, self.sides, mode=self.padding_mode), 0
        normal = normalized(batch, self.kernel, stride, padding, dilation, groups)
        assert normal is not None
        return self._gram(*normal, blocks, dtype)

    def _gram(self, batch: Tensor, geometry: Geometry, blocks: Blocks, dtype: torch.dtype) -> tuple[Tensor, int]:
        rows = batch.shape[0] * math.prod(geometry.positions(batch))
        backend, count = dispatch.select("auto", batch), blocks.count if blocks.aligned else 1
        # Blocks of whole channels are the groups of a convolution of more groups.
        cut = replace(geometry, groups=geometry.groups * count)
        gram = cut.gram(backend, batch, blocks.bias, Options.patch_bytes, dtype)
        if count == 1:
            return blocks.of(gram), rows
        gram = gram.unflatten(0, (geometry.groups, count))
        if blocks.bias:  # its column belongs to the last block alone
            gram[:, :-1, -1], gram[:, :-1, :, -1] = 0, 0
        return gram, rows


class TransposedConvolution(Convolution):
    """The convolution of its input, zeros between the entries, with the reversed kernel."""

    name = "a transposed convolution"
    outputs_first = False

    def __init__(self, own: Any) -> None:
        super().__init__(own)
        self.output_padding = tuple(own.output_padding)

    def signature(self) -> tuple[Any, ...]:
        return (*super().signature(), self.output_padding)

    def view(self, weight: Tensor) -> Tensor:
        return weight.unflatten(0, (self.groups, -1)).transpose(1, 2)

    def gram(self, x: Tensor, blocks: Blocks, dtype: torch.dtype) -> tuple[Tensor, int]:
        batch = x if x.ndim == len(self.kernel) + 2 else x[None]
        stride, padding, dilation, groups = self.geometry
        geometry = normalized_transposed(self.kernel, stride, padding, self.output_padding, groups, dilation)
        return self._gram(batch, geometry, blocks, dtype)


class Lookup(Kind):
    """An embedding: rows are one-hot, their Gram is diagonal."""

    name = "an embedding"
    outputs_first = False

    def __init__(self, own: Any) -> None:
        super().__init__(own)
        self.padding_idx = own.padding_idx

    def bias(self, module: nn.Module) -> Any:
        return None

    def signature(self) -> tuple[Any, ...]:
        return (self.name, self.padding_idx)

    def view(self, weight: Tensor) -> Tensor:
        return weight.T[None]

    def gram(self, x: Tensor, blocks: Blocks, dtype: torch.dtype) -> tuple[Tensor, int]:
        counts = reference.embedding_counts(x.reshape(-1), blocks.inputs, self.padding_idx)
        return counts.to(dtype), x.numel()


KINDS: dict[type[nn.Module], type[Kind]] = {
    nn.Linear: Kind,
    nn.Embedding: Lookup,
    **dict.fromkeys(CONVOLUTIONS, Convolution),
    **dict.fromkeys(TRANSPOSED, TransposedConvolution),
}


def kind_of(module: nn.Module) -> Kind | str | None:
    """How a layer makes rows; why it cannot be stepped in coordinates; or None, where it is no such layer."""
    converted = isinstance(module, EmendedModule)
    form: Form | None = getattr(type(module), "_emended_form", None) if converted else form_of(type(module))
    plain = next((plain for plain in KINDS if isinstance(module, plain)), None)
    if form is None and plain is None:
        return None
    if "forward" in module.__dict__:
        return "its forward is replaced on the instance"
    if form is None:
        assert plain is not None
        if not _is_converted(module):
            return f"{type(module).__name__} is a subclass of {plain.__name__} with code of its own"
        form = Form(plain)
    own = _settings(module, form)
    if form.like is nn.Embedding and own.sparse:
        return "its gradient is sparse"
    if form.like is nn.Embedding and own.scale_grad_by_freq:
        return "scale_grad_by_freq already divides by the counts"
    unserved = form.obstacle(module)
    if unserved is not None:
        return unserved
    kind = (TransposedLinear if form.transposed else KINDS[form.like])(own)
    kind.weight_name, kind.bias_name = form.weight, form.bias
    return kind


def _settings(module: nn.Module, form: Form) -> Any:
    """What says how a layer maps its input: the layer itself, or, of a registered class, what it has of that."""
    if isinstance(module, form.like):
        return module
    own = SimpleNamespace(**{name: getattr(module, name, value) for name, value in DEFAULTS[form.like].items()})
    weight = module._parameters.get(form.weight)
    if form.dimensions() > 2 and weight is not None:
        own.kernel_size = tuple(weight.shape[2:])
        for name in ("stride", "padding", "dilation", "output_padding"):
            value = getattr(own, name, None)
            if isinstance(value, int):
                setattr(own, name, (value,) * len(own.kernel_size))
    return own


def _is_converted(module: nn.Module) -> bool:
    """Whether `convert` made it, whose forward is torch's own but for the gradient."""
    return isinstance(module, EmendedModule) and type(module).__module__.startswith("consequentialism.")
