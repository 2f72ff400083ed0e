"""From the CSV files to figures: one table a task, for the screen and for the report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from consequentialism.errors import need

from .. import table
from .methods import METHODS
from .rows import GridRow, RunRow, TimeRow
from .tasks import TASKS, Task


@dataclass(frozen=True)
class Line:
    """One optimizer at one task: medians over seeds, infinity for a target that most seeds miss.

    Attributes:
        task: The task's name.
        optimizer: The optimizer's name.
        lr: Learning rate of the best trial.
        damping: The damping of the best trial.
        target: The accuracy or loss to reach.
        steps: The steps to the target, the median of the seeds.
        fewest: The fewest steps of any seed.
        most: The most steps of any seed.
        score: The test score at the end.
        train_loss: The training loss at the end.
        ms: Milliseconds a step.
        ratio: A step's cost as a multiple of plain SGD's.
        grid_steps: Steps that the grid search took.
    """

    task: str
    optimizer: str
    lr: float
    damping: float | None
    target: float
    steps: float
    fewest: float
    most: float
    score: float
    train_loss: float
    ms: float
    start_ms: float
    ratio: float
    grid_steps: int

    @property
    def seconds(self) -> float:
        """Seconds to the target: steps times the cost of one, and what the first ones take beyond."""
        return (self.steps * self.ms + self.start_ms) / 1e3

    @property
    def grid_seconds(self) -> float:
        """Seconds to the target in the grid search."""
        return self.grid_steps * self.ms / 1e3


def lines(folder: Path) -> dict[str, list[Line]]:
    """The lines of every task that has runs, in the order of the optimizers.

    Raises:
        UserError: A file is missing or has another schema.
    """
    runs = table.read(folder / "runs.csv", RunRow)
    times = {(row.task, row.optimizer): row for row in table.read(folder / "times.csv", TimeRow)}
    grid_steps: dict[tuple[str, str], int] = {}
    for trial in table.read(folder / "grid.csv", GridRow):
        key = (trial.task, trial.optimizer)
        grid_steps[key] = grid_steps.get(key, 0) + trial.trained
    groups: dict[tuple[str, str], list[RunRow]] = {}
    for row in runs:
        groups.setdefault((row.task, row.optimizer), []).append(row)
    found: dict[str, list[Line]] = {}
    for key, group in groups.items():
        if key in times:
            found.setdefault(key[0], []).append(_line(group, times[key], grid_steps.get(key, 0)))
    return found


def _line(group: Sequence[RunRow], time: TimeRow, grid_steps: int) -> Line:
    steps = [math.inf if row.steps is None else row.steps for row in group]
    first = group[0]
    return Line(
        task=first.task,
        optimizer=first.optimizer,
        lr=first.lr,
        damping=first.damping,
        target=first.target,
        steps=median(steps),
        fewest=min(steps),
        most=max(steps),
        score=median(row.score for row in group),
        train_loss=median(row.train_loss for row in group),
        ms=time.ms,
        start_ms=time.start_ms or 0.0,
        ratio=time.ratio,
        grid_steps=grid_steps,
    )


HEADINGS = (
    "optimizer",
    "lr",
    "damping",
    "steps",
    "of the seeds",
    "seconds",
    "ms a step",
    "to SGD's",
    "at the end",
    "training loss",
    "grid search, s",
)


def cells(line: Line, task: Task) -> tuple[str, ...]:
    """A line as text, one entry a heading."""
    score = f"{line.score:.3f}" if task.by_loss else f"{100 * line.score:.1f} %"
    reached = math.isfinite(line.steps)
    return (
        METHODS[line.optimizer].label,
        f"{line.lr:.3g}",
        "" if line.damping is None else f"{line.damping:g}",
        _steps(line.steps),
        f"{_steps(line.fewest)} to {_steps(line.most)}",
        f"{line.seconds:.2f}" if reached else "",
        f"{line.ms:.2f}",
        f"{line.ratio:.2f}",
        score,
        f"{line.train_loss:.2g}" if math.isfinite(line.train_loss) else "diverged",
        f"{line.grid_seconds:.1f}",
    )


def _steps(steps: float) -> str:
    return f"{steps:g}" if math.isfinite(steps) else "not reached"


def target(task: Task) -> str:
    """What is to be reached, as text."""
    return f"test loss {task.target:g}" if task.by_loss else f"{100 * task.target:g} % test accuracy"


def print_tables(folder: Path) -> None:
    """Every task's table on the screen."""
    console = need("rich.console").Console()
    for name, found in lines(folder).items():
        task = TASKS[name]
        shown = need("rich.table").Table(title=f"{task.title}: to {target(task)}")
        for heading in HEADINGS:
            shown.add_column(heading, justify="left" if heading == "optimizer" else "right")
        for line in found:
            shown.add_row(*cells(line, task))
        console.print(shown)
    print(f"CSV files: {folder}")
