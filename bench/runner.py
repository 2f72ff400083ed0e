"""The runner: whole training steps of one layer, all providers in turns, in one process.

Timings drift with the machine. Providers therefore take turns, in blocks of steps, and a provider's ratio is the
median over rounds of its block's median to the plain layer's block in the same round.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import consequentialism as cw

from .cases import PROVIDERS, Shape
from .conv_cases import ConvShape
from .environment import commit, processor

BLOCK = 5  # timed steps of a provider's turn, after one that warms its caches


@dataclass
class Result:
    """One row of the CSV. Times in milliseconds, of the whole step: forward and backward with the input's gradient."""

    op: str
    provider: str
    shape: str
    dtype: str
    threads: int
    median_ms: float
    p20_ms: float
    p80_ms: float
    ratio: float
    flop_floor: float
    target: float | None
    peak_bytes: int
    steps: int
    device: str
    torch: str
    version: str
    commit: str

    def row(self) -> dict[str, object]:
        return asdict(self)


def run(
    shapes: Iterable[Shape | ConvShape], seconds: float, providers: Iterable[str] = PROVIDERS
) -> tuple[list[Result], list[str]]:
    """Measure every provider at every shape, about ``seconds`` for each shape.

    Returns:
        The results, and a line for each provider that is not installed.
    """
    results: list[Result] = []
    missing: dict[str, str] = {}
    for shape in shapes:
        torch.manual_seed(0)
        layers: dict[str, nn.Module] = {}
        for name in providers:
            try:
                layer = shape.layer(name)
            except ImportError as error:
                missing[name] = f"{name}: {error}"
            else:
                layers |= {} if layer is None else {name: layer}
        results += _measure(shape, layers, seconds)
    return results, list(missing.values())


def _step(layer: nn.Module, x: Tensor, dy: Tensor) -> None:
    x.grad = None
    for parameter in layer.parameters():
        parameter.grad = None
    layer(x).backward(dy)


def _measure(shape: Shape | ConvShape, layers: dict[str, nn.Module], seconds: float) -> list[Result]:
    x = torch.randn(shape.input_size, requires_grad=True)
    dy = torch.randn(shape.output_size)
    peaks = {}
    for name, layer in layers.items():
        _step(layer, x, dy)
        peaks[name] = _peak_bytes(layer, x, dy)
    times: dict[str, list[list[float]]] = {name: [] for name in layers}
    order = list(layers)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[order[0]]) < len(order):
        for name in order:
            _step(layers[name], x, dy)
            block = []
            for _ in range(BLOCK):
                begin = time.perf_counter()
                _step(layers[name], x, dy)
                block.append(1e3 * (time.perf_counter() - begin))
            times[name].append(block)
        order = order[1:] + order[:1]
    results = []
    for name, blocks in times.items():
        every = sorted(t for block in blocks for t in block)
        ratios = [
            statistics.median(own) / statistics.median(plain) for own, plain in zip(blocks, times["plain"], strict=True)
        ]
        results.append(
            Result(
                op=shape.op,
                provider=name,
                shape=shape.name,
                dtype="float32",
                threads=torch.get_num_threads(),
                median_ms=statistics.median(every),
                p20_ms=every[len(every) // 5],
                p80_ms=every[len(every) * 4 // 5],
                ratio=statistics.median(ratios),
                flop_floor=shape.flop_floor,
                target=shape.target,
                peak_bytes=peaks[name],
                steps=len(every),
                device=processor(),
                torch=torch.__version__,
                version=cw.__version__,
                commit=commit(),
            )
        )
    return results


def _peak_bytes(layer: nn.Module, x: Tensor, dy: Tensor) -> int:
    """The most memory that one step holds beyond what it began with, from the profiler's allocation events."""
    x.grad = None
    for parameter in layer.parameters():
        parameter.grad = None
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        layer(x).backward(dy)
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    held = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
