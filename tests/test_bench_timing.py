"""How calls are timed, what a device reaches, and floors of shapes that were computed by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.roofline import Minimum, PeakRates, measure
from bench.shapes import Batch, ConvShape, LinearShape, NetworkShape, Order
from bench.timing import Cuda, Host, Rehearsal, paired_ratio, quantiles


def test_quantiles() -> None:
    assert quantiles([float(i) for i in range(101)]) == (50, 20, 80)
    assert quantiles([3.0]) == (3, 3, 3)
    low, high = quantiles([1.0, 1.0, 100.0])[1:]
    assert 1 <= low <= high <= 100


def test_the_ratio_is_of_turns_in_one_round() -> None:
    assert paired_ratio([[2, 2, 9], [20, 20, 20], [200]], [[1, 1, 1], [10, 99, 10], [50]]) == 2
    with pytest.raises(ValueError, match="zip"):
        paired_ratio([[1.0]], [[1.0], [2.0]])


@pytest.mark.parametrize(("mode", "waits"), [("graph", []), ("eager", ["synchronize"])])
def test_a_call_is_timed_by_events_on_a_cold_cache(
    monkeypatch: pytest.MonkeyPatch, mode: str, waits: list[str]
) -> None:
    done: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            done.append("record")

        def synchronize(self) -> None:
            done.append("event")

        def elapsed_time(self, stop: Event) -> float:
            return 0.25  # ms

    class Buffer:
        def sum(self) -> None:
            done.append("flush")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("synchronize"))
    device = Cuda()
    device._buffer = Buffer()  # type: ignore[assignment]
    assert device.turn(lambda: done.append("run"), mode) == [0.25]
    assert done == ["flush", *waits, "record", "run", "record", "event"]


def test_a_capture_that_breaks_off_leaves_the_stream_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    current = ["default"]

    class Stream:
        name = "side"

        def wait_stream(self, other: Any) -> None:
            return None

    class Current(Stream):
        def __init__(self) -> None:
            self.name = current[-1]

    class Using:
        def __init__(self, stream: Stream) -> None:
            self.stream = stream

        def __enter__(self) -> None:
            self.before = current[-1]
            current.append(self.stream.name)

        def __exit__(self, *_: object) -> None:
            current.append(self.before)

    class Graph:
        def __init__(self, graph: object) -> None:
            return None

        def __enter__(self) -> None:
            current.append("capture")

        def __exit__(self, *_: object) -> None:
            raise RuntimeError("capture_end")  # as torch's does, before it leaves its stream

    def run() -> None:
        if current[-1] == "capture":
            raise ValueError("not capturable")

    names = {"Stream": Stream, "stream": Using, "current_stream": Current, "CUDAGraph": object, "graph": Graph}
    for name, fake in names.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    with pytest.raises(RuntimeError, match="capture_end"):
        Cuda().capture(run)
    assert current[-1] == "default"


def test_a_turn_on_the_processor_warms_up_and_is_short() -> None:
    for milliseconds, calls in ((1, 5), (100, 2), (1000, 1)):
        now = [0.0]

        def run(now: list[float] = now, milliseconds: int = milliseconds) -> None:
            now[0] += 1e-3 * milliseconds

        assert Host(lambda now=now: now[0]).turn(run, "eager") == pytest.approx([milliseconds] * calls)


def test_peak_of_the_host_is_what_a_call_holds_at_once() -> None:
    assert Host().peak_bytes(lambda: torch.ones(1000) + torch.ones(1000)) == 12000


def test_what_the_host_reaches() -> None:
    reached = measure(Rehearsal(), ("float32", "float64"), rounds=2)
    assert set(reached.tflop_s) == {"float32", "float64"}
    assert min(reached.bandwidth_gb_s, *reached.tflop_s.values()) > 0


def test_the_floor_is_the_longer_of_memory_and_arithmetic() -> None:
    reached = PeakRates(100.0, {"float32": 2.0})
    assert reached.floor_ms(Minimum(5e8, 1e9), "float32") == pytest.approx(5)  # 0.5 GB at 100 GB/s
    assert reached.floor_ms(Minimum(5e8, 2e10), "float32") == pytest.approx(10)  # 20 GFLOP at 2 TFLOP/s
    assert reached.floor_ms(Minimum(5e8, 2e10), "bfloat16") == pytest.approx(5)  # no rate was measured


def test_floors_by_hand() -> None:
    linear = LinearShape(2, 3, 4)  # forward, dx and dw; x and dx, y and dy, w and dw
    assert linear.plain(4) == (4 * 2 * (6 + 8 + 12), 6 * 24)
    # With the bias I = 4: Gram N^2 I = 16, factor N^3 = 8, application 2 N^2 min(I, O) = 32.
    assert linear.emended(4) == (208, 144 + 16 + 8 + 32)

    conv = ConvShape(batch=2, channels=4, outputs=6, kernel=3, stride=2, groups=2, side=7)
    assert (conv.positions, conv.inputs, conv.weight_size) == (4, 18, (6, 2, 3, 3))
    rows = 2 * 16
    assert conv.plain(2) == (2 * 2 * (2 * 4 * 49 + rows * 6 + 6 * 18), 6 * rows * 18 * 6)
    assert conv.emended(2).flops - conv.plain(2).flops == 2 * 2 * 16 * 18**2 + 2 * 18**3 + 2 * 6 * 18**2

    network = NetworkShape(5, (2, 3, 4))  # no gradient of the network's input
    assert network.plain(4) == (4 * (4 * 18 + 4 * 5 * 9), 6 * 5 * 18 - 2 * 5 * 6)


@pytest.mark.parametrize(
    ("shape", "name"),
    [
        (LinearShape(2, 3, 4, 1.5), "2x3x4"),
        (ConvShape(2, 4, 6, 3, 1, 1, 8), "2x4x8^2 3^2 6"),
        (ConvShape(2, 4, 4, 3, 2, 4, 8), "2x4x8^2 3^2/2 4 g4"),
        (NetworkShape(60, (784, 1600, 10)), "60x784-1600-10"),
        (NetworkShape(128, (256,) * 17), "128x16*256"),
        (Order(64), "64"),
        (Batch(64), "8*64"),
    ],
)
def test_names_of_shapes(shape: Any, name: str) -> None:
    assert shape.name == name


def test_positions_are_torchs() -> None:
    for kernel, stride, side in ((1, 1, 5), (3, 1, 8), (3, 2, 8), (7, 2, 64), (2, 2, 7), (4, 3, 9)):
        shape = ConvShape(1, 1, 1, kernel, stride, 1, side)
        y = torch.nn.Conv2d(1, 1, kernel, stride, shape.padding)(torch.zeros(shape.input_size))
        assert y.shape == shape.output_size
