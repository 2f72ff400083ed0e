"""``batch_factors`` with the rest of torch and of the package."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import F64, TRANSFORM, assert_close, assert_identical, randn
from factor_batch_helpers import assert_same, batch_of, calls, gradients, network, pair
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.utils.checkpoint import checkpoint

import consequentialism as cw

__all__ = ["calls"]


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant: bool) -> None:
    alone, batched = pair(widths=(12, 20, 7, 5, 6))

    def train(model: nn.Module) -> None:
        x = randn(8, 12).requires_grad_()
        hidden = checkpoint(model[:4], x, use_reentrant=reentrant)
        model[4:](hidden).square().sum().backward()

    assert_same(alone, batched, train)


def test_hooks_on_saved_tensors() -> None:
    alone, batched = pair()

    def train(model: nn.Module) -> None:
        with torch.autograd.graph.save_on_cpu():
            out = model[:2](randn(8, 12))
        model[2:](out).square().sum().backward()

    assert_same(alone, batched, train)


def test_compiled_autograd() -> None:
    torch._dynamo.reset()
    alone, batched = pair()
    x = randn(8, 12)
    alone(x).square().sum().backward()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        batched(x).square().sum().backward()
    for name, expected in gradients(alone).items():
        assert_close(name, gradients(batched)[name], expected, TRANSFORM[F64])
    torch._dynamo.reset()


def test_compile_in_a_full_graph(calls: list[int]) -> None:
    torch._dynamo.reset()
    alone, batched = pair()
    compiled = torch.compile(batched, fullgraph=True, backend="aot_eager")
    x = randn(8, 12)
    alone(x).square().sum().backward()
    compiled(x).square().sum().backward()
    for name, expected in gradients(alone).items():
        assert_close(name, gradients(batched)[name], expected, TRANSFORM[F64])
    assert calls == []
    torch._dynamo.reset()


def test_a_compiled_half() -> None:
    torch._dynamo.reset()
    alone, batched = pair(widths=(12, 20, 7, 5, 6))
    half = torch.compile(batched[:4], fullgraph=True, backend="aot_eager")
    x = randn(8, 12)
    alone(x).square().sum().backward()
    batched[4:](half(x)).square().sum().backward()
    for name, expected in gradients(alone).items():
        assert_close(name, gradients(batched)[name], expected, TRANSFORM[F64])
    torch._dynamo.reset()


def test_functional_transform() -> None:
    alone, batched = pair()
    x = randn(8, 12)

    def loss(parameters: dict[str, Tensor], model: nn.Module) -> Tensor:
        return functional_call(model, parameters, (x,)).square().sum()

    parameters = {name: p.detach() for name, p in alone.named_parameters()}
    own, expected = (grad(loss)(parameters, model) for model in (batched, alone))
    for name, gradient in expected.items():
        assert_close(name, own[name], gradient, TRANSFORM[F64])
    assert len(batch_of(batched)) == 0


def test_fused_sgd() -> None:
    alone, batched = pair()
    for model in (alone, batched):
        optimizer = cw.optim.FusedSGD(model, 0.1)
        for s in range(2):
            model(randn(8, 12, seed=s)).square().sum().backward()
            optimizer.step()
        optimizer.release()
    for (name, own), expected in zip(batched.named_parameters(), alone.parameters(), strict=True):
        assert_identical(name, own, expected)
    assert_same(alone, batched, lambda model: model(randn(8, 12)).square().sum().backward())


@pytest.fixture
def group(tmp_path: Path) -> Iterator[Any]:
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("torch without gloo")
    dist.init_process_group("gloo", f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


def test_process_group_and_ddp(group: Any, calls: list[int]) -> None:
    alone, batched = pair(process_group=group)
    assert_same(alone, batched, lambda model: model(randn(8, 12)).square().sum().backward())
    assert calls == [], "ranks meet in forward"
    alone, batched = pair()
    ddp = nn.parallel.DistributedDataParallel(batched)
    for s in range(2):
        alone(randn(8, 12, seed=s)).square().sum().backward()
        ddp(randn(8, 12, seed=s)).square().sum().backward()
    for name, expected in gradients(alone).items():
        assert_identical(name, gradients(batched)[name], expected)
    assert sum(calls) == 6


def test_convert_links_and_revert_unlinks() -> None:
    model = nn.Sequential(nn.Embedding(9, 12), network())
    before = {name: set(module.__dict__) for name, module in model.named_modules()}
    state = model.state_dict()
    assert cw.convert(model, batch_factors=True) is model
    batch = batch_of(model)
    assert "recorder" not in model[0].__dict__
    assert list(model.state_dict()) == list(state)
    model.load_state_dict(state)
    assert "batch_factors=True" in repr(model)
    cw.convert(model, filter_fn=lambda module, name: name == "1.0")
    assert model[1][0].recorder is None
    assert model[1][2].recorder is batch
    assert "batch_factors" not in repr(model[1][0])
    cw.revert(model)
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == before


@pytest.mark.parametrize("value", [1, "yes", None])
def test_bad_value_converts_nothing(value: Any) -> None:
    model = network()
    with pytest.raises(TypeError, match="batch_factors must be True or False"):
        cw.convert(model, batch_factors=value)
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_share_a_new_one(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    _, model = pair()
    out = model(randn(8, 12))  # while layers wait
    copied = duplicate(model)
    assert batch_of(copied) is not batch_of(model)
    assert len(batch_of(copied)) == 0
    assert_same(model, copied, lambda m: (out if m is model else m(randn(8, 12))).square().sum().backward())
