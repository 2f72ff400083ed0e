"""The derivative of convolutions: what forward keeps, and the gradients that backward makes of it.

The Gram of the patches depends on ``x`` alone and is summed up in forward (`prepare`). Backward is torch's own
convolution backward and one product with the inverse, a group at a time (`conv_gradients`).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .. import _torch
from ..backend import dispatch, reference
from ..backend.reference import conv_errors
from ..options import Form, Options, Scale
from ..solve import conjugate, cost, distributed
from ..solve.gram import Gram
from .geometry import Geometry
from .kept import Conjugate, Inverse, restored
from .linear import full_precision, keep_output, once_differentiable, refuse_jacobian

# Where the largest entries of a Gram's diagonal lie within these, neither it nor products with its inverse leave the
# type's range.
GRAM_RANGE = {torch.float32: (1e-25, 1e25), torch.float64: (1e-200, 1e200)}


class Needs(NamedTuple):
    """Which gradients a backward needs."""

    x: bool
    weight: bool
    bias: bool


def prepare(x: Tensor, geometry: Geometry, bias: bool, outputs: int, options: Options) -> Inverse | Conjugate:
    """Everything that does not depend on ``dy``.

    Args:
        x: ``[B, C, *spatial]``, detached, with at least one position a sample.
        bias: Whether the layer has a bias, which then stands in the Gram.
        outputs: ``O``, for the cost model.

    Its matrices ``[groups, n, n]`` are in the type that keeps the inverse's digits: float64 where float32 would not.
    """
    backend = dispatch.select(options.backend, x)
    batch, inputs = x.shape[0], geometry.inputs(x) + bias
    rows = batch * math.prod(geometry.positions(x))
    ridge, samples = options.ridge, 1.0
    if options.process_group is not None:  # exchanging the counts waits for the device
        shape = f"convolution, C={x.shape[1]}, O={outputs}, bias={bias}, {geometry}"
        counts = distributed.exchange_counts(shape, rows, batch, x, options)
        rows = sum(counts.rows)
        if ridge.scale == "nlms":
            ridge, samples = ridge._replace(scale="raw"), counts.samples  # which need not be a whole number
    plan = cost.conv_plan(rows, inputs, outputs // geometry.groups, x.dtype, x.device.type, options)
    dtype, rank = plan.dtype, max(min(rows, inputs), 1)

    def gram_in(unit: Tensor | None) -> Gram:
        matrix = _matrix_of(x, geometry, bias, plan.form, unit, options, dtype)
        gram = Gram(matrix, batch, rank, unit)
        return gram if options.process_group is None else gram.all_reduce(distributed.group_of(options))

    unknown = _may_overflow(x, dtype) and not _is_looked_at(x)
    gram = gram_in(_unit_of(x, geometry, bias, options, dtype) if unknown else None)
    if _is_looked_at(gram.matrix) and not _in_range(gram.matrix):
        gram = gram_in(_unit_of(x, geometry, bias, options, dtype))
    if plan.solver == "cg":
        return Conjugate(conjugate.System(bias, ridge, options.iterations, dtype), gram.matrix, gram.unit)
    inverse = gram.inverse(backend, ridge)
    return Inverse(inverse if samples == 1 else inverse * samples, plan.form, gram.unit)


def _matrix_of(
    x: Tensor, geometry: Geometry, bias: bool, form: Form, unit: Tensor | None, options: Options, dtype: torch.dtype
) -> Tensor:
    """The Gram ``[groups, n, n]`` of this rank's rows of ``x``, or of ``x / unit``."""
    x = in_unit(x, unit)
    if form == "dual":
        patches = geometry.patches(x).to(dtype)  # [groups, N, I], smaller than the primal Gram
        ones = int(bias) if unit is None else bias / unit / unit
        gram = patches @ patches.mT + ones
    else:
        backend = dispatch.select(options.backend, x)
        gram = geometry.gram(backend, x, bias, options.patch_bytes, dtype)
        if unit is not None and bias:
            columns = torch.cat([torch.ones_like(gram[:, :1, :-1]), 1 / unit], 2)  # [groups, 1, I]
            gram = gram * columns * columns.mT
    return gram


def _is_looked_at(tensor: Tensor) -> bool:
    """Whether the host may look at a tensor's numbers: without waiting, and where it is not traced."""
    traced = torch.compiler.is_compiling() or _torch.transforms_active()
    return type(tensor) is Tensor and tensor.device.type == "cpu" and not traced


