"""`Monitor`: its figures are those of `diagnose`, it is in the model on samples only, and it warns once."""

from __future__ import annotations

import copy
import csv
import math
import pickle
import warnings
from typing import Any

import pytest
import torch
from cases import F32, randn
from test_diagnose import everything
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

import consequentialism as cw
from consequentialism.insight import monitor as module
from consequentialism.insight.monitor import FIGURES


def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        optimizer.step()


def small(dtype: torch.dtype = F32) -> tuple[nn.Module, torch.optim.Optimizer, Tensor, Tensor]:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2)).to(dtype)
    return model, torch.optim.SGD(model.parameters(), lr=0.01), randn(12, 6, dtype=dtype), randn(12, 2, dtype=dtype)


@pytest.mark.parametrize("options", [{}, {"damping": 0.1}, {"damping": 2.0, "damping_mode": "absolute"}])
def test_figures_are_those_of_diagnose(options: Any) -> None:
    model, batch = everything()
    model = cw.convert(model, **options)
    model.tokens.max_norm = None  # type: ignore[union-attr]
    model.drop.p = 0.0  # type: ignore[union-attr]
    report = cw.diagnose(model, batch, cross_entropy)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with cw.Monitor(model, optimizer, rows=1000, warn=False) as monitor:
        cross_entropy(model(batch[0]), batch[1]).backward()
        optimizer.step()
    found = monitor.latest
    assert len(found) == 1 + 5 * len(FIGURES)
    for name in ("wide", "own", "tokens"):  # all rows; of convolutions some samples, and the first group
        layer = report[name]
        assert found[f"{name}/rows"] == layer.rows
        if name == "tokens" and options.get("damping_mode") != "absolute":
            continue  # relative to the indices that were looked at, not to the vocabulary
        for figure in ("mean_share", "effective_rank", "interference", "interference_emended", "cosine"):
            assert found[f"{name}/{figure}"] == pytest.approx(getattr(layer, figure), rel=1e-4), (name, figure)
    assert found["first/rows"] == 20
    assert 0 <= found["first/mean_share"] <= 1
    assert math.isnan(found["own/lost_to_rounding"])
    assert math.isnan(found["own/stale"])


def test_it_is_in_the_model_on_samples_only() -> None:
    model, optimizer, x, y = small()
    seen: list[int] = []
    monitor = cw.Monitor(model, optimizer, every=3, log=lambda step, figures: seen.append(step), warn=False)
    hooks = []
    for _ in range(8):
        hooks.append(sum(len(m._forward_hooks) for m in model.modules()))
        train(model, optimizer, x, y, 1)
    assert hooks == [2, 0, 0, 2, 0, 0, 2, 0]
    assert seen == [0, 3, 6]
    model.eval()
    train(model, optimizer, x, y, 2)
    assert seen == [0, 3, 6, 9]
    assert monitor.latest == {"retries": 0.0}, "eval mode is not looked at"
    monitor.close()
    assert not optimizer._optimizer_step_post_hooks
    assert not optimizer._optimizer_step_pre_hooks


def test_training_is_the_same_bit_for_bit() -> None:
    results = []
    for watched in (False, True):
        torch.manual_seed(1)
        model, optimizer, x, y = small()
        monitor = cw.Monitor(cw.convert(model), optimizer, every=2) if watched else cw.convert(model)
        train(model, optimizer, x, y, 5)
        results.append([p.detach().clone() for p in model.parameters()])
        del monitor
    assert all(map(torch.equal, *results))


class Board:
    def __init__(self) -> None:
        self.scalars: list[tuple[str, float, int]] = []

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.append((name, value, step))


