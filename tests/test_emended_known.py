"""What `Emended` knows of optimizers, held to the optimizers themselves."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import F32, F64, TOLERANCE, assert_close, randn
from emended_helpers import EXACT, mlp, train
from torch import Tensor, nn

import consequentialism as cw
from consequentialism.optim.known import KNOWN, Rule
from consequentialism.optim.rules import _DECLARED, decay_of, share_of

# Where a package has its optimizers.
MODULES = {
    "torch": "torch.optim",
    "pytorch_optimizer": "pytorch_optimizer",
    "bitsandbytes": "bitsandbytes.optim",
    "timm": "timm.optim",
    "torchao": "torchao.optim",
    "galore_torch": "galore_torch.adamw",
    "transformers": "transformers.optimization",
}
NOT_RUN = (
    "apex",
    "deepspeed",
    "consequentialism",
)  # the first two need a GPU or a compiler, the last has its own tests
SERVED = {key: rule for key, rule in KNOWN.items() if rule.refused is None and key[0] not in NOT_RUN}
# They leave out their first steps, and the decay with them; in coordinates it acts in those too.
SKIPPING = {("pytorch_optimizer", "SOAP"), ("pytorch_optimizer", "RAdam")}
OWN_TESTS = {("torch", "Muon"), ("torch", "ASGD"), ("pytorch_optimizer", "MuonBase")}
TESTED = {key: rule for key, rule in SERVED.items() if key not in OWN_TESTS}
AT_HAND = [key for key in TESTED if key[0] in ("torch", "pytorch_optimizer")]
ELSEWHERE = sorted({package for package, _ in TESTED} - {"torch", "pytorch_optimizer"})
FLOAT32 = {key for key in TESTED if key[0] in ("bitsandbytes", "torchao")}  # they compute in it
FLOAT32 |= {("timm", "RAdamLegacy"), ("torch_optimizer", "RAdam")}


def maker(package: str, name: str, decay: float, **given: Any) -> Callable[[Any], torch.optim.Optimizer]:
    """How a class is made, with a weight decay where it has one and the rule says what it is, and a momentum."""
    pytest.importorskip(package)
    cls = getattr(importlib.import_module(MODULES.get(package, package)), name)
    taken = inspect.signature(cls).parameters
    options: dict[str, Any] = {"lr": 0.02} if "lr" in taken else {}
    rule = KNOWN[package, name]
    if "weight_decay" in taken:
        without = rule.decay == "within" or rule.reads == "position" or (package, name) in SKIPPING
        options["weight_decay"] = 0.0 if without else decay
    if "relative_step" in taken:
        options |= {"relative_step": False, "scale_parameter": not decay or "scale_parameter" not in rule.without}
    if "momentum" in taken and not (decay and "momentum" in rule.without):
        options["momentum"] = 0.9
    if "delta" in rule.without and decay:
        options["delta"] = 0.0
    return lambda parameters: cls(list(parameters), **{**options, **given})


def white(rows: int, inputs: int) -> Tensor:
    """Rows of which the second moment is the identity, also with a column of ones: ``S`` is then the identity."""
    columns = torch.cat([torch.ones(rows, 1, dtype=F64), randn(rows, inputs)], 1)
    return torch.linalg.qr(columns).Q[:, 1:] * rows**0.5


def run(layer: nn.Linear, optimizer: torch.optim.Optimizer, x: Tensor, steps: int) -> list[Tensor]:
    if callable(getattr(optimizer, "train", None)):
        optimizer.train()  # type: ignore[attr-defined]
    torch.manual_seed(0)
    places = []
    for step in range(steps):
        for group in optimizer.param_groups if step == 3 else ():
            group["lr"] /= 2
        optimizer.zero_grad()
        layer(x).backward(randn(*layer(x).shape, seed=step + 1).to(x.dtype))
        optimizer.step()
        places.append(torch.cat([layer.weight.detach(), layer.bias.detach()[:, None]], 1).clone())
    return places


def assert_plain_where_the_root_is_the_identity(package: str, name: str, inputs: int = 6, **given: Any) -> None:
    """Decay, state and everything that it reads: only the coordinates are not there to be seen."""
    dtype = F32 if (package, name) in FLOAT32 else F64
    # The last bit of a gradient decides which way a quantized state is rounded.
    bound = 1e-3 if inputs == 64 else TOLERANCE[dtype]
    make, x = maker(package, name, 0.1, **given), white(2 * inputs, inputs).to(dtype)
    layers = [nn.Linear(inputs, inputs, dtype=dtype) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    plain = make(layers[0].parameters())
    own = cw.optim.Emended(make(layers[1].parameters()), layers[1], damping=1e-12, exponent=0.5)
    expected, places = run(layers[0], plain, x, 12), run(layers[1], own, x, 12)
    for step, (one, other) in enumerate(zip(places, expected, strict=True)):
        assert_close(f"{name}, step {step}", one, other, bound)
    assert (places[-1] - places[0]).abs().max() > 1e-9


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("package", "name"), AT_HAND, ids=[".".join(key) for key in AT_HAND])
def test_it_is_the_plain_optimizer_where_the_root_is_the_identity(package: str, name: str) -> None:
    assert_plain_where_the_root_is_the_identity(package, name)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("package", ELSEWHERE)
def test_so_are_those_of_packages_that_are_installed(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # which takes minutes for torchao's
    for own, name in TESTED:
        if own == package:
            assert_plain_where_the_root_is_the_identity(package, name)
            if name.endswith(("4bit", "8bit", "Fp8")):  # a state of 4,096 numbers is quantized
                assert_plain_where_the_root_is_the_identity(package, name, 64)


SIZED = [key for key, rule in TESTED.items() if rule.reads == "weights" and rule.decay == "decoupled"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("package", "name"), SIZED, ids=[".".join(key) for key in SIZED])
def test_beside_the_weights_size_a_decay_takes_the_share_that_it_takes_plainly(package: str, name: str) -> None:
    """The step of a gradient of 0 is the decay alone."""
    shares = []
    for emended in (False, True):
        layer = nn.Linear(6, 5, dtype=F64)
        optimizer = maker(package, name, 0.5)(layer.parameters())
        if emended:
            optimizer = cw.optim.Emended(optimizer, layer, damping=0.1, exponent=0.5)
        x = randn(30, 6) * torch.tensor([1, 2, 3, 0.3, 0.1, 1], dtype=F64)
        start = layer.weight.detach().clone()
        layer(x).backward(randn(30, 5) * 0)
        optimizer.step()
        shares.append(layer.weight.detach() / start)
    assert shares[0].max() < 1
    assert_close(name, shares[1], shares[0], EXACT)


@pytest.mark.filterwarnings("ignore")
def test_it_is_the_plain_optimizer_where_that_ascends() -> None:
    """pytorch_optimizer's have the option as an attribute."""
    package = pytest.importorskip("pytorch_optimizer")
    ascending = [
        name
        for own, name in AT_HAND
        if own == "pytorch_optimizer" and "maximize" in inspect.signature(getattr(package, name)).parameters
    ]
    assert len(ascending) > 10
    for name in ascending:
        assert_plain_where_the_root_is_the_identity("pytorch_optimizer", name, maximize=True)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("package", "name", "options"),
    [
        ("optimi", "Adam", {"decouple_lr": True}),
        ("optimi", "RAdam", {"decouple_lr": True, "max_lr": 0.05}),
        ("optimi", "SGD", {"decouple_lr": True}),
        ("optimi", "Adan", {"decouple_lr": True}),
        ("pytorch_optimizer", "ScalableShampoo", {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    ],
)
def test_it_is_the_plain_optimizer_with_an_option_of_its_own(package: str, name: str, options: dict[str, Any]) -> None:
    pytest.importorskip(package)
    assert_plain_where_the_root_is_the_identity(package, name, **options)


@pytest.mark.parametrize(
    ("package", "name", "group", "share"),
    [
        ("timm", "SGDW", {"momentum": 0.9, "corrected_weight_decay": False}, 0.99),
        ("timm", "Mars", {"lr_1d_factor": 1.0}, 0.99),
        ("timm", "AdamP", {"wd_ratio": 0.1, "delta": 0.0}, 0.99),
        ("torch_optimizer", "SGDP", {"delta": 0.0, "momentum": 0}, 0.99),
        ("optimi", "Adam", {"decouple_wd": False, "decouple_lr": True, "max_lr": 0.2}, 0.95),
        ("optimi", "Adam", {"decouple_wd": False, "decouple_lr": False, "max_lr": None}, 1),
        ("optimi", "Adan", {"decouple_lr": True, "max_lr": 0.2, "adam_wd": False}, 1 / 1.05),
        ("torch_optimizer", "Shampoo", {"momentum": 0.0}, 1),
    ],
)
def test_the_share_that_a_decay_leaves(package: str, name: str, group: dict[str, Any], share: float) -> None:
    group = {"lr": 0.1, "weight_decay": 0.1, **group}
    assert share_of(decay_of(KNOWN[package, name], group, name), group) == pytest.approx(share, rel=1e-12)


@pytest.mark.parametrize(
    ("package", "name", "group", "match"),
    [
        ("timm", "SGDW", {"corrected_weight_decay": True}, "with corrected_weight_decay=True; set one of them to 0"),
        ("timm", "Mars", {"lr_1d_factor": 0.5}, "with lr_1d_factor=0.5; set lr_1d_factor to 1 or weight_decay to 0"),
        ("timm", "AdamP", {"delta": 0.1}, "of AdamP is in coordinates with delta=0.1; set one of them to 0"),
        ("timm", "SGDP", {"delta": 0.0, "momentum": 0.9}, "with momentum=0.9; set one of them to 0"),
        ("torch_optimizer", "AdamP", {"delta": 0.1}, "with delta=0.1"),
        ("pytorch_optimizer", "AdamP", {"delta": 0.0, "weight_decouple": False}, "set weight_decouple to True or"),
        ("torch_optimizer", "Adafactor", {"relative_step": True, "lr": None}, "with relative_step=True; set one"),
        ("torch_optimizer", "Adafactor", {"lr": None}, "weight_decay=0.1 of Adafactor needs a learning rate; set lr"),
        ("torch_optimizer", "Adafactor", {"scale_parameter": True}, "with scale_parameter=True; set one of them to 0"),
        ("torch_optimizer", "Shampoo", {"momentum": 0.9}, "of Shampoo is in coordinates with momentum=0.9"),
        ("optimi", "Adan", {"adam_wd": True}, "of Adan is in coordinates with adam_wd=True"),
    ],
)
def test_a_decay_that_is_another_one_with_an_option(package: str, name: str, group: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        decay_of(KNOWN[package, name], {"lr": 0.1, "weight_decay": 0.1, **group}, name)


def test_an_option_that_is_an_attribute() -> None:
    AdaBelief = type("AdaBelief", (torch.optim.SGD,), {"__module__": "torch_optimizer.adabelief"})
    model = mlp(F64)
    optimizer = AdaBelief(model.parameters(), weight_decay=0.1)
    cw.optim.Emended(optimizer, model)
    model = mlp(F64)
    optimizer = AdaBelief(model.parameters(), weight_decay=0.1)
    optimizer._weight_decouple = True
    with pytest.raises(ValueError, match=r"it is not known what weight_decay=.* does in AdaBelief"):
        cw.optim.Emended(optimizer, model)


CHANGING = [key for key in AT_HAND if TESTED[key].reads == "change"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("even_refreshes")
@pytest.mark.parametrize(("package", "name"), CHANGING, ids=[".".join(key) for key in CHANGING])
def test_it_steps_in_coordinates(package: str, name: str) -> None:
    """An oracle that keeps ``V`` itself, from ``V = 0``; the root stays as the first batch has it."""
    make, layer, x = maker(package, name, 0.0), nn.Linear(6, 5, dtype=F64), randn(30, 6)
    start = layer.weight.detach().clone()
    optimizer = cw.optim.Emended(make([layer.weight]), layer, refresh_every=100, damping=0.1, exponent=0.5)
    coordinates = nn.Parameter(torch.zeros(5, 6, dtype=F64))
    inner = make([coordinates])
    for step in range(12):
        layer.weight.grad = None
        layer(x).backward(randn(30, 5, seed=step))
        gradient = layer.weight.grad.clone()  # type: ignore[union-attr]
        torch.manual_seed(step)
        optimizer.step()
        root = optimizer.state[layer.weight]["root"]
        coordinates.grad = gradient @ root
        torch.manual_seed(step)
        inner.step()
        assert_close(f"step {step}", layer.weight.detach() - start, coordinates.detach() @ root.T, EXACT)
    assert (layer.weight != start).any()


class Wrapper(torch.optim.Optimizer):
    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self.defaults, self.state = optimizer, optimizer.defaults, optimizer.state
        self.param_groups = optimizer.param_groups


class Strange(torch.optim.Optimizer):
    def __init__(self, parameters: Any, lr: float = 0.1) -> None:
        super().__init__(parameters, {"lr": lr})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        raise NotImplementedError


class Sharpness(Strange):
    def first_step(self) -> None: ...

    def second_step(self) -> None: ...


class Curvature(Strange):
    def update_hessian(self) -> None: ...


class Closure(Strange):
    def step(self, closure: Any) -> None:  # type: ignore[override]
        raise NotImplementedError


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda p: Wrapper(torch.optim.SGD(p)), "Wrapper .*wraps another optimizer: give the SGD to Emended, and Emen"),
        (Sharpness, "Sharpness cannot be stepped in coordinates, for it takes two gradients a step"),
        (Curvature, "Curvature .* for it takes a curvature from gradients that it sees outside of its step"),
        (Closure, "Closure .* for it moves the parameters within a step and asks for the loss there"),
    ],
)
def test_what_its_class_says_is_refused(make: Any, match: str) -> None:
    model = mlp(F64)
    optimizer = make(model.parameters())
    with pytest.raises(ValueError, match=match):
        cw.optim.Emended(optimizer, model)
    assert not any(module._forward_hooks for module in model.modules())
    if type(optimizer) is not Wrapper:
        cw.optim.declare(type(optimizer), decay="none")
        try:
            cw.optim.Emended(optimizer, model)
        finally:
            _DECLARED.pop(type(optimizer))


