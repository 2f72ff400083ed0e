"""Which root steps in coordinates take: the symmetric one, or the inverse of a Cholesky factor."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from cases import F64, assert_close, assert_identical, randn
from emended_helpers import EXACT, mlp, squares, train
from torch import Tensor, nn

import consequentialism as cw
from consequentialism.solve.root import cholesky_inverse, inverse_factor, method

F32 = torch.float32


def is_triangular(root: Tensor) -> bool:
    return bool((root.tril(-1) == 0).all()) and not bool((root.triu(1) == 0).all())


def one_step(name: str, root: Any, exponent: float | None = None, **options: Any) -> tuple[nn.Linear, Tensor]:
    """A layer after a step, and its root."""
    torch.manual_seed(0)
    layer = nn.Linear(6, 5, dtype=F64)
    weights = [layer.weight] if name == "Muon" else layer.parameters()
    inner = getattr(torch.optim, name)(weights, lr=0.1, **options)
    optimizer = cw.optim.Emended(inner, layer, root=root, exponent=exponent, damping=0.1)
    squares(layer(randn(30, 6))).backward()
    optimizer.step()
    return layer, optimizer.state[layer.weight]["root"]


@pytest.mark.parametrize("order", [1, 64, 65, 129, 257])
@pytest.mark.parametrize(("dtype", "bound"), [(F32, 1e-6), (F64, 1e-12)])
def test_the_factor_is_a_root_of_the_inverse(order: int, dtype: torch.dtype, bound: float) -> None:
    """Of two matrices whose condition number is that of the ridge, in the norm in which the root is 1."""
    x = randn(2, order // 2 + 1, order) * torch.logspace(0, -2, order, dtype=F64)
    moment = (x.mT @ x).to(dtype)
    scaled = moment / moment.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    own = inverse_factor(scaled, 0.03)
    assert own.dtype == dtype
    assert_identical("lower half", own.tril(-1), torch.zeros_like(own))
    eye = torch.eye(order, dtype=F64)
    turned = own.double().mT @ (scaled.double() + 0.03 * eye) @ own.double()
    assert_close("S^T (B + c I) S", turned, eye.expand_as(turned), bound)


def test_a_moment_that_rounding_leaves_indefinite_has_a_factor() -> None:
    """What stands beside it keeps its own; what is not finite has none."""
    turn = torch.linalg.qr(randn(3, 3)).Q
    values = torch.tensor([2.0, 1.0, -1e-2], dtype=F64)
    good, bad = torch.eye(3, dtype=F64), (turn * values) @ turn.T
    own = inverse_factor(torch.stack([good, bad, bad * math.nan]), 1e-3)
    assert_close("beside", own[0], good / math.sqrt(1 + 1e-3), EXACT)
    assert_identical("lower half", own[1].tril(-1), torch.zeros_like(bad))
    damped = (turn * (values.clamp(min=0) + 1e-3)) @ turn.T
    assert_close("S^T (B + c I) S", own[1].T @ damped @ own[1], good, EXACT)
    assert own[1].diagonal().min() > 0
    assert not own[2].isfinite().all()


def test_so_has_its_inverse() -> None:
    """That is the root of exponent 1."""
    turn = torch.linalg.qr(randn(3, 3)).Q
    values = torch.tensor([2.0, 1.0, -1e-2], dtype=F64)
    good, bad = torch.eye(3, dtype=F64), (turn * values) @ turn.T
    own = cholesky_inverse(torch.stack([good, bad, bad * math.nan]), 1e-3)
    assert_close("beside", own[0], good / (1 + 1e-3), EXACT)
    assert_close("inverse", own[1], (turn / (values.clamp(min=0) + 1e-3)) @ turn.T, EXACT)
    assert own[2].isnan().all()


@pytest.mark.parametrize("name", ["SGD", "Muon"])
def test_the_step_is_the_same_with_either_where_both_are_allowed(name: str) -> None:
    options = {"momentum": 0.9, "weight_decay": 0.1, "nesterov": True}
    layers, roots = zip(*(one_step(name, root, 0.5, **options) for root in ("symmetric", "cholesky")), strict=True)
    assert not is_triangular(roots[0])
    assert is_triangular(roots[1])
    assert_close("weight", layers[1].weight, layers[0].weight, EXACT)
    assert_close("bias", layers[1].bias, layers[0].bias, EXACT)


@pytest.mark.parametrize(
    ("name", "exponent", "options", "triangular"),
    [
        ("SGD", None, {}, True),
        ("SGD", None, {"weight_decay": 0.1, "maximize": True}, True),
        ("SGD", None, {"momentum": 0.9, "nesterov": True}, False),
        ("SGD", 0.25, {}, False),
        ("Muon", None, {}, False),
        ("Muon", 0.5, {}, False),
        ("Muon", 0.5, {"momentum": 0.0}, True),
        ("AdamW", None, {}, False),
        ("RMSprop", None, {}, False),
        ("Adagrad", None, {}, False),
    ],
)
def test_auto_takes_cholesky_where_the_step_is_the_same(
    name: str, exponent: float | None, options: dict[str, Any], triangular: bool
) -> None:
    layer, root = one_step(name, "auto", exponent, **options)
    twin, other = one_step(name, "cholesky" if triangular else "symmetric", exponent, **options)
    assert is_triangular(root) == triangular
    assert_identical("root", root, other)
    assert_identical("weight", layer.weight.detach(), twin.weight.detach())


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_auto_is_the_symmetric_roots_training_over_refreshes(momentum: float) -> None:
    """Of inputs that change: what a momentum holds is in the coordinates of earlier roots."""
    ends = []
    for root in ("auto", "symmetric"):
        torch.manual_seed(0)
        model = mlp(F64)
        inner = torch.optim.SGD(model.parameters(), 0.05, momentum=momentum)
        optimizer = cw.optim.Emended(inner, model, root=root, memory=0.5, refresh_every=2)
        for step in range(12):
            train(model, optimizer, randn(20, 6, seed=step) * torch.linspace(1, 1 + step % 3, 6, dtype=F64), 1)
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert_close("weights", ends[0], ends[1], EXACT)


def test_auto_keeps_the_symmetric_root_where_a_bias_is_frozen_since() -> None:
    layer = nn.Linear(6, 5, dtype=F64)
    optimizer = cw.optim.Emended(torch.optim.SGD(layer.parameters(), 0.1), layer)
    layer.bias.requires_grad_(False)
    squares(layer(randn(30, 6))).backward()
    optimizer.step()
    assert not is_triangular(optimizer.state[layer.weight]["root"])


def test_auto_compares_no_options_that_are_not_the_optimizers() -> None:
    """A group's own notes may be what has no truth value."""
    layer = nn.Linear(6, 5, dtype=F64)
    groups = [{"params": [p], "note": torch.arange(2)} for p in layer.parameters()]
    optimizer = cw.optim.Emended(torch.optim.SGD(groups, 0.1), layer)
    squares(layer(randn(30, 6))).backward()
    optimizer.step()
    assert is_triangular(optimizer.state[layer.weight]["root"])


