"""The paper's claims beside fewer steps, as one sweep: smoother convergence, less dependence on hyper-parameters, less
need for momentum.

Scikit-learn's digits, the demo's network, so many steps: twelve learning rates, each twice the one before, three batch
sizes, with emended layers three dampings too. After every step the loss over all training samples is taken.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import pstdev

import torch
from torch import nn

from consequentialism.experiments import settings
from consequentialism.experiments.data import Samples, load
from consequentialism.experiments.settings import PREFIX, Schedule, Trial
from consequentialism.experiments.train import Problem, batches, classification, step_count

from ..environment import Environment, environment
from .methods import DAMPINGS, METHODS

STEPS = 60
BATCH_SIZES = (32, 128, 512)
SHOWN_BATCH = 128  # of the curves that are kept
RATES = {"sgd": 8.0, "nag": 2.0, "adam": 0.128, "emended-sgd": 16.0, "emended-nag": 4.0, "emended-adam": 0.128}
OCTAVES = 12
SEED = 300
SMOOTH_SEEDS = 5
LEARNT = 1e-3  # below this a training loss is as good as any other


@dataclass(frozen=True)
class SweepRow(Environment):
    """One run of the sweep."""

    optimizer: str
    lr: float
    damping: float | None
    batch_size: int
    seed: int
    steps: int
    loss: float  # over all training samples, at the end; infinity where it diverged
    rises: float  # share of the steps after which that loss was higher than before
    jump: float  # `unevenness`


@dataclass(frozen=True)
class SmoothRow:
    """The loss over all training samples after one step, of an optimizer with the demo's tuned settings."""

    optimizer: str
    lr: float
    damping: float | None
    seed: int
    step: int
    loss: float


Point = tuple[Trial, int]  # settings and batch size


def points() -> list[Point]:
    """Every run of the sweep."""
    found = []
    for name, highest in RATES.items():
        for batch_size in BATCH_SIZES:
            for damping in DAMPINGS if name.startswith(PREFIX) else (None,):
                for octave in range(OCTAVES):
                    found.append((Trial(name, float(f"{highest * 2.0**-octave:.4g}"), damping), batch_size))
    return found


def losses(trial: Trial, batch_size: int, seed: int = SEED) -> list[float]:
    """The loss over all training samples, before the first step and after every one; ends early where it diverges."""
    data = load("digits", Path())
    problem = classification("mlp", data.sample_shape)
    model = problem.build(seed)
    step = METHODS[trial.optimizer].prepare(model, trial, problem.loss)
    a_pass = step_count(len(data.train_x), Schedule(1, batch_size, 1), 1)
    schedule = Schedule(math.ceil(STEPS / a_pass), batch_size, 1)
    found = [_loss(model, problem, data)]
    for rows in itertools.islice(batches(len(data.train_x), schedule, seed), STEPS):
        step(data.train_x[rows], data.train_y[rows])
        found.append(_loss(model, problem, data))
        if not math.isfinite(found[-1]):
            break
    return found


@torch.no_grad()
def _loss(model: nn.Module, problem: Problem, data: Samples) -> float:
    return problem.loss(model(data.train_x), data.train_y).item()


def sweep_row(trial: Trial, batch_size: int) -> SweepRow:
    """One run and what it showed."""
    found = losses(trial, batch_size)
    finished = len(found) == STEPS + 1 and math.isfinite(found[-1])
    changes = [after - before for before, after in itertools.pairwise(found)] if finished else []
    return SweepRow(
        **asdict(environment()),
        optimizer=trial.optimizer,
        lr=trial.lr,
        damping=trial.damping,
        batch_size=batch_size,
        seed=SEED,
        steps=len(found) - 1,
        loss=found[-1] if finished else math.inf,
        rises=sum(change > 0 for change in changes) / len(changes) if changes else 1.0,
        jump=unevenness(found) if finished else math.inf,
    )


def best(rows: list[SweepRow], optimizer: str, batch_size: int) -> SweepRow:
    """The run with the lowest final loss."""
    mine = [row for row in rows if row.optimizer == optimizer and row.batch_size == batch_size]
    return min(mine, key=lambda row: row.loss)


def best_loss(rows: list[SweepRow], optimizer: str, batch_size: int) -> float:
    """The loss of the best setting, at least `LEARNT`."""
    return max(best(rows, optimizer, batch_size).loss, LEARNT)


def within_twice(rows: list[SweepRow], optimizer: str, batch_size: int, of: Sequence[str]) -> float:
    """The share of an optimizer's settings at a batch size whose final loss is at most twice the best of ``of``."""
    mine = [row for row in rows if row.optimizer == optimizer and row.batch_size == batch_size]
    bound = 2 * min(best_loss(rows, other, batch_size) for other in of)
    return sum(row.loss <= bound for row in mine) / len(mine)


def unevenness(losses: Sequence[float]) -> float:
    """Standard deviation of the change of the loss's logarithm (base 10) from one step to the next; losses below
    `LEARNT` count as that."""
    logs = [math.log10(max(loss, LEARNT)) for loss in losses]
    return pstdev(after - before for before, after in itertools.pairwise(logs))


def smooth_rows() -> list[SmoothRow]:
    """Every optimizer step by step, tuned as in the demo: for fewest steps to its target, at the batch size shown."""
    found = []
    for optimizer in RATES:
        trial = settings.recorded("digits", "mlp", optimizer)
        for seed in range(SEED, SEED + SMOOTH_SEEDS):
            found += [
                SmoothRow(optimizer, trial.lr, trial.damping, seed, step, loss)
                for step, loss in enumerate(losses(trial, SHOWN_BATCH, seed))
            ]
    return found
