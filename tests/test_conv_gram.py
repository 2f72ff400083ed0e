"""The op conv_gram: both ways, every block size, layouts, opcheck, arguments, and the memory that a step takes."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from cases import BF16, F16, F32, F64, assert_close, assert_identical, needs_kernels, randn
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import consequentialism as cw
from consequentialism import reference
from consequentialism.backend import compiled as ops
from consequentialism.solve import cost

METHODS = ("direct", "displaced")
BOUNDS = {F64: 1e-13, F32: 2e-6}
# x, kernel, stride, padding, dilation, groups: small Grams padded and unfolded, BLAS, groups above and below threads.
GRAMS: dict[str, tuple[Any, ...]] = {
    "1d": ((3, 6, 19), (3,), (1,), (2,), (2,), 1),
    "1d stride": ((3, 6, 19), (4,), (3,), (1,), (1,), 2),
    "2d": ((3, 8, 7, 9), (3, 2), (1, 1), (1, 0), (1, 2), 1),
    "2d rows apart": ((3, 2, 9, 9), (3, 3), (2, 1), (1, 1), (1, 1), 1),
    "2d stride": ((3, 8, 7, 9), (3, 3), (1, 2), (1, 1), (1, 1), 1),
    "padding above the kernel": ((2, 5, 3, 4), (2, 2), (1, 1), (3, 4), (1, 1), 1),
    "dilation above the image": ((2, 5, 3, 4), (2, 2), (1, 1), (5, 5), (6, 7), 1),
    "depthwise": ((3, 8, 7, 9), (3, 3), (1, 1), (1, 1), (1, 1), 8),
    "groups": ((3, 20, 6, 5), (3, 3), (1, 1), (1, 1), (1, 1), 2),
    "pointwise": ((3, 40, 5, 5), (1, 1), (1, 1), (0, 0), (1, 1), 1),
    "many channels": ((5, 68, 4, 5), (3, 2), (1, 1), (1, 0), (1, 1), 1),
    "3d": ((2, 5, 4, 5, 6), (2, 3, 2), (1, 1, 1), (1, 1, 0), (2, 1, 1), 1),
    "3d stride": ((2, 4, 4, 5, 6), (2, 2, 2), (2, 1, 1), (0, 1, 0), (1, 1, 1), 4),
}
# The same of x without a number: its patches are padding, or have no entries.
EMPTY: dict[str, tuple[Any, ...]] = {
    "no channels": ((2, 0, 5, 5), (3, 3), (1, 1), (0, 0), (1, 1), 1),
    "no channels, stride, groups": ((2, 0, 5, 6), (3, 3), (2, 1), (0, 1), (1, 2), 3),
    "no channels, pointwise": ((2, 0, 5), (1,), (1,), (0,), (1,), 1),
    "no depth": ((2, 3, 0, 5), (1, 3), (1, 1), (2, 0), (1, 1), 1),
    "no width, stride": ((2, 4, 5, 0), (3, 1), (2, 1), (0, 4), (1, 1), 2),
    "no samples": ((0, 3, 5, 5), (3, 3), (1, 1), (0, 0), (1, 1), 1),
}
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.transpose(1, -1).contiguous().transpose(1, -1),
    "sliced": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    "expanded": lambda x: x[:1].expand(x.shape),
}


def methods(stride: tuple[int, ...]) -> tuple[str, ...]:
    return METHODS if all(s == 1 for s in stride) else METHODS[:1]


def naive(x: Tensor, arguments: tuple[Any, ...], bias: bool) -> Tensor:
    """The Gram of all patches at once, in float64."""
    patches = reference.conv_patches(x.double(), *arguments)
    if bias:
        patches = torch.cat([patches, torch.ones_like(patches[:, :, :1])], 2)
    return patches.mT @ patches


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=str)
@pytest.mark.parametrize("name", GRAMS)
def test_both_ways_and_every_block_size(name: str, dtype: torch.dtype, layout: str) -> None:
    size, *arguments = GRAMS[name]
    x = LAYOUTS[layout](randn(*size, dtype=dtype))
    for bias in (True, False):
        expected = naive(x, arguments, bias)
        for out in (F64,) if dtype == F64 else (F32, F64):
            for patch_bytes in (1, 20_000, 2**26):
                own = reference.conv_gram(x, *arguments, bias, patch_bytes, out)
                assert own.dtype == out
                assert_close(f"reference, {patch_bytes} bytes", own, expected, BOUNDS[out])
                for method in methods(arguments[1]) if ops.device_types else ():
                    own = torch.ops.consequentialism.conv_gram(x, *arguments, bias, patch_bytes, out, method)
                    assert own.dtype == out
                    assert_close(f"{method}, {patch_bytes} bytes", own, expected, BOUNDS[out])
                    assert_identical("symmetric", own.mT, own)


def empty_gram(size: tuple[int, ...], arguments: Any, bias: bool) -> Tensor:
    """Zeros, but for the bias's count of rows."""
    kernel, *sizes, groups = arguments
    order = size[1] // groups * math.prod(kernel) + bias
    gram = torch.zeros(groups, order, order, dtype=F64)
    if bias:
        gram[:, -1, -1] = size[0] * math.prod(reference.conv_output_size(size[2:], kernel, *sizes))
    return gram


