"""Tasks that outsiders know, trained to the end of a learning rate's schedule: nanoGPT's configuration for the CPU, a
small vision transformer and a small residual network on CIFAR-10. Data come from a folder that the user names.

Everybody gets a cosine schedule with warm-up down to a tenth of the rate, clipping to a norm of 1, no weight decay on
vectors, and eight trials: from its first setting on, one knob after the other, each time keeping the best. Weight decay
and, where Muon leaves parameters to AdamW, that one's rate are among the knobs of all.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from consequentialism.experiments.data import Samples
from consequentialism.experiments.methods import Loss, Step
from consequentialism.experiments.models import build
from consequentialism.experiments.train import Problem
from consequentialism.optim import Emended, Muon

from .images import cifar, find_cifar
from .methods import inside, output_exponent_of, root_of
from .models import NanoGPT, ViT, cifar_resnet
from .text import find_shakespeare, shakespeare

WARM_UP, MOST_WARM_UP = 100, 0.2  # steps, as nanoGPT; at most this share of a short schedule's
LAST_RATE = 0.1  # of the highest, at the end
CLIP = 1.0
EVALUATIONS = 20
Placing = Literal["around", "before"]
PLACINGS: tuple[Placing, ...] = ("around", "before")


@dataclass(frozen=True)
class Recipe:
    """A task.

    Attributes:
        name: As in a CSV and on the command line.
        title: As in a table.
        missing: What of its data a folder lacks, or None.
        data: Reads the samples, and how many classes or characters there are.
        network: Makes the network, from the number of classes.
        batch_size: Samples a step.
        steps: The length of the whole schedule.
        by_loss: Whether the validation loss counts, else the accuracy.
        flips: Whether images are mirrored at random.
        mark: A published score, and where.
        rates: That a search begins with, where it is another than `START`'s.
    """

    name: str
    title: str
    missing: Callable[[Path], str | None]
    data: Callable[[Path], tuple[Samples, int]]
    network: Callable[[int], nn.Module]
    batch_size: int
    steps: int
    by_loss: bool = False
    flips: bool = False
    mark: tuple[float, str] | None = None
    rates: Mapping[str, float] = field(default_factory=dict)

    def problem(self, classes: int) -> Problem:
        """The network and its loss."""
        return Problem(lambda seed: build(lambda: self.network(classes), seed))


def _cifar(folder: Path) -> tuple[Samples, int]:
    return cifar(folder, 12_000, 2_000), 10


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            "nanogpt",
            "nanoGPT's CPU configuration, tiny shakespeare",
            find_shakespeare,
            lambda folder: shakespeare(folder, 64, 240),
            lambda characters: NanoGPT(characters, 64, 128, 4, 4),
            12,
            2000,
            by_loss=True,
            mark=(1.88, "nanoGPT's README, 2,000 steps of AdamW"),
        ),
        Recipe(
            "vit",
            "ViT, CIFAR-10",
            find_cifar,
            _cifar,
            lambda k: ViT(32, 4, 96, 4, 4, k),
            64,
            1120,
            flips=True,
            rates={
                **dict.fromkeys(("adamw", "soap", "coordinates-adamw", "cholesky-adamw", "outputs-adamw"), 0.001),
                **dict.fromkeys(("muon", "coordinates-muon"), 0.004),
            },
        ),
        Recipe(
            "resnet-cifar",
            "residual network, CIFAR-10",
            find_cifar,
            _cifar,
            lambda k: cifar_resnet(16, k),
            64,
            940,
            flips=True,
            rates={"coordinates-nag": 1.0},
        ),
    )
}


@dataclass(frozen=True)
class Setting:
    """An optimizer with everything that is chosen; None stands for what it has not.

    Attributes:
        optimizer: A name of `START`.
        lr: The highest rate of the schedule.
        aux_lr: That of the AdamW beside Muon.
        weight_decay: The decay of matrices and convolutions.
        damping: The damping of the emended coordinates; the next fields are settings of these coordinates too.
        exponent: The root's exponent.
        placing: "around" the optimizer, as the package does; or "before" it only, so that it gets ``g S`` and its
            answer is applied as it is.
        refresh_every: Steps.
        memory: The factor of older rows.
        block: The most inputs that are taken together.
    """

    optimizer: str
    lr: float
    aux_lr: float | None = None
    weight_decay: float = 0.1
    damping: float | None = None
    exponent: float | None = None
    placing: Placing | None = None
    refresh_every: int | None = None
    memory: float | None = None
    block: int | None = None

    @property
    def kind(self) -> Kind:
        """What is searched, timed and shown apart."""
        return self.optimizer, self.refresh_every, self.block


Kind = tuple[str, int | None, int | None]  # optimizer, steps from refresh to refresh, the most inputs taken together


def _coordinates(name: str, lr: float, exponent: float, **changes: Any) -> Setting:
    """The package's defaults, which a test holds them to."""
    defaults = Setting(name, lr, None, 0.1, 0.03, exponent, "around", 10, 0.95, 256)
    return dataclasses.replace(defaults, **changes)


