"""Shapes of the cases, by the numbers that ``--shape`` takes."""

from __future__ import annotations

import itertools
from typing import NamedTuple

from consequentialism.solve import cost

from .roofline import Minimum

MATRICES = 8  # of a batch of factors


class LinearShape(NamedTuple):
    """``N`` rows, ``I`` inputs, ``O`` outputs, and the ratio to the baseline that is aimed at."""

    rows: int
    inputs: int
    outputs: int
    target: float | None = None

    @property
    def name(self) -> str:
        return f"{self.rows}x{self.inputs}x{self.outputs}"

    def plain(self, size: int) -> Minimum:
        """What forward and backward with the input's gradient take; ``size`` bytes a number."""
        n, i, o = self[:3]
        return Minimum(2.0 * size * (n * i + n * o + i * o), 6.0 * n * i * o)

    def emended(self, size: int) -> Minimum:
        """What they take with Gram, factor and application, which need move nothing more."""
        plain = self.plain(size)
        return plain._replace(flops=plain.flops + cost.min_flops(self.rows, self.inputs + 1, self.outputs))


class ConvShape(NamedTuple):
    """A convolution of square images, padded by half its kernel, and the ratio to the plain layer that is aimed at."""

    batch: int
    channels: int
    outputs: int
    kernel: int
    stride: int
    groups: int
    side: int
    target: float | None = None

    @property
    def name(self) -> str:
        stride = f"/{self.stride}" if self.stride > 1 else ""
        groups = f" g{self.groups}" if self.groups > 1 else ""
        return f"{self.batch}x{self.channels}x{self.side}^2 {self.kernel}^2{stride} {self.outputs}{groups}"

    @property
    def padding(self) -> int:
        return self.kernel // 2

    @property
    def positions(self) -> int:
        """The output's positions along a side."""
        return (self.side + 2 * self.padding - self.kernel) // self.stride + 1

    @property
    def inputs(self) -> int:
        """``I`` of one group, without the bias's."""
        return self.channels // self.groups * self.kernel**2

    @property
    def input_size(self) -> tuple[int, ...]:
        return self.batch, self.channels, self.side, self.side

    @property
    def output_size(self) -> tuple[int, ...]:
        return self.batch, self.outputs, self.positions, self.positions

    @property
    def weight_size(self) -> tuple[int, ...]:
        return self.outputs, self.channels // self.groups, self.kernel, self.kernel

    def plain(self, size: int) -> Minimum:
        """What forward and backward with the input's gradient take; ``size`` bytes a number."""
        rows = self.batch * self.positions**2
        numbers = self.batch * self.channels * self.side**2 + rows * self.outputs + self.outputs * self.inputs
        return Minimum(2.0 * size * numbers, 6.0 * rows * self.inputs * self.outputs)

    def emended(self, size: int) -> Minimum:
        """What they take with the Gram by the cheaper of its two ways, factors and application."""
        shape = (self.channels // self.groups, (self.kernel, self.kernel), (self.positions, self.positions))
        gram = cost.direct_flops(*shape)
        if self.stride == 1:
            gram = min(gram, cost.displaced_flops(*shape))
        factor_and_apply = self.groups * self.inputs**3 + 2 * self.outputs * self.inputs**2
        plain = self.plain(size)
        return plain._replace(flops=plain.flops + self.batch * self.groups * gram + factor_and_apply)


class NetworkShape(NamedTuple):
    """A multi-layer perceptron of these widths, and the ratio to the plain one that is aimed at."""

    rows: int
    widths: tuple[int, ...]
    target: float | None = None

    @property
    def name(self) -> str:
        widths = self.widths
        alike = len(widths) > 7 and len(set(widths)) == 1
        return f"{self.rows}x{f'{len(widths) - 1}*{widths[0]}' if alike else '-'.join(map(str, widths))}"

    @property
    def layers(self) -> list[LinearShape]:
        return [LinearShape(self.rows, i, o) for i, o in itertools.pairwise(self.widths)]

    def plain(self, size: int) -> Minimum:
        """What a training step takes: weights and gradients are read and written, and so are activations and theirs."""
        moved = sum(4.0 * i * o for i, o in itertools.pairwise(self.widths)) + 4.0 * self.rows * sum(self.widths)
        flops = sum(layer.plain(size).flops for layer in self.layers) - self.layers[0].plain(size).flops / 3
        return Minimum(size * moved, flops)

    def emended(self, size: int) -> Minimum:
        plain = self.plain(size)
        return plain._replace(
            flops=plain.flops + sum(layer.emended(size).flops - layer.plain(size).flops for layer in self.layers)
        )


class Order(NamedTuple):
    """``n`` of a matrix ``[n, n]``."""

    order: int
    target: float | None = None

    @property
    def name(self) -> str:
        return str(self.order)


class Batch(NamedTuple):
    """`MATRICES` inputs ``[n, 2n]``, each with its matrix ``[n, n]``."""

    order: int
    target: float | None = None

    @property
    def name(self) -> str:
        return f"{MATRICES}*{self.order}"


Shape = LinearShape | ConvShape | NetworkShape | Order | Batch
