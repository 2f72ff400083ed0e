"""`Linear`: torch's own layer with emended weight and bias gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from ..backend import compiled as ops
from ..functional.checks import check_linear
from ..functional.linear import autocast, emended_linear_with
from ..options import LinearOptions
from .module import EmendedModule


class Linear(EmendedModule, nn.Linear):
    """`torch.nn.Linear` whose weight and bias gradients are emended; the input gradient stays the true one.

    The weight gradient is ``dw = dy^T (x x^T + c I)^-1 x`` instead of ``dy^T x``. A step along it changes the output of
    every row as that row's own gradient asks, whatever the other rows of the mini-batch do. The layer works with any
    torch optimizer. Parameters, ``state_dict`` and forward are those of `torch.nn.Linear`, and nothing is kept between
    steps.

    Args:
        in_features: ``I``.
        out_features: ``O``.
        bias: Whether there is a bias. It counts as one more input that is always 1, in the Gram too.
        damping: The ridge, above 0; see ``damping_mode``.
        damping_mode: ``"relative"``: ``c = damping * trace(x x^T) / min(N, I)``; ``"absolute"``: ``c = damping``.
        scale: What the learning rate means. ``"nlms"``: NLMS's step size for mean-reduced losses (about 1 is a good
            start for SGD); the formula is multiplied by the number of samples, which are all rows, padding included,
            unless `set_samples` says otherwise. ``"raw"``: the formula as it stands. ``"gradient"``: the formula times
            ``c``, so that large damping is plain backpropagation.
        backend: ``"auto"``, or one of `consequentialism.backends`.
        process_group: The ranks that together hold the batch. Each gets the emended gradient of the global batch under
            DDP's and FSDP2's mean. All ranks must run the same layers in the same order. Ranks that run different
            layers all get an error; layers are told apart by the names that `convert` gave, their sizes and options,
            or by the order in which they were made together with a few weights. A rank that leaves out a layer and
            runs no other after it is found only by the group's timeout. In eval mode nothing is communicated, and
            every rank uses its own batch. Where ranks have uneven inputs, give empty batches, or use
            ``DistributedDataParallel.join(throw_on_early_termination=True)``.
        solver: ``"auto"``, ``"cholesky"`` or ``"cg"``, as in `consequentialism.Options`.
        iterations: The number of iterations of ``solver="cg"``.
        device: As `torch.nn.Linear`.
        dtype: float16, bfloat16, float32 or float64.

    Shape:
        ``[..., I] -> [..., O]``; all leading dimensions are rows.

    Raises:
        TypeError: An option or input of the wrong type.
        ValueError: An option out of its range, or an input whose last dimension is not ``I``.
        RuntimeError: Ranks of a process group that run different layers.

    Source: arXiv 2003.05164.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Unpack[LinearOptions],
    ) -> None:
        settings = self.settings_from(options)
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.set_options(settings)

    shortcut = None if ops.module is None else ops.module.linear_forward

    def emended_forward(self, input: Tensor) -> Tensor:
        linear = emended_linear_with if self.recorder is None else self.recorder.linear
        weight, bias = self.weight_and_bias()
        return linear(input, weight.t() if self.weight_transposed else weight, bias, self.options_now())

    def check_input(self, input: Any) -> None:
        weight, bias = self.weight_and_bias()
        check_linear(*autocast(input, weight.t() if self.weight_transposed else weight, bias))
