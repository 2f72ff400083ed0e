"""Functions that kernels share: products of a given precision, loads and stores of half-precision types, addresses.

In Triton's interpreter a bfloat16 is 16 bits that numpy cannot multiply, and rounding to it truncates. There, values of
bfloat16 are kept in float32 and rounded here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

INTERPRETED: bool = triton.knobs.runtime.interpret  # decided when kernels are decorated, that is, now
_INTERPRETED = tl.constexpr(INTERPRETED)


def helper(function: Callable[..., Any]) -> Any:
    """A function that kernels call. The interpreter takes milliseconds a call where it is decorated, and need not."""
    return function if INTERPRETED else triton.jit(function)


@helper
def ceil_div(a, b):
    """``a / b``, rounded up."""
    return (a + b - 1) // b


@helper
def element(tensor: tl.tensor, row, column, stride_row, stride_column) -> tl.tensor:
    """Pointers to ``tensor[row, column]``, in 64 bits."""
    return tensor + row.to(tl.int64) * stride_row + column.to(tl.int64) * stride_column


@helper
def load(pointers: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """The elements, 0 where masked."""
    values = tl.load(pointers, mask=mask, other=0)
    if _INTERPRETED and values.dtype == tl.bfloat16:
        return (values.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return values


@helper
def round_to(values: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """``values`` as ``dtype``, rounded to nearest even."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = values.to(tl.float32).to(tl.uint32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) << 16
        return tl.where(values == values, rounded.to(tl.float32, bitcast=True), values.to(tl.float32))
    return values.to(dtype)


@helper
def store(pointers: tl.tensor, values: tl.tensor, mask: tl.tensor) -> None:
    """Store values rounded to the type of the elements."""
    dtype: tl.constexpr = pointers.dtype.element_ty
    tl.store(pointers, round_to(values, dtype).to(dtype), mask=mask)


@helper
def sum_over(values: tl.tensor, axis: tl.constexpr) -> tl.tensor:
    """The sum over an axis. In the interpreter `tl.sum`, decorated itself, takes ten times as long as its sum."""
    if _INTERPRETED:
        return tl.reduce(values, axis, tl.standard._sum_combine)
    return tl.sum(values, axis=axis)


@helper
def add_product(sums: tl.tensor, a: tl.tensor, b: tl.tensor, PRECISION: tl.constexpr) -> tl.tensor:
    """``sums + a b``, a product of its own that is added with one rounding.

    Written as a difference, which the compiler does not merge: tensor cores truncate what they add to their sums.
    """
    return sums - tl.dot(-a, b, input_precision=PRECISION, out_dtype=sums.dtype)


@helper
def subtract_product(sums: tl.tensor, a: tl.tensor, b: tl.tensor, PRECISION: tl.constexpr) -> tl.tensor:
    """``sums - a b``, a product of its own that is subtracted with one rounding."""
    return sums - tl.dot(a, b, input_precision=PRECISION, out_dtype=sums.dtype)


@helper
def reciprocal_root(value: tl.tensor) -> tl.tensor:
    """``1 / sqrt(value)``, each rounded once; of float32 the plain operators are approximate."""
    if value.dtype == tl.float32:
        return tl.div_rn(tl.full([], 1, tl.float32), tl.sqrt_rn(value))
    return 1 / tl.sqrt(value)
