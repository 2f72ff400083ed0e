"""The compiled ops: loading, fakes for tracing, and typed wrappers with the reference's signatures.

The schemas stand in ``csrc/ops.cpp``; shapes and meanings are those of `consequentialism.reference`.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from .. import _torch
from ..options import ConvMethod, DampingMode, Form, Scale
from ..precision import compute_dtype, emended_dtype
from .flops import count_ops_of
from .reference import MAX_FUSED_ROWS as MAX_FUSED_ROWS

NAMES = (
    "input_gram",
    "damped_inverse",
    "gram_inverse",
    "emended_input",
    "emended_inputs",
    "weight_grad",
    "fused_weight_grad",
)
CONV_NAMES = ("conv_gram",)
COORDINATE_NAMES = ("decayed_gram", "inverse_root", "root_product", "add_root_product_")

BUILD_AGAIN = "`pip install --no-build-isolation --no-deps --force-reinstall .` in the source's folder builds it anew"


def _load() -> tuple[ModuleType | None, str | None]:
    """The compiled module, or why there is none."""
    package = Path(__file__).parent.parent
    reason_file = package / "_C_missing.txt"
    if reason_file.exists():
        return None, reason_file.read_text().strip()
    torch_file = package / "_C_torch.txt"
    built_for = torch_file.read_text().strip() if torch_file.exists() else None
    if built_for is not None and _release(built_for) != _release(torch.__version__):  # it might load, and crash
        return None, _moved(built_for)
    try:
        from .. import _C  # type: ignore[attr-defined]
    except ImportError as error:
        if not any(package.glob("_C.*")):
            return None, "not built; `pip install --no-build-isolation .` builds it"
        if built_for is not None and built_for != torch.__version__:
            return None, _moved(built_for)
        return None, f"built, but it cannot be loaded with torch {torch.__version__}: {error}"
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


def _device_types(names: tuple[str, ...]) -> tuple[str, ...]:
    """The types of device for which the extension has all of these kernels."""
    if module is None:
        return ()
    keys = {"cpu": "CPU", "cuda": "CUDA"}
    return tuple(
        device
        for device, key in keys.items()
        if all(_torch.has_kernel(f"consequentialism::{name}", key) for name in names)
    )


device_types = _device_types(NAMES)
coordinate_device_types = _device_types(COORDINATE_NAMES)
conv_device_types = _device_types(CONV_NAMES)  # elsewhere a convolution's patches are streamed by stock operations


def breakdowns() -> int:
    """How many factors of this process broke down and were retried with more damping, the reference's not counted."""
    triton = sys.modules.get(f"{__package__}.triton")  # if it was ever asked for
    return (0 if module is None else int(module.breakdowns())) + (0 if triton is None else triton.breakdowns())


def input_gram(x: Tensor, bias: bool, form: Form) -> Tensor:
    return torch.ops.consequentialism.input_gram(x, bias, form)


def damped_inverse(
    gram: Tensor, damping: float, damping_mode: DampingMode, scale: Scale, rank: int, rows: int
) -> Tensor:
    return torch.ops.consequentialism.damped_inverse(gram, damping, damping_mode, scale, rank, rows)


def gram_inverse(x: Tensor, bias: bool, form: Form, damping: float, damping_mode: DampingMode, scale: Scale) -> Tensor:
    return torch.ops.consequentialism.gram_inverse(x, bias, form, damping, damping_mode, scale)


def emended_input(
    x: Tensor, bias: bool, form: Form, damping: float, damping_mode: DampingMode, scale: Scale
) -> tuple[Tensor, Tensor]:
    return torch.ops.consequentialism.emended_input(x, bias, form, damping, damping_mode, scale)


def emended_inputs(
    xs: Sequence[Tensor],
    biases: Sequence[bool],
    forms: Sequence[Form],
    applied: Sequence[bool],
    damping: float,
    damping_mode: DampingMode,
    scale: Scale,
) -> tuple[list[Tensor], list[Tensor]]:
    return torch.ops.consequentialism.emended_inputs(xs, biases, forms, applied, damping, damping_mode, scale)


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
    method: ConvMethod,
) -> Tensor:
    """`reference.conv_gram`; ``method`` says how, see `cost.conv_method`."""
    arguments = (x, kernel, stride, padding, dilation, groups, bias, patch_bytes, dtype, method)
    return torch.ops.consequentialism.conv_gram(*arguments)


