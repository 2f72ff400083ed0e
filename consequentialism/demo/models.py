"""The networks that can be trained, by name."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

HIDDEN = 256


def mlp(image_shape: tuple[int, int, int], classes: int) -> nn.Module:
    """Two hidden layers of 256 units: images ``[N, C, H, W]`` to scores ``[N, classes]``."""
    channels, height, width = image_shape
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(channels * height * width, HIDDEN),
        nn.ReLU(),
        nn.Linear(HIDDEN, HIDDEN),
        nn.ReLU(),
        nn.Linear(HIDDEN, classes),
    )


MODELS: dict[str, Callable[[tuple[int, int, int], int], nn.Module]] = {"mlp": mlp}


def build(name: str, image_shape: tuple[int, int, int], classes: int, seed: int) -> nn.Module:
    """A model on the CPU whose initial weights depend on ``seed`` alone; torch's global generator is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MODELS[name](image_shape, classes)
