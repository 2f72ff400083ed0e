"""Transposed convolutions: the emended gradient of the convolution that each of them is, built here with its zeros."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import BF16, F16, F32, F64, TOLERANCE, Gradients, assert_close, assert_grads_close, assert_identical, randn
from conv_cases import conv_gradients
from torch import Tensor, nn
from torch.nn import functional as F

import consequentialism as cw

EMENDED = {1: cw.ConvTranspose1d, 2: cw.ConvTranspose2d, 3: cw.ConvTranspose3d}
PLAIN = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
# Batch, channels in and out, size, and the layer's arguments.
CASES: dict[str, tuple[int, int, int, tuple[int, ...], dict[str, Any]]] = {
    "1d": (4, 3, 2, (6,), {"kernel_size": 3}),
    "1d stride": (3, 4, 6, (5,), {"kernel_size": 4, "stride": 3, "padding": 2, "output_padding": 2, "groups": 2}),
    "2d": (3, 3, 4, (4, 5), {"kernel_size": 3, "padding": 1}),
    "2d few rows": (1, 8, 2, (2, 3), {"kernel_size": 3, "stride": 2, "padding": 2}),
    "2d upsampling": (2, 4, 6, (4, 3), {"kernel_size": 4, "stride": 2, "padding": 1, "groups": 2, "bias": False}),
    "2d uneven": (
        2,
        2,
        3,
        (4, 3),
        {"kernel_size": (3, 2), "stride": (3, 2), "padding": (1, 0), "output_padding": (2, 1), "dilation": (2, 1)},
    ),
    "2d dilation": (2, 3, 2, (4, 5), {"kernel_size": 3, "stride": 2, "dilation": 3, "output_padding": 1}),
    "depthwise": (3, 4, 4, (5, 4), {"kernel_size": 3, "stride": 2, "padding": 1, "groups": 4}),
    "stride above the kernel": (2, 3, 2, (3, 3), {"kernel_size": 2, "stride": 4}),
    "3d": (2, 2, 3, (2, 3, 2), {"kernel_size": 2, "stride": (1, 2, 2), "padding": (0, 1, 0)}),
}


def layers(case: str, **options: Any) -> tuple[nn.Module, nn.Module, Tensor]:
    """An emended layer and torch's, with the same parameters, and their input."""
    batch, inputs, outputs, size, arguments = CASES[case]
    torch.manual_seed(0)
    own = EMENDED[len(size)](inputs, outputs, **arguments, **options)
    plain = PLAIN[len(size)](inputs, outputs, **arguments, dtype=own.weight.dtype)
    plain.load_state_dict(own.state_dict())
    return own, plain, randn(batch, inputs, *size, dtype=own.weight.dtype)


def oracle(layer: nn.Module, x: Tensor, dy: Tensor, **options: Any) -> Gradients:
    """In float64 by the convolution of ``x`` with zeros between its entries and around them, the kernel reversed."""
    spatial = x.ndim - 2
    stuffed = torch.zeros(
        *x.shape[:2], *((n - 1) * s + 1 for n, s in zip(x.shape[2:], layer.stride, strict=True)), dtype=F64
    )
    stuffed[(..., *(slice(None, None, s) for s in layer.stride))] = x.detach().double()
    before = [d * (k - 1) - p for d, k, p in zip(layer.dilation, layer.kernel_size, layer.padding, strict=True)]
    span = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    after = [dy.shape[2 + i] + span[i] - before[i] - stuffed.shape[2 + i] for i in range(spatial)]
    stuffed = F.pad(stuffed, [side for b, a in zip(reversed(before), reversed(after), strict=True) for side in (b, a)])
    ones, nothing = (1,) * spatial, (0,) * spatial
    arguments = (layer.kernel_size, ones, nothing, layer.dilation, layer.groups, layer.bias is not None)
    dw, db = cw.reference.emended_conv_weight_grad(stuffed, dy.detach().double(), *arguments, **options)
    dw = dw.flip(list(range(2, 2 + spatial))).unflatten(0, (layer.groups, -1)).transpose(1, 2)  # [groups, C/g, O/g, ..]
    return dw.reshape(layer.weight.shape), db


