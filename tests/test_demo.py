"""The demo's parts that need no training: data sets and models."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

import consequentialism as cw
from consequentialism.errors import UserError
from consequentialism.experiments.data import CLASSES, DIMENSIONS, load
from consequentialism.experiments.models import DIMENSIONS as MODEL_DIMENSIONS
from consequentialism.experiments.models import MODELS, build, check_fits
from consequentialism.experiments.settings import OPTIMIZERS, RECORDED, TARGET, grid, recorded_optimizers

SAMPLE_SHAPES = {1: (1, 40), 2: (1, 28, 28)}


@pytest.mark.parametrize("name", ["digits", "mnist5k", "mnist1d"])
def test_data_are_standardised_and_of_the_stated_dimensions(name: str, tmp_path: Path) -> None:
    data = load(name, tmp_path)
    assert len(data.sample_shape) == 1 + DIMENSIONS[name]
    assert data.train_x.dtype == torch.float32
    assert abs(data.train_x.mean().item()) < 1e-4
    assert abs(data.train_x.std().item() - 1) < 1e-4
    assert sorted(data.train_y.unique().tolist()) == sorted(data.test_y.unique().tolist()) == list(range(CLASSES))
    assert len(data.train_x) == len(data.train_y) > len(data.test_x) == len(data.test_y) > 500
    again = load(name, tmp_path)
    assert torch.equal(data.train_x, again.train_x)
    assert torch.equal(data.test_y, again.test_y)


def test_generating_sequences_leaves_the_global_generators_and_the_folder_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    random.seed(1)
    np.random.seed(1)
    expected = random.random(), np.random.rand()
    random.seed(1)
    np.random.seed(1)
    load("mnist1d", tmp_path)
    assert (random.random(), np.random.rand()) == expected
    assert not list(tmp_path.iterdir())


PAIRS = [(name, dimensions) for name in MODELS for dimensions in SAMPLE_SHAPES]
FITTING = [(name, d) for name, d in PAIRS if MODEL_DIMENSIONS.get(name, d) == d]


@pytest.mark.parametrize(("name", "dimensions"), [pair for pair in PAIRS if pair not in FITTING])
def test_a_model_that_does_not_fit_the_data_names_those_that_do(name: str, dimensions: int) -> None:
    with pytest.raises(UserError, match=f"{name}.*mlp"):
        check_fits(name, dimensions)


@pytest.mark.parametrize(("name", "dimensions"), FITTING)
def test_models_give_scores_and_gradients(name: str, dimensions: int) -> None:
    check_fits(name, dimensions)
    shape = SAMPLE_SHAPES[dimensions]
    model = cw.convert(build(lambda: MODELS[name](shape, CLASSES), seed=3))
    again = build(lambda: MODELS[name](shape, CLASSES), seed=3)
    for own, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(own, other)
    scores = model(torch.randn(5, *shape))
    assert scores.shape == (5, CLASSES)
    scores.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(("data", "model"), RECORDED)
def test_recorded_settings_are_of_the_grid(data: str, model: str) -> None:
    for trial in RECORDED[data, model]:
        assert trial in grid(trial.optimizer, model)
    assert {"sgd", "nag", "rmsprop", "adam", "emended-sgd"} <= set(recorded_optimizers(data, model)) <= set(OPTIMIZERS)
    assert 0.5 < TARGET[data, model] < 1
    check_fits(model, DIMENSIONS[data])
