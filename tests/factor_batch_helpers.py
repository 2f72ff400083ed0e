"""What the tests of ``batch_factors`` share: a network twice, with layers on their own and batched."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import F64, assert_identical
from torch import Tensor, nn

import consequentialism as cw
from consequentialism.backend import compiled as ops
from consequentialism.nn import factor_batch

WIDTHS = (12, 20, 7, 5)


def network(dtype: torch.dtype = F64, widths: tuple[int, ...] = WIDTHS) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for i, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        layers += [nn.Linear(inputs, outputs, bias=i != 1, dtype=dtype), nn.Tanh()]
    return nn.Sequential(*layers)


def pair(dtype: torch.dtype = F64, widths: tuple[int, ...] = WIDTHS, **options: Any) -> tuple[Any, Any]:
    """The same network with layers on their own, and batched."""
    alone = cw.convert(network(dtype, widths), **options)
    return alone, cw.convert(copy.deepcopy(alone), batch_factors=True, **options)


def batch_of(model: nn.Module) -> factor_batch.FactorBatch:
    (batch,) = {m.recorder for m in model.modules() if isinstance(m, cw.Linear)}
    assert batch is not None
    return batch


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: p.grad for name, p in model.named_parameters()}


def assert_same(alone: nn.Module, batched: nn.Module, train: Callable[[Any], Any]) -> None:
    """``train`` gives both the same gradients and results, bit for bit, and leaves nothing waiting."""
    results = [train(model) for model in (alone, batched)]
    for name, expected in gradients(alone).items():
        assert expected is None or expected.abs().sum() > 0, f"{name}: nothing to compare"
        assert_identical(name, gradients(batched)[name], expected)
    if isinstance(results[0], Tensor):
        assert_identical("result", results[1], results[0])
    del results
    assert len(batch_of(batched)) == 0


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers each preparation in backward had, those on their own as 1."""
    seen: list[int] = []
    together = ops.emended_inputs

    def group(xs: Any, *rest: Any) -> Any:
        seen.append(len(xs))
        return together(xs, *rest)

    def alone(layer: Any) -> None:
        seen.append(1)
        prepare_alone(layer)

    prepare_alone = factor_batch._prepare_alone
    monkeypatch.setattr(ops, "emended_inputs", group)
    monkeypatch.setattr(factor_batch, "_prepare_alone", alone)
    return seen