def test_auto_keeps_the_symmetric_root_where_a_bias_has_a_rate_of_its_own() -> None:
    layer = nn.Linear(6, 5, dtype=F64)
    for rate, triangular in ((0.1, True), (0.3, False)):
        groups = [{"params": [layer.weight], "weight_decay": 0.1}, {"params": [layer.bias], "lr": rate}]
        optimizer = cw.optim.Emended(torch.optim.SGD(groups, lr=0.1), layer)
        squares(layer(randn(30, 6))).backward()
        optimizer.step()
        assert is_triangular(optimizer.state[layer.weight]["root"]) == triangular


def test_auto_does_not_take_a_subclass_for_sgd() -> None:
    class Signs(torch.optim.SGD):
        """Its step is not SGD's."""

    layer = nn.Linear(6, 5, dtype=F64)
    optimizer = cw.optim.Emended(Signs(layer.parameters(), lr=0.1), layer)
    squares(layer(randn(30, 6))).backward()
    optimizer.step()
    assert not is_triangular(optimizer.state[layer.weight]["root"])


def test_a_grouped_convolution_keeps_the_symmetric_root_beside_muon() -> None:
    """Its rows are orthogonalised together and have roots of their own."""
    layer = nn.Conv1d(4, 6, 2, groups=2, dtype=F64)
    optimizer = cw.optim.Muon(
        layer, 0.1, aux={"lr": 0.1}, exponent=0.5, filter_fn=lambda module, _: isinstance(module, nn.Conv1d)
    )
    squares(layer(randn(10, 4, 5))).backward()
    optimizer.step()
    assert not is_triangular(optimizer.state[layer.weight]["root"][0])


