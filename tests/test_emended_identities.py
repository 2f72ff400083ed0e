"""Steps in coordinates: the six special cases, in float64, and how a root is made."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import F64, TOLERANCE, assert_close, assert_identical, randn
from emended_helpers import EXACT, gradients_of, mlp, squares, train
from torch import Tensor, nn

import consequentialism as cw
from consequentialism.backend import reference
from consequentialism.optim.blocks import Blocks
from consequentialism.optim.steps import orthogonalised
from consequentialism.solve.gram import Gram
from consequentialism.solve.root import eigen_power, iterated_power

NS = (3.4445, -4.7750, 2.0315)


def root_of(x: Tensor, bias: bool, damping: float, exponent: float, divided: bool) -> Tensor:
    """``S`` by its definition."""
    rows = torch.cat([x, x.new_ones(x.shape[0], 1)], 1) if bias else x
    moment = rows.T @ rows / rows.shape[0]
    t = moment.trace() / moment.shape[0]
    values, vectors = torch.linalg.eigh(moment + damping * t * torch.eye(moment.shape[0], dtype=x.dtype))
    return (vectors * (values / (t if divided else 1)) ** -exponent) @ vectors.T


@pytest.mark.parametrize("bias", [True, False])
def test_sgd_is_the_emended_step_of_the_batch(bias: bool) -> None:
    x, lr, damping = randn(40, 6), 0.5, 0.1
    layer = nn.Linear(6, 5, bias, dtype=F64)
    start = copy.deepcopy(layer)
    optimizer = cw.optim.Emended(
        torch.optim.SGD(layer.parameters(), lr), layer, damping=damping, memory=0, refresh_every=1
    )
    dy = randn(40, 5, seed=1) / 40
    layer(x).backward(dy)
    optimizer.step()
    dw, db = cw.reference.emended_weight_grad(x, dy, bias, damping=damping, scale="nlms", form="primal")
    assert_close("weight", start.weight - layer.weight, lr * dw, EXACT)
    if bias:
        assert db is not None
        assert_close("bias", start.bias - layer.bias, lr * db, EXACT)


@pytest.mark.parametrize(("rows", "damping"), [(8, 0.03), (3, 1e-3)])
def test_sgd_in_float32_keeps_the_few_directions_that_rows_span(rows: int, damping: float) -> None:
    """Small eigenvalues of S, beside the large ones of all directions without rows."""
    x, dy = randn(rows, 64), randn(rows, 5, seed=1) / rows
    layer = nn.Linear(64, 5, False)
    with torch.no_grad():
        layer.weight.zero_()
    inner = torch.optim.SGD(layer.parameters(), 1.0)
    optimizer = cw.optim.Emended(inner, layer, damping=damping, memory=0, refresh_every=1)
    layer(x.float()).backward(dy.float())
    optimizer.step()
    dw, _ = cw.reference.emended_weight_grad(x, dy, False, damping=damping * rows / 64, scale="nlms")
    assert_close("weight", -layer.weight.double(), dw, (1 + 64 / damping) * 2**-24)  # S itself is kept in float32


def test_sgd_with_gradient_scale_differs_by_the_mean_moment() -> None:
    x, lr, damping = randn(40, 6), 0.5, 0.1
    layer = nn.Linear(6, 5, False, dtype=F64)
    start = layer.weight.detach().clone()
    inner = torch.optim.SGD(layer.parameters(), lr)
    optimizer = cw.optim.Emended(inner, layer, damping=damping, memory=0, refresh_every=1, scale="gradient")
    dy = randn(40, 5, seed=1)
    layer(x).backward(dy)
    optimizer.step()
    moment = x.T @ x / 40
    t = moment.trace() / 6
    expected = dy.T @ x @ torch.linalg.inv((moment + damping * t * torch.eye(6, dtype=F64)) / t)
    assert_close("weight", start - layer.weight, lr * expected, EXACT)


@pytest.mark.parametrize("nesterov", [True, False])
def test_momentum_with_a_fixed_root_is_fed_the_emended_gradient(nesterov: bool) -> None:
    x = randn(40, 6)
    layer = nn.Linear(6, 5, dtype=F64)
    twin = copy.deepcopy(layer)
    options = {"lr": 0.1, "momentum": 0.9, "nesterov": nesterov}
    optimizer = cw.optim.Emended(torch.optim.SGD(layer.parameters(), **options), layer, memory=0, damping=0.1)
    plain = torch.optim.SGD(twin.parameters(), **options)
    for step in range(5):
        dy = randn(40, 5, seed=step)
        optimizer.zero_grad()
        layer(x).backward(dy)
        optimizer.step()
        dw, db = cw.reference.emended_weight_grad(x, dy, True, damping=0.1, scale="nlms")
        twin.weight.grad, twin.bias.grad = dw, db
        plain.step()
    assert_close("weight", layer.weight, twin.weight, EXACT)
    assert_close("bias", layer.bias, twin.bias, EXACT)


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "RMSprop", "Adagrad"])
@pytest.mark.parametrize("scale", ["nlms", "gradient"])
def test_infinite_damping_is_the_plain_optimizer(name: str, scale: Any) -> None:
    model = mlp(torch.float32)
    twin = copy.deepcopy(model)
    make: Callable[..., torch.optim.Optimizer] = getattr(torch.optim, name)
    plain = make(twin.parameters(), lr=0.01, weight_decay=0.1)
    inner = make(model.parameters(), lr=0.01, weight_decay=0.1)
    optimizer = cw.optim.Emended(inner, model, damping=math.inf, scale=scale)
    x = randn(30, 6, dtype=torch.float32)
    train(model, optimizer, x, 5)
    train(twin, plain, x, 5)
    for (key, own), expected in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert_identical(key, own.detach(), expected.detach())


def test_muon_takes_any_square_root_of_the_inverse() -> None:
    """``u S = -lr (m P m^T)^(-1/2) m P`` where the orthogonalisation is exact; Cholesky's factor gives the same."""
    x, dy = randn(40, 6), randn(40, 4, seed=1)
    moment = x.T @ x / 40
    t = moment.trace() / 6
    inverse = torch.linalg.inv((moment + 0.1 * t * torch.eye(6, dtype=F64)) / t)
    symmetric = root_of(x, False, 0.1, 0.5, True)
    lower = torch.linalg.cholesky(inverse)
    momentum = dy.T @ x

    def exact(matrix: Tensor) -> Tensor:
        u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
        return u @ vh

    values, vectors = torch.linalg.eigh(momentum @ inverse @ momentum.T)
    expected = (vectors * values**-0.5) @ vectors.T @ momentum @ inverse
    assert_close("symmetric root", exact(momentum @ symmetric) @ symmetric, expected, EXACT)
    assert_close("Cholesky factor", exact(momentum @ lower) @ lower.T, expected, EXACT)
    # The optimizer with Newton and Schulz's polynomial, which is a function of the singular values alone.
    layer = nn.Linear(6, 4, False, dtype=F64)
    start = layer.weight.detach().clone()
    inner = torch.optim.Muon(layer.parameters(), lr=0.1, weight_decay=0, nesterov=False, momentum=0)
    optimizer = cw.optim.Emended(inner, layer, damping=0.1, exponent=0.5, memory=0, refresh_every=1)
    layer(x).backward(dy)
    optimizer.step()
    wanted = orthogonalised(momentum @ lower, NS, 5, 1e-7) @ lower.T
    assert_close("optimizer", start - layer.weight, 0.1 * wanted, EXACT)


