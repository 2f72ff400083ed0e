"""The networks that can be trained, by name."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import UserError

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


def cnn(sample_shape: SampleShape, classes: int) -> nn.Module:
    """Two 3x3 convolutions of 16 and 32 channels, each with a 2x2 pooling, and a linear layer."""
    channels, height, width = sample_shape
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * (height // 4) * (width // 4), classes),
    )


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch norms, added to the input: ``[N, C, H, W] -> [N, O, H/stride, W/stride]``."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


def resnet(sample_shape: SampleShape, classes: int) -> nn.Module:
    """A small residual network with batch norm: a stem that halves the image, blocks of 16, 32 and 32 channels."""
    channels, _, _ = sample_shape
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        ResidualBlock(16, 16, 1),
        ResidualBlock(16, 32, 2),
        ResidualBlock(32, 32, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, classes),
    )


MODELS: dict[str, Callable[[SampleShape, int], nn.Module]] = {
    "mlp": mlp,
    "cnn": cnn,
    "resnet": resnet,
    "conv1d": conv1d,
}
DIMENSIONS = {"cnn": 2, "resnet": 2, "conv1d": 1}  # of a sample beside its channels, where the model asks for it


def check_fits(name: str, dimensions: int) -> None:
    """Raise `UserError` unless the model takes samples of so many dimensions beside their channels."""
    if DIMENSIONS.get(name, dimensions) != dimensions:
        kinds = {1: "sequences", 2: "images"}
        fitting = ", ".join(other for other in MODELS if DIMENSIONS.get(other, dimensions) == dimensions)
        raise UserError(
            f"--model {name} takes {kinds[DIMENSIONS[name]]}, the data are {kinds[dimensions]}: choose from {fitting}"
        )


def build(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A model on the CPU whose initial weights depend on ``seed`` alone; torch's global generator is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()
