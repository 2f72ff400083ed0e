"""Convolutions under torch.compile and torch.func."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import BACKENDS, BF16, F32, F64, TOLERANCE, TRANSFORM, assert_close, device_of, randn
from conv_cases import CASES, conv_oracle, layers
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import consequentialism as cw
from consequentialism import reference

pytestmark = pytest.mark.usefixtures("fresh_compiler")
SOME = ("1d stride", "2d wide", "2d few rows", "depthwise", "2d same", "circular", "3d")


def gradients(layer: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, Tensor]:
    layer.zero_grad()
    x = x.detach().clone().requires_grad_()
    y = run(x)
    y.square().sum().backward()
    return {"y": y.detach(), "dx": x.grad, **{name: p.grad.clone() for name, p in layer.named_parameters()}}


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("case", SOME)
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_whole_is_as_eager(backend: str, case: str, dtype: torch.dtype) -> None:
    layer, _ = layers(CASES[case], backend=backend, device=device_of(backend), dtype=dtype)
    batch, channels, _, size, _ = CASES[case]
    x = randn(batch, channels, *size, dtype=dtype, device=device_of(backend))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    expected = gradients(layer, layer, x)
    for name, tensor in gradients(layer, compiled, x).items():
        assert_close(name, tensor, expected[name], TRANSFORM[dtype])


def test_compiled_for_any_batch_and_under_autocast() -> None:
    model = nn.Sequential(cw.Conv2d(3, 6, 3, padding=1), nn.ReLU(), cw.Conv2d(6, 4, 3, groups=2))
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (4, 5, 7):
        x = randn(batch, 3, 8, 8, dtype=F32)
        expected = gradients(model, model, x)
        for name, tensor in gradients(model, compiled, x).items():
            assert_close(name, tensor, expected[name], TRANSFORM[F32])

    def half(run: Any) -> Any:
        def call(x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=BF16):
                return run(x)

        return call

    expected = gradients(model, half(model), x)
    for name, tensor in gradients(model, half(compiled), x).items():
        assert_close(name, tensor, expected[name], TOLERANCE[BF16])


def test_compiled_weight_grad_function() -> None:
    x, dy = randn(4, 3, 8, 8), randn(4, 5, 6, 6, seed=1)
    compiled = torch.compile(cw.emended_conv_weight_grad, fullgraph=True, backend="aot_eager")
    own = compiled(x, dy, 3, damping=0.1)
    expected = cw.emended_conv_weight_grad(x, dy, 3, damping=0.1)
    for a, b in zip(own, expected, strict=True):
        assert_close("gradient", a, b, TRANSFORM[F64])


@pytest.mark.parametrize("case", SOME)
def test_func_grad_of_a_layer(case: str) -> None:
    layer, _ = layers(CASES[case], dtype=F64)
    batch, channels, _, size, _ = CASES[case]
    x = randn(batch, channels, *size)
    dy = randn(*layer(x).shape, seed=1)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    own = grad(lambda p: (functional_call(layer, p, (x,)) * dy).sum())(parameters)
    dw, db = conv_oracle(layer, x, dy)
    assert_close("dw", own["weight"], dw, TRANSFORM[F64])
    assert_close("db", own.get("bias"), db, TRANSFORM[F64])


def test_vmap_of_grad_is_each_samples_own() -> None:
    weight, bias = randn(6, 2, 3, 3), randn(6, seed=1)
    x, dy = randn(3, 2, 4, 7, 7), randn(3, 2, 6, 7, 7, seed=1)

    def objective(weight: Tensor, bias: Tensor, x: Tensor, dy: Tensor) -> Tensor:
        return (cw.emended_conv(x, weight, bias, padding=1, groups=2) * dy).sum()

    dw, db = vmap(grad(objective, argnums=(0, 1)), in_dims=(None, None, 0, 0))(weight, bias, x, dy)
    for k in range(3):
        own = reference.emended_conv_weight_grad(x[k], dy[k], (3, 3), (1, 1), (1, 1), (1, 1), 2)
        assert_close(f"dw of {k}", dw[k], own[0], TRANSFORM[F64])
        assert_close(f"db of {k}", db[k], own[1], TRANSFORM[F64])


def test_what_would_be_the_plain_gradient_is_refused() -> None:
    weight, x = randn(4, 3, 3, 3), randn(2, 3, 6, 6)

    def objective(weight: Tensor) -> Tensor:
        return cw.emended_conv(x, weight).square().sum()

    with pytest.raises(RuntimeError, match="plain"):
        torch.compile(grad(objective), backend="aot_eager", fullgraph=True)(weight)
    with pytest.raises(RuntimeError, match="nested"):
        grad(lambda w: grad(objective)(w).sum())(weight)
