"""What a training step costs with each optimizer: a transformer's block and a head, by rows and width.

Emended and SOAP have a dear step, which refreshes, once in ten steps, and `Muon` in coordinates once in 25. Here every
fourth step is dear, and ordinary and dear steps are timed separately. The cost of a step is their average over the
optimizer's own period. The optimizers take turns of four steps; the first of them only warms the caches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor, nn

from consequentialism.experiments.methods import Step, ordinary_step
from consequentialism.experiments.models import build
from consequentialism.experiments.train import clock_for, timed_step
from consequentialism.optim import Emended, Muon

from .. import table
from ..environment import Environment, environment
from .models import Block

SHAPES = ((768, 128), (4096, 256), (8192, 512))
FILE = "step_cost.csv"
MEASURED = 4  # steps from one dear step to the next in this measurement; `PERIODS` has the optimizers' own
TIMED = 3  # steps of a turn: two ordinary ones and, last, a dear one
CONTEXT, CLASSES = 64, 64
RATE = 1e-5
LABELS = {
    "adamw": "AdamW",
    "muon": "Muon",
    "soap": "SOAP",
    "coordinates-adamw": "AdamW in coordinates",
    "coordinates-muon": "Muon in coordinates",
}
PERIODS = {"soap": 10, "coordinates-adamw": 10, "coordinates-muon": 25}  # their defaults; a test compares
INSIDE = {"soap": "adamw", "coordinates-adamw": "adamw", "coordinates-muon": "muon"}  # the baseline of each ratio


@dataclass(frozen=True)
class StepCostRow(Environment):
    """One optimizer at one size."""

    optimizer: str
    rows: int
    width: int
    ms: float  # a step, averaged over the optimizer's period; median over rounds
    ordinary_ms: float
    dear_ms: float
    ratio: float  # of a step to the baseline's in `INSIDE`; median over rounds
    ordinary_ratio: float  # of an ordinary step to the baseline's
    rounds: int


def _optimizers() -> dict[str, Callable[[nn.Module], Any]]:
    def soap(model: nn.Module) -> torch.optim.Optimizer:
        from pytorch_optimizer import SOAP

        return SOAP(model.parameters(), lr=RATE, precondition_frequency=MEASURED)

    def adamw(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=RATE)

    aux = {"lr": RATE}
    return {
        "adamw": adamw,
        "muon": lambda model: Muon(model, RATE, aux=aux, damping=float("inf")),  # the plain one, bit for bit
        "soap": soap,
        "coordinates-adamw": lambda model: Emended(adamw(model), model, refresh_every=MEASURED),
        "coordinates-muon": lambda model: Muon(model, RATE, aux=aux, refresh_every=MEASURED),
    }


def _network(width: int) -> nn.Module:
    heads = max(width // 64, 1)
    return build(lambda: nn.Sequential(Block(width, heads), nn.Linear(width, CLASSES)), 0)


def _loss(scores: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(scores.flatten(0, 1), y.flatten())


def costs(rows: int, width: int, rounds: int, device: str) -> list[StepCostRow]:
    """The costs of every optimizer's step at one size."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows // CONTEXT, CONTEXT, width, generator=generator).to(device)
    y = torch.randint(CLASSES, (rows // CONTEXT, CONTEXT), generator=generator).to(device)
    steps: dict[str, Step] = {}
    for name, make in _optimizers().items():
        model = _network(width).to(device)
        steps[name] = ordinary_step(model, make(model), _loss)
    order = list(steps)
    clock = clock_for(x.device)
    ordinary: dict[str, list[float]] = {name: [] for name in order}
    dear: dict[str, list[float]] = {name: [] for name in order}
    for name in order:  # the first of all is a dear one, and so is then the last of every turn
        timed_step(steps[name], x, y, clock)
    for turn in range(rounds + 1):
        for name in order:
            ms = [1e3 * timed_step(steps[name], x, y, clock)[0] for _ in range(MEASURED)][-TIMED:]
            if turn:  # the first has the early refreshes
                ordinary[name].append(mean(ms[:-1]))
                dear[name].append(ms[-1])
        order = order[1:] + order[:1]
    whole = {
        name: [
            one + (other - one) / PERIODS.get(name, TIMED)
            for one, other in zip(ordinary[name], dear[name], strict=True)
        ]
        for name in steps
    }

    def ratio(name: str, own: list[float]) -> float:
        return median(mine / plain for mine, plain in zip(own, whole[INSIDE.get(name, name)], strict=True))

    here = asdict(environment(torch.device(device).type))
    return [
        StepCostRow(
            **here,
            optimizer=name,
            rows=rows,
            width=width,
            ms=median(own),
            ordinary_ms=median(ordinary[name]),
            dear_ms=median(dear[name]),
            ratio=ratio(name, own),
            ordinary_ratio=ratio(name, ordinary[name]),
            rounds=rounds,
        )
        for name, own in whole.items()
    ]


def measure(out: Path, rounds: int, device: str, sizes: tuple[tuple[int, int], ...] = SHAPES) -> None:
    """Add to ``step_cost.csv`` the sizes that it has not, one after the other."""
    path = out / FILE
    found = table.read(path, StepCostRow) if path.exists() else []
    for rows, width in sizes:
        if not any((row.rows, row.width) == (rows, width) for row in found):
            found += costs(rows, width, rounds, device)
            table.write(found, StepCostRow, path)
