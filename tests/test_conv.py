"""`Conv1d`, `Conv2d`, `Conv3d`: torch's layers in everything but the gradient of their parameters."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from cases import (
    BACKENDS,
    BF16,
    DAMPINGS,
    DTYPES,
    F32,
    F64,
    FACTOR,
    FLOOR,
    HALF_TYPES,
    ILL_CONDITIONED,
    KINDS,
    TOLERANCE,
    assert_close,
    assert_grads_close,
    assert_identical,
    device_of,
    error_of,
    join,
    make_input,
    oracle,
    randn,
    relative_ridge,
    solved,
)
from conv_cases import CASES, EMENDED, PLAIN, conv_gradients, conv_oracle, layers
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import consequentialism as cw
from consequentialism import reference
from consequentialism.experiments.models import MODELS, build

CPU_BACKENDS = [name for name in ("cpu", "reference") if cw.backends()[name] == "available"]
SOME = ("1d stride", "2d wide", "2d few rows", "depthwise", "2d same", "3d")


def run(layer: nn.Module, case: str, dtype: torch.dtype, device: str = "cpu") -> tuple[torch.Tensor, ...]:
    """Forward and backward: ``x`` with its gradient, ``dy`` and ``y``."""
    batch, channels, _, size, _ = CASES[case]
    x = randn(batch, channels, *size, dtype=dtype, device=device).requires_grad_()
    y = layer(x)
    dy = randn(*y.shape, seed=1, dtype=dtype, device=device)
    y.backward(dy)
    return x, dy, y.detach()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_output_and_input_gradient_are_torchs(backend: str, case: str, dtype: torch.dtype) -> None:
    device = device_of(backend)
    own, plain = layers(CASES[case], backend=backend, device=device, dtype=dtype)
    x, dy, y = run(own, case, dtype, device)
    plain_x, _, plain_y = run(plain, case, dtype, device)
    assert_identical("y", y, plain_y)
    if dtype in HALF_TYPES:  # torch takes another kernel when it computes all gradients at once
        assert_close("dx", x.grad, plain_x.grad, TOLERANCE[dtype])
    else:
        assert_identical("dx", x.grad, plain_x.grad)
    assert_grads_close(conv_gradients(own), conv_oracle(own, x, dy), TOLERANCE[dtype])
    assert own.weight.grad.dtype == dtype


def test_patches_are_those_of_torchs_unfold() -> None:
    x = randn(3, 4, 9, 8)
    for arguments in (((3, 2), (1, 1), (0, 0), (1, 1)), ((2, 3), (2, 1), (1, 2), (2, 1))):
        kernel, stride, padding, dilation = arguments
        unfolded = nn.functional.unfold(x, kernel, dilation, padding, stride)  # [B, I, positions]
        own = reference.conv_patches(x, *arguments, 1)[0]
        assert_identical("patches", own, unfolded.transpose(1, 2).reshape(own.shape))
        halves = reference.conv_patches(x, *arguments, 2)
        assert_identical("patches of groups", torch.cat(list(halves), 1), own)


sizes = st.integers(1, 3)


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Module, torch.Tensor, dict[str, Any]]:
    """Any layer over the whole argument space, an input that it takes, and options."""
    spatial = draw(st.sampled_from((1, 2, 2, 3)))
    many = st.tuples(*[sizes] * spatial)
    groups = draw(st.sampled_from((1, 1, 2, 4)))
    kernel, dilation, stride = draw(many), draw(many), draw(many)
    padding: Any = draw(st.one_of(st.tuples(*[st.integers(0, 2)] * spatial), st.sampled_from(("same", "valid"))))
    if padding == "same":
        stride = (1,) * spatial
    mode = draw(st.sampled_from(("zeros", "zeros", "reflect", "replicate", "circular")))
    # Every padding mode wants more input than padding.
    room = [d * (k - 1) + 1 + draw(st.integers(2, 6)) for d, k in zip(dilation, kernel, strict=True)]
    arguments = {"stride": stride, "padding": padding, "dilation": dilation, "padding_mode": mode}
    channels, outputs = groups * draw(st.sampled_from((1, 2, 5, 17))), groups * draw(sizes)
    options = {
        "damping": draw(st.sampled_from((0.5, 1.0, 1e3))),
        "scale": draw(st.sampled_from(("nlms", "raw", "gradient"))),
        "patch_bytes": draw(st.sampled_from((1, 3000, 2**26))),
        "backend": draw(st.sampled_from(CPU_BACKENDS)),
    }
    bias = draw(st.booleans())
    layer = EMENDED[spatial](channels, outputs, kernel, groups=groups, bias=bias, dtype=F64, **arguments, **options)
    x = randn(draw(st.integers(1, 4)), channels, *room, seed=draw(st.integers(0, 9)))
    return layer, x, options


@given(convolutions(), st.sampled_from(DTYPES), st.booleans())
def test_any_convolution(drawn: tuple[nn.Module, torch.Tensor, dict], dtype: torch.dtype, last: bool) -> None:
    layer, x, options = drawn
    layer, x = layer.to(dtype), x.to(dtype)
    if last and x.ndim == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    y = layer(x)
    dy = randn(*y.shape, seed=1, dtype=dtype)
    y.backward(dy)
    expected = conv_oracle(layer, x, dy, **options)
    assert_grads_close(conv_gradients(layer), expected, TOLERANCE[dtype])
    assert_identical("y", y, cw.revert(copy.deepcopy(layer))(x))


@pytest.mark.parametrize("damping_mode", ["relative", "absolute"])
@pytest.mark.parametrize("scale", ["nlms", "raw", "gradient"])
@pytest.mark.parametrize("case", SOME)
@pytest.mark.parametrize("backend", BACKENDS)
def test_options_reach_the_gradient(backend: str, case: str, scale: str, damping_mode: str) -> None:
    options = {"damping": 0.7, "scale": scale, "damping_mode": damping_mode, "backend": backend}
    layer, _ = layers(CASES[case], dtype=F64, device=device_of(backend), **options)
    x, dy, y = run(layer, case, F64, device_of(backend))
    assert_grads_close(conv_gradients(layer), conv_oracle(layer, x, dy, **options), TOLERANCE[F64])
    arguments = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation, "groups": layer.groups}
    weight = layer.weight.detach().clone().requires_grad_()
    bias = None if layer.bias is None else layer.bias.detach().clone().requires_grad_()
    out = cw.emended_conv(x.detach(), weight, bias, **arguments, **options)
    out.backward(dy)
    assert_identical("y", out, y)
    assert_identical("functional dw", weight.grad, layer.weight.grad)
    dw, db = cw.emended_conv_weight_grad(
        x.detach(), dy, layer.kernel_size, bias=bias is not None, **arguments, **options
    )
    assert_close("dw of emended_conv_weight_grad", dw, layer.weight.grad, TOLERANCE[F64])
    assert_close("db of emended_conv_weight_grad", db, conv_gradients(layer)[1], TOLERANCE[F64])


@pytest.mark.parametrize("case", SOME)
@pytest.mark.parametrize("backend", BACKENDS)
def test_unbatched_is_a_batch_of_one(backend: str, case: str) -> None:
    layer, plain = layers(CASES[case], dtype=F64, device=device_of(backend), backend=backend)
    x = randn(CASES[case][1], *CASES[case][3], device=device_of(backend))
    y = layer(x)
    assert_identical("y", y, plain(x))
    dy = randn(*y.shape, seed=1, device=device_of(backend))
    y.backward(dy)
    assert_grads_close(conv_gradients(layer), conv_oracle(layer, x[None], dy[None]), TOLERANCE[F64])
    if not isinstance(layer.padding, str):
        arguments = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
        dw, _ = cw.emended_conv_weight_grad(x, dy, layer.kernel_size, groups=layer.groups, **arguments)
        assert_close("dw", dw, layer.weight.grad, TOLERANCE[F64])


@pytest.mark.parametrize("damping", [1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("case", ["2d", "2d wide", "2d few rows", "depthwise"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_ill_conditioned(backend: str, case: str, damping: float) -> None:
    batch, channels, _, size, _ = CASES[case]
    layer, _ = layers(CASES[case], dtype=F32, device=device_of(backend), backend=backend, damping=damping)
    x = randn(batch, 1, *size, dtype=F32) + 1e-3 * randn(batch, channels, *size, seed=1, dtype=F32)
    y = layer(x.to(device_of(backend)))
    dy = randn(*y.shape, seed=2, dtype=F32, device=device_of(backend))
    y.backward(dy)
    assert_grads_close(conv_gradients(layer), conv_oracle(layer, x, dy, damping=damping), ILL_CONDITIONED)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", FLOOR, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_error_is_at_most_twice_that_of_plain_pytorch(backend: str, dtype: torch.dtype, kind: str) -> None:
    for batch in (3, 1):
        x = make_input(kind, 4 * batch, 36).reshape(batch, 4, 6, 6).to(dtype)
        dy = randn(batch, 5, 5, 5, seed=1, dtype=dtype)
        rows = reference.conv_patches(x, (4, 4), (1, 1), (1, 1), (1, 1), 1)[0]
        errors = reference.conv_errors(dy, 1)[0]
        for damping in DAMPINGS:
            expected = join(*oracle(rows, errors, True, damping=damping, scale="raw"))
            plain = join(*solved(rows, errors, True, relative_ridge(rows, True, damping)))
            dw, db = cw.emended_conv_weight_grad(
                x.to(device_of(backend)),
                dy.to(device_of(backend)),
                4,
                padding=1,
                damping=damping,
                scale="raw",
                backend=backend,
            )
            own = join(dw.flatten(1), db)
            bound = FACTOR * error_of(plain, expected) + FLOOR[dtype]
            assert_close(f"batch {batch}, damping {damping}", own, expected, bound)


@pytest.mark.parametrize("case", SOME)
@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
def test_half_types_are_rounded_once(dtype: torch.dtype, case: str) -> None:
    for damping in (1.0, 1e-3):
        layer, _ = layers(CASES[case], dtype=dtype, damping=damping)
        x, dy, _ = run(layer, case, dtype)
        expected = conv_oracle(layer, x, dy, damping=damping)
        for own, want in zip(conv_gradients(layer), expected, strict=True):
            if own is not None and want is not None:
                assert error_of(own, want) <= 1.1 * error_of(want.to(dtype), want) + 1e-5


@pytest.mark.parametrize("case", CASES)
def test_deterministic(case: str) -> None:
    found = []
    for _ in range(3):
        layer, _ = layers(CASES[case], dtype=F32)
        run(layer, case, F32)
        found.append(layer.weight.grad)
    assert_identical("dw", found[1], found[0])
    assert_identical("dw", found[2], found[0])


@pytest.mark.parametrize("case", SOME)
@pytest.mark.parametrize("backend", BACKENDS)
def test_dead_inputs_give_exactly_zero(backend: str, case: str) -> None:
    batch, channels, outputs, size, arguments = CASES[case]
    for dtype in DTYPES:
        layer = EMENDED[len(size)](
            channels, outputs, **arguments, bias=False, backend=backend, dtype=dtype, device=device_of(backend)
        )
        layer(torch.zeros(batch, channels, *size, dtype=dtype, device=device_of(backend))).sum().backward()
        assert_identical("dw", layer.weight.grad, torch.zeros_like(layer.weight))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["x", "dy"])
@pytest.mark.parametrize("case", SOME)
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_bad_entry_spoils_everything(backend: str, case: str, where: str, value: float) -> None:
    batch, channels, _, size, _ = CASES[case]
    for dtype in DTYPES:
        layer, _ = layers(CASES[case], dtype=dtype, device=device_of(backend), backend=backend)
        x = randn(batch, channels, *size, dtype=dtype, device=device_of(backend))
        dy = randn(*layer(x).shape, seed=1, dtype=dtype, device=x.device)
        if where == "x":
            x[(0, 1, *[2] * len(size))] = value
        else:
            dy[(0,) * dy.ndim] = value
        layer(x).backward(dy)
        for gradient in conv_gradients(layer):
            assert gradient is None or gradient.isnan().all(), f"{gradient.isnan().sum()} of {gradient.numel()}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SOME)
@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend: str, case: str, dtype: torch.dtype) -> None:
    _, channels, _, size, _ = CASES[case]
    layer, _ = layers(CASES[case], dtype=dtype, device=device_of(backend), backend=backend)
    x = torch.zeros(0, channels, *size, dtype=dtype, device=device_of(backend), requires_grad=True)
    layer(x).sum().backward()
    for parameter in layer.parameters():
        assert_identical("gradient", parameter.grad, torch.zeros_like(parameter))
    assert x.grad is not None


def test_what_torch_refuses_raises_torchs_error() -> None:
    for size, arguments in (
        ((2, 4, 8, 8), {}),  # channels
        ((2, 3, 2, 8), {}),  # kernel above the input
        ((2, 3, 0, 8), {"padding": 1}),
        ((2, 3, 8), {}),  # unbatched, with one channel too few dimensions
        ((3,), {}),
    ):
        own, plain = cw.Conv2d(3, 4, 3, **arguments), nn.Conv2d(3, 4, 3, **arguments)
        x = torch.zeros(size)
        with pytest.raises((RuntimeError, ValueError)) as expected:
            plain(x)
        with pytest.raises(type(expected.value)) as caught:
            own(x)
        assert str(caught.value) == str(expected.value)


X, W, DY = randn(2, 3, 5), randn(4, 3, 3).requires_grad_(), randn(2, 4, 3)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: cw.Conv2d(3, 4, 3)(torch.zeros(1, 3, 5, 5, dtype=BF16)), TypeError, ("x", "weight", "bfloat16")),
        (lambda: cw.Conv2d(3, 4, 3)([1.0]), TypeError, ("x", "list")),
        (lambda: cw.Conv2d(3, 4, 3, patch_bytes=0), ValueError, ("patch_bytes", "0", "above 0")),
        (lambda: cw.Conv2d(3, 4, 3, patch_bytes=1.5), TypeError, ("patch_bytes", "1.5", "float")),
        (lambda: cw.emended_conv(randn(2, 5), randn(3, 5)), ValueError, ("weight", "[3, 5]", "C/groups")),
        (lambda: cw.emended_conv(X, W, stride="2"), TypeError, ("stride", "'2'")),
        (lambda: cw.emended_conv(X, W, stride=(1, 2)), ValueError, ("stride", "(1, 2)")),
        (lambda: cw.emended_conv_weight_grad(X, randn(2, 4, 4), 3), ValueError, ("[2, 4, 4]", "[2, O, 3]")),
        (lambda: cw.emended_conv_weight_grad(X, DY, (3, 3, 3)), ValueError, ("kernel_size", "(3, 3, 3)")),
        (lambda: cw.emended_conv_weight_grad(X, DY, 3, groups=2), ValueError, ("groups", "divisor")),
        (lambda: cw.emended_conv_weight_grad(X, DY, 3, padding="full"), ValueError, ("padding", "'full'")),
        (
            lambda: cw.emended_conv_weight_grad(X, DY, 3, padding="same", stride=2),
            ValueError,
            ("'same'", "stride", "2"),
        ),
        (lambda: cw.emended_conv_weight_grad(X, DY, 3, bias=1), TypeError, ("bias", "1")),
    ],
)
def test_bad_arguments(call: Any, error: type[Exception], words: tuple[str, ...]) -> None:
    with pytest.raises(error) as caught:
        call()
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"


@pytest.mark.parametrize("case", SOME)
@pytest.mark.parametrize("backend", BACKENDS)
def test_frozen_bias_and_frozen_weight(backend: str, case: str) -> None:
    layer, _ = layers(CASES[case], dtype=F64, device=device_of(backend), backend=backend)
    x, dy, _ = run(layer, case, F64, device_of(backend))
    expected = dict(zip(("weight", "bias"), conv_oracle(layer, x, dy), strict=True))
    for frozen, trained in (("bias", "weight"), ("weight", "bias")):
        layer.zero_grad()
        layer.get_parameter(trained).requires_grad_(True)
        layer.get_parameter(frozen).requires_grad_(False)
        run(layer, case, F64, device_of(backend))
        assert layer.get_parameter(frozen).grad is None
        assert_close(trained, layer.get_parameter(trained).grad, expected[trained], TOLERANCE[F64])


def test_nothing_is_computed_without_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a Gram was computed")

    monkeypatch.setattr("consequentialism.functional.conv.prepare", refuse)
    layer = cw.Conv2d(3, 4, 3)
    x = randn(2, 3, 6, 6, dtype=F32).requires_grad_()
    with torch.no_grad():
        layer(x)
    with torch.inference_mode():
        layer(x)
    layer.requires_grad_(False)
    layer(x).sum().backward()
    assert x.grad is not None
    layer.requires_grad_(True)
    with pytest.raises(AssertionError, match="a Gram"):
        layer(x)


def test_second_derivative_is_an_error() -> None:
    layer, x = cw.Conv2d(3, 4, 3), randn(2, 3, 6, 6, dtype=F32).requires_grad_()
    loss = layer(x).square().sum()
    for target in (layer.weight, x):
        (gradient,) = torch.autograd.grad(loss, target, create_graph=True, retain_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward(retain_graph=True)


@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
@pytest.mark.parametrize("case", SOME)
def test_autocast(case: str, dtype: torch.dtype) -> None:
    layer, plain = layers(CASES[case], dtype=F32)
    batch, channels, _, size, _ = CASES[case]
    x = randn(batch, channels, *size, dtype=F32)
    with torch.autocast("cpu", dtype=dtype):
        y, plain_y = layer(x), plain(x)
    assert_identical("y", y, plain_y)
    dy = randn(*y.shape, seed=1, dtype=dtype)
    y.backward(dy)
    assert layer.weight.grad.dtype == F32
    assert_grads_close(conv_gradients(layer), conv_oracle(layer, x.to(dtype), dy), TOLERANCE[dtype])


@pytest.mark.parametrize("spatial", EMENDED)
def test_constructor_repr_state_and_copies(spatial: int) -> None:
    torch.manual_seed(1)
    own = EMENDED[spatial](4, 6, 3, 2, 1, 1, 2, False, "circular", damping=0.3, patch_bytes=1000)
    torch.manual_seed(1)
    plain = PLAIN[spatial](4, 6, 3, 2, 1, 1, 2, False, "circular")
    assert_identical("initial weight", own.weight, plain.weight)
    assert repr(own) == repr(plain)[:-1] + ", damping=0.3, patch_bytes=1000)"
    assert list(own.state_dict()) == list(plain.state_dict()) == ["weight"]
    plain.load_state_dict(own.state_dict(), strict=True)
    x = randn(2, 4, *[7] * spatial, dtype=F32)
    own(x).square().sum().backward()
    for other in (pickle.loads(pickle.dumps(own)), copy.deepcopy(own)):
        assert type(other) is EMENDED[spatial]
        assert repr(other) == repr(own)
        other.zero_grad()
        other(x).square().sum().backward()
        assert_identical("dw of a copy", other.weight.grad, own.weight.grad)
    assert type(cw.revert(own)) is PLAIN[spatial]
    assert repr(own) == repr(plain)


def test_channels_last_stays() -> None:
    own, plain = cw.Conv2d(4, 6, 3), nn.Conv2d(4, 6, 3)
    x = randn(2, 4, 7, 7, dtype=F32).contiguous(memory_format=torch.channels_last)
    assert own(x).stride() == plain(x).stride()


def test_meta_tensors_have_shapes() -> None:
    for groups in (1, 2):
        layer = cw.Conv2d(4, 6, 3, groups=groups, device="meta")
        y = layer(torch.empty(2, 4, 7, 7, device="meta"))
        assert y.shape == (2, 6, 5, 5)
        y.sum().backward()
        assert layer.weight.grad.shape == layer.weight.shape


def test_retained_graph_and_accumulation() -> None:
    layer, x = cw.Conv2d(3, 4, 3, dtype=F64), randn(2, 3, 6, 6)
    y = layer(x)
    dy = randn(*y.shape, seed=1)
    y.backward(dy, retain_graph=True)
    first = layer.weight.grad.clone()
    y.backward(dy)
    assert_close("twice", layer.weight.grad, 2 * first, TOLERANCE[F64])


@pytest.mark.parametrize("image_shape", [(1, 8, 8), (1, 28, 28), (3, 9, 10)])
@pytest.mark.parametrize(("name", "convolutions"), [("cnn", 2), ("resnet", 8)])
def test_demo_models_build_convert_and_train(name: str, convolutions: int, image_shape: tuple[int, int, int]) -> None:
    model = build(lambda: MODELS[name](image_shape, 10), seed=0)
    again = build(lambda: MODELS[name](image_shape, 10), seed=0)
    for own, other in zip(model.parameters(), again.parameters(), strict=True):
        assert_identical("initial weight", own, other)
    cw.convert(model)
    assert sum(isinstance(m, cw.Conv2d) for m in model.modules()) == convolutions
    x, y = randn(16, *image_shape, dtype=F32), torch.arange(16) % 10
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0], losses
