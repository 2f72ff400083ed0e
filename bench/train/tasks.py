"""The tasks: data, network, batch size, budget of steps, and the accuracy or loss that is to be reached.

Targets are round numbers that Adam with a good learning rate reaches on the validation split in the second half of the
budget or shortly before; they were set from runs of Adam alone. Every optimizer gets the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch.nn.functional import mse_loss

from consequentialism.experiments.data import Samples, load
from consequentialism.experiments.models import build as build_model
from consequentialism.experiments.settings import Schedule
from consequentialism.experiments.train import Problem, Run, classification

from .models import GPT, autoencoder, five_layers
from .text import ALPHABET, python_help

VALIDATION = 0.2  # of the training samples, held out in the grid search; final runs leave them out too


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        name: As in a CSV and on the command line.
        title: As in a table.
        data: Reads the samples; the argument is the folder of MNIST's files.
        problem: The network and its loss, for those samples.
        batch_size: Samples a step.
        steps: Most that a run takes.
        eval_every: Steps between evaluations.
        target: Test accuracy to be reached from below, or test loss from above where ``by_loss``.
        by_loss: See above.
        kinds: What an optimizer may refuse: "conv", "conv1d", "sequence", "regression".
    """

    name: str
    title: str
    data: Callable[[Path], Samples]
    problem: Callable[[Samples], Problem]
    batch_size: int
    steps: int
    eval_every: int
    target: float
    by_loss: bool = False
    kinds: frozenset[str] = frozenset()

    def schedule(self, samples: int) -> Schedule:
        """Epochs enough for all steps."""
        a_pass = samples // self.batch_size
        return Schedule(epochs=math.ceil(self.steps / a_pass), batch_size=self.batch_size, eval_every=self.eval_every)

    def score(self, run: Run, index: int) -> float:
        """The test accuracy, or the test loss where the target is a loss, at one of a run's evaluations."""
        return run.test_loss[index] if self.by_loss else run.test_accuracy[index]

    def reached(self, score: float) -> bool:
        """Whether a score is as good as the target."""
        return score <= self.target if self.by_loss else score >= self.target


def _demo(data: str) -> Callable[[Path], Samples]:
    return lambda root: load(data, root)


def _classify(model: str) -> Callable[[Samples], Problem]:
    return lambda samples: classification(model, samples.sample_shape)


def _five_layers(hidden: int) -> Callable[[Samples], Problem]:
    return lambda samples: Problem(
        lambda seed: build_model(lambda: five_layers(math.prod(samples.sample_shape), hidden, 10), seed)
    )


def _pixels(data: str) -> Callable[[Path], Samples]:
    """Images as rows that are their own targets."""

    def read(root: Path) -> Samples:
        samples = load(data, root)
        train, test = samples.train_x.flatten(1), samples.test_x.flatten(1)
        return Samples(train, train, test, test)

    return read


def _autoencoder(hidden: int, code: int) -> Callable[[Samples], Problem]:
    return lambda samples: Problem(
        lambda seed: build_model(lambda: autoencoder(samples.train_x.shape[1], hidden, code), seed), mse_loss, False
    )


def _gpt(width: int, heads: int, layers: int) -> Callable[[Samples], Problem]:
    return lambda samples: Problem(
        lambda seed: build_model(lambda: GPT(len(ALPHABET), samples.train_x.shape[1], width, heads, layers), seed)
    )


_CONV = frozenset({"conv"})
CPU = (
    Task("digits", "MLP, digits", _demo("digits"), _classify("mlp"), 128, 120, 2, 0.97),
    Task("mnist5k", "MLP, 5,000 MNIST digits", _demo("mnist5k"), _classify("mlp"), 128, 240, 4, 0.93),
    Task("isaac", "ISAAC's five layers, 5,000 MNIST digits", _demo("mnist5k"), _five_layers(100), 60, 240, 4, 0.9),
    Task("cnn", "CNN, 5,000 MNIST digits", _demo("mnist5k"), _classify("cnn"), 64, 120, 4, 0.94, kinds=_CONV),
    Task(
        "resnet",
        "residual network, 5,000 MNIST digits",
        _demo("mnist5k"),
        _classify("resnet"),
        64,
        100,
        4,
        0.9,
        kinds=_CONV,
    ),
    Task(
        "conv1d",
        "Conv1d, mnist1d",
        _demo("mnist1d"),
        _classify("conv1d"),
        128,
        500,
        10,
        0.88,
        kinds=frozenset({"conv", "conv1d"}),
    ),
    Task(
        "gpt",
        "character GPT, Python's help",
        lambda root: python_help(64, 150_000),
        _gpt(64, 4, 2),
        16,
        240,
        12,
        2.5,
        by_loss=True,
        kinds=frozenset({"sequence"}),
    ),
    Task(
        "autoencoder",
        "autoencoder, 5,000 MNIST digits",
        _pixels("mnist5k"),
        _autoencoder(256, 32),
        128,
        240,
        6,
        0.28,
        by_loss=True,
        kinds=frozenset({"regression"}),
    ),
)
CUDA = (
    Task("mnist", "MLP, MNIST", _demo("mnist"), _classify("mlp"), 128, 3000, 50, 0.98),
    Task("isaac-1600", "ISAAC's five layers of 1,600, MNIST", _demo("mnist"), _five_layers(1600), 60, 3000, 50, 0.98),
    Task("mnist-cnn", "CNN, MNIST", _demo("mnist"), _classify("cnn"), 128, 2000, 25, 0.988, kinds=_CONV),
    Task(
        "mnist-resnet",
        "residual network, MNIST",
        _demo("mnist"),
        _classify("resnet"),
        128,
        1500,
        25,
        0.988,
        kinds=_CONV,
    ),
    Task(
        "gpt-256",
        "character GPT of width 256, Python's help",
        lambda root: python_help(256, None),
        _gpt(256, 8, 6),
        64,
        1500,
        25,
        1.6,
        by_loss=True,
        kinds=frozenset({"sequence"}),
    ),
    Task(
        "mnist-autoencoder",
        "autoencoder, MNIST",
        _pixels("mnist"),
        _autoencoder(1024, 32),
        256,
        3000,
        50,
        0.25,
        by_loss=True,
        kinds=frozenset({"regression"}),
    ),
)
PROFILES: dict[str, tuple[Task, ...]] = {"cpu": CPU, "cuda": CUDA}  # what a device trains by default
TASKS: dict[str, Task] = {task.name: task for task in (*CPU, *CUDA)}
QUICK = ("digits", "mnist5k")
