"""The ops, each once: name -> schema and fake, from which every namespace of `torch.ops` gets its fakes and wrappers.

The compiled ops have their schemas in ``csrc/ops.cpp`` too, because they work without Python; a test compares the two.
Shapes and meanings are those of `reference`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ..precision import compute_dtype, emended_dtype
from .protocol import CoordinateOps, Ops


class Op(NamedTuple):
    """One op: its arguments and results, and a function of its arguments that returns empty results."""

    schema: str
    fake: Callable[..., Any]


def _square(x: Tensor, bias: bool, form: str, *_: Any) -> Tensor:
    order = x.shape[0] if form == "dual" else x.shape[1] + int(bias)
    return x.new_empty((order, order), dtype=compute_dtype(x.dtype))


def _like_first(matrix: Tensor, *_: Any) -> Tensor:
    return matrix.new_empty(matrix.shape)


def _product(rows: Tensor, root: Tensor) -> Tensor:
    return root.new_empty(rows.shape)


def _nothing(*_: Any) -> None:
    return None


def _emended(x: Tensor, bias: bool, *_: Any) -> tuple[Tensor, Tensor]:
    emended = x.new_empty(x.shape, dtype=emended_dtype(x.dtype))
    return emended, x.new_empty((x.shape[0] if bias else 0,), dtype=compute_dtype(x.dtype))


def _gradients(dy: Tensor, rows: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
    outputs = dy.shape[1]
    return dy.new_empty((outputs, rows.shape[1])), dy.new_empty((0 if column.shape[0] == 0 else outputs,))


def _fused_gradients(x: Tensor, dy: Tensor, bias: bool, *_: Any) -> tuple[Tensor, Tensor]:
    outputs = dy.shape[1]
    return dy.new_empty((outputs, x.shape[1])), dy.new_empty((outputs if bias else 0,))


def _conv_square(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    bias: bool,
    patch_bytes: int,
    dtype: torch.dtype,
    *_: Any,
) -> Tensor:
    order = x.shape[1] // groups * math.prod(kernel) + int(bias)
    return x.new_empty((groups, order, order), dtype=dtype)


_RIDGE = "float damping, str damping_mode, str scale"
_TYPE = "ScalarType? gram_dtype=None, float narrow_up_to=0"

OPS: dict[str, Op] = {
    "input_gram": Op("(Tensor x, bool bias, str form) -> Tensor", _square),
    "damped_inverse": Op(f"(Tensor gram, {_RIDGE}, SymInt rank, SymInt rows) -> Tensor", _like_first),
    "gram_inverse": Op(f"(Tensor x, bool bias, str form, {_RIDGE}, {_TYPE}) -> Tensor", _square),
    "emended_input": Op(f"(Tensor x, bool bias, str form, {_RIDGE}, {_TYPE}) -> (Tensor, Tensor)", _emended),
    "weight_grad": Op("(Tensor dy, Tensor rows, Tensor column) -> (Tensor, Tensor)", _gradients),
    "fused_weight_grad": Op(
        f"(Tensor x, Tensor dy, bool bias, {_RIDGE}, {_TYPE}) -> (Tensor, Tensor)", _fused_gradients
    ),
    "conv_gram": Op(
        "(Tensor x, int[] kernel, int[] stride, int[] padding, int[] dilation, int groups, bool bias, "
        "int patch_bytes, ScalarType dtype) -> Tensor",
        _conv_square,
    ),
}

# Of steps in emended coordinates.
COORDINATE_OPS: dict[str, Op] = {
    "decayed_gram": Op("(Tensor gram, Tensor x, bool bias, float memory, float beta) -> Tensor", _like_first),
    "inverse_root": Op("(Tensor matrix, int root, float[] coefficients) -> Tensor", _like_first),
    "root_product": Op("(Tensor rows, Tensor root) -> Tensor", _product),
    "add_root_product_": Op("(Tensor(a!) weight, Tensor rows, Tensor root, float alpha) -> ()", _nothing),
}

# Whole steps in emended coordinates, of many parameters at once, which the host alone has; `optim.at_once` calls them.
_PARAMETERS = "Tensor(a!)[] parameters, Tensor[] gradients, Tensor(b!)[]"
_PLACES = (
    "Tensor[] roots, Tensor[] output_roots, int[] kinds, int[] members, float[] kept, float[] coupled, float[] rates"
)
STEP_OPS: dict[str, Op] = {
    "sgd_step_": Op(
        f"({_PARAMETERS} buffers, {_PLACES}, float momentum, float dampening, bool nesterov) -> ()", _nothing
    ),
    "rmsprop_step_": Op(
        f"({_PARAMETERS} squares, Tensor(c!)[] buffers, Tensor(d!)[] counts, {_PLACES}, float alpha, float momentum, "
        "float epsilon) -> ()",
        _nothing,
    ),
    "adam_step_": Op(
        f"({_PARAMETERS} means, Tensor(c!)[] squares, Tensor(d!)[] counts, {_PLACES}, float beta1, float beta2, "
        "float epsilon) -> ()",
        _nothing,
    ),
    "muon_step_": Op(
        f"({_PARAMETERS} buffers, {_PLACES}, float momentum, bool nesterov, float[] coefficients, int steps, "
        "float epsilon, int parts) -> ()",
        _nothing,
    ),
}


def define(
    library: torch.library.Library, ops: Mapping[str, Op], implementations: object, dispatch_keys: Iterable[str]
) -> None:
    """Define ops in a library's namespace, by the functions of the same names, and add the fakes."""
    for name, op in ops.items():
        library.define(name + op.schema)
        for key in dispatch_keys:
            library.impl(name, getattr(implementations, name), key)
    add_fakes(library, ops)


def add_fakes(library: torch.library.Library, ops: Mapping[str, Op]) -> None:
    """Tell tracers the shapes and types of what the ops return.

    As kernels for the meta device: ``torch.library.register_fake`` looks for the caller's source, at every import.
    """
    for name, op in ops.items():
        library.impl(name, op.fake, "Meta")


def wrappers(namespace: str) -> Ops:
    """The ops of a namespace as typed functions."""
    return cast(Ops, _overloads(namespace, OPS))


def coordinate_wrappers(namespace: str) -> CoordinateOps:
    """The ops of steps in emended coordinates, as `wrappers`."""
    return cast(CoordinateOps, _overloads(namespace, COORDINATE_OPS))


def _overloads(namespace: str, names: Iterable[str]) -> SimpleNamespace:
    ops = getattr(torch.ops, namespace)
    return SimpleNamespace(**{name: getattr(ops, name).default for name in names})
