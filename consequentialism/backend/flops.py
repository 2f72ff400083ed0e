"""How many floating-point operations the package's ops take, told to `torch.utils.flop_counter.FlopCounterMode`.

As in `cost`: a multiplication and an addition are two, a symmetric product takes half of them, factor and inverse
together ``n^3``. What an op leaves to torch's own operators is counted there.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

from ..solve import cost
from .reference import conv_output_size

COUNTER = "torch.utils.flop_counter"
Shape = Sequence[int]


def _gram_sizes(x: Shape, bias: bool, form: str) -> tuple[int, int]:
    """The Gram's order ``n`` and the length of the sums in it."""
    rows, inputs = x[0], x[1] + bias
    return (rows, inputs) if form == "dual" else (inputs, rows)


def input_gram(x: Shape, bias: bool, form: str, **_: Any) -> int:
    order, length = _gram_sizes(x, bias, form)
    return order**2 * length


def damped_inverse(gram: Shape, *_: Any, **__: Any) -> int:
    return math.prod(gram[:-2]) * gram[-1] ** 3


def gram_inverse(x: Shape, bias: bool, form: str, *_: Any, **__: Any) -> int:
    order, _length = _gram_sizes(x, bias, form)
    return input_gram(x, bias, form) + order**3


def emended_input(x: Shape, bias: bool, form: str, *_: Any, **__: Any) -> int:
    order, length = _gram_sizes(x, bias, form)
    return gram_inverse(x, bias, form) + 2 * order**2 * length


def weight_grad(dy: Shape, rows: Shape, column: Shape, **_: Any) -> int:
    return 2 * dy[0] * dy[1] * (rows[1] + (column[0] > 0))


def fused_weight_grad(x: Shape, dy: Shape, bias: bool, *_: Any, **__: Any) -> int:
    form = "dual" if x[0] <= x[1] + bias else "primal"
    return emended_input(x, bias, form) + 2 * dy[0] * dy[1] * (x[1] + bias)


def emended_linear(x: Shape, weight: Shape, bias: Shape | None, form: str, applied_to: str, *_: Any, **__: Any) -> int:
    """The operations of forward; backward is made of other ops."""
    rows = math.prod(x[:-1]), x[-1]
    forward = 2 * math.prod(x) * weight[0]
    if applied_to == "fused":
        return forward
    return forward + (emended_input if applied_to == "input" else gram_inverse)(rows, bias is not None, form)


def conv_gram(
    x: Shape,
    kernel: Shape,
    stride: Shape,
    padding: Shape,
    dilation: Shape,
    groups: int,
    bias: bool,
    *method: Any,
    **_: Any,
) -> int:
    channels = x[1] // groups
    positions = conv_output_size(x[2:], kernel, stride, padding, dilation)
    inputs = channels * math.prod(kernel)
    displaced = "displaced" in method
    own = (cost.displaced_flops if displaced else cost.direct_flops)(channels, kernel, positions)
    border = math.prod(positions) * (2 * inputs + 1) if bias else 0
    return x[0] * groups * (int(own) + border)


FORMULAS: dict[str, Callable[..., int]] = {
    formula.__name__: formula
    for formula in (
        input_gram,
        damped_inverse,
        gram_inverse,
        emended_input,
        weight_grad,
        fused_weight_grad,
        emended_linear,
        conv_gram,
    )
}


def count_ops_of(namespace: str) -> None:
    """Have torch's counter count the ops of a namespace of `torch.ops`: now, or when it is imported.

    It imports Triton, which takes as long as the rest of this package.
    """
    if COUNTER in sys.modules:
        _register(sys.modules[COUNTER], namespace)
    else:
        sys.meta_path.insert(0, _Registration(namespace))


def _register(counter: ModuleType, namespace: str) -> None:
    ops = getattr(torch.ops, namespace)
    for name, formula in FORMULAS.items():
        if hasattr(ops, name):
            counter.register_flop_formula(getattr(ops, name))(formula)


class _Registration(importlib.abc.MetaPathFinder):
    """Finds nothing itself: it is asked when the counter is imported, and adds to what the other finders find."""

    def __init__(self, namespace: str) -> None:
        self.namespace = namespace

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != COUNTER or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register(module, self.namespace)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
