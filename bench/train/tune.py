"""From a task and an optimizer to the steps that it takes: the grid search, then the runs that count.

The grid search trains every trial on the same four fifths of the training samples with the same seed, and asks for the
target on the last fifth. The winner is the trial that reaches it in the fewest steps; where none does, the one with the
best score at the end. A trial that has taken more steps than the best so far has lost and stops; so does one whose loss
is not finite, which wins against nobody. The runs that count take other seeds, and ask for the target on the test
samples.

The target is reached at the first of two evaluations in a row that are as good as it: one alone is too often luck.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median, pstdev

import torch

from consequentialism.experiments.data import Samples
from consequentialism.experiments.settings import Trial
from consequentialism.experiments.train import TAIL, Run, training

from .methods import Method
from .tasks import VALIDATION, Task

GRID_SEED = 100
PROBE = 256  # training samples of which the loss is reported


@dataclass(frozen=True)
class Outcome:
    """One run and how it ended.

    Attributes:
        run: The run's evaluations.
        losses: The batch's loss before every step.
        steps: The steps to the target, None where it was not reached.
        end: "reached", "beaten", "budget" or "diverged".
    """

    run: Run
    losses: list[float]
    steps: int | None
    end: str


def search(task: Task, method: Method, data: Samples, trials: Sequence[Trial]) -> tuple[Trial, list[Outcome]]:
    """The best trial, and what each of them did; those in the middle of the grid are tried first."""
    split = data.validation_split(VALIDATION)
    middle = (len(trials) - 1) / 2
    order = sorted(range(len(trials)), key=lambda index: abs(index - middle))
    best: Outcome | None = None
    outcomes = []
    for index in order:
        limit = None if best is None else best.steps
        outcome = train(task, method, split, trials[index], GRID_SEED, limit=limit, stop=True)
        outcomes.append(outcome)
        if best is None or rank(task, *_result(task, outcome)) < rank(task, *_result(task, best)):
            best = outcome
    assert best is not None
    return best.run.trial, outcomes


def rank(task: Task, steps: int | None, score: float, end: str) -> tuple[float, float]:
    """What a grid's winner has the least of: steps to the target or, where it was missed, how bad the score is.

    A trial that diverged is worse than any other, however good it once was.
    """
    if steps is not None:
        return steps, 0.0
    if end == "diverged":
        return math.inf, math.inf
    return math.inf, score if task.by_loss else -score


def _result(task: Task, outcome: Outcome) -> tuple[int | None, float, str]:
    return outcome.steps, task.score(outcome.run, -1), outcome.end


def train(
    task: Task, method: Method, data: Samples, trial: Trial, seed: int, limit: int | None = None, stop: bool = False
) -> Outcome:
    """One run.

    Args:
        task: What is trained.
        method: The optimizer to train with.
        data: The samples; the target is asked for on the test samples.
        trial: With which settings.
        seed: The seed of weights and batches.
        limit: Steps after which a run that has not reached the target has lost.
        stop: Whether to stop where the target is reached.
    """
    run = Run(trial, seed)
    losses: list[float] = []
    end = "budget"
    schedule = task.schedule(len(data.train_x))
    progress = training(run, task.problem(data), data, schedule, method.prepare, probe=PROBE)
    while len(losses) < task.steps:
        try:
            losses.append(next(progress))
        except (torch.linalg.LinAlgError, FloatingPointError):  # some peers' answer to weights that are not finite
            losses.append(math.inf)
        if not math.isfinite(losses[-1]):
            end = "diverged"
            break
        evaluated = run.steps[-1] == len(losses)
        if stop and evaluated and first_reached(task, run) is not None:
            end = "reached"
            break
        # The target counts from the first of two evaluations, so that a trial may go on for one more.
        if limit is not None and evaluated and run.steps[-2] >= limit and first_reached(task, run) is None:
            end = "beaten"
            break
    steps = first_reached(task, run) if end != "diverged" else None
    return Outcome(run, losses, steps, "reached" if steps is not None and end == "budget" else end)


def first_reached(task: Task, run: Run) -> int | None:
    """Steps at the first of two evaluations in a row that are as good as the target, or None."""
    good = [task.reached(task.score(run, index)) for index in range(len(run.steps))]
    return next((run.steps[i] for i in range(len(good) - 1) if good[i] and good[i + 1]), None)


def final_score(task: Task, run: Run) -> float:
    """Median over the last five evaluations."""
    count = len(run.steps)
    return median(task.score(run, index) for index in range(max(count - TAIL, 0), count))


def jump(losses: Sequence[float]) -> float:
    """Standard deviation of the change of the loss from one step to the next; infinity where it diverged."""
    changes = [after - before for before, after in itertools.pairwise(losses)]
    return pstdev(changes) if changes and all(map(math.isfinite, changes)) else math.inf
