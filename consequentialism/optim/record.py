"""What a forward tells the optimizer: each layer's input Gram, entered once its backward has run."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from .. import _torch
from ..autograd.linear import full_precision
from .layers import Kind
from .root import Blocks


class Slot:
    """The Gram of one weight's inputs since the last step, ``[groups, n, b, b]`` or ``[V]``, and its count.

    A batch whose Gram is not finite enters neither; the device decides that. A refresh that fails in the middle can be
    taken again: what it has done is noted.

    Attributes:
        summed: Whether the ranks' Grams stand in it.
        folded: Whether it was taken into the moment.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        self.calls: list[int] = []  # the numbers of the Grams that backward has added
        self.gram: Tensor | None = None
        self.count: Tensor | None = None
        self.summed = self.folded = False

    def open(self) -> None:
        """Make room; before forward, so that torch.compile finds it there."""
        if self.gram is None:
            self.gram = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
            # One entry, not 0-dimensional: what torch.compile takes for a Python number it does not change.
            self.count = torch.zeros(1, dtype=torch.float64 if self.device.type != "mps" else None, device=self.device)

    def close(self) -> None:
        """Give the memory back."""
        self.gram = self.count = None
        self.calls = []
        self.summed = self.folded = False

    def clear(self) -> None:
        """Forget what was added in backward."""
        if self.calls and self.gram is not None and not self.is_traced():
            self.close()
            self.open()

    def changes(self) -> int:
        """How often something was added. It is the only sign that a compiled graph leaves on the host."""
        return 0 if self.count is None else self.count._version

    def is_traced(self) -> bool:
        """Whether a compiled forward has added to it."""
        return self.changes() != len(self.calls)

    def add(self, gram: Tensor, count: Tensor | int) -> None:
        """Add a batch's."""
        assert self.gram is not None
        assert self.count is not None
        trace = gram.sum() if gram.ndim == 1 else gram.diagonal(dim1=-2, dim2=-1).sum()
        finite = trace.isfinite()
        self.gram.add_(torch.where(finite, gram, 0))
        self.count.add_(torch.where(finite, count, 0))


class Recorder:
    """Whether forwards are recorded now, and the Grams that several layers of one input share.

    Attributes:
        recording: A plain bool, on which torch.compile guards: one graph with the Grams, one without.
        wrapper: The DistributedDataParallel around what was recorded last.
    """

    def __init__(self) -> None:
        self.recording = False
        self.one_process = False
        self.wrapper: weakref.ref[nn.Module] | None = None
        self.handles: list[RemovableHandle] = []
        self.slots: list[Slot] = []
        self._known: dict[tuple[Any, ...], tuple[weakref.ref[Tensor], int, weakref.ref[Tensor], Any, int]] = {}
        self._calls = 0

    def begin(self) -> None:
        """Record from now on."""
        for slot in self.slots:
            slot.open()
        self.recording = True

    def end(self) -> None:
        """Record no more, and forget what was recorded."""
        for slot in self.slots:
            slot.close()
        self._known.clear()
        self.recording = False

    def ran(self) -> bool:
        """Whether any layer was recorded since the last step."""
        return any(slot.changes() for slot in self.slots)

    def discard(self) -> None:
        """Forget the batches whose gradients are thrown away. What a compiled forward has recorded stays."""
        if self.recording:
            for slot in self.slots:
                slot.clear()

    def detach(self) -> None:
        """Take the hooks off the layers."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def gram(self, kind: Kind, blocks: Blocks, x: Tensor, per_sample: bool, slot: Slot) -> tuple[Tensor, Any, int]:
        """The Gram of ``x``, its count and number; the same ones for layers of one kind with the same input."""
        key = (id(x), kind.signature(), blocks.count, blocks.columns, slot.dtype)
        known = self._known.get(key)
        if known is not None and known[0]() is x and known[1] == x._version:
            gram = known[2]()
            if gram is not None:
                return gram, *known[3:]
        gram, count = gram_of(kind, blocks, x, per_sample, slot.dtype)
        self._known[key] = (weakref.ref(x), x._version, weakref.ref(gram), count, self.number())
        return gram, count, self._calls

    def number(self) -> int:
        """That of a Gram that is new."""
        self._calls += 1
        return self._calls


def gram_of(kind: Kind, blocks: Blocks, x: Tensor, per_sample: bool, dtype: torch.dtype) -> tuple[Tensor, Any]:
    """``x^T x`` in ``dtype``, and what the mean divides it by."""
    with full_precision(x.device.type):
        gram, rows = kind.gram(x, blocks, dtype)
    return gram, kind.scale_count(x, rows, per_sample)


def joined(parts: Sequence[tuple[Tensor, Any]]) -> tuple[Tensor, Any]:
    """The Grams of several inputs, a group each, and the first one's count, to which the others are scaled."""
    gram, count = parts[0]
    if len(parts) == 1:
        return gram, count
    scaled = [own if other is count else own * (count / max(other, 1)) for own, other in parts]
    return torch.cat(scaled), count


