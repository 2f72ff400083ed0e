"""Faults in the middle of training: the model and the optimizer are as before, or an error says what happened."""

from __future__ import annotations

import copy
import gc
import resource
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import F32, F64, assert_identical, randn
from emended_helpers import mlp, parameters_of, squares, train
from torch import nn

import consequentialism as cw
from consequentialism.solve.gram import Gram

FORMS = ("convert", "emended")
OPTIONS: dict[str, Any] = {"memory": 0.5, "refresh_every": 2}


def made(form: str, dtype: torch.dtype = F64) -> tuple[nn.Sequential, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = mlp(dtype)
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    if form == "convert":
        cw.convert(model)
    else:
        optimizer = cw.optim.Emended(optimizer, model, **OPTIONS)
    return model, optimizer


def assert_same_run(models: tuple[nn.Module, nn.Module]) -> None:
    for (name, own), expected in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert_identical(name, own.detach(), expected.detach())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("place", ["after forward", "in backward", "before the step"])
def test_an_interrupted_step_leaves_no_trace(form: str, place: str) -> None:
    """The batch is dropped; what follows is bit for bit what it had been without it."""
    model, optimizer = made(form)
    twin, plain = made(form)
    for step in range(5):
        if step in (2, 3):
            optimizer.zero_grad()
            out = model(randn(20, 6, seed=99))
            if place == "in backward":
                out.register_hook(lambda _: (_ for _ in ()).throw(RuntimeError("no")))
                with pytest.raises(RuntimeError, match="no"):
                    squares(out).backward()
            elif place == "before the step":
                squares(out).backward()
        x = randn(20, 6, seed=step)
        train(model, optimizer, x, 1)
        train(twin, plain, x, 1)
    assert_same_run((model, twin))


@pytest.mark.parametrize("nth", [0, 1])
def test_a_root_that_cannot_be_made_leaves_everything(nth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where memory runs out: no weight has moved, and the step can be taken again."""
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(6, 9, dtype=F64), nn.Tanh(), nn.Linear(9, 4, dtype=F64)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [cw.optim.Emended(torch.optim.AdamW(m.parameters(), 0.01), m, **OPTIONS) for m in models]
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, randn(20, 6), 2)
        optimizer.zero_grad()
        squares(model(randn(20, 6, seed=2))).backward()
    own, calls = Gram.root, []

    def failing(*arguments: Any) -> Any:
        calls.append(None)
        if len(calls) == nth + 1:
            raise torch.OutOfMemoryError("no memory")
        return own(*arguments)

    before = parameters_of(models[0])
    monkeypatch.setattr(Gram, "root", failing)
    with pytest.raises(torch.OutOfMemoryError):
        optimizers[0].step()
    monkeypatch.undo()
    for parameter, expected in zip(models[0].parameters(), before, strict=True):
        assert_identical("parameter", parameter.detach(), expected)
    for optimizer in optimizers:
        optimizer.step()
    assert_same_run((models[0], models[1]))


@pytest.mark.parametrize("form", FORMS)
def test_a_checkpoint_cut_short(form: str, tmp_path: Path) -> None:
    model, optimizer = made(form)
    train(model, optimizer, randn(20, 6), 3)
    path = tmp_path / "checkpoint.pt"
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
    before, whole = copy.deepcopy(optimizer.state_dict()), path.read_bytes()
    for share in (0.3, 0.9):
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises((RuntimeError, OSError)):
            optimizer.load_state_dict(torch.load(path)["optimizer"])
    after = optimizer.state_dict()
    for key, value in before["state"][0].items():
        assert_identical(key, torch.as_tensor(after["state"][0][key]), torch.as_tensor(value))


def test_models_train_in_threads_of_their_own() -> None:
    """Several optimizers in coordinates at once, each with its model, as alone."""
    pairs = [made("emended") for _ in range(4)]
    alone, optimizer = made("emended")
    threads = [threading.Thread(target=train, args=(*pair, randn(20, 6), 20)) for pair in pairs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    train(alone, optimizer, randn(20, 6), 20)
    for model, _ in pairs:
        assert_same_run((model, alone))


def resident() -> int:
    """Bytes, the most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


@pytest.mark.parametrize("steps", [200, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("form", FORMS)
def test_memory_stays_flat(form: str, steps: int) -> None:
    model, optimizer = made(form, F32)
    x = randn(20, 6, dtype=F32)
    train(model, optimizer, x, 50)
    count, most = tensors(), resident()
    train(model, optimizer, x, steps - 50)
    assert tensors() <= count  # fewer where something of another test has died meanwhile
    assert resident() - most < 4 * 2**20
