"""The ops as Triton kernels, with the functions and signatures of `consequentialism.ops` and `reference`.

Importing this imports Triton; `consequentialism.backend.dispatch` does so where it is asked for. With
``TRITON_INTERPRET=1`` the kernels run in Triton's interpreter, on CPU tensors too. torch.compile sees each op as one
call, as it sees the compiled ones; `launch` says why not through `torch.library.triton_op`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...options import DampingMode, Form, Scale
from ...precision import compute_dtype, emended_dtype
from ..flops import count_ops_of
from . import launch
from .language import INTERPRETED
from .launch import breakdowns
from .plans import MAX_FUSED_ROWS

__all__ = [
    "INTERPRETED",
    "MAX_FUSED_ROWS",
    "breakdowns",
    "conv_gram",
    "damped_inverse",
    "emended_input",
    "emended_inputs",
    "fused_weight_grad",
    "gram_inverse",
    "input_gram",
    "weight_grad",
]

_SCHEMAS = (
    "input_gram(Tensor x, bool bias, str form) -> Tensor",
    "damped_inverse(Tensor gram, float damping, str damping_mode, str scale, SymInt rank, SymInt rows) -> Tensor",
    "gram_inverse(Tensor x, bool bias, str form, float damping, str damping_mode, str scale) -> Tensor",
    "emended_input(Tensor x, bool bias, str form, float damping, str damping_mode, str scale) -> (Tensor, Tensor)",
    "emended_inputs(Tensor[] xs, bool[] biases, str[] forms, bool[] applied, float damping, str damping_mode, "
    "str scale) -> (Tensor[], Tensor[])",
    "weight_grad(Tensor dy, Tensor rows, Tensor column) -> (Tensor, Tensor)",
    "fused_weight_grad(Tensor x, Tensor dy, bool bias, float damping, str damping_mode, str scale) -> (Tensor, Tensor)",
    "conv_gram(Tensor x, int[] kernel, int[] stride, int[] padding, int[] dilation, int groups, bool bias, "
    "int patch_bytes, ScalarType dtype) -> Tensor",
)

_library = torch.library.Library("consequentialism_triton", "DEF")
for _schema in _SCHEMAS:
    _name = _schema.partition("(")[0]
    _library.define(_schema)
    for _key in ("CUDA", "CPU") if INTERPRETED else ("CUDA",):
        _library.impl(_name, getattr(launch, _name), _key)

_ops = torch.ops.consequentialism_triton
count_ops_of("consequentialism_triton")


def input_gram(x: Tensor, bias: bool, form: Form) -> Tensor:
    return _ops.input_gram(x, bias, form)


def damped_inverse(
    gram: Tensor, damping: float, damping_mode: DampingMode, scale: Scale, rank: int, rows: int
) -> Tensor:
    return _ops.damped_inverse(gram, damping, damping_mode, scale, rank, rows)


def gram_inverse(x: Tensor, bias: bool, form: Form, damping: float, damping_mode: DampingMode, scale: Scale) -> Tensor:
    return _ops.gram_inverse(x, bias, form, damping, damping_mode, scale)


def emended_input(
    x: Tensor, bias: bool, form: Form, damping: float, damping_mode: DampingMode, scale: Scale
) -> tuple[Tensor, Tensor]:
    return _ops.emended_input(x, bias, form, damping, damping_mode, scale)


def emended_inputs(
    xs: Sequence[Tensor],
    biases: Sequence[bool],
    forms: Sequence[Form],
    applied: Sequence[bool],
    damping: float,
    damping_mode: DampingMode,
    scale: Scale,
) -> tuple[list[Tensor], list[Tensor]]:
    return _ops.emended_inputs(xs, biases, forms, applied, damping, damping_mode, scale)


def weight_grad(dy: Tensor, rows: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
    return _ops.weight_grad(dy, rows, column)


def fused_weight_grad(
    x: Tensor, dy: Tensor, bias: bool, damping: float, damping_mode: DampingMode, scale: Scale
) -> tuple[Tensor, Tensor]:
    return _ops.fused_weight_grad(x, dy, bias, damping, damping_mode, scale)


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
    return _ops.conv_gram(x, kernel, stride, padding, dilation, groups, bias, patch_bytes, dtype)


def _square(x: Tensor, bias: bool, form: str) -> Tensor:
    n = x.shape[0] if form == "dual" else x.shape[1] + int(bias)
    return x.new_empty((n, n), dtype=compute_dtype(x.dtype))


def _emended(x: Tensor, bias: bool) -> tuple[Tensor, Tensor]:
    column = x.new_empty((x.shape[0] if bias else 0,), dtype=compute_dtype(x.dtype))
    return x.new_empty(x.shape, dtype=emended_dtype(x.dtype)), column


@torch.library.register_fake("consequentialism_triton::input_gram")
def _(x: Tensor, bias: bool, form: str) -> Tensor:
    return _square(x, bias, form)


@torch.library.register_fake("consequentialism_triton::damped_inverse")
def _(gram: Tensor, damping: float, damping_mode: str, scale: str, rank: int, rows: int) -> Tensor:
    return gram.new_empty(gram.shape)


@torch.library.register_fake("consequentialism_triton::gram_inverse")
def _(x: Tensor, bias: bool, form: str, damping: float, damping_mode: str, scale: str) -> Tensor:
    return _square(x, bias, form)


@torch.library.register_fake("consequentialism_triton::emended_input")
def _(x: Tensor, bias: bool, form: str, damping: float, damping_mode: str, scale: str) -> tuple[Tensor, Tensor]:
    return _emended(x, bias)


@torch.library.register_fake("consequentialism_triton::emended_inputs")
def _(
    xs: list[Tensor],
    biases: list[bool],
    forms: list[str],
    applied: list[bool],
    damping: float,
    damping_mode: str,
    scale: str,
) -> tuple[list[Tensor], list[Tensor]]:
    pairs = []
    for x, bias, form, is_applied in zip(xs, biases, forms, applied, strict=True):
        square = _square(x, bias, form)
        pairs.append(_emended(x, bias) if is_applied else (square, square.new_empty(0)))
    return [kept for kept, _ in pairs], [column for _, column in pairs]


@torch.library.register_fake("consequentialism_triton::weight_grad")
def _(dy: Tensor, rows: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
    outputs = dy.shape[1]
    return dy.new_empty((outputs, rows.shape[1])), dy.new_empty((0 if column.shape[0] == 0 else outputs,))


@torch.library.register_fake("consequentialism_triton::fused_weight_grad")
def _(x: Tensor, dy: Tensor, bias: bool, damping: float, damping_mode: str, scale: str) -> tuple[Tensor, Tensor]:
    outputs = dy.shape[1]
    return dy.new_empty((outputs, x.shape[1])), dy.new_empty((outputs if bias else 0,))


@torch.library.register_fake("consequentialism_triton::conv_gram")
def _(
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
    order = x.shape[1] // groups * math.prod(kernel) + int(bias)
    return x.new_empty((groups, order, order), dtype=dtype)