@pytest.mark.parametrize("out", [F64, F32], ids=str)
@pytest.mark.parametrize("name", EMPTY)
def test_without_a_number(name: str, out: torch.dtype) -> None:
    size, *arguments = EMPTY[name]
    for bias, dtype in product((True, False), (out, BF16)):
        x, expected = torch.zeros(size, dtype=dtype), empty_gram(size, arguments, bias).to(out)
        assert_identical("reference", reference.conv_gram(x, *arguments, bias, 2**26, out), expected)
        assert_identical("op", ops.conv_gram(x, *arguments, bias, 2**26, out), expected)
        for method in methods(arguments[1]) if ops.device_types else ():
            own = torch.ops.consequentialism.conv_gram(x, *arguments, bias, 2**26, out, method)
            assert_identical(method, own, expected)


@needs_kernels
@pytest.mark.parametrize("name", GRAMS)
def test_deterministic(name: str) -> None:
    size, *arguments = GRAMS[name]
    x = randn(*size, dtype=F32)
    for method in methods(arguments[1]):
        first, second = (
            torch.ops.consequentialism.conv_gram(x, *arguments, True, 2**20, F32, method) for _ in range(2)
        )
        assert_identical(method, first, second)


@needs_kernels
@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=str)
@pytest.mark.parametrize("name", ["1d", "2d", "depthwise", "3d stride"])
def test_opcheck(name: str, dtype: torch.dtype) -> None:
    size, *arguments = GRAMS[name]
    for layout in ("contiguous", "channels last"):
        x = LAYOUTS[layout](randn(*size, dtype=dtype))
        for method in methods(arguments[1]):
            torch.library.opcheck(
                torch.ops.consequentialism.conv_gram.default,
                (x, *arguments, True, 2**20, F64 if dtype == F64 else F32, method),
                test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
            )


@needs_kernels
def test_bad_arguments() -> None:
    x, rest = randn(2, 4, 5, 5), (True, 2**20, F64)
    good = ((3, 3), (1, 1), (0, 0), (1, 1), 1)

    def call(position: int, value: Any, method: str = "direct", x: Tensor = x) -> Tensor:
        arguments = [*good, *rest, method]
        arguments[position] = value
        return torch.ops.consequentialism.conv_gram(x, *arguments)

    for make, error, words in (
        (lambda: call(0, (3,)), ValueError, ("kernel", "2 numbers", "[3]")),
        (lambda: call(0, (3, 6)), ValueError, ("kernel", "[3, 6]", "fit")),
        (lambda: call(1, (1, 0)), ValueError, ("stride", "at least 1", "[1, 0]")),
        (lambda: call(2, (0, -1)), ValueError, ("padding", "at least 0")),
        (lambda: call(4, 3), ValueError, ("groups", "3")),
        (lambda: call(6, 0), ValueError, ("patch_bytes", "0")),
        (lambda: call(7, BF16), TypeError, ("dtype", "BFloat16")),
        (lambda: call(8, "both"), ValueError, ("method", "both", "'displaced'")),
        (lambda: call(1, (1, 2), "displaced"), ValueError, ("stride", "displaced")),
        (lambda: call(0, (3, 3), x=x[0, 0]), ValueError, ("x", "[5, 5]")),
    ):
        with pytest.raises(error) as caught:
            make()
        for word in words:
            assert word in str(caught.value), f"{word!r} is not in {caught.value}"


@pytest.mark.parametrize("name", ["compiled", "reference"])
@pytest.mark.parametrize(
    ("position", "value", "words"),
    [
        (0, (3,), ("kernel", "2 numbers", "[3]")),
        (0, (3, 0), ("kernel", "at least 1", "[3, 0]")),
        (0, (3, 6), ("kernel", "[3, 6]", "fit")),
        (1, (1, 0), ("stride", "at least 1", "[1, 0]")),
        (1, (1, 1, 1), ("stride", "2 numbers", "[1, 1, 1]")),
        (2, (0, -1), ("padding", "at least 0", "[0, -1]")),
        (2, (), ("padding", "2 numbers")),
        (3, (0, 1), ("dilation", "at least 1", "[0, 1]")),
        (3, (3, 1), ("kernel", "fit")),
        (4, 0, ("groups", "0", "[2, 4, 5, 5]")),
        (4, -2, ("groups", "-2")),
        (4, 3, ("groups", "3")),
    ],
)
def test_arguments_are_refused_by_name(name: str, position: int, value: Any, words: tuple[str, ...]) -> None:
    arguments: list[Any] = [(3, 3), (1, 1), (0, 0), (1, 1), 1]
    arguments[position] = value
    gram = ops.conv_gram if name == "compiled" else reference.conv_gram
    with pytest.raises(ValueError, match=words[0]) as caught:
        gram(randn(2, 4, 5, 5), *arguments, True, 2**20, F64)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("spatial", [0, 4])
