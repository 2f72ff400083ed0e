"""From runs to figures: the target accuracy, and what each optimizer needed to reach it.

The target is the best plain optimizer's own final level, less one standard error. Level: of the plain optimizers that
ran, the highest final test accuracy ``p``, where final is the median of a run's last five evaluations and, with several
seeds, the median over seeds. Standard error: ``sqrt(p (1 - p) / M)`` with ``M`` test samples, the customary
one-standard-error rule: this test set cannot tell such an accuracy from ``p``, and the first evaluation at or above
``p`` itself is largely luck. No number is picked by hand, and the target moves with the data, model and epochs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from ..experiments.settings import Trial, is_emended
from ..experiments.train import Run

TARGET_RULE = (
    "the highest final test accuracy of a plain optimizer (median of its last five evaluations), "
    "less one standard error of the test set"
)


@dataclass(frozen=True)
class Row:
    """An optimizer's medians over its seeds; infinity stands for a target that was not reached.

    Attributes:
        trial: The optimizer and its hyper-parameters.
        train_loss: Final mean cross-entropy over training samples.
        test_accuracy: Final share of test samples classified correctly.
        steps: Steps to the target accuracy.
        seconds: Seconds of training to the target accuracy.
        ms_per_step: Milliseconds a step.
    """

    trial: Trial
    train_loss: float
    test_accuracy: float
    steps: float
    seconds: float
    ms_per_step: float


def plain_target(groups: Iterable[Sequence[Run]], test_samples: int) -> float | None:
    """The target by the rule above; each group holds one trial's runs, a seed each. None without plain runs."""
    finals = [
        median(run.final_test_accuracy for run in runs) for runs in groups if not is_emended(runs[0].trial.optimizer)
    ]
    if not finals:
        return None
    best = max(finals)
    return best - math.sqrt(best * (1 - best) / test_samples)


def summarise(runs: Sequence[Run], target: float) -> Row:
    """One trial's runs, a seed each, as medians."""
    reached = [(run, run.reached(target)) for run in runs]
    return Row(
        runs[0].trial,
        median(run.final_train_loss for run in runs),
        median(run.final_test_accuracy for run in runs),
        median(math.inf if at is None else run.steps[at] for run, at in reached),
        median(math.inf if at is None else run.seconds[at] for run, at in reached),
        median(run.ms_per_step for run in runs),
    )


def verdict(rows: Sequence[Row]) -> str | None:
    """One sentence: the emended optimizer against the best plain ones, whatever it says; None without both."""
    plain = [row for row in rows if not is_emended(row.trial.optimizer)]
    emended = [row for row in rows if is_emended(row.trial.optimizer)]
    if not plain or not emended:
        return None
    shown = next((row for row in emended if row.trial.optimizer == "emended-sgd"), emended[0])
    by_steps, by_seconds = min(plain, key=lambda row: row.steps), min(plain, key=lambda row: row.seconds)
    if not math.isfinite(shown.steps):
        return f"{shown.trial.optimizer} did not reach the target."
    if not math.isfinite(by_steps.steps):
        return f"{shown.trial.optimizer} reached the target after {shown.steps:g} steps; no plain optimizer did."
    steps = shown.steps / max(by_steps.steps, 1)
    seconds = shown.seconds / max(by_seconds.seconds, 1e-9)
    return (
        f"{shown.trial.optimizer} reached it after {shown.steps:g} steps, {by_steps.trial.optimizer} (fewest of the "
        f"plain ones) after {by_steps.steps:g}: {steps:.0%} of the steps; and in {shown.seconds:.3f} s against "
        f"{by_seconds.seconds:.3f} s ({by_seconds.trial.optimizer}): {seconds:.0%} of the time."
    )
