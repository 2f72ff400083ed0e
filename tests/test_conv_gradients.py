"""Which gradients of a convolution are computed, and how they lie in memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import DTYPES, F32, F64, SAME_WAY, TOLERANCE, Recorder, assert_close, assert_identical, randn
from conv_cases import CASES, EMENDED, PLAIN, conv_gradients, conv_oracle, layers
from torch import Tensor, nn

import consequentialism as cw

# Names of `CASES` with the options that take each way: both forms, a wider Gram, conjugate gradients.
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "primal": ("2d", {}),
    "dual": ("2d few rows", {}),
    "groups": ("depthwise", {}),
    "primal, wide Gram": ("2d wide", {"damping": 1e-4}),
    "dual, wide Gram": ("2d few rows", {"damping": 1e-4}),
    "in small blocks": ("1d stride", {"damping": 1e-4, "patch_bytes": 1}),
    "conjugate gradients": ("3d", {"solver": "cg", "iterations": 40}),
}


def inputs_of(way: str, dtype: torch.dtype) -> tuple[nn.Module, dict[str, Tensor], Tensor]:
    """A layer, the tensors that it has gradients for, and an output that leads to them."""
    case, options = WAYS[way]
    layer, _ = layers(CASES[case], dtype=dtype, **options)
    x = randn(CASES[case][0], CASES[case][1], *CASES[case][3], dtype=dtype).requires_grad_()
    return layer, {"x": x, **dict(layer.named_parameters())}, layer(x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_each_gradient_alone_is_that_of_all(way: str, dtype: torch.dtype) -> None:
    _, tensors, y = inputs_of(way, dtype)
    dy = randn(*y.shape, seed=1, dtype=dtype)
    together = torch.autograd.grad(y, list(tensors.values()), dy, retain_graph=True)
    for (name, tensor), expected in zip(tensors.items(), together, strict=True):
        (alone,) = torch.autograd.grad(y, tensor, dy, retain_graph=True)
        assert alone.dtype == dtype
        assert_close(f"{name} alone", alone, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("way", WAYS)
def test_only_what_a_backward_asks_for_is_computed(way: str) -> None:
    _, tensors, y = inputs_of(way, F32)
    for name, tensor in tensors.items():
        with Recorder() as recorder:
            torch.autograd.grad(y.sum(), tensor, retain_graph=True)
        backwards = sum("convolution_backward" in operator for operator in recorder.names)
        products = sum(operator.startswith(("aten.bmm", "aten.mm", "aten.addcmul")) for operator in recorder.names)
        if name == "x":
            assert (backwards, products) == (1, 0), recorder.names
        elif name == "bias" and WAYS[way][1].get("solver") != "cg":
            assert backwards == 0, recorder.names


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_each_gradient_has_memory_of_its_own(way: str, dtype: torch.dtype) -> None:
    layer, tensors, y = inputs_of(way, dtype)
    dy = randn(*y.shape, seed=1, dtype=dtype)
    gradients = torch.autograd.grad(y, list(tensors.values()), dy)
    addresses = [gradient.untyped_storage().data_ptr() for gradient in gradients]
    assert len(set(addresses)) == len(addresses)
    for gradient in gradients:
        gradient.view(-1)
        assert gradient.untyped_storage().nbytes() == gradient.numel() * gradient.element_size()
    if isinstance(layer.padding, str) or layer.padding_mode != "zeros":
        return
    arguments = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation, "groups": layer.groups}
    arguments |= {"patch_bytes": layer.patch_bytes, "damping": layer.damping, "solver": layer.solver}
    dw, db = cw.emended_conv_weight_grad(tensors["x"].detach(), dy, layer.kernel_size, **arguments)
    assert db is not None
    assert dw.is_contiguous()
    assert db.is_contiguous()
    assert dw.untyped_storage().data_ptr() != db.untyped_storage().data_ptr()


@pytest.mark.parametrize("damping", [1.0, 1e-4])
@pytest.mark.parametrize("last", [(True, True), (True, False), (False, True)], ids=["both", "x", "weight"])
@pytest.mark.parametrize(("spatial", "kernel", "groups"), [(2, 3, 1), (2, 3, 2), (2, 1, 1), (3, 2, 1)])
def test_weight_gradients_lie_as_torchs(
    spatial: int, kernel: int, groups: int, last: tuple[bool, bool], damping: float
) -> None:
    layout = torch.channels_last if spatial == 2 else torch.channels_last_3d
    x = randn(2, 4, *[6] * spatial, dtype=F32)
    own = EMENDED[spatial](4, 6, kernel, groups=groups, damping=damping)
    plain = PLAIN[spatial](4, 6, kernel, groups=groups)
    if last[0]:
        x = x.contiguous(memory_format=layout)
    for layer in (own, plain):
        if last[1]:
            layer.to(memory_format=layout)
    found = [torch.autograd.grad(layer(x).sum(), layer.weight)[0] for layer in (own, plain)]
    for memory_format in (torch.contiguous_format, layout):
        same = [gradient.is_contiguous(memory_format=memory_format) for gradient in found]
        assert same[0] == same[1], memory_format


@pytest.mark.parametrize("way", WAYS)
def test_batched_gradients_are_each_ones_own(way: str) -> None:
    _, tensors, y = inputs_of(way, F32)
    dy = randn(3, *y.shape, seed=1, dtype=F32)
    wanted = list(tensors.values())
    batched = torch.autograd.grad(y, wanted, dy, is_grads_batched=True, retain_graph=True)
    for k in range(3):
        each = torch.autograd.grad(y, wanted, dy[k], retain_graph=True)
        for name, own, expected in zip(tensors, batched, each, strict=True):
            assert_close(f"{name} of {k}", own[k], expected, SAME_WAY)


@pytest.mark.parametrize("way", WAYS)
def test_output_can_be_changed_in_place(way: str) -> None:
    case, options = WAYS[way]
    layer, plain = layers(CASES[case], dtype=F64, **options)
    plain_options = {k: v for k, v in options.items() if k == "damping"}
    x = randn(CASES[case][0], CASES[case][1], *CASES[case][3])
    for batch in (x, x[0]):
        found = []
        for one in (layer, plain):
            y = one(batch)
            y += 1.0
            y.masked_fill_(y > 2, 0.0).relu_()
            found.append(y)
        assert_identical("y", *found)
        dy = ((found[0] > 0) * 1.0).detach()
        layer.zero_grad()
        found[0].sum().backward()
        expected = conv_oracle(
            layer, batch.reshape(-1, *x.shape[1:]), dy.reshape(-1, *layer(x).shape[1:]), **plain_options
        )
        for own, want in zip(conv_gradients(layer), expected, strict=True):
            assert_close("gradient", own, want, TOLERANCE[F64])


@pytest.mark.parametrize("groups", [1, 2])
def test_batched_gradients_of_a_transposed_convolution(groups: int) -> None:
    layer = cw.ConvTranspose1d(4, 6, 3, groups=groups, dtype=F32)
    y = layer(randn(2, 4, 5, dtype=F32))
    dy = randn(3, *y.shape, seed=1, dtype=F32)
    (batched,) = torch.autograd.grad(y, [layer.weight], dy, is_grads_batched=True, retain_graph=True)
    for k in range(3):
        (each,) = torch.autograd.grad(y, [layer.weight], dy[k], retain_graph=True)
        assert_close(f"weight of {k}", batched[k], each, SAME_WAY)
