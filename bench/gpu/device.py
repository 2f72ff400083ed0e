"""Where and how calls are timed: a CUDA device, or the host for a rehearsal without one."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

Run = Callable[[], Any]
FLUSH_FACTOR = 4  # the buffer that is read between calls, in sizes of the L2 cache
LEAST_FLUSH_BYTES = 64 << 20


class Device(Protocol):
    """What a measurement needs of a device."""

    type: str
    backend: str  # of the package's layers

    def name(self) -> str: ...

    def capture(self, run: Run) -> Run: ...

    def microseconds(self, run: Run, queued: bool) -> float: ...

    def peak_bytes(self, run: Run) -> int: ...

    def alive(self) -> bool: ...

    def copy_bytes(self) -> int: ...

    def matrix_order(self) -> int: ...


class Cuda:
    """The current CUDA device."""

    type, backend = "cuda", "cuda"

    def __init__(self) -> None:
        cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self._buffer = torch.zeros(max(FLUSH_FACTOR * cache, LEAST_FLUSH_BYTES) // 4, device="cuda")

    def name(self) -> str:
        return torch.cuda.get_device_name()

    def capture(self, run: Run) -> Run:
        """A replay of ``run`` as a graph, after three runs on a side stream."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Where a capture breaks off, torch leaves its stream the current one: the outer context puts it back.
        with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
            run()
        return graph.replay

    def microseconds(self, run: Run, queued: bool) -> float:
        """One call on a cold cache. Where ``queued``, it is launched while the cache is flushed, so that the host's
        time does not show; else after that, and it does."""
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._buffer.sum()  # reads: writing would leave lines to be written back during the call
        if not queued:
            torch.cuda.synchronize()
        start.record()
        run()
        stop.record()
        stop.synchronize()
        return 1000 * start.elapsed_time(stop)

    def peak_bytes(self, run: Run) -> int:
        """The most memory that a call holds beyond what was there."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def alive(self) -> bool:
        """Whether the device still computes; an illegal access ends that for the whole process."""
        try:
            torch.cuda.synchronize()
            return torch.ones(8, device="cuda").sum().item() == 8
        except RuntimeError:
            return False

    def copy_bytes(self) -> int:
        return 1 << 30

    def matrix_order(self) -> int:
        return 8192


class Host:
    """The processor, for a rehearsal: the same code but for graphs, events and the flush."""

    type, backend = "cpu", "auto"

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock

    def name(self) -> str:
        return "rehearsal on the CPU"

    def capture(self, run: Run) -> Run:
        run()
        return run

    def microseconds(self, run: Run, queued: bool) -> float:
        start = self._clock()
        run()
        return 1e6 * (self._clock() - start)

    def peak_bytes(self, run: Run) -> int:
        run()
        return 0

    def alive(self) -> bool:
        return True

    def copy_bytes(self) -> int:
        return 1 << 20

    def matrix_order(self) -> int:
        return 128


def quantiles(times: list[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile."""
    if len(times) == 1:
        return (times[0],) * 3
    cuts = statistics.quantiles(times, n=10, method="inclusive")
    return statistics.median(times), cuts[1], cuts[7]


def roofline(device: Device, rounds: int = 20) -> dict[str, float]:
    """What the device reaches: GB/s of a copy, TFLOP/s of a square product in bfloat16 and in float32."""

    def fastest(run: Run) -> float:
        run()
        return min(device.microseconds(run, queued=True) for _ in range(rounds))

    source = torch.ones(device.copy_bytes() // 4, device=device.type)
    target = torch.empty_like(source)
    reached = {"bandwidth_gb_s": 2e-3 * device.copy_bytes() / fastest(lambda: target.copy_(source))}
    n = device.matrix_order()
    for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        a, b = (torch.randn(n, n, device=device.type, dtype=dtype) for _ in range(2))
        reached[f"{name}_tflop_s"] = 2e-6 * n**3 / fastest(lambda a=a, b=b: a @ b)  # type: ignore[misc]
    return reached
