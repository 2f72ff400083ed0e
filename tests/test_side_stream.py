"""`side_stream` with stand-ins for streams: what runs where, in which order, and that nothing is left outstanding."""

from __future__ import annotations

import gc
import itertools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import BF16, F16, F32, F64, assert_identical, randn
from fake_streams import Misordered, World, world
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

import consequentialism as cw
from consequentialism.autograd import side_stream
from consequentialism.backend import compiled

__all__ = ["world"]  # a fixture


def linear_model(dtype: torch.dtype = F32, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Linear(9, 40), nn.ReLU(inplace=True), nn.Linear(40, 5, bias=False), nn.Tanh(), nn.Linear(5, 3)
    )
    return cw.convert(layers.to(dtype), **options)


def conv_model(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3, groups=2), nn.ConvTranspose2d(4, 2, 2)
    )
    return cw.convert(layers, **options)


def image() -> Tensor:
    return randn(3, 2, 6, 6, dtype=F32)


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    x = x.clone().requires_grad_()
    model(x).square().sum().backward()
    assert x.grad is not None
    return [x.grad, *(parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None)]


def assert_same(own: list[Tensor], expected: list[Tensor]) -> None:
    for i, (one, other) in enumerate(zip(own, expected, strict=True)):
        assert_identical(f"gradient {i}", one, other)


def rows(dtype: torch.dtype = F32) -> Tensor:
    return randn(7, 9, dtype=dtype)


CASES: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "float64": lambda: (linear_model(F64), rows(F64)),
    "float32": lambda: (linear_model(), rows()),
    "bfloat16": lambda: (linear_model(BF16), rows(BF16)),
    "float16": lambda: (linear_model(F16), rows(F16)),
    "primal": lambda: (linear_model(), randn(60, 9, dtype=F32)),
    "absolute": lambda: (linear_model(damping=0.5, damping_mode="absolute"), rows()),
    "cg": lambda: (linear_model(solver="cg"), randn(60, 9, dtype=F32)),
    "reference": lambda: (linear_model(backend="reference"), rows()),
    "strided": lambda: (linear_model(), randn(9, 7, dtype=F32).T),
    "convolutions": lambda: (conv_model(), image()),
    "convolutions of few rows": lambda: (conv_model(), image()[:1, :, :3, :3]),
    "convolutions by cg": lambda: (conv_model(solver="cg"), image()),
}


@pytest.mark.parametrize("name", CASES)
def test_the_same_bits_in_an_order_that_a_gpu_must_keep(world: World, name: str) -> None:
    model, x = CASES[name]()
    expected = gradients(model, x)
    assert not world.beside()
    for _ in range(2):
        with cw.side_stream():
            own = gradients(model, x)
        assert_same(own, expected)
    assert world.beside()
    assert all(world.current.knows(side, side.now()) for side in world.sides)


BROKEN: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "backward does not wait": lambda patch: patch.setattr(side_stream.Ready, "wait", lambda ready, made: None),
    "backward records nothing": lambda patch: patch.setattr(
        side_stream.Ready, "wait", lambda ready, made: torch.cuda.current_stream().wait_event(ready.event)
    ),
    "forward records nothing": lambda patch: patch.setattr(Tensor, "record_stream", lambda tensor, stream: None),
    "the input is not waited for": lambda patch: patch.setattr("fake_streams.Stream.wait_stream", lambda *_: None),
}