def _may_overflow(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether the squares of x's type may leave the range of the Gram's."""
    return x.dtype == dtype or (x.dtype == torch.bfloat16 and dtype == torch.float32)


def _in_range(gram: Tensor) -> bool:
    if gram.numel() == 0:
        return True
    least, most = GRAM_RANGE[gram.dtype]
    low, high = torch.aminmax(gram.diagonal(dim1=-2, dim2=-1).amax(-1))
    return least < low.item() and high.item() < most


def _unit_of(x: Tensor, geometry: Geometry, bias: bool, options: Options, dtype: torch.dtype) -> Tensor:
    """The unit of each group's input, ``[groups, 1, 1]``, equal on all ranks."""
    largest = x.new_zeros(geometry.groups)
    if x.numel() > 0:
        largest = x.abs().unflatten(1, (geometry.groups, -1)).movedim(1, 0).flatten(1).amax(1)
    largest = largest.to(dtype)
    if options.process_group is not None:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=distributed.group_of(options))
    return reference.unit_near(largest, bias, options.damping_mode)[:, None, None]


def in_unit(x: Tensor, unit: Tensor | None) -> Tensor:
    """``x / unit`` of ``x [B, C, *spatial]`` and a unit for each group; exact, because units are powers of two."""
    if unit is None:
        return x
    by = unit.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))  # [groups, 1, ...]
    return (x.unflatten(1, (unit.shape[0], -1)) / by).flatten(1, 2)


