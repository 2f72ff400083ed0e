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


class Binary(nn.Linear):
    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return nn.Module.__getattr__(self, "weight").sign()  # type: ignore[no-any-return]


class Asked(nn.Linear):
    def __getattr__(self, name: str) -> Any:
        found = super().__getattr__(name)
        return found.sign() if name == "weight" else found


@pytest.mark.parametrize("cls", [Binary, Asked])
def test_a_weight_that_is_no_parameter_of_that_name_is_asked_of_python(cls: type[nn.Linear]) -> None:
    layer, x = nn.Sequential(cls(5, 4)), randn(3, 5, dtype=F32)
    expected = layer(x).detach()
    cw.convert(layer)
    for _ in range(3):
        assert_identical("y", layer(x), expected)


def test_what_an_instance_has_of_its_own_counts() -> None:
    x = randn(3, 5, dtype=F32)
    layer = cw.Linear(5, 4, bias=False)
    layer.__dict__["weight"] = torch.ones(4, 5)
    assert_identical("y", layer(x), nn.functional.linear(x, torch.ones(4, 5)))
    layer = cw.Linear(5, 4)
    layer.emended_forward = lambda input: input.sum()  # type: ignore[method-assign]
    assert_identical("y", layer(x), x.sum())

    class Gathering(dict[str, Any]):
        def __getitem__(self, name: str) -> Any:
            return super().__getitem__(name) * 2

    layer = cw.Linear(5, 4)
    layer._parameters = Gathering(layer._parameters)
    assert not served(layer, x)


def test_methods_of_a_mixin_count() -> None:
    class Mixin:
        def emended_forward(self, input: Tensor) -> Tensor:
            return 2 * super().emended_forward(input)  # type: ignore[misc, no-any-return]

    class Doubled(Mixin, cw.Linear):
        pass

    class Damped(cw.Linear):
        def options_now(self) -> cw.Options:
            return super().options_now().changed(damping=100.0)

    x, dy = randn(3, 5, dtype=F32), randn(3, 4, seed=1, dtype=F32)
    layer = Doubled(5, 4)
    torch.testing.assert_close(layer(x), 2 * nn.functional.linear(x, layer.weight, layer.bias))
    damped = Damped(5, 4)
    (dw,) = torch.autograd.grad(damped(x), [damped.weight], dy)
    assert_identical("dw", dw, cw.emended_weight_grad(x, dy, damping=100.0)[0])


def test_registered_classes_keep_it() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel = nn.Parameter(randn(5, 4, dtype=F32))
            self.bias = nn.Parameter(randn(4, seed=1, dtype=F32))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.kernel + self.bias

    cw.register(Own, like=nn.Linear, weight="kernel", transposed=True)
    layer, x = cw.convert(nn.Sequential(Own())), randn(3, 5, dtype=F32)
    layer(x)
    assert served(layer[0], x)  # type: ignore[arg-type]


def test_parameters_may_be_replaced_while_python_plans() -> None:
    assert ops.module is not None
    layer, x = cw.Linear(5, 4), randn(6, 5, dtype=F32)
    expected, junk = nn.functional.linear(x, layer.weight, layer.bias).detach(), []

    def replacing(*arguments: Any) -> Any:
        layer.weight, layer.bias = nn.Parameter(torch.zeros(4, 5)), nn.Parameter(torch.zeros(4))
        junk.extend(nn.Parameter(torch.full((7,), 3.0)) for _ in range(200))
        return functional.compiled_plan(*arguments)

    ops.module.set_planner(replacing)
    try:
        torch.testing.assert_close(layer(x), expected)
    finally:
        ops.module.set_planner(functional.compiled_plan)


def test_a_symbolic_trace_does_not_bake_the_output_in() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = cw.Linear(5, 4)
            self.register_buffer("rows", randn(3, 5, dtype=F32))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.layer(self.rows)

    with pytest.raises(TypeError, match="Proxy"):
        torch.fx.symbolic_trace(Model())


def test_an_object_without_attributes_is_an_error() -> None:
    assert ops.module is not None
    with pytest.raises(AttributeError):
        ops.module.linear_forward(object(), randn(3, 5, dtype=F32))
