"""The networks that can be trained, by name."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from .errors import UserError

HIDDEN = 256
SampleShape = tuple[int, ...]  # channels, then height and width, or length


def mlp(sample_shape: SampleShape, classes: int) -> nn.Module:
    """Two hidden layers of 256 units: samples ``[N, C, ...]`` to scores ``[N, classes]``."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(math.prod(sample_shape), HIDDEN),
        nn.ReLU(),
        nn.Linear(HIDDEN, HIDDEN),
        nn.ReLU(),
        nn.Linear(HIDDEN, classes),
    )


def conv1d(sample_shape: SampleShape, classes: int) -> nn.Module:
    """Three convolutions of stride 2 and a linear layer: sequences ``[N, C, L]`` to scores ``[N, classes]``."""
    channels, length = sample_shape
    for _ in range(3):
        length = (length + 1) // 2
    return nn.Sequential(
        nn.Conv1d(channels, 32, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv1d(32, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv1d(32, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * length, classes),
    )


MODELS: dict[str, Callable[[SampleShape, int], nn.Module]] = {"mlp": mlp, "conv1d": conv1d}
DIMENSIONS = {"conv1d": 1}  # of a sample beside its channels, where the model asks for it


def check_fits(name: str, dimensions: int) -> None:
    """Raise `UserError` unless the model takes samples of so many dimensions beside their channels."""
    if DIMENSIONS.get(name, dimensions) != dimensions:
        kinds = {1: "sequences", 2: "images"}
        fitting = ", ".join(other for other in MODELS if DIMENSIONS.get(other, dimensions) == dimensions)
        raise UserError(
            f"--model {name} takes {kinds[DIMENSIONS[name]]}, the data are {kinds[dimensions]}: choose from {fitting}"
        )


def build(name: str, sample_shape: SampleShape, classes: int, seed: int) -> nn.Module:
    """A model on the CPU whose initial weights depend on ``seed`` alone; torch's global generator is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MODELS[name](sample_shape, classes)
