"""The ops on tensors: checks, allocation, plans and launches. Shapes and meanings are those of `reference`.

They are registered whole, not as `torch.library.triton_op`, which traces through the launches: a plan's tiles, splits
and grid branch on the shape, so a trace of one emended input guards a dozen such decisions, and each side of each is a
graph more, where one serves every batch size now; the count of breakdowns is a tensor of the process, which a trace
cannot own, nor may it time a candidate; and a call of a `triton_op` in eager mode takes four times as long as one of an
op that is defined and implemented directly (37 against 9 microseconds on a CPU).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ...options import DampingMode, Form, Ridge, Scale
from ...precision import compute_dtype, emended_dtype, float16_unit, terms_of_inverse, told_dtype
from ..reference import RETRIES, check_conv
from . import plans, tune
from .checks import check_form, check_fused, check_gram, check_options, check_weight_grad, check_x
from .conv_gram import conv_gram_kernel
from .damped_inverse import damped_inverse_kernel, multiply_kernel
from .emended_input import emended_input_kernel
from .fused_weight_grad import fused_weight_grad_kernel
from .input_gram import input_gram_kernel, reduce_gram_kernel
from .plans import ceil_div
from .weight_grad import bias_grad_kernel, poison_kernel

_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32, torch.float64: tl.float64}
_REDUCE_TILE = 32
_NONE = 1  # programs of a grid, or entries of a tensor, that must not be none


class Damping(NamedTuple):
    """Arguments of the kernels of a damped inverse ``multiplier * (G + c I)^-1``."""

    damping: float
    relative: bool
    rank: int
    multiplier: float
    by_ridge: bool


def _damping(own: Ridge, rank: int, rows: int) -> Damping:
    check_options(*own)
    multiplier = rows if own.scale == "nlms" else 1
    return Damping(float(own.damping), own.damping_mode == "relative", rank, multiplier, own.scale == "gradient")


_counters: dict[torch.device, Tensor] = {}


def _counter(device: torch.device) -> Tensor:
    """How many factors broke down on a device, ``[1]``; kernels add to it."""
    if device not in _counters:
        _counters[device] = torch.zeros(1, dtype=torch.int32, device=device)
    return _counters[device]


def breakdowns() -> int:
    """How many factors of this process broke down and were retried with more damping. Waits for the devices."""
    return sum(int(counter.item()) for counter in _counters.values())


def _on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _exact(dtype: torch.dtype) -> str:
    """How float32 is multiplied to float32's digits."""
    return "ieee" if torch.version.hip or dtype == torch.float64 else "tf32x3"


def _precision(dtype: torch.dtype) -> str:
    """How float32 is multiplied: to its digits, or by TF32 where torch's own setting allows that."""
    if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return _exact(dtype)


def _tuned(
    kernel: Any,
    grid: tuple[int, ...],
    candidates: Sequence[plans.Candidate],
    sizes: tuple[int, ...],
    arguments: tuple[Any, ...],
    constants: dict[str, Any],
) -> None:
    """Launch with the candidate that `tune.fastest` knows."""
    plan = tune.fastest(kernel, grid, candidates, sizes, arguments, constants)
    kernel[grid](*arguments, **constants, num_warps=plan.warps, num_stages=plan.stages)