@pytest.mark.usefixtures("even_refreshes")
@pytest.mark.parametrize("kind", ["sgd", "muon"])
@pytest.mark.parametrize(("momentum", "refresh_every"), [(0.9, 10), (0.0, 2)])
def test_invariance_to_the_basis_of_the_input(kind: str, momentum: float, refresh_every: int) -> None:
    """Two copies, one of which reads ``x R``: their outputs stay the same; with momentum, while the root does."""
    x, change = randn(60, 6), randn(6, 6, seed=3) + 2 * torch.eye(6, dtype=F64)
    first, second = nn.Linear(6, 4, False, dtype=F64), nn.Linear(6, 4, False, dtype=F64)
    with torch.no_grad():
        second.weight.copy_(torch.linalg.solve(change, first.weight.T).T)
    optimizers = []
    for layer in (first, second):
        if kind == "sgd":
            inner: torch.optim.Optimizer = torch.optim.SGD(layer.parameters(), 0.5, momentum=momentum)
        else:
            inner = torch.optim.Muon(layer.parameters(), lr=0.05, weight_decay=0, momentum=momentum)
        options: dict[str, Any] = {"scale": "nlms", "exponent": 0.5, "damping": 1e-13, "memory": 0.5}
        optimizers.append(cw.optim.Emended(inner, layer, refresh_every=refresh_every, **options))
    for step in range(6):
        batch, dy = x[step * 10 :], randn(60 - step * 10, 4, seed=step)
        for layer, optimizer, rows in zip((first, second), optimizers, (batch, batch @ change), strict=True):
            optimizer.zero_grad()
            layer(rows).backward(dy / len(dy))
            optimizer.step()
    assert_close("outputs", second(x @ change), first(x), 1e-7)


@pytest.mark.parametrize("sizes", [(10, 10, 10), (7, 20, 3), (30,)])
def test_micro_batches_are_their_union(sizes: tuple[int, ...]) -> None:
    x, dy = randn(30, 6), randn(30, 4, seed=1)
    layers = [mlp(F64), mlp(F64)]
    layers[1].load_state_dict(layers[0].state_dict())
    for layer, parts in zip(layers, ((30,), sizes), strict=True):
        optimizer = cw.optim.Emended(torch.optim.AdamW(layer.parameters(), 0.1), layer, memory=0, refresh_every=1)
        for _ in range(3):
            optimizer.zero_grad()
            for rows, errors in zip(x.split(parts), dy.split(parts), strict=True):
                layer(rows).backward(errors)
            optimizer.step()
    for own, expected in zip(layers[1].parameters(), layers[0].parameters(), strict=True):
        assert_close("parameter", own, expected, EXACT)


