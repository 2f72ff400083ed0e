"""The identities of the update, in float64. The convolution's, unfolded patches, comes with the convolutions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from cases import (
    BACKENDS,
    EXACT,
    F64,
    LIMIT,
    SHAPES,
    SMALL_SHAPES,
    Gradients,
    Shape,
    assert_close,
    assert_grads_close,
    device_of,
    make_input,
    oracle,
    randn,
    solved,
    with_ones,
)
from torch import Tensor

import consequentialism as cw
from consequentialism.backend import dispatch

RAW = {"scale": "raw", "damping_mode": "absolute"}


def emended(backend: str, x: Tensor, dy: Tensor, bias: bool = True, **options: Any) -> Gradients:
    device = device_of(backend)
    dw, db = cw.emended_weight_grad(x.to(device), dy.to(device), bias=bias, backend=backend, **options)
    return dw.cpu(), None if db is None else db.cpu()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_formula(backend: str, shape: Shape, bias: bool) -> None:
    rows, inputs, outputs = shape
    x, dy = randn(rows, inputs), randn(rows, outputs, seed=1)
    expected = solved(x, dy, bias, 0.3)
    assert_grads_close(emended(backend, x, dy, bias, damping=0.3, **RAW), expected, EXACT)


@pytest.mark.parametrize("damping", [3.0, 1e-3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_reference_dual_is_primal(shape: Shape, damping: float) -> None:
    rows, inputs, outputs = shape
    x, dy = randn(rows, inputs), randn(rows, outputs, seed=1)
    for scale in ("nlms", "raw", "gradient"):
        dual = cw.reference.emended_weight_grad(x, dy, form="dual", damping=damping, scale=scale)
        primal = cw.reference.emended_weight_grad(x, dy, form="primal", damping=damping, scale=scale)
        assert_grads_close(dual, primal, EXACT)


@pytest.mark.parametrize("op", ["emended_input", "gram_inverse"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_op_dual_is_primal(backend: str, shape: Shape, bias: bool, op: str) -> None:
    rows, inputs, _ = shape
    x = randn(rows, inputs, device=device_of(backend))
    module = dispatch.select(backend, x)
    whole = with_ones(x.cpu(), bias)
    results = {}
    for form in ("dual", "primal"):
        arguments = (x, bias, form, 0.1, "relative", "nlms")
        if op == "emended_input":
            emended_x, column = module.emended_input(*arguments)
            results[form] = torch.cat([emended_x, column[:, None]], dim=1).cpu() if bias else emended_x.cpu()
        else:
            inverse = module.gram_inverse(*arguments).cpu()
            results[form] = inverse @ whole if form == "dual" else whole @ inverse
    assert_close("emended input", results["dual"], results["primal"], EXACT)


@pytest.mark.parametrize("shape", SMALL_SHAPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_large_damping_is_the_plain_gradient(backend: str, shape: Shape) -> None:
    rows, inputs, outputs = shape
    x, dy = randn(rows, inputs), randn(rows, outputs, seed=1)
    plain = (dy.T @ x, dy.sum(0))
    dw, db = emended(backend, x, dy, damping=1e9, **RAW)
    assert_grads_close((1e9 * dw, 1e9 * db), plain, LIMIT)
    scaled = emended(backend, x, dy, damping=1e9, damping_mode="absolute", scale="gradient")
    assert_grads_close(scaled, plain, LIMIT)
    relative = emended(backend, x, dy, damping=1e9, scale="gradient")
    assert_grads_close(relative, plain, LIMIT)


@pytest.mark.parametrize("shape", [(1, 5, 3), (4, 9, 2), (31, 80, 40), (100, 300, 10)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_small_damping_moves_each_sample_as_intended(backend: str, shape: Shape) -> None:
    rows, inputs, outputs = shape
    x, dy = randn(rows, inputs), randn(rows, outputs, seed=1)
    for bias in (True, False):
        dw, db = emended(backend, x, dy, bias, damping=1e-9, **RAW)
        assert_close("consequence", cw.predict_change(x, dw, db), dy, LIMIT)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_row_is_nlms(backend: str) -> None:
    padasip = pytest.importorskip("padasip", reason="the peer padasip is not installed")
    steps, inputs, mu, eps = 40, 6, 0.7, 0.05
    x, target = randn(steps, inputs), randn(steps, seed=1)
    theirs = padasip.filters.FilterNLMS(n=inputs, mu=mu, eps=eps, w="zeros")
    weight = torch.zeros(1, inputs, dtype=F64)
    for k in range(steps):
        row = x[k : k + 1]
        error = row @ weight.T - target[k]
        dw, _ = emended(backend, row, error, bias=False, damping=eps, **RAW)
        weight -= mu * dw
        theirs.adapt(target[k].item(), x[k].numpy())
        assert_close(f"weight after step {k}", weight[0], torch.from_numpy(np.array(theirs.w)), EXACT)


@pytest.mark.parametrize(("order", "inputs"), [(4, 9), (6, 3)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_sliding_window_is_affine_projection(backend: str, order: int, inputs: int) -> None:
    padasip = pytest.importorskip("padasip", reason="the peer padasip is not installed")
    steps, mu, ifc = 40, 0.4, 0.02
    x, target = randn(steps, inputs), randn(steps, seed=1)
    theirs = padasip.filters.FilterAP(n=inputs, order=order, ifc=ifc, mu=mu, w="zeros")
    weight = torch.zeros(1, inputs, dtype=F64)
    padded_x = torch.cat([torch.zeros(order - 1, inputs, dtype=F64), x])
    padded_target = torch.cat([torch.zeros(order - 1, dtype=F64), target])
    for k in range(steps):
        window = padded_x[k : k + order]
        error = window @ weight.T - padded_target[k : k + order, None]
        dw, _ = emended(backend, window, error, bias=False, damping=ifc, **RAW)
        weight -= mu * dw
        theirs.adapt(target[k].item(), x[k].numpy())
        assert_close(f"weight after step {k}", weight[0], torch.from_numpy(np.array(theirs.w)), EXACT)


@pytest.mark.parametrize("la", [1e-2, 0.5])
@pytest.mark.parametrize("shape", SMALL_SHAPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_isaac_up_to_scale(backend: str, shape: Shape, la: float) -> None:
    # ISAAC keeps the plain bias gradient, so the comparison has no bias.
    isaac = pytest.importorskip("isaac", reason="the peer isaac is not installed")
    rows, inputs, outputs = shape
    x, dy = randn(rows, inputs), randn(rows, outputs, seed=1)
    theirs = isaac.Linear(inputs, outputs, la=la, bias=False, dtype=F64)
    theirs(x).backward(dy)
    dw, _ = emended(backend, x, dy, bias=False, damping=la * rows, **RAW)
    assert_close("dw", la * rows * dw, theirs.weight.grad, EXACT)
    scaled, _ = emended(backend, x, dy, bias=False, damping=la * rows, damping_mode="absolute", scale="gradient")
    assert_close("dw, scale='gradient'", scaled, theirs.weight.grad, EXACT)


@pytest.mark.parametrize("shape", SMALL_SHAPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_rows_change_nothing(backend: str, shape: Shape) -> None:
    rows, inputs, outputs = shape
    x, dy = randn(rows, inputs), randn(rows, outputs, seed=1)
    options = {"bias": False, "damping": 0.3, **RAW}  # with a bias a row of zeros is not a row of zeros
    own = emended(backend, x, dy, **options)
    padded_x = torch.cat([x[:1], torch.zeros(40, inputs, dtype=F64), x[1:]])
    padded_dy = torch.cat([dy[:1], randn(40, outputs, seed=2), dy[1:]])
    assert_close("dw with rows of zeros", emended(backend, padded_x, padded_dy, **options)[0], own[0], EXACT)


@pytest.mark.parametrize("shape", SMALL_SHAPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_order_of_rows_changes_nothing(backend: str, shape: Shape) -> None:
    rows, inputs, outputs = shape
    x, dy = randn(rows, inputs), randn(rows, outputs, seed=1)
    order = torch.randperm(rows)
    own = emended(backend, x, dy, damping=0.3, **RAW)
    assert_grads_close(emended(backend, x[order], dy[order], damping=0.3, **RAW), own, EXACT)


@pytest.mark.parametrize("kind", ["correlated", "low_rank", "duplicates"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_minimum_norm_solution_of_the_ridge_problem(backend: str, kind: str) -> None:
    # dw minimises ||x dw^T - dy||^2 + c ||dw||^2: its derivative vanishes.
    x, dy = make_input(kind, 12, 20), randn(12, 4, seed=1)
    dw, _ = emended(backend, x, dy, bias=False, damping=0.1, **RAW)
    assert_close("normal equation", x.T @ (x @ dw.T) + 0.1 * dw.T, x.T @ dy, EXACT)


@pytest.mark.parametrize("damping_mode", ["relative", "absolute"])
def test_scales_are_multiples(damping_mode: str) -> None:
    rows, inputs = 8, 5
    x, dy = randn(rows, inputs), randn(rows, 3, seed=1)
    raw = oracle(x, dy, damping=0.2, damping_mode=damping_mode, scale="raw")
    nlms = oracle(x, dy, damping=0.2, damping_mode=damping_mode, scale="nlms")
    gradient = oracle(x, dy, damping=0.2, damping_mode=damping_mode, scale="gradient")
    trace = with_ones(x, True).square().sum().item()
    c = 0.2 if damping_mode == "absolute" else 0.2 * trace / 6
    assert_grads_close(nlms, (rows * raw[0], rows * raw[1]), EXACT)
    assert_grads_close(gradient, (c * raw[0], c * raw[1]), EXACT)
    assert_grads_close(raw, solved(x, dy, True, c), EXACT)
