"""The formulas of embeddings, whose rows are one-hot and whose Gram is diagonal."""

from __future__ import annotations

import torch
from torch import Tensor

from ...options import DampingMode, Ridge, Scale
from ...precision import compute_dtype, widest_dtype


def embedding_counts(indices: Tensor, num_embeddings: int, padding_idx: int | None) -> Tensor:
    """How often each index stands in ``indices [N]``: ``[V]`` in the device's widest type, 0 for ``padding_idx``."""
    counted = _counted(indices, padding_idx)
    return counted.new_zeros(num_embeddings).index_add(0, indices, counted)


def embedding_occurrences(indices: Tensor, everyone: Tensor, padding_idx: int | None) -> tuple[Tensor, Tensor]:
    """`embedding_counts` of ``everyone [M]`` at ``indices [N]`` alone, and its sum; nothing has the vocabulary's size.

    The counts at ``padding_idx``, which nobody reads, are not 0.
    """
    ordered, indices = everyone.sort().values, indices.to(everyone.dtype)
    after = torch.searchsorted(ordered, indices, right=True)
    counts = after - torch.searchsorted(ordered, indices)
    return counts.to(widest_dtype(counts.device.type)), _counted(everyone, padding_idx).sum()


def _counted(indices: Tensor, padding_idx: int | None) -> Tensor:
    """1 for each row in the device's widest type, 0 at ``padding_idx``."""
    dtype = widest_dtype(indices.device.type)
    if padding_idx is None:
        return torch.ones(indices.shape, device=indices.device, dtype=dtype)
    return (indices != padding_idx).to(dtype)


def emended_embedding_rows(
    indices: Tensor,
    dy: Tensor,
    counts: Tensor,
    total: Tensor,
    rows: Tensor,
    num_embeddings: int,
    padding_idx: int | None = None,
    *,
    ridge: Ridge,
    samples: float | Tensor | None = None,
) -> Tensor:
    """``dy`` with each row divided by ``count + c``: summed over occurrences, the emended gradient.

    The rows of an embedding's input are one-hot, so ``x^T x`` is the diagonal of the counts, and
    ``dw[v] = sum of dy over occurrences / (count_v + c)``. A row at ``padding_idx`` is a row of zeros.

    Args:
        indices: ``[N]``, integers.
        dy: ``[N, E]``.
        counts: ``[N]``, how often each row's index occurs.
        total: The sum of the counts of all the vocabulary, 0-dimensional: ``trace(x^T x)``.
        rows: ``N``, 0-dimensional.
        num_embeddings: ``V``.
        ridge: What is added to the counts, and what the result is multiplied by.
        samples: What ``scale="nlms"`` multiplies by; None for ``rows``.

    Returns:
        ``[N, E]`` in float32 or float64.
    """
    rank = rows.clamp(min=1, max=num_embeddings)
    # A product: torch.compile makes no constant of a damping that it multiplies by.
    damping, damping_mode, scale = ridge
    c = damping * total / rank if damping_mode == "relative" else damping * torch.ones_like(total)
    weight = 1 / (counts + c)  # [N]
    if scale == "nlms":
        weight = weight * (rows if samples is None else samples)
    elif scale == "gradient":
        weight = weight * c
    if padding_idx is not None:
        weight = torch.where(indices == padding_idx, torch.zeros_like(weight), weight)
    errors = dy.to(compute_dtype(dy.dtype))
    return (errors + 0 * errors) * weight.to(errors.dtype)[:, None]


def emended_embedding_grad(
    indices: Tensor,
    dy: Tensor,
    num_embeddings: int,
    padding_idx: int | None = None,
    *,
    damping: float = 1.0,
    damping_mode: DampingMode = "relative",
    scale: Scale = "nlms",
) -> Tensor:
    """``dw [V, E]`` of an embedding: `emended_embedding_rows` summed into their places."""
    counts = embedding_counts(indices, num_embeddings, padding_idx)
    statistics = (counts[indices], counts.sum(), counts.new_full((), indices.shape[0]), num_embeddings)
    emended = emended_embedding_rows(indices, dy, *statistics, padding_idx, ridge=Ridge(damping, damping_mode, scale))
    return emended.new_zeros(num_embeddings, dy.shape[1]).index_add(0, indices, emended).to(dy.dtype)
