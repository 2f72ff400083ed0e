"""Emended convolutions: the linear formula on unfolded patches, which are never all in memory.

The Gram of the patches depends on ``x`` alone and is summed up in forward (`prepare`). Backward is torch's own
convolution backward and one product with the inverse, a group at a time (`conv_gradients`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import Unpack

from . import _torch, conjugate, cost, dispatch, distributed, ops, reference
from .autograd import full_precision, once_differentiable, refuse_jacobian
from .functional import _check_floating, _check_match, autocast, check_differentiable
from .options import Form, Options, OptionsDict, Scale, options_from
from .precision import gram_dtype
from .reference import conv_blocks, conv_errors, conv_output_size
from .samples import counted, ratio, scaled

CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
Sizes = int | Sequence[int]


class Geometry(NamedTuple):
    """What a convolution reads; one number for each spatial dimension."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def positions(self, x: Tensor) -> list[int]:
        """Output positions along each dimension of ``x [B, C, *spatial]``."""
        return conv_output_size(x.shape[2:], *self[:4])

    def inputs(self, x: Tensor) -> int:
        """``I`` without the bias's."""
        return x.shape[1] // self.groups * math.prod(self.kernel)


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
    """A 1-, 2- or 3-dimensional convolution whose backward gives emended gradients to ``weight`` and ``bias``.

    The gradient of ``x`` is the true one. With the patches of ``x`` as rows, the weight gradient is that of
    `emended_linear`: ``dw = dy^T (x x^T + c I)^-1 x``, each group with its own Gram, exactly.

    Args:
        x: ``[B, C, *spatial]`` or, unbatched, ``[C, *spatial]``.
        weight: ``[O, C/groups, *kernel]``.
        bias: ``[O]`` or None.
        stride, padding, dilation, groups: As `torch.nn.functional.conv2d`, ``"same"`` and ``"valid"`` included.
        **options: The fields of `consequentialism.Options`. ``scale="nlms"`` multiplies by the batch size, or
            by ``samples``.

    Returns:
        ``[B, O, *positions]``, what torch's own convolution returns.

    Raises:
        TypeError: An argument of the wrong type, or types that differ.
        ValueError: A weight that no convolution has, or an option out of its range.
        RuntimeError: torch's own, for shapes that do not fit; a backend named by the user that cannot serve the call.

    Source: arXiv 2003.05164.
    """
    return emended_conv_with(x, weight, bias, stride, padding, dilation, groups, options_from(options))


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
    if options.samples is not None and options.process_group is None and isinstance(x, Tensor):
        weight, bias, options = counted(weight, bias, options, x.shape[0] if x.ndim == weight.ndim else 1)
    x, weight, bias = autocast(x, weight, bias)
    _check_conv(x, weight, bias)
    convolution = CONVOLUTIONS[weight.ndim - 2]
    # Inside a torch.func transform a wrapper's requires_grad says nothing about the outer levels.
    transformed = _torch.transforms_active()
    recording = torch.is_grad_enabled()
    need_weight = transformed or (recording and weight.requires_grad)
    need_bias = bias is not None and (transformed or (recording and bias.requires_grad))
    if not (need_weight or need_bias):
        return convolution(x, weight, bias, stride, padding, dilation, groups)
    check_differentiable(transformed, x, weight, bias)
    kernel = tuple(weight.shape[2:])
    batched = x.ndim == weight.ndim
    placed = _place(x if batched else x.unsqueeze(0), kernel, stride, padding, dilation, groups)
    fits = placed is not None and _fits(*placed, weight)
    if placed is None or not fits or (placed[0].shape[0] == 0 and options.process_group is None):
        return convolution(x, weight, bias, stride, padding, dilation, groups)  # torch's own error, or nothing to emend
    rows, geometry = placed
    with torch.no_grad(), full_precision(x.device.type):
        prepared = prepare(rows.detach(), geometry, bias is not None, weight.shape[0], options)
    function = TransformableEmendedConv if transformed else EmendedConv
    y = function.apply(rows, weight, bias, geometry, options.patch_bytes, *prepared)
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
    """The emended gradients of a convolution: `emended_weight_grad` on its unfolded patches, which are streamed.

    Args:
        x: The layer's input, ``[B, C, *spatial]``, or ``[C, *spatial]`` with a ``kernel_size`` for each dimension.
        dy: The loss's gradient with respect to the layer's output, ``[B, O, *positions]``, of x's type.
        kernel_size, stride, padding, dilation, groups: As `torch.nn.Conv2d`; numbers stand for all dimensions.
        bias: Whether the layer has a bias: every patch then reads as with a constant 1 appended.
        **options: The fields of `consequentialism.Options`. ``scale="nlms"`` multiplies by the batch size, or
            by ``samples``.

    Returns:
        ``dw [O, C/groups, *kernel]`` and ``db [O]`` or None, in x's type.

    Raises:
        TypeError, ValueError, RuntimeError: As `emended_conv`, with a ValueError for shapes that do not fit.
    """
    settings = options_from(options)
    _check_floating("x", x)
    _check_floating("dy", dy)
    if not isinstance(bias, bool):
        raise TypeError(f"bias must be True or False, got {bias!r} ({type(bias).__name__})")
    _check_match("x", x, "dy", dy)
    spatial = x.ndim - 2 if isinstance(kernel_size, int) else len(kernel_size)
    if spatial not in CONVOLUTIONS or x.ndim not in (spatial + 1, spatial + 2) or x.ndim != dy.ndim:
        raise ValueError(
            f"x [B, C, *spatial] and dy [B, O, *positions] must have 1 to 3 spatial dimensions, those of kernel_size, "
            f"got x {list(x.shape)}, dy {list(dy.shape)} and kernel_size {kernel_size}"
        )
    if x.ndim == spatial + 1:
        x, dy = x.unsqueeze(0), dy.unsqueeze(0)
    kernel = _per_dimension("kernel_size", kernel_size, spatial)
    placed = _place(x, kernel, stride, padding, dilation, groups)
    if placed is None:
        raise ValueError("padding='same' needs a stride of 1, got " + repr(stride))
    x, geometry = placed
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
    weight = x.new_empty(dy.shape[1], x.shape[1] // groups, *kernel)
    if x.shape[0] == 0 and settings.process_group is None:
        return torch.zeros_like(weight), x.new_zeros(dy.shape[1]) if bias else None
    with torch.no_grad(), full_precision(x.device.type):
        prepared = prepare(x, geometry, bias, dy.shape[1], settings)
        _, dw, db = conv_gradients(prepared, x, weight, dy, bias, geometry, settings.patch_bytes, False)
        by = ratio(settings, x.shape[0], x) if settings.process_group is None else None
        if by is not None:
            dw, db = scaled(dw, by), None if db is None else scaled(db, by)
    return dw, db


class Prepared(NamedTuple):
    """What forward keeps for `conv_gradients`."""

    form: Form
    matrix: Tensor  # [groups, n, n], the inverse, or the primal Gram that conjugate gradients take
    solved_with: tuple[Any, ...] | None  # the arguments of `conjugate.solve_gram` after its matrices


def prepare(x: Tensor, geometry: Geometry, bias: bool, outputs: int, options: Options) -> Prepared:
    """Everything that does not depend on ``dy``.

    Args:
        x: ``[B, C, *spatial]``, detached, with at least one position a sample.
        bias: Whether the layer has a bias, which then stands in the Gram.
        outputs: ``O``, for the cost model.

    The matrix is in the type that keeps the inverse's digits: float64 where float32 would not.
    """
    backend = dispatch.select(options.backend, x)
    batch, inputs = x.shape[0], geometry.inputs(x) + bias
    rows = batch * math.prod(geometry.positions(x))
    form: Form = cost.conv_form(rows, inputs)
    solver = cost.conv_solver(rows, inputs, outputs // geometry.groups, x.dtype, options)
    if solver == "cg":
        form = "primal"
    scale: Scale = options.scale
    samples: float = 1
    if options.process_group is not None:
        # Both forms are equal; the primal one needs no other rank's rows. Exchanging the counts waits for the device.
        form = "primal"
        shape = f"convolution, C={x.shape[1]}, O={outputs}, bias={bias}, {geometry}"
        counts = distributed.exchange_counts(shape, rows, batch, x, options)
        rows = sum(counts.rows)
        if scale == "nlms":
            scale, samples = "raw", counts.samples  # which need not be a whole number
    rank = max(min(rows, inputs), 1)
    dtype = gram_dtype(rows, inputs, x.dtype, options.damping, options.damping_mode, x.device.type)
    if form == "dual":
        patches = reference.conv_patches(x, *geometry).to(dtype)  # [groups, N, I], smaller than the primal Gram
        gram = patches @ patches.mT + int(bias)
    else:
        gram = _primal_gram(backend, x, geometry, bias, options.patch_bytes, dtype)
    if options.process_group is not None:
        dist.all_reduce(gram, group=distributed.group_of(options))
    arguments = (options.damping, options.damping_mode, scale, rank, batch)
    if solver == "cg":
        return Prepared(form, gram, (*arguments, options.iterations))
    if geometry.groups == 1:
        inverse = backend.factor(gram[0], *arguments)[None]
    else:
        inverse = (ops if _compiled(backend, x) else reference).factor(gram, *arguments)
    return Prepared(form, inverse if samples == 1 else inverse * samples, None)


def _compiled(backend: Any, x: Tensor) -> bool:
    """Whether the compiled ops of convolutions serve ``x``; elsewhere stock operations stream the patches."""
    return backend is ops and x.device.type in ops.conv_device_types


def _primal_gram(
    backend: Any, x: Tensor, geometry: Geometry, bias: bool, patch_bytes: int, dtype: torch.dtype
) -> Tensor:
    arguments = (x, *geometry, bias, patch_bytes, dtype)
    if not _compiled(backend, x):
        own = backend if hasattr(backend, "conv_gram") and backend is not ops else reference
        return own.conv_gram(*arguments)
    kernel, stride, *_ = geometry
    method = cost.conv_method(x.shape[1] // geometry.groups, kernel, stride, geometry.positions(x))
    return ops.conv_gram(*arguments, method)


def conv_gradients(
    prepared: Prepared,
    x: Tensor,
    weight: Tensor,
    dy: Tensor,
    bias: bool,
    geometry: Geometry,
    patch_bytes: int,
    need_x: bool,
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """``dx``, ``dw`` and ``db``, the first and last None where they are not needed.

    Both forms end in torch's own convolution backward, in the matrix's type, so that it is rounded once, after the
    inverse. One infinity or NaN makes every entry of ``dw`` and ``db`` NaN.

    Args:
        prepared: As `prepare` gives it.
        weight: Read for ``dx`` only; otherwise its shape and type count.
    """
    form, matrix, solved_with = prepared
    groups = geometry.groups
    dx = plain = plain_bias = None
    if form == "primal" and matrix.dtype == dy.dtype:
        dx, plain, plain_bias = _backward(dy, x, weight, geometry, (need_x, True, bias))
    elif need_x:
        dx, _, _ = _backward(dy, x, weight, geometry, (True, False, False))
    errors = dy
    if form == "dual":  # P is symmetric: dw = (P dy)^T x
        batch, outputs, *positions = dy.shape
        emended = matrix @ conv_errors(dy.to(matrix.dtype), groups)  # [groups, N, O/groups]
        emended = emended.reshape(groups, batch, -1, outputs // groups).permute(1, 0, 3, 2)
        errors = emended.reshape(batch, outputs, *positions)
    if plain is None:
        plain, plain_bias = _plain_gradients(errors, x, weight, geometry, bias, patch_bytes, matrix.dtype)
    flat = plain.reshape(groups, weight.shape[0] // groups, -1)  # [groups, O/groups, I]
    if plain_bias is not None:
        flat = torch.cat([flat, plain_bias.reshape(groups, -1, 1)], 2)
    spoilt = (0 * flat).sum()
    if solved_with is not None:
        flat = conjugate.solve_gram(matrix, flat, *solved_with)
    elif form == "primal":
        flat = flat @ matrix
    flat = flat + spoilt
    db = None
    if plain_bias is not None:
        flat, db = flat[:, :, :-1], flat[:, :, -1].reshape(-1).to(weight.dtype)
    return dx, flat.reshape(weight.shape).to(weight.dtype), db


def _backward(
    dy: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, mask: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """torch's own gradients of input, weight and bias, where the mask wants them."""
    _, stride, padding, dilation, groups = geometry
    nothing = [0] * len(stride)
    dx, dw, db = torch.ops.aten.convolution_backward(
        dy, x, weight, [weight.shape[0]], stride, padding, dilation, False, nothing, groups, mask
    )
    return dx, dw, db if mask[2] else None


def _plain_gradients(
    dy: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, bias: bool, patch_bytes: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """torch's own gradients of weight and bias in ``dtype``, computed in pieces where that is wider than x's."""
    if x.dtype == dy.dtype == dtype:
        _, dw, db = _backward(dy, x, weight, geometry, (False, True, bias))
        return dw, db
    wide = weight.new_empty(weight.shape, dtype=dtype)
    dw, db = weight.new_zeros(weight.shape, dtype=dtype), weight.new_zeros(weight.shape[0], dtype=dtype)
    unpadded = geometry._replace(padding=(0,) * len(geometry.kernel))
    for block in conv_blocks(x, *geometry[:4], patch_bytes, dtype):
        errors = dy[block.samples, :, block.rows].to(dtype)
        _, some, some_bias = _backward(errors, block.x, wide, unpadded, (False, True, bias))
        dw, db = dw + some, db if some_bias is None else db + some_bias
    return dw, db if bias else None


@once_differentiable
def _conv_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, matrix = ctx.saved_tensors
    prepared = Prepared(ctx.form, matrix, ctx.solved_with)
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    with full_precision(dy.device.type):
        dx, dw, db = conv_gradients(prepared, x, weight, dy, ctx.bias, ctx.geometry, ctx.patch_bytes, needs_x)
    return dx, dw if needs_weight else None, db if needs_bias else None, *(None,) * 5


class EmendedConv(torch.autograd.Function):
    """A convolution with the true gradient of ``x`` and the emended gradients of weight and bias."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        _save(ctx, inputs)
        return _convolve(*inputs[:4])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return _conv_backward(ctx, dy)


class TransformableEmendedConv(EmendedConv):
    """The same for torch.func's transforms, which want ``setup_context``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> Tensor:  # type: ignore[override]
        return _convolve(*inputs[:4])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _save(ctx, inputs)
        ctx.levels = _torch.transform_levels()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        refuse_jacobian(ctx, 1)
        return _conv_backward(ctx, dy)

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Tensor:
        raise RuntimeError(_torch.FORWARD_MODE)


def _save(ctx: Any, inputs: tuple[Any, ...]) -> None:
    x, weight, bias, ctx.geometry, ctx.patch_bytes, ctx.form, matrix, ctx.solved_with = inputs
    ctx.bias = bias is not None
    ctx.save_for_backward(x, weight, matrix)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    kernel, stride, padding, dilation, groups = geometry
    return CONVOLUTIONS[len(kernel)](x, weight, bias, stride, padding, dilation, groups)


def _place(
    x: Tensor, kernel: tuple[int, ...], stride: Sizes, padding: str | Sizes, dilation: Sizes, groups: int
) -> tuple[Tensor, Geometry] | None:
    """Numbers for every dimension, and ``x`` padded where ``"same"`` pads one side more; None where it cannot."""
    spatial = len(kernel)
    strides = _per_dimension("stride", stride, spatial)
    dilations = _per_dimension("dilation", dilation, spatial)
    if isinstance(groups, bool) or not isinstance(groups, int):
        raise TypeError(f"groups must be a whole number above 0, got {groups!r} ({type(groups).__name__})")
    if isinstance(padding, str):
        if padding not in ("same", "valid"):
            raise ValueError(f"padding must be 'same', 'valid' or whole numbers, got {padding!r}")
        if padding == "valid":
            return x, Geometry(kernel, strides, (0,) * spatial, dilations, groups)
        if any(s != 1 for s in strides):
            return None
        totals = [d * (k - 1) for d, k in zip(dilations, kernel, strict=True)]
        if any(total % 2 for total in totals):
            x = F.pad(x, [side for total in reversed(totals) for side in (0, total % 2)])
        return x, Geometry(kernel, strides, tuple(total // 2 for total in totals), dilations, groups)
    return x, Geometry(kernel, strides, _per_dimension("padding", padding, spatial), dilations, groups)


def _per_dimension(name: str, value: Any, spatial: int) -> tuple[int, ...]:
    values = (value,) * spatial if isinstance(value, int) else value
    if isinstance(value, (bool, str)) or not isinstance(values, Sequence):
        raise TypeError(f"{name} must be a whole number or {spatial} of them, got {value!r} ({type(value).__name__})")
    if len(values) == 1:
        values = tuple(values) * spatial
    if len(values) != spatial or not all(isinstance(v, (int, torch.SymInt)) for v in values):
        raise ValueError(f"{name} must be a whole number or {spatial} of them, got {value!r}")
    return tuple(values)


def _fits(x: Tensor, geometry: Geometry, weight: Tensor) -> bool:
    """Whether torch's own convolution takes these shapes, with a position for each sample."""
    kernel, stride, padding, dilation, groups = geometry
    if x.ndim != weight.ndim or min(*kernel, *stride, *dilation, groups) < 1 or min(padding) < 0:
        return False
    if weight.shape[0] == 0 or weight.shape[0] % groups or x.shape[1] == 0 or x.shape[1] != weight.shape[1] * groups:
        return False
    return all(s >= 1 for s in x.shape[2:]) and all(p >= 1 for p in geometry.positions(x))


def _check_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    _check_floating("x", x)
    _check_floating("weight", weight)
    _check_match("x", x, "weight", weight)
    if weight.ndim - 2 not in CONVOLUTIONS:
        raise ValueError(
            f"weight must have the shape [O, C/groups, *kernel], 3 to 5 dimensions, got {list(weight.shape)}"
        )
    if bias is not None:
        _check_floating("bias", bias)
        _check_match("x", x, "bias", bias)
