"""The CSV files: one dataclass a file, one line a row."""

from __future__ import annotations

from dataclasses import dataclass

from ..environment import Environment
from .claims import SmoothRow, SweepRow


@dataclass(frozen=True)
class GridRow(Environment):
    """One trial of the grid search, on the validation split."""

    task: str
    optimizer: str
    lr: float
    damping: float | None
    seed: int
    steps: int | None  # to the target; None: not reached
    end: str  # "reached", "beaten" by an earlier trial, "budget" or "diverged"
    score: float  # accuracy or loss at the last evaluation
    trained: int  # steps that were taken


@dataclass(frozen=True)
class RunRow(Environment):
    """One run with the best trial, on the test split."""

    task: str
    optimizer: str
    lr: float
    damping: float | None
    seed: int
    target: float
    steps: int | None  # to the target; None: not reached
    score: float  # accuracy or loss on the test samples, median of the last five evaluations
    train_loss: float  # on training samples at the last evaluation
    jump: float  # standard deviation of the change of the batch's loss from one step to the next


@dataclass(frozen=True)
class CurveRow:
    """One evaluation of such runs: medians over the seeds."""

    task: str
    optimizer: str
    step: int
    train_loss: float
    score: float


@dataclass(frozen=True)
class TimeRow(Environment):
    """What a step costs: all optimizers of a task in turns, blocks of ten steps."""

    task: str
    optimizer: str
    lr: float
    damping: float | None
    ms: float  # a step, median over blocks
    start_ms: float | None  # what the first block of a run takes beyond ten such steps; None: not measured
    p20_ms: float
    p80_ms: float
    ratio: float  # to plain SGD's, median over rounds
    blocks: int


@dataclass(frozen=True)
class SkipRow:
    """Who did not take part, and why."""

    task: str
    optimizer: str
    reason: str


FILES: dict[str, type] = {
    "grid.csv": GridRow,
    "runs.csv": RunRow,
    "curves.csv": CurveRow,
    "times.csv": TimeRow,
    "skipped.csv": SkipRow,
    "sweep.csv": SweepRow,
    "smooth.csv": SmoothRow,
}
