"""`Linear` as a layer: torch's own in everything but the weight and bias gradients."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from cases import DTYPES, HALF_TYPES, TOLERANCE, assert_close, assert_grads_close, assert_identical, randn
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import consequentialism as cw

F32 = torch.float32


def pair(inputs: int = 6, outputs: int = 4, **options: object) -> tuple[cw.Linear, nn.Linear]:
    """An emended layer and a plain one with the same parameters."""
    torch.manual_seed(0)
    emended = cw.Linear(inputs, outputs, **options)  # type: ignore[arg-type]
    plain = nn.Linear(inputs, outputs, bias=emended.bias is not None, dtype=emended.weight.dtype)
    plain.load_state_dict(emended.state_dict())
    return emended, plain


@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 3, 6), (2, 1, 3, 6), (0, 6), (2, 0, 6)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_output_and_input_gradient_are_torch_s(dtype: torch.dtype, bias: bool, shape: tuple[int, ...]) -> None:
    emended, plain = pair(bias=bias, dtype=dtype)
    xs = [randn(*shape, dtype=dtype).requires_grad_() for _ in range(2)]
    outputs = [layer(x) for layer, x in zip((emended, plain), xs, strict=True)]
    assert_identical("y", *outputs)
    for y in outputs:
        y.backward(randn(*y.shape, seed=1, dtype=dtype))
    assert_close("dx", xs[0].grad, xs[1].grad, TOLERANCE[dtype])


@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 3, 6), (3, 5, 6)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weight_gradient_is_the_emended_one(dtype: torch.dtype, bias: bool, shape: tuple[int, ...]) -> None:
    layer, _ = pair(bias=bias, dtype=dtype, damping=0.3)
    x, dy = randn(*shape, dtype=dtype), randn(*shape[:-1], 4, seed=1, dtype=dtype)
    layer(x).backward(dy)
    flat = x.double().reshape(-1, 6), dy.double().reshape(-1, 4)
    expected = cw.reference.emended_weight_grad(*flat, bias, damping=0.3)
    grads = layer.weight.grad, layer.bias.grad if bias else None
    assert all(g is None or g.dtype == dtype for g in grads)
    assert_grads_close(grads, expected, TOLERANCE[dtype])
    functional = cw.emended_weight_grad(x, dy, bias=bias, damping=0.3)
    assert_identical("dw", grads[0], functional[0])


def test_state_dicts_go_both_ways() -> None:
    emended, plain = pair()
    assert list(emended.state_dict()) == list(plain.state_dict()) == ["weight", "bias"]
    other = nn.Linear(6, 4)
    emended.load_state_dict(other.state_dict())
    plain.load_state_dict(emended.state_dict())
    assert_identical("weight", plain.weight, other.weight)


def test_saved_weights_load_with_weights_only() -> None:
    emended, plain = pair()
    file = io.BytesIO()
    torch.save(emended.state_dict(), file)
    file.seek(0)
    fresh = cw.Linear(6, 4)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert_identical("weight", fresh.weight, plain.weight)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_keep_options_and_gradients(copied: Callable[[nn.Module], nn.Module]) -> None:
    layer, _ = pair(damping=0.2, scale="raw")
    x = randn(5, 6, dtype=F32)
    twin = copied(layer)
    assert isinstance(twin, cw.Linear)
    for one in (layer, twin):
        one(x).square().sum().backward()
    assert (twin.damping, twin.scale) == (0.2, "raw")
    assert_identical("dw", twin.weight.grad, layer.weight.grad)


def test_constructor_and_repr_are_torch_s() -> None:
    layer = cw.Linear(6, 4, False, device="meta", dtype=torch.float64)
    assert (layer.weight.device.type, layer.weight.dtype, layer.bias) == ("meta", torch.float64, None)
    assert repr(cw.Linear(6, 4)) == repr(nn.Linear(6, 4))
    assert repr(cw.Linear(6, 4, damping=2, scale="raw")) == (
        "Linear(in_features=6, out_features=4, bias=True, damping=2, scale='raw')"
    )
    assert isinstance(layer, nn.Linear)


def test_nothing_is_kept_between_steps() -> None:
    layer, _ = pair()
    before = dict(layer.__dict__)
    layer(randn(5, 6, dtype=F32)).sum().backward()
    assert dict(layer.__dict__) == before
    assert not list(layer.buffers())


class Recorder(TorchDispatchMode):
    """Names of the ops that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))

    def emended(self) -> list[str]:
        return [name for name in self.names if name.startswith("consequentialism::") or "cholesky" in name]


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_nothing_is_emended_where_no_gradient_is_needed(backend: str) -> None:
    layer, _ = pair(backend=backend)
    x = randn(5, 6, dtype=F32).requires_grad_()
    with Recorder() as recorder:
        with torch.no_grad():
            layer(x)
        with torch.inference_mode():
            layer(x)
        layer.requires_grad_(False)
        layer(x).sum().backward()
    assert recorder.emended() == []
    with Recorder() as recorder:
        layer.requires_grad_(True)(x)
    assert recorder.emended()


