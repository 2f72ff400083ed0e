"""A numeric self-test of every available backend against the float64 reference."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .backend import reference
from .backend.dispatch import AVAILABLE, backends, device_of
from .functional.conv import emended_conv_weight_grad
from .functional.linear import emended_weight_grad
from .options import DAMPING_MODES, SCALES

# Largest error allowed, relative to the norm of the gradient: rounding of the type times the condition of the cases.
BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
# N, I, O: one row, both forms, both sides that the inverse can be applied to, tiles and their neighbours.
SHAPES = ((1, 7, 3), (31, 33, 65), (33, 31, 65), (129, 300, 10), (300, 129, 10), (300, 65, 400))
# B, C, O, side, stride, groups of 3x3 convolutions: both forms, both ways to sum a Gram, depthwise.
CONVOLUTIONS = ((3, 4, 6, 9, 1, 1), (3, 4, 6, 9, 2, 2), (2, 40, 5, 9, 1, 1), (1, 9, 4, 5, 1, 1), (3, 8, 8, 9, 1, 8))


@dataclass(frozen=True)
class Check:
    """One backend's outcome; ``worst`` is its largest error as a share of the bound."""

    backend: str
    passed: bool
    cases: int
    worst: float
    where: str

    def line(self) -> str:
        """One line for people."""
        if self.cases == 0:
            return f"{self.backend:10} {'skipped' if self.passed else 'FAIL'}: {self.where}"
        verdict = "ok  " if self.passed else "FAIL"
        return f"{self.backend:10} {verdict} {self.cases} cases, worst {self.worst:.0%} of its bound: {self.where}"


def check(names: Sequence[str] | None = None) -> Iterator[Check]:
    """Run the self-test of all backends, or of those named, each as it is asked for the next.

    A backend that is not available passes with no cases, unless it was named. One that raises has failed, and the
    others are still tried.
    """
    for backend, state in backends().items():
        if names is not None and backend not in names:
            continue
        if state != AVAILABLE:
            yield Check(backend, names is None, 0, 0.0, state)
            continue
        try:
            yield _check_backend(backend)
        except Exception as error:
            yield Check(backend, False, 1, math.inf, f"{type(error).__name__}: {error}")


def _check_backend(backend: str) -> Check:
    device = device_of(backend)
    generator = torch.Generator().manual_seed(0)
    worst, where, cases = 0.0, "", 0
    interpreted = backend == "triton" and device == "cpu"  # Triton's interpreter takes a second a case
    for rows, inputs, outputs in SHAPES[:3] if interpreted else SHAPES:
        x = torch.randn(rows, inputs, generator=generator, dtype=torch.float64)
        dy = torch.randn(rows, outputs, generator=generator, dtype=torch.float64)
        for dtype, bound in BOUNDS.items():
            for scale, damping_mode, bias in zip(SCALES * 2, DAMPING_MODES * 3, (True, False, True) * 2, strict=True):
                case = f"{dtype} {rows}x{inputs}x{outputs} scale={scale} damping_mode={damping_mode} bias={bias}"
                options: dict[str, Any] = {"scale": scale, "damping_mode": damping_mode}
                own = emended_weight_grad(
                    x.to(device, dtype), dy.to(device, dtype), bias=bias, backend=backend, **options
                )
                oracle = reference.emended_weight_grad(x.to(dtype).double(), dy.to(dtype).double(), bias, **options)
                error = max(_error(a, b) for a, b in zip(own, oracle, strict=True)) / bound
                cases += 1
                if not error <= worst:
                    worst, where = error, case
    found, convolution, more = _check_convolutions(backend, device)
    if not found <= worst:
        worst, where = found, convolution
    return Check(backend, worst <= 1, cases + more, worst, where)


def _check_convolutions(backend: str, device: str) -> tuple[float, str, int]:
    """The largest error as a share of its bound, where, and the number of cases."""
    generator = torch.Generator().manual_seed(1)
    worst, where, cases = 0.0, "", 0
    for batch, channels, outputs, side, stride, groups in CONVOLUTIONS:
        x = torch.randn(batch, channels, side, side, generator=generator, dtype=torch.float64)
        positions = (side - 1) // stride + 1
        dy = torch.randn(batch, outputs, positions, positions, generator=generator, dtype=torch.float64)
        for dtype, bound in BOUNDS.items():
            own = emended_conv_weight_grad(
                x.to(device, dtype), dy.to(device, dtype), 3, stride=stride, padding=1, groups=groups, backend=backend
            )
            oracle = reference.emended_conv_weight_grad(
                x.to(dtype).double(), dy.to(dtype).double(), (3, 3), (stride, stride), (1, 1), (1, 1), groups
            )
            error = max(_error(a, b) for a, b in zip(own, oracle, strict=True)) / bound
            cases += 1
            if not error <= worst:
                worst = error
                where = (
                    f"{dtype} 3x3 convolution {channels} to {outputs}, {side}x{side} stride={stride} groups={groups}"
                )
    return worst, where, cases


def _error(own: Tensor | None, oracle: Tensor | None) -> float:
    """The difference's norm relative to the oracle's; infinity where it is not finite."""
    if own is None or oracle is None:
        return 0.0 if own is oracle else math.inf
    error = ((own.double().cpu() - oracle).norm() / oracle.norm()).item()
    return error if math.isfinite(error) else math.inf
