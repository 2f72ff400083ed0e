"""`side_stream` on a device: the same bits, however late a stream is, and in graphs."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from cases import BF16, F32, assert_identical, randn
from torch import Tensor, nn

import consequentialism as cw
from consequentialism.autograd import side_stream

pytestmark = pytest.mark.skipif(cw.backends()["cuda"] != "available", reason=f"backend cuda: {cw.backends()['cuda']}")
LATE = 100_000_000  # clocks, some 50 ms


def linear_model(dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    layers = nn.Sequential(nn.Linear(784, 300), nn.ReLU(inplace=True), nn.Linear(300, 40, bias=False), nn.Linear(40, 9))
    return layers.to("cuda", dtype), randn(200, 784, dtype=dtype, device="cuda")


def conv_model(dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    layers = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(8, 4, 3, groups=2))
    return layers.to("cuda", dtype), randn(4, 3, 16, 16, dtype=dtype, device="cuda")


MODELS: dict[str, Callable[[torch.dtype], tuple[nn.Module, Tensor]]] = {"linear": linear_model, "conv": conv_model}


@pytest.fixture(params=[(name, dtype) for name in MODELS for dtype in (F32, BF16)], ids=str)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor, list[Tensor]]:
    """A model, its input, and its gradients without side streams."""
    name, dtype = request.param
    torch.manual_seed(0)
    model, x = MODELS[name](dtype)
    cw.convert(model)
    return model, x, gradients(model, x)


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(model(x).square().mean(), list(model.parameters())))


def assert_same(own: list[Tensor], expected: list[Tensor]) -> None:
    for i, (one, other) in enumerate(zip(own, expected, strict=True)):
        assert_identical(f"gradient {i}", one, other)


def test_side_streams_are_nobody_elses_while_there_are_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_stream, "_streams", {})
    ring = [torch.cuda.Stream() for _ in range(side_stream.RING)]
    assert len(set(ring)) == side_stream.RING
    assert torch.cuda.Stream() in ring
    for main in ring[:6]:
        side_stream._streams_beside(main)
    streams = [stream for main in ring[:6] for stream in (main, *side_stream._streams_beside(main))]
    assert len(set(streams)) == len(streams) == 6 * (1 + side_stream.STREAMS)
    for main in ring:
        assert main not in side_stream._streams_beside(main)


def test_side_streams_that_are_late(case: tuple[nn.Module, Tensor, list[Tensor]]) -> None:
    model, x, expected = case
    for side in side_stream._streams_beside(torch.cuda.current_stream()):
        with torch.cuda.stream(side):
            torch.cuda._sleep(LATE)
    with cw.side_stream():
        own = gradients(model, x)
    assert_same(own, expected)


def test_an_input_that_is_late(case: tuple[nn.Module, Tensor, list[Tensor]]) -> None:
    model, x, expected = case
    late = torch.full_like(x, math.nan)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()), cw.side_stream():
        torch.cuda._sleep(LATE)
        late.copy_(x)
        own = gradients(model, late)
    torch.cuda.synchronize()
    assert_same(own, expected)


def test_an_input_that_is_freed_early(case: tuple[nn.Module, Tensor, list[Tensor]]) -> None:
    model, x, expected = case
    torch.cuda.synchronize()
    for side in side_stream._streams_beside(torch.cuda.current_stream()):
        with torch.cuda.stream(side):
            torch.cuda._sleep(LATE)
    with cw.side_stream():
        loss = model(x.clone()).square().mean()
        again = [torch.full_like(x, math.nan) for _ in range(8)]  # in whose place the clone may not have been
        own = list(torch.autograd.grad(loss, list(model.parameters())))
    assert len(again) == 8
    assert_same(own, expected)


def test_nothing_waits_for_the_device(case: tuple[nn.Module, Tensor, list[Tensor]]) -> None:
    model, x, _ = case
    with cw.side_stream():
        gradients(model, x)  # libraries set themselves up
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with cw.side_stream():
            gradients(model, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("backward", [True, False], ids=["", "forward alone"])
def test_graphs(case: tuple[nn.Module, Tensor, list[Tensor]], backward: bool) -> None:
    model, x, expected = case
    with cw.side_stream():
        gradients(model, x)
    held: list[Tensor] = []
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), cw.side_stream():
        if backward:
            held = gradients(model, x)
        else:
            model(x)
    for _ in range(20 * backward):
        for one in held:
            one.fill_(math.nan)
        graph.replay()
        assert_same(held, expected)


def test_graphed_callables() -> None:
    torch.manual_seed(0)
    model, x = linear_model(F32)
    cw.convert(model)
    expected = gradients(model, x)

    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            with cw.side_stream():
                y: Tensor = self.inner(x)
            return y

    graphed = torch.cuda.make_graphed_callables(Beside(), (x,))
    for _ in range(3):
        assert_same(gradients(graphed, x), expected)
