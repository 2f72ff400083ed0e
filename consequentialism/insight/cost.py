"""What emending a layer costs: predicted from operations, and measured on this machine."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..backend import compiled as ops
from ..options import Options
from ..solve import cost
from .figures import Figures
from .layers import Seen

REPEATS = 3


class Cost(NamedTuple):
    """The cost of forward and backward of one layer.

    Attributes:
        predicted: Operations in those of the plain layer; None for an embedding.
        measured: Seconds in those of the plain layer, the least of some repeats each.
        plain_ms: The plain layer's milliseconds.
        retries: How many factors broke down and were tried again with more damping, in one pass.
    """

    predicted: float | None
    measured: float
    plain_ms: float
    retries: int


def cost_of(seen: Seen, found: Figures, options: Options) -> Cost:
    """Train twins of a layer on what it saw, plain and emended by turns."""
    plain, emended = seen.twin(False, options), seen.twin(True, options)
    before = ops.breakdowns()
    _pass(emended, seen)
    retries = ops.breakdowns() - before
    _pass(plain, seen)
    times: dict[int, list[float]] = {id(plain): [], id(emended): []}
    for _ in range(REPEATS):
        for layer in (plain, emended):
            start = time.perf_counter()
            _pass(layer, seen)
            times[id(layer)].append(time.perf_counter() - start)
    least = min(times[id(plain)])
    return Cost(_predicted(seen, found, options), min(times[id(emended)]) / least, 1e3 * least, retries)


def _predicted(seen: Seen, found: Figures, options: Options) -> float | None:
    if found.form == "diagonal":
        return None
    rows, inputs, outputs = found.rows, found.inputs, found.outputs // found.groups
    dtype = seen.errors[0].dtype
    if seen.form.like is nn.Linear:
        plan = cost.choose(rows, inputs, outputs, dtype, options)
    else:
        plan = cost.conv_plan(rows, inputs, outputs, dtype, seen.errors[0].device.type, options)
    extra = cost.flops(plan, rows, inputs, outputs, options.iterations if plan.solver == "cg" else 0)
    return 1 + extra / max(6 * rows * inputs * outputs, 1)


def _pass(layer: Any, seen: Seen) -> None:
    """Forward and backward of every call."""
    for x, dy in zip(seen.inputs, seen.errors, strict=True):
        x = x.detach().requires_grad_() if x.is_floating_point() else x
        y: Tensor = layer(x)
        wanted = [p for p in layer.parameters() if p.requires_grad] + ([x] if x.requires_grad else [])
        torch.autograd.grad(y, wanted, dy)
    if dy.device.type == "cuda":
        torch.cuda.synchronize(dy.device)
