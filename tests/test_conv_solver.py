"""Convolutions with ``solver="cg"``: the linear layer's solution on unfolded patches, each group apart."""

from __future__ import annotations

import math

import pytest
import torch
from cases import (
    BACKENDS,
    DTYPES,
    EXACT,
    F32,
    F64,
    TOLERANCE,
    TRANSFORM,
    assert_close,
    assert_grads_close,
    device_of,
    randn,
)
from conv_cases import CASES, conv_gradients, conv_oracle, layers, padded

import consequentialism as cw
from consequentialism import reference
from consequentialism.solve import cost

SOME = ("1d stride", "2d wide", "2d few rows", "depthwise", "2d same", "3d")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_converged_is_the_oracle(backend: str, case: str, dtype: torch.dtype) -> None:
    device = device_of(backend)
    layer, _ = layers(CASES[case], solver="cg", iterations=80, backend=backend, device=device, dtype=dtype)
    x = randn(CASES[case][0], CASES[case][1], *CASES[case][3], dtype=dtype, device=device)
    y = layer(x)
    dy = randn(*y.shape, seed=1, dtype=dtype, device=device)
    y.backward(dy)
    assert_grads_close(conv_gradients(layer), conv_oracle(layer, x, dy), TOLERANCE[dtype])


@pytest.mark.parametrize("scale", ["raw", "nlms", "gradient"])
@pytest.mark.parametrize("case", CASES)
def test_stopped_early_is_the_linear_layer_on_patches(case: str, scale: str) -> None:
    options = {"solver": "cg", "iterations": 3, "damping": 0.1, "scale": scale}
    layer, _ = layers(CASES[case], dtype=F64, **options)
    x = randn(CASES[case][0], CASES[case][1], *CASES[case][3])
    y = layer(x)
    dy = randn(*y.shape, seed=1)
    y.backward(dy)
    wide, padding = padded(layer, x)
    geometry = (layer.kernel_size, layer.stride, padding, layer.dilation, layer.groups)
    patches, errors = reference.conv_patches(wide, *geometry), reference.conv_errors(dy, layer.groups)
    # The samples that a mean-reduced loss averages over are images here, rows there.
    times = x.shape[0] / patches.shape[1] if scale == "nlms" else 1
    found = [
        cw.emended_weight_grad(p, e, bias=layer.bias is not None, **options)
        for p, e in zip(patches, errors, strict=True)
    ]
    dw = times * torch.cat([dw for dw, _ in found]).reshape(layer.weight.shape)
    assert_close("dw", layer.weight.grad, dw, EXACT)
    if layer.bias is not None:
        assert_close("db", layer.bias.grad, times * torch.cat([db for _, db in found]), EXACT)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["x", "dy"])
@pytest.mark.parametrize("case", SOME)
def test_one_bad_entry_spoils_everything(case: str, where: str, value: float) -> None:
    layer, _ = layers(CASES[case], solver="cg", dtype=F32)
    x = randn(CASES[case][0], CASES[case][1], *CASES[case][3], dtype=F32)
    dy = randn(*layer(x).shape, seed=1, dtype=F32)
    (x if where == "x" else dy)[0, 0].view(-1)[3] = value
    layer(x).backward(dy)
    groups = layer.groups if where == "x" else 1  # a group's Gram knows its own channels only
    for gradient in conv_gradients(layer):
        assert gradient is None or gradient[: gradient.shape[0] // groups].isnan().all()


@pytest.mark.parametrize("case", SOME)
def test_compile_full_graph(case: str) -> None:
    torch._dynamo.reset()
    layer, _ = layers(CASES[case], solver="cg", dtype=F64)
    x = randn(CASES[case][0], CASES[case][1], *CASES[case][3])
    dy = randn(*layer(x).shape, seed=1)
    layer(x).backward(dy)
    expected = conv_gradients(layer)
    layer.zero_grad()
    torch.compile(layer, fullgraph=True, backend="aot_eager")(x).backward(dy)
    assert_grads_close(conv_gradients(layer), expected, TRANSFORM[F64])
    torch._dynamo.reset()


def test_auto() -> None:
    def chosen(outputs: int = 64, **options: float) -> str:
        settings = cw.Options(**{"iterations": 32, "damping": 200, **options})
        return cost.conv_plan(50_000, 4608, outputs, F32, "cpu", settings).solver

    assert chosen() == "cg"
    assert chosen(damping=1) == "cholesky"
    assert chosen(solver="cholesky") == "cholesky"
    assert chosen(solver="cg", damping=1) == "cg"
    assert chosen(outputs=512) == "cholesky"
