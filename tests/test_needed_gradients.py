"""Backward computes what the running backward asks for, and every gradient has memory of its own."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from cases import F32, F64, TOLERANCE, Recorder, assert_close, assert_identical, oracle, randn
from torch import Tensor, nn

import consequentialism as cw

PATHS: dict[str, dict[str, Any]] = {
    "eager": {},
    "reference": {"backend": "reference"},
    "cg": {"solver": "cg"},
    "cg, no Gram": {"solver": "cg", "iterations": 1},
}
# Rows, inputs, outputs: an emended input and an inverse are kept, in both forms.
SHAPES = ((12, 20, 40), (40, 12, 50), (12, 40, 9), (50, 12, 17), (8, 5, 1))
PRODUCTS = (
    "mm",
    "matmul",
    "addmm",
    "bmm",
    "mv",
    "addr",
    "weight_grad",
    "input_gram",
    "damped_inverse",
)


def products(run: Any) -> tuple[Any, list[str]]:
    """What ``run`` returns, and the matrix products it made."""
    with Recorder() as recorder:
        result = run()
    operators = [name.split("::")[-1].split(".")[-2] if "." in name else name for name in recorder.names]
    return result, [name.replace("matmul", "mm") for name in operators if name in PRODUCTS]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_the_gradient_of_the_input_alone_is_one_product(path: str, shape: tuple[int, int, int]) -> None:
    rows, inputs, outputs = shape
    model = cw.convert(nn.Sequential(nn.Linear(inputs, outputs)), **PATHS[path])
    x = randn(rows, inputs, dtype=F32).requires_grad_()
    loss = model(x).sum()
    (dx,), made = products(lambda: torch.autograd.grad(loss, x, retain_graph=True))
    assert made == ["mm"], made
    loss.backward()
    assert_identical("dx", x.grad, dx)
    assert model[0].weight.grad is not None
    model.zero_grad()
    loss = model(x).sum()
    _, made = products(lambda: loss.backward(inputs=[x]))
    assert made == ["mm"], made


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_one_gradient_at_a_time_is_that_of_all(path: str, shape: tuple[int, int, int]) -> None:
    rows, inputs, outputs = shape
    for bias in (True, False):
        model = cw.convert(nn.Sequential(nn.Linear(inputs, outputs, bias, dtype=F64)), **PATHS[path])
        x, dy = randn(rows, inputs).requires_grad_(), randn(rows, outputs, seed=1)
        y = model(x)
        leaves = [x, *model.parameters()]
        together = torch.autograd.grad(y, leaves, dy, retain_graph=True)
        for count in (1, 2):
            for some in itertools.combinations(range(len(leaves)), count):
                own = torch.autograd.grad(y, [leaves[i] for i in some], dy, retain_graph=True)
                for i, gradient in zip(some, own, strict=True):
                    assert_close(f"{i} of {some}", gradient, together[i], TOLERANCE[F64])


def test_a_layer_between_computes_nothing_for_its_weight() -> None:
    for options in PATHS.values():
        model = cw.convert(nn.Sequential(nn.Linear(6, 30), nn.Tanh(), nn.Linear(30, 4)), **options)
        x = randn(9, 6, dtype=F32).requires_grad_()
        hidden = model[1](model[0](x))
        loss = model[2](hidden).sum()
        _, made = products(lambda: torch.autograd.grad(loss, hidden, retain_graph=True))  # noqa: B023
        assert made == ["mm"], (options, made)
        _, made = products(lambda: torch.autograd.grad(loss, model[0].weight))  # noqa: B023
        assert made.count("weight_grad") <= 1, (options, made)


def memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_every_gradient_has_memory_of_its_own(path: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    rows, inputs, outputs = shape
    model = cw.convert(nn.Sequential(nn.Linear(inputs, outputs, dtype=dtype)), **PATHS[path])
    model(randn(rows, inputs, dtype=dtype)).backward(randn(rows, outputs, seed=1, dtype=dtype))
    x, dy = randn(rows, inputs, dtype=dtype), randn(rows, outputs, seed=1, dtype=dtype)
    pairs = (
        (model[0].weight.grad, model[0].bias.grad),
        cw.emended_weight_grad(x, dy, **PATHS[path]),
        cw.reference.emended_weight_grad(x, dy),
    )
    for dw, db in pairs:
        assert dw is not None
        assert db is not None
        assert memory(dw) != memory(db)
        for gradient in (dw, db):
            assert gradient.is_contiguous()
            assert gradient.untyped_storage().nbytes() == gradient.nbytes
            gradient.view(-1)
    if path != "cg, no Gram":
        assert_close("dw", pairs[0][0], oracle(x, dy)[0], 1e-3)
