"""The default damping of emended layers beside the two of the grid: at the grid's rates, on its split, with its seed.

Every search is four lines of ``defaults.csv``, written when it ends. One that is already in the file is not repeated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

import consequentialism as cw
from consequentialism.experiments.settings import PREFIX, Trial

from .. import table
from ..environment import environment
from ..markdown import markdown, where
from .methods import EMENDED_RATES, METHODS
from .rows import GridRow
from .stages import Plan
from .tasks import TASKS
from .tune import GRID_SEED, rank, search

FILE = "defaults.csv"
DAMPING = cw.Linear(1, 1).damping


def measure(plan: Plan) -> None:
    """The searches of the emended optimizers that are asked for, one after the other."""
    path = plan.out / FILE
    names = [name for name in plan.optimizers if name.startswith(PREFIX)]
    for task, name in ((task, name) for task in plan.tasks for name in names):
        if any((row.task, row.optimizer) == (task, name) for row in _rows(path)):
            continue
        trials = [Trial(name, lr, DAMPING) for lr in EMENDED_RATES[name.removeprefix(PREFIX)]]
        _, outcomes = search(plan.task(task), METHODS[name], plan.data(plan.task(task)), trials)
        here = asdict(environment(torch.device(plan.device).type))
        for found in outcomes:
            row = GridRow(
                **here,
                task=task,
                optimizer=name,
                lr=found.run.trial.lr,
                damping=DAMPING,
                seed=GRID_SEED,
                steps=found.steps,
                end=found.end,
                score=plan.task(task).score(found.run, -1),
                trained=len(found.losses),
            )
            table.append(row, GridRow, path)


def _rows(path: Path) -> list[GridRow]:
    return table.read(path, GridRow) if path.exists() else []


def best(rows: Sequence[GridRow], task: str, name: str) -> GridRow | None:
    """The row that wins a search, None where there are none."""
    own = [row for row in rows if (row.task, row.optimizer) == (task, name)]
    return min(own, key=lambda row: rank(TASKS[task], row.steps, row.score, row.end), default=None)


def text(folder: Path) -> list[str]:
    """What the report says of it; nothing where it was not measured."""
    own, grid = _rows(folder / FILE), _rows(folder / "grid.csv")
    tasks = list(dict.fromkeys(row.task for row in own))
    lines, no_more, missed, pairs = [], 0, 0, 0
    for name in dict.fromkeys(row.optimizer for row in own):
        cells = []
        for task in tasks:
            mine, other = best(own, task, name), best(grid, task, name)
            if mine is None or other is None:
                cells.append("")
                continue
            cells.append(f"{_steps(mine)} ({_steps(other)}, {other.damping:g})")
            pairs += 1
            no_more += mine.steps is not None and mine.steps <= (other.steps or math.inf)
            missed += mine.steps is None and other.steps is not None
        lines.append((METHODS[name].label, *cells))
    if not pairs:
        return []
    return [
        "### The default damping",
        f'Measured by `make bench-train ARGS="--stage defaults"`; {where(own)}.',
        f"The table shows the steps to the target in the grid search with the default damping of {DAMPING:g}, at the "
        "best of the grid's rates; in brackets the steps of the grid's winner and its damping. In "
        f"{no_more} of {pairs} cases the default takes no more steps, and in {missed} it misses a target that the "
        "grid's winner reaches.",
        markdown((f"damping {DAMPING:g}", *(TASKS[task].title for task in tasks)), lines),
    ]


def _steps(row: GridRow) -> str:
    return "not reached" if row.steps is None else str(row.steps)
