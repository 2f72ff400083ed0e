"""The formulas in plain PyTorch, against others written down independently."""

from __future__ import annotations

import math

import pytest
import torch
from cases import (
    EXACT,
    F32,
    F64,
    SMALL_SHAPES,
    Shape,
    assert_close,
    assert_grads_close,
    assert_identical,
    randn,
    relative_ridge,
    solved,
    with_ones,
)

import consequentialism as cw
from consequentialism import reference


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SMALL_SHAPES, ids=str)
def test_relative_damping(shape: Shape, bias: bool) -> None:
    rows, inputs, outputs = shape
    x, dy = randn(rows, inputs), randn(rows, outputs, seed=1)
    expected = solved(x, dy, bias, relative_ridge(x, bias, 0.3))
    for form in (None, "dual", "primal"):
        own = reference.emended_weight_grad(x, dy, bias, form=form, damping=0.3, scale="raw")
        assert_grads_close(own, expected, EXACT)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("form", ["dual", "primal"])
def test_gram_ridge_and_inverse(form: str, bias: bool) -> None:
    x = randn(6, 4)
    rows = with_ones(x, bias)
    gram = rows @ rows.T if form == "dual" else rows.T @ rows
    assert_close("gram", reference.input_gram(x, bias, form), gram, EXACT)
    c = reference.ridge(gram, 0.5, "relative", 4 + bias)
    assert_close("c", c, gram.trace() * 0.5 / (4 + bias), EXACT)
    assert reference.ridge(gram, 0.5, "absolute", 4).item() == 0.5
    expected = torch.linalg.inv(gram + c * torch.eye(gram.shape[0], dtype=F64))
    for scale, multiplier in (("raw", 1), ("nlms", 6), ("gradient", c)):
        own = reference.damped_inverse(gram, 0.5, "relative", scale, 4 + bias, 6)
        assert_close(f"inverse {scale}", own, multiplier * expected, EXACT)
    own = reference.gram_inverse(x, bias, form, 0.5, "relative", "raw")
    assert_close("inverse of x", own, expected, EXACT)


def indefinite(smallest: float) -> torch.Tensor:
    """A symmetric matrix with a positive trace and one eigenvalue below 0."""
    basis = torch.linalg.qr(randn(4, 4))[0]
    return basis @ torch.diag(torch.tensor([2.0, 1.0, 1.0, smallest], dtype=F64)) @ basis.T


@pytest.mark.parametrize(("smallest", "growth"), [(-0.005, 1), (-0.05, 10), (-0.5, 100), (-5.0, 1000)])
def test_factor_that_breaks_down_takes_more_damping(smallest: float, growth: int) -> None:
    gram = indefinite(smallest) if smallest > -5 else indefinite(-2.5)
    own = reference.damped_inverse(gram, 0.01, "absolute", "raw", 4, 4)
    expected = torch.linalg.inv(gram + 0.01 * growth * torch.eye(4, dtype=F64))
    assert_close("inverse", own, expected, EXACT)


def test_factor_that_breaks_down_for_good_takes_the_diagonal() -> None:
    gram = torch.tensor([[1.0, 50.0], [50.0, 1.0]], dtype=F64)
    own = reference.damped_inverse(gram, 0.01, "absolute", "raw", 2, 2)
    assert_close("inverse", own, torch.eye(2, dtype=F64) / 1.01, EXACT)


@pytest.mark.parametrize("damping_mode", ["relative", "absolute"])
def test_damped_inverse_of_nothing_and_of_nan(damping_mode: str) -> None:
    zero = torch.zeros(3, 3, dtype=F64)
    for scale in ("raw", "nlms", "gradient"):
        assert_identical("inverse", reference.damped_inverse(zero, 1.0, damping_mode, scale, 3, 3), zero)
        for value in (math.nan, math.inf):
            gram = torch.eye(3, dtype=F64)
            gram[1, 1] = value
            assert reference.damped_inverse(gram, 1.0, damping_mode, scale, 3, 3).isnan().all()


@pytest.mark.parametrize("form", ["dual", "primal"])
def test_emended_input_gives_the_gradient(form: str) -> None:
    x, dy = randn(6, 4), randn(6, 3, seed=1)
    emended, column = reference.emended_input(x, True, form, 0.3, "absolute", "raw")
    assert_grads_close(reference.weight_grad(dy, emended, column), solved(x, dy, True, 0.3), EXACT)
    emended, column = reference.emended_input(x, False, form, 0.3, "absolute", "raw")
    assert column.shape == (0,)
    dw, db = reference.weight_grad(dy, emended, column)
    assert db.shape == (0,)
    assert_close("dw", dw, solved(x, dy, False, 0.3)[0], EXACT)


def test_plain_gradient_and_consequence() -> None:
    x, dy = randn(6, 4), randn(6, 3, seed=1)
    layer = torch.nn.Linear(4, 3, dtype=F64)
    before = layer(x)
    before.backward(dy)
    dw, db = reference.plain_weight_grad(x, dy)
    assert_grads_close((dw, db), (layer.weight.grad, layer.bias.grad), EXACT)
    assert reference.plain_weight_grad(x, dy, bias=False)[1] is None
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter -= 0.1 * parameter.grad
    assert_close("change", -0.1 * cw.predict_change(x, dw, db), layer(x) - before, EXACT)
    assert_close("change without a bias", cw.predict_change(x, dw), x @ dw.T, EXACT)
    deep = x.reshape(2, 3, 4)
    assert_close("change, 3-D", cw.predict_change(deep, dw, db), cw.predict_change(x, dw, db).reshape(2, 3, 3), EXACT)


def test_empty_batch() -> None:
    x, dy = torch.zeros(0, 4), torch.zeros(0, 3)
    assert_identical("dw", reference.emended_weight_grad(x, dy)[0], torch.zeros(3, 4))
    assert_identical("db", reference.emended_weight_grad(x, dy)[1], torch.zeros(3))
    assert reference.emended_weight_grad(x, dy, bias=False)[1] is None


def test_emending_undoes_the_disturbance_of_the_others() -> None:
    # The paper's point in one example: two nearly equal samples that want opposite things.
    x = torch.tensor([[1.0, 0.0], [1.0, 0.1]], dtype=F64)
    dy = torch.tensor([[1.0], [-1.0]], dtype=F64)
    plain = reference.predict_change(x, reference.plain_weight_grad(x, dy, bias=False)[0])
    emended = reference.predict_change(
        x, reference.emended_weight_grad(x, dy, False, damping=1e-6, damping_mode="absolute", scale="raw")[0]
    )
    assert (emended - dy).norm() < 0.01 * (plain - dy).norm()


def test_types_of_the_computation() -> None:
    assert reference.compute_dtype(torch.float16) == F32
    assert reference.compute_dtype(torch.bfloat16) == F32
    assert reference.compute_dtype(F64) == F64
    assert reference.emended_dtype(torch.float16) == F32
    assert reference.emended_dtype(torch.bfloat16) == torch.bfloat16
