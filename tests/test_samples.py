"""`set_samples` and ``samples=``: the number that a mean-reduced loss divides by, where it is not the rows."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cases import (
    BACKENDS,
    DTYPES,
    EXACT,
    F16,
    F32,
    F64,
    TOLERANCE,
    TRANSFORM,
    Recorder,
    assert_close,
    assert_grads_close,
    device_of,
    oracle,
    randn,
)
from torch import Tensor, nn
from torch.nn import functional as F

import consequentialism as cw

ROWS, INPUTS, OUTPUTS = 12, 5, 3
COUNTED = 4
# One number, however it is said.
FORMS: dict[str, Callable[[], Any]] = {
    "number": lambda: COUNTED,
    "numpy": lambda: np.int64(COUNTED),
    "tensor": lambda: torch.tensor(COUNTED),
    "float tensor": lambda: torch.tensor(float(COUNTED)),
    "mask": lambda: torch.arange(ROWS) < COUNTED,
    "mask of two dimensions": lambda: (torch.arange(ROWS) < COUNTED).reshape(4, 3).long(),
}


def trained(layer: nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
    """The gradients of all parameters, and that of ``x`` where it has one."""
    layer.zero_grad()
    x = x.clone().requires_grad_() if x.is_floating_point() else x
    layer(x).backward(dy)
    return [p.grad.clone() for p in layer.parameters()] + ([x.grad] if x.grad is not None else [])  # type: ignore


def layers(**options: Any) -> list[tuple[nn.Module, Tensor, Tensor, int]]:
    """A layer of each kind in float64, its input, its error, and what counts by default."""
    torch.manual_seed(0)
    plain = {"dtype": F64, **options}
    return [
        (cw.Linear(INPUTS, OUTPUTS, **plain), randn(ROWS, INPUTS), randn(ROWS, OUTPUTS), ROWS),
        (cw.Linear(INPUTS, OUTPUTS, bias=False, **plain), randn(2, 6, INPUTS), randn(2, 6, OUTPUTS), 12),
        (cw.Linear(2 * ROWS, 40, **plain), randn(ROWS, 2 * ROWS), randn(ROWS, 40), ROWS),
        (cw.Linear(60, 1, **plain), randn(ROWS, 60), randn(ROWS, 1), ROWS),
        (cw.Conv1d(2, 3, 2, **plain), randn(6, 2, 8), randn(6, 3, 7), 6),
        (cw.Conv2d(4, 2, 3, groups=2, **plain), randn(6, 4, 4, 4), randn(6, 2, 2, 2), 6),
        (cw.Conv1d(2, 3, 2, **plain), randn(2, 8), randn(3, 7), 1),
        (cw.Embedding(7, 3, padding_idx=0, **plain), torch.arange(ROWS) % 7, randn(ROWS, 3), ROWS),
        (cw.Embedding(7, 3, sparse=True, **plain), torch.arange(ROWS) % 7, randn(ROWS, 3), ROWS),
    ]


@pytest.mark.parametrize("form", FORMS)
def test_every_layer_multiplies_by_it(form: str) -> None:
    for layer, x, dy, default in layers():
        *expected, dx = trained(layer, x, dy) if x.is_floating_point() else [*trained(layer, x, dy), None]
        cw.set_samples(layer, FORMS[form]())
        own = trained(layer, x, dy)
        for k, want in enumerate(expected):
            assert_close(f"{layer}, {k}", own[k].to_dense(), COUNTED / default * want.to_dense(), EXACT)
        if dx is not None:
            assert_close(f"dx of {layer}", own[-1], dx, 0)
        cw.set_samples(layer, None)
        assert_close(f"{layer} as before", trained(layer, x, dy)[0].to_dense(), expected[0].to_dense(), 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
def test_functions(form: str, backend: str, dtype: torch.dtype) -> None:
    device, samples = device_of(backend), FORMS[form]()
    samples = samples.to(device) if isinstance(samples, Tensor) else samples
    x, dy = randn(ROWS, INPUTS, dtype=dtype, device=device), randn(ROWS, OUTPUTS, seed=1, dtype=dtype, device=device)
    weight = torch.zeros(OUTPUTS, INPUTS, dtype=dtype, device=device, requires_grad=True)
    bias = torch.zeros(OUTPUTS, dtype=dtype, device=device, requires_grad=True)
    cw.emended_linear(x, weight, bias, samples=samples, backend=backend).backward(dy)
    raw = oracle(x, dy, scale="raw")
    expected = COUNTED * raw[0], COUNTED * raw[1]  # type: ignore[operator]
    assert_grads_close((weight.grad, bias.grad), expected, TOLERANCE[dtype])  # type: ignore[arg-type]
    own = cw.emended_weight_grad(x, dy, samples=samples, backend=backend)
    assert_grads_close(own, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("scale", ["raw", "gradient"])
def test_other_scales_count_nothing(scale: str) -> None:
    for layer, x, dy, _ in layers(scale=scale):
        expected = trained(layer, x, dy)
        cw.set_samples(layer, COUNTED)
        assert_close(str(layer), trained(layer, x, dy)[0].to_dense(), expected[0].to_dense(), 0)


def test_convolution_functions() -> None:
    x, dy = randn(6, 2, 8), randn(6, 3, 7)
    weight, bias = torch.zeros(3, 2, 2, dtype=F64, requires_grad=True), torch.zeros(3, dtype=F64, requires_grad=True)
    expected = [COUNTED * g for g in cw.emended_conv_weight_grad(x, dy, 2, scale="raw")]  # type: ignore[operator]
    for form in FORMS.values():
        assert_grads_close(cw.emended_conv_weight_grad(x, dy, 2, samples=form()), tuple(expected), EXACT)
        weight.grad = bias.grad = None
        cw.emended_conv(x, weight, bias, samples=form()).backward(dy)
        assert_grads_close((weight.grad, bias.grad), tuple(expected), EXACT)  # type: ignore[arg-type]


def test_padding_changes_nothing() -> None:
    """Half of the rows are zero, and the loss is the mean over the others: the step on those alone."""
    x, target = randn(ROWS, INPUTS), randn(ROWS, OUTPUTS, seed=1)
    padded = torch.stack([x.reshape(3, 4, INPUTS), torch.zeros(3, 4, INPUTS, dtype=F64)], 2).flatten(1, 2)
    mask = torch.tensor([True, False]).repeat(4).expand(3, 8)
    layer = cw.Linear(INPUTS, OUTPUTS, bias=False, damping=0.1, dtype=F64)
    (layer(x) - target).square().sum(-1).mean().backward()
    expected = layer.weight.grad.clone()  # type: ignore[union-attr]
    layer.zero_grad()
    cw.set_samples(layer, mask)
    (layer(padded)[mask] - target).square().sum(-1).mean().backward()
    assert_close("dw", layer.weight.grad, expected, EXACT)


def test_one_label_of_many() -> None:
    """With a loss on one label of 32 the step is the raw gradient of that label's error, however many are ignored."""
    x = randn(32, INPUTS)
    labels = torch.full((32,), -100)
    labels[5] = 1
    layer = cw.Linear(INPUTS, OUTPUTS, dtype=F64)
    cw.set_samples(layer, labels != -100)
    y = layer(x)
    y.retain_grad()
    F.cross_entropy(y, labels, ignore_index=-100).backward()
    expected = oracle(x, y.grad, scale="raw")  # type: ignore[arg-type]
    assert_grads_close((layer.weight.grad, layer.bias.grad), expected, EXACT)  # type: ignore[arg-type]


