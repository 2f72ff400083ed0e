"""The policy of types: what a Gram, its inverse, an emended input and the sums over errors are computed in.

Half-precision types are computed in float32, float32 and float64 as they are; a Gram whose inverse would lose digits is
float64. It is decided here alone: the ops are told (`GramType`).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .options import DampingMode

# Up to these condition numbers Gram and factor are float32.
MAX_FLOAT32_CONDITION = 2e3
# With more rows than inputs, where dy^T x, summed in float32, has lost as many digits before any inverse.
MAX_FLOAT32_CONDITION_TALL = 6e3
# Where x and dw have been rounded to half-precision types, which costs more.
MAX_FLOAT32_CONDITION_HALF = 5e4
# Of an inverse root's iteration. In float32 its S is right in norm, to 5e-7 at order 64 and 3e-6 at 512 (damping 0.03,
# a decaying spectrum, p = 2), but its smallest eigenvalues, those of the ridge alone where a Gram has fewer rows than
# its order, are off by some units of the condition times the type's precision: measured, a step by 5e-4 to 1e-3 at
# damping 0.03 and orders 64 to 512, by several times its size at 1e-3 with one to five rows.
MAX_FLOAT32_ROOT_CONDITION = 1e4

# Up to this condition two terms of bfloat16 stand for a float32 inverse, 16 of its bits: of their loss a bfloat16
# emended input shows less than of its own rounding. On inputs of every kind in tests/cases.py it was off by at most
# 1.12 times as much. csrc/cuda/emended_input.h has the same number, which a test holds to this one.
MAX_TWO_TERMS_CONDITION = 2048
TOP_EXPONENT = 14  # of the largest float32 entry in its unit, as float16: below float16's range by a binade

HALF_TYPES = (torch.float16, torch.bfloat16)
WITHOUT_FLOAT64 = ("mps",)  # types of device


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which sums over ``x`` and ``dy`` of ``dtype`` are computed: float32 for half-precision types."""
    return torch.float32 if dtype in HALF_TYPES else dtype


def emended_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which an emended input of ``dtype`` is kept: float16's range is too small."""
    return torch.float32 if dtype == torch.float16 else dtype


def terms_of_inverse(condition: float) -> int:
    """How many terms of bfloat16 stand for a float32 inverse that meets a bfloat16 ``x``.

    Args:
        condition: ``trace(G) / c``, the largest that it can be; infinite where nobody knows it.
    """
    return 2 if condition <= MAX_TWO_TERMS_CONDITION else 3


def float16_unit(y: Tensor) -> Tensor:
    """The power of two ``[]`` in which a float32 ``y`` is rounded to float16: NaN where ``y`` is not finite.

    It brings the largest ``|y|`` to ``[2^14, 2^15)``, unless that takes a unit below the normal numbers; 1 for zeros.
    """
    largest = y.abs().amax()
    exponent = torch.frexp(largest).exponent - 1 - TOP_EXPONENT
    least = math.frexp(torch.finfo(torch.float32).tiny)[1]
    unit = torch.ldexp(torch.ones_like(largest), exponent.clamp(min=least))
    unit = torch.where(largest == 0, torch.ones_like(unit), unit)
    return torch.where(largest.isfinite(), unit, torch.full_like(unit, math.nan))


def widest_dtype(device_type: str) -> torch.dtype:
    """The widest type that a device has: float64, or float32."""
    return torch.float32 if device_type in WITHOUT_FLOAT64 else torch.float64


def moment_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of the second moments and roots that step weights of ``dtype``: float32, but for float64 weights."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def root_dtype(condition: float, dtype: torch.dtype, device_type: str) -> torch.dtype:
    """The type in which an inverse root of ``dtype`` is iterated, of a matrix of at most this condition number."""
    if dtype == torch.float64 or condition > MAX_FLOAT32_ROOT_CONDITION:
        return widest_dtype(device_type)
    return torch.float32


def max_float32_condition(rows: int, inputs: int, dtype: torch.dtype) -> float:
    """``trace(G) / c``, the largest that the condition number can be, up to which a float32 Gram of ``x`` will do."""
    if dtype in HALF_TYPES:
        return MAX_FLOAT32_CONDITION_HALF
    return MAX_FLOAT32_CONDITION_TALL if rows > inputs else MAX_FLOAT32_CONDITION


def float32_is_enough(rows: int, inputs: int, dtype: torch.dtype, damping: float, damping_mode: DampingMode) -> bool:
    """Whether a Gram in x's own type, or float32 for half-precision types, keeps the digits that its inverse needs.

    ``inputs`` counts the bias's. ``rank / damping`` bounds the condition number of a relatively damped Gram; nothing
    bounds an absolutely damped one before it is there.
    """
    if damping_mode != "relative":
        return False
    if dtype == torch.float64:  # there is no wider one
        return True
    return min(rows, inputs) <= max_float32_condition(rows, inputs, dtype) * damping


class GramType(NamedTuple):
    """The type of a Gram and its inverse; two arguments of the ops that make them.

    Attributes:
        dtype: float32 or float64; None, that of sums over ``x``.
        narrow_up_to: Where ``dtype`` is wider than that, a backend that can look at the Gram without waiting takes the
            narrower one if ``trace(G) / c`` is at most this.
    """

    dtype: torch.dtype | None = None
    narrow_up_to: float = 0.0


def gram_type(
    rows: int, inputs: int, dtype: torch.dtype, damping: float, damping_mode: DampingMode, device_type: str
) -> GramType:
    """The type of the Gram of ``x [N, I]`` and of its inverse.

    Args:
        rows: ``N``, over all ranks that share the batch.
        inputs: ``I``, with the bias's.
        dtype: The type of ``x``.
    """
    if float32_is_enough(rows, inputs, dtype, damping, damping_mode):
        return GramType(compute_dtype(dtype))
    wide = widest_dtype(device_type)
    looks = damping_mode == "absolute" and wide != compute_dtype(dtype)  # a relative damping has told its condition
    return GramType(wide, max_float32_condition(rows, inputs, dtype) if looks else 0.0)


def gram_dtype(
    rows: int, inputs: int, dtype: torch.dtype, damping: float, damping_mode: DampingMode, device_type: str
) -> torch.dtype:
    """`gram_type` of a backend that does not look."""
    chosen = gram_type(rows, inputs, dtype, damping, damping_mode, device_type).dtype
    assert chosen is not None
    return chosen


def told_dtype(dtype: torch.dtype, gram_dtype: torch.dtype | None) -> torch.dtype:
    """The type of the Gram of an ``x`` of ``dtype``, as an op is told; None, that of sums over ``x``."""
    least = compute_dtype(dtype)
    if gram_dtype is not None and gram_dtype not in (least, torch.float64):
        raise TypeError(
            f"gram_dtype must be float64, or float32 for an x that is not, got {gram_dtype} for an x of {dtype}"
        )
    return least if gram_dtype is None else gram_dtype


def keeps_digits(rows: int, inputs: int, dtype: torch.dtype, damping: float, damping_mode: DampingMode) -> bool:
    """Whether an inverse in x's own type may be kept and applied to the gradient, where its rounding is amplified."""
    if dtype in HALF_TYPES:
        return False
    return dtype == torch.float64 or float32_is_enough(rows, inputs, dtype, damping, damping_mode)
