"""Recording of what layers see: each layer's input Gram, entered once its backward has run."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from .. import _torch
from ..autograd.linear import full_precision
from ..functional.plain_path import is_exported
from ..nn.hooks import SCRIPTED, spent
from ..precision import moment_dtype, widest_dtype
from ..solve.gram import Gram
from .blocks import Blocks
from .composite import composite_kinds
from .layers import Kind

if TYPE_CHECKING:
    from .units import Unit


class Slot:
    """Where the Grams of one weight's inputs since the last step are added up, ``[groups, n, b, b]`` or ``[V]``.

    A refresh that fails in the middle can be taken again: what it has done is noted.

    Attributes:
        summed: Whether the ranks' Grams stand in it.
        folded: Whether it was taken into the moment.
        kept: Whether there is a state of its type, on its device.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        self.calls: list[int] = []  # the numbers of the Grams that backward has added
        self.gram: Gram | None = None
        self.summed = self.folded = self.kept = False

    def is_left_behind(self, weight: Tensor) -> bool:
        """Whether a weight was moved, as trainers do, and there is no state yet that would stay behind."""
        moved = (self.dtype, self.device) != (moment_dtype(weight.dtype), weight.device)
        return moved and not self.kept  # which torch.compile would guard on, were it read first

    def follow(self, weight: Tensor) -> None:
        """Be of the type and on the device of a weight."""
        self.dtype, self.device = moment_dtype(weight.dtype), weight.device
        if self.gram is not None:
            self.close()
            self.open()

    def open(self) -> None:
        """Make room; before forward, so that torch.compile finds it there."""
        if self.gram is None:
            matrix = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
            # One entry, not 0-dimensional: what torch.compile takes for a Python number it does not change.
            count = torch.zeros(1, dtype=widest_dtype(self.device.type), device=self.device)
            self.gram = Gram(matrix, count)

    def close(self) -> None:
        """Give the memory back."""
        self.gram = None
        self.calls = []
        self.summed = self.folded = False

    def clear(self) -> None:
        """Forget what was added in backward."""
        if self.calls and self.gram is not None and not self.is_traced():
            self.close()
            self.open()

    def changes(self) -> int:
        """How often something was added. It is the only sign that a compiled graph leaves on the host."""
        return 0 if self.gram is None else self.gram.count._version  # type: ignore[union-attr]

    def is_traced(self) -> bool:
        """Whether a compiled forward has added to it."""
        return self.changes() != len(self.calls)


def follow_outside_graphs(slot: Slot, weight: Tensor) -> None:
    """`Slot.follow`: what a graph has made is not there for the next operation of the graph to write to."""
    torch.compiler.disable(slot.follow, reason=MOVED)(weight)


FOLLOW = "optimizer.load_state_dict(optimizer.state_dict()) takes it there"
MOVED = "consequentialism.optim.Emended follows a model that was moved since: for a full graph make it after that"
_torch.never_inlined(follow_outside_graphs, MOVED)


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
        self._known: dict[tuple[Any, ...], tuple[weakref.ref[Tensor], int, weakref.ref[Gram], int]] = {}
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

    def attach(self, units: Sequence[Unit], per_sample: bool, optimizer: str) -> None:
        """Put hooks on the layers of these units, and on no others, and record nothing yet.

        Args:
            per_sample: Whether a convolution's Gram is divided by its samples.
            optimizer: What steps them, for people.
        """
        self.detach()
        self.end()
        self.slots = [unit.slot for unit in units]
        for unit in units:
            for module, kind in unit.uses:
                _, rest = composite_kinds(module)
                by = optimizer if rest is None else f"{optimizer}, without {rest}"
                hook = Hook(self, unit.slot, kind, unit.blocks, per_sample, by)
                self.handles.append(module.register_forward_hook(hook, with_kwargs=True))

    def detach(self) -> None:
        """Take the hooks off the layers."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def gram(self, kind: Kind, blocks: Blocks, x: Tensor, per_sample: bool, slot: Slot) -> tuple[Gram, int]:
        """The Gram of ``x`` and its number; the same ones for layers of one kind with the same input."""
        key = (id(x), kind.signature(), blocks.count, blocks.columns, slot.dtype)
        known = self._known.get(key)
        if known is not None and known[0]() is x and known[1] == x._version:
            gram = known[2]()
            if gram is not None:
                return gram, known[3]
        gram = gram_of(kind, blocks, x, per_sample, slot.dtype)
        self._known[key] = (weakref.ref(x), x._version, weakref.ref(gram), self.number())
        return gram, self._calls

    def number(self) -> int:
        """The number of a Gram that is new."""
        self._calls += 1
        return self._calls


def gram_of(kind: Kind, blocks: Blocks, x: Tensor, per_sample: bool, dtype: torch.dtype) -> Gram:
    """``x^T x [groups, n, b, b]`` of a layer's input in ``dtype``; it counts samples with ``per_sample``, else rows."""
    with full_precision(x.device.type):
        matrix, rows = kind.gram(x, blocks, dtype)
    return Gram(matrix, kind.scale_count(x, rows, per_sample))