def weight_grad(dy: Tensor, rows: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.consequentialism.weight_grad(dy, rows, column)


def emended_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    form: Form,
    applied_to: str,
    damping: float,
    damping_mode: DampingMode,
    scale: Scale,
) -> Tensor:
    """`autograd.EmendedLinear` with what precedes it, for eager mode: the same bits without Python in between.

    Args:
        x: ``[..., I]``, at least one row.
        applied_to: ``"input"`` or ``"gradient"``, as `cost.Plan` says, or ``"fused"``, as `cost.is_fused` does.
    """
    return torch.ops.consequentialism.emended_linear(x, weight, bias, form, applied_to, damping, damping_mode, scale)


def fused_weight_grad(
    x: Tensor, dy: Tensor, bias: bool, damping: float, damping_mode: DampingMode, scale: Scale
) -> tuple[Tensor, Tensor]:
    return torch.ops.consequentialism.fused_weight_grad.default(x, dy, bias, damping, damping_mode, scale)


def decayed_gram(gram: Tensor, x: Tensor, bias: bool, memory: float, beta: float) -> Tensor:
    return torch.ops.consequentialism.decayed_gram(gram, x, bias, memory, beta)


def inverse_root(matrix: Tensor, root: int, coefficients: Sequence[float]) -> Tensor:
    return torch.ops.consequentialism.inverse_root(matrix, root, coefficients)


def root_product(rows: Tensor, root: Tensor) -> Tensor:
    return torch.ops.consequentialism.root_product(rows, root)


def add_root_product_(weight: Tensor, rows: Tensor, root: Tensor, alpha: float) -> None:
    torch.ops.consequentialism.add_root_product_(weight, rows, root, alpha)


def _square(x: Tensor, bias: bool, form: str) -> Tensor:
    n = x.shape[0] if form == "dual" else x.shape[1] + int(bias)
    return x.new_empty((n, n), dtype=compute_dtype(x.dtype))


def _emended(x: Tensor, bias: bool) -> tuple[Tensor, Tensor]:
    emended = x.new_empty(x.shape, dtype=emended_dtype(x.dtype))
    return emended, x.new_empty((x.shape[0] if bias else 0,), dtype=compute_dtype(x.dtype))


if module is not None:
    count_ops_of("consequentialism")

    @torch.library.register_fake("consequentialism::input_gram")
    def _(x: Tensor, bias: bool, form: str) -> Tensor:
        return _square(x, bias, form)

    @torch.library.register_fake("consequentialism::damped_inverse")
    def _(gram: Tensor, damping: float, damping_mode: str, scale: str, rank: int, rows: int) -> Tensor:
        return gram.new_empty(gram.shape)

    @torch.library.register_fake("consequentialism::gram_inverse")
    def _(x: Tensor, bias: bool, form: str, damping: float, damping_mode: str, scale: str) -> Tensor:
        return _square(x, bias, form)

    @torch.library.register_fake("consequentialism::emended_input")
    def _(x: Tensor, bias: bool, form: str, damping: float, damping_mode: str, scale: str) -> tuple[Tensor, Tensor]:
        return _emended(x, bias)

    @torch.library.register_fake("consequentialism::emended_inputs")
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

    @torch.library.register_fake("consequentialism::conv_gram")
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
        method: str,
    ) -> Tensor:
        n = x.shape[1] // groups * math.prod(kernel) + int(bias)
        return x.new_empty((groups, n, n), dtype=dtype)

    @torch.library.register_fake("consequentialism::weight_grad")
    def _(dy: Tensor, rows: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
        outputs = dy.shape[1]
        return dy.new_empty((outputs, rows.shape[1])), dy.new_empty((0 if column.shape[0] == 0 else outputs,))

    @torch.library.register_fake("consequentialism::fused_weight_grad")
    def _(x: Tensor, dy: Tensor, bias: bool, damping: float, damping_mode: str, scale: str) -> tuple[Tensor, Tensor]:
        outputs = dy.shape[1]
        return dy.new_empty((outputs, x.shape[1])), dy.new_empty((outputs if bias else 0,))

    @torch.library.register_fake("consequentialism::decayed_gram")
    def _(gram: Tensor, x: Tensor, bias: bool, memory: float, beta: float) -> Tensor:
        return gram.new_empty(gram.shape)

    @torch.library.register_fake("consequentialism::inverse_root")
    def _(matrix: Tensor, root: int, coefficients: Sequence[float]) -> Tensor:
        return matrix.new_empty(matrix.shape)

    @torch.library.register_fake("consequentialism::root_product")
    def _(rows: Tensor, root: Tensor) -> Tensor:
        return root.new_empty(rows.shape)

    @torch.library.register_fake("consequentialism::add_root_product_")
    def _(weight: Tensor, rows: Tensor, root: Tensor, alpha: float) -> None:
        return None