@pytest.mark.parametrize("name", [name for package, name in KNOWN if package == "pytorch_optimizer"])
def test_the_classes_are_there(name: str) -> None:
    package = pytest.importorskip("pytorch_optimizer")
    assert issubclass(getattr(package, name, torch.optim.Optimizer), torch.optim.Optimizer)


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("LARS", {}, "weight_decay=0.1 of LARS is a part of the update that it scales, .*; set it to 0"),
        ("NovoGrad", {}, "weight_decay=0.1 of NovoGrad is a part of the update"),
        ("ScalableShampoo", {}, "weight_decay=0.1 of ScalableShampoo is a part of the update"),
        ("AdaFactor", {}, "weight_decay=0.1 of AdaFactor is in coordinates with relative_step=True"),
        ("AdamP", {}, "weight_decay=0.1 of AdamP is in coordinates with delta=0.1; set one of them to 0"),
        ("SGDP", {}, "weight_decay=0.1 of SGDP is in coordinates with delta=0.1; set one of them to 0"),
        ("Shampoo", {"momentum": 0.9}, "weight_decay=0.1 of Shampoo is in coordinates with momentum=0.9"),
        ("Prodigy", {}, "weight_decay of Prodigy acts on several places in the coordinates; set it to 0, got 0.1"),
        ("AdaHessian", {}, "AdaHessian cannot be stepped in coordinates, for it takes a curvature"),
        ("Nero", None, "Nero cannot be stepped in coordinates, for it changes the weights' size itself"),
    ],
)
def test_a_decay_or_a_class_that_has_no_place_in_coordinates(
    name: str, options: dict[str, Any] | None, match: str
) -> None:
    model = mlp(F64)
    cls = getattr(pytest.importorskip("pytorch_optimizer"), name)
    optimizer = cls(list(model.parameters()), **({} if options is None else {"weight_decay": 0.1, **options}))
    with pytest.raises(ValueError, match=match):
        cw.optim.Emended(optimizer, model)


