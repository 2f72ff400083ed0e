"""The registry of convolutions: which shapes are measured, and who computes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_input

import consequentialism as cw
from consequentialism import cost
from consequentialism.options import ConvMethod


class ConvShape(NamedTuple):
    """A convolution of square images, and the ratio to the plain layer that is aimed at."""

    batch: int
    channels: int
    outputs: int
    kernel: int
    stride: int
    groups: int
    side: int
    target: float | None = None

    @property
    def op(self) -> str:
        return "conv2d"

    @property
    def name(self) -> str:
        stride = f"/{self.stride}" if self.stride > 1 else ""
        groups = f" g{self.groups}" if self.groups > 1 else ""
        return f"{self.batch}x{self.channels}x{self.side}^2 {self.kernel}^2{stride} {self.outputs}{groups}"

    @property
    def positions(self) -> int:
        return (self.side - 1) // self.stride + 1

    @property
    def input_size(self) -> tuple[int, ...]:
        return self.batch, self.channels, self.side, self.side

    @property
    def output_size(self) -> tuple[int, ...]:
        return self.batch, self.outputs, self.positions, self.positions

    @property
    def flop_floor(self) -> float:
        """The least whole-step ratio to the plain layer: operations only, every product at the same speed."""
        shape = (self.channels // self.groups, (self.kernel, self.kernel), (self.positions, self.positions))
        gram = cost.direct_flops(*shape)
        if self.stride == 1:
            gram = min(gram, cost.displaced_flops(*shape))
        inputs = self.channels // self.groups * self.kernel**2
        factor_and_apply = self.groups * inputs**3 + 2 * self.outputs * inputs**2
        plain = 6 * self.batch * self.positions**2 * inputs * self.outputs
        return 1 + (self.batch * self.groups * gram + factor_and_apply) / plain

    def layer(self, provider: str) -> nn.Module | None:
        """The provider's layer, or None where it has none for this shape."""
        if provider not in CONV_PROVIDERS or (provider == "displaced" and (self.stride > 1 or self.groups > 1)):
            return None
        arguments = (self.channels, self.outputs, self.kernel, self.stride, self.kernel // 2, 1, self.groups)
        return CONV_PROVIDERS[provider](*arguments)


CONV_SHAPES = (
    ConvShape(128, 16, 32, 3, 1, 1, 14, 2.0),
    ConvShape(64, 3, 64, 7, 2, 1, 64, 1.6),
    ConvShape(64, 64, 64, 3, 1, 64, 32, 1.3),
    ConvShape(64, 64, 64, 3, 1, 1, 32, 2.5),
)


class NaiveConvFunction(torch.autograd.Function):
    """The formula as one would write it first: all patches at once, a column of ones, a general solve."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, *arguments: Any) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.arguments = arguments
        return F.conv2d(x, weight, bias, *arguments)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.arguments
        batch, outputs = dy.shape[:2]
        patches = F.unfold(x, weight.shape[2:], dilation, padding, stride)
        patches = patches.reshape(batch, groups, -1, patches.shape[2]).permute(1, 0, 3, 2).flatten(1, 2)
        rows = torch.cat([patches, patches.new_ones(groups, patches.shape[1], 1)], 2)  # [groups, N, I]
        errors = dy.reshape(batch, groups, outputs // groups, -1).permute(1, 0, 3, 2).flatten(1, 2)
        gram = rows.mT @ rows
        c = gram.diagonal(dim1=1, dim2=2).sum(1) / min(rows.shape[1:])
        damped = gram + c[:, None, None] * torch.eye(gram.shape[1])
        dw = batch * torch.linalg.solve(damped, rows.mT @ errors).mT
        dx = conv2d_input(x.shape, weight, dy, *ctx.arguments)
        return dx, dw[:, :, :-1].reshape(weight.shape), dw[:, :, -1].flatten(), None, None, None, None


class NaiveConv2d(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        arguments = (self.stride, self.padding, self.dilation, self.groups)
        return NaiveConvFunction.apply(input, self.weight, self.bias, *arguments)


def _by(method: ConvMethod) -> Callable[..., nn.Module]:
    """This package's layer with its Gram summed up one way, whatever the cost model says."""

    class Forced(cw.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            with patch.object(cost, "conv_method", lambda *_: method):
                return super().forward(input)

    return Forced


CONV_PROVIDERS: dict[str, Callable[..., nn.Module]] = {
    "plain": nn.Conv2d,
    "naive": NaiveConv2d,
    "direct": _by("direct"),
    "displaced": _by("displaced"),
    "consequentialism": cw.Conv2d,
}
