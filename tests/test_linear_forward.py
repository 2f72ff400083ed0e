"""The forward of a linear layer without Python: the same bits, and Python's again wherever something is unusual."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from cases import DTYPES, F32, assert_identical, needs_kernels, randn
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import consequentialism as cw
from consequentialism.backend import compiled as ops
from consequentialism.functional import linear as functional

pytestmark = needs_kernels


class Functions(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


class Operations(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


class Sub(Tensor):
    pass


def served(layer: cw.Linear, x: Any) -> bool:
    assert ops.module is not None
    return ops.module.linear_forward(layer, x) is not None


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(8, 16), (70, 9), (9,), (2, 3, 40)], ids=str)
def test_same_bits_as_without_it(shape: tuple[int, ...], dtype: torch.dtype, bias: bool) -> None:
    layer = cw.Linear(shape[-1], 6, bias, dtype=dtype)
    dy = randn(*shape[:-1], 6, seed=1, dtype=dtype)
    results = []
    for forward in (layer, layer.emended_forward):
        x = randn(*shape, dtype=dtype).requires_grad_()
        y = forward(x)
        results.append((y, *torch.autograd.grad(y, (x, *layer.parameters()), dy)))
    assert served(layer, randn(*shape, dtype=dtype))
    for i, (own, expected) in enumerate(zip(*results, strict=True)):
        assert_identical(str(i), own, expected)


@pytest.mark.parametrize(
    "mode", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu"), Functions, Operations, nullcontext]
)
def test_modes_are_left_to_python(mode: Callable[[], AbstractContextManager[Any]]) -> None:
    layer, x = cw.Linear(5, 4), randn(3, 5, dtype=F32)
    with mode():
        assert served(layer, x) == (mode is nullcontext)


def test_what_is_unusual_is_left_to_python() -> None:
    layer, x = cw.Linear(5, 4), randn(3, 5, dtype=F32)
    unusual: list[Any] = [
        x.as_subclass(Sub),
        x.double(),
        x[:0],
        x[:, :4],
        x.to_sparse(),
        torch.nested.nested_tensor([x, x]),
        x.to("meta"),
        [1.0],
    ]
    assert served(layer, x)
    assert not [value for value in unusual if served(layer, value)]
    with torch.autograd.forward_ad.dual_level():
        assert not served(layer, torch.autograd.forward_ad.make_dual(x, x))
    torch.func.vmap(lambda row: [served(layer, row), row][1])(x)
    for options in ({"solver": "cg"}, {"backend": "reference"}):
        assert not served(cw.Linear(5, 4, **options), x)  # type: ignore[arg-type]
    cw.set_samples(layer, 2)
    assert not served(layer, x)
    cw.set_samples(layer, None)
    assert served(layer, x)
    assert not served(layer.requires_grad_(False), x)


def test_a_shape_is_planned_once_and_new_options_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ops.module is not None
    calls = []

    def counted(x: Tensor, *arguments: Any) -> Any:
        calls.append(tuple(x.shape))
        return functional.compiled_plan(x, *arguments)

    layer = cw.Linear(5, 4)
    ops.module.set_planner(counted)
    try:
        for rows in (3, 3, 6, 3):
            layer(randn(rows, 5, dtype=F32))
        assert calls == [(3, 5), (6, 5)]
        layer.damping = 0.25
        x, dy = randn(3, 5, dtype=F32), randn(3, 4, seed=1, dtype=F32)
        (dw,) = torch.autograd.grad(layer(x), [layer.weight], dy)
        assert calls[2:] == [(3, 5)]
    finally:
        ops.module.set_planner(functional.compiled_plan)
    expected, _ = cw.emended_weight_grad(x, dy, damping=0.25)
    assert_identical("dw", dw, expected)


def test_options_of_one_batch_are_not_kept_alive() -> None:
    layer, x = cw.Linear(5, 4), randn(3, 5, dtype=F32)
    cw.set_samples(layer, torch.tensor(2))
    before = sys.getrefcount(layer.options)
    layer(x)
    after = sys.getrefcount(layer.options)
    assert after == before


def test_a_subclass_with_its_own_forward_of_emended_inputs_is_asked() -> None:
    class Doubled(cw.Linear):
        def emended_forward(self, input: Tensor) -> Tensor:
            return 2 * super().emended_forward(input)

    layer, x = Doubled(5, 4), randn(3, 5, dtype=F32)
    torch.testing.assert_close(layer(x), 2 * nn.functional.linear(x, layer.weight, layer.bias))
