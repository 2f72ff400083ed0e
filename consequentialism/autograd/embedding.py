"""The derivative of an embedding, whose Gram is diagonal: `EmendedEmbedding`."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from .. import _torch
from ..backend.reference import embedding_counts, embedding_occurrences, emended_embedding_rows
from ..options import Options
from ..solve import distributed
from .linear import keep_output, once_differentiable


class EmendedEmbedding(torch.autograd.Function):
    """A look-up whose weight gradient is ``sum of dy over occurrences / (count + c)``."""

    @staticmethod
    def forward(
        weight: Tensor,
        indices: Tensor,
        padding_idx: int | None,
        sparse: bool,
        options: Options,
        ratio: Tensor | None,
    ) -> Tensor:
        return F.embedding(indices, weight, padding_idx)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        weight, indices, ctx.padding_idx, ctx.sparse, ctx.options, ratio = inputs
        ctx.num_embeddings, ctx.dtype = weight.shape[0], weight.dtype
        if ctx.padding_idx is not None:  # -1, the last row, is "none" to torch's backward
            ctx.padding_idx %= ctx.num_embeddings
        keep_output(ctx, output)
        ctx.save_for_backward(indices, ratio)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        indices, ratio = ctx.saved_tensors
        flat, errors = indices.reshape(-1), dy.reshape(indices.numel(), dy.shape[-1])
        options, padding_idx = ctx.options, ctx.padding_idx
        rows, everyone = flat.shape[0], flat
        multiplier: float | Tensor = rows if ratio is None else rows * ratio
        if options.process_group is not None:
            shape = f"embedding, V={ctx.num_embeddings}, E={errors.shape[1]}"
            exchanged = distributed.exchange_counts(shape, rows, rows, errors, options)
            rows, multiplier = sum(exchanged.rows), exchanged.samples
            if ctx.sparse:
                everyone = distributed.gather_rows(flat.long()[:, None], exchanged.rows, distributed.group_of(options))[
                    0
                ][:, 0]
        if ctx.sparse:  # of a large vocabulary, which would take longer to count than all the rest
            counts, total = embedding_occurrences(flat, everyone, padding_idx)
        else:
            every = embedding_counts(flat, ctx.num_embeddings, padding_idx)
            if options.process_group is not None:
                dist.all_reduce(every, group=distributed.group_of(options))
            counts, total = every[flat], every.sum()
        emended = emended_embedding_rows(
            flat,
            errors,
            counts,
            total,
            total.new_full((), rows),
            ctx.num_embeddings,
            padding_idx,
            ridge=options.ridge,
            samples=multiplier,
        )
        ignored = -1 if padding_idx is None else padding_idx
        if ctx.sparse:  # torch.sparse_coo_tensor would warn in torch 2.11, whatever check_invariants is
            dw = torch.ops.aten.embedding_sparse_backward(
                emended.to(ctx.dtype), flat, ctx.num_embeddings, ignored, False
            )
        else:
            dw = torch.ops.aten.embedding_dense_backward(emended, flat, ctx.num_embeddings, ignored, False)
            dw = dw.to(ctx.dtype)
        return dw, None, None, None, None, None


FULL_GRAPH = (
    "consequentialism.Embedding(sparse=True) does not support torch.compile in a full graph, which has no sparse "
    "gradients. Compile without fullgraph=True, or use sparse=False"
)


def look_up_outside_graphs(*arguments: Any) -> Tensor:
    """`EmendedEmbedding`, which torch.compile leaves out of its graphs."""
    return torch.compiler.disable(EmendedEmbedding.apply, reason=FULL_GRAPH)(*arguments)


_torch.never_inlined(look_up_outside_graphs, FULL_GRAPH)