def test_a_decay_of_several_places_that_begins_later() -> None:
    model = mlp(F64)
    optimizer = cw.optim.Emended(pytest.importorskip("pytorch_optimizer").Prodigy(model.parameters()), model)
    train(model, optimizer, randn(20, 6), 1)
    optimizer.param_groups[0]["weight_decay"] = 0.1
    with pytest.raises(ValueError, match="weight_decay of Prodigy acts on several places"):
        train(model, optimizer, randn(20, 6), 1)


ACTS = {
    "coupled": "added to the gradient",
    "decoupled": "taken from the weights",
    "proximal": "divides weights and step",
    "within": "refused",
    "none": "has none",
    None: "to be declared",
}
READS = {"change": "nothing", "weights": "the weights' size", "position": "places of its own"}


def cells(rule: Rule) -> tuple[str, str]:
    """What the page says of a rule: of its weight decay, and of what it reads."""
    if rule.refused is not None:
        return "not served", f"the class is refused: {rule.refused}"
    acts = ["refused" if rule.reads == "position" else ACTS[rule.decay]]
    if rule.without:
        acts.append("refused with " + ", ".join(f"`{option}`" for option in rule.without))
    if rule.only_with:
        acts.append("refused unless " + ", ".join(f"`{option}={value!r}`" for option, value in rule.only_with))
    return "; ".join(acts), READS[rule.reads] + "; its update is orthogonal" * rule.orthogonalises


def test_the_page_says_what_the_table_says() -> None:
    page = (Path(__file__).parent.parent / "docs" / "optimizers.md").read_text()
    known: dict[tuple[str, str, str], set[str]] = {}
    for (package, name), rule in KNOWN.items():
        if package != "consequentialism":
            known.setdefault((package, *cells(rule)), set()).add(name)
    said: dict[tuple[str, str, str], set[str]] = {}
    for row in page.splitlines():
        if row.startswith("| `"):
            package, acts, classes, reads = row.strip("| ").split(" | ")
            said.setdefault((package.strip("`"), acts, reads), set()).update(classes.replace("`", "").split(", "))
    assert said == known