def joined(parts: Sequence[Gram]) -> Gram:
    """The Grams of several inputs as one, a group each, scaled to the first one's count."""
    if len(parts) == 1:
        return parts[0]
    count: Any = parts[0].count
    matrices = [part.matrix if part.count is count else part.matrix * (count / max(part.count, 1)) for part in parts]
    return Gram(torch.cat(matrices), count)


def tensors_of(output: Any) -> list[Tensor]:
    """What a module returns that has gradients, as a recurrent layer's outputs and last states."""
    if isinstance(output, Tensor):
        return [output] if output.requires_grad else []
    parts = output if isinstance(output, tuple) else ()  # a packed sequence is one too
    return [tensor for part in parts for tensor in tensors_of(part)]


class Hook:
    """A layer's forward hook. Copied or pickled it does nothing: a copy of a model belongs to no optimizer.

    Attributes:
        steps_in_coordinates: What `convert` and `summary` look for: the optimizer's name, and what of the layer it
            leaves alone.
    """

    def __init__(
        self, recorder: Recorder, slot: Slot, kind: Kind, blocks: Blocks, per_sample: bool, optimizer: str
    ) -> None:
        self.steps_in_coordinates = optimizer
        self.recorder = recorder
        self.slot = slot
        self.kind = kind
        self.blocks = blocks
        self.per_sample = per_sample

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        recorder = self.recorder
        if not recorder.recording or not module.training or not torch.is_grad_enabled() or is_exported():
            return
        weight = self.kind.weight(module)
        if getattr(module, "_is_replica", False):
            raise RuntimeError(
                "consequentialism.optim.Emended does not see what DataParallel's replicas on several devices make of "
                "their rows; use DistributedDataParallel"
            )
        if weight is None:
            raise ValueError(
                f"{self.kind.weight_name} of a {type(module).__name__} that consequentialism.optim.Emended steps is no "
                "parameter any more; prune or parametrise first, and make the optimizer then"
            )
        if not weight.requires_grad:
            return
        if self.slot.is_left_behind(weight):
            (follow_outside_graphs if torch.compiler.is_compiling() else Slot.follow)(self.slot, weight)
        inputs = self.kind.inputs_of(args, kwargs)
        if torch.compiler.is_compiling():
            self._trace(inputs)
        elif not _torch.transforms_active():
            if self.slot.device != weight.device:
                raise RuntimeError(
                    f"consequentialism.optim.Emended: a {type(module).__name__}'s weight is on {weight.device} now, "
                    f"and its state stayed on {self.slot.device}: {FOLLOW}"
                )
            self._note(inputs, tensors_of(output))

    def _trace(self, inputs: Sequence[Tensor]) -> None:
        """In a compiled forward the Gram enters at once, for a graph has no hooks on its tensors."""
        with torch.no_grad():
            parts = [gram_of(self.kind, self.blocks, x.detach(), self.per_sample, self.slot.dtype) for x in inputs]
            assert self.slot.gram is not None
            self.slot.gram.add_(joined(parts))

    def _note(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """Backward enters the Gram: once, whatever checkpointing runs again, and only with its gradient."""
        if not outputs:
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
            gram = joined([part for part, _ in parts])
            call = parts[0][1] if len(parts) == 1 else self.recorder.number()
        entry = _Entry(self.slot, gram, call)
        for output in outputs:
            output.register_hook(entry)

    @property
    def __name__(self) -> str:
        raise AttributeError(SCRIPTED)

    def __reduce__(self) -> str | tuple[Any, ...]:
        return spent().__reduce__()

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return spent()


class _Entry:
    """A hook on a layer's outputs that enters the Gram, once in a backward."""

    def __init__(self, slot: Slot, gram: Gram, call: int) -> None:
        self.entry = slot, gram, call
        self.backward = -1

    def __call__(self, grad: Tensor) -> None:
        slot, gram, call = self.entry
        backward = _torch.backward_number()
        if backward == self.backward >= 0:
            return
        self.backward = backward
        if slot.gram is None:  # a step was taken between forward and backward
            return
        with torch.no_grad():
            slot.gram.add_(gram)
        slot.calls.append(call)


def whole_input(x: Tensor) -> Tensor:
    """This rank's rows as a plain tensor."""
    if not _torch.is_dtensor(x):
        return x
    shared: Any = x
    split = any(p.is_partial() or (p.is_shard() and p.dim % x.ndim == x.ndim - 1) for p in shared.placements)
    return shared.full_tensor() if split else shared.to_local()
