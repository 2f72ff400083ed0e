"""The plan that keeps x alone and leaves all to one op in backward, a GPU's for small layers; here on the CPU."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import (
    BF16,
    DTYPES,
    F32,
    F64,
    TOLERANCE,
    assert_close,
    assert_grads_close,
    assert_identical,
    needs_kernels,
    oracle,
    randn,
)
from fused_sgd_helpers import assert_steps_as_sgd, layers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import consequentialism as cw
from consequentialism import Options, reference
from consequentialism.autograd.kept import EmendedInput, FusedCall, Inverse
from consequentialism.autograd.linear import prepare
from consequentialism.options import Ridge
from consequentialism.solve import cost

BACKENDS = [pytest.param("cpu", marks=needs_kernels), "reference"]
SHAPE = (12, 20, 9)


class Calls(TorchDispatchMode):
    """The names of this package's ops that run inside."""

    def __init__(self, called: list[str]) -> None:
        super().__init__()
        self.called = called

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "consequentialism":
            self.called.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Every call of a backend's op, on a CPU that the cost model takes for a GPU."""
    called: list[str] = []
    monkeypatch.setattr(cost, "FUSED_DEVICES", ("cpu",))

    def watched(name: str, function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            called.append(name)
            return function(*arguments)

        return call

    for name in ("gram_inverse", "emended_input", "fused_weight_grad"):
        monkeypatch.setattr(reference, name, watched(name, getattr(reference, name)))
    with Calls(called):
        yield called


def gradients(layer: cw.Linear, x: Tensor, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
    layer(x).backward(dy)
    return layer.weight.grad, None if layer.bias is None else layer.bias.grad


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_layer(calls: list[str], backend: str, dtype: torch.dtype, bias: bool) -> None:
    rows, inputs, outputs = SHAPE
    layer = cw.Linear(inputs, outputs, bias, backend=backend, dtype=dtype)
    x = randn(rows, inputs, dtype=dtype).requires_grad_()
    dy = randn(rows, outputs, seed=1, dtype=dtype)
    out = layer(x.reshape(3, 4, inputs))
    assert calls == []  # nothing in forward
    out.backward(dy.reshape(3, 4, outputs))
    assert calls[0] == "fused_weight_grad"
    expected = oracle(x.detach(), dy, bias)
    assert_close("dw", layer.weight.grad, expected[0], TOLERANCE[dtype])
    if bias:
        assert_close("db", layer.bias.grad, expected[1], TOLERANCE[dtype])
    assert_close("dx", x.grad, dy.double() @ layer.weight.double(), TOLERANCE[dtype])


@pytest.mark.parametrize("backend", BACKENDS)
def test_functional(calls: list[str], backend: str) -> None:
    rows, inputs, outputs = SHAPE
    x, dy = randn(rows, inputs), randn(rows, outputs, seed=1)
    for options in ({}, {"scale": "raw", "damping": 0.3}, {"scale": "gradient", "damping_mode": "absolute"}):
        own = cw.emended_weight_grad(x, dy, backend=backend, **options)  # type: ignore[arg-type]
        assert_grads_close(own, oracle(x, dy, **options), TOLERANCE[F64])
    assert calls.count("fused_weight_grad") == 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_keeps_x_alone(calls: list[str], backend: str) -> None:
    rows, inputs, outputs = SHAPE
    x, weight = randn(rows, inputs), randn(outputs, inputs).requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        cw.emended_linear(x, weight, backend=backend)
    assert [t.data_ptr() for t in kept] == [x.data_ptr()]


def test_prepare_and_weight_grad() -> None:
    x, dy = randn(12, 20), randn(12, 9, seed=1)
    kept = FusedCall(True, Ridge(0.5, "absolute", "raw"))
    own = kept.weight_grad(x, dy, reference, True, True)
    assert_grads_close(own, oracle(x, dy, damping=0.5, damping_mode="absolute", scale="raw"), TOLERANCE[F64])
    assert kept.weight_grad(x, dy, reference, True, False)[1] is None


def test_no_form_is_fused_unless_asked(calls: list[str]) -> None:
    x = randn(12, 20)
    plan = cost.plan(x, True, 9, Options(), fused_rows=128)
    assert plan.applied_to == "fused"
    assert isinstance(prepare(x, True, 9, Options(), reference, True, True, plan), FusedCall)
    prepared = prepare(x, True, 9, Options(), reference, True, True, cost.plan(x, True, 9, Options()))
    assert isinstance(prepared, (EmendedInput, Inverse))


def test_frozen_parameters(calls: list[str]) -> None:
    x, dy = randn(12, 20), randn(12, 9, seed=1)
    expected = oracle(x, dy)
    for frozen in ("weight", "bias"):
        layer = cw.Linear(20, 9, dtype=F64)
        layer.get_parameter(frozen).requires_grad_(False)
        own = gradients(layer, x, dy)
        for gradient, wanted, name in zip(own, expected, ("weight", "bias"), strict=True):
            assert (gradient is None) == (name == frozen)
            if gradient is not None:
                assert_close(name, gradient, wanted, TOLERANCE[F64])


def test_backward_twice(calls: list[str]) -> None:
    layer, x = cw.Linear(20, 9, dtype=F64), randn(12, 20)
    loss = layer(x).square().sum()
    first = torch.autograd.grad(loss, layer.weight, retain_graph=True)[0]
    assert_identical("dw", torch.autograd.grad(loss, layer.weight)[0], first)


def test_empty_batch(calls: list[str]) -> None:
    layer = cw.Linear(20, 9)
    dw, db = gradients(layer, torch.empty(0, 20), torch.empty(0, 9))
    assert dw is not None
    assert db is not None
    assert not dw.any()
    assert not db.any()


def test_autocast(calls: list[str]) -> None:
    layer, x, dy = cw.Linear(20, 9), randn(12, 20, dtype=F32), randn(12, 9, seed=1, dtype=BF16)
    with torch.autocast("cpu", dtype=BF16):
        y = layer(x)
    y.backward(dy)
    assert "fused_weight_grad" in calls
    assert_close("dw", layer.weight.grad, oracle(x.to(BF16), dy)[0], TOLERANCE[BF16])


@pytest.mark.parametrize("backend", BACKENDS)
def test_compile(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    torch._dynamo.reset()
    layer, x, dy = cw.Linear(20, 9, backend=backend, dtype=F64), randn(12, 20), randn(12, 9, seed=1)
    eager = copy.deepcopy(layer)
    monkeypatch.setattr(cost, "FUSED_DEVICES", ("cpu",))
    expected = gradients(eager, x, dy)
    torch.compile(layer, fullgraph=True)(x).backward(dy)
    for own, wanted in zip((layer.weight.grad, layer.bias.grad), expected, strict=True):
        assert_close("gradient", own, wanted, TOLERANCE[F64])


def test_func_grad(calls: list[str]) -> None:
    x, dy = randn(12, 20), randn(12, 9, seed=1)
    weight = randn(9, 20)
    own = torch.func.grad(lambda w: (cw.emended_linear(x, w) * dy).sum())(weight)
    assert_close("dw", own, oracle(x, dy, False)[0], TOLERANCE[F64])
    assert "fused_weight_grad" not in calls


def test_fused_sgd_has_no_dw(calls: list[str]) -> None:
    assert_steps_as_sgd(layers(), randn(5, 6))


def test_where_the_op_is_chosen() -> None:
    """On CUDA, by the one place that knows: `cost`."""

    def fused(rows: int, inputs: int, outputs: int, dtype: torch.dtype = F32, device: str = "cuda", **o: Any) -> bool:
        with torch._subclasses.FakeTensorMode():
            x = torch.empty(rows, inputs, dtype=dtype, device=device)
        return cost.plan(x, True, outputs, Options(**o), 128).applied_to == "fused"

    assert fused(64, 784, 1600)
    assert fused(128, 1024, 1024)
    assert fused(60, 1600, 10, BF16)
    assert fused(64, 784, 100, F64)
    assert not fused(64, 784, 1600, device="cpu")
    assert not fused(129, 1024, 1024)
    assert not fused(65, 784, 100, F64)
    assert not fused(128, 4096, 4096)
    assert not fused(128, 100, 100)  # primal
    assert not fused(64, 784, 100, damping=1e-3)  # a Gram in float64
    assert not fused(64, 784, 100, damping_mode="absolute")
    assert fused(64, 784, 100, F64, damping_mode="absolute")
