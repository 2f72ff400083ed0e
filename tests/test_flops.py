"""`torch.utils.flop_counter.FlopCounterMode` counts the package's ops; against counts by hand."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from cases import F32, needs_kernels, randn
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import consequentialism as cw
from consequentialism.backend import compiled as ops

SETTINGS = (1.0, "relative", "raw")


def counted(call: Any, *arguments: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        call(*arguments)
    return counter.get_total_flops()


def backpropagate(layer: nn.Module, x: Tensor) -> None:
    layer(x).sum().backward()


@needs_kernels
def test_each_op() -> None:
    x, dy = randn(8, 20, dtype=F32), randn(8, 30, dtype=F32)
    gram = 8 * 8 * 21  # half of 2 N^2 I
    assert counted(ops.input_gram, x, True, "dual") == gram
    assert counted(ops.input_gram, x, False, "primal") == 20 * 20 * 8
    assert counted(ops.gram_inverse, x, True, "dual", *SETTINGS) == gram + 8**3
    applied = gram + 8**3 + 2 * 8 * 8 * 21
    assert counted(ops.emended_input, x, True, "dual", *SETTINGS) == applied
    assert counted(ops.damped_inverse, randn(3, 5, 5) @ randn(3, 5, 5).mT, *SETTINGS, 5, 5) == 3 * 5**3
    assert counted(ops.weight_grad, dy, x, x.new_ones(8)) == 2 * 8 * 30 * 21
    assert counted(ops.weight_grad, dy, x, x.new_ones(0)) == 2 * 8 * 30 * 20
    assert counted(ops.fused_weight_grad, x, dy, True, *SETTINGS) == applied + 2 * 8 * 30 * 21


@needs_kernels
def test_gram_of_a_convolution() -> None:
    x = randn(3, 4, 9, 8, dtype=F32)
    for groups, stride, bias in ((1, 2, True), (2, 1, False), (4, 1, True)):
        rows = 3 * ((9 + 2 - 3) // stride + 1) * ((8 + 2 - 3) // stride + 1)
        arguments = (x, [3, 3], [stride] * 2, [1, 1], [1, 1], groups, bias, 2**20, F32, "direct")
        expected = groups * rows * (4 // groups * 9 + bias) ** 2
        assert counted(torch.ops.consequentialism.conv_gram, *arguments) == expected


@needs_kernels
def test_layers() -> None:
    x = randn(8, 20, dtype=F32).requires_grad_()
    forward = 2 * 8 * 20 * 30
    emended = 8 * 8 * 21 + 8**3 + 2 * 8 * 8 * 21
    dw = 2 * 8 * 30 * 21
    assert counted(backpropagate, cw.Linear(20, 30), x) == 2 * forward + emended + dw
    image = randn(10, 4, 9, 8, dtype=F32).requires_grad_()
    plain = counted(backpropagate, nn.Conv2d(4, 6, 3, stride=2), image)
    gram = 10 * 4 * 3 * 37**2
    assert counted(backpropagate, cw.Conv2d(4, 6, 3, stride=2), image) == plain + gram + 37**3 + 2 * 6 * 37 * 37


@needs_kernels
@pytest.mark.parametrize("first", ["consequentialism", "torch.utils.flop_counter"])
def test_whichever_is_imported_first(first: str) -> None:
    code = f"""
import sys, {first}, consequentialism as cw
assert ({first!r} != "consequentialism") or "torch.utils.flop_counter" not in sys.modules, "imported for nothing"
import torch, torch.utils.flop_counter as counter
assert torch.ops.consequentialism.conv_gram in counter.flop_registry
"""
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr
