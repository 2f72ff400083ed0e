"""`Embedding`: torch's own layer with an emended weight gradient."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from . import _torch, distributed, samples
from .autograd import once_differentiable
from .linear import EmendedModule
from .options import DampingMode, Options, Scale, Solver
from .reference import embedding_counts, emended_embedding_rows


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
        ctx.save_for_backward(indices, ratio)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        indices, ratio = ctx.saved_tensors
        flat, errors = indices.reshape(-1), dy.reshape(-1, dy.shape[-1])
        counts, rows = embedding_counts(flat, ctx.num_embeddings, ctx.padding_idx)
        options = ctx.options
        multiplier: float | Tensor | None = None if ratio is None else rows * ratio
        if options.process_group is not None:
            shape = f"embedding, V={ctx.num_embeddings}, E={errors.shape[1]}"
            exchanged = distributed.exchange_counts(shape, flat.shape[0], flat.shape[0], errors, options)
            dist.all_reduce(counts, group=distributed.group_of(options))
            rows, multiplier = rows.new_full((), sum(exchanged.rows)), exchanged.samples
        emended = emended_embedding_rows(
            flat,
            errors,
            counts,
            rows,
            ctx.padding_idx,
            damping=options.damping,
            damping_mode=options.damping_mode,
            scale=options.scale,
            samples=multiplier,
        )
        if ctx.sparse:
            size = (ctx.num_embeddings, errors.shape[1])
            dw = torch.sparse_coo_tensor(flat[None], emended.to(ctx.dtype), size, check_invariants=False)
        else:
            padding_idx = -1 if ctx.padding_idx is None else ctx.padding_idx
            dw = torch.ops.aten.embedding_dense_backward(emended, flat, ctx.num_embeddings, padding_idx, False)
            dw = dw.to(ctx.dtype)
        return dw, None, None, None, None, None


class Embedding(EmendedModule, nn.Embedding):
    """`torch.nn.Embedding` whose weight gradient is emended: ``dw[v] = sum of dy over occurrences / (count_v + c)``.

    An embedding is a linear layer of one-hot rows, whose Gram is diagonal; this is its emended gradient, exactly.
    It is plain PyTorch on every device, whatever ``backend`` and ``solver`` say. A row at ``padding_idx`` is a row of
    zeros.

    Args:
        num_embeddings: ``V``, and all further positional arguments as `torch.nn.Embedding`.
            ``scale_grad_by_freq`` is refused: emending already divides by the counts.
        damping: As `consequentialism.Linear`, and so all keywords after it; ``min(N, V)`` is the rank that a
            relative damping is relative to. ``scale="nlms"`` multiplies by all ``N`` indices, those at ``padding_idx``
            included, unless `set_samples` says otherwise. With ``process_group=`` ranks communicate in backward.

    Shape:
        ``[...] -> [..., embedding_dim]``.

    Raises:
        TypeError: An option of the wrong type.
        ValueError: An option out of its range, or ``scale_grad_by_freq=True``.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: Tensor | None = None,
        _freeze: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        damping: float = 1.0,
        damping_mode: DampingMode = "relative",
        scale: Scale = "nlms",
        backend: str = "auto",
        process_group: Any = None,
        solver: Solver = "auto",
        iterations: int = 16,
    ) -> None:
        options = Options(damping, damping_mode, scale, backend, process_group, solver=solver, iterations=iterations)
        if scale_grad_by_freq:
            raise ValueError("scale_grad_by_freq must be False, got True: emending already divides by the counts")
        super().__init__(
            num_embeddings,
            embedding_dim,
            padding_idx,
            max_norm,
            norm_type,
            scale_grad_by_freq,
            sparse,
            _weight,
            _freeze,
            device,
            dtype,
        )
        self.set_options(options)

    def emended_forward(self, input: Tensor) -> Tensor:
        options = self.options()
        if self.max_norm is not None:
            with torch.no_grad():
                torch.embedding_renorm_(self.weight, input.contiguous(), self.max_norm, self.norm_type)
        transformed = _torch.transforms_active()
        if transformed:
            raise RuntimeError("consequentialism.Embedding does not support torch.func transforms; use revert() first")
        if not (torch.is_grad_enabled() and self.weight.requires_grad):
            return F.embedding(input, self.weight, self.padding_idx)
        if isinstance(options.process_group, distributed.Peers):
            options = replace(options, process_group=options.process_group.in_backward())
        ratio = samples.ratio(options, input.numel(), self.weight)
        return EmendedEmbedding.apply(self.weight, input, self.padding_idx, self.sparse, options, ratio)