def first_tensor(output: Any) -> Tensor:
    """Of what a module returns: the tensor itself, or the first of a tuple; of a packed sequence its data."""
    while isinstance(output, tuple) and not isinstance(output, Tensor):
        output = output[0]
    return output


class Hook:
    """A layer's forward hook. Copied or pickled it does nothing: a copy of a model belongs to no optimizer."""

    steps_in_coordinates = True  # what `convert` looks for

    def __init__(self, recorder: Recorder, slot: Slot, kind: Kind, blocks: Blocks, per_sample: bool) -> None:
        self.recorder = recorder
        self.slot = slot
        self.kind = kind
        self.blocks = blocks
        self.per_sample = per_sample

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        recorder = self.recorder
        if not recorder.recording or not module.training or not torch.is_grad_enabled():
            return
        weight = self.kind.weight(module)
        if weight is None:
            raise ValueError(
                f"{self.kind.weight_name} of a {type(module).__name__} that consequentialism.optim.Emended steps is no "
                "parameter any more; prune or parametrise first, and make the optimizer then"
            )
        if not weight.requires_grad:
            return
        inputs = self.kind.inputs_of(args, kwargs)
        if torch.compiler.is_compiling():
            self._trace(inputs)
        elif not _torch.transforms_active():
            self._note(inputs, first_tensor(output))

    def _trace(self, inputs: Sequence[Tensor]) -> None:
        """In a compiled forward the Gram enters at once, for a graph has no hooks on its tensors."""
        with torch.no_grad():
            parts = [gram_of(self.kind, self.blocks, x.detach(), self.per_sample, self.slot.dtype) for x in inputs]
            self.slot.add(*joined(parts))

    def _note(self, inputs: Sequence[Tensor], output: Tensor) -> None:
        """Backward enters the Gram: once, whatever checkpointing runs again, and only with its gradient."""
        if not output.requires_grad:
            return
        wrapper = getattr(DistributedDataParallel, "_active_ddp_module", None)
        self.recorder.wrapper = None if wrapper is None else weakref.ref(wrapper)
        if self.recorder.one_process and wrapper is not None:
            raise ValueError(
                "process_group must not be None under DistributedDataParallel, whose replicas would drift apart; "
                "use process_group='auto'"
            )
        with torch.no_grad():
            parts = [
                self.recorder.gram(self.kind, self.blocks, whole_input(x), self.per_sample, self.slot) for x in inputs
            ]
            gram, count = joined([part[:2] for part in parts])
            call = parts[0][2] if len(parts) == 1 else self.recorder.number()
        output.register_hook(_Entry(self.slot, gram, count, call))

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[()]]:
        return _NoHook, ()

    def __deepcopy__(self, memo: dict[int, Any]) -> _NoHook:
        return _NoHook()


class _NoHook:
    """What a copied model has in the place of its hooks."""

    def __call__(self, *_: Any, **__: Any) -> None:
        pass


class _Entry:
    """A hook on a layer's output that enters the Gram."""

    def __init__(self, slot: Slot, gram: Tensor, count: Tensor | int, call: int) -> None:
        self.entry = slot, gram, count, call

    def __call__(self, grad: Tensor) -> None:
        slot, gram, count, call = self.entry
        if slot.gram is None:  # a step was taken between forward and backward
            return
        with torch.no_grad():
            slot.add(gram, count)
        slot.calls.append(call)


def whole_input(x: Tensor) -> Tensor:
    """This rank's rows as a plain tensor."""
    if not _torch.is_dtensor(x):
        return x
    shared: Any = x
    split = any(p.is_partial() or (p.is_shard() and p.dim % x.ndim == x.ndim - 1) for p in shared.placements)
    return shared.full_tensor() if split else shared.to_local()