def test_an_image_has_channels_and_one_to_three_dimensions_of_positions(spatial: int) -> None:
    ones, shape = (1,) * spatial, (2, 4, *(3,) * spatial)
    for gram in (ops.conv_gram, reference.conv_gram):
        with pytest.raises(ValueError, match=r"x must have the shape \[B, C, \*spatial\], 3 to 5 dimensions, got") as e:
            gram(randn(*shape), ones, ones, (0,) * spatial, ones, 1, True, 2**20, F64)
        assert str(list(shape)) in str(e.value)


def test_the_cheaper_way_is_chosen() -> None:
    def method(
        device: str,
        channels: int,
        kernel: tuple[int, ...],
        positions: tuple[int, ...],
        stride: int = 1,
        dilation: int = 1,
    ) -> str:
        along = len(kernel)
        return cost.conv_method(device, channels, kernel, (stride,) * along, (dilation,) * along, positions)

    assert method("cpu", 64, (3, 3), (32, 32)) == "displaced"
    assert method("cpu", 64, (3, 3), (32, 32), stride=2) == "direct"  # only a stride of 1 has displacements
    assert method("cpu", 64, (1, 1), (32, 32)) == "direct"
    assert method("cpu", 2, (3, 3), (32, 32)) == "direct"  # the kernel would multiply four channels
    assert method("cpu", 3, (3, 3), (32, 32)) == "displaced"
    assert method("cpu", 0, (3, 3), (32, 32)) == "direct"
    assert method("cpu", 64, (7, 7), (1, 1)) == "direct"  # all border
    assert method("cuda", 64, (3, 3), (32, 32)) == "displaced"
    assert method("cuda", 512, (3,), (32,)) == "displaced"
    assert method("cuda", 47, (3, 3), (32, 32)) == "direct"  # tiles that are not full
    assert method("cuda", 64, (1, 2), (32, 32)) == "direct"  # two products in place of three
    assert method("cuda", 64, (3, 3), (32, 32), stride=2) == "direct"
    assert method("cuda", 64, (3, 3), (32, 32), dilation=2) == "direct"
    assert method("cuda", 64, (3, 3), (2, 32)) == "direct"  # windows that share no position
    assert method("cuda", 64, (1, 3), (2, 32), dilation=1) == "displaced"
    assert method("xpu", 64, (3, 3), (32, 32)) == "direct"
    # 13 products instead of 45 of 3x3, where the border costs nothing.
    huge = (10**6, 10**6)
    ratio = cost.displaced_flops(64, (3, 3), huge) / cost.direct_flops(64, (3, 3), huge)
    assert ratio == pytest.approx(2 * 13 / 81, rel=1e-3)


def peak_bytes(layer: torch.nn.Module, x: Tensor) -> int:
    """The most memory that a step holds beyond what it began with, from the profiler's allocation events."""
    layer(x).sum().backward()
    layer.zero_grad()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        layer(x).sum().backward()
    events = profiler.profiler.kineto_results.events()
    held = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


BUDGET = 2**20
MEMORY: dict[str, tuple[tuple[int, ...], tuple[Any, ...]]] = {
    "unfolded": ((8, 12, 32, 32), (12, 8, 3, 2, 1)),
    "displaced": ((8, 32, 32, 32), (32, 8, 3, 1, 1)),
    "depthwise": ((8, 32, 32, 32), (32, 32, 3, 1, 1, 1, 32)),
    "one image": ((1, 12, 96, 96), (12, 8, 3, 2, 1)),
}


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("backend", [b for b in ("cpu", "reference") if cw.backends()[b] == "available"])
@pytest.mark.parametrize("name", MEMORY)
def test_memory_beyond_torchs_is_bounded_by_the_budget(name: str, backend: str, dtype: torch.dtype) -> None:
    (batch, *size), arguments = MEMORY[name]
    own = cw.Conv2d(*arguments, patch_bytes=BUDGET, backend=backend, dtype=dtype)
    plain = torch.nn.Conv2d(*arguments, dtype=dtype)
    inputs = own.weight[0].numel() + 1
    matrices = 16 * own.groups * inputs**2 * 4  # Gram, inverse and what their factor works with
    for times in (1, 4):
        x = randn(times * batch, *size, dtype=dtype)
        extra = peak_bytes(own, x) - peak_bytes(plain, x)
        patches = x.numel() * 9 * 4
        assert extra <= BUDGET + matrices, f"{extra} bytes more than torch's; all patches are {patches}"