START: dict[str, Setting] = {
    "nag": Setting("nag", 0.1, weight_decay=1e-3),
    "adamw": Setting("adamw", 0.004),
    "muon": Setting("muon", 0.008, 0.002),
    "soap": Setting("soap", 0.004),
    "coordinates-nag": _coordinates("coordinates-nag", 0.1, 0.5, weight_decay=1e-3),
    "coordinates-adamw": _coordinates("coordinates-adamw", 0.004, 0.5),
    "cholesky-adamw": _coordinates("cholesky-adamw", 0.004, 0.5),
    "outputs-adamw": _coordinates("outputs-adamw", 0.004, 0.5),
    "coordinates-muon": _coordinates("coordinates-muon", 0.008, 0.25, aux_lr=0.002, refresh_every=25, block=128),
}
LABELS = {
    "nag": "NAG",
    "adamw": "AdamW",
    "muon": "Muon",
    "soap": "SOAP",
    "coordinates-nag": "NAG in coordinates",
    "coordinates-adamw": "AdamW in coordinates",
    "cholesky-adamw": "AdamW in Cholesky's coordinates",
    "outputs-adamw": "AdamW in Cholesky's coordinates, outputs too",
    "coordinates-muon": "Muon in coordinates",
}
# What is tried after the first setting, one knob after the other, as factors of what was best so far: seven trials for
# each, the first setting is the eighth. The first four turn the rate, and the second knob where there is one.
Knob = tuple[Mapping[str, float], ...]


def _knob(name: str, *factors: float) -> Knob:
    return tuple({name: factor} for factor in factors)


_RATE = _knob("lr", 0.5, 2.0)
_RATE_FURTHER = _knob("lr", 0.5, 2.0, 0.25, 4.0)
_BETWEEN = _knob("lr", 0.7)
_DECAY = _knob("weight_decay", 0.2, 3.0)
_AUX = _knob("aux_lr", 0.5, 2.0)
_DAMPING = _knob("damping", 10 / 3, 10.0)
_SQUARE_ROOT: Knob = ({"exponent": 2.0, "damping": 10.0},)  # from a fourth root; with its small damping it is worse
KNOBS: dict[str, tuple[Knob, ...]] = {
    "nag": (_RATE_FURTHER, _DECAY, _BETWEEN),
    "adamw": (_RATE_FURTHER, _DECAY, _BETWEEN),
    "muon": (_RATE, _AUX, _DECAY, _BETWEEN),
    "soap": (_RATE_FURTHER, _DECAY, _BETWEEN),
    "coordinates-nag": (_RATE, _DAMPING, _DECAY, _BETWEEN),
    "coordinates-adamw": (_RATE, _DAMPING, _DECAY, _BETWEEN),
    "cholesky-adamw": (_RATE, _DAMPING, _DECAY, _BETWEEN),
    "outputs-adamw": (_RATE, _DAMPING, _DECAY, _BETWEEN),
    "coordinates-muon": (_RATE, _AUX, _SQUARE_ROOT, _DECAY),
}


def start(recipe: Recipe, name: str, refresh_every: int | None = None, block: int | None = None) -> Setting:
    """Where an optimizer's search begins on a task; refreshes and blocks other than the package's are for those in
    coordinates alone."""
    own = dataclasses.replace(START[name], lr=recipe.rates.get(name, START[name].lr))
    if own.placing is None:
        return own
    return dataclasses.replace(own, refresh_every=refresh_every or own.refresh_every, block=block or own.block)


def trials(first: Setting, best: Callable[[list[Setting]], Setting], most: int) -> Iterator[Setting]:
    """The settings of a search, the ``first`` included; ``best`` is asked for the best of those given so far."""
    given = [first]
    yield first
    for knob in KNOBS[first.optimizer]:
        centre = best(given)
        for factors in knob:
            if len(given) == most:
                return
            changed: dict[str, Any] = {
                name: float(f"{getattr(centre, name) * factor:.3g}") for name, factor in factors.items()
            }
            given.append(dataclasses.replace(centre, **changed))
            yield given[-1]


