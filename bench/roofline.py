"""What a device reaches, and the least time that bytes and operations would take at that."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import NamedTuple

import torch

from .timing import Device, Run

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


class Minimum(NamedTuple):
    """What a call cannot do without: bytes, each input read and each result written once, and operations."""

    bytes: float
    flops: float


class PeakRates(NamedTuple):
    """What a device reaches, measured: GB/s of a copy, and TFLOP/s of a square product by type."""

    bandwidth_gb_s: float
    tflop_s: Mapping[str, float]

    def floor_ms(self, least: Minimum, dtype: str) -> float:
        """The roofline: memory or arithmetic, whichever takes longer, as if the other cost nothing."""
        return max(1e-6 * least.bytes / self.bandwidth_gb_s, 1e-9 * least.flops / self.tflop_s.get(dtype, math.inf))


def measure(device: Device, dtypes: tuple[str, ...], rounds: int = 10, seconds: float = 1.0) -> PeakRates:
    """The fastest of ``rounds`` copies, and of products of each type; of fewer where ``seconds`` are not enough."""

    def fastest_ms(run: Run) -> float:
        run()
        times, end = device.turn(run, device.modes[0]), time.perf_counter() + seconds
        for _ in range(rounds - 1):
            if time.perf_counter() > end:
                break
            times += device.turn(run, device.modes[0])
        return min(times)

    source = torch.ones(device.copy_bytes() // 4, device=device.type)
    target = torch.empty_like(source)
    bandwidth = 2e-6 * device.copy_bytes() / fastest_ms(lambda: target.copy_(source))
    n = device.matrix_order()
    rates = {}
    for name in dtypes:
        a, b = (torch.randn(n, n, device=device.type).to(DTYPES[name]) for _ in range(2))
        rates[name] = 2e-9 * n**3 / fastest_ms(lambda a=a, b=b: a @ b)  # type: ignore[misc]
    return PeakRates(bandwidth, rates)
