"""Where a convolution reads its input: what its rows are, and which torch convolution goes with them.

A convolution is a linear layer whose rows are patches of its input, one for each output position. `Geometry` says
which; `TransposedGeometry` is that of a transposed convolution, which reads its input with zeros between the entries.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..backend import reference
from ..backend.protocol import Backend
from ..backend.reference import ConvBlock
from ..options import is_whole

CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
Sizes = int | Sequence[int]


@dataclass(frozen=True)
class Geometry:
    """What a convolution reads; one number for each spatial dimension.

    Its rows are ``[groups, N, I]`` with ``N = B * positions`` and ``I = C/groups * prod(kernel)``, the channel first.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    transposed = False

    @property
    def output_padding(self) -> tuple[int, ...]:
        """Zeros beyond the end of the output's rows, which only a transposed convolution has."""
        return (0,) * len(self.kernel)

    def arguments(self) -> tuple[Any, ...]:
        """Everything as the arguments of an op; `geometry_of` takes them."""
        return (*self._numbers(), self.groups, self.transposed, self.output_padding)

    def _numbers(self) -> tuple[tuple[int, ...], ...]:
        return self.kernel, self.stride, self.padding, self.dilation

    def valid(self, x: Tensor, outputs: int) -> bool:
        """Whether ``x [B, C, *spatial]`` and ``O`` outputs have such a convolution, with a position for each sample."""
        if x.ndim != len(self.kernel) + 2 or min(*self.kernel, *self.stride, *self.dilation, self.groups) < 1:
            return False
        if min(self.padding) < 0 or outputs < 1 or outputs % self.groups or x.shape[1] < 1 or x.shape[1] % self.groups:
            return False
        return all(s >= 1 for s in x.shape[2:]) and all(p >= 1 for p in self.positions(x))

    def takes(self, x: Tensor, weight: Tensor) -> bool:
        """Whether torch's own convolution takes these shapes, with a position for each sample."""
        outputs = self.outputs(weight)
        return self.valid(x, outputs) and tuple(weight.shape) == self.weight_shape(x.shape[1], outputs)

    def positions(self, x: Tensor) -> list[int]:
        """Output positions along each dimension of ``x [B, C, *spatial]``."""
        return reference.conv_output_size(x.shape[2:], *self._numbers())

    def inputs(self, x: Tensor) -> int:
        """``I`` without the bias's."""
        return x.shape[1] // self.groups * math.prod(self.kernel)

    def weight_shape(self, channels: int, outputs: int) -> tuple[int, ...]:
        """The shape of the weight of a layer from ``C`` channels to ``O``."""
        return outputs, channels // self.groups, *self.kernel

    def outputs(self, weight: Tensor) -> int:
        """``O`` of a weight."""
        return weight.shape[0]

    def rows_of(self, weight: Tensor) -> Tensor:
        """A weight as that of linear layers, ``[groups, O/groups, I]``."""
        return weight.reshape(self.groups, weight.shape[0] // self.groups, -1)

    def weight_of(self, rows: Tensor) -> Tensor:
        """The weight of ``[groups, O/groups, I]``, a view where it can be."""
        channels = rows.shape[2] // math.prod(self.kernel)
        return rows.reshape(-1, channels, *self.kernel)

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """torch's own convolution."""
        arguments = self.stride, self.padding, self.dilation, self.groups
        return CONVOLUTIONS[len(self.kernel)](x, weight, bias, *arguments)

    def backward(
        self, dy: Tensor, x: Tensor, weight: Tensor, mask: tuple[bool, bool, bool]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """torch's own gradients of input, weight and bias, where the mask wants them."""
        sizes = [self.outputs(weight)], self.stride, self.padding, self.dilation
        dx, dw, db = torch.ops.aten.convolution_backward(
            dy, x, weight, *sizes, self.transposed, self.output_padding, self.groups, mask
        )
        return dx, dw, db if mask[2] else None

    def patches(self, x: Tensor) -> Tensor:
        """The rows ``[groups, N, I]``, all of them."""
        kernel, stride, padding, dilation = self._numbers()
        return reference.conv_patches(x, kernel, stride, padding, dilation, self.groups)

    def blocks(self, x: Tensor, patch_bytes: int, dtype: torch.dtype) -> Iterator[ConvBlock]:
        """``x`` in pieces in ``dtype`` whose patches take at most ``patch_bytes``, or are one row of positions.

        `of_blocks` is their geometry.
        """
        kernel, stride, padding, dilation = self._numbers()
        return reference.conv_blocks(x, kernel, stride, padding, dilation, patch_bytes, dtype)

    def of_blocks(self) -> Geometry:
        """The geometry of inputs that the padding is a part of."""
        return Geometry(self.kernel, self.stride, (0,) * len(self.kernel), self.dilation, self.groups)

    def gram(self, backend: Backend, x: Tensor, bias: bool, patch_bytes: int, dtype: torch.dtype) -> Tensor:
        """``x^T x [groups, I, I]`` of the rows, with the bias's column; never more than ``patch_bytes`` of them."""
        kernel, stride, padding, dilation = self._numbers()
        return backend.conv_gram(x, kernel, stride, padding, dilation, self.groups, bias, patch_bytes, dtype)


@dataclass(frozen=True)
class TransposedGeometry(Geometry):
    """What a transposed convolution reads, of a weight ``[C, O/groups, *kernel]``.

    It is the convolution, by a stride of 1, of its input with ``stride - 1`` zeros between the entries, padded by
    ``dilation * (kernel - 1) - padding`` and at the end by ``output_padding`` more, with the kernel reversed. Its rows
    are the patches of that, in the order of the weight's entries.

    Most of a patch is zeros. A position ``o`` reads the entries ``k`` of the kernel with ``dilation * k = o + padding``
    modulo the stride; so positions and entries fall into classes, and within one class it is a convolution without
    zeros in between.
    """

    extra: tuple[int, ...] = ()

    transposed = True

    @property
    def output_padding(self) -> tuple[int, ...]:
        return self.extra or (0,) * len(self.kernel)

    def valid(self, x: Tensor, outputs: int) -> bool:
        larger = zip(self.output_padding, self.stride, self.dilation, strict=True)
        return super().valid(x, outputs) and all(0 <= o < max(s, d) for o, s, d in larger)

    def positions(self, x: Tensor) -> list[int]:
        numbers = zip(x.shape[2:], *self._numbers(), self.output_padding, strict=True)
        return [(s - 1) * t - 2 * p + d * (k - 1) + extra + 1 for s, k, t, p, d, extra in numbers]

    def weight_shape(self, channels: int, outputs: int) -> tuple[int, ...]:
        return channels, outputs // self.groups, *self.kernel

    def outputs(self, weight: Tensor) -> int:
        return weight.shape[1] * self.groups

    def rows_of(self, weight: Tensor) -> Tensor:
        own = weight.reshape(self.groups, -1, *weight.shape[1:])  # [groups, C/groups, O/groups, *kernel]
        return own.transpose(1, 2).reshape(self.groups, weight.shape[1], -1)

    def weight_of(self, rows: Tensor) -> Tensor:
        channels = rows.shape[2] // math.prod(self.kernel)
        own = rows.reshape(*rows.shape[:2], channels, *self.kernel).transpose(1, 2)
        return own.reshape(-1, rows.shape[1], *self.kernel)

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        arguments = self.stride, self.padding, self.output_padding, self.groups, self.dilation
        return TRANSPOSED[len(self.kernel)](x, weight, bias, *arguments)

    def patches(self, x: Tensor) -> Tensor:
        kernel, stride, padding, dilation = self._numbers()
        arguments = (kernel, stride, padding, dilation, self.output_padding, self.groups)
        return reference.conv_transpose_patches(x, *arguments)

    def blocks(self, x: Tensor, patch_bytes: int, dtype: torch.dtype) -> Iterator[ConvBlock]:
        """``x`` in pieces of whole samples in ``dtype``: torch's own convolution of them unfolds one at a time."""
        positions = self.positions(x)
        sample_bytes = x.shape[1] * math.prod(x.shape[2:]) * math.prod(self.kernel) * dtype.itemsize
        for first, piece in _samples(x, sample_bytes, patch_bytes):
            yield ConvBlock(piece.to(dtype), first, 0, positions[0])

    def of_blocks(self) -> Geometry:
        return self

    def gram(self, backend: Backend, x: Tensor, bias: bool, patch_bytes: int, dtype: torch.dtype) -> Tensor:
        """The Gram, class by class: entries of the kernel of two classes are never in one row."""
        inputs, positions = self.inputs(x), self.positions(x)
        gram = x.new_zeros(self.groups, inputs + bias, inputs + bias, dtype=dtype)
        if x.shape[0] == 0:
            return gram
        shape = x.shape[1] // self.groups, *self.kernel
        square = gram[:, :inputs, :inputs].unflatten(2, shape).unflatten(1, shape)
        along = [self._classes(i, size, out) for i, (size, out) in enumerate(zip(x.shape[2:], positions, strict=True))]
        for classes in itertools.product(*along):
            own = self._gram_of_class(classes, backend, x, bias, patch_bytes, dtype)
            own_shape = shape[0], *(c.entries for c in classes)
            entries = (slice(None), *(slice(c.first, None, c.step) for c in classes))
            reverse = list(range(-len(classes), 0))
            rows = own.unflatten(1, own_shape) if not bias else own[:, :-1].unflatten(1, own_shape)
            rows = rows.flip([2 + i for i in range(len(classes))])
            part = rows[..., : math.prod(own_shape)].unflatten(-1, own_shape).flip(reverse)
            square[(slice(None), *entries, *entries)] = part
            if bias:
                sums = rows[..., -1]  # [groups, C/groups, *entries]
                gram[:, -1, :-1].unflatten(1, shape)[(slice(None), *entries)] = sums
                gram[:, :-1, -1].unflatten(1, shape)[(slice(None), *entries)] = sums
        if bias:
            gram[:, -1, -1] = x.shape[0] * math.prod(positions)
        return gram

    def _gram_of_class(
        self, classes: Sequence[_Class], backend: Backend, x: Tensor, bias: bool, patch_bytes: int, dtype: torch.dtype
    ) -> Tensor:
        """The Gram of the positions of one class, with the entries of the kernel that they read in reversed order."""
        kernel, dilation = tuple(c.entries for c in classes), tuple(c.dilation for c in classes)
        one, nothing = (1,) * len(kernel), (0,) * len(kernel)
        convolution = Geometry(kernel, one, nothing, dilation, self.groups)
        read = x.shape[1] * math.prod([c.end - c.begin for c in classes])
        sides = [side for c, size in zip(classes, x.shape[2:], strict=True) for side in (-c.begin, c.end - size)]
        sides = [sides[i + j] for i in range(len(sides) - 2, -1, -2) for j in (0, 1)]  # the last dimension first
        gram = None
        for _, piece in _samples(x, read * dtype.itemsize, patch_bytes):
            own = convolution.gram(backend, F.pad(piece, sides), bias, patch_bytes, dtype)
            gram = own if gram is None else gram + own
        assert gram is not None
        return gram

    def _classes(self, i: int, size: int, positions: int) -> Iterator[_Class]:
        """The classes of positions along the ``i``-th dimension that read some of an input of this size."""
        kernel, stride, padding, dilation = (numbers[i] for numbers in self._numbers())
        common = math.gcd(stride, dilation)
        step = stride // common
        for first in range(min(step, kernel)):
            residue = (dilation * first - padding) % stride  # the first position of its class
            entries = (kernel - 1 - first) // step + 1
            count = (positions - 1 - residue) // stride + 1
            begin = (residue + padding - dilation * (first + (entries - 1) * step)) // stride  # exact
            end = begin + count + dilation // common * (entries - 1)
            if count > 0 and begin < size and end > 0:
                yield _Class(first, step, entries, dilation // common, begin, end)


class _Class(NamedTuple):
    """Every ``step``-th entry of a kernel, and the part of the input that the positions with them read.

    The entries are those of a convolution by a stride of 1, in reversed order.
    """

    first: int
    step: int
    entries: int
    dilation: int
    begin: int  # of the part, which may lie outside of the input: zeros
    end: int


def _samples(x: Tensor, sample_bytes: int, most: int) -> Iterator[tuple[int, Tensor]]:
    """Pieces of ``x [B, ...]`` that take at most so many bytes, or are one sample, and the first sample of each."""
    step = max(1, most // max(sample_bytes, 1))
    for first in range(0, x.shape[0], step):
        yield first, x[first : first + step]


def geometry_of(
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    transposed: bool,
    output_padding: Sequence[int],
) -> Geometry:
    """The geometry of arguments that `Geometry.arguments` gave."""
    numbers = tuple(kernel), tuple(stride), tuple(padding), tuple(dilation), groups
    return TransposedGeometry(*numbers, tuple(output_padding)) if transposed else Geometry(*numbers)


def both_sides(padding: str | Sizes, kernel: Sequence[int], dilation: Sizes) -> list[tuple[int, int]]:
    """What a convolution's padding adds before and after, for each spatial dimension."""
    if padding == "valid":
        return [(0, 0)] * len(kernel)
    if padding != "same":
        return [(size, size) for size in per_dimension("padding", padding, len(kernel))]  # type: ignore[arg-type]
    dilations = per_dimension("dilation", dilation, len(kernel))
    totals = [d * (k - 1) for d, k in zip(dilations, kernel, strict=True)]
    return [(total // 2, total - total // 2) for total in totals]


def normalized(
    x: Tensor, kernel: tuple[int, ...], stride: Sizes, padding: str | Sizes, dilation: Sizes, groups: int
) -> tuple[Tensor, Geometry] | None:
    """A geometry, and ``x`` padded where ``"same"`` pads one side more; None where ``"same"`` cannot be."""
    spatial = len(kernel)
    strides = per_dimension("stride", stride, spatial)
    dilations = per_dimension("dilation", dilation, spatial)
    groups = checked_groups(groups)
    if isinstance(padding, str):
        if padding not in ("same", "valid"):
            raise ValueError(f"padding must be 'same', 'valid' or whole numbers, got {padding!r}")
        if padding == "valid":
            return x, Geometry(kernel, strides, (0,) * spatial, dilations, groups)
        if any(s != 1 for s in strides):
            return None
        sides = both_sides(padding, kernel, dilations)
        if any(before != after for before, after in sides):
            x = F.pad(x, [side for before, after in reversed(sides) for side in (0, after - before)])
        return x, Geometry(kernel, strides, tuple(before for before, _ in sides), dilations, groups)
    return x, Geometry(kernel, strides, per_dimension("padding", padding, spatial), dilations, groups)


def normalized_transposed(
    kernel: tuple[int, ...],
    stride: Sizes,
    padding: Sizes,
    output_padding: Sizes,
    groups: int,
    dilation: Sizes,
) -> TransposedGeometry:
    """The geometry of a transposed convolution."""
    spatial = len(kernel)
    groups = checked_groups(groups)
    return TransposedGeometry(
        kernel,
        per_dimension("stride", stride, spatial),
        per_dimension("padding", padding, spatial),
        per_dimension("dilation", dilation, spatial),
        groups,
        per_dimension("output_padding", output_padding, spatial),
    )


def checked_groups(groups: Any) -> int:
    """``groups``, a whole number of Python's or numpy's, as an int."""
    if not is_whole(groups):
        raise TypeError(f"groups must be a whole number above 0, got {groups!r} ({type(groups).__name__})")
    return int(groups)


def per_dimension(name: str, value: Any, spatial: int) -> tuple[int, ...]:
    """One whole number for each spatial dimension, of one or of as many."""
    values = (value,) * spatial if is_whole(value) else value
    if isinstance(value, (bool, str)) or not isinstance(values, Sequence):
        raise TypeError(f"{name} must be a whole number or {spatial} of them, got {value!r} ({type(value).__name__})")
    if len(values) == 1:
        values = tuple(values) * spatial
    if len(values) != spatial or not all(is_whole(v) for v in values):
        raise ValueError(f"{name} must be a whole number or {spatial} of them, got {value!r}")
    sizes: list[Any] = [v if type(v) is int or isinstance(v, torch.SymInt) else int(v) for v in values]
    return tuple(sizes)
