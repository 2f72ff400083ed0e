"""The registry: which shapes are measured, and who computes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import consequentialism as cw
from consequentialism import cost


class Shape(NamedTuple):
    """``N`` rows, ``I`` inputs, ``O`` outputs of a linear layer, and the ratio to the plain layer that is aimed at."""

    rows: int
    inputs: int
    outputs: int
    target: float | None = None

    @property
    def op(self) -> str:
        return "linear"

    @property
    def name(self) -> str:
        return f"{self.rows}x{self.inputs}x{self.outputs}"

    @property
    def input_size(self) -> tuple[int, ...]:
        return self.rows, self.inputs

    @property
    def output_size(self) -> tuple[int, ...]:
        return self.rows, self.outputs

    @property
    def flop_floor(self) -> float:
        """The least whole-step ratio to the plain layer: operations only, every product at the same speed."""
        plain = 6 * self.rows * self.inputs * self.outputs
        return 1 + cost.floor(self.rows, self.inputs + 1, self.outputs) / plain

    def layer(self, provider: str) -> nn.Module | None:
        """The provider's layer, or None where it has none for this shape."""
        return PROVIDERS[provider](self.inputs, self.outputs) if provider in PROVIDERS else None


CPU_SHAPES = (
    Shape(64, 784, 1600, 1.15),
    Shape(128, 784, 256, 1.30),
    Shape(128, 1024, 1024, 1.25),
    Shape(256, 1024, 4096, 1.20),
    Shape(512, 2048, 2048, 1.25),
)


class NaiveFunction(torch.autograd.Function):
    """The formula as one would write it first: a column of ones, an identity, a general solve, all in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        x, weight = ctx.saved_tensors
        rows = torch.cat([x, x.new_ones(x.shape[0], 1)], 1)
        gram = rows @ rows.T
        c = gram.trace() / min(rows.shape)
        solved = torch.linalg.solve(gram + c * torch.eye(gram.shape[0]), rows)
        dw = rows.shape[0] * dy.T @ solved
        return dy @ weight, dw[:, :-1], dw[:, -1]


class NaiveLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return NaiveFunction.apply(input, self.weight, self.bias)


def _isaac(inputs: int, outputs: int) -> nn.Module:
    import isaac

    return isaac.Linear(inputs, outputs, la=1.0)


def _ours(backend: str) -> Callable[[int, int], nn.Module]:
    return lambda inputs, outputs: cw.Linear(inputs, outputs, backend=backend)


# Builds the layer; ImportError where a peer is not installed.
PROVIDERS: dict[str, Callable[[int, int], nn.Module]] = {
    "plain": nn.Linear,
    "naive": NaiveLinear,
    "isaac": _isaac,
    "reference": _ours("reference"),
    "consequentialism": _ours("auto"),
}
