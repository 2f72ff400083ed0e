"""`Emended` and torch.compile: two graphs, with recording and without, and the numbers of eager mode."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import F64, assert_close, assert_identical, randn
from emended_helpers import EXACT, squares
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import consequentialism as cw

pytestmark = pytest.mark.usefixtures("fresh_compiler")


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(6, 9, dtype=F64), nn.Tanh(), nn.Linear(9, 6, dtype=F64))
        self.outer = nn.Linear(6, 4, dtype=F64)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(checkpoint(self.inner, x, use_reentrant=False))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(6, 6, dtype=F64) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return (self.q(x) @ self.k(x).mT).softmax(-1) @ self.v(x)


MODELS = {
    "linear": (
        lambda: nn.Sequential(nn.Linear(6, 9, dtype=F64), nn.ReLU(inplace=True), nn.Linear(9, 4, dtype=F64)),
        randn(20, 6),
    ),
    "convolution": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3, groups=1, dtype=F64), nn.ReLU(), nn.ConvTranspose2d(4, 2, 3, stride=2, dtype=F64)
        ),
        randn(5, 3, 6, 6),
    ),
    "embedding": (
        lambda: nn.Sequential(nn.Embedding(7, 6, dtype=F64), nn.Linear(6, 4, dtype=F64)),
        torch.arange(40) % 7,
    ),
    "shared": (Attention, randn(3, 7, 6)),
}


@pytest.mark.parametrize("name", MODELS)
def test_two_graphs_with_the_numbers_of_eager_mode(name: str) -> None:
    make, x = MODELS[name]
    _compare(make(), x)


def test_checkpointing_in_a_graph() -> None:
    _compare(Checkpointed(), randn(20, 6))


def _compare(model: nn.Module, x: Tensor) -> None:
    twin = copy.deepcopy(model)
    options = {"refresh_every": 3, "memory": 0.5}
    optimizers = [cw.optim.Emended(torch.optim.AdamW(m.parameters(), 0.01), m, **options) for m in (model, twin)]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for _ in range(8):
        for forward, optimizer in ((compiled, optimizers[0]), (twin, optimizers[1])):
            for part in (x, x):  # two micro-batches
                squares(forward(part)).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert counter.frame_count == 2
    for (name, own), expected in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert_close(name, own, expected, EXACT)
    for one, other in zip(optimizers[0].units, optimizers[1].units, strict=True):
        first, second = optimizers[0].state[one.weight], optimizers[1].state[other.weight]
        assert_close("rows", first["gram_rows"], second["gram_rows"], EXACT)
        assert_close("moment", first["input_gram"], second["input_gram"], EXACT)
    if isinstance(model, Attention):
        assert optimizers[0].state[model.q.weight]["root"] is optimizers[0].state[model.v.weight]["root"]


def test_compiled_before_the_optimizer_was_made_is_named() -> None:
    model = nn.Sequential(nn.Linear(6, 9, dtype=F64), nn.Tanh(), nn.Linear(9, 4, dtype=F64))
    compiled = torch.compile(model, backend="eager")
    squares(compiled(randn(20, 6))).backward()
    optimizer = cw.optim.Emended(torch.optim.SGD(model.parameters(), 0.1), compiled)
    assert [unit.name for unit in optimizer.units] == ["0", "2"]
    squares(compiled(randn(20, 6))).backward()
    with pytest.warns(UserWarning, match="has seen no input of '0', '2'"):
        optimizer.step()


def test_a_compiled_step_runs_outside_of_graphs() -> None:
    model = nn.Sequential(nn.Linear(6, 9, dtype=F64), nn.Tanh(), nn.LayerNorm(9, dtype=F64), nn.Linear(9, 4, dtype=F64))
    twin = copy.deepcopy(model)
    own, other = (cw.optim.Emended(torch.optim.AdamW(m.parameters(), 0.01), m, refresh_every=3) for m in (model, twin))
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(own.step, backend=counter)
    for _ in range(5):
        for network, optimizer, step in ((model, own, compiled), (twin, other, other.step)):
            optimizer.zero_grad()
            squares(network(randn(20, 6))).backward()
            step()
    assert counter.frame_count == 0
    for parameter, expected in zip(model.parameters(), twin.parameters(), strict=True):
        assert_identical("parameter", parameter.detach(), expected.detach())
    squares(model(randn(20, 6))).backward()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"optim\.Emended\.step: what it does depends on the host"):
        torch.compile(own.step, backend="eager", fullgraph=True)()


class Reads(TorchDispatchMode):
    """Names the operations by which a host reads what a device has."""

    def __init__(self, allowed: Tensor) -> None:
        super().__init__()
        self.allowed, self.found = allowed, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::")
        reads = name in ("_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select")
        if reads and args[0].untyped_storage().data_ptr() != self.allowed.untyped_storage().data_ptr():
            self.found.append(name)
        return func(*args, **(kwargs or {}))


CAPTURED: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "SGD": lambda m: cw.optim.Emended(torch.optim.SGD(m.parameters(), torch.tensor(0.1), momentum=0.9), m),
    "AdamW": lambda m: cw.optim.Emended(
        torch.optim.AdamW(m.parameters(), torch.tensor(0.01), weight_decay=0.1, capturable=True), m
    ),
    "Muon": lambda m: cw.optim.Emended(torch.optim.Muon(m.parameters(), 0.01), m, refresh_every=10),
}


@pytest.mark.usefixtures("even_refreshes")
@pytest.mark.parametrize("name", CAPTURED)
def test_between_refreshes_the_host_reads_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And roots stay where they are: what a CUDA graph asks of a step, which only a GPU can capture."""
    model = nn.Sequential(nn.Linear(6, 9, False), nn.Tanh(), nn.Linear(9, 4, False))
    optimizer = CAPTURED[name](model)
    x = randn(20, 6, dtype=torch.float32)
    loss = squares(model(x))
    loss.backward()
    optimizer.step()
    places = [optimizer.state[p]["root"].data_ptr() for p in model.parameters()]
    assert not optimizer.is_recording
    with Reads(optimizer._steps) as reads:
        optimizer.zero_grad()
        squares(model(x)).backward()
        optimizer.step()
    assert reads.found == []
    monkeypatch.setattr(cw._torch, "is_capturing", lambda: True)
    steps = int(optimizer._steps)
    optimizer.step()
    assert int(optimizer._steps) == steps  # a capture takes none
    with pytest.raises(ValueError, match="steps must be at least 1 and at most 8, where a refresh is due, got 9"):
        optimizer.replayed(9)
    with pytest.raises(TypeError, match=r"steps must be an integer of at least 1, got 1\.5"):
        optimizer.replayed(1.5)
    optimizer.replayed()
    optimizer.replayed(7)
    assert optimizer.is_recording
    with pytest.raises(ValueError, match="steps must be taken eagerly now, where a refresh is due, got 1"):
        optimizer.replayed()
    squares(model(x + 1)).backward()
    with pytest.raises(RuntimeError, match="a CUDA graph cannot hold: take it eagerly"):
        optimizer.step()
    monkeypatch.undo()
    before = optimizer.state[model[0].weight]["root"].clone()
    optimizer.step()
    assert [optimizer.state[p]["root"].data_ptr() for p in model.parameters()] == places
    assert (optimizer.state[model[0].weight]["root"] - before).abs().max() > 0
