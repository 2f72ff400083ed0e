"""The functional forms of convolutions: the linear formula on unfolded patches, which are never all in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy
from typing_extensions import Unpack

from .. import _torch
from ..autograd import side_stream, traced_ops
from ..autograd.conv import EmendedConv, Needs, TransformableEmendedConv, conv_gradients, prepare
from ..autograd.geometry import (
    CONVOLUTIONS,
    TRANSPOSED,
    Geometry,
    Sizes,
    normalized,
    normalized_transposed,
    per_dimension,
)
from ..autograd.linear import full_precision
from ..options import Options, OptionsDict, options_from
from ..samples import counted, ratio, scaled
from . import plain_path
from .checks import check_conv, check_differentiable, check_floating, check_match
from .linear import autocast


def emended_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: str | Sizes = 0,
    dilation: Sizes = 1,
    groups: int = 1,
    **options: Unpack[OptionsDict],
) -> Tensor:
    """Compute a 1-, 2- or 3-dimensional convolution whose backward gives emended gradients to ``weight`` and ``bias``.

    The gradient of ``x`` is the true one. The weight gradient is that of `emended_linear` with the patches of ``x`` as
    rows, ``dw = dy^T (x x^T + c I)^-1 x``, with a Gram of its own for each group.

    Args:
        x: ``[B, C, *spatial]`` or, unbatched, ``[C, *spatial]``.
        weight: ``[O, C/groups, *kernel]``.
        bias: ``[O]`` or None.
        stride, padding, dilation, groups: As in `torch.nn.functional.conv2d`, ``"same"`` and ``"valid"`` included.
        **options: The fields of `consequentialism.Options`. ``scale="nlms"`` multiplies by the batch size, or
            by ``samples``.

    Returns:
        ``[B, O, *positions]``, as torch's own convolution.

    Raises:
        TypeError: An argument of the wrong type, or types that differ.
        ValueError: A weight whose shape fits no convolution, or an option out of its range.
        RuntimeError: torch's own, for shapes that do not fit; a backend named by the user that cannot serve the call.

    Source: arXiv 2003.05164.
    """
    settings = options_from(options)
    if isinstance(x, Proxy):
        return plain_path.call(x, emended_conv, (x, weight, bias, stride, padding, dilation, groups), options)
    return emended_conv_with(x, weight, bias, stride, padding, dilation, groups, settings)


def emended_conv_with(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sizes,
    padding: str | Sizes,
    dilation: Sizes,
    groups: int,
    options: Options,
) -> Tensor:
    """`emended_conv` with its options as one object."""
    arguments: Any = (stride, padding, dilation, groups)

    def plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return CONVOLUTIONS[weight.ndim - 2](x, weight, bias, *arguments)

    def geometry(x: Tensor, kernel: tuple[int, ...]) -> tuple[Tensor, Geometry] | None:
        return normalized(x, kernel, *arguments)

    return _emended(x, weight, bias, "[O, C/groups, *kernel]", plain, geometry, options)


def emended_conv_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes = 0,
    output_padding: Sizes = 0,
    groups: int = 1,
    dilation: Sizes = 1,
    **options: Unpack[OptionsDict],
) -> Tensor:
    """Compute a 1-, 2- or 3-dimensional transposed convolution with emended gradients of ``weight`` and ``bias``.

    The gradient of ``x`` is the true one. A transposed convolution equals a convolution of ``x`` with ``stride - 1``
    zeros between its entries (see `geometry.TransposedGeometry`), and its gradients are emended as those of that
    convolution.

    Args:
        x: ``[B, C, *spatial]`` or, unbatched, ``[C, *spatial]``.
        weight: ``[C, O/groups, *kernel]``.
        bias: ``[O]`` or None.
        stride, padding, output_padding, groups, dilation: As in `torch.nn.functional.conv_transpose2d`.
        **options: As `emended_conv`.

    Returns:
        ``[B, O, *positions]``, as torch's own transposed convolution.

    Raises:
        TypeError, ValueError, RuntimeError: As `emended_conv`.

    Source: arXiv 2003.05164 for convolutions; the transposed ones are this package's.
    """
    settings = options_from(options)
    if isinstance(x, Proxy):
        arguments = (x, weight, bias, stride, padding, output_padding, groups, dilation)
        return plain_path.call(x, emended_conv_transpose, arguments, options)
    return emended_conv_transpose_with(x, weight, bias, stride, padding, output_padding, groups, dilation, settings)


def emended_conv_transpose_with(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sizes,
    padding: Sizes,
    output_padding: Sizes,
    groups: int,
    dilation: Sizes,
    options: Options,
) -> Tensor:
    """`emended_conv_transpose` with its options as one object."""
    arguments = stride, padding, output_padding, groups, dilation

    def plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return TRANSPOSED[weight.ndim - 2](x, weight, bias, *arguments)

    def geometry(x: Tensor, kernel: tuple[int, ...]) -> tuple[Tensor, Geometry]:
        return x, normalized_transposed(kernel, *arguments)

    return _emended(x, weight, bias, "[C, O/groups, *kernel]", plain, geometry, options)


def _emended(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_shape: str,
    plain: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    normalize: Callable[[Tensor, tuple[int, ...]], tuple[Tensor, Geometry] | None],
    options: Options,
) -> Tensor:
    """Either kind of convolution.

    Args:
        weight_shape: What a weight must look like, for an error.
        plain: torch's own layer.
        normalize: From ``x [B, C, *spatial]`` and a kernel's size to ``x``, padded where it must be, and its geometry;
            None where torch raises an error.
    """
    if options.samples is not None and options.process_group is None and isinstance(x, Tensor):
        weight, bias, options = counted(weight, bias, options, x.shape[0] if x.ndim == weight.ndim else 1)
    x, weight, bias = autocast(x, weight, bias)
    check_conv(x, weight, bias, weight_shape)
    # Inside a torch.func transform a wrapper's requires_grad says nothing about the outer levels.
    transformed = _torch.transforms_active()
    recording = torch.is_grad_enabled()
    need_weight = transformed or (recording and weight.requires_grad)
    need_bias = bias is not None and (transformed or (recording and bias.requires_grad))
    if not (need_weight or need_bias) or plain_path.is_exported(True):
        return plain(x, weight, bias)
    check_differentiable(transformed, x, weight, bias)
    batched = x.ndim == weight.ndim
    normal = normalize(x if batched else x.unsqueeze(0), tuple(weight.shape[2:]))
    if normal is None or not normal[1].takes(normal[0], weight):
        return plain(x, weight, bias)  # torch's own error
    rows, geometry = normal
    if plain_path.is_traced(options):
        from ..autograd import traced

        y = traced.convolution(rows, weight, bias, geometry, options)
        return y if batched else y.squeeze(0)
    if rows.shape[0] == 0 and options.process_group is None:
        return plain(x, weight, bias)  # nothing to emend
    with torch.no_grad(), full_precision(x.device.type):
        read = rows.detach()
        kept, ready = side_stream.run(
            side_stream.scope_of(read, options, need_weight),
            read,
            lambda: prepare(read, geometry, bias is not None, geometry.outputs(weight), options),
        )
    function = TransformableEmendedConv if transformed else EmendedConv
    y = function.apply(rows, weight, bias, geometry, options.patch_bytes, options.scale, ready, *kept.flat())
    return y if batched else y.squeeze(0)


def emended_conv_weight_grad(
    x: Tensor,
    dy: Tensor,
    kernel_size: Sizes,
    *,
    stride: Sizes = 1,
    padding: str | Sizes = 0,
    dilation: Sizes = 1,
    groups: int = 1,
    bias: bool = True,
    **options: Unpack[OptionsDict],
) -> tuple[Tensor, Tensor | None]:
    """Compute the emended gradients of a convolution, those of `emended_weight_grad` on its unfolded patches.

    The patches are streamed in blocks of at most ``patch_bytes``.

    Args:
        x: The layer's input, ``[B, C, *spatial]``, or ``[C, *spatial]`` with a ``kernel_size`` for each dimension.
        dy: The loss's gradient with respect to the layer's output, ``[B, O, *positions]``, of x's type.
        kernel_size, stride, padding, dilation, groups: As in `torch.nn.Conv2d`; a number stands for all dimensions.
        bias: Whether the layer has a bias. Every patch then has one more input that is always 1.
        **options: The fields of `consequentialism.Options`. ``scale="nlms"`` multiplies by the batch size, or
            by ``samples``.

    Returns:
        ``dw [O, C/groups, *kernel]`` and ``db [O]`` or None, in x's type.

    Raises:
        TypeError, ValueError, RuntimeError: As `emended_conv`, with a ValueError for shapes that do not fit.
    """
    settings = options_from(options)
    check_floating("x", x)
    check_floating("dy", dy)
    if not isinstance(bias, bool):
        raise TypeError(f"bias must be True or False, got {bias!r} ({type(bias).__name__})")
    check_match("x", x, "dy", dy)
    spatial = len(kernel_size) if isinstance(kernel_size, Sequence) else x.ndim - 2
    if spatial not in CONVOLUTIONS or x.ndim not in (spatial + 1, spatial + 2) or x.ndim != dy.ndim:
        raise ValueError(
            f"x [B, C, *spatial] and dy [B, O, *positions] must have 1 to 3 spatial dimensions, those of kernel_size, "
            f"got x {list(x.shape)}, dy {list(dy.shape)} and kernel_size {kernel_size}"
        )
    if x.ndim == spatial + 1:
        x, dy = x.unsqueeze(0), dy.unsqueeze(0)
    kernel = per_dimension("kernel_size", kernel_size, spatial)
    normal = normalized(x, kernel, stride, padding, dilation, groups)
    if normal is None:
        raise ValueError("padding='same' needs a stride of 1, got " + repr(stride))
    x, geometry = normal
    least = min(*kernel, *geometry.stride, *geometry.dilation, groups)
    if least < 1 or min(geometry.padding) < 0 or x.shape[1] % groups or dy.shape[1] % groups:
        raise ValueError(
            f"kernel_size, stride, dilation and groups must be at least 1, padding at least 0, and groups a divisor "
            f"of C and O, got {geometry}, x {list(x.shape)} and dy {list(dy.shape)}"
        )
    positions = geometry.positions(x)
    if min(positions) < 1 or [x.shape[0], *positions] != [dy.shape[0], *dy.shape[2:]]:
        raise ValueError(
            f"dy must have the shape [{x.shape[0]}, O, {', '.join(map(str, positions))}] for x {list(x.shape)} with "
            f"{geometry}, got {list(dy.shape)}"
        )
    weight = x.new_empty(geometry.weight_shape(x.shape[1], dy.shape[1]))
    if x.shape[0] == 0 and settings.process_group is None:
        return torch.zeros_like(weight), x.new_zeros(dy.shape[1]) if bias else None
    with torch.no_grad(), full_precision(x.device.type):
        dw: Tensor | None
        if plain_path.is_traced(settings):
            dw, own_db = traced_ops.conv_weight_grad(x, dy, geometry, bias, settings)
            db = own_db if bias else None
        else:
            kept = prepare(x, geometry, bias, dy.shape[1], settings)
            needs, how = Needs(False, True, bias), (settings.patch_bytes, settings.scale)
            _, dw, db = conv_gradients(kept, x, weight, dy, bias, geometry, *how, needs)
        assert dw is not None
        by = ratio(settings, x.shape[0], x) if settings.process_group is None else None
        if by is not None:
            dw, db = scaled(dw, by), None if db is None else scaled(db, by)
    return dw, db
