"""Where and how calls are timed: a CUDA device, the processor, or the processor in the place of a CUDA device.

Timings drift with the machine. Providers therefore take turns, a provider's ratio is the median over rounds of its
turn's median to the baseline's turn in the same round, and the order of the turns rotates.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch.profiler import ProfilerActivity, profile

Run = Callable[[], Any]
FLUSH_FACTOR = 4  # the buffer that is read between calls, in sizes of the L2 cache
LEAST_FLUSH_BYTES = 64 << 20
TURN_CALLS, TURN_SECONDS = 5, 0.25  # of a turn on the processor, at most; one call is always timed


class Device(Protocol):
    """What a measurement needs of a device."""

    type: str  # torch's
    modes: tuple[str, ...]  # how calls are made: "eager", and in a CUDA "graph"
    dtypes: tuple[str, ...]  # measured unless others are asked for
    least_rounds: int
    most_rounds: int

    def backend(self) -> str:
        """The backend of the package's layers."""
        ...

    def capture(self, run: Run) -> Run: ...

    def turn(self, run: Run, mode: str) -> list[float]:
        """Milliseconds of each timed call of a provider's turn."""
        ...

    def peak_bytes(self, run: Run) -> int:
        """The most memory that a call holds beyond what was there."""
        ...

    def alive(self) -> bool:
        """Whether the device still computes."""
        ...

    def copy_bytes(self) -> int:
        """The size of the copy that measures the bandwidth."""
        ...

    def matrix_order(self) -> int:
        """The order of the product that measures the rate."""
        ...


class Cuda:
    """The current CUDA device: events around each call, on a cold cache."""

    type = "cuda"
    modes: tuple[str, ...] = ("graph", "eager")
    dtypes: tuple[str, ...] = ("bfloat16", "float32")
    least_rounds, most_rounds = 10, 100

    @functools.cached_property
    def _buffer(self) -> torch.Tensor:
        cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        return torch.zeros(max(FLUSH_FACTOR * cache, LEAST_FLUSH_BYTES) // 4, device="cuda")

    def backend(self) -> str:
        return "cuda"

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

    def turn(self, run: Run, mode: str) -> list[float]:
        """One call on a cold cache. A graph is launched while the cache is flushed, so that the host's time does not
        show; an eager call after that, and it does."""
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._buffer.sum()  # reads: writing would leave lines to be written back during the call
        if mode != "graph":
            torch.cuda.synchronize()
        start.record()
        run()
        stop.record()
        stop.synchronize()
        return [start.elapsed_time(stop)]

    def peak_bytes(self, run: Run) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def alive(self) -> bool:
        """An illegal access ends that for the whole process."""
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
    """The processor: a turn is one call that warms its caches, and some that are timed."""

    type = "cpu"
    modes: tuple[str, ...] = ("eager",)
    dtypes: tuple[str, ...] = ("float32",)
    least_rounds, most_rounds = 3, 10**6

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock

    def backend(self) -> str:
        return "auto"

    def capture(self, run: Run) -> Run:
        run()
        return run

    def turn(self, run: Run, mode: str) -> list[float]:
        warm = self._milliseconds(run)
        calls = max(1, min(TURN_CALLS, int(1e3 * TURN_SECONDS / max(warm, 1e-9))))
        return [self._milliseconds(run) for _ in range(calls)]

    def _milliseconds(self, run: Run) -> float:
        start = self._clock()
        run()
        return 1e3 * (self._clock() - start)

    def peak_bytes(self, run: Run) -> int:
        """The most memory that a call holds, from the profiler's allocation events."""
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            run()
        events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
        held = peak = 0
        for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
            held += event.nbytes()
            peak = max(peak, held)
        return peak

    def alive(self) -> bool:
        return True

    def copy_bytes(self) -> int:
        return 1 << 28

    def matrix_order(self) -> int:
        return 1024


class Rehearsal(Host):
    """The processor in the place of a CUDA device, to try the cases of one: graphs are pretended."""

    modes = Cuda.modes
    dtypes = Cuda.dtypes
    least_rounds, most_rounds = 1, 2

    def turn(self, run: Run, mode: str) -> list[float]:
        return [self._milliseconds(run)]

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


def paired_ratio(own: list[list[float]], base: list[list[float]]) -> float:
    """The median over rounds of a turn's median to that of the baseline in the same round."""
    pairs = zip(own, base, strict=True)
    return statistics.median(statistics.median(mine) / statistics.median(other) for mine, other in pairs)