@pytest.mark.parametrize("exponent", [1.0, 0.5, 0.25, 0.125, 0.35])
@pytest.mark.parametrize("divided", [True, False])
def test_root(exponent: float, divided: bool) -> None:
    x = randn(50, 12)
    own = Gram((x.T @ x / 50)[None, None], 50).root(reference, 12, 0.1, exponent, divided)[0, 0]
    assert_close("root", own, root_of(x, False, 0.1, exponent, divided), EXACT)


@pytest.mark.parametrize("order", [2, 4, 8])
@pytest.mark.parametrize("damping", [1.0, 0.03, 1e-3])
def test_the_iteration_finds_the_root_of_the_eigenvalues(order: int, damping: float) -> None:
    x = randn(200, 40) * torch.logspace(0, -3, 40, dtype=F64)
    moment = x.T @ x
    scaled = (moment / (moment.trace() / 40))[None]
    own, expected = iterated_power(reference, scaled, damping, order, 40), eigen_power(scaled, damping, 1 / order)
    assert_close("root", own, expected, 1e-10)


def test_blocks_are_the_roots_of_the_diagonal_blocks() -> None:
    """Uneven ones, the bias in the last, with the trace of the whole."""
    x = randn(50, 11)
    layer = nn.Linear(11, 5, dtype=F64)
    start = copy.deepcopy(layer)
    inner = torch.optim.SGD(layer.parameters(), 1.0)
    optimizer = cw.optim.Emended(inner, layer, damping=0.1, block=4, memory=0, refresh_every=1)
    dy = randn(50, 5, seed=1)
    layer(x).backward(dy)
    optimizer.step()
    rows = torch.cat([x, x.new_ones(50, 1)], 1)
    moment = rows.T @ rows / 50
    mask = torch.zeros(12, 12, dtype=F64)
    for begin, end in ((0, 4), (4, 8), (8, 12)):
        mask[begin:end, begin:end] = 1
    inverse = torch.linalg.inv(moment * mask + 0.1 * moment.trace() / 12 * torch.eye(12, dtype=F64))
    expected = dy.T @ rows @ inverse
    assert_close("weight", start.weight - layer.weight, expected[:, :-1], EXACT)
    assert_close("bias", start.bias - layer.bias, expected[:, -1], EXACT)
    assert optimizer.state[layer.weight]["root"].shape == (3, 4, 4)
    assert Blocks(1024, True, 1024).count == 1
    assert Blocks(1025, True, 1024).spans == [(0, 513), (513, 1025)]


@pytest.mark.parametrize("name", ["SGD", "RMSprop", "Adam", "AdamW", "Muon"])
@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
def test_own_step_has_the_numbers_of_the_wrapped_one(name: str, dtype: torch.dtype) -> None:
    cases: dict[str, list[dict[str, Any]]] = {
        "SGD": [
            {"weight_decay": 0.1},
            {"momentum": 0.9, "nesterov": True},
            {"momentum": 0.9, "dampening": 0.5, "maximize": True, "weight_decay": 0.1},
        ],
        "RMSprop": [
            {"weight_decay": 0.1},
            {"momentum": 0.9, "centered": True, "maximize": True, "weight_decay": 0.1},
        ],
        "Adam": [{"weight_decay": 0.1}, {"amsgrad": True}, {"maximize": True, "weight_decay": 0.1}, {"fused": True}],
        "AdamW": [{"weight_decay": 0.1}, {"amsgrad": True, "maximize": True}, {"foreach": True}],
        "Muon": [{"weight_decay": 0.1}, {"nesterov": False, "adjust_lr_fn": "match_rms_adamw"}],
    }
    for options in cases[name]:
        model = mlp(dtype, bias=name != "Muon")
        twin = copy.deepcopy(model)
        x = randn(30, 6, dtype=dtype)
        for one, wrapped in ((model, False), (twin, True)):
            inner = getattr(torch.optim, name)(one.parameters(), lr=0.05, **options)
            optimizer = cw.optim.Emended(inner, one, refresh_every=3)
            if wrapped:
                optimizer._own_step = None
            train(one, optimizer, x, 7)
        bound = 0.05 if name == "Muon" else TOLERANCE[dtype]  # torch's Muon orthogonalises in bfloat16
        for (key, own), expected in zip(model.named_parameters(), twin.named_parameters(), strict=True):
            assert_close(f"{options} {key}", own, expected[1], bound)


def test_gradients_are_the_plain_ones_before_and_after() -> None:
    model = mlp(F64)
    optimizer = cw.optim.Emended(torch.optim.Adagrad(model.parameters(), 0.01), model)
    squares(model(randn(20, 6))).backward()
    before = gradients_of(model)
    optimizer.step()
    for name, gradient in gradients_of(model).items():
        assert_identical(name, gradient, before[name])
