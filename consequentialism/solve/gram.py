"""`Gram`: the second moment of a layer's rows, its sum over batches and ranks, its damped inverse and its root."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..backend import reference
from ..backend.protocol import CoordinateOps, Ops
from ..options import Form, Ridge
from . import root


@dataclass(eq=False)
class Gram:
    """``x x^T`` or ``x^T x`` of rows ``[N, I]``, a bias's column of ones counted.

    Attributes:
        matrix: ``[..., n, n]``; leading dimensions, such as a convolution's groups or diagonal blocks, are a batch. Of
            an embedding, whose rows are one-hot, the diagonal ``[V]``.
        count: What ``scale="nlms"`` multiplies by and a mean divides by: rows, or a convolution's samples. A tensor
            ``[1]`` where batches are added up on their device.
        rank: ``min(N, I)``, at least 1: what a relative damping is relative to.
        unit: Where the matrix is that of ``x / unit``, which broadcasts to it; an absolute damping is meant for ``x``.
    """

    matrix: Tensor
    count: int | Tensor
    rank: int = 1
    unit: Tensor | None = None

    @classmethod
    def of(cls, x: Tensor, bias: bool, form: Form, ops: Ops, rows: int | None = None) -> Gram:
        """The Gram of ``x [N, I]`` in x's type.

        Args:
            rows: Those of all ranks, whose Grams are to be added; None, those of ``x``.
        """
        total = x.shape[0] if rows is None else rows
        return cls(ops.input_gram(x, bias, form), total, max(min(total, x.shape[1] + bias), 1))

    def add_(self, other: Gram) -> Gram:
        """Add the Gram of a batch in place, unless it is not finite, which the device decides.

        It is not ``+=``, which would also write an attribute: a traced checkpoint may not do that.
        """
        own = other.matrix
        trace = own.sum() if own.ndim == 1 else own.diagonal(dim1=-2, dim2=-1).sum()
        assert isinstance(self.count, Tensor)
        if trace.device.type == "cpu" and not torch.compiler.is_compiling():  # nothing is to be waited for
            if math.isfinite(trace.item()):
                self.matrix.add_(own)
                self.count.add_(other.count)
            return self
        finite = trace.isfinite()
        self.matrix.add_(torch.where(finite, own, 0))
        self.count.add_(torch.where(finite, other.count, 0))
        return self

    def decayed(self, memory: float, window: Gram) -> Gram:
        """The mean over all rows, each forgotten as often as there were windows with rows since; fresh.

        This one is the mean so far, and what comes out where the window has no row.

        Args:
            memory: What the older rows are multiplied by.
            window: The sum over the new ones.
        """
        assert isinstance(self.count, Tensor)
        assert isinstance(window.count, Tensor)
        count: Any = window.count.view(())
        if count.device.type == "cpu":  # numbers cost less than tensors of one entry
            return self._decayed_on_host(memory, window, count.item())
        kept, new = memory * self.count, (1 - memory) * count
        total = kept + new
        share = new / torch.where(count == 0, 1, total)
        mean = window.matrix.view(self.matrix.shape)
        mean = mean / torch.where(count == 0, 1, count).to(mean.dtype)
        matrix = torch.lerp(self.matrix, mean, share.to(mean.dtype))
        return replace(self, matrix=matrix, count=torch.where(count == 0, self.count, total))

    def _decayed_on_host(self, memory: float, window: Gram, count: float) -> Gram:
        assert isinstance(self.count, Tensor)
        if count == 0:
            return replace(self, matrix=self.matrix.clone())
        new = (1 - memory) * count
        total = memory * self.count.item() + new
        matrix = torch.lerp(self.matrix, window.matrix.view(self.matrix.shape) / count, new / total)
        return replace(self, matrix=matrix, count=torch.full_like(self.count, total))

    def equals(self, other: Gram) -> bool:
        """Whether both are sums over the same rows. Waits for the device."""
        assert isinstance(self.count, Tensor)
        assert isinstance(other.count, Tensor)
        return bool(torch.equal(self.count, other.count) and torch.equal(self.matrix, other.matrix))

    def all_reduce(self, group: dist.ProcessGroup | None) -> Gram:
        """Itself, its matrix summed in place over the ranks of a group; `sum_over` sums counts too."""
        dist.all_reduce(self.matrix, group=group)
        return self

    def inverse(self, ops: Ops, ridge: Ridge) -> Tensor:
        """``scale * (G + c I)^-1 [..., n, n]``."""
        assert not isinstance(self.count, Tensor)
        if self.unit is not None and ridge.damping_mode == "absolute":
            c = (ridge.damping / self.unit / self.unit)[..., 0, 0]
            return reference.inverse_with(self.matrix, c, ridge.scale, self.count)
        return ops.damped_inverse(self.matrix, *ridge, self.rank, self.count)

    def root(
        self,
        ops: CoordinateOps,
        columns: int,
        damping: float,
        exponent: float,
        divided: bool,
        how: root.Method | None = None,
    ) -> Tensor:
        """A root, ``S S^T = ((A + c I) / t)^-2s`` with ``c = damping * t`` and ``t = trace(A) / I``; see `root.power`.

        Args:
            columns: ``I``, the bias's column counted; diagonal blocks ``[groups, n, b, b]`` of a group share a trace.
            damping: Relative to ``t``.
            exponent: ``s``.
            divided: Whether ``A + c I`` is divided by ``t``, or taken as it is.
            how: As `root.method` says; None: for the symmetric one.

        Returns:
            Of the matrix's shape and type. The identity where the trace is zero, NaN where it is not finite.
        """
        moment = self.matrix
        if moment.ndim == 1:
            t = moment.sum() / columns
            made = (moment / t + damping).pow(-exponent)
        else:
            t = moment.diagonal(dim1=-2, dim2=-1).sum((-2, -1)) / columns
            t = t[:, None, None, None]
            scaled = moment / torch.where((t != 0) & t.isfinite(), t, 1)
            made = root.power(ops, scaled, damping, exponent, columns, how)
        if not divided:
            made = made * t.pow(-exponent)
        if t.device.type == "cpu" and bool((t.isfinite() & (t != 0)).all()):  # the host need not wait for it
            return made
        eye = torch.eye(moment.shape[-1], dtype=moment.dtype, device=moment.device) if moment.ndim > 1 else 1
        return torch.where(t.isfinite(), torch.where(t != 0, made, eye), torch.nan)


def sum_over(grams: Sequence[Gram], groups: Sequence[dist.ProcessGroup], beside: Tensor) -> None:
    """Sum Grams and their counts ``[1]`` over groups, one after the other: one message for each type and device.

    Args:
        grams: The Grams, in the same order on all ranks; afterwards their tensors are views of what was received.
        beside: Numbers ``[K]`` that the first message carries too; summed in place.
    """
    kinds: dict[tuple[torch.dtype, torch.device], list[Gram]] = {}
    for gram in grams:
        kinds.setdefault((gram.matrix.dtype, gram.matrix.device), []).append(gram)
    for k, ((dtype, device), members) in enumerate(kinds.items()):
        extra = beside if k == 0 else beside[:0]
        counts = [gram.count for gram in members if isinstance(gram.count, Tensor)]
        parts = [gram.matrix.reshape(-1) for gram in members]
        flat = torch.cat([*parts, *(count.to(dtype) for count in counts), extra.to(dtype=dtype, device=device)])
        for group in groups:
            dist.all_reduce(flat, group=group)
        sizes = [*(part.numel() for part in parts), *[1] * len(counts), extra.numel()]
        matrices, numbers = flat.split(sizes)[: len(parts)], flat.split(sizes)[len(parts) : -1]
        for gram, matrix, number, count in zip(members, matrices, numbers, counts, strict=True):
            gram.matrix, gram.count = matrix.view(gram.matrix.shape), number.to(count.dtype)
        if extra.numel():
            extra.copy_(flat[-extra.numel() :])
