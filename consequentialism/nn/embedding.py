"""`Embedding`: torch's own layer with an emended weight gradient."""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Unpack

from .. import _torch, samples
from ..autograd.embedding import EmendedEmbedding, look_up_outside_graphs
from ..options import BACKENDS, EmbeddingOptions, check_choice
from ..solve import distributed
from .module import EmendedModule, Option


def _check_backend(name: Any) -> None:
    check_choice("backend", name, BACKENDS)
    check_choice("an Embedding's backend", name, ("auto", "reference"))  # both are the same plain PyTorch


class _Backend(Option[str]):
    """The attribute ``backend``, which takes what the constructor takes."""

    def __set__(self, layer: EmendedModule, value: str) -> None:
        _check_backend(value)
        layer.options = layer.options.changed(backend=value)


class Embedding(EmendedModule, nn.Embedding):
    """`torch.nn.Embedding` whose weight gradient is emended: ``dw[v] = sum of dy over occurrences / (count_v + c)``.

    An embedding is a linear layer of one-hot rows, whose Gram is diagonal, and this is exactly its emended gradient. It
    is computed in plain PyTorch on every device, so the only ``backend`` is ``"reference"``, and there is nothing to
    solve. An index equal to ``padding_idx`` counts as a row of zeros.

    Args:
        num_embeddings: ``V``, and all further positional arguments as `torch.nn.Embedding`.
            ``scale_grad_by_freq`` is refused: emending already divides by the counts.
        sparse: As in `torch.nn.Embedding`; only the rows that occur are then counted. torch.compile leaves the layer
            out of its graphs, and raises an error with ``fullgraph=True``.
        damping: As in `consequentialism.Linear`; so are ``damping_mode``, ``scale`` and ``process_group``.
            ``min(N, V)`` is the rank that a relative damping refers to. ``scale="nlms"`` multiplies by all ``N``
            indices, those equal to ``padding_idx`` included, unless `set_samples` says otherwise. With
            ``process_group=`` the ranks communicate in backward.

    Shape:
        ``[...] -> [..., embedding_dim]``.

    Raises:
        TypeError: An option of the wrong type, or one that an embedding does not have.
        ValueError: An option out of its range, or ``scale_grad_by_freq=True``.
    """

    OPTIONS = EmbeddingOptions.__optional_keys__
    backend = _Backend()

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
        backend: Literal["auto", "reference"] = "auto",
        **options: Unpack[EmbeddingOptions],
    ) -> None:
        _check_backend(backend)
        settings = self.settings_from(options)
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
        self.set_options(settings)
        self.backend = backend

    def emended_forward(self, input: Tensor) -> Tensor:
        options, (weight, _) = self.options_now(), self.weight_and_bias()
        if self.max_norm is not None:
            with torch.no_grad():
                torch.embedding_renorm_(weight, input.contiguous(), self.max_norm, self.norm_type)
        transformed = _torch.transforms_active()
        if transformed:
            raise RuntimeError("consequentialism.Embedding does not support torch.func transforms; use revert() first")
        if not (torch.is_grad_enabled() and weight.requires_grad):
            return F.embedding(input, weight, self.padding_idx)
        if isinstance(options.process_group, distributed.Peers):
            options = options.changed(process_group=cast(Any, options.process_group.in_backward()))
        ratio = samples.ratio(options, input.numel(), weight)
        leaves_graph = self.sparse and torch.compiler.is_compiling()
        look_up = look_up_outside_graphs if leaves_graph else EmendedEmbedding.apply
        return look_up(weight, input, self.padding_idx, self.sparse, options, ratio)
