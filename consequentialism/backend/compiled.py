"""The compiled ops: the extension where it can be loaded, and why not where it cannot.

They are kernels of `schemas.OPS` for each type of device; shapes and meanings are those of `reference`.
"""

from __future__ import annotations

import importlib.machinery
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import _torch
from ..options import DampingMode, Form, Scale
from ..solve import cost
from . import reference
from .flops import count_ops_of
from .interface import interface_of, stamp_of
from .protocol import CoordinateOps, Limits, Ops
from .schemas import COORDINATE_OPS, OPS, STEP_OPS, add_fakes, coordinate_wrappers, wrappers

LIMITS = Limits(fused_rows=128, derivative=True)
# A type of device without a kernel for one of these has no compiled backend.
NEEDED = (
    "input_gram",
    "conv_gram",
    "damped_inverse",
    "gram_inverse",
    "emended_input",
    "weight_grad",
    "fused_weight_grad",
)

FUNCTIONS = ("build_info", "breakdowns", "linear_forward", "set_planner", "step_tensors")  # of the module itself

BUILD_AGAIN = "`pip install --no-build-isolation --no-deps --force-reinstall .` in the source's folder builds it anew"
# `pip install .` leaves what an editable install, or a build in place, has put beside the sources.
BUILD_IN_PLACE = "`pip install --no-build-isolation --no-deps -e .` in the source's folder builds it anew"


def _load() -> tuple[ModuleType | None, str | None]:
    """The compiled module, or why there is none."""
    package = Path(__file__).parent.parent
    reason_file = package / "_C_missing.txt"
    if reason_file.exists():
        return None, reason_file.read_text().strip()
    own = (package / f"_C{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES)
    extension = next((path for path in own if path.exists()), None)  # of several, that of this Python
    stamp = None if extension is None else stamp_of(extension)
    words = stamp.read_text().split() if stamp is not None and stamp.exists() else [None]
    if not words:
        return None, f"built, but {stamp} is empty and does not say for which torch; {BUILD_AGAIN}"
    built_for, *built_of = words
    if built_for is not None and _release(built_for) != _release(torch.__version__):  # it might load, and crash
        return None, _moved(built_for)
    try:
        from .. import _C  # type: ignore[attr-defined]
    except ImportError as error:
        if extension is None:
            return None, "not built for this Python; `pip install --no-build-isolation .` builds it"
        if built_for is not None and built_for != torch.__version__:
            return None, _moved(built_for)
        return None, f"built, but it cannot be loaded with torch {torch.__version__}: {error}"
    without = [name for name in FUNCTIONS if not hasattr(_C, name)]
    without += [
        name
        for name in (*OPS, *COORDINATE_OPS, *STEP_OPS, "emended_linear")
        if not _torch.has_op(f"consequentialism::{name}")
    ]
    if without:
        return None, f"built from older sources, without {', '.join(without)}; {BUILD_AGAIN}"
    sources = package.parent / "csrc"  # of a checkout; what was built before there were stamps has none
    if extension is not None and (sources / "linear_forward.cpp").exists() and built_of != [interface_of(sources)]:
        return None, f"built from other sources than those in {sources}; {BUILD_IN_PLACE}"
    return _C, None


def _moved(built_for: str) -> str:
    return f"built for torch {built_for}, but torch {torch.__version__} is here; {BUILD_AGAIN}"


def _release(version: str) -> list[str]:
    """Major and minor version: torch keeps its binary interface for no longer."""
    return version.split(".")[:2]


module, missing_reason = _load()
if missing_reason is not None:
    warnings.warn(
        f"consequentialism runs without its compiled kernels, correctly but slower: {missing_reason}",
        RuntimeWarning,
        stacklevel=3,
    )


def _device_types(*names: str) -> tuple[str, ...]:
    """The types of device for which the extension has all of these kernels."""
    if module is None:
        return ()
    keys = {"cpu": "CPU", "cuda": "CUDA"}
    return tuple(
        device
        for device, key in keys.items()
        if all(_torch.has_kernel(f"consequentialism::{name}", key) for name in names)
    )


device_types = _device_types(*NEEDED)
if module is not None:
    _library = torch.library.Library("consequentialism", "FRAGMENT")
    add_fakes(_library, {**OPS, **COORDINATE_OPS, **STEP_OPS})
    count_ops_of("consequentialism")

# The types of device with kernels for steps in coordinates: see `dispatch.for_coordinates`.
coordinate_device_types = _device_types(*COORDINATE_OPS)
step_device_types = _device_types(*STEP_OPS)
_ops: Ops = reference if module is None else wrappers("consequentialism")
input_gram = _ops.input_gram
damped_inverse = _ops.damped_inverse
gram_inverse = _ops.gram_inverse
emended_input = _ops.emended_input
weight_grad = _ops.weight_grad
fused_weight_grad = _ops.fused_weight_grad
_coordinate_ops: CoordinateOps = reference if module is None else coordinate_wrappers("consequentialism")
decayed_gram = _coordinate_ops.decayed_gram
inverse_root = _coordinate_ops.inverse_root
root_product = _coordinate_ops.root_product
add_root_product_ = _coordinate_ops.add_root_product_


def step_tensors(
    parameters: list[Tensor], state: dict[Tensor, Any], keys: tuple[str, ...]
) -> list[tuple[Tensor, ...] | None]:
    """What an operator of `schemas.STEP_OPS` takes of each parameter: itself, its gradient and the tensors that an
    optimizer's state has of it under these keys; None where it does not serve one of them. Only with the extension."""
    assert module is not None
    found: list[tuple[Tensor, ...] | None] = module.step_tensors(parameters, state, keys)
    return found


def breakdowns() -> int:
    """How many factors of this process broke down and were retried with more damping, the reference's not counted."""
    triton = sys.modules.get(f"{__package__}.triton")  # if it was ever asked for
    return (0 if module is None else int(module.breakdowns())) + (0 if triton is None else triton.breakdowns())


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
    """`reference.conv_gram`, by the method that `cost.conv_method` picks."""
    arguments = (x, kernel, stride, padding, dilation, groups, bias, patch_bytes, dtype)
    if module is None:
        return reference.conv_gram(*arguments)
    reference.check_conv(x, kernel, stride, padding, dilation, groups)
    positions = reference.conv_output_size(x.shape[2:], kernel, stride, padding, dilation)
    method = cost.conv_method(x.device.type, x.shape[1] // groups, kernel, stride, dilation, positions)
    return torch.ops.consequentialism.conv_gram.default(*arguments, method)


def emended_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    form: Form,
    applied_to: str,
    damping: float,
    damping_mode: DampingMode,
    scale: Scale,
    gram_dtype: torch.dtype | None,
    narrow_up_to: float,
) -> Tensor:
    """`autograd.EmendedLinear` with what precedes it, for eager mode: the same bits without Python in between.

    Args:
        x: ``[..., I]``, at least one row.
        applied_to: ``"input"`` or ``"gradient"``, as `cost.Plan` says, or ``"fused"``, as `cost.is_fused` does.
        gram_dtype, narrow_up_to: A `precision.GramType`.
    """
    arguments = (form, applied_to, damping, damping_mode, scale, gram_dtype, narrow_up_to)
    return torch.ops.consequentialism.emended_linear(x, weight, bias, *arguments)