def test_logs_of_every_kind(tmp_path: Any) -> None:
    model, optimizer, x, y = small()
    board, calls = Board(), []
    with cw.Monitor(
        model, optimizer, every=2, log=[board, tmp_path / "run.csv", lambda *a: calls.append(a)]
    ) as monitor:
        train(model, optimizer, x, y, 3)
    with open(tmp_path / "run.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["step"], row["layer"]) for row in rows] == [("0", "0"), ("0", "2"), ("2", "0"), ("2", "2")]
    assert float(rows[-1]["cosine"]) == pytest.approx(monitor.latest["2/cosine"], rel=1e-5)
    assert [step for step, _ in calls] == [0, 2]
    assert calls[-1][1] == monitor.latest
    assert ("consequentialism/2/cosine", monitor.latest["2/cosine"], 2) in board.scalars
    assert all(map(math.isfinite, (value for _, value, _ in board.scalars)))


def warned(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, steps: int = 2) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with cw.Monitor(model, optimizer, every=1):
            train(model, optimizer, x, y, steps)
    return [str(one.message) for one in caught if "consequentialism.Monitor" in str(one.message)]


def test_a_model_that_does_not_train_is_said_once() -> None:
    model, optimizer, x, y = small()
    (said,) = warned(model.eval(), optimizer, x, y)
    assert "step 0: no layer was seen" in said


def test_nothing_wrong_is_no_warning() -> None:
    assert warned(*small()) == []


def test_a_degenerate_gram_is_said_once() -> None:
    model, optimizer, x, y = small()
    (said,) = warned(model, optimizer, 1e-3 * x + 5, y)
    assert "step 0" in said
    assert "rows of layer '0', '2' are alike" in said
    assert "Normalise or centre" in said


def test_dead_inputs_are_said() -> None:
    model, optimizer, x, y = small()
    model[1] = nn.Threshold(100.0, 0.0)
    (said,) = warned(model, optimizer, x, y)
    assert "most inputs of layer '2' are 0" in said


def test_steps_lost_to_rounding_are_said() -> None:
    model, optimizer, x, y = small(torch.bfloat16)
    optimizer.param_groups[0]["lr"] = 1e-5
    (said,) = warned(model, optimizer, x, y)
    assert "steps on layer '0', '2' are lost to rounding" in said
    optimizer.param_groups[0]["lr"] = 3.0
    assert warned(model, optimizer, x, y, 1) == []


def test_retries_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = iter([5, 5, 8, 8])
    monkeypatch.setattr(module.ops, "breakdowns", lambda: next(counts))
    (said,) = warned(*small(), steps=3)
    assert "step 1: 3 factors broke down" in said


@pytest.mark.usefixtures("even_refreshes")
def test_a_stale_memory_is_said() -> None:
    model, inner, x, y = small()
    optimizer = cw.optim.Emended(inner, model, refresh_every=1000)
    with warnings.catch_warnings(record=True) as caught, cw.Monitor(model, optimizer, every=1) as monitor:
        warnings.simplefilter("always")
        train(model, optimizer, x, y, 2)
        assert monitor.latest["0/stale"] == pytest.approx(1, rel=1e-3), "the same inputs"
        train(model, optimizer, 4 * x, y, 1)
        assert monitor.latest["0/stale"] > 8
    (said,) = [str(one.message) for one in caught]
    assert "the memory of consequentialism.optim.Emended is stale for layer '0'" in said


@pytest.mark.usefixtures("even_refreshes")
def test_a_stale_memory_is_as_stale_with_either_root() -> None:
    """Both have one ``S S^T``; a triangular root's square is another matrix."""
    found = []
    for root in ("symmetric", "cholesky"):
        model, _, x, y = small(torch.float64)
        inner = torch.optim.SGD(model.parameters(), 0.0)
        optimizer = cw.optim.Emended(inner, model, refresh_every=1000, root=root)  # type: ignore[arg-type]
        with cw.Monitor(model, optimizer, every=1, warn=False) as monitor:
            train(model, optimizer, x, y, 1)
            train(model, optimizer, x.flip(1) + 1, y, 1)
            found.append(monitor.latest["0/stale"])
    assert found[1] == pytest.approx(found[0], rel=1e-9)
    assert found[0] > 1


def test_a_batch_that_is_not_finite_is_nan_and_no_warning() -> None:
    model, optimizer, x, y = small()
    assert warned(model, optimizer, x * math.nan, y, 1) == []


def test_a_model_can_be_copied_and_pickled_on_a_sampled_step() -> None:
    """The copy is watched by nobody."""
    model, optimizer, x, y = small()
    with cw.Monitor(model, optimizer, every=1) as monitor:
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            nn.functional.mse_loss(copied(x), y).backward()
        assert not monitor._taken


def test_bad_input_is_said() -> None:
    model, optimizer, *_ = small()
    with pytest.raises(TypeError, match="model must be a torch"):
        cw.Monitor(3, optimizer)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="optimizer must be a torch"):
        cw.Monitor(model, 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="every must be an integer above 0, got 0"):
        cw.Monitor(model, optimizer, every=0)
    with pytest.raises(TypeError, match="log must be a function, a path"):
        cw.Monitor(model, optimizer, log=3)
    with pytest.raises(ValueError, match="no layer that can be emended"):
        cw.Monitor(nn.LayerNorm(3), optimizer)
    with pytest.raises(ValueError, match="optimizer has none of the model's parameters"):
        cw.Monitor(nn.Linear(3, 3), optimizer)
    with pytest.raises(TypeError, match="warn must be True or False, got 1"):
        cw.Monitor(model, optimizer, warn=1)  # type: ignore[arg-type]
    assert not optimizer._optimizer_step_post_hooks, "nothing half-done"
    assert not any(m._forward_hooks for m in model.modules())
