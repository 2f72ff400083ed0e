"""`Linear`: torch's layer in everything but the gradient of its parameters."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from cases import (
    BACKENDS,
    DTYPES,
    F32,
    F64,
    HALF_TYPES,
    SAME_WAY,
    SHAPES,
    SMALL_SHAPES,
    TOLERANCE,
    Shape,
    assert_close,
    assert_grads_close,
    assert_identical,
    device_of,
    oracle,
    randn,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import consequentialism as cw


def gradients(layer: nn.Linear) -> tuple[Tensor, Tensor | None]:
    assert layer.weight.grad is not None
    return layer.weight.grad, None if layer.bias is None else layer.bias.grad


def twins(inputs: int, outputs: int, bias: bool = True, **options: Any) -> tuple[cw.Linear, nn.Linear]:
    """An emended layer and torch's with the same parameters."""
    plain_options = {key: options[key] for key in ("device", "dtype") if key in options}
    own, plain = cw.Linear(inputs, outputs, bias, **options), nn.Linear(inputs, outputs, bias, **plain_options)
    plain.load_state_dict(own.state_dict())
    return own, plain


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_output_and_input_gradient_are_torchs(backend: str, dtype: torch.dtype, shape: Shape, bias: bool) -> None:
    rows, inputs, outputs = shape
    device = device_of(backend)
    own, plain = twins(inputs, outputs, bias, backend=backend, device=device, dtype=dtype)
    x, dy = randn(rows, inputs, dtype=dtype, device=device), randn(rows, outputs, seed=1, dtype=dtype, device=device)
    own_x, plain_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    own_y, plain_y = own(own_x), plain(plain_x)
    assert_identical("y", own_y, plain_y)
    own_y.backward(dy)
    plain_y.backward(dy)
    assert_identical("dx", own_x.grad, plain_x.grad)
    assert_grads_close(gradients(own), oracle(x, dy, bias), TOLERANCE[dtype])
    assert own.weight.grad is not None
    assert own.weight.grad.dtype == dtype


