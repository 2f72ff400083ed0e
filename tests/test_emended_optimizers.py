"""`Emended` around every optimizer: the step in coordinates, weight decay, refusals."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy
import pytest
import torch
from cases import F32, F64, TOLERANCE, assert_close, assert_identical, randn
from emended_helpers import EXACT, mlp, squares, train
from torch import Tensor, nn

import consequentialism as cw
from consequentialism.optim.rules import _DECLARED

Make = Callable[[Any], torch.optim.Optimizer]


def soap(parameters: Any) -> torch.optim.Optimizer:
    return pytest.importorskip("pytorch_optimizer").SOAP(parameters, lr=0.01, weight_decay=0.0)


def lion(parameters: Any) -> torch.optim.Optimizer:
    return pytest.importorskip("pytorch_optimizer").Lion(parameters, lr=0.01)


def schedule_free(name: str, **options: Any) -> Make:
    return lambda parameters: getattr(pytest.importorskip("pytorch_optimizer"), name)(parameters, lr=0.05, **options)


def of_torch(name: str, **options: Any) -> Make:
    return lambda parameters: getattr(torch.optim, name)(parameters, lr=0.02, **options)


MAKERS: dict[str, Make] = {
    "SGD": of_torch("SGD"),
    "SGD foreach": of_torch("SGD", momentum=0.9, foreach=True),
    "SGD fused": of_torch("SGD", momentum=0.9, fused=True),
    "Adam": of_torch("Adam"),
    "Adam foreach": of_torch("Adam", foreach=True),
    "AdamW": of_torch("AdamW", weight_decay=0.0),
    "AdamW tensor rate": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.02), weight_decay=0.0),
    "NAdam": of_torch("NAdam"),
    "RAdam": of_torch("RAdam"),
    "Adamax": of_torch("Adamax"),
    "Adagrad": of_torch("Adagrad"),
    "Adagrad fused": of_torch("Adagrad", fused=True),
    "Adadelta": of_torch("Adadelta"),
    "RMSprop": of_torch("RMSprop", momentum=0.9, centered=True),
    "RMSprop foreach": of_torch("RMSprop", foreach=True),
    "Rprop": of_torch("Rprop"),
    "ASGD": of_torch("ASGD", lambd=0.0),
    "SOAP": soap,
    "Lion": lion,
    "ScheduleFreeSGD": schedule_free("ScheduleFreeSGD"),
    "ScheduleFreeAdamW": schedule_free("ScheduleFreeAdamW"),
    "ScheduleFreeRAdam": schedule_free("ScheduleFreeRAdam"),
}


def _start(optimizer: torch.optim.Optimizer) -> None:
    if hasattr(optimizer, "train"):
        optimizer.train()


def augmented(layer: nn.Linear, gradient: bool = False) -> Tensor:
    pair = (layer.weight.grad, layer.bias.grad) if gradient else (layer.weight.detach(), layer.bias.detach())
    return torch.cat([pair[0], pair[1][:, None]], 1)  # type: ignore[index,list-item]


@pytest.mark.usefixtures("even_refreshes")
@pytest.mark.parametrize("name", MAKERS)
def test_the_optimizer_works_in_coordinates(name: str) -> None:
    """An oracle that keeps ``V`` itself, from ``V = 0``; the root stays as the first batch has it."""
    layer = nn.Linear(6, 5, dtype=F64)
    optimizer = cw.optim.Emended(MAKERS[name](layer.parameters()), layer, refresh_every=100, damping=0.1)
    start, oracle = augmented(layer), copy.deepcopy(layer)
    weight = nn.Parameter(torch.zeros(5, 6, dtype=F64))
    bias = nn.Parameter(torch.zeros(5, dtype=F64))
    inner = MAKERS[name]([weight, bias])
    _start(optimizer)
    _start(inner)
    x = randn(30, 6)
    for step in range(8):
        rows = randn(30, 6, seed=step)
        for one in (layer, oracle):
            one.zero_grad()
            squares(one(x if step == 0 else rows)).backward()
        optimizer.step()
        root = optimizer.state[layer.weight]["root"]
        gradient = augmented(oracle, gradient=True) @ root
        weight.grad, bias.grad = gradient[:, :-1].clone(), gradient[:, -1].clone()
        inner.step()
        place = start + torch.cat([weight, bias[:, None]], 1).detach() @ root.T
        with torch.no_grad():
            oracle.weight.copy_(place[:, :-1])
            oracle.bias.copy_(place[:, -1])
        bound = 2e-6 if "fused" in name else EXACT  # fused kernels keep some scalars in float32
        assert_close(f"step {step}", augmented(layer) - start, place - start, bound)
    if hasattr(optimizer, "eval"):  # the averaged weights, and back
        before = augmented(layer)
        optimizer.eval()
        inner.eval()
        averaged = start + torch.cat([weight, bias[:, None]], 1).detach() @ root.T
        assert_close("averaged", augmented(layer), averaged, EXACT)
        assert (augmented(layer) - before).abs().max() > 1e-4
        optimizer.train()
        assert_close("back", augmented(layer), before, EXACT)


def test_asgd_averages_the_weights() -> None:
    layer = nn.Linear(6, 5, dtype=F64)
    inner = torch.optim.ASGD(layer.parameters(), lr=0.02, lambd=0.1, t0=2, weight_decay=0.1)
    optimizer = cw.optim.Emended(inner, layer, refresh_every=100)
    x, seen, expected = randn(30, 6), [], layer.weight.detach().clone()
    for step in range(6):
        optimizer.zero_grad()
        squares(layer(x)).backward()
        before = layer.weight.detach().clone()
        eta = 0.02 if step == 0 else float(optimizer.state[layer.weight]["eta"])
        gradient = augmented(layer, True) + 0.1 * augmented(layer)
        optimizer.step()
        root = optimizer.state[layer.weight]["root"]
        expected = before * (1 - 0.1 * eta) - eta * (gradient @ root @ root.T)[:, :-1]
        assert_close(f"step {step}", layer.weight, expected, EXACT)
        seen.append(layer.weight.detach().clone())
    own = seen[0]
    for step, weight in enumerate(seen):
        own = own + (weight - own) / max(1, step - 2)
    assert_close("average", inner.state[layer.weight]["ax"], own, EXACT)


def test_adafactor_reads_the_size_of_the_weights() -> None:
    small, large = (nn.Linear(6, 5, False, dtype=F64) for _ in range(2))
    with torch.no_grad():
        small.weight.copy_(large.weight * 0.1)
    changes = []
    for layer in (small, large):
        optimizer = cw.optim.Emended(torch.optim.Adafactor(layer.parameters(), lr=0.01, weight_decay=0.1), layer)
        before = layer.weight.detach().clone()
        layer(randn(30, 6)).backward(randn(30, 5, seed=1))
        optimizer.step()
        changes.append(layer.weight.detach() - before * (1 - 0.01 * 0.1))
    assert_close("change", changes[1], changes[0] * 10, 1e-6)


@pytest.mark.parametrize("name", ["SGD", "Adam", "NAdam", "RAdam", "RMSprop", "Adagrad", "Adamax", "Adadelta"])
@pytest.mark.parametrize("maximize", [False, True])
def test_coupled_decay_enters_the_gradient(name: str, maximize: bool) -> None:
    """As a gradient with the decay in it."""
    model = mlp(F64)
    twin = copy.deepcopy(model)
    make = getattr(torch.optim, name)
    decayed = cw.optim.Emended(make(model.parameters(), lr=0.02, weight_decay=0.1, maximize=maximize), model)
    plain = cw.optim.Emended(make(twin.parameters(), lr=0.02, maximize=maximize), twin)
    for step in range(4):
        x = randn(20, 6, seed=step)
        for one, optimizer in ((model, decayed), (twin, plain)):
            optimizer.zero_grad()
            squares(one(x)).backward()
        for parameter in twin.parameters():
            parameter.grad.add_(parameter.detach(), alpha=-0.1 if maximize else 0.1)  # type: ignore[union-attr]
        decayed.step()
        plain.step()
    for own, expected in zip(model.parameters(), twin.parameters(), strict=True):
        assert_close("parameter", own, expected, EXACT)


DECOUPLED: dict[str, Callable[[Any, float], torch.optim.Optimizer]] = {
    "AdamW": lambda p, decay: torch.optim.AdamW(p, 0.02, weight_decay=decay),
    "Adam": lambda p, decay: torch.optim.Adam(p, 0.02, weight_decay=decay, decoupled_weight_decay=True),
    "NAdam": lambda p, decay: torch.optim.NAdam(p, 0.02, weight_decay=decay, decoupled_weight_decay=True),
    "RAdam": lambda p, decay: torch.optim.RAdam(p, 0.02, weight_decay=decay, decoupled_weight_decay=True),
    "Muon": lambda p, decay: torch.optim.Muon(p, 0.02, weight_decay=decay),
    "Lion": lambda p, decay: pytest.importorskip("pytorch_optimizer").Lion(p, 0.02, weight_decay=decay),
    "SOAP": lambda p, decay: pytest.importorskip("pytorch_optimizer").SOAP(p, 0.02, weight_decay=decay),
    "Lion fixed": lambda p, decay: pytest.importorskip("pytorch_optimizer").Lion(
        p, 0.02, weight_decay=decay * 0.02, fixed_decay=True
    ),
}


@pytest.mark.parametrize("name", DECOUPLED)
def test_decoupled_decay_multiplies_the_weights(name: str) -> None:
    """The first step with decay is that without it, from the smaller weights."""
    model = mlp(F64, bias=name != "Muon")
    twin, start = copy.deepcopy(model), copy.deepcopy(model)
    x = randn(20, 6)
    for one, decay in ((model, 0.5), (twin, 0.0)):
        train(one, cw.optim.Emended(DECOUPLED[name](one.parameters(), decay), one), x, 1)
    for own, other, before in zip(model.parameters(), twin.parameters(), start.parameters(), strict=True):
        expected = before * (1 - 0.02 * 0.5) + other - before
        assert_close("parameter", own, expected, EXACT)


class Unknown(torch.optim.SGD):
    """A subclass is known as its base is; `Stranger` is not."""


class Stranger(torch.optim.Optimizer):
    def __init__(self, parameters: Any, weight_decay: float = 0.0) -> None:
        super().__init__(parameters, {"lr": 0.1, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(p.grad, alpha=group["lr"])


def test_an_unknown_weight_decay_must_be_declared() -> None:
    layer = nn.Linear(6, 5, dtype=F64)
    with pytest.raises(ValueError, match=r"weight_decay=0.1 .* Stranger.*declare\(Stranger, decay='decoupled'\)"):
        cw.optim.Emended(Stranger(layer.parameters(), 0.1), layer)
    with pytest.warns(UserWarning, match=r"nothing is known of Stranger, .*declare\(Stranger, decay=") as caught:
        cw.optim.Emended(Stranger(layer.parameters()), layer)
    assert caught[0].filename == __file__
    cw.optim.Emended(Unknown(layer.parameters(), 0.1, weight_decay=0.1), layer)
    try:
        cw.optim.declare(Stranger, decay="decoupled")
        twin = copy.deepcopy(layer)
        train(layer, cw.optim.Emended(Stranger(layer.parameters(), 0.1), layer), randn(20, 6), 1)
        train(twin, cw.optim.Emended(Stranger(twin.parameters()), twin), randn(20, 6), 1)
    finally:
        _DECLARED.pop(Stranger, None)
    assert (layer.weight - twin.weight).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"damping": 0.0}, ValueError, "damping must be above 0, got 0.0"),
        ({"damping": math.nan}, ValueError, "damping must be above 0, got nan"),
        ({"damping": "x"}, TypeError, "damping must be a number, got 'x'"),
        ({"exponent": 0}, ValueError, "exponent must be above 0 and at most 1"),
        ({"exponent": 1.5}, ValueError, "exponent must be above 0 and at most 1, or None, got 1.5"),
        ({"memory": 1.0}, ValueError, "memory must be at least 0 and below 1, got 1.0"),
        ({"memory": -0.1}, ValueError, "memory must be at least 0"),
        ({"refresh_every": 0}, ValueError, "refresh_every must be an integer of at least 1 or None, got 0"),
        ({"refresh_every": 1.5}, TypeError, "refresh_every must be an integer of at least 1 or None, got 1.5"),
        ({"block": 0}, ValueError, "block must be an integer of at least 1 or None, got 0"),
        ({"scale": "raw"}, ValueError, "scale must be one of 'auto', 'gradient', 'nlms', got 'raw'"),
        ({"process_group": "world"}, TypeError, "process_group must be 'auto', None or a process group"),
        ({"filter_fn": 3}, TypeError, "filter_fn must be callable or None, got 3"),
        ({"filter_fn": lambda *_: False}, ValueError, "no layer that can be stepped in coordinates"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], match: str) -> None:
    model = mlp(F64)
    with pytest.raises(error, match=match):
        cw.optim.Emended(torch.optim.SGD(model.parameters(), 0.1), model, **arguments)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("name", ["Prodigy", "AdaFactor"])
def test_optimizers_of_others_that_read_the_weights(name: str) -> None:
    """Zeros in their place leave these two at the rate that they begin with."""
    model = mlp(F32)
    plain, x = copy.deepcopy(model), randn(20, 6, dtype=F32)
    kind = getattr(pytest.importorskip("pytorch_optimizer"), name)
    losses = train(model, cw.optim.Emended(kind(model.parameters()), model), x, 100)
    expected = train(plain, kind(plain.parameters()), x, 100)
    assert losses[0] - losses[-1] > 0.5 * (expected[0] - expected[-1])


@pytest.mark.parametrize(
    ("arguments", "python"),
    [
        ({"damping": Fraction(1, 32), "memory": Fraction(3, 4)}, {"damping": 1 / 32, "memory": 0.75}),
        ({"exponent": Fraction(1, 4)}, {"exponent": 0.25}),
        ({"damping": numpy.float32(0.5), "exponent": 1}, {"damping": 0.5, "exponent": 1.0}),
        ({"refresh_every": numpy.int64(3), "block": numpy.int32(2)}, {"refresh_every": 3, "block": 2}),
        ({"damping": 10**400}, {"damping": math.inf}),
        ({"exponent": 1e-320}, {"exponent": 1e-320}),
    ],
)
def test_numbers_of_any_real_type(arguments: dict[str, Any], python: dict[str, Any]) -> None:
    """They come as Python's own to what computes with them, and to a user who prints the optimizer."""
    first = mlp(F64)
    models = [first, copy.deepcopy(first)]
    for model, given in zip(models, (arguments, python), strict=True):
        optimizer = cw.optim.Emended(torch.optim.AdamW(model.parameters()), model, **given)
        train(model, optimizer, randn(20, 6), 2)
        assert all(f"{name}={value!r}" in repr(optimizer) for name, value in python.items())
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        assert_identical("parameter", one.detach(), other.detach())


