"""`Recorder`: what may take over the forward of an emended linear layer; the one place where it is attached."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ..options import Options


class Recorder(Protocol):
    """Serves a layer's forward in the place of `functional.emended_linear_with`, to which it may hand on."""

    @property
    def label(self) -> str:
        """The text that the layer's ``repr`` shows of it, or nothing."""
        ...

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, options: Options) -> Tensor:
        """``x W^T + b`` of a layer's own weight ``[O, I]`` and bias ``[O]``, and what a backward then does."""
        ...
