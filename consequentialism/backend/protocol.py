"""`Backend`: what a backend has. `reference` says what its ops compute; `dispatch` picks one for a call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..options import DampingMode, Form, Scale


class Limits(NamedTuple):
    """Capabilities of a backend.

    Attributes:
        fused_rows: The most rows of which ``fused_weight_grad`` makes one launch.
        derivative: Whether it has ``emended_linear``, an op with a derivative of its own, for eager mode.
    """

    fused_rows: int
    derivative: bool = False


class Ops(Protocol):
    """The ops, pure functions that return fresh tensors. Leading dimensions of a Gram ``[..., n, n]`` are a batch."""

    def input_gram(self, x: Tensor, bias: bool, form: Form, /) -> Tensor:
        """The Gram ``[n, n]`` of ``x [N, I]``."""
        ...

    def damped_inverse(
        self, gram: Tensor, damping: float, damping_mode: DampingMode, scale: Scale, rank: int, rows: int, /
    ) -> Tensor:
        """The damped inverse ``[..., n, n]``."""
        ...

    def gram_inverse(
        self,
        x: Tensor,
        bias: bool,
        form: Form,
        damping: float,
        damping_mode: DampingMode,
        scale: Scale,
        gram_dtype: torch.dtype | None = None,
        narrow_up_to: float = 0.0,
        /,
    ) -> Tensor:
        """The damped inverse ``[n, n]`` of the Gram of ``x [N, I]``."""
        ...

    def emended_input(
        self,
        x: Tensor,
        bias: bool,
        form: Form,
        damping: float,
        damping_mode: DampingMode,
        scale: Scale,
        gram_dtype: torch.dtype | None = None,
        narrow_up_to: float = 0.0,
        /,
    ) -> tuple[Tensor, Tensor]:
        """The emended input ``[N, I]``, and its column for the bias ``[N]``, empty without one."""
        ...

    def weight_grad(self, dy: Tensor, rows: Tensor, column: Tensor, /) -> tuple[Tensor, Tensor]:
        """``dy^T rows [O, I]`` and ``dy^T column [O]``; one NaN or infinity in ``dy`` poisons both."""
        ...

    def fused_weight_grad(
        self,
        x: Tensor,
        dy: Tensor,
        bias: bool,
        damping: float,
        damping_mode: DampingMode,
        scale: Scale,
        gram_dtype: torch.dtype | None = None,
        narrow_up_to: float = 0.0,
        /,
    ) -> tuple[Tensor, Tensor]:
        """The emended ``dw [O, I]`` and ``db [O]``, empty without a bias."""
        ...

    def conv_gram(
        self,
        x: Tensor,
        kernel: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        bias: bool,
        patch_bytes: int,
        dtype: torch.dtype,
        /,
    ) -> Tensor:
        """The primal Grams ``[groups, I, I]`` of a convolution's patches, of ``x [B, C, *spatial]``."""
        ...


class CoordinateOps(Protocol):
    """The ops of steps in emended coordinates, which not every backend has; `coordinates` says what they compute."""

    def decayed_gram(self, gram: Tensor, x: Tensor, bias: bool, memory: float, beta: float, /) -> Tensor:
        """``memory * A + beta * x^T x [n, b, b]``, the diagonal blocks alone."""
        ...

    def inverse_root(self, matrix: Tensor, root: int, coefficients: Sequence[float], /) -> Tensor:
        """``M^(-1/root) [..., n, n]``."""
        ...

    def root_product(self, rows: Tensor, root: Tensor, /) -> Tensor:
        """``rows S [B, O, n]``."""
        ...

    def add_root_product_(self, weight: Tensor, rows: Tensor, root: Tensor, alpha: float, /) -> None:
        """``W <- W + alpha * rows S``."""
        ...


class Backend(Ops, Protocol):
    """A module with the ops and its limits."""

    LIMITS: Limits
