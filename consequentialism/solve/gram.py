"""`Gram`: the second moment of a layer's rows over all that share the batch, and its damped inverse."""

from __future__ import annotations

from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor

from ..backend import reference
from ..backend.protocol import Ops
from ..options import Ridge


class Gram(NamedTuple):
    """``x x^T`` or ``x^T x`` of rows ``[N, I]``, a bias's column of ones counted.

    Attributes:
        matrix: ``[..., n, n]``; leading dimensions, such as a convolution's groups, are a batch.
        rank: ``min(N, I)``, at least 1: what a relative damping is relative to.
        samples: What ``scale="nlms"`` multiplies by.
        unit: Where the matrix is that of ``x / unit``, which broadcasts to it; an absolute damping is meant for ``x``.
    """

    matrix: Tensor
    rank: int
    samples: int
    unit: Tensor | None = None

    def all_reduce(self, group: dist.ProcessGroup | None) -> Gram:
        """Itself, summed in place over the ranks of a group."""
        dist.all_reduce(self.matrix, group=group)
        return self

    def inverse(self, ops: Ops, ridge: Ridge) -> Tensor:
        """``scale * (G + c I)^-1 [..., n, n]``."""
        if self.unit is not None and ridge.damping_mode == "absolute":
            c = (ridge.damping / self.unit / self.unit)[..., 0, 0]
            return reference.inverse_with(self.matrix, c, ridge.scale, self.samples)
        return ops.damped_inverse(self.matrix, *ridge, self.rank, self.samples)
