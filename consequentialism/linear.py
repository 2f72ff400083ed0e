"""`Linear`: torch's own layer with emended weight and bias gradients."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .factor_batch import FactorBatch
from .functional import emended_linear_with, updated_linear_with
from .options import OPTION_NAMES, DampingMode, Options, Scale, Solver

if TYPE_CHECKING:
    from .optim.fused_sgd import LayerStep


class EmendedModule(nn.Module):
    """What emended layers share: the options as plain attributes, which may be changed between steps."""

    damping: float
    damping_mode: DampingMode
    scale: Scale
    backend: str
    process_group: Any
    patch_bytes: int
    solver: Solver = Options.solver  # the class's values serve modules pickled before there were these
    iterations: int = Options.iterations
    layer_step: LayerStep | None = None  # set by consequentialism.optim.FusedSGD, on this instance only
    factor_batch: FactorBatch | None = None  # set by convert(batch_factors=True), on this instance only

    def set_options(self, options: Options) -> None:
        """Take over checked options."""
        for name in OPTION_NAMES:
            setattr(self, name, getattr(options, name))

    def options(self) -> Options:
        """The options as they are now, checked."""
        return Options(**{name: getattr(self, name) for name in OPTION_NAMES})

    def __deepcopy__(self, memo: dict[int, Any]) -> EmendedModule:
        memo[id(self.process_group)] = self.process_group  # a group cannot be copied: the copy belongs to the same
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def extra_repr(self) -> str:
        default = Options()
        shown = (name for name in OPTION_NAMES if name != "process_group")
        changed = [f"{name}={getattr(self, name)!r}" for name in shown if getattr(self, name) != getattr(default, name)]
        if self.factor_batch is not None:
            changed.append("batch_factors=True")
        return ", ".join([super().extra_repr(), *changed])


class Linear(EmendedModule, nn.Linear):
    """`torch.nn.Linear` whose weight and bias gradients are emended; the input gradient stays the true one.

    The weight gradient is ``dw = dy^T (x x^T + c I)^-1 x`` instead of ``dy^T x``: a step along it changes the
    output of every row as that row's own gradient asks, whatever the other rows of the mini-batch do. Any torch
    optimizer takes it. Parameters, ``state_dict`` and forward are those of `torch.nn.Linear`; nothing is kept
    between steps.

    Args:
        in_features: ``I``.
        out_features: ``O``.
        bias: Whether there is a bias; its column of ones then stands in the Gram.
        damping: Ridge, above 0; see ``damping_mode``.
        damping_mode: ``"relative"``: ``c = damping * trace(x x^T) / min(N, I)``; ``"absolute"``: ``c = damping``.
        scale: What the learning rate means: ``"nlms"``, the NLMS step size for mean-reduced losses (about 1 is a good
            start for SGD); ``"raw"``, the formula as it stands; ``"gradient"``, times ``c``, so that large
            damping is plain backpropagation.
        backend: ``"auto"``, or one of `consequentialism.backends`.
        process_group: Ranks that together hold the batch; each then gets the emended gradient of the global
            batch under DDP's and FSDP2's mean.
        solver: ``"auto"``, ``"cholesky"`` or ``"cg"``, as in `consequentialism.Options`.
        iterations: Of ``solver="cg"``.
        device: As `torch.nn.Linear`.
        dtype: float16, bfloat16, float32 or float64.

    Shape:
        ``[..., I] -> [..., O]``; all leading dimensions are rows.

    Raises:
        TypeError: An option or input of the wrong type.
        ValueError: An option out of its range, or an input whose last dimension is not ``I``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        damping: float = 1.0,
        damping_mode: DampingMode = "relative",
        scale: Scale = "nlms",
        backend: str = "auto",
        process_group: Any = None,
        solver: Solver = "auto",
        iterations: int = 16,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        options = Options(damping, damping_mode, scale, backend, process_group, solver=solver, iterations=iterations)
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.set_options(options)

    def forward(self, input: Tensor) -> Tensor:
        if self.layer_step is not None:
            return updated_linear_with(input, self.weight, self.bias, self.options(), self.layer_step)
        return emended_linear_with(input, self.weight, self.bias, self.options(), self.factor_batch)