def test_its_repr_names_every_option() -> None:
    for kind in (cw.optim.Emended, cw.optim.Muon):
        model = mlp(F64)
        adamw = torch.optim.AdamW(model.parameters())
        optimizer = cw.optim.Muon(model, 0.1, aux={"lr": 0.1}) if kind is cw.optim.Muon else kind(adamw, model)
        text = repr(optimizer)
        assert text.startswith(f"{kind.__name__}(damping=0.03, exponent=")
        names = [p.name for p in inspect.signature(cw.optim.Emended).parameters.values() if p.kind is p.KEYWORD_ONLY]
        missing = [name for name in names if f"{name}=" not in text.split(") of ")[0]]
        assert not missing
        assert "scale='gradient'" in text
        assert "root='auto'" in text


def test_optimizers_that_cannot_be_wrapped() -> None:
    model = mlp(F64)
    for make, match in (
        (torch.optim.LBFGS, "LBFGS cannot be stepped in coordinates, for it moves the parameters within a step"),
        (torch.optim.SparseAdam, "SparseAdam cannot be stepped in coordinates, for it takes sparse gradients"),
    ):
        with pytest.raises(ValueError, match=match):
            cw.optim.Emended(make(model.parameters()), model)
    inner = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(
        ValueError, match="Emended cannot be stepped in coordinates, for it steps in coordinates already"
    ):
        cw.optim.Emended(cw.optim.Emended(inner, model), model)
    with pytest.raises(TypeError, match=r"optimizer must be a torch.optim.Optimizer, got 3"):
        cw.optim.Emended(3, model)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module"):
        cw.optim.Emended(inner, None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="model: the optimizer has none of its parameters"):
        cw.optim.Emended(inner, mlp(F64))
    large = nn.Sequential(*(nn.Linear(9, 9) for _ in range(9)))
    with pytest.raises(TypeError, match=r"Optimizer, got Sequential\( \(0\): Linear\(.{,80}\.\.\. \(Sequential\)$"):
        cw.optim.Emended(large, inner)  # type: ignore[arg-type]
    norm = nn.LayerNorm(3)
    of_norm = torch.optim.SGD(norm.parameters(), 0.1)
    with pytest.raises(ValueError, match="no layer that can be stepped"):
        cw.optim.Emended(of_norm, norm)
    with pytest.raises(ValueError, match="differentiable=True"):
        cw.optim.Emended(torch.optim.SGD(model.parameters(), 0.1, differentiable=True), model)
    free = MAKERS["ScheduleFreeSGD"](model.parameters())
    free.param_groups[0]["weight_decay"] = 0.1
    with pytest.raises(ValueError, match="weight_decay of ScheduleFreeSGD acts on several places"):
        cw.optim.Emended(free, model)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ((nn.Linear,), TypeError, "cls must be a subclass of torch.optim.Optimizer, got"),
        (
            (Stranger, "both"),
            ValueError,
            "decay must be one of 'coupled', 'decoupled', 'proximal', 'within', 'none', got 'both'",
        ),
        ((Stranger, "none", 1), TypeError, "orthogonalises must be True or False, got 1"),
        (
            (Stranger, "none", False, "all"),
            ValueError,
            "reads must be one of 'change', 'weights', 'position', got 'all'",
        ),
    ],
)
def test_bad_declarations(arguments: tuple[Any, ...], error: type[Exception], match: str) -> None:
    names = ("decay", "orthogonalises", "reads")
    given = {"decay": "none", **dict(zip(names, arguments[1:], strict=False))}
    with pytest.raises(error, match=match):
        cw.optim.declare(arguments[0], **given)
    assert Stranger not in _DECLARED