def conv_gradients(
    kept: Inverse | Conjugate,
    x: Tensor,
    weight: Tensor,
    dy: Tensor,
    bias: bool,
    geometry: Geometry,
    patch_bytes: int,
    scale: Scale,
    needs: Needs,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``dx``, ``dw`` and ``db``, each None where it is not needed, and each in memory of its own.

    Both forms end in torch's own convolution backward, in the matrix's type, so that it is rounded once, after the
    inverse. One infinity or NaN makes every entry of ``dw`` and ``db`` NaN.

    Args:
        kept: As `prepare` gives it.
        weight: Read for ``dx`` only; otherwise its shape and type count.
        bias: Whether the layer has a bias.
    """
    form, matrix, unit, groups = kept.form, _matrix(kept), kept.unit, geometry.groups
    dx = plain = plain_bias = None
    needs_all = needs.weight or (needs.bias and isinstance(kept, Conjugate))
    layout = _layout(x, weight) if needs.weight else torch.contiguous_format
    if needs_all or needs.bias:
        x = in_unit(x, unit)
    if needs_all and form == "primal" and matrix.dtype == x.dtype == dy.dtype:
        dx, plain, plain_bias = geometry.backward(dy, x, weight, (needs.x, True, bias))
    elif needs.x:
        dx, _, _ = geometry.backward(dy, x, weight, (True, False, False))
    if not needs_all:
        db = _bias_gradient(kept, x, dy, geometry, patch_bytes, scale).to(weight.dtype) if needs.bias else None
        return dx, None, db
    errors = dy
    if form == "dual":  # P is symmetric: dw = (P dy)^T x
        batch, outputs, *positions = dy.shape
        emended = matrix @ conv_errors(dy.to(matrix.dtype), groups)  # [groups, N, O/groups]
        emended = emended.reshape(groups, batch, -1, outputs // groups).permute(1, 0, 3, 2)
        errors = emended.reshape(batch, outputs, *positions)
    if plain is None:
        has_column = needs.bias if form == "dual" else bias
        plain, plain_bias = _plain_gradients(errors, x, weight, geometry, has_column, patch_bytes, matrix.dtype)
    flat = geometry.rows_of(plain)  # [groups, O/groups, I]
    if plain_bias is not None:
        column = plain_bias.reshape(groups, -1, 1)
        flat = torch.cat([flat, column if unit is None else column / unit], 2)
    rows = x.shape[0] * math.prod(geometry.positions(x))
    flat = kept.corrected(flat, max(min(rows, flat.shape[2]), 1), x.shape[0]) + reference.poison_of(flat)
    if unit is not None:
        flat = reference.out_of_unit(flat, unit, scale)
    dw = db = None
    if needs.bias:
        db = flat[:, :, -1].to(weight.dtype, copy=True).reshape(-1)
    if needs.weight:
        own = flat if plain_bias is None else flat[:, :, :-1]
        dw = geometry.weight_of(own).to(weight.dtype, copy=plain_bias is not None, memory_format=layout)
    return dx, dw, db


def _matrix(kept: Inverse | Conjugate) -> Tensor:
    """``[groups, n, n]``, the inverse or the Gram."""
    matrix = kept.inverse if isinstance(kept, Inverse) else kept.gram
    assert matrix is not None
    return matrix


def _bias_gradient(
    kept: Inverse | Conjugate, x: Tensor, dy: Tensor, geometry: Geometry, patch_bytes: int, scale: Scale
) -> Tensor:
    """``db [O]`` alone: ``dy^T u`` with ``u``, the emended column of ones, in the matrix's type.

    Args:
        x: The input in its unit.
    """
    form, matrix, unit = kept.form, _matrix(kept), kept.unit
    if form == "dual":
        column = matrix.sum(2, keepdim=True)  # [groups, N, 1]
        column = column if unit is None else column / unit
    else:  # the layer itself, with the inverse's border in the weight's place
        border, corner = geometry.weight_of(matrix[:, -1:, :-1]), matrix[:, -1, -1]
        corner = corner if unit is None else corner / unit[:, 0, 0]
        column = x.new_empty(x.shape[0], geometry.groups, *geometry.positions(x), dtype=matrix.dtype)
        for block in geometry.blocks(x, patch_bytes, matrix.dtype):
            block.of(column).copy_(geometry.of_blocks().forward(block.x, border, corner))
        column = conv_errors(column, geometry.groups)
    db = conv_errors(dy.to(matrix.dtype), geometry.groups).mT @ column  # [groups, O/groups, 1]
    db = reference.poisoned(db)
    return (db if unit is None else reference.out_of_unit(db, unit, scale)).reshape(-1)


def _layout(x: Tensor, weight: Tensor) -> torch.memory_format:
    """The memory format in which torch's own convolution gives the weight's gradient."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(weight.ndim)
    # A compiler chooses layouts itself, and Dynamo of torch 2.13 loses the autocast state over these questions.
    if last is None or torch.compiler.is_compiling() or _torch.transforms_active():
        return torch.contiguous_format
    either = any(t.is_contiguous(memory_format=last) and not t.is_contiguous() for t in (x, weight))
    return last if either else torch.contiguous_format


def _plain_gradients(
    dy: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, bias: bool, patch_bytes: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """torch's own gradients of weight and bias in ``dtype``, computed in pieces where that is wider than x's."""
    if x.dtype == dy.dtype == dtype:
        _, dw, db = geometry.backward(dy, x, weight, (False, True, bias))
        return dw, db
    wide = weight.new_empty(weight.shape, dtype=dtype)
    dw, db = weight.new_zeros(weight.shape, dtype=dtype), dy.new_zeros(dy.shape[1], dtype=dtype)
    for block in geometry.blocks(x, patch_bytes, dtype):
        errors = block.of(dy).to(dtype)
        _, some, some_bias = geometry.of_blocks().backward(errors, block.x, wide, (False, True, bias))
        dw, db = dw + some, db if some_bias is None else db + some_bias
    return dw, db if bias else None


@once_differentiable
def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, *tensors = ctx.saved_tensors
    if ctx.ready is not None:
        ctx.ready.wait(tensors)
    kept: Any = restored(ctx.kind, ctx.static, *tensors)
    needs = Needs(*_torch.needed_gradients(ctx, 3))
    with full_precision(dy.device.type):
        gradients = conv_gradients(kept, x, weight, dy, ctx.bias, ctx.geometry, ctx.patch_bytes, ctx.scale, needs)
    return *gradients, *(None,) * 8


class EmendedConv(torch.autograd.Function):
    """A convolution with the true gradient of ``x`` and the emended gradients of weight and bias.

    The arguments after the bias are the geometry, ``patch_bytes``, ``scale``, what backward waits for (a
    `side_stream.Ready`, or None), and what forward keeps, flat.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        _save(ctx, inputs)
        x, weight, bias, geometry, *_ = inputs
        return keep_output(ctx, geometry.forward(x, weight, bias))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return _backward(ctx, dy)


class TransformableEmendedConv(EmendedConv):
    """`EmendedConv` for torch.func, which wants ``setup_context``: 8 % of a small call, 3 % of a real one."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> Tensor:  # type: ignore[override]
        x, weight, bias, geometry, *_ = inputs
        return geometry.forward(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _save(ctx, inputs)
        keep_output(ctx, output)
        ctx.levels = _torch.transform_levels()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        refuse_jacobian(ctx, 1)
        return _backward(ctx, dy)

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Tensor:
        raise RuntimeError(_torch.FORWARD_MODE)


def _save(ctx: Any, inputs: tuple[Any, ...]) -> None:
    x, weight, bias, ctx.geometry, ctx.patch_bytes, ctx.scale, ctx.ready, *flat = inputs
    ctx.kind, ctx.static, first, second = flat
    ctx.bias = bias is not None
    ctx.save_for_backward(x, weight, first, second)