def test_a_gpu_takes_the_symmetric_root_unless_it_is_told() -> None:
    assert method(0.5, "cuda", "auto", True) == "iteration"
    assert method(0.5, "cuda", "cholesky", False) == "factor"
    assert method(0.5, "cpu", "auto", False) == "eigenvalues"


def test_adam_works_in_the_coordinates_of_the_factor() -> None:
    layer = nn.Linear(6, 5, dtype=F64)
    place = torch.cat([layer.weight, layer.bias[:, None]], 1).detach()
    optimizer = cw.optim.Emended(
        torch.optim.AdamW(layer.parameters(), 0.1, weight_decay=0), layer, root="cholesky", refresh_every=100
    )
    change = nn.Parameter(torch.zeros(5, 7, dtype=F64))
    inner = torch.optim.AdamW([change], 0.1, weight_decay=0)
    for step in range(3):
        optimizer.zero_grad()
        squares(layer(randn(30, 6, seed=0 if step < 2 else 1))).backward()
        gradient = torch.cat([layer.weight.grad, layer.bias.grad[:, None]], 1)
        optimizer.step()
        root = optimizer.state[layer.weight]["root"]
        assert is_triangular(root)
        before = change.detach().clone()
        change.grad = gradient @ root
        inner.step()
        place = place + (change.detach() - before) @ root.T
        assert_close(f"step {step}", torch.cat([layer.weight, layer.bias[:, None]], 1), place, EXACT)


@pytest.mark.usefixtures("even_refreshes")
def test_a_loaded_root_of_the_other_kind_stays_until_a_refresh() -> None:
    model, x = mlp(F64), randn(20, 6)
    optimizer = cw.optim.Emended(torch.optim.AdamW(model.parameters(), 0.01), model, refresh_every=2)
    train(model, optimizer, x, 1)
    twin = copy.deepcopy(model)
    other = cw.optim.Emended(torch.optim.AdamW(twin.parameters(), 0.01), twin, refresh_every=2, root="cholesky")
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in range(3):
        train(model, optimizer, x, 1)
        train(twin, other, x, 1)
        own, kept = other.state[twin[0].weight]["root"], optimizer.state[model[0].weight]["root"]
        assert is_triangular(own) == (step > 0)
        if step == 0:
            assert_identical("root", own, kept)
            assert_identical("weight", twin[0].weight.detach(), model[0].weight.detach())


@pytest.mark.parametrize(
    ("root", "exponent", "error", "message"),
    [
        ("triangular", None, ValueError, "root must be one of 'auto', 'symmetric', 'cholesky', got 'triangular'"),
        (None, None, TypeError, "root must be one of 'auto', 'symmetric', 'cholesky', got None"),
        ("cholesky", 0.25, ValueError, "root='cholesky' needs exponent=0.5, got exponent 0.25"),
    ],
)
def test_what_root_may_be(root: Any, exponent: float | None, error: type[Exception], message: str) -> None:
    model = mlp(F64)
    with pytest.raises(error, match=message):
        cw.optim.Emended(torch.optim.SGD(model.parameters(), 0.1), model, root=root, exponent=exponent)
    if root == "cholesky":
        with pytest.raises(error, match=message):  # nothing is rooted, and a list of dampings may end so
            cw.optim.Emended(
                torch.optim.SGD(model.parameters(), 0.1), model, root=root, exponent=exponent, damping=math.inf
            )
        with pytest.raises(error, match=message):
            cw.optim.Muon(model, 0.1, aux={"lr": 0.1}, root=root)
