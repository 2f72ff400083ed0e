"""The emended input of a batch that several ranks hold together.

Each rank computes its own rows of the global batch's emended input in forward. Backward is local, and the
mean over ranks that DDP and FSDP2 take of the gradients makes it the emended gradient of the global batch.
"""

from __future__ import annotations

import gc
import hashlib
import warnings
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import _torch
from ..backend.protocol import Backend
from ..backend.reference import apply_inverse
from ..options import Options
from ..precision import compute_dtype, emended_dtype
from ..samples import count
from . import cost
from .gram import Gram

WITNESSES = 8  # elements of a layer's weight that ranks compare
LABEL_BYTES = 512


class Peers(NamedTuple):
    """A process group as one layer uses it: what stands in `Options.process_group` while a layer runs."""

    group: dist.ProcessGroup
    layer: nn.Module
    seen: Tensor | None = None  # the witnesses as they were in forward

    def in_backward(self) -> Peers:
        """A copy for a layer that communicates in backward, where its weight may be sharded again."""
        witnesses = self.witnesses()
        return self if witnesses is None else self._replace(seen=witnesses.clone())

    def name(self) -> str:
        """The layer's fully qualified name where `convert` has seen it, else nothing."""
        return getattr(self.layer, "qualified_name", None) or ""

    def serial(self) -> int:
        """The layer's place among all that this process has made; equal on all ranks where they run one program."""
        return getattr(self.layer, "_emended_serial", 0)

    def witnesses(self) -> Tensor | None:
        """Elements of the weight ``[WITNESSES]`` or fewer; None where it is computed, and may differ between ranks."""
        if self.seen is not None:
            return self.seen
        weight = self.layer._parameters.get("weight")
        if not isinstance(weight, nn.Parameter) or hasattr(weight, "to_local"):
            return None
        flat = weight.detach().reshape(-1)
        return flat[:: max(1, flat.numel() // WITNESSES)][:WITNESSES]


class SavedGroup:
    """A layer's process group in its state: copies share it, and a file, which cannot hold one, says which it was."""

    def __init__(self, group: Any) -> None:
        self.group = group

    def __deepcopy__(self, memo: dict[int, Any]) -> SavedGroup:
        return self

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        if self.group is None:
            return _loaded_group, ("none",)
        return _loaded_group, ("default" if self.group is _default_group() else "another",)


def _default_group() -> Any:
    return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None


def _loaded_group(kind: str) -> SavedGroup:
    group = _default_group() if kind == "default" else None
    if kind != "none" and group is None:
        what = "it was not the default group" if kind == "another" else "torch.distributed is not initialized"
        warnings.warn(
            f"consequentialism: a layer was saved with process_group= and is loaded without one ({what}): its "
            "gradients are those of this rank's batch alone until its process_group is set again",
            UserWarning,
            stacklevel=2,
        )
    return SavedGroup(group)


class Counts(NamedTuple):
    """Rows and samples that the ranks hold together."""

    rows: list[int]  # of each rank
    samples: float  # what ``scale="nlms"`` multiplies by, the sum over the ranks


def group_of(options: Options) -> dist.ProcessGroup | None:
    """The process group itself."""
    group = options.process_group
    return group.group if isinstance(group, Peers) else group


def exchange_counts(shape: str, rows: int, samples: int, like: Tensor, options: Options) -> Counts:
    """Tell all ranks how many rows this one has, and of which layer. Waits for the device.

    Every collective of a layer begins with this one, of the same size for all layers, so that ranks which have come to
    different layers find it out here, all of them, before any rows are mixed. Layers are different where their labels
    are (name, sizes, type, options), or both their places among the layers that a process has made and their weights.
    Weights alone are no proof: who averages gradients by hand may not have made them equal.

    Args:
        shape: The layer's kind and sizes, equal on all ranks.
        rows: ``N`` of this rank.
        samples: What it counts for ``scale="nlms"`` where ``options.samples`` is None.
        like: A tensor of the type that is exchanged next, and on its device.

    Raises:
        RuntimeError: The ranks run different layers, or one layer with different options; on every rank. After the
            group's timeout, a rank has left the layer out.
    """
    peers, group = options.process_group, group_of(options)
    name, serial, witnesses = "", 0, None
    if isinstance(peers, Peers):
        name, serial, witnesses = peers.name(), peers.serial(), peers.witnesses()
    settings = f"damping={options.damping!r}, damping_mode={options.damping_mode!r}, scale={options.scale!r}"
    label = f"{name!r}, {shape}, {like.dtype}, {settings}"
    digest = hashlib.blake2b(label.encode(), digest_size=6).digest()  # exact in float64
    own = torch.tensor([rows, samples, int.from_bytes(digest, "big"), serial], dtype=torch.float64, device=like.device)
    own = torch.cat([own, own.new_zeros(WITNESSES)])
    if options.samples is not None:
        own[1] = count(options.samples, like.device)
    if witnesses is not None:
        own[4 : 4 + witnesses.shape[0]] = witnesses
    try:
        table = _all_gather(own, group).tolist()
    except RuntimeError as error:
        raise RuntimeError(
            f"consequentialism: process_group: not all ranks have come to {_named(label, options)}; a rank may have "
            f"left it out, as experts do, or have stopped: {error}"
        ) from error
    same_label = all(line[2] == table[0][2] for line in table)
    same_serial = all(line[3] == table[0][3] for line in table)
    same_weights = all(_alike(table[0][4:], line[4:]) for line in table)
    if not (same_label and (same_serial or same_weights)):
        raise RuntimeError(_different_layers(_named(label, options), like.device, group))
    if not same_weights:
        warnings.warn(
            f"consequentialism: process_group: the weights of {label} differ between ranks, where DDP and FSDP2 keep "
            "them equal. If these are different layers, such as experts of which each rank has its own, the gradient "
            "is wrong: leave them without process_group=",
            UserWarning,
            stacklevel=2,
        )
    return Counts([int(line[0]) for line in table], sum(line[1] for line in table))


def _named(label: str, options: Options) -> str:
    """The label with a name in place of an empty one: that in the largest module which holds the layer.

    All objects are searched for it, which only an error is worth.
    """
    if not isinstance(options.process_group, Peers) or options.process_group.name():
        return label
    modules = [one for one in gc.get_objects() if issubclass(type(one), nn.Module)]
    layer = options.process_group.layer
    names = [name for module in modules for name, inner in module.named_modules() if inner is layer]
    return label.replace("''", repr(max(names, key=len)), 1) if any(names) else label


def _alike(a: list[float], b: list[float]) -> bool:
    """Whether these elements are those of one weight.

    Replicas are equal up to rounding, and the weights of different layers have nothing to do with each other; in
    between is a tenth. NaN, as in weights that have diverged, is no difference.
    """
    size = max(sum(x * x for x in a), sum(x * x for x in b))
    return not sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) > 0.01 * size


def _different_layers(label: str, device: torch.device, group: dist.ProcessGroup | None) -> str:
    """The labels of the layers that all ranks are running, gathered for an error."""
    own = torch.tensor(list(label.encode()[:LABEL_BYTES].ljust(LABEL_BYTES)), dtype=torch.uint8, device=device)
    labels = [bytes(line).decode(errors="replace").rstrip() for line in _all_gather(own, group).tolist()]
    ranks = "; ".join(f"rank {rank} runs {one}" for rank, one in enumerate(labels))
    what = "different layers of one kind" if len(set(labels)) == 1 else "different layers, or one with other options"
    return (
        f"consequentialism: process_group: the ranks have come to {what}, whose rows do not belong into one Gram: "
        f"{ranks}. Every rank must run the same emended layers in the same order, a rank that has no rows with an "
        "empty batch; leave layers that only some ranks run, such as experts, without process_group="
    )


def _all_gather(own: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """``[ranks, ...]``."""
    gathered = own.new_empty(dist.get_world_size(group), *own.shape)
    # Its name from torch 2.13 on, where the old one warns.
    gather = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor
    gather(gathered.flatten(0, 1), own, group=group)
    return gathered


def emended_input(x: Tensor, bias: bool, outputs: int, options: Options, backend: Backend) -> tuple[Tensor, Tensor]:
    """This rank's rows of the global emended input ``[N, I]``, and of its column for the bias ``[N]``.

    Every rank of the group must call it, with any number of rows, none included. The numbers of rows are
    exchanged first, which waits for the device once; the form then follows from their sum, so that all ranks
    agree. The dual form gathers the inputs, the primal one sums the Grams, in float64 where float32 would lose the
    inverse's digits.
    """
    group, inputs = group_of(options), x.shape[1] + bias
    shape = f"linear, I={x.shape[1]}, O={outputs}, bias={bias}"
    counts = exchange_counts(shape, x.shape[0], x.shape[0], x, options)
    total = sum(counts.rows)
    plan = cost.plan_of_ranks(total, inputs, x.dtype, x.device.type, options)
    work = x.to(compute_dtype(x.dtype))
    ridge = options.ridge
    if ridge.scale == "nlms":
        ridge = ridge._replace(scale="raw")  # times the samples, which need not be the rows
    if plan.form == "dual":
        batch, begin = gather_rows(work, counts.rows, group)
        emended, column = backend.emended_input(batch, bias, "dual", *ridge, *plan.type)
        own = slice(begin, begin + x.shape[0])
        emended, column = emended[own], column[own]
    else:
        work = work.to(plan.dtype)
        inverse = Gram.of(work, bias, "primal", backend, total).all_reduce(group).inverse(backend, ridge)
        emended, column = apply_inverse(inverse, work, bias, "primal")
    if options.scale == "nlms":
        emended, column = emended * counts.samples, column * counts.samples
    return emended.to(emended_dtype(x.dtype)), column.to(compute_dtype(x.dtype))


def gather_rows(x: Tensor, rows: list[int], group: dist.ProcessGroup | None) -> tuple[Tensor, int]:
    """The rows of all ranks, and where this rank's begin. Shorter ranks are padded for the exchange."""
    longest = max(rows)
    own = x.new_zeros(longest, x.shape[1])
    own[: x.shape[0]] = x
    gathered = _all_gather(own, group)  # [ranks, longest, I]
    parts = [gathered[i, :count] for i, count in enumerate(rows)]
    return torch.cat(parts), sum(rows[: dist.get_rank(group)])


_torch.never_inlined(
    exchange_counts,
    "consequentialism: process_group= does not support torch.compile in a full graph, because the host must learn the "
    "ranks' numbers of rows. Compile without fullgraph=True",
)