def test_a_decay_of_an_unknown_class_that_begins_later() -> None:
    """As a scheduler or a user sets it: the step says so, and has changed nothing."""
    layer = nn.Linear(6, 5, dtype=F64)
    optimizer = cw.optim.Emended(Stranger(layer.parameters()), layer)
    train(layer, optimizer, randn(20, 6), 1)
    optimizer.param_groups[0]["weight_decay"] = 0.1
    before = layer.weight.detach().clone()
    squares(layer(randn(20, 6))).backward()
    with pytest.raises(ValueError, match=r"it is not known what weight_decay=0\.1 does in Stranger"):
        optimizer.step()
    assert torch.equal(layer.weight, before)


def test_adam_squares_a_half_precision_gradient_in_range() -> None:
    """300 squared is beyond float16; 1e-3 of it is not."""
    layer = nn.Linear(3, 2, bias=False, dtype=torch.float16)
    optimizer = cw.optim.Emended(torch.optim.Adam(layer.parameters(), 0.01), layer)
    before = layer.weight.detach().clone()
    layer.weight.grad = torch.full_like(layer.weight, 300)
    with pytest.warns(UserWarning, match="has seen no input"):
        optimizer.step()
    assert optimizer.state[layer.weight]["exp_avg_sq"].isfinite().all()
    assert_close("weight", layer.weight.detach(), before - 0.01, TOLERANCE[torch.float16])