@pytest.mark.parametrize("damping_mode", ["relative", "absolute"])
@pytest.mark.parametrize("scale", ["nlms", "raw", "gradient"])
@pytest.mark.parametrize("shape", SMALL_SHAPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_options_reach_the_gradient(backend: str, shape: Shape, scale: str, damping_mode: str) -> None:
    rows, inputs, outputs = shape
    options = {"damping": 0.7, "scale": scale, "damping_mode": damping_mode}
    x, dy = randn(rows, inputs, device=device_of(backend)), randn(rows, outputs, seed=1, device=device_of(backend))
    layer = cw.Linear(inputs, outputs, backend=backend, device=x.device, dtype=F64, **options)
    layer(x).backward(dy)
    assert_grads_close(gradients(layer), oracle(x, dy, **options), TOLERANCE[F64])
    weight = layer.weight.detach().clone().requires_grad_()
    bias = layer.bias.detach().clone().requires_grad_()
    out = cw.emended_linear(x, weight, bias, backend=backend, **options)
    out.backward(dy)
    assert_identical("y", out, layer(x))
    assert_identical("functional dw", weight.grad, layer.weight.grad)
    assert_identical("functional db", bias.grad, layer.bias.grad)
    dw, db = cw.emended_weight_grad(x, dy, backend=backend, **options)
    assert_identical("dw of emended_weight_grad", dw, layer.weight.grad)
    assert_identical("db of emended_weight_grad", db, layer.bias.grad)


@pytest.mark.parametrize("leading", [(), (7,), (2, 3), (2, 1, 4), (1, 1, 1, 1)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_leading_dimensions_are_rows(backend: str, leading: tuple[int, ...]) -> None:
    own, plain = twins(5, 3, backend=backend, device=device_of(backend), dtype=F64)
    x, dy = randn(*leading, 5, device=device_of(backend)), randn(*leading, 3, seed=1, device=device_of(backend))
    out = own(x)
    assert out.shape == plain(x).shape
    assert_close("y", out, plain(x), SAME_WAY)
    out.backward(dy)
    expected = oracle(x.reshape(-1, 5), dy.reshape(-1, 3))
    assert_grads_close(gradients(own), expected, TOLERANCE[F64])
    assert_grads_close(cw.emended_weight_grad(x, dy, backend=backend), expected, TOLERANCE[F64])


@pytest.mark.parametrize("backend", BACKENDS)
def test_options_may_change_between_steps(backend: str) -> None:
    layer = cw.Linear(5, 3, backend=backend, device=device_of(backend), dtype=F64)
    x, dy = randn(8, 5, device=device_of(backend)), randn(8, 3, seed=1, device=device_of(backend))
    for damping in (1.0, 1e-3):
        layer.damping = damping
        layer.zero_grad()
        layer(x).backward(dy)
        assert_grads_close(gradients(layer), oracle(x, dy, damping=damping), TOLERANCE[F64])
    with pytest.raises(ValueError, match="damping"):
        layer.damping = -1.0
    assert layer.damping == 1e-3, "nothing is half-done"


def test_state_dict_both_ways() -> None:
    own, plain = cw.Linear(5, 3), nn.Linear(5, 3)
    assert list(own.state_dict()) == list(plain.state_dict()) == ["weight", "bias"]
    x = randn(4, 5, dtype=F32)
    own.load_state_dict(plain.state_dict())
    assert_identical("y", own(x), plain(x))
    own.weight.data.add_(1)
    plain.load_state_dict(own.state_dict())
    assert_identical("y", own(x), plain(x))
    file = io.BytesIO()
    torch.save(own.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    other = cw.Linear(5, 3, damping=0.1)
    other.load_state_dict(loaded, strict=True)
    assert_identical("y", other(x), own(x))
    assert other.damping == 0.1
    assert list(cw.Linear(5, 3, bias=False).state_dict()) == ["weight"]


@pytest.mark.parametrize("way", ["pickle", "deepcopy", "save"])
def test_copies(way: str) -> None:
    layer = nn.Sequential(cw.Linear(5, 4, damping=0.3, scale="raw"), nn.ReLU(), cw.Linear(4, 2, bias=False))
    x, dy = randn(8, 5, dtype=F32), randn(8, 2, seed=1, dtype=F32)
    layer(x).backward(dy)  # nothing of a step sticks to the layer
    if way == "pickle":
        other = pickle.loads(pickle.dumps(layer))
    elif way == "deepcopy":
        other = copy.deepcopy(layer)
    else:
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert type(other[0]) is cw.Linear
    assert repr(other) == repr(layer)
    for one in (layer, other):
        one.zero_grad()
        one(x).backward(dy)
    for name, parameter in layer.named_parameters():
        assert_identical(f"{name}.grad", other.get_parameter(name).grad, parameter.grad)
        assert other.get_parameter(name) is not parameter


def test_constructor_and_repr_are_torchs() -> None:
    assert repr(cw.Linear(5, 3)) == repr(nn.Linear(5, 3))
    assert repr(cw.Linear(5, 3, False)) == repr(nn.Linear(5, 3, False))
    changed = cw.Linear(5, 3, damping=0.1, damping_mode="absolute", scale="raw", backend="reference")
    for word in ("damping=0.1", "damping_mode='absolute'", "scale='raw'", "backend='reference'"):
        assert word in repr(changed)
    layer = cw.Linear(in_features=5, out_features=3, bias=False, device="meta", dtype=torch.float16)
    assert isinstance(layer, nn.Linear)
    assert layer.bias is None
    assert layer.weight.is_meta
    assert layer.weight.dtype == torch.float16
    torch.manual_seed(1)
    own = cw.Linear(5, 3)
    torch.manual_seed(1)
    assert_identical("initial weight", own.weight, nn.Linear(5, 3).weight)
    assert (own.damping, own.damping_mode, own.scale, own.backend) == (1.0, "relative", "nlms", "auto")
    assert own.process_group is None


def test_nothing_is_kept_between_steps() -> None:
    layer = cw.Linear(5, 3)
    before = set(layer.__dict__), dict(layer._buffers)
    layer(randn(8, 5, dtype=F32)).sum().backward()
    assert (set(layer.__dict__), dict(layer._buffers)) == before


def test_moves_between_types() -> None:
    layer = cw.Linear(5, 3)
    for dtype in (*HALF_TYPES, F64):
        layer = layer.to(dtype)
        layer.zero_grad()
        x, dy = randn(8, 5, dtype=dtype), randn(8, 3, seed=1, dtype=dtype)
        layer(x).backward(dy)
        assert_grads_close(gradients(layer), oracle(x, dy), TOLERANCE[dtype])


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_accumulate(backend: str) -> None:
    layer = cw.Linear(5, 3, backend=backend, device=device_of(backend), dtype=F64)
    total_w, total_b = torch.zeros(3, 5, dtype=F64), torch.zeros(3, dtype=F64)
    for seed in range(3):
        x, dy = randn(8, 5, seed=seed), randn(8, 3, seed=10 + seed)
        layer(x.to(layer.weight.device)).backward(dy.to(layer.weight.device))
        dw, db = oracle(x, dy)
        assert db is not None
        total_w, total_b = total_w + dw, total_b + db
    weight, bias = gradients(layer)
    assert bias is not None
    assert_grads_close((weight.cpu(), bias.cpu()), (total_w, total_b), TOLERANCE[F64])


def test_a_layer_used_twice_emends_each_use() -> None:
    layer = cw.Linear(4, 4, dtype=F64)
    x, dy = randn(8, 4), randn(8, 4, seed=1)
    hidden = layer(x)
    layer(hidden).backward(dy)
    first, second = oracle(x, dy @ layer.weight.detach()), oracle(hidden.detach(), dy)
    assert first[1] is not None
    assert second[1] is not None
    assert_grads_close(gradients(layer), (first[0] + second[0], first[1] + second[1]), TOLERANCE[F64])


def test_tied_weights_add_their_gradients() -> None:
    first, second = cw.Linear(4, 4, bias=False, dtype=F64), cw.Linear(4, 4, bias=False, dtype=F64)
    second.weight = first.weight
    x, dy = randn(8, 4), randn(8, 4, seed=1)
    hidden = first(x)
    second(hidden).backward(dy)
    expected = oracle(x, dy @ first.weight.detach(), False)[0] + oracle(hidden.detach(), dy, False)[0]
    assert_close("dw", first.weight.grad, expected, TOLERANCE[F64])


@pytest.mark.parametrize("backend", BACKENDS)
def test_retained_graph_gives_the_same_again(backend: str) -> None:
    for rows, inputs, outputs in SMALL_SHAPES:
        layer = cw.Linear(inputs, outputs, backend=backend, device=device_of(backend), dtype=F64)
        out = layer(randn(rows, inputs, device=device_of(backend)))
        dy = randn(rows, outputs, seed=1, device=device_of(backend))
        out.backward(dy, retain_graph=True)
        assert layer.weight.grad is not None
        first = layer.weight.grad.clone()
        layer.zero_grad()
        out.backward(dy)
        assert_identical("dw", layer.weight.grad, first)
        with pytest.raises(RuntimeError, match="second time"):
            out.backward(dy)


def test_checkpointing_changes_nothing() -> None:
    model = nn.Sequential(cw.Linear(5, 16), nn.Tanh(), cw.Linear(16, 3))
    x, dy = randn(8, 5, dtype=F32), randn(8, 3, seed=1, dtype=F32)
    model(x).backward(dy)
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    for reentrant, start in ((False, x), (True, x.clone().requires_grad_())):
        model.zero_grad()
        checkpoint(model, start, use_reentrant=reentrant).backward(dy)
        for name, parameter in model.named_parameters():
            assert_identical(f"{name}.grad", parameter.grad, expected[name])


def test_hooks_see_the_emended_gradient() -> None:
    layer = cw.Linear(5, 3, dtype=F64)
    seen: list[Tensor] = []
    layer.weight.register_hook(seen.append)
    layer.register_full_backward_hook(lambda module, grad_input, grad_output: seen.append(grad_output[0]))
    x, dy = randn(8, 5).requires_grad_(), randn(8, 3, seed=1)
    layer(x).backward(dy)
    by_shape = {tuple(tensor.shape): tensor for tensor in seen}
    assert_close("dw", by_shape[3, 5], oracle(x.detach(), dy)[0], TOLERANCE[F64])
    assert_identical("dy", by_shape[8, 3], dy)


def test_expanded_dy_of_a_sum() -> None:
    layer, x = cw.Linear(5, 3, dtype=F64), randn(2, 4, 5)
    layer(x).sum().backward()  # dy is one number, expanded
    assert_grads_close(gradients(layer), oracle(x.reshape(8, 5), torch.ones(8, 3)), TOLERANCE[F64])


def test_meta_tensors_have_shapes() -> None:
    # Deferred initialisation and shape inference run whole models on the meta device.
    layer = cw.Linear(5, 3, device="meta")
    x = torch.empty(8, 5, device="meta")
    with torch.no_grad():
        assert layer(x).shape == (8, 3)
    out = layer(x)
    assert out.shape == (8, 3)
    assert out.is_meta


@pytest.mark.parametrize("dtype", [F32, F64, torch.bfloat16])
def test_a_layer_without_inputs(dtype: torch.dtype) -> None:
    layer = cw.Linear(0, 3, bias=False, dtype=dtype)
    layer(torch.randn(4, 0, dtype=dtype)).sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.shape == (3, 0)
