"""Training with emended layers: optimizers, autocast, loss scaling, clipping."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import (
    BACKENDS,
    BF16,
    F16,
    F32,
    HALF_TYPES,
    SMALL_SHAPES,
    TOLERANCE,
    Shape,
    assert_close,
    assert_grads_close,
    assert_identical,
    device_of,
    needs_kernels,
    oracle,
    randn,
)
from torch import Tensor, nn
from torch.nn import functional as F

import consequentialism as cw

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=1.0),
    "NAG": lambda p: torch.optim.SGD(p, lr=0.2, momentum=0.9, nesterov=True),
    "RMSProp": lambda p: torch.optim.RMSprop(p, lr=0.01),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.02),
    "SGD, weight decay": lambda p: torch.optim.SGD(p, lr=1.0, weight_decay=1e-4),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=1e-2),
}


def network(**options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(cw.Linear(10, 32, **options), nn.Tanh(), cw.Linear(32, 3, **options))


def problem() -> tuple[Tensor, Tensor]:
    """Classes that a linear map cannot tell apart."""
    x = randn(96, 10, dtype=F32)
    return x, (x[:, :3] * x[:, 3:6]).argmax(1)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_optimizer_decreases_the_loss(backend: str, optimizer: str) -> None:
    device = device_of(backend)
    model, (x, target) = network(backend=backend, device=device), problem()
    x, target = x.to(device), target.to(device)
    steps = OPTIMIZERS[optimizer](model.parameters())
    losses = []
    for _ in range(80):
        steps.zero_grad()
        loss = F.cross_entropy(model(x), target)
        loss.backward()
        steps.step()
        losses.append(loss.item())
    assert losses[-1] < 0.25 * losses[0], f"{losses[0]:.3f} to {losses[-1]:.3f}"


def test_emended_sgd_is_faster_than_plain_sgd() -> None:
    x, target = problem()
    final = {}
    for name in ("emended", "plain"):
        best = float("inf")
        for lr in (0.03, 0.1, 0.3, 1.0, 2.0):
            model = network()
            model = model if name == "emended" else cw.revert(model)
            steps = torch.optim.SGD(model.parameters(), lr=lr)
            for _ in range(60):
                steps.zero_grad()
                loss = F.cross_entropy(model(x), target)
                loss.backward()
                steps.step()
            best = min(best, loss.item())
        final[name] = best
    assert final["emended"] < 0.5 * final["plain"], final


def test_one_step_moves_outputs_as_predicted() -> None:
    layer = cw.Linear(10, 3, dtype=torch.float64)
    x, target = randn(6, 10), randn(6, 3, seed=1)
    before = layer(x)
    dy = (before - target).detach() / 6
    before.backward(dy)
    predicted = cw.predict_change(x, layer.weight.grad, layer.bias.grad)
    torch.optim.SGD(layer.parameters(), lr=0.5).step()
    assert_close("change", layer(x) - before, -0.5 * predicted, TOLERANCE[torch.float64])


def test_weight_decay_is_added_to_the_emended_gradient() -> None:
    layer = cw.Linear(5, 3, dtype=torch.float64)
    x, dy = randn(8, 5), randn(8, 3, seed=1)
    before = layer.weight.detach().clone()
    layer(x).backward(dy)
    torch.optim.SGD(layer.parameters(), lr=0.1, weight_decay=0.5).step()
    expected = before - 0.1 * (oracle(x, dy)[0] + 0.5 * before)
    assert_close("weight", layer.weight, expected, TOLERANCE[torch.float64])


def test_gradient_clipping() -> None:
    model, (x, target) = network(), problem()
    F.cross_entropy(model(x), target).backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    assert_close("norm", norm, torch.stack([g.norm() for g in gradients]).norm(), TOLERANCE[F32])
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert_close("clipped", parameter.grad, gradient * (1e-3 / norm), TOLERANCE[F32])


@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
@pytest.mark.parametrize("shape", SMALL_SHAPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend: str, shape: Shape, dtype: torch.dtype) -> None:
    rows, inputs, outputs = shape
    device = device_of(backend)
    x, dy = randn(rows, inputs, dtype=F32, device=device), randn(rows, outputs, seed=1, dtype=dtype, device=device)
    expected = oracle(x.to(dtype), dy)
    for inside in (False, True):
        own = cw.Linear(inputs, outputs, backend=backend, device=device)
        plain = nn.Linear(inputs, outputs, device=device)
        plain.load_state_dict(own.state_dict())
        with torch.autocast(device, dtype=dtype):
            out = own(x)
            assert_identical("y", out, plain(x))
            assert out.dtype == dtype
            if inside:
                out.backward(dy)
        if not inside:
            out.backward(dy)
        assert own.weight.grad is not None
        assert own.bias.grad is not None
        assert own.weight.grad.dtype == own.bias.grad.dtype == F32
        assert_grads_close((own.weight.grad, own.bias.grad), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
@pytest.mark.parametrize("shape", SMALL_SHAPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_alone_inside_autocast_is_that_of_float32(backend: str, shape: Shape, dtype: torch.dtype) -> None:
    rows, inputs, outputs = shape
    device = device_of(backend)
    x, dy = randn(rows, inputs, dtype=F32, device=device), randn(rows, outputs, seed=1, dtype=F32, device=device)
    layer = cw.Linear(inputs, outputs, backend=backend, device=device)
    out = layer(x)
    with torch.autocast(device, dtype=dtype):
        out.backward(dy)
    assert layer.weight.grad is not None
    assert_grads_close((layer.weight.grad, layer.bias.grad), oracle(x, dy), TOLERANCE[F32])


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_leaves_a_bad_gram_alone(backend: str) -> None:
    # Every factorisation and inverse stays in float32: here a half type is off by more than the gradient.
    device = device_of(backend)
    x = (0.05 * randn(40, 60) + randn(1, 60, seed=1)).to(device, BF16)
    dy = randn(40, 3, seed=2, dtype=BF16, device=device)
    layer = cw.Linear(60, 3, damping=1e-3, backend=backend, device=device)
    with torch.autocast(device, dtype=BF16):
        layer(x).backward(dy)
    assert_close("dw", layer.weight.grad, oracle(x, dy, damping=1e-3)[0], TOLERANCE[BF16])


def test_autocast_function_and_float64() -> None:
    x, dy = randn(8, 5), randn(8, 3, seed=1)
    with torch.autocast("cpu", dtype=BF16):
        layer = cw.Linear(5, 3, dtype=torch.float64)
        out = layer(x)  # autocast leaves float64 alone
        assert out.dtype == torch.float64
        out.backward(dy)
        own = cw.emended_weight_grad(x.float(), dy.float())
        assert own[0].dtype == F32
    assert layer.weight.grad is not None
    assert_close("dw", layer.weight.grad, oracle(x, dy)[0], TOLERANCE[torch.float64])
    assert_grads_close(own, oracle(x.float(), dy.float()), TOLERANCE[F32])


@pytest.mark.parametrize("scale", [2.0, 1024.0, 65536.0])
def test_loss_scaling_commutes_through_a_network(scale: float) -> None:
    model, (x, target) = network(), problem()
    F.cross_entropy(model(x), target).backward()
    expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    (scale * F.cross_entropy(model(x), target)).backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert_identical("gradient", parameter.grad, scale * gradient)


def test_grad_scaler_trains_and_skips() -> None:
    model, (x, target) = network(), problem()
    steps = torch.optim.SGD(model.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    losses = []
    for k in range(60):
        steps.zero_grad()
        with torch.autocast("cpu", dtype=F16):
            loss = F.cross_entropy(model(x), target)
        if k == 3:  # one step overflows: nothing may move, and the scale must fall
            loss = loss * float("inf")
        before = [p.detach().clone() for p in model.parameters()]
        scale = scaler.get_scale()
        scaler.scale(loss).backward()
        scaler.step(steps)
        scaler.update()
        if k == 3:
            assert scaler.get_scale() < scale
            for parameter, old in zip(model.parameters(), before, strict=True):
                assert_identical("parameter", parameter.detach(), old)
        else:
            losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("place", ["x", "dy"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_grad_scaler_sees_one_bad_row(backend: str, place: str) -> None:
    device = device_of(backend)
    layer = cw.Linear(10, 3, backend=backend, device=device)
    steps = torch.optim.SGD(layer.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler(device, init_scale=2.0)
    x, dy = randn(96, 10, dtype=F32, device=device), randn(96, 3, seed=1, dtype=F32, device=device)
    (x if place == "x" else dy)[50, 0] = float("inf")
    before = layer.weight.detach().clone()
    scaler.scale((layer(x) * dy).sum()).backward()
    scaler.step(steps)
    scaler.update()
    assert_identical("weight", layer.weight.detach(), before)
    assert scaler.get_scale() == 1.0


def test_frozen_layers_train_around() -> None:
    model, (x, target) = network(), problem()
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    steps = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    F.cross_entropy(model(x), target).backward()
    steps.step()
    assert model[0].weight.grad is None
    assert_identical("frozen weight", model[0].weight, before)
    assert model[2].weight.grad is not None


@pytest.mark.filterwarnings("ignore:Error detected in EmendedLinearBackward")
def test_anomaly_detection_names_the_layer() -> None:
    layer = cw.Linear(5, 3)
    x = randn(8, 5, dtype=F32)
    x[0, 0] = float("nan")
    with (
        pytest.warns(UserWarning, match="Anomaly Detection"),
        torch.autograd.detect_anomaly(),
        pytest.raises(RuntimeError, match=r"EmendedLinear.*returned nan"),
    ):
        layer(x).sum().backward()


@needs_kernels
def test_threads_of_one_process() -> None:
    # Several threads may each train a model of their own.
    from concurrent.futures import ThreadPoolExecutor

    x, dy = randn(64, 20, dtype=F32), randn(64, 5, seed=1, dtype=F32)
    expected = cw.emended_weight_grad(x, dy)[0]

    def work(_: int) -> Tensor:
        layer = cw.Linear(20, 5)
        for _ in range(5):
            layer.zero_grad()
            layer(x).backward(dy)
        assert layer.weight.grad is not None
        return layer.weight.grad

    with ThreadPoolExecutor(4) as pool:
        for gradient in pool.map(work, range(8)):
            assert_close("dw", gradient, expected, TOLERANCE[F32])


def test_threads_share_a_model() -> None:
    from concurrent.futures import ThreadPoolExecutor

    torch.manual_seed(0)
    model = cw.convert(torch.nn.Sequential(torch.nn.Linear(12, 20), torch.nn.Tanh(), torch.nn.Linear(20, 5)))

    def gradients(seed: int) -> tuple[Tensor, ...]:
        loss = model(randn(8, 12, seed=seed, dtype=F32)).square().sum()
        return torch.autograd.grad(loss, list(model.parameters()))

    expected = [gradients(seed) for seed in range(16)]
    with ThreadPoolExecutor(4) as pool:
        for own, alone in zip(pool.map(gradients, range(16)), expected, strict=True):
            for gradient, other in zip(own, alone, strict=True):
                assert_identical("gradient", gradient, other)
