"""What every test shares: backends, shapes, kinds of input, tolerances, and one way to compare."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import consequentialism as cw
from consequentialism.backend import dispatch

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
DTYPES = (F64, F32, BF16, F16)
HALF_TYPES = (BF16, F16)
Shape = tuple[int, int, int]  # N, I, O
Gradients = tuple[Tensor, Tensor | None]  # dw [O, I], db [O]


def _marks(name: str, state: str) -> list[pytest.MarkDecorator]:
    skipped = [] if state == "available" else [pytest.mark.skip(reason=f"backend {name}: {state}")]
    return [*skipped, *([pytest.mark.triton] if name == "triton" else [])]


# Every backend of the package; where its hardware or its kernels are missing, a skip that names it and says why.
BACKENDS = [pytest.param(name, id=name, marks=_marks(name, state)) for name, state in cw.backends().items()]
HAS_KERNELS = cw.backends()["cpu"] == "available"
needs_kernels = pytest.mark.skipif(not HAS_KERNELS, reason=f"backend cpu: {cw.backends()['cpu']}")

# (N, I, O): one row, one input, one output; the tiles 32, 64 and 128 with their neighbours; both forms; O on both
# sides of I and N, so that every plan of the cost model is taken.
SHAPES: tuple[Shape, ...] = (
    (1, 1, 1),
    (1, 7, 3),
    (7, 1, 3),
    (5, 7, 1),
    (7, 5, 3),
    (31, 33, 17),
    (32, 32, 32),
    (33, 31, 2),
    (63, 64, 65),
    (64, 65, 63),
    (65, 63, 7),
    (127, 20, 129),
    (20, 127, 129),
    (128, 129, 5),
    (129, 128, 5),
    (130, 300, 10),
    (300, 130, 400),
    (1, 300, 3),
    (300, 1, 3),
)
SMALL_SHAPES: tuple[Shape, ...] = ((1, 5, 3), (6, 4, 3), (4, 9, 2), (33, 31, 12), (31, 33, 40))

# Largest allowed ||own - expected|| / ||expected||, by the type of the result, on inputs whose Gram is conditioned
# no worse than about 1e3: a few roundings of the type, times that where the Gram is in the same type.
TOLERANCE = {F64: 1e-11, F32: 2e-5, BF16: 1e-2, F16: 1e-3}
# The inverse of a Gram with an absolute damping of 0.5, which leaves a condition number of some 1e3.
TOLERANCE_ABSOLUTE = {F64: 5e-10, F32: 1e-3}
EXACT = 1e-10  # float64 identities; what is left is rounding times a condition number of at most 1e5
LIMIT = 1e-5  # the limits c -> 0 and c -> infinity, taken at 1e-9 and 1e9
SAME_WAY = 1e-6  # float32 results of the same operations in another order, or by another float32 kernel
TRANSFORM = {F64: 1e-11, F32: 2e-5}  # torch.compile and torch.func against eager
# The accuracy contract: at most FACTOR times the error of the same expression in plain PyTorch, plus the floor.
FACTOR = 2.0
FLOOR = {F32: 1e-6, BF16: 4e-3, F16: 5e-4}
CONDITION_FACTOR = 4.0  # float64: times the rounding unit, times the condition number's bound
# "Accurate" on inputs however bad, in float32, from damping 1 down to 1e-6.
ILL_CONDITIONED = 1e-3

# Inputs whose Gram has a known weakness, by name; `make_input` makes them.
ACCURACY_SHAPES: tuple[Shape, ...] = ((24, 40, 10), (40, 24, 10), (200, 130, 150), (130, 200, 5))
KINDS = (
    "random",
    "correlated",
    "near_duplicates",
    "duplicates",
    "low_rank",
    "badly_scaled",
    "decaying",
    "shifted",
)
DAMPINGS = (1.0, 1e-2, 1e-4, 1e-6)


def device_of(backend: str) -> str:
    """The device that a backend serves."""
    return dispatch.device_of(backend)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = F64, device: str = "cpu") -> Tensor:
    """Standard normal, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=F64).to(device, dtype)


