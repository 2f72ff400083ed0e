"""The formulas of convolutions, whose rows are patches: unfolding, the Gram, the emended gradients."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ...options import DampingMode, Form, Scale
from ...precision import compute_dtype
from .linear import emended_weight_grad


def conv_output_size(
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """A convolution's output positions along each spatial dimension."""
    return [
        (s + 2 * p - d * (k - 1) - 1) // t + 1
        for s, k, t, p, d in zip(size, kernel, stride, padding, dilation, strict=True)
    ]


def check_conv(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> None:
    """Refuse what is no convolution of ``x [B, C, *spatial]``, by the compiled op's own words.

    Raises:
        ValueError: It names the argument, its value and what is allowed.
    """
    spatial, shape = x.ndim - 2, list(x.shape)
    if not 1 <= spatial <= 3:
        raise ValueError(f"x must have the shape [B, C, *spatial], 3 to 5 dimensions, got {shape}")
    named = (("kernel", kernel, 1), ("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1))
    for name, values, least in named:
        if len(values) != spatial:
            raise ValueError(f"{name} must have {spatial} numbers for x {shape}, got {list(values)}")
        if any(value < least for value in values):
            raise ValueError(f"{name} must be at least {least}, got {list(values)}")
    if groups < 1 or x.shape[1] % groups != 0:
        raise ValueError(f"groups must divide x's channels, got groups {groups} and x {shape}")
    sizes = conv_output_size(x.shape[2:], kernel, [1] * spatial, padding, dilation)
    if any(size < 1 for size in sizes):
        raise ValueError(f"kernel {list(kernel)} does not fit into x {shape} with padding {list(padding)}")


def conv_patches(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """A convolution's rows ``[groups, N, I]``: its unfolded patches, ``N = B * positions``.

    Args:
        x: ``[B, C, *spatial]`` of any number of spatial dimensions; ``I = C/groups * prod(kernel)``.
        kernel, stride, padding, dilation: One integer for each of them.
    """
    spatial = len(kernel)
    patches = F.pad(x, _both_sides(padding)) if any(padding) else x
    for i in range(spatial):
        patches = patches.unfold(2 + i, dilation[i] * (kernel[i] - 1) + 1, stride[i])[..., :: dilation[i]]
    channels = x.shape[1] // groups
    patches = patches.unflatten(1, (groups, channels)).movedim(0, 1)  # [groups, B, C/groups, *out, *kernel]
    patches = patches.movedim(2, 2 + spatial)  # the channel before the kernel: one copy is enough
    rows = math.prod(patches.shape[1 : 2 + spatial])  # -1 would be ambiguous without channels
    return patches.reshape(groups, rows, channels * math.prod(kernel))


def conv_transpose_patches(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    output_padding: Sequence[int],
    groups: int,
) -> Tensor:
    """A transposed convolution's rows ``[groups, N, I]``, a row for each output position: ``N = B * positions``.

    It is the convolution, by a stride of 1, of ``x`` with ``stride - 1`` zeros between the entries, padded by
    ``dilation * (kernel - 1) - padding``, at the end by ``output_padding`` more, with its kernel reversed. The rows
    are that convolution's patches, reversed likewise: in the order of the weight ``[C, O/groups, *kernel]``.

    Args:
        x: ``[B, C, *spatial]`` of any number of spatial dimensions; ``I = C/groups * prod(kernel)``.
        kernel, stride, padding, dilation, output_padding: One integer for each of them.
    """
    spatial = len(kernel)
    sizes = [(s - 1) * t + 1 for s, t in zip(x.shape[2:], stride, strict=True)]
    stuffed = x.new_zeros(*x.shape[:2], *sizes)
    places: Any = (..., *(slice(None, None, t) for t in stride))
    stuffed[places] = x
    before = [d * (k - 1) - p for d, k, p in zip(dilation, kernel, padding, strict=True)]
    sides = [side for b, more in zip(reversed(before), reversed(output_padding), strict=True) for side in (b, b + more)]
    ones, nothing = [1] * spatial, [0] * spatial
    patches = conv_patches(F.pad(stuffed, sides), kernel, ones, nothing, dilation, groups)
    return patches.unflatten(2, (-1, *kernel)).flip(list(range(-spatial, 0))).flatten(2)


def _both_sides(padding: Sequence[int]) -> list[int]:
    """What `torch.nn.functional.pad` wants: the last dimension first."""
    return [p for p in reversed(padding) for _ in range(2)]


class ConvBlock(NamedTuple):
    """A piece of a convolution's input, and where its positions are in the output."""

    x: Tensor  # [b, C, *spatial], to be read without further padding
    sample: int  # the first
    line: int  # the first position along the first spatial dimension
    lines: int

    def of(self, y: Tensor) -> Tensor:
        """The part of ``y [B, ..., *positions]`` that belongs to it.

        Not by indices: torch.autograd.grad(is_grads_batched=True) knows no rule for them.
        """
        return y.narrow(0, self.sample, self.x.shape[0]).narrow(2, self.line, self.lines)


def conv_blocks(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    patch_bytes: int,
    dtype: torch.dtype,
) -> Iterator[ConvBlock]:
    """``x`` in pieces in ``dtype`` whose patches take at most ``patch_bytes``.

    Pieces are samples, or rows of positions of one sample where its patches take more; one row is the least.
    """
    size, batch = x.shape[2:], x.shape[0]
    rows = conv_output_size(size, kernel, stride, padding, dilation)
    padded = math.prod([s + 2 * p for s, p in zip(size, padding, strict=True)])
    sample_bytes = (math.prod(rows) * math.prod(kernel) + padded) * x.shape[1] * dtype.itemsize
    samples = max(1, patch_bytes // max(sample_bytes, 1))
    step = max(1, rows[0] * patch_bytes // sample_bytes) if sample_bytes > patch_bytes else rows[0]
    for first in range(0, batch, samples):
        piece = x[first : first + samples].to(dtype)
        piece = F.pad(piece, _both_sides(padding)) if any(padding) else piece
        for begin in range(0, rows[0], step):
            end = min(begin + step, rows[0])
            length = (end - begin - 1) * stride[0] + dilation[0] * (kernel[0] - 1) + 1
            block = piece.narrow(2, begin * stride[0], length)
            yield ConvBlock(block, first, begin, end - begin)


def conv_gram(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    bias: bool,
    patch_bytes: int,
    dtype: torch.dtype,
) -> Tensor:
    """``x^T x [groups, I, I]`` of a convolution's patches, streamed: never more than ``patch_bytes`` of them.

    Args:
        x: ``[B, C, *spatial]``.
        dtype: The type in which it is computed and returned, float32 or float64.

    Raises:
        ValueError: See `check_conv`.
    """
    check_conv(x, kernel, stride, padding, dilation, groups)
    inputs = x.shape[1] // groups * math.prod(kernel)
    gram = x.new_zeros(groups, inputs, inputs, dtype=dtype)
    sums = x.new_zeros(groups, inputs, 1, dtype=dtype)
    nothing = [0] * len(kernel)
    for block in conv_blocks(x, kernel, stride, padding, dilation, patch_bytes, dtype):
        patches = conv_patches(block.x, kernel, stride, nothing, dilation, groups)
        gram, sums = gram + patches.mT @ patches, sums + patches.sum(1)[:, :, None]
    if not bias:
        return gram
    rows = x.shape[0] * math.prod(conv_output_size(x.shape[2:], kernel, stride, padding, dilation))
    corner = sums.new_full((groups, 1, 1), rows)
    return torch.cat([torch.cat([gram, sums.mT], 1), torch.cat([sums, corner], 1)], 2)


def conv_errors(dy: Tensor, groups: int) -> Tensor:
    """``dy [B, O, *positions]`` as rows ``[groups, N, O/groups]``."""
    batch, outputs = dy.shape[:2]
    positions = math.prod(dy.shape[2:])
    split = dy.reshape(batch, groups, outputs // groups, positions)
    return split.permute(1, 0, 3, 2).reshape(groups, batch * positions, outputs // groups)


def emended_conv_weight_grad(
    x: Tensor,
    dy: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
    bias: bool = True,
    *,
    form: Form | None = None,
    damping: float = 1.0,
    damping_mode: DampingMode = "relative",
    scale: Scale = "nlms",
) -> tuple[Tensor, Tensor | None]:
    """The linear formula on a convolution's unfolded patches, each group with its own Gram.

    ``scale="nlms"`` multiplies by the batch size: the number of samples that a mean-reduced loss divides by. This
    is the definition, and unfolds everything at once; the layers stream.

    Args:
        x: ``[B, C, *spatial]``, padding included but for zeros.
        dy: ``[B, O, *positions]``.

    Returns:
        ``dw [O, C/groups, *kernel]`` and ``db [O]`` or None.
    """
    rows = conv_patches(x, kernel, stride, padding, dilation, groups)
    options: dict[str, Any] = {"form": form, "damping": damping, "damping_mode": damping_mode, "scale": scale}
    dw, db = _grads_of_patches(rows, x.shape[0], dy, groups, bias, **options)
    return dw.reshape(dy.shape[1], -1, *kernel), db


def _grads_of_patches(
    rows: Tensor, batch: int, dy: Tensor, groups: int, bias: bool, *, scale: Scale = "nlms", **options: Any
) -> tuple[Tensor, Tensor | None]:
    """``dw [O, I]`` and ``db [O]`` of a convolution's rows ``[groups, N, I]``."""
    multiplier = batch if scale == "nlms" else 1
    options["scale"] = "raw" if scale == "nlms" else scale
    errors = conv_errors(dy.to(compute_dtype(dy.dtype)), groups)
    grads = [emended_weight_grad(own_x, own_dy, bias, **options) for own_x, own_dy in zip(rows, errors, strict=True)]
    dw = multiplier * torch.cat([dw for dw, _ in grads])
    db = multiplier * torch.cat([db for _, db in grads if db is not None]) if bias else None
    return dw.to(dy.dtype), None if db is None else db.to(dy.dtype)


def emended_conv_transpose_weight_grad(
    x: Tensor,
    dy: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    output_padding: Sequence[int],
    groups: int = 1,
    bias: bool = True,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """The linear formula on the rows of `conv_transpose_patches`; otherwise as `emended_conv_weight_grad`.

    Returns:
        ``dw [C, O/groups, *kernel]`` and ``db [O]`` or None.
    """
    rows = conv_transpose_patches(x, kernel, stride, padding, dilation, output_padding, groups)
    dw, db = _grads_of_patches(rows, x.shape[0], dy, groups, bias, **options)
    dw = dw.unflatten(1, (-1, *kernel)).unflatten(0, (groups, -1))  # [groups, O/groups, C/groups, *kernel]
    return dw.transpose(1, 2).flatten(0, 1), db