WAYS: dict[str, dict[str, Any]] = {
    "cg": {"solver": "cg", "iterations": 30},
    "reference": {"backend": "reference"},
    "primal in backward": {"damping": 0.3},
}


@pytest.mark.parametrize("way", WAYS)
def test_converted_models(way: str) -> None:
    x, dy = randn(ROWS, INPUTS), randn(ROWS, OUTPUTS)
    model = nn.Sequential(nn.Linear(INPUTS, 4), nn.Tanh(), nn.Linear(4, OUTPUTS)).to(F64)
    cw.convert(model, **WAYS[way])
    expected = trained(model, x, dy)
    cw.set_samples(model, COUNTED)
    *own, dx = trained(model, x, dy)
    for k, gradient in enumerate(own):
        assert_close(f"gradient {k}", gradient, COUNTED / ROWS * expected[k], EXACT)
    assert_close("dx", dx, expected[-1], 0)


@pytest.mark.parametrize("samples", [COUNTED, torch.tensor(COUNTED)], ids=str)
@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
def test_fused_sgd(samples: Any, dtype: torch.dtype) -> None:
    x, dy = randn(ROWS, INPUTS, dtype=dtype), randn(ROWS, OUTPUTS, dtype=dtype)
    plain = cw.Linear(INPUTS, OUTPUTS, dtype=dtype)
    fused = copy.deepcopy(plain)
    for layer in (plain, fused):
        cw.set_samples(layer, samples)
    steps = torch.optim.SGD(plain.parameters(), lr=0.5), cw.optim.FusedSGD(fused, lr=0.5)
    for layer, step in zip((plain, fused), steps, strict=True):
        layer(x).backward(dy)
        step.step()
    for own, expected in zip(fused.parameters(), plain.parameters(), strict=True):
        assert_close("parameter", own, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("index", [0, 3, 4, 7])
def test_compile_follows_the_number(index: int) -> None:
    """One graph for all numbers, in full."""
    torch._dynamo.reset()
    layer, x, dy, default = layers()[index]
    cw.set_samples(layer, default)
    expected = trained(layer, x, dy)[0]
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for samples in (1, 2, 3, COUNTED, torch.tensor(5)):
        cw.set_samples(layer, samples)
        assert_close(str(samples), trained(compiled, x, dy)[0], int(samples) / default * expected, TRANSFORM[F64])
    assert len(graphs) == 1


def test_transforms() -> None:
    x, dy = randn(4, ROWS, INPUTS), randn(4, ROWS, OUTPUTS)
    weight = randn(OUTPUTS, INPUTS, seed=2)

    def loss(w: Tensor, x: Tensor, dy: Tensor) -> Tensor:
        return (cw.emended_linear(x, w, samples=torch.tensor(COUNTED)) * dy).sum()

    own = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(weight, x, dy)
    for one, own_x, own_dy in zip(own, x, dy, strict=True):
        assert_close("dw", one, COUNTED * oracle(own_x, own_dy, False, scale="raw")[0], TRANSFORM[F64])


def test_checkpoint_and_autocast() -> None:
    layer = cw.Linear(INPUTS, OUTPUTS)
    x, dy = randn(ROWS, INPUTS, dtype=F32), randn(ROWS, OUTPUTS, dtype=F32)
    expected = trained(layer, x, dy)
    cw.set_samples(layer, COUNTED)
    layer.zero_grad()
    torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False).backward(dy)
    assert_close("dw", layer.weight.grad, COUNTED / ROWS * expected[0], TOLERANCE[F32])
    with torch.autocast("cpu", torch.bfloat16):
        own = trained(layer, x, dy.bfloat16())[0]
        cw.set_samples(layer, None)
        expected = trained(layer, x, dy.bfloat16())
    assert own.dtype == F32
    assert_close("dw under autocast", own, COUNTED / ROWS * expected[0], TOLERANCE[F32])


