"""The training loop, one for every optimizer, model and data set."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..convert import convert
from .data import CLASSES, PROBE, Digits
from .models import build
from .settings import PREFIX, Schedule, Trial

TAIL = 5  # evaluations at the end whose median is a run's final value
FACTORIES: dict[str, Callable[[Iterator[nn.Parameter], float], torch.optim.Optimizer]] = {
    "sgd": lambda parameters, lr: torch.optim.SGD(parameters, lr=lr),
    "nag": lambda parameters, lr: torch.optim.SGD(parameters, lr=lr, momentum=0.9, nesterov=True),
    "rmsprop": lambda parameters, lr: torch.optim.RMSprop(parameters, lr=lr),
    "adam": lambda parameters, lr: torch.optim.Adam(parameters, lr=lr),
}


@dataclass
class Run:
    """What one training run showed; the lists have one entry an evaluation, the first before any step.

    Attributes:
        trial: The optimizer and its hyper-parameters.
        seed: Of the initial weights and the order of the batches.
        steps: Steps taken.
        seconds: Time spent in training steps, evaluations left out.
        train_loss: Mean cross-entropy over the (at most 1,000 first) training samples.
        test_accuracy: Share of test samples classified correctly, 0 to 1.
        ms_per_step: Median time of a step, in milliseconds.
    """

    trial: Trial
    seed: int
    steps: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    train_loss: list[float] = field(default_factory=list)
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
    model_name: str,
    data: Digits,
    schedule: Schedule,
    seed: int,
    after_round: Callable[[], object],
) -> list[Run]:
    """Train a fresh model with each trial, one step of each in turn.

    Taking turns lets whatever else the machine does slow all of them alike, so that their seconds can be compared.
    The initial weights and the order of the batches depend on ``seed`` alone, so that every trial gets the same.

    Args:
        trials: Optimizers with learning rates and damping.
        model_name: Of `consequentialism.demo.models.MODELS`.
        data: On the device to train on.
        schedule: Epochs, batch size and evaluations.
        seed: See above.
        after_round: Called after a step of every trial, outside the measured time.

    Returns:
        A run a trial, in order.
    """
    runs = [Run(trial, seed) for trial in trials]
    for _ in zip(*(_training(run, model_name, data, schedule) for run in runs), strict=True):
        after_round()
    return runs


def _training(run: Run, model_name: str, data: Digits, schedule: Schedule) -> Iterator[None]:
    """The training loop: fills ``run``, and stops for the others after every step."""
    device = data.train_x.device
    model = build(model_name, data.sample_shape, CLASSES, run.seed).to(device)
    if run.trial.damping is not None:
        convert(model, damping=run.trial.damping)
    _warm_up(model, run.trial, data, schedule)
    optimizer = _optimizer(model, run.trial)
    durations: list[float] = []
    elapsed = 0.0
    _evaluate(model, data, run, 0, elapsed)
    last = step_count(len(data.train_x), schedule, schedule.epochs)
    for rows in batches(len(data.train_x), schedule, run.seed):
        x, y = data.train_x[rows.to(device)], data.train_y[rows.to(device)]
        durations.append(_timed_step(model, optimizer, x, y))
        elapsed += durations[-1]
        if len(durations) % schedule.eval_every == 0 or len(durations) == last:
            _evaluate(model, data, run, len(durations), elapsed)
            run.ms_per_step = 1e3 * median(durations)
        yield


def batches(samples: int, schedule: Schedule, seed: int) -> Iterator[Tensor]:
    """Row numbers of every batch, ``[batch_size]``: all epochs, each in an order of its own."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(schedule.epochs):
        order = torch.randperm(samples, generator=generator)
        yield from order[: step_count(samples, schedule, 1) * schedule.batch_size].split(schedule.batch_size)


def step_count(samples: int, schedule: Schedule, epochs: int) -> int:
    """Steps in so many epochs."""
    return epochs * (samples // schedule.batch_size)


def _optimizer(model: nn.Module, trial: Trial) -> torch.optim.Optimizer:
    return FACTORIES[trial.optimizer.removeprefix(PREFIX)](model.parameters(), trial.lr)


def _timed_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> float:
    """One training step on samples ``[N, C, ...]`` and labels ``[N]``; returns its seconds."""
    _wait(x.device)
    start = time.perf_counter()
    optimizer.zero_grad()
    cross_entropy(model(x), y).backward()
    optimizer.step()
    _wait(x.device)
    return time.perf_counter() - start


def _warm_up(model: nn.Module, trial: Trial, data: Digits, schedule: Schedule) -> None:
    """Two steps of a copy, so that one-time costs (thread pools, kernel loading) do not count for one optimizer."""
    copy = deepcopy(model)
    optimizer = _optimizer(copy, trial)
    for _ in range(2):
        _timed_step(copy, optimizer, data.train_x[: schedule.batch_size], data.train_y[: schedule.batch_size])


@torch.no_grad()
def _evaluate(model: nn.Module, data: Digits, run: Run, steps: int, seconds: float) -> None:
    model.eval()
    run.steps.append(steps)
    run.seconds.append(seconds)
    loss = cross_entropy(_scores(model, data.train_x[:PROBE]), data.train_y[:PROBE]).item()
    run.train_loss.append(loss if math.isfinite(loss) else math.inf)  # a diverged run sorts last
    run.test_accuracy.append((_scores(model, data.test_x).argmax(1) == data.test_y).double().mean().item())
    model.train()


def _scores(model: nn.Module, x: Tensor) -> Tensor:
    """Scores ``[N, classes]``, in pieces that bound the memory."""
    return torch.cat([model(piece) for piece in x.split(2500)])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