def assert_emended(case: str, bound: float, **options: Any) -> None:
    own, plain, x = layers(case, **options)
    x.requires_grad_()
    y = own(x)
    assert_identical("y", y, plain(x))
    dy = randn(*y.shape, seed=1, dtype=y.dtype)
    y.backward(dy)
    (dx,) = torch.autograd.grad(plain(x), x, dy)
    assert_close("dx", x.grad, dx, bound)
    dtype = options.pop("dtype")
    options = {name: value for name, value in options.items() if name in ("damping", "damping_mode", "scale")}
    assert_grads_close(conv_gradients(own), oracle(own, x, dy, **options), bound)
    assert own.weight.grad.dtype == dtype
    own.weight.grad.view(-1)


@pytest.mark.parametrize("case", CASES)
def test_the_gradient_is_that_of_the_convolution(case: str) -> None:
    assert_emended(case, 1e-12, dtype=F64)
    assert_emended(case, 1e-12, dtype=F64, damping=0.1, damping_mode="absolute", scale="raw", backend="reference")


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("case", ["1d stride", "2d upsampling", "2d few rows", "3d"])
def test_types(case: str, dtype: torch.dtype) -> None:
    assert_emended(case, TOLERANCE[dtype], dtype=dtype)


@pytest.mark.parametrize("case", ["2d", "2d upsampling"])
def test_conjugate_gradients(case: str) -> None:
    assert_emended(case, 1e-6, dtype=F64, solver="cg", iterations=40, damping=1.0)


def test_output_size_and_a_single_sample() -> None:
    own, plain, x = layers("2d uneven", dtype=F64)
    sizes = [own(x).shape[2] - 1, own(x).shape[3] - 1]
    assert_identical("y", own(x, sizes), plain(x, sizes))
    own(x, output_size=sizes).square().sum().backward()
    own_gradients = conv_gradients(own)
    assert_grads_close(own_gradients, oracle(own, x, 2 * own(x, sizes)), 1e-12)
    own.zero_grad()
    y = own(x[0])
    assert_identical("y", y, plain(x[0]))
    y.square().sum().backward()
    assert_grads_close(conv_gradients(own), oracle(own, x[:1], 2 * y[None]), 1e-12)
    with torch.no_grad():
        assert_identical("y", own(x, sizes), plain(x, sizes))


def test_convert_and_revert() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(3, 4, 3, stride=2), nn.ReLU(inplace=True), nn.ConvTranspose2d(4, 2, 2))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    cw.convert(model, damping=0.5)
    assert [type(layer) for layer in (model[0], model[2])] == [cw.ConvTranspose2d] * 2
    assert "damping=0.5" in repr(model[0])
    model(randn(2, 3, 4, 4, dtype=F32)).sum().backward()
    cw.revert(model)
    assert [type(layer) for layer in (model[0], model[2])] == [nn.ConvTranspose2d] * 2
    assert "damping" not in model[0].__dict__
    for name, tensor in model.state_dict().items():
        assert_identical(name, tensor, state[name])


def test_samples_and_what_carries_no_rows() -> None:
    own, _, x = layers("2d", dtype=F64)
    own(x).sum().backward()
    expected = own.weight.grad.clone()
    own.zero_grad()
    cw.set_samples(own, 2 * x.shape[0])
    own(x).sum().backward()
    assert_close("dw", own.weight.grad, 2 * expected, 1e-12)
    own.zero_grad()
    own(x[:0]).sum().backward()
    assert_identical("dw", own.weight.grad, torch.zeros_like(own.weight))


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match=r"output_padding must be a whole number or several, got 1\.5"):
        cw.ConvTranspose2d(2, 3, 3, output_padding=1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="damping must be finite and above 0"):
        cw.ConvTranspose2d(2, 3, 3, damping=0.0)