@pytest.mark.parametrize("name", BROKEN)
def test_stand_ins_see_what_is_left_out(world: World, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    model, x = linear_model(), rows()
    BROKEN[name](monkeypatch)
    with pytest.raises(Misordered):  # noqa: PT012
        with cw.side_stream():
            gradients(model, x)
        gc.collect()
        world.check()
    world.problems.clear()


def test_what_no_backward_waited_for_is_joined_at_the_end(world: World) -> None:
    model, x = linear_model(), rows()

    def fail() -> None:
        with cw.side_stream():
            model(x)
            assert not all(world.current.knows(side, side.now()) for side in world.sides)
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        fail()
    assert world.beside()
    assert not side_stream.is_open()
    assert all(world.current.knows(side, side.now()) for side in world.sides)


def test_a_layer_that_fails_beside_leaves_its_input_recorded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(x: Tensor, *_: Any) -> Any:
        x.sum()
        raise ArithmeticError

    monkeypatch.setattr("consequentialism.functional.linear.prepare", failing)
    with pytest.raises(ArithmeticError), cw.side_stream():
        linear_model()(rows() + 1)
    assert all(world.current.knows(side, side.now()) for side in world.sides)


def test_backward_after_the_scope(world: World) -> None:
    model, x = linear_model(), rows()
    expected = gradients(model, x)
    model.zero_grad()
    with cw.side_stream():
        loss = model(x).square().sum()
    loss.backward()
    assert_same([parameter.grad for parameter in model.parameters()], expected[1:])  # type: ignore[misc]


def test_nothing_runs_where_nothing_is_needed(world: World) -> None:
    model, x = linear_model(), rows()
    with cw.side_stream():
        with torch.no_grad():
            model(x)
        with torch.inference_mode():
            model(x)
        for layer in model:
            for name, parameter in layer.named_parameters():
                parameter.requires_grad_(name == "bias")
        model(x)
        model.requires_grad_(False)
        model(x)
    assert not world.beside()


def test_two_backwards_and_a_second_derivative(world: World) -> None:
    model, x = linear_model(), rows()
    parameters = list(model.parameters())
    expected = gradients(model, x)[1:]
    with cw.side_stream():
        loss = model(x).square().sum()
        for _ in range(2):
            assert_same(list(torch.autograd.grad(loss, parameters, retain_graph=True)), expected)
        again = torch.autograd.grad(loss, parameters, create_graph=True)
        with pytest.raises(RuntimeError, match="no derivative"):
            torch.autograd.grad(again[0].sum(), parameters)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints(world: World, reentrant: bool) -> None:
    model, x = linear_model(), rows()
    expected = gradients(model, x)

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = checkpoint(self.inner, x, use_reentrant=reentrant)
            return y

    with cw.side_stream():
        assert_same(gradients(Checkpointed(), x), expected)
    assert bool(world.beside()) == reentrant  # under hooks for saved tensors nothing runs beside; here none are left


def test_hooks_that_read_what_is_saved(world: World) -> None:
    model, x = linear_model(), rows()
    expected = gradients(model, x)
    with cw.side_stream(), save_on_cpu():
        assert_same(gradients(model, x), expected)
    assert not world.beside()


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_an_input_that_was_changed_in_place_is_refused(world: World, kind: str) -> None:
    model, x = (linear_model(), rows()) if kind == "linear" else (conv_model(), image())
    with cw.side_stream():
        loss = model(x).sum()
        for side in world.sides:  # the change itself comes in order
            world.current.wait_stream(side)
        x.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_outputs_may_be_changed_in_place(world: World) -> None:
    model, x = linear_model(), rows()
    with cw.side_stream():
        y = model(x)
        y += 1
        y.sum().backward()
    assert world.beside()


def test_captures(world: World) -> None:
    model, x = linear_model(), rows()
    expected = gradients(model, x)
    with world.captured(), cw.side_stream():
        own = gradients(model, x)
    assert_same(own, expected)
    with world.captured(), cw.side_stream():  # nobody runs backward
        model(x)
    assert len({stream for stream, _ in world.ran if stream in world.sides}) == 6  # of two captures, three layers each


def test_forward_and_backward_in_captures_of_their_own(world: World) -> None:
    model, x = linear_model(), rows()
    expected = gradients(model, x)[1:]
    with world.captured() as stream, cw.side_stream():
        loss = model(x).square().sum()
    with world.on(stream):
        assert_same(list(torch.autograd.grad(loss, list(model.parameters()))), expected)
    world.current.wait_stream(stream)
    assert world.beside()


def test_a_scope_around_a_capture_does_nothing_in_it(world: World) -> None:
    model, x = linear_model(), rows()
    with cw.side_stream():
        with world.captured():
            model(x)
        assert not world.beside()
        model(x)
    assert world.beside()


def test_each_stream_has_side_streams_of_its_own(world: World) -> None:
    model, x = linear_model(), rows()
    expected = gradients(model, x)
    other = torch.cuda.Stream()
    with cw.side_stream():
        assert_same(gradients(model, x), expected)
        first = {stream for stream, _ in world.ran if stream in world.sides}
        model.zero_grad()
        other.wait_stream(world.current)
        with world.on(other):  # type: ignore[arg-type]
            assert_same(gradients(model, x), expected)
    world.current.wait_stream(other)  # type: ignore[arg-type]
    second = {stream for stream, _ in world.ran if stream in world.sides} - {other}
    assert (len(first), len(second)) == (3, 6)


def test_side_streams_are_nobody_elses(world: World) -> None:
    mains = [torch.cuda.Stream() for _ in range(6)]
    for _ in range(side_stream.RING - len(mains) - 2):  # two more, and torch begins again
        torch.cuda.Stream()
    for main in mains:
        side_stream._streams_beside(main)
    streams = [stream for main in mains for stream in (main, *side_stream._streams_beside(main))]
    assert len(set(streams)) == len(streams) == len(mains) * (1 + side_stream.STREAMS)


def test_a_side_stream_that_becomes_a_main_stream_is_replaced(world: World) -> None:
    main: Any = world.current
    other = side_stream._streams_beside(main)[1]
    own = side_stream._streams_beside(other)
    sides = side_stream._streams_beside(main)
    assert len({main, other, *own, *sides}) == 2 + 2 * side_stream.STREAMS


def test_side_streams_are_nobody_elses_when_torch_has_no_more(world: World) -> None:
    model, x = linear_model(), rows()
    expected = gradients(model, x)
    mains: list[Any] = [world.current, *(torch.cuda.Stream() for _ in range(8))]
    for main in mains:
        main.wait_stream(world.current)
        with world.on(main), cw.side_stream():
            assert_same(gradients(model, x), expected)
        world.current.wait_stream(main)
    sides = [side_stream._streams_beside(main) for main in mains]
    assert list(map(len, sides)) == [side_stream.STREAMS] * 6 + [0] * 3
    assert len({*mains, *itertools.chain(*sides)}) == 9 + 6 * side_stream.STREAMS


def test_a_capture_beside_more_streams_than_torch_has(world: World) -> None:
    model, x = linear_model(), rows()
    expected = gradients(model, x)
    mains: list[Any] = [torch.cuda.Stream() for _ in range(8)]
    for main in mains:
        main.wait_stream(world.current)
        side_stream._streams_beside(main)
    with world.captured(), cw.side_stream():
        model(x)
        for main in mains:  # as other threads do meanwhile
            with world.on(main), cw.side_stream():
                assert_same(gradients(model, x), expected)
    for main in mains:
        world.current.wait_stream(main)


def test_layers_take_side_streams_in_turn(world: World) -> None:
    if compiled.module is None:
        pytest.skip("no compiled kernels")
    model = cw.convert(nn.Sequential(*(nn.Linear(4, 4) for _ in range(side_stream.STREAMS + 1))))
    with cw.side_stream():
        gradients(model, randn(3, 4, dtype=F32))
    taken = [stream for stream, name in world.ran if stream in world.sides and "consequentialism" in name]
    assert taken == [*world.sides, world.sides[0]]


def test_other_threads_and_inner_scopes(world: World) -> None:
    found = []
    with cw.side_stream():
        thread = threading.Thread(target=lambda: found.append(side_stream.is_open()))
        thread.start()
        thread.join()
        with cw.side_stream():
            linear_model()(rows())
        assert all(world.current.knows(side, side.now()) for side in world.sides)
        assert side_stream.is_open()
    assert found == [False]
    assert not side_stream.is_open()


def test_transforms_stay_on_their_stream(world: World) -> None:
    layer, x = cw.Linear(5, 4), randn(3, 5, dtype=F32)
    parameters = {name: value.detach() for name, value in layer.named_parameters()}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        y: Tensor = torch.func.functional_call(layer, parameters, x)
        return y.sum()

    expected = torch.func.grad(loss)(parameters)
    with cw.side_stream():
        own = torch.func.grad(loss)(parameters)
    assert_same(list(own.values()), list(expected.values()))
    assert not world.beside()


def test_a_process_group_stays_on_its_stream(world: World, one_process: None) -> None:
    layer = cw.Linear(5, 4, process_group=torch.distributed.group.WORLD)
    with cw.side_stream():
        layer(randn(3, 5, dtype=F32)).sum().backward()
    assert not world.beside()


def test_a_step_in_backward_stays_on_its_stream(world: World) -> None:
    model = linear_model()
    optimizer = cw.optim.FusedSGD(model, lr=0.1)
    with cw.side_stream():
        model(rows()).sum().backward()
        optimizer.step()
    assert not world.beside()


def test_small_layers_are_not_left_to_backward(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    plan = cw.functional.linear.cost.plan  # type: ignore[attr-defined]

    def planned(*arguments: Any) -> Any:
        asked.append(arguments[4])
        return plan(*arguments)

    monkeypatch.setattr("consequentialism.functional.linear.cost.plan", planned)
    monkeypatch.setattr(cw.ops, "LIMITS", cw.ops.LIMITS._replace(fused_rows=128))
    layer, x = cw.Linear(5, 4), randn(3, 5, dtype=F32)
    layer(x)
    with cw.side_stream():
        layer(x)
    assert asked == [128, 0]


def test_on_the_cpu_it_does_nothing() -> None:
    model, x = linear_model(), rows()
    expected = gradients(model, x)
    with cw.side_stream():
        assert_same(gradients(model, x), expected)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_layers_take_no_part() -> None:
    layer, x = cw.Linear(9, 4), rows()
    expected = gradients(layer, x)

    def forward(x: Tensor) -> Tensor:
        with cw.side_stream():
            y: Tensor = layer(x)
        return y

    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    layer.zero_grad()
    x = x.clone().requires_grad_()
    with cw.side_stream():
        compiled(x).square().sum().backward()
    for one, other in zip([x.grad, *(parameter.grad for parameter in layer.parameters())], expected, strict=True):
        torch.testing.assert_close(one, other)
