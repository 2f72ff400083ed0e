"""Contracts at the edges: empty and dead inputs, NaN and infinity, what is not computed, second derivatives."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import (
    BACKENDS,
    DTYPES,
    F16,
    F32,
    F64,
    HALF_TYPES,
    SMALL_SHAPES,
    TOLERANCE,
    Recorder,
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

import consequentialism as cw
from consequentialism import reference

SHARED = {"damping_mode": ("relative", "absolute"), "scale": ("nlms", "raw", "gradient")}


@pytest.mark.parametrize("damping_mode", SHARED["damping_mode"])
@pytest.mark.parametrize("scale", SHARED["scale"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_dead_inputs_give_exactly_zero(backend: str, dtype: torch.dtype, scale: str, damping_mode: str) -> None:
    device = device_of(backend)
    for rows, inputs, outputs in SMALL_SHAPES:
        x, dy = torch.zeros(rows, inputs, dtype=dtype, device=device), randn(rows, outputs, dtype=dtype, device=device)
        options = {"scale": scale, "damping_mode": damping_mode, "backend": backend}
        dw, _ = cw.emended_weight_grad(x, dy, bias=False, **options)
        assert_identical("dw", dw, torch.zeros_like(dw))
        dw, db = cw.emended_weight_grad(x, dy, bias=True, **options)
        assert_identical("dw with a bias", dw, torch.zeros_like(dw))
        assert db is not None
        assert_close("db", db, oracle(x, dy, True, scale=scale, damping_mode=damping_mode)[1], TOLERANCE[dtype])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("leading", [(0,), (3, 0), (0, 4)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend: str, dtype: torch.dtype, leading: tuple[int, ...], bias: bool) -> None:
    device = device_of(backend)
    layer = cw.Linear(5, 3, bias=bias, backend=backend, device=device, dtype=dtype)
    plain = cw.revert(cw.Linear(5, 3, bias=bias, device=device, dtype=dtype))
    for one in (layer, plain):
        x = torch.zeros(*leading, 5, dtype=dtype, device=device, requires_grad=True)
        out = one(x)
        assert out.shape == (*leading, 3)
        out.sum().backward()
        assert x.grad is not None
        assert x.grad.shape == x.shape
    for name, parameter in layer.named_parameters():
        assert_identical(f"{name}.grad", parameter.grad, plain.get_parameter(name).grad)
        assert_identical(f"{name}.grad", parameter.grad, torch.zeros_like(parameter))
    dw, db = cw.emended_weight_grad(x.detach(), torch.zeros(*leading, 3, dtype=dtype, device=device), bias=bias)
    assert_identical("dw", dw, torch.zeros(3, 5, dtype=dtype, device=device))
    assert_identical("db", db, torch.zeros(3, dtype=dtype, device=device) if bias else None)


@pytest.mark.parametrize(("inputs", "outputs"), [(0, 3), (4, 0)])
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_inputs_or_no_outputs(backend: str, inputs: int, outputs: int) -> None:
    device = device_of(backend)
    layer = cw.Linear(inputs, outputs, backend=backend, device=device, dtype=F64)
    layer(randn(6, inputs, device=device)).sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.shape == parameter.shape
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("damping_mode", SHARED["damping_mode"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["x", "dy"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_bad_entry_spoils_everything(
    backend: str, dtype: torch.dtype, where: str, value: float, damping_mode: str
) -> None:
    device = device_of(backend)
    for rows, inputs, outputs in ((1, 1, 1), (1, 5, 3), (6, 4, 3), (4, 9, 2), (65, 33, 12), (33, 65, 4), (33, 65, 90)):
        for bias in (True, False):
            tensors = {"x": randn(rows, inputs, dtype=dtype), "dy": randn(rows, outputs, seed=1, dtype=dtype)}
            tensors[where][rows // 2, -1] = value
            x, dy = tensors["x"].to(device), tensors["dy"].to(device)
            dw, db = cw.emended_weight_grad(x, dy, bias=bias, backend=backend, damping_mode=damping_mode)
            assert dw.isnan().all(), f"dw of {rows}x{inputs}x{outputs}: {dw.isnan().sum()} of {dw.numel()} are NaN"
            assert db is None or db.isnan().all(), f"db of {rows}x{inputs}x{outputs}: {db}"


@pytest.mark.parametrize("backend", BACKENDS)
def test_opposite_infinities_do_not_cancel(backend: str) -> None:
    x, dy = randn(6, 4, device=device_of(backend)), randn(6, 3, seed=1, device=device_of(backend))
    dy[0, 0], dy[1, 0] = math.inf, -math.inf
    for gradient in cw.emended_weight_grad(x, dy, backend=backend):
        assert gradient is not None
        assert gradient.isnan().all()


@pytest.mark.parametrize("dtype", [F32, *HALF_TYPES], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_large_finite_dy_stays_finite(backend: str, dtype: torch.dtype) -> None:
    # In float16, as loss scaling makes them: the sum over the rows leaves the type's range, the gradient does not.
    device = device_of(backend)
    x = randn(100, 4, dtype=dtype, device=device)
    dy = torch.full((100, 3), torch.finfo(dtype).max / (2 if dtype == F16 else 1e4), dtype=dtype, device=device)
    dw, _ = cw.emended_weight_grad(x, dy, bias=False, scale="raw", backend=backend)
    assert_close("dw", dw, oracle(x, dy, False, scale="raw")[0], TOLERANCE[dtype])


def run_layer(layer: nn.Module, x: Tensor) -> list[str]:
    """The package's own operators that a forward and, where it can, a backward calls."""
    with Recorder() as recorder:
        out = layer(x)
        if out.requires_grad:
            out.square().sum().backward()
    return recorder.own()


