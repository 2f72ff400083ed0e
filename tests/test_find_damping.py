"""`find_damping`: it finds, says what it found, and leaves everything as it was."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from cases import F32, randn
from test_diagnose import state_of
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import consequentialism as cw

FEW: dict[str, Any] = {"dampings": [0.1, 1.0], "rates": [0.5, 1.0], "steps": 3}


def task() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.ReLU(), nn.Linear(8, 2))
    return model, [(randn(16, 6, dtype=F32, seed=i), randn(16, 2, dtype=F32, seed=9 + i)) for i in range(4)]


def optimizer_state(optimizer: torch.optim.Optimizer) -> str:
    torch.set_printoptions(precision=9, profile="full")
    return str(optimizer.state_dict())


def test_an_optimizer_that_chose_its_layers_by_itself() -> None:
    """`optim.Muon` knows its layers by the modules, which a copy does not have."""
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    batches = [(randn(16, 6, dtype=F32), randn(16, 2, dtype=F32))]
    optimizer = cw.optim.Muon(model, 0.02, aux={"lr": 1e-3})
    found = cw.find_damping(model, batches, mse_loss, optimizer=optimizer, dampings=[0.03], rates=[0.02], steps=3)
    assert 0.03 in [tried.damping for tried in found.tries]


@pytest.mark.parametrize("kind", ["class", "adam", "converted", "emended"])
def test_everything_is_as_before(kind: str) -> None:
    model, batches = task()
    if kind == "converted":
        cw.convert(model)
    inner = torch.optim.Adam(model.parameters(), lr=0.01)
    optimizer: Any = {"class": torch.optim.SGD, "emended": None}.get(kind, inner)
    if optimizer is None:
        optimizer = cw.optim.Emended(inner, model)
    mse_loss(model(batches[0][0]), batches[0][1]).backward()
    if kind != "class":
        optimizer.step()
    before, state = state_of(model), optimizer_state(inner)
    found = cw.find_damping(model, batches, mse_loss, optimizer=optimizer, **FEW)
    assert state_of(model) == before
    assert optimizer_state(inner) == state
    assert len(found.tries) == 6
    assert found.options == {"damping": found.damping}
    assert found.target == ("Emended" if kind == "emended" else "convert")
    with pytest.raises(RuntimeError, match="by purpose"):
        cw.find_damping(model, batches, fails, optimizer=optimizer, **FEW)
    assert state_of(model) == before
    assert optimizer_state(inner) == state


def fails(outputs: Tensor, targets: Tensor) -> Tensor:
    if torch.is_grad_enabled():
        torch.rand(1)
        raise RuntimeError("by purpose")
    return mse_loss(outputs, targets)


@pytest.mark.parametrize("scale", ["nlms", "gradient"])
def test_a_trial_is_a_training(scale: Any) -> None:
    batches = [(randn(16, 6, dtype=F32, seed=i), randn(16, 2, dtype=F32, seed=9 + i)) for i in range(5)]
    model = nn.Linear(6, 2)
    found = cw.find_damping(model, batches, mse_loss, dampings=[0.3], rates=[0.5], steps=6, scale=scale)
    losses = {}
    for damping in (None, 0.3):
        own = nn.Linear(6, 2)
        own.load_state_dict(model.state_dict())
        if damping is not None:
            cw.convert(own, damping=damping, scale=scale)
        optimizer = torch.optim.SGD(own.parameters(), lr=0.5)
        for step in range(6):
            optimizer.zero_grad()
            mse_loss(own(batches[step % 4][0]), batches[step % 4][1]).backward()
            optimizer.step()
        losses[damping] = float(mse_loss(own(batches[4][0]), batches[4][1]).detach())
    assert {one.damping: one.loss for one in found.tries} == losses
    assert found.start == float(mse_loss(model(batches[4][0]), batches[4][1]).detach())


def test_the_best_is_chosen_and_shown(tmp_path: Any) -> None:
    model, batches = task()
    found = cw.find_damping(model, iter(batches), mse_loss, dampings=[1.0, 0.1, 1e-6], rates=[0.01, 0.5, 1e6], steps=2)
    assert found.best.loss == min(one.loss for one in found.emended)
    assert any(math.isinf(one.loss) for one in found.tries), "a rate of a million diverges"
    table = str(found).splitlines()
    assert table[0].split() == ["damping", "lr", "0.01", "lr", "0.5", "lr", "1e+06"]
    assert [line.split()[0] for line in table[1:5]] == ["plain", "1e-06", "0.1", "1"]
    assert "diverged" in table[1]
    assert sum(line.count("*") for line in table[1:5]) == 1
    assert f"cw.convert(model, damping={found.damping:g}), lr {found.lr:g}" in table[5]
    assert found.at_border == (table[-1].startswith("The best is at the border"))
    content = json.loads(found.to_json(tmp_path / "found.json"))
    assert len(content["tries"]) == 12
    page = found.to_html(tmp_path / "found.html")
    assert page.count("data:image/png;base64,") == 1
    assert found._repr_html_() in page


def test_groups_keep_their_ratios() -> None:
    model, batches = nn.Linear(6, 2), task()[1]
    groups = [{"params": [model.weight], "lr": 0.2}, {"params": [model.bias], "lr": 0.1}]
    found = cw.find_damping(model, batches, mse_loss, optimizer=torch.optim.SGD(groups), dampings=[1], steps=1)
    assert [one.lr for one in found.emended] == pytest.approx([0.05, 0.1, 0.2, 0.4, 0.8])


def test_bad_input_is_said() -> None:
    model, batches = task()
    with pytest.raises(ValueError, match="at least one batch, got none"):
        cw.find_damping(model, [], mse_loss)
    with pytest.raises(TypeError, match="batches must be iterable, got 3"):
        cw.find_damping(model, 3, mse_loss)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="optimizer must be an optimizer or make one, got 3"):
        cw.find_damping(model, batches, mse_loss, optimizer=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="parameters that are not the model's"):
        cw.find_damping(model, batches, mse_loss, optimizer=torch.optim.SGD(nn.Linear(2, 2).parameters()))
    with pytest.raises(TypeError, match="takes dampings="):
        cw.find_damping(model, batches, mse_loss, damping=1.0)
    with pytest.raises(ValueError, match="dampings must be finite numbers above 0"):
        cw.find_damping(model, batches, mse_loss, dampings=[0.0, 1.0])
    with pytest.raises(TypeError, match="rates must be a list of numbers above 0, got 'x'"):
        cw.find_damping(model, batches, mse_loss, rates="x")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="steps must be an integer above 0"):
        cw.find_damping(model, batches, mse_loss, steps=0)
    with pytest.raises(ValueError, match="no layer that can be emended"):
        cw.find_damping(nn.Sequential(nn.PReLU()), batches, lambda m, b: m(b[0]).sum(), steps=1)
    with pytest.raises(ValueError, match="its parameters want no gradient"):
        cw.find_damping(task()[0].requires_grad_(False), batches, mse_loss, steps=1)
    with pytest.raises(ValueError, match="every trial diverged"):
        cw.find_damping(model, batches, mse_loss, rates=[1e9], dampings=[1.0], steps=3)
    with pytest.raises(ValueError, match="finite loss, got nan"):
        cw.find_damping(model, batches, lambda a, b: (a - b).sum() * math.nan)