def make_input(kind: str, rows: int, inputs: int, seed: int = 0) -> Tensor:
    """``x [N, I]`` of a kind, in float64."""
    x = randn(rows, inputs, seed=seed)
    if kind == "random":
        return x
    if kind == "correlated":  # every row leans on one direction
        return 0.05 * x + randn(1, inputs, seed=seed + 1)
    if kind == "near_duplicates":
        return x[torch.arange(rows) // 2] + 1e-4 * randn(rows, inputs, seed=seed + 1)
    if kind == "duplicates":
        return x[torch.arange(rows) // 4]
    if kind == "low_rank":
        return randn(rows, 3, seed=seed) @ randn(3, inputs, seed=seed + 1)
    if kind == "badly_scaled":
        return x * torch.logspace(-3, 3, rows, dtype=F64)[:, None]
    if kind == "decaying":
        return x * torch.logspace(0, -6, inputs, dtype=F64)
    if kind == "shifted":  # activations that are far from zero on average
        return x + 100
    raise ValueError(kind)


def oracle(x: Tensor, dy: Tensor, bias: bool = True, **options: Any) -> Gradients:
    """The reference in float64 on the values as they are."""
    options.pop("backend", None)
    return cw.reference.emended_weight_grad(x.double().cpu(), dy.double().cpu(), bias, **options)


def with_ones(x: Tensor, bias: bool) -> Tensor:
    """``x [N, I]`` with the bias's column of ones."""
    return torch.cat([x, x.new_ones(x.shape[0], 1)], dim=1) if bias else x


def solved(x: Tensor, dy: Tensor, bias: bool, c: float) -> Gradients:
    """``dy^T (x x^T + c I)^-1 x`` or the primal form, whichever is smaller, as one would write it in plain PyTorch.

    Independent of the package. Half types are computed in float32 and rounded once.
    """
    wide = torch.float32 if x.dtype in HALF_TYPES else x.dtype
    rows, errors = with_ones(x.to(wide), bias), dy.to(wide)
    if rows.shape[0] <= rows.shape[1]:
        eye = torch.eye(rows.shape[0], dtype=wide)
        dw = errors.T @ torch.linalg.solve(rows @ rows.T + c * eye, rows)
    else:
        eye = torch.eye(rows.shape[1], dtype=wide)
        dw = torch.linalg.solve(rows.T @ rows + c * eye, rows.T @ errors).T
    dw = dw.to(x.dtype)
    return (dw[:, :-1], dw[:, -1]) if bias else (dw, None)


def relative_ridge(x: Tensor, bias: bool, damping: float) -> float:
    """``c = damping * trace(x x^T) / min(N, I)``."""
    rows = with_ones(x.double(), bias)
    return damping * rows.square().sum().item() / min(rows.shape)


def join(dw: Tensor, db: Tensor | None) -> Tensor:
    """``dw`` with the bias gradient as its last column, in float64 on the CPU."""
    dw = dw.detach().double().cpu()
    return dw if db is None else torch.cat([dw, db.detach().double().cpu()[:, None]], dim=1)


def error_of(own: Tensor, expected: Tensor) -> float:
    """``||own - expected|| / ||expected||`` in float64; infinity where own is not finite."""
    own, expected = own.detach().double().cpu(), expected.detach().double().cpu()
    error, size = (own - expected).norm().item(), expected.norm().item()
    if not math.isfinite(error):
        return math.inf
    return error / size if size > 0 else (0.0 if error == 0 else math.inf)


def assert_close(name: str, own: Tensor | None, expected: Tensor | None, bound: float) -> None:
    """``own`` is ``expected`` up to the relative error ``bound``, in the norm of the whole tensor."""
    if own is None or expected is None:
        assert own is expected, f"{name}: {own} is not {expected}"
        return
    assert own.shape == expected.shape, f"{name}: shape {list(own.shape)}, expected {list(expected.shape)}"
    error = error_of(own, expected)
    assert error <= bound, f"{name}: relative error {error:.3g}, allowed {bound:.3g}"


def assert_grads_close(own: Gradients, expected: Gradients, bound: float) -> None:
    """The pairs ``(dw, db)`` agree, each within the bound."""
    assert_close("dw", own[0], expected[0], bound)
    assert_close("db", own[1], expected[1], bound)


def assert_identical(name: str, own: Tensor | None, expected: Tensor | None) -> None:
    """Bit for bit, the type included."""
    if own is None or expected is None:
        assert own is expected, f"{name}: {own} is not {expected}"
        return
    assert own.dtype == expected.dtype, f"{name}: {own.dtype}, expected {expected.dtype}"
    assert own.shape == expected.shape, f"{name}: shape {list(own.shape)}, expected {list(expected.shape)}"
    difference = (own.double() - expected.double()).abs().max().item() if own.numel() else 0.0
    assert torch.equal(own, expected), f"{name}: differs by up to {difference:.3g}"


class Recorder(TorchDispatchMode):
    """The names of the operators that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))

    def own(self) -> list[str]:
        """The names of this package's ops."""
        return [name for name in self.names if name.startswith("consequentialism")]