def test_the_input_s_gradient_is_one_product_and_only_where_it_is_wanted() -> None:
    layer, _ = pair()
    products = []
    for wanted in (False, True):
        with Recorder() as recorder:
            layer(randn(5, 6, dtype=F32).requires_grad_(wanted)).sum().backward()
        products.append(recorder.names.count("aten::mm"))
    assert products[1] == products[0] + 1


@pytest.mark.parametrize("inputs", [6, 40])  # primal and dual
@pytest.mark.parametrize("frozen", ["weight", "bias"])
@pytest.mark.parametrize("options", [{}, {"damping_mode": "absolute"}])
def test_a_frozen_parameter_does_not_change_the_other_s_gradient(
    frozen: str, inputs: int, options: dict[str, str]
) -> None:
    layer, _ = pair(inputs, **options)
    x = randn(9, inputs, dtype=F32)
    layer(x).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
    layer.zero_grad()
    getattr(layer, frozen).requires_grad_(False)
    layer(x).square().sum().backward()
    assert getattr(layer, frozen).grad is None
    trained = "bias" if frozen == "weight" else "weight"
    assert_close(trained, getattr(layer, trained).grad, expected[trained], TOLERANCE[F32])


def test_tied_weights_add_their_gradients() -> None:
    first, second = cw.Linear(6, 6, bias=False), cw.Linear(6, 6, bias=False)
    second.weight = first.weight
    x = randn(5, 6, dtype=F32)
    hidden = first(x)
    (second(hidden) + first(x)).sum().backward()
    ones = torch.ones(5, 6)
    parts = [
        cw.emended_weight_grad(x, ones @ first.weight.detach(), bias=False)[0],
        cw.emended_weight_grad(hidden.detach(), ones, bias=False)[0],
        cw.emended_weight_grad(x, ones, bias=False)[0],
    ]
    assert_close("dw", first.weight.grad, torch.stack(parts).sum(0), TOLERANCE[F32])


def test_gradients_accumulate() -> None:
    layer, _ = pair()
    x = randn(5, 6, dtype=F32)
    layer(x).square().sum().backward()
    once = layer.weight.grad.clone()
    layer(x).square().sum().backward()
    assert_identical("dw", layer.weight.grad, 2 * once)


def test_checkpointing_gives_the_same_gradient() -> None:
    layer, _ = pair()
    x = randn(5, 6, dtype=F32).requires_grad_()
    layer(x).square().sum().backward()
    expected = layer.weight.grad.clone()
    layer.zero_grad()
    checkpoint(layer, x, use_reentrant=False).square().sum().backward()
    assert_identical("dw", layer.weight.grad, expected)


OPTIMIZERS: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=1.0, weight_decay=1e-4),
    "nag": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-2),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=1e-2),
}


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer_trains(name: str, clip: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(cw.Linear(6, 16), nn.Tanh(), cw.Linear(16, 4))
    optimizer = OPTIMIZERS[name](list(model.parameters()))
    x, target = randn(32, 6, dtype=F32), randn(32, 4, seed=1, dtype=F32)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), target)
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_a_step_changes_each_row_as_it_was_told_to() -> None:
    layer, _ = pair(40, 4, damping=1e-7, scale="raw", dtype=torch.float64)
    x, dy = randn(8, 40), randn(8, 4, seed=1)
    before = layer(x)
    before.backward(dy)
    predicted = cw.predict_change(x, layer.weight.grad, layer.bias.grad)
    torch.optim.SGD(layer.parameters(), lr=0.5).step()
    assert_close("change", layer(x) - before, -0.5 * dy, 1e-6)
    assert_close("predicted", predicted, dy, 1e-6)


@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
@pytest.mark.parametrize("inside", [False, True])
def test_autocast(dtype: torch.dtype, inside: bool) -> None:
    layer, plain = pair(20, 4, damping=1e-2)
    x, dy = randn(9, 20, dtype=F32), randn(9, 4, seed=1, dtype=F32)
    with torch.autocast("cpu", dtype=dtype):
        y = layer(x)
        assert_identical("y", y, plain(x))
        if inside:
            y.backward(dy.to(dtype))
    if not inside:
        y.backward(dy.to(dtype))
    assert layer.weight.grad.dtype == F32
    rounded = [t.to(dtype).double() for t in (x, dy)]
    expected = cw.reference.emended_weight_grad(*rounded, damping=1e-2)
    assert_grads_close((layer.weight.grad, layer.bias.grad), expected, TOLERANCE[dtype])


def test_grad_scaler_skips_an_overflow_and_then_steps() -> None:
    layer, _ = pair()
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    x = randn(5, 6, dtype=F32)
    before = layer.weight.detach().clone()
    for factor in (torch.inf, 1.0):
        optimizer.zero_grad()
        scaler.scale(factor * layer(x).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert layer.weight.isfinite().all()
        assert torch.equal(layer.weight, before) == (factor == torch.inf)
    assert scaler.get_scale() == 512.0


def test_scaled_loss_gives_the_scaled_gradient_bit_for_bit() -> None:
    layer, _ = pair(40, 30)
    x = randn(9, 40, dtype=F32)
    layer(x).square().mean().backward()
    expected = layer.weight.grad.clone()
    layer.zero_grad()
    (4096 * layer(x).square().mean()).backward()
    assert_identical("dw", layer.weight.grad, 4096 * expected)
