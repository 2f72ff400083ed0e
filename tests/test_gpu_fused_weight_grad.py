"""The weight gradient in one launch, on a device: both variants, streams, graphs, bits; see test_gpu_contracts.py."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import (
    DTYPES,
    F32,
    F64,
    SHAPES,
    TOLERANCE,
    Gradients,
    Shape,
    assert_grads_close,
    assert_identical,
    oracle,
    randn,
)
from torch import Tensor

import consequentialism as cw
from consequentialism.backend import compiled as ops

pytestmark = pytest.mark.skipif(cw.backends()["cuda"] != "available", reason=f"backend cuda: {cw.backends()['cuda']}")
VARIANTS = ("recompute", "cooperative")
OPTIONS = (1.0, "relative", "nlms")
LARGE: tuple[Shape, ...] = ((64, 784, 1600), (128, 1024, 1024), (128, 4096, 1000), (60, 1600, 10))
CHOSEN: tuple[Shape, ...] = ((20, 130, 200), (64, 784, 1600), (128, 1000, 333))


@pytest.fixture(autouse=True)
def _full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


def batch(shape: Shape, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    rows, inputs, outputs = shape
    x = randn(rows, inputs, seed=seed, dtype=dtype, device="cuda")
    return x, randn(rows, outputs, seed=seed + 1, dtype=dtype, device="cuda")


def fused(variant: str, x: Tensor, dy: Tensor, bias: bool = True, options: tuple[Any, ...] = OPTIONS) -> Gradients:
    dw, db = torch.ops.consequentialism.fused_weight_grad.by(x, dy, bias, *options, variant)
    return dw, db if bias else None


def serves(shape: Shape, dtype: torch.dtype, bias: bool = True) -> bool:
    rows, inputs, _ = shape
    return rows <= min(64 if dtype == F64 else 128, inputs + bias)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES + LARGE, ids=str)
def test_against_float64(shape: Shape, dtype: torch.dtype, variant: str) -> None:
    x, dy = batch(shape, dtype)
    for bias in (True, False):
        if serves(shape, dtype, bias):
            assert_grads_close(fused(variant, x, dy, bias), oracle(x, dy, bias), TOLERANCE[dtype])
        else:
            with pytest.raises(ValueError, match="are not fused: more rows than"):
                fused(variant, x, dy, bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_fused_is_served_all_the_same(dtype: torch.dtype) -> None:
    for shape in ((200, 300, 40), (50, 20, 30)):
        x, dy = batch(shape, dtype)
        assert_grads_close(ops.fused_weight_grad(x, dy, True, *OPTIONS), oracle(x, dy), TOLERANCE[dtype])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided(dtype: torch.dtype, variant: str) -> None:
    x, dy = randn(40, 103, dtype=dtype, device="cuda"), randn(40, 95, seed=1, dtype=dtype, device="cuda")
    for own_x, own_dy in ((x[:, 3:], dy[:, 1:]), (x[::2, 2:], dy[::2, :64]), (x[:, :70], dy[:, :1].expand(40, 9))):
        assert_grads_close(fused(variant, own_x, own_dy), oracle(own_x, own_dy), TOLERANCE[dtype])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", CHOSEN, ids=str)
def test_the_same_bits_on_two_streams_at_once(shape: Shape, variant: str) -> None:
    x, dy = batch(shape, F32)
    first = fused(variant, x, dy)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    found: list[Gradients] = []
    for _ in range(25):
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(fused(variant, x, dy))
    torch.cuda.synchronize()
    for own in found:
        assert_identical("dw", own[0], first[0])
        assert_identical("db", own[1], first[1])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", CHOSEN, ids=str)
def test_graphs_replayed_at_once(shape: Shape, variant: str) -> None:
    x, dy = batch(shape, F32)
    expected = fused(variant, x, dy)
    torch.cuda.synchronize()
    captured = []
    for _ in range(2):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            own = fused(variant, x, dy)
        captured.append((graph, own, torch.cuda.Stream()))
    for _ in range(25):
        for graph, _, stream in captured:
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for _, own, _ in captured:
        assert_identical("dw", own[0], expected[0])
        assert_identical("db", own[1], expected[1])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_waits_for_the_device(dtype: torch.dtype, variant: str) -> None:
    x, dy = batch((64, 784, 100), dtype)
    fused(variant, x, dy)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        fused(variant, x, dy)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_not_finite_gives_nan(dtype: torch.dtype, value: float, variant: str) -> None:
    shape = (60, 784, 1600)
    for where, row, column in ((0, 0, 0), (0, 59, 783), (1, 0, 0), (1, 59, 1599), (1, 30, 700)):
        tensors = batch(shape, dtype)
        tensors[where][row, column] = value
        dw, db = fused(variant, *tensors)
        assert dw.isnan().all()
        assert db is not None
        assert db.isnan().all()
    # The counters are as they were: the next launch is right.
    x, dy = batch(shape, dtype)
    assert_grads_close(fused(variant, x, dy), oracle(x, dy), TOLERANCE[dtype])


@pytest.mark.parametrize("shape", CHOSEN, ids=str)
def test_opcheck(shape: Shape) -> None:
    x, dy = batch(shape, F32)
    for bias in (True, False):
        torch.library.opcheck(torch.ops.consequentialism.fused_weight_grad.default, (x, dy, bias, *OPTIONS))


@pytest.mark.parametrize("shape", CHOSEN, ids=str)
def test_a_small_layer_takes_one_launch(shape: Shape) -> None:
    x, dy = batch(shape, F32)
    layer = cw.Linear(shape[1], shape[2], device="cuda")
    layer(x).backward(dy)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        layer(x).backward(dy)
        torch.cuda.synchronize()
    names = [event.key for event in profile.key_averages()]
    assert any("fused_weight_grad_kernel" in name for name in names), names
    assert not any("damped_inverse_block_kernel" in name for name in names), names
