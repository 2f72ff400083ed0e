"""`ConvTranspose1d` to `ConvTranspose3d`: torch's own layers with emended weight and bias gradients."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from typing_extensions import Unpack

from ..autograd.geometry import Sizes
from ..functional import plain_path
from ..functional.conv import emended_conv_transpose_with
from ..options import ConvOptions
from .conv import check_size
from .module import EmendedModule


class EmendedConvTransposeNd(EmendedModule):
    """The base of the three transposed convolutions: everything but the number of spatial dimensions."""

    OPTIONS = ConvOptions.__optional_keys__

    weight: Tensor
    bias: Tensor | None
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: Any
    output_padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes,
        stride: Sizes = 1,
        padding: Sizes = 0,
        output_padding: Sizes = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: Sizes = 1,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Unpack[ConvOptions],
    ) -> None:
        settings = self.settings_from(options)
        sizes = {
            "kernel_size": kernel_size,
            "stride": stride,
            "padding": padding,
            "output_padding": output_padding,
            "dilation": dilation,
        }
        for name, size in sizes.items():
            check_size(name, size)
        super().__init__(  # type: ignore[call-arg]
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            output_padding,
            groups,
            bias,
            dilation,
            padding_mode,
            device,
            dtype,
        )
        self.set_options(settings)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Torch's own output; ``output_size`` chooses among the sizes that a stride leaves open."""
        if output_size is None:
            return super().forward(input)
        if isinstance(input, Proxy):
            return plain_path.leaf(self, input, output_size)
        if plain_path.is_plain(self, input):
            own = functools.partial(super(EmendedModule, self).forward, output_size=output_size)
            return plain_path.plain_forward(self, input, own)
        self.note_run()
        return self.emended_forward(input, output_size)

    def emended_forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        output_padding: Any = self.output_padding
        if output_size is not None:
            layer: Any = self  # torch's own rule
            sizes = self.stride, self.padding, self.kernel_size, len(self.stride), self.dilation
            output_padding = layer._output_padding(input, output_size, *sizes)
        arguments = self.stride, self.padding, output_padding, self.groups, self.dilation
        weight, bias = self.weight_and_bias()
        return emended_conv_transpose_with(input, weight, bias, *arguments, self.options_now())


class ConvTranspose1d(EmendedConvTransposeNd, nn.ConvTranspose1d):
    """`torch.nn.ConvTranspose1d` whose weight and bias gradients are emended; the input gradient stays the true one.

    As `ConvTranspose2d`, in one dimension: ``[B, C, L] -> [B, O, positions]``.
    """


class ConvTranspose2d(EmendedConvTransposeNd, nn.ConvTranspose2d):
    """`torch.nn.ConvTranspose2d` whose weight and bias gradients are emended; the input gradient stays the true one.

    A transposed convolution equals a convolution with a stride of 1 and a reversed kernel, of its input with
    ``stride - 1`` zeros between the entries. Its rows are the patches of that input, one for each output position. Its
    gradients are those of that convolution, ``dw = dy^T (x x^T + c I)^-1 x``, with a Gram of its own for each group.
    The zeros are never stored. The layer works with any torch optimizer; parameters, ``state_dict`` and forward are
    torch's.

    Args:
        in_channels: ``C``, and all further positional arguments as `torch.nn.ConvTranspose2d`.
        damping: As in `consequentialism.Conv2d`; so are all keywords after it.

    Shape:
        ``[B, C, H, W] -> [B, O, H', W']``, or without ``B``.

    Raises:
        TypeError: An option or input of the wrong type.
        ValueError: An option out of its range.
        RuntimeError: torch's own, for an input whose shape does not fit.
    """


class ConvTranspose3d(EmendedConvTransposeNd, nn.ConvTranspose3d):
    """`torch.nn.ConvTranspose3d` whose weight and bias gradients are emended; the input gradient stays the true one.

    As `ConvTranspose2d`, in three dimensions: ``[B, C, D, H, W] -> [B, O, D', H', W']``.
    """