def optimizers(model: nn.Module, setting: Setting) -> list[Any]:
    """The optimizer, or the two, of a setting: what has ``step``, ``zero_grad`` and ``param_groups``."""
    name = inside(setting.optimizer)
    where = coordinates(setting)
    if name == "muon":
        aux = {"lr": setting.aux_lr, "betas": (0.9, 0.99), "weight_decay": 0.0}
        options: dict[str, Any] = {"weight_decay": setting.weight_decay, "adjust_lr_fn": "match_rms_adamw"}
        if setting.placing != "around":  # infinite damping is the plain Muon, bit for bit
            inner: Any = Muon(model, setting.lr, aux=aux, **options, damping=math.inf)
            return [inner] if setting.placing is None else [Before(inner, model, where)]
        return [Muon(model, setting.lr, aux=aux, **options, **where)]
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": setting.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    inner = _INNER[name](groups, setting.lr)
    if setting.placing is None:
        return [inner]
    return [Emended(inner, model, **where) if setting.placing == "around" else Before(inner, model, where)]


def _soap(groups: Any, lr: float) -> torch.optim.Optimizer:
    from pytorch_optimizer import SOAP

    return SOAP(groups, lr=lr)


_INNER: dict[str, Callable[[Any, float], torch.optim.Optimizer]] = {
    "nag": lambda groups, lr: torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True),
    "adamw": lambda groups, lr: torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.99)),
    "soap": _soap,
}


def coordinates(setting: Setting) -> dict[str, Any]:
    """The keywords of `Emended`."""
    names = ("damping", "exponent", "refresh_every", "memory", "block")
    outputs = output_exponent_of(setting.optimizer)
    beside = {"output_exponent": outputs} if outputs else {}
    return {name: getattr(setting, name) for name in names} | {"root": root_of(setting.optimizer)} | beside


class Before:
    """``g S`` to an optimizer whose answer is applied as it is: the placing that is compared with the package's.

    `Emended` of an optimizer whose rate is 0 keeps the roots.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, model: nn.Module, where: dict[str, Any]) -> None:
        self.optimizer = optimizer
        hidden = {id(p) for group in optimizer.param_groups if group.get("use_muon", True) for p in group["params"]}
        self.keeper = Emended(
            torch.optim.SGD(model.parameters(), lr=0.0),
            model,
            scale="gradient",
            filter_fn=lambda module, _: id(getattr(module, "weight", None)) in hidden,
            **where | {"root": "symmetric"},  # without a second product no other turns g downhill
        )
        self.param_groups = optimizer.param_groups

    def zero_grad(self) -> None:
        """Drop the gradients of both optimizers."""
        self.keeper.zero_grad()

    @torch.no_grad()
    def step(self) -> None:
        """Step both optimizers, the gradients multiplied by their roots between the two."""
        self.keeper.step()
        for unit in self.keeper.units:
            weight, bias = unit.weight, unit.bias
            if weight.grad is not None:
                root = self.keeper.state[weight]["root"].view(unit.slot.shape)
                multiplied = unit.multiply(root, weight.grad, None if bias is None else bias.grad)
                weight.grad = multiplied[0]
                if bias is not None:
                    bias.grad = multiplied[1]
        self.optimizer.step()


def rate(step: int, steps: int) -> float:
    """What the rate is multiplied by in a step, counted from 0."""
    warm = max(min(WARM_UP, round(MOST_WARM_UP * steps)), 1)
    if step < warm:
        return (step + 1) / warm
    share = (step - warm) / max(steps - warm, 1)
    return LAST_RATE + (1 - LAST_RATE) * (1 + math.cos(math.pi * share)) / 2


def prepare(model: nn.Module, setting: Setting, loss: Loss, recipe: Recipe, steps: int, seed: int) -> Step:
    """The training step of a whole schedule; mirrors images, follows the rate, clips."""
    some = optimizers(model, setting)
    groups: list[tuple[dict[str, Any], float]] = [(g, g["lr"]) for one in some for g in one.param_groups]
    parameters = list(model.parameters())
    generator = torch.Generator().manual_seed(seed)
    taken = 0

    def step(x: Tensor, y: Tensor) -> Tensor:
        nonlocal taken
        for group, highest in groups:
            group["lr"] = highest * rate(taken, steps)
        taken += 1
        for one in some:
            one.zero_grad()
        value = loss(model(mirrored(x, generator) if recipe.flips else x), y)
        value.backward()
        nn.utils.clip_grad_norm_(parameters, CLIP)
        for one in some:
            one.step()
        return value

    return step


def mirrored(images: Tensor, generator: torch.Generator) -> Tensor:
    """``[N, C, H, W]``, each left to right with a chance of one half."""
    chosen = torch.rand(len(images), generator=generator).to(images.device) < 0.5
    return torch.where(chosen[:, None, None, None], images.flip(-1), images)


def missing(names: Iterable[str], folder: Path | None) -> dict[str, str]:
    """Why tasks are skipped, by name."""
    found = {}
    for name in names:
        reason = "no --data folder" if folder is None else RECIPES[name].missing(folder)
        if reason is not None:
            found[name] = reason
    return found
