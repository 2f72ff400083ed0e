"""In-place operations on an emended layer's output, which torch's own layers allow."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import BF16, DTYPES, F32, F64, TOLERANCE, assert_close, assert_grads_close, assert_identical, oracle, randn
from torch import Tensor, nn

import consequentialism as cw
from consequentialism.optim import FusedSGD

pytestmark = pytest.mark.usefixtures("fresh_compiler")

LEADING = ((), (6,), (2, 3), (2, 1, 3), (1, 2, 3, 1))
PATHS: dict[str, dict[str, Any]] = {
    "eager": {},
    "reference": {"backend": "reference"},
    "cg": {"solver": "cg"},
}
OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu_": lambda y: y.relu_(),
    "dropout": nn.Dropout(0.0, inplace=True),
    "add_": lambda y: y.add_(torch.ones_like(y)),
    "mul_": lambda y: y.mul_(torch.full_like(y, 0.5)),
    "masked_fill_": lambda y: y.masked_fill_(y > 0.3, 0.0),
}


def layers(dtype: torch.dtype = F64, bias: bool = True, **options: Any) -> nn.Module:
    return cw.convert(nn.Sequential(nn.Linear(7, 5, bias, dtype=dtype)), **options)


def errors(operation: Callable[[Tensor], Tensor], y: Tensor, dy: Tensor) -> Tensor:
    """The gradient of ``y`` where ``dy`` is that of the operation's result."""
    y = y.detach().requires_grad_()
    return torch.autograd.grad(operation(y.clone()), y, dy)[0]


@pytest.mark.parametrize("leading", LEADING, ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("path", PATHS)
def test_gradients_are_those_of_the_changed_output(path: str, operation: str, leading: tuple[int, ...]) -> None:
    run = OPERATIONS[operation]
    for leaf in (False, True):
        for bias in (False, True):
            model, x = layers(bias=bias, **PATHS[path]), randn(*leading, 7).requires_grad_(leaf)
            dy = randn(*leading, 5, seed=1)
            layer = model[0]
            y = nn.functional.linear(x.detach(), layer.weight.detach(), layer.bias.detach() if bias else None)
            own = run(model(x))
            assert_close("y", own, run(y.clone()), TOLERANCE[F64])
            own.backward(dy)
            flat_x, flat_dy = x.detach().reshape(-1, 7), errors(run, y, dy).reshape(-1, 5)
            expected = oracle(flat_x, flat_dy, bias)
            bound = 1e-4 if path == "cg" else TOLERANCE[F64]
            assert_grads_close((layer.weight.grad, layer.bias.grad if bias else None), expected, bound)
            if leaf:
                assert_close("dx", x.grad, (flat_dy @ layer.weight.detach()).reshape(x.shape), TOLERANCE[F64])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_all_types(path: str, dtype: torch.dtype) -> None:
    model, x = layers(dtype, **PATHS[path]), randn(2, 3, 7, dtype=dtype)
    twin = copy.deepcopy(model)
    dy = randn(2, 3, 5, seed=1, dtype=dtype)
    model(x).relu_().backward(dy)
    twin(x).relu().backward(dy)
    assert_identical("dw", model[0].weight.grad, twin[0].weight.grad)
    assert_identical("db", model[0].bias.grad, twin[0].bias.grad)


@pytest.mark.parametrize("leading", LEADING, ids=str)
def test_fused_sgd(leading: tuple[int, ...]) -> None:
    model, x, dy = layers(), randn(*leading, 7), randn(*leading, 5, seed=1)
    twin = copy.deepcopy(model)
    optimizer, plain = FusedSGD(model, 0.1), torch.optim.SGD(twin.parameters(), 0.1)
    model(x).relu_().backward(dy)
    optimizer.step()
    twin(x).relu().backward(dy)
    plain.step()
    for name, parameter in twin.named_parameters():
        assert_close(name, model.get_parameter(name), parameter, TOLERANCE[F64])


@pytest.mark.parametrize("path", PATHS)
def test_autocast(path: str) -> None:
    model, x, dy = layers(F32, **PATHS[path]), randn(2, 3, 7, dtype=F32), randn(2, 3, 5, seed=1, dtype=BF16)
    twin = copy.deepcopy(model)
    with torch.autocast("cpu", BF16):
        own, expected = model(x).relu_(), twin(x).relu()
    own.backward(dy)
    expected.backward(dy)
    assert_identical("dw", model[0].weight.grad, twin[0].weight.grad)


@pytest.mark.parametrize("leading", LEADING, ids=str)
@pytest.mark.parametrize("path", ["eager", "reference", "cg"])
def test_compiled(path: str, leading: tuple[int, ...]) -> None:
    model, x, dy = layers(**PATHS[path]), randn(*leading, 7), randn(*leading, 5, seed=1)
    twin = copy.deepcopy(model)
    torch.compile(lambda x: model(x).relu_(), backend="aot_eager", fullgraph=True)(x).backward(dy)
    twin(x).relu().backward(dy)
    assert_close("dw", model[0].weight.grad, twin[0].weight.grad, TOLERANCE[F64])
    assert_close("db", model[0].bias.grad, twin[0].bias.grad, TOLERANCE[F64])
