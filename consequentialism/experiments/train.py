"""The training loop, one for every optimizer, model and data set: the demo's, and that of the training benchmarks."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from . import methods
from .data import CLASSES, PROBE, Samples
from .models import MODELS, build
from .settings import Schedule, Trial

TAIL = 5  # evaluations at the end whose median is a run's final value
PIECE = 2500  # samples that are evaluated at once, which bounds the memory


def class_loss(scores: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy of scores ``[..., classes]`` and labels ``[...]``."""
    return cross_entropy(scores.flatten(0, -2), y.flatten())


@dataclass(frozen=True)
class Problem:
    """What is trained, and for what.

    Attributes:
        build: A network on the CPU, whose initial weights depend on the seed alone.
        loss: Mean loss of a batch's scores and targets.
        classes: Whether targets are classes, so that there is an accuracy.
    """

    build: Callable[[int], nn.Module]
    loss: methods.Loss = class_loss
    classes: bool = True


def classification(model_name: str, sample_shape: tuple[int, ...]) -> Problem:
    """A network of `consequentialism.experiments.models.MODELS` that tells digits apart."""
    return Problem(lambda seed: build(lambda: MODELS[model_name](sample_shape, CLASSES), seed))


@dataclass
class Run:
    """What one training run showed; the lists have one entry an evaluation, the first before any step.

    Attributes:
        trial: The optimizer and its hyper-parameters.
        seed: The seed of the initial weights and of the order of the batches.
        steps: Steps taken.
        seconds: Time spent in training steps, evaluations left out.
        train_loss: Mean loss over the first training samples, at most 1,000 by default.
        test_loss: Mean loss over the test samples.
        test_accuracy: Share of test samples classified correctly, 0 to 1; NaN where targets are not classes.
        ms_per_step: Median time of a step, in milliseconds.
    """

    trial: Trial
    seed: int
    steps: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    train_loss: list[float] = field(default_factory=list)
    test_loss: list[float] = field(default_factory=list)
    test_accuracy: list[float] = field(default_factory=list)
    ms_per_step: float = 0.0

    @property
    def final_train_loss(self) -> float:
        """Median of the last five evaluations."""
        return median(self.train_loss[1:][-TAIL:])

    @property
    def final_test_accuracy(self) -> float:
        """Median of the last five evaluations."""
        return median(self.test_accuracy[1:][-TAIL:])

    def reached(self, target: float) -> int | None:
        """Index of the first evaluation with at least the accuracy ``target``, or None."""
        return next((i for i, accuracy in enumerate(self.test_accuracy) if accuracy >= target), None)


def train_together(
    trials: Sequence[Trial],
    problem: Problem,
    data: Samples,
    schedule: Schedule,
    seed: int,
    after_round: Callable[[], object],
) -> list[Run]:
    """Train a fresh model with each trial, one step of each in turn.

    Taking turns lets whatever else the machine does slow all of them alike, so that their seconds can be compared.
    The initial weights and the order of the batches depend on ``seed`` alone, so that every trial gets the same.

    Args:
        trials: Optimizers with learning rates and damping.
        problem: The network and its loss.
        data: The samples, on the device to train on.
        schedule: Epochs, batch size and evaluations.
        seed: See above.
        after_round: Called after a step of every trial, outside the measured time.

    Returns:
        A run a trial, in order.
    """
    runs = [Run(trial, seed) for trial in trials]
    for _ in zip(*(training(run, problem, data, schedule) for run in runs), strict=True):
        after_round()
    return runs


def training(
    run: Run,
    problem: Problem,
    data: Samples,
    schedule: Schedule,
    prepare: methods.Method = methods.prepare,
    probe: int = PROBE,
) -> Iterator[float]:
    """The training loop: fills ``run``, and gives the batch's loss, from before the step, after every step.

    Whoever stops iterating ends the run there. ``probe`` is how many training samples ``train_loss`` is taken over.
    """
    device = data.train_x.device
    model = problem.build(run.seed).to(device)
    step = prepare(model, run.trial, problem.loss)
    durations: list[float] = []
    elapsed = 0.0
    _evaluate(model, problem, data, probe, run, 0, elapsed)
    _warm_up(problem, run, data, schedule, prepare)
    last = step_count(len(data.train_x), schedule, schedule.epochs)
    for rows in batches(len(data.train_x), schedule, run.seed):
        x, y = data.train_x[rows.to(device)], data.train_y[rows.to(device)]
        seconds, loss = timed_step(step, x, y)
        durations.append(seconds)
        elapsed += seconds
        if len(durations) % schedule.eval_every == 0 or len(durations) == last:
            _evaluate(model, problem, data, probe, run, len(durations), elapsed)
            run.ms_per_step = 1e3 * median(durations)
        yield loss


def batches(samples: int, schedule: Schedule, seed: int) -> Iterator[Tensor]:
    """Row numbers of every batch, ``[batch_size]``: all epochs, each in an order of its own."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(schedule.epochs):
        order = torch.randperm(samples, generator=generator)
        yield from order[: step_count(samples, schedule, 1) * schedule.batch_size].split(schedule.batch_size)


def step_count(samples: int, schedule: Schedule, epochs: int) -> int:
    """Steps in so many epochs."""
    return epochs * (samples // schedule.batch_size)


def timed_step(
    step: methods.Step, x: Tensor, y: Tensor, clock: Callable[[], float] = time.perf_counter
) -> tuple[float, float]:
    """One training step on samples ``[N, ...]`` and targets; returns its seconds, and the batch's loss before it."""
    _wait(x.device)
    start = clock()
    loss = step(x, y)
    _wait(x.device)
    return clock() - start, loss.item()


def clock_for(device: torch.device) -> Callable[[], float]:
    """A clock for steps that are compared: on one thread of the host the process's own time, so that what else the
    machine does does not count; else the wall's."""
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    return time.process_time if alone else time.perf_counter


def _warm_up(problem: Problem, run: Run, data: Samples, schedule: Schedule, prepare: methods.Method) -> None:
    """Two steps of another copy, so that one-time costs (thread pools, kernels) do not count for one optimizer."""
    model = problem.build(run.seed).to(data.train_x.device)
    step = prepare(model, run.trial, problem.loss)
    for _ in range(2):
        timed_step(step, data.train_x[: schedule.batch_size], data.train_y[: schedule.batch_size])


@torch.no_grad()
def _evaluate(
    model: nn.Module, problem: Problem, data: Samples, probe: int, run: Run, steps: int, seconds: float
) -> None:
    model.eval()
    run.steps.append(steps)
    run.seconds.append(seconds)
    run.train_loss.append(_finite(problem.loss(_scores(model, data.train_x[:probe]), data.train_y[:probe])))
    scores = _scores(model, data.test_x)
    run.test_loss.append(_finite(problem.loss(scores, data.test_y)))
    right = (scores.argmax(-1) == data.test_y).double().mean().item() if problem.classes else math.nan
    run.test_accuracy.append(right)
    model.train()


def _finite(loss: Tensor) -> float:
    """The loss as a number; infinity where it is not one, so that a diverged run sorts last."""
    return loss.item() if torch.isfinite(loss) else math.inf


def _scores(model: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([model(piece) for piece in x.split(PIECE)])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
