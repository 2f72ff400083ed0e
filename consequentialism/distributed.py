"""The emended input of a batch that several ranks hold together.

Each rank computes its own rows of the global batch's emended input in forward. Backward is local, and the
mean over ranks that DDP and FSDP2 take of the gradients makes it the emended gradient of the global batch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .options import Options
from .reference import apply_inverse, compute_dtype, emended_dtype


def emended_input(x: Tensor, bias: bool, options: Options, backend: Any) -> tuple[Tensor, Tensor]:
    """This rank's rows of the global emended input ``[N, I]``, and of its column for the bias ``[N]``.

    Every rank of the group must call it, with any number of rows, none included. The numbers of rows are
    exchanged first, which waits for the device once; the form then follows from their sum, so that all ranks
    agree. The dual form gathers the inputs, the primal one sums the Grams.
    """
    group = options.process_group
    rows = _row_counts(x, group)
    total, inputs = sum(rows), x.shape[1] + bias
    rank = max(min(total, inputs), 1)
    work = x.to(compute_dtype(x.dtype))
    if total <= inputs:
        batch, begin = _gather_rows(work, rows, group)
        arguments = (options.damping, options.damping_mode, options.scale)
        emended, column = backend.emended_input(batch, bias, "dual", *arguments)
        own = slice(begin, begin + x.shape[0])
        emended, column = emended[own], column[own]
    else:
        gram = backend.input_gram(work, bias, "primal")
        dist.all_reduce(gram, group=group)
        inverse = backend.factor(gram, options.damping, options.damping_mode, options.scale, rank, total)
        emended, column = apply_inverse(inverse, work, bias, "primal")
    return emended.to(emended_dtype(x.dtype)), column


def _row_counts(x: Tensor, group: dist.ProcessGroup | None) -> list[int]:
    own = torch.tensor([x.shape[0]], dtype=torch.int64, device=x.device)
    counts = own.new_empty(dist.get_world_size(group))
    dist.all_gather_into_tensor(counts, own, group=group)
    return [int(count) for count in counts.tolist()]


def _gather_rows(x: Tensor, rows: list[int], group: dist.ProcessGroup | None) -> tuple[Tensor, int]:
    """The rows of all ranks, and where this rank's begin. Shorter ranks are padded for the exchange."""
    longest = max(rows)
    own = x.new_zeros(longest, x.shape[1])
    own[: x.shape[0]] = x
    gathered = x.new_empty(len(rows) * longest, x.shape[1])
    dist.all_gather_into_tensor(gathered, own, group=group)
    parts = [gathered[i * longest : i * longest + count] for i, count in enumerate(rows)]
    return torch.cat(parts), sum(rows[: dist.get_rank(group)])
