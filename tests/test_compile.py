"""torch.compile: the same numbers as eager, whole graphs, any batch size."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from cases import (
    BACKENDS,
    BF16,
    EXACT,
    F32,
    F64,
    TOLERANCE,
    TRANSFORM,
    assert_close,
    device_of,
    needs_kernels,
    oracle,
    randn,
)
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import consequentialism as cw

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def network(dtype: torch.dtype = F32, **options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(cw.Linear(12, 20, dtype=dtype, **options), nn.Tanh(), cw.Linear(20, 3, dtype=dtype, **options))


def grads(model: nn.Module, run: Any, x: Tensor) -> dict[str, Tensor]:
    """Output, input gradient and all parameters' gradients of one step."""
    model.zero_grad()
    x = x.detach().clone().requires_grad_()
    out = run(x)
    out.square().sum().backward()
    assert x.grad is not None
    found = {"y": out.detach(), "dx": x.grad}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        found[name] = parameter.grad.clone()
    return found


def assert_same_as_eager(model: nn.Module, compiled: Any, x: Tensor, bound: float) -> None:
    expected = grads(model, model, x)
    for name, tensor in grads(model, compiled, x).items():
        assert_close(name, tensor, expected[name], bound)


@pytest.mark.parametrize("rows", [4, 50])
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_full_graph(backend: str, dtype: torch.dtype, rows: int) -> None:
    model = network(dtype, backend=backend, device=device_of(backend))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same_as_eager(model, compiled, randn(rows, 12, dtype=dtype, device=device_of(backend)), TRANSFORM[dtype])


@pytest.mark.parametrize(
    "options",
    [
        {"scale": "raw", "damping_mode": "absolute"},
        {"scale": "gradient", "damping": 1e-5},
        {"bias": False},
    ],
    ids=str,
)
def test_options(options: dict) -> None:
    model = network(**options)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    # Two runs of an ill-conditioned network differ by its condition number times the rounding; they must not.
    assert_same_as_eager(model, compiled, randn(16, 12, dtype=F32), TRANSFORM[F32])


@pytest.mark.parametrize("leading", [(), (2, 3), (0,)])
def test_leading_dimensions(leading: tuple[int, ...]) -> None:
    model = network()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same_as_eager(model, compiled, randn(*leading, 12, dtype=F32), TRANSFORM[F32])


def test_dynamic_batch_without_recompiling() -> None:
    model = network(F64)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    # Below both layers' numbers of inputs, and far above: the cost model's choice may cost a graph, not one each.
    for rows in (4, 5, 6, 7, 100, 101, 150):
        assert_same_as_eager(model, compiled, randn(rows, 12), TRANSFORM[F64])
    assert counter.frame_count <= 4, f"{counter.frame_count} graphs for 7 batch sizes"


def test_autocast() -> None:
    model, x = network(), randn(16, 12, dtype=F32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")

    def run(which: Any) -> Any:
        def call(x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=BF16):
                return which(x)

        return call

    expected = grads(model, run(model), x)
    for name, tensor in grads(model, run(compiled), x).items():
        assert_close(name, tensor, expected[name], TOLERANCE[BF16])


def test_no_grad_and_frozen() -> None:
    model, x = network(), randn(16, 12, dtype=F32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert_close("y", compiled(x), model(x), TRANSFORM[F32])
    model.requires_grad_(False)
    assert not compiled(x).requires_grad
    model[2].weight.requires_grad_(True)
    torch._dynamo.reset()  # torch 2.11 does not notice this of any layer
    compiled(x).square().sum().backward()
    own = model[2].weight.grad
    model.zero_grad()
    model(x).square().sum().backward()
    assert_close("dw", own, model[2].weight.grad, TRANSFORM[F32])


def test_functional_and_whole_training_step() -> None:
    x, weight, bias = randn(8, 5), randn(3, 5, seed=1).requires_grad_(), randn(3, seed=2).requires_grad_()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return cw.emended_linear(x, weight, bias, damping=0.1).square().sum()

    step(x, weight, bias).backward()
    dy = 2 * (x @ weight.T + bias).detach()
    dw, db = oracle(x, dy, damping=0.1)
    assert_close("dw", weight.grad, dw, TRANSFORM[F64])
    assert_close("db", bias.grad, db, TRANSFORM[F64])


def test_weight_grad_function() -> None:
    compiled = torch.compile(cw.emended_weight_grad, fullgraph=True, backend="aot_eager")
    for rows in (4, 30):
        x, dy = randn(rows, 5), randn(rows, 3, seed=1)
        dw, db = compiled(x, dy, bias=True, damping=0.1)
        expected = oracle(x, dy, damping=0.1)
        assert_close("dw", dw, expected[0], TRANSFORM[F64])
        assert_close("db", db, expected[1], TRANSFORM[F64])


def test_embedding() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(cw.Embedding(9, 4, padding_idx=0), cw.Linear(4, 3))
    indices = torch.tensor([[1, 2, 2], [0, 8, 1]])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    model(indices).square().sum().backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    compiled(indices).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert_close(name, parameter.grad, expected[name], TRANSFORM[F32])


@pytest.mark.filterwarnings("error::UserWarning")
def test_sparse_embedding_stays_outside() -> None:
    layer = cw.Embedding(9, 4, sparse=True)
    indices = torch.tensor([[1, 2, 2], [0, 8, 1]])
    layer(indices).square().sum().backward()
    expected = layer.weight.grad.to_dense()
    layer.zero_grad()
    torch.compile(layer, backend="aot_eager")(indices).square().sum().backward()
    assert layer.weight.grad.is_sparse
    assert_close("dw", layer.weight.grad.to_dense(), expected, TRANSFORM[F32])
    torch._dynamo.reset()  # or the pieces are taken for the full graph
    with pytest.raises(Exception, match=r"Embedding\(sparse=True\) does not support torch.compile in a full graph"):
        torch.compile(layer, fullgraph=True, backend="aot_eager")(indices)
    layer.requires_grad_(False)
    torch._dynamo.reset()
    assert_close("y", torch.compile(layer, fullgraph=True, backend="aot_eager")(indices), layer(indices), EXACT)


def test_converted_after_compiling_is_not_stale() -> None:
    # convert changes the class of a module that a compiled graph may already know.
    model = nn.Sequential(nn.Linear(12, 3, dtype=F64))
    compiled = torch.compile(model, backend="aot_eager")
    x = randn(8, 12)
    grads(model, compiled, x)
    cw.convert(model)
    assert_same_as_eager(model, compiled, x, TRANSFORM[F64])


def test_damping_changed_after_compiling() -> None:
    model = network(F64)
    compiled = torch.compile(model, backend="aot_eager")
    for damping in (1.0, 0.1):
        model[0].damping = damping
        assert_same_as_eager(model, compiled, randn(8, 12), TRANSFORM[F64])


@needs_kernels
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs g++")
def test_inductor() -> None:
    model = network()
    compiled = torch.compile(model, fullgraph=True)
    for rows in (8, 40):
        assert_same_as_eager(model, compiled, randn(rows, 12, dtype=F32), TRANSFORM[F32])
