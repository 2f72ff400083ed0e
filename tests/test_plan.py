"""A call is planned once, whatever path it takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import F32, randn
from torch import nn

import consequentialism as cw
from consequentialism import precision
from consequentialism.optim import FusedSGD
from consequentialism.solve import cost

PATHS: dict[str, dict[str, Any]] = {
    "eager": {},
    "reference": {"backend": "reference"},
    "cg": {"solver": "cg"},
    "half types": {"dtype": torch.bfloat16},
    "absolute": {"damping_mode": "absolute"},
}


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[cost.Plan]:
    """The plans that are chosen, in order."""
    chosen: list[cost.Plan] = []
    plan = cost.plan

    def counted(*arguments: Any) -> cost.Plan:
        chosen.append(plan(*arguments))
        return chosen[-1]

    monkeypatch.setattr(cost, "plan", counted)
    return chosen


@pytest.mark.parametrize("shape", [(12, 20, 40), (40, 12, 50), (12, 40, 9), (50, 12, 17)], ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_once_in_forward_and_never_in_backward(path: str, shape: tuple[int, int, int], plans: list[cost.Plan]) -> None:
    rows, inputs, outputs = shape
    options = dict(PATHS[path])
    dtype = options.pop("dtype", F32)
    x, dy = randn(rows, inputs, dtype=dtype), randn(rows, outputs, seed=1, dtype=dtype)
    layer = cw.convert(nn.Sequential(nn.Linear(inputs, outputs, dtype=dtype)), **options)
    y = layer(x)
    assert len(plans) == 1
    y.backward(dy)
    assert len(plans) == 1
    plans.clear()
    optimizer = FusedSGD(layer, 0.1)
    optimizer.zero_grad()
    layer(x).backward(dy)
    optimizer.step()
    assert len(plans) == 1
    plans.clear()
    cw.emended_weight_grad(x, dy, **options)
    assert len(plans) == 1
    plans.clear()
    weight = torch.zeros(outputs, inputs, dtype=dtype)
    torch.func.grad(lambda w: (cw.emended_linear(x, w, **options) * dy).sum())(weight)
    assert len(plans) == 1
    plans.clear()
    with torch.no_grad():
        layer(x)
    assert plans == []


def test_one_place_knows_which_types_keep_the_digits() -> None:
    assert precision.gram_dtype(100, 100, F32, 1.0, "relative", "cpu") == F32
    assert precision.gram_dtype(100, 100, F32, 1e-3, "relative", "cpu") == torch.float64
    assert precision.gram_dtype(100, 100, F32, 1e-3, "relative", "mps") == F32
    assert precision.gram_dtype(100, 100, torch.bfloat16, 1.0, "absolute", "cuda") == torch.float64
    assert precision.gram_dtype(100, 100, torch.bfloat16, 1.0, "relative", "cuda") == F32
    assert precision.gram_type(9, 12, F32, 1e-3, "absolute", "cpu") == (torch.float64, precision.MAX_FLOAT32_CONDITION)
    assert precision.gram_type(9, 12, torch.float64, 1e-3, "absolute", "cpu") == (torch.float64, 0)
    assert precision.gram_type(9, 12, F32, 1e-3, "absolute", "mps") == (F32, 0)
    assert not precision.keeps_digits(100, 100, torch.bfloat16, 1.0, "relative")
    assert precision.keeps_digits(100, 100, torch.float64, 1e-9, "relative")
