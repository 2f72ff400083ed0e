"""One place where something else takes over a linear layer's forward."""

from __future__ import annotations

import copy
import pickle

from cases import F64, TOLERANCE, assert_close, assert_identical, randn
from torch import Tensor, nn

import consequentialism as cw
from consequentialism.functional.linear import emended_linear_with
from consequentialism.optim import FusedSGD, LayerStep


class Doubled:
    """A recorder that doubles what the layer returns."""

    label = "doubled=True"

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, options: cw.Options) -> Tensor:
        return 2 * emended_linear_with(x, weight, bias, options)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 4, bias=False)).to(F64)


def test_a_recorder_serves_forward_and_is_shown() -> None:
    layer, x = cw.Linear(5, 3, dtype=F64), randn(4, 5)
    plain = layer(x)
    layer.attach(Doubled())
    assert_identical("y", layer(x), 2 * plain)
    assert "doubled=True" in repr(layer)
    layer.attach(None)
    assert_identical("y", layer(x), plain)
    assert "recorder" not in layer.__dict__


def test_an_optimizer_lies_above_another_recorder() -> None:
    model, below = cw.convert(network()), Doubled()
    model[0].attach(below)
    optimizer = FusedSGD(model, 0.1)
    assert isinstance(model[0].recorder, LayerStep)
    assert "doubled=True" in repr(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(other[0].recorder, Doubled)
        assert other[2].recorder is None
    cw.convert(model, damping=0.5)
    assert isinstance(model[0].recorder, LayerStep)
    optimizer.release()
    assert model[0].recorder is below
    assert model[2].recorder is None


def test_revert_leaves_nothing_of_any() -> None:
    model = network()
    before = {name: set(module.__dict__) for name, module in model.named_modules()}
    cw.convert(model)
    model[2].attach(Doubled())
    optimizer = FusedSGD(model, 0.1)
    cw.revert(model)
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == before
    x = randn(8, 12)
    model(x).sum().backward()
    twin = copy.deepcopy(model)
    twin.zero_grad()
    twin(x).sum().backward()
    for own, expected in zip(model.parameters(), twin.parameters(), strict=True):
        assert_close("gradient", own.grad, expected.grad, TOLERANCE[F64])
    optimizer.release()