@needs_kernels
def test_the_recorder_sees_the_ops() -> None:
    names = run_layer(cw.Linear(5, 3), randn(8, 5, dtype=F32))
    assert any("gram_inverse" in name for name in names), names
    assert any("weight_grad" in name for name in names), names


def test_nothing_is_computed_without_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the reference was called")

    for name in ("gram_inverse", "emended_input", "weight_grad"):
        monkeypatch.setattr(reference, name, refuse)
    x = randn(8, 5, dtype=F32)
    for backend in ("auto", "reference"):
        layer = cw.Linear(5, 3, backend=backend)
        with torch.no_grad():
            assert run_layer(layer, x.clone().requires_grad_()) == []
        with torch.inference_mode():
            assert run_layer(layer, x) == []
        layer.requires_grad_(False)
        assert run_layer(layer, x) == []
        trainable_input = x.clone().requires_grad_()
        assert run_layer(layer, trainable_input) == []
        assert_close("x.grad", trainable_input.grad, 2 * layer(x) @ layer.weight, TOLERANCE[F32])


def test_forward_without_backward_computes_no_gradient() -> None:
    with Recorder() as recorder:
        cw.Linear(5, 3)(randn(8, 5, dtype=F32))
    assert not [name for name in recorder.own() if "weight_grad" in name]


@pytest.mark.parametrize("shape", SMALL_SHAPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_frozen_bias_and_frozen_weight(backend: str, shape: Shape) -> None:
    rows, inputs, outputs = shape
    x, dy = randn(rows, inputs, device=device_of(backend)), randn(rows, outputs, seed=1, device=device_of(backend))
    dw, db = oracle(x, dy)
    for frozen, name, expected in (("bias", "weight", dw), ("weight", "bias", db)):
        layer = cw.Linear(inputs, outputs, backend=backend, device=x.device, dtype=F64)
        layer.get_parameter(frozen).requires_grad_(False)
        layer(x).backward(dy)
        assert layer.get_parameter(frozen).grad is None
        # The bias stands in the Gram whether it is trained or not.
        assert_close(name, layer.get_parameter(name).grad, expected, TOLERANCE[F64])


def test_input_without_gradient_costs_no_product() -> None:
    layer, x = cw.Linear(64, 3, bias=False), randn(8, 64, dtype=F32)

    def products(x: Tensor) -> int:
        with Recorder() as recorder:
            layer(x).square().sum().backward()
        return sum(name in ("aten.mm.default", "aten.addmm.default", "aten.matmul.default") for name in recorder.names)

    assert products(x.clone().requires_grad_()) == products(x) + 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_derivative_is_an_error(backend: str) -> None:
    layer = cw.Linear(5, 3, backend=backend, device=device_of(backend))
    x = randn(8, 5, dtype=F32, device=device_of(backend)).requires_grad_()
    loss = layer(x).square().sum()
    for target in (layer.weight, x):
        (gradient,) = torch.autograd.grad(loss, target, create_graph=True, retain_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward(retain_graph=True)


@needs_kernels
@pytest.mark.parametrize("name", ["input_gram", "gram_inverse", "emended_input"])
def test_an_op_itself_has_no_derivative(name: str) -> None:
    x = randn(4, 3).requires_grad_()
    op = getattr(torch.ops.consequentialism, name)
    out = op(x, True, "dual", *(() if name == "input_gram" else (1.0, "relative", "nlms")))
    out = out[0] if isinstance(out, tuple) else out
    with pytest.raises(RuntimeError, match="not implemented"):
        out.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_arguments_are_left_as_they_were(backend: str) -> None:
    for rows, inputs, outputs in SMALL_SHAPES:
        x, dy = randn(rows, inputs, device=device_of(backend)), randn(rows, outputs, seed=1, device=device_of(backend))
        before = x.clone(), dy.clone()
        cw.emended_weight_grad(x, dy, backend=backend)
        assert_identical("x", x, before[0])
        assert_identical("dy", dy, before[1])


def test_input_changed_after_forward() -> None:
    # Where the layer keeps x it must notice, as torch does; where it keeps the emended x the change does no harm.
    for rows, inputs, outputs in SMALL_SHAPES:
        x, dy = randn(rows, inputs), randn(rows, outputs, seed=1)
        layer = cw.Linear(inputs, outputs, dtype=F64)
        expected = oracle(x, dy)
        out = layer(x)
        x.add_(1)
        error: RuntimeError | None = None
        try:
            out.backward(dy)
        except RuntimeError as caught:
            error = caught
        if error is not None:
            assert "modified by an inplace operation" in str(error)
        else:
            assert layer.bias is not None
            assert layer.weight.grad is not None
            assert_grads_close((layer.weight.grad, layer.bias.grad), expected, TOLERANCE[F64])
