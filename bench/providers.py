"""The layers that are compared, by provider's name; another way to compute a layer is one line here."""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_input

import consequentialism as cw
from consequentialism.backend import dispatch
from consequentialism.options import ConvMethod
from consequentialism.solve import cost

from .case import Unavailable
from .timing import Device
from .verify import ISAAC_LA

Build = Callable[..., nn.Module]  # of torch's arguments; raises Unavailable


class NaiveFunction(torch.autograd.Function):
    """The formula as one would write it first: a column of ones, an identity, a general solve, all in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        x, weight = ctx.saved_tensors
        wide = torch.promote_types(x.dtype, torch.float32)
        rows = torch.cat([x, x.new_ones(x.shape[0], 1)], 1).to(wide)
        gram = rows @ rows.T
        c = gram.trace() / min(rows.shape)
        solved = torch.linalg.solve(gram + c * torch.eye(gram.shape[0], device=x.device, dtype=wide), rows)
        dw = x.shape[0] * dy.T @ solved.to(x.dtype)
        return dy @ weight, dw[:, :-1], dw[:, -1]


class StockFunction(torch.autograd.Function):
    """torch's own operations, none of which waits for the device, in the smaller form, all in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        x, weight = ctx.saved_tensors
        n, inputs = x.shape[0], x.shape[1] + 1
        wide = torch.promote_types(x.dtype, torch.float32)
        rows = torch.cat([x, x.new_ones(n, 1)], 1).to(wide)
        dual = n <= inputs
        gram = rows @ rows.T if dual else rows.T @ rows
        c = gram.diagonal().sum() / min(n, inputs)
        gram.diagonal().add_(c)
        lower, _ = torch.linalg.cholesky_ex(gram)
        if dual:
            dw = n * dy.T @ torch.cholesky_solve(rows, lower).to(dy.dtype)
        else:
            dw = (n * torch.cholesky_solve(rows.T @ dy.to(wide), lower).T).to(dy.dtype)
        return dy @ weight, dw[:, :-1], dw[:, -1]


class NaiveLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return NaiveFunction.apply(input, self.weight, self.bias)


class StockLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return StockFunction.apply(input, self.weight, self.bias)


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
        wide = torch.promote_types(x.dtype, torch.float32)
        patches = F.unfold(x, weight.shape[2:], dilation, padding, stride).to(wide)
        patches = patches.reshape(batch, groups, -1, patches.shape[2]).permute(1, 0, 3, 2).flatten(1, 2)
        rows = torch.cat([patches, patches.new_ones(groups, patches.shape[1], 1)], 2)  # [G, N, I]
        errors = dy.to(wide).reshape(batch, groups, outputs // groups, -1).permute(1, 0, 3, 2).flatten(1, 2)
        gram = rows.mT @ rows
        c = gram.diagonal(dim1=1, dim2=2).sum(1) / min(rows.shape[1:])
        damped = gram + c[:, None, None] * torch.eye(gram.shape[1], device=x.device, dtype=wide)
        dw = batch * torch.linalg.solve(damped, rows.mT @ errors).mT.to(x.dtype)
        dx = conv2d_input(x.shape, weight, dy, *ctx.arguments)
        return dx, dw[:, :, :-1].reshape(weight.shape), dw[:, :, -1].flatten(), None, None, None, None


class NaiveConv2d(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        arguments = (self.stride, self.padding, self.dilation, self.groups)
        return NaiveConvFunction.apply(input, self.weight, self.bias, *arguments)


def isaac_linear(inputs: int, outputs: int, **make: Any) -> nn.Module:
    """The PyPI package of ISAAC Newton."""
    try:
        import isaac
    except ImportError as error:
        raise Unavailable(f"{error.name} is not installed: pip install isaac") from None
    if make.get("dtype", torch.float32).itemsize < 4:
        raise Unavailable("isaac knows no half-precision types")
    return isaac.Linear(inputs, outputs, la=ISAAC_LA, **make)


def triton(layer: Build) -> Build:
    """This package's layer by the Triton backend."""

    def build(*arguments: Any, **make: Any) -> nn.Module:
        state = cw.backends()["triton"]
        if state != dispatch.AVAILABLE:
            raise Unavailable(state)
        return layer(*arguments, backend="triton", **make)

    return build


def compiled(layer: Build, device: Device) -> Build:
    """The formula in plain PyTorch, compiled. It compiles when it is first called, and that is not timed."""

    def build(*arguments: Any, **make: Any) -> nn.Module:
        reason = no_compiler(device)
        if reason:
            raise Unavailable(reason)
        warnings.filterwarnings("ignore", module=r"torch\._(dynamo|inductor)")  # of its own deprecations
        torch._dynamo.reset()  # else the layers of earlier shapes count as one function's recompilations
        module: Any = layer(*arguments, backend="reference", **make)
        module.compile(fullgraph=True, dynamic=False)
        return module

    return build


def no_compiler(device: Device) -> str:
    """Why torch.compile has no compiler for a device; empty where it has."""
    if device.type == "cuda":
        return "" if importlib.util.find_spec("triton") else "torch.compile needs triton, which is not installed"
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        return "torch.compile needs a C++ compiler, and there is none"
    return ""


def _by(method: ConvMethod, device: Device) -> Build:
    """This package's layer with its Gram summed up one way, whatever the cost model says."""

    class Forced(cw.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            with patch.object(cost, "conv_method", lambda *_: method):
                return super().forward(input)

    return functools.partial(Forced, backend=device.backend())


def linear_layers(device: Device) -> dict[str, Build]:
    """Linear layers, of ``in_features, out_features``."""
    return {
        "plain": nn.Linear,
        "consequentialism": functools.partial(cw.Linear, backend=device.backend()),
        "triton": triton(cw.Linear),
        "reference": functools.partial(cw.Linear, backend="reference"),
        "compiled": compiled(cw.Linear, device),
        "stock": StockLinear,
        "naive": NaiveLinear,
        "isaac": isaac_linear,
    }


def conv_layers(device: Device) -> dict[str, Build]:
    """Convolutions, of ``in_channels, out_channels, kernel_size, stride, padding, dilation, groups``."""
    return {
        "plain": nn.Conv2d,
        "consequentialism": functools.partial(cw.Conv2d, backend=device.backend()),
        "direct": _by("direct", device),
        "displaced": _by("displaced", device),
        "triton": triton(cw.Conv2d),
        "reference": functools.partial(cw.Conv2d, backend="reference"),
        "naive": NaiveConv2d,
    }
