"""`Conv1d`, `Conv2d`, `Conv3d`: torch's own layers with emended weight and bias gradients."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Sized
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Unpack

from ..autograd.geometry import Sizes, both_sides
from ..functional.conv import emended_conv_with
from ..options import ConvOptions, is_whole
from .module import EmendedModule


class EmendedConvNd(EmendedModule):
    """The base of the three convolutions: everything but the number of spatial dimensions."""

    OPTIONS = ConvOptions.__optional_keys__

    weight: Tensor
    bias: Tensor | None
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding_mode: Any

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes,
        stride: Sizes = 1,
        padding: str | Sizes = 0,
        dilation: Sizes = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Unpack[ConvOptions],
    ) -> None:
        settings = self.settings_from(options)
        sizes = {"kernel_size": kernel_size, "stride": stride, "padding": padding, "dilation": dilation}
        for name, size in sizes.items():
            check_size(name, size)
        super().__init__(  # type: ignore[call-arg]
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
        )
        self.set_options(settings)

    def emended_forward(self, input: Tensor) -> Tensor:
        weight, bias = self.weight_and_bias()
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, sides_of(self, weight.shape[2:]), mode=self.padding_mode)
            padding = 0
        return emended_conv_with(
            input, weight, bias, self.stride, padding, self.dilation, self.groups, self.options_now()
        )


def sides_of(layer: Any, kernel: Sequence[int]) -> list[int]:
    """How much a convolution pads each side, the last dimension first, as `torch.nn.functional.pad` takes it.

    Args:
        layer: With ``padding`` and ``dilation``, numbers or one for each dimension; torch's own has it as it is.
        kernel: The size of its kernel.
    """
    own: list[int] | None = getattr(layer, "_reversed_padding_repeated_twice", None)
    if own is not None:
        return own
    sides = both_sides(layer.padding, kernel, layer.dilation)
    return [side for before, after in reversed(sides) for side in (before, after)]


def check_size(name: str, size: Any) -> None:
    """Raise where torch's own layer would fail at a number without saying which argument it is."""
    if isinstance(size, str):
        return
    several = isinstance(size, Iterable) and isinstance(size, Sized)
    if not all(map(is_whole, size)) if several else not is_whole(size):
        raise TypeError(f"{name} must be a whole number or several, got {size!r} ({type(size).__name__})")


class Conv1d(EmendedConvNd, nn.Conv1d):
    """`torch.nn.Conv1d` whose weight and bias gradients are emended; the input gradient stays the true one.

    As `Conv2d`, in one dimension: ``[B, C, L] -> [B, O, positions]``.
    """


class Conv2d(EmendedConvNd, nn.Conv2d):
    """`torch.nn.Conv2d` whose weight and bias gradients are emended; the input gradient stays the true one.

    A convolution is a linear layer whose rows are the unfolded patches of its input: ``N = B * positions`` rows of
    ``I = C/groups * prod(kernel)`` inputs, and one more input with a bias. Its weight gradient is exactly the emended
    one of that layer, ``dw = dy^T (x x^T + c I)^-1 x``, with a Gram of its own for each group. The layer works with any
    torch optimizer. Parameters, ``state_dict`` and forward are those of `torch.nn.Conv2d`, and nothing is kept between
    steps.

    Patches are streamed. Beyond torch's own step, at most ``patch_bytes`` of patches are in memory, whatever the batch
    and the image size (but at least one row of positions of one sample), and a few matrices ``[groups, I, I]``.

    Args:
        in_channels: ``C``, and all further positional arguments as `torch.nn.Conv2d`: every stride, padding,
            dilation, number of groups and padding mode.
        damping: As in `consequentialism.Linear`; so are all keywords after it. ``min(N, I)`` is the rank that a
            relative damping refers to. Where ``min(N, I)`` exceeds 2,000 times a relative damping, and for every
            absolute damping, Gram and gradient are computed in float64.
        scale: ``"nlms"`` multiplies by the batch size, the number of samples that a mean-reduced loss divides by,
            unless `set_samples` says otherwise.
        backend: ``"cuda"`` gathers patches as it multiplies them, from a padded copy of the input within
            ``patch_bytes``; ``"triton"`` from the input itself.
        patch_bytes: Memory for unfolded patches, in bytes.

    Shape:
        ``[B, C, H, W] -> [B, O, H', W']``, or without ``B``.

    Raises:
        TypeError: An option or input of the wrong type.
        ValueError: An option out of its range.
        RuntimeError: torch's own, for an input whose shape does not fit.
    """


class Conv3d(EmendedConvNd, nn.Conv3d):
    """`torch.nn.Conv3d` whose weight and bias gradients are emended; the input gradient stays the true one.

    As `Conv2d`, in three dimensions: ``[B, C, D, H, W] -> [B, O, D', H', W']``.
    """