def test_no_samples_give_a_zero_gradient() -> None:
    for samples in (0, torch.tensor(0), torch.zeros(ROWS, dtype=torch.bool)):
        for layer, x, dy, _ in layers():
            cw.set_samples(layer, samples)
            assert not trained(layer, x, dy)[0].to_dense().any()


def test_no_rows() -> None:
    layer = cw.Linear(INPUTS, OUTPUTS, dtype=F64)
    cw.set_samples(layer, COUNTED)
    assert not trained(layer, randn(0, INPUTS), randn(0, OUTPUTS))[0].any()


def test_not_finite_errors_stay_not_finite() -> None:
    layer = cw.Linear(INPUTS, OUTPUTS, dtype=F64)
    cw.set_samples(layer, COUNTED)
    dy = randn(ROWS, OUTPUTS)
    dy[1, 2] = torch.inf
    assert trained(layer, randn(ROWS, INPUTS), dy)[0].isnan().all()


def test_float16_keeps_its_range() -> None:
    """The raw gradient is below float16's range; what samples make of it is not."""
    x, dy = randn(4096, 4, dtype=F16), 1e-4 * randn(4096, 2, seed=1)
    layer = cw.Linear(4, 2, bias=False, dtype=F16)
    cw.set_samples(layer, 2048)
    own = trained(layer, x, dy.half())[0]
    expected = oracle(x, dy.half(), False, scale="raw")[0]
    assert_close("dw", own, 2048 * expected, 5e-3)


def test_it_is_not_saved() -> None:
    model = nn.Sequential(cw.Linear(INPUTS, OUTPUTS), nn.ReLU())
    keys, repr_of = list(model.state_dict()), repr(model)
    cw.set_samples(model, torch.arange(5) < 2)
    assert list(model.state_dict()) == keys
    assert repr(model) == repr_of
    assert model[0].samples == 2
    for other in (copy.deepcopy(model), copy.copy(model[0]), pickle.loads(pickle.dumps(model))):
        layer = other if isinstance(other, cw.Linear) else other[0]
        assert layer.samples is None
    cw.revert(model)
    assert not hasattr(model[0], "samples")


def test_convert_takes_it() -> None:
    model = cw.convert(nn.Sequential(nn.Linear(INPUTS, OUTPUTS)), samples=COUNTED)
    assert model[0].options.samples == COUNTED


def test_nothing_is_read_by_the_host() -> None:
    with Recorder() as seen:
        layer = cw.Linear(INPUTS, OUTPUTS)
        cw.set_samples(layer, torch.arange(ROWS) < COUNTED)
        trained(layer, randn(ROWS, INPUTS, dtype=F32), randn(ROWS, OUTPUTS, dtype=F32))
    assert "aten._local_scalar_dense.default" not in seen.names


@pytest.mark.parametrize(
    ("samples", "error"),
    [(-1, ValueError), (2.0, TypeError), (True, TypeError), ("4", TypeError), (torch.tensor(1j), TypeError)],
    ids=str,
)
def test_bad_arguments(samples: Any, error: type[Exception]) -> None:
    layer = cw.Linear(INPUTS, OUTPUTS)
    for call in (lambda: cw.set_samples(layer, samples), lambda: cw.Options(samples=samples)):
        with pytest.raises(error, match="samples"):
            call()
    assert layer.samples is None
    with pytest.raises(TypeError, match="model"):
        cw.set_samples("a model", 4)  # type: ignore[arg-type]


def test_a_model_without_emended_layers_is_warned_of() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    with pytest.warns(UserWarning, match="set_samples: the model has no emended layer") as caught:
        cw.set_samples(model, 5)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cw.set_samples(model, None)