def _gram_of(x: Tensor, bias: bool, form: Form, dtype: torch.dtype) -> Tensor:
    """The Gram in ``dtype``, float32 or float64."""
    primal = form == "primal"
    outer, inner = (x.shape[1], x.shape[0]) if primal else (x.shape[0], x.shape[1])
    order = outer + (bias and primal)
    if order == 0 or x.shape[0] == 0:
        return x.new_zeros(order, order, dtype=dtype)
    plan = plans.plan_gram(outer, inner, x.element_size())
    along = max(_NONE, ceil_div(outer, plan.tile))
    gram = x.new_empty(order, order, dtype=dtype)
    sums = gram if plan.splits == 1 else x.new_empty(plan.splits, order, order, dtype=dtype)
    stride_outer, stride_inner = (x.stride(1), x.stride(0)) if primal else x.stride()
    candidates = plans.gram_candidates(plan, outer, inner, x.element_size(), primal)
    arguments = (x, sums, outer, inner, stride_outer, stride_inner, order, plan.length)
    constants = {
        "BIAS": bias, "PRIMAL": primal, "MIRRORED": plan.splits == 1, "TILE": plan.tile, "DEPTH": plan.depth,
        "PRECISION": _precision(x.dtype),
    }  # fmt: skip
    with _on_device(x):
        _tuned(input_gram_kernel, (along, along, plan.splits), candidates, (outer, inner), arguments, constants)
        if plan.splits > 1:
            blocks = ceil_div(order, _REDUCE_TILE)
            reduce_gram_kernel[blocks, blocks](sums, gram, order, plan.splits, TILE=_REDUCE_TILE)
    return gram


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
    """``x^T x [groups, I, I]`` of a convolution's patches in ``dtype``, float32 or float64.

    No patch is written, whatever the ``patch_bytes`` that other backends keep to.

    Args:
        x: ``[B, C, *spatial]`` of one to three spatial dimensions; ``I = C/groups * prod(kernel)``, and the bias's one.
        kernel, stride, padding, dilation: One integer for each of them.
    """
    spatial = len(kernel)
    if not 1 <= spatial <= 3 or x.ndim != 2 + spatial:
        raise ValueError(f"x must have the shape [B, C, *spatial] of 1 to 3 dimensions, got {list(x.shape)}")
    check_conv(x, kernel, stride, padding, dilation, groups)
    missing = 3 - spatial
    x = x.double() if dtype == torch.float64 else x
    k, t, d = ((1,) * missing + tuple(given) for given in (kernel, stride, dilation))
    pad = (0,) * missing + tuple(padding)
    size = (1,) * missing + x.shape[2:]
    positions = [(size[i] + 2 * pad[i] - d[i] * (k[i] - 1) - 1) // t[i] + 1 for i in range(3)]
    strides = x.stride()[:2] + (0,) * missing + x.stride()[2:]
    rows = x.shape[0] * math.prod(positions)
    channels = x.shape[1] // groups
    entries = channels * math.prod(k)
    order = entries + bias
    if order == 0 or rows == 0:
        return x.new_zeros(groups, order, order, dtype=dtype)
    plan = plans.plan_conv_gram(groups, entries, rows, x.element_size())
    along = max(_NONE, ceil_div(entries, plan.tile))
    gram = x.new_empty(groups, order, order, dtype=dtype)
    sums = gram if plan.splits == 1 else x.new_empty(plan.splits, groups, order, order, dtype=dtype)
    candidates = plans.conv_gram_candidates(plan, entries, rows, x.element_size())
    grid = (along, along, plan.splits * groups)
    arguments = (
        x, sums, entries, rows, order, plan.length, plan.splits, channels,
        *positions, *d, *t, *pad, *size, *strides,
    )  # fmt: skip
    constants = {
        "BIAS": bias, "MIRRORED": plan.splits == 1, "K0": k[0], "K1": k[1], "K2": k[2], "TILE": plan.tile,
        "DEPTH": plan.depth, "PRECISION": _precision(x.dtype),
    }  # fmt: skip
    with _on_device(x):
        _tuned(conv_gram_kernel, grid, candidates, (entries, rows, groups), arguments, constants)
        if plan.splits > 1:
            blocks = ceil_div(order, _REDUCE_TILE)
            reduce_gram_kernel[blocks, blocks, groups](sums, gram, order, plan.splits, TILE=_REDUCE_TILE)
    return gram


def inverse_of(gram: Tensor, ridge: Damping) -> Tensor:
    """``multiplier * (G + c I)^-1 [B, n, n]``, of each ``gram [B, n, n]``, float32 or float64."""
    order = gram.shape[1]
    if gram.numel() == 0:
        return torch.empty_like(gram)
    gram = gram.contiguous()
    if order <= plans.MAX_INVERSE_ORDER:
        inverse = torch.empty_like(gram)
        _damped_inverse(gram, ridge, inverse)
        return inverse
    return _stock_inverse(gram, ridge)


def _damped_inverse(gram: Tensor, ridge: Damping, inverse: Tensor, broken: Tensor | None = None) -> None:
    """Write ``inverse``; with ``broken [B]``, only where the first attempt broke down or there is none."""
    matrices, order, _ = gram.shape
    plan = plans.plan_damped_inverse(order, gram.element_size())
    size = ceil_div(order, plan.tile) * plan.tile
    room = gram.new_empty(2, matrices, size, size)
    state = gram.new_empty(matrices, 3)
    counter = _counter(gram.device)
    along = ceil_div(order, plans.MULTIPLY_TILE)
    with _on_device(gram):
        damped_inverse_kernel[(matrices,)](
            gram, room[0], room[1], state, counter if broken is None else broken, counter, order, order, size,
            ridge.damping, float(ridge.rank), float(ridge.multiplier),
            RELATIVE=ridge.relative, BY_RIDGE=ridge.by_ridge, RETRY=broken is not None, RETRIES=RETRIES,
            TILE=plan.tile, WIDE=plan.wide, PRECISION=_exact(gram.dtype), num_warps=plan.warps, num_stages=1,
        )  # fmt: skip
        multiply_kernel[along, along, matrices](
            gram, room[1], state, inverse, order, order, size,
            TILE=plans.MULTIPLY_TILE, DEPTH=32, PRECISION=_exact(gram.dtype), num_warps=4, num_stages=2,
        )  # fmt: skip


def _stock_inverse(gram: Tensor, ridge: Damping) -> Tensor:
    """`inverse_of` by stock operations that do not wait for the device; what broke down is retried by our kernel."""
    order = gram.shape[1]
    trace = gram.diagonal(dim1=1, dim2=2).sum(1)  # [B]
    c = ridge.damping * trace / ridge.rank if ridge.relative else torch.full_like(trace, ridge.damping)
    eye = torch.eye(order, dtype=gram.dtype, device=gram.device)
    lower, info = torch.linalg.cholesky_ex(gram + c[:, None, None] * eye)
    broken = (info != 0) | ~lower.diagonal(dim1=1, dim2=2).isfinite().all(1)
    # Not cholesky_inverse, which waits on a GPU.
    inverse = torch.cholesky_solve(eye.expand_as(lower), lower) * ridge.multiplier
    if ridge.by_ridge:
        inverse *= c[:, None, None]
    inverse = inverse.contiguous()
    _damped_inverse(gram, ridge, inverse, broken.to(torch.int32))
    return inverse


def _wide_inverse(x: Tensor, bias: bool, form: Form, own: Ridge, dtype: torch.dtype | None) -> Tensor:
    """``multiplier * (G + c I)^-1 [n, n]`` in ``dtype``, or in that of sums over ``x``."""
    check_x(x)
    check_form(form)
    wide = told_dtype(x.dtype, dtype)
    ridge = _damping(own, max(1, min(x.shape[0], x.shape[1] + bias)), x.shape[0])
    gram = _gram_of(x if wide == torch.float32 else x.double(), bias, form, wide)
    return inverse_of(gram[None], ridge)[0]


def input_gram(x: Tensor, bias: bool, form: Form) -> Tensor:
    check_x(x)
    check_form(form)
    return _gram_of(x, bias, form, compute_dtype(x.dtype))


def damped_inverse(
    gram: Tensor, damping: float, damping_mode: DampingMode, scale: Scale, rank: int, rows: int
) -> Tensor:
    """The damped inverse of each Gram of ``[..., n, n]``."""
    check_gram(gram, rank)
    ridge = _damping(Ridge(damping, damping_mode, scale), rank, rows)
    return inverse_of(gram.flatten(0, -3) if gram.ndim > 2 else gram[None], ridge).reshape(gram.shape)


def gram_inverse(
    x: Tensor,
    bias: bool,
    form: Form,
    damping: float,
    damping_mode: DampingMode,
    scale: Scale,
    gram_dtype: torch.dtype | None = None,
    narrow_up_to: float = 0.0,
) -> Tensor:
    return _wide_inverse(x, bias, form, Ridge(damping, damping_mode, scale), gram_dtype).to(compute_dtype(x.dtype))


def emended_input(
    x: Tensor,
    bias: bool,
    form: Form,
    damping: float,
    damping_mode: DampingMode,
    scale: Scale,
    gram_dtype: torch.dtype | None = None,
    narrow_up_to: float = 0.0,
) -> tuple[Tensor, Tensor]:
    inverse = _wide_inverse(x, bias, form, Ridge(damping, damping_mode, scale), gram_dtype)
    rank = max(1, min(x.shape[0], x.shape[1] + bias))
    return _apply(inverse, x, bias, form, rank / damping if damping_mode == "relative" else math.inf)


def _apply(inverse: Tensor, x: Tensor, bias: bool, form: Form, condition: float = math.inf) -> tuple[Tensor, Tensor]:
    """The emended input and the bias's column, of the inverse that `_wide_inverse` gives.

    Args:
        condition: ``trace(G) / c``, infinite where only the Gram could tell it.
    """
    rows, inputs = x.shape
    emended = x.new_empty(x.shape, dtype=emended_dtype(x.dtype))
    column = x.new_empty(rows if bias else 0, dtype=compute_dtype(x.dtype))
    if rows == 0 or inputs + bias == 0:
        return emended, column
    dtype = x.dtype
    x = x.to(inverse.dtype) if inverse.dtype == torch.float64 else x
    multiplied = x.dtype if x.dtype == torch.bfloat16 else inverse.dtype
    plan = plans.plan_emend(rows, inputs, multiplied.itemsize)
    programs = ceil_div(rows, plan.rows) * max(_NONE, ceil_div(inputs, plan.inputs))
    candidates = plans.emend_candidates(plan, rows, inputs, inverse.shape[0], multiplied.itemsize)
    arguments = (inverse, x, emended, column, rows, inputs, *x.stride())
    constants = {
        "BIAS": bias, "PRIMAL": form == "primal", "TILE_N": plan.rows, "TILE_I": plan.inputs, "DEPTH": plan.depth,
        "PRECISION": _exact(dtype) if dtype == torch.float16 else _precision(multiplied),
        "TERMS": terms_of_inverse(condition) if x.dtype == torch.bfloat16 else 3,
    }  # fmt: skip
    with _on_device(x):
        _tuned(emended_input_kernel, (programs,), candidates, (rows, inputs), arguments, constants)
    return emended, column


def _product(dy: Tensor, rows: Tensor) -> Tensor:
    """``dy^T rows [O, I]`` in dy's type, by float16's tensor cores where it is that.

    The rows are float32 then, whose range is wider: they are rounded in a unit that the float32 sums come out of.
    """
    # cuBLAS with float16 sums, where they are allowed, returns no float32; and in the unit they would overflow.
    in_unit = dy.dtype == torch.float16 and rows.dtype == torch.float32 and rows.numel() > 0
    if not in_unit or torch.backends.cuda.matmul.allow_fp16_accumulation:
        return (dy.to(rows.dtype).t() @ rows).to(dy.dtype)
    unit = float16_unit(rows)
    narrowed = (rows / unit).to(torch.float16)
    # The interpreter's device has no product of float16 with float32 sums.
    product = torch.mm(dy.t(), narrowed, out_dtype=torch.float32) if dy.is_cuda else dy.float().t() @ narrowed.float()
    return (product * unit).to(dy.dtype)


def weight_grad(dy: Tensor, rows: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
    check_weight_grad(dy, rows, column)
    outputs = dy.shape[1]
    has_column = column.shape[0] > 0
    dw = _product(dy, rows).contiguous()
    db = dy.new_empty(outputs if has_column else 0)
    if outputs == 0:
        return dw, db
    wide = compute_dtype(dy.dtype)
    column = column.to(wide).contiguous()
    tile, line = 64, 1024
    flags = ceil_div(outputs, tile)
    broken = dy.new_empty(flags, dtype=torch.int32)
    programs = min(plans.PROCESSORS, max(_NONE, ceil_div(dw.numel(), line)))
    with _on_device(dy):
        bias_grad_kernel[(flags,)](
            dy, column, db, broken, dy.shape[0], outputs, *dy.stride(),
            HAS_COLUMN=has_column, SUM=_TYPES[wide], TILE_N=32, TILE_O=tile, num_warps=4,
        )  # fmt: skip
        poison_kernel[(programs,)](
            dw, db, broken, flags, dw.numel(), outputs, programs, HAS_COLUMN=has_column, FLAGS=128, LINE=line
        )
    return dw, db


def fused_weight_grad(
    x: Tensor,
    dy: Tensor,
    bias: bool,
    damping: float,
    damping_mode: DampingMode,
    scale: Scale,
    gram_dtype: torch.dtype | None = None,
    narrow_up_to: float = 0.0,
) -> tuple[Tensor, Tensor]:
    check_fused(x, dy)
    rows, inputs = x.shape
    outputs = dy.shape[1]
    rank = max(1, min(rows, inputs + bias))
    ridge = _damping(Ridge(damping, damping_mode, scale), rank, rows)
    if rows == 0 or outputs == 0:
        return dy.new_zeros(outputs, inputs), dy.new_zeros(outputs if bias else 0)
    wide = told_dtype(x.dtype, gram_dtype)
    plan = plans.plan_fused(rows, wide.itemsize)
    if plan is None:  # too many rows for one program to hold
        form: Form = "dual" if rows <= inputs + bias else "primal"
        return weight_grad(dy, *emended_input(x, bias, form, damping, damping_mode, scale, gram_dtype))
    dw, db = dy.new_empty(outputs, inputs), dy.new_empty(outputs if bias else 0)
    tiles = max(_NONE, ceil_div(inputs, plan.inputs))
    groups = min(ceil_div(outputs, plan.outputs), max(_NONE, plans.PROCESSORS // tiles))  # all programs at once
    programs = tiles * groups
    x, dy = (x, dy) if wide == torch.float32 else (x.double(), dy.double())
    room = x.new_empty(programs, 3, plan.size, plan.size, dtype=wide)
    with _on_device(x):
        fused_weight_grad_kernel[(programs,)](
            x, dy, dw, db, room, _counter(x.device), rows, inputs, outputs, groups, *x.stride(), *dy.stride(),
            ridge.damping, float(ridge.rank), float(ridge.multiplier),
            BIAS=bias, RELATIVE=ridge.relative, BY_RIDGE=ridge.by_ridge, RETRIES=RETRIES,
            SIZE=plan.size, TILE_I=plan.inputs, TILE_O=plan.outputs, DEPTH=plan.depth,
            TILE=32, WIDE=32, PRECISION=_exact(wide), num_warps=plan.warps, num_stages=1,
        )  # fmt: skip
    return dw, db
