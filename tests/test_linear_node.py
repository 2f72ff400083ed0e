"""The node of autograd's graph that `csrc/autograd.cpp` makes: whatever one may do with torch's own nodes."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from cases import assert_identical, needs_kernels, randn
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import consequentialism as cw

pytestmark = needs_kernels

# By an inverse on the gradient's side, and by emended inputs.
PLANS = {"gradient": (8, 16), "primal": (90, 6), "input": (8, 64)}


def layer_and_input(plan: str, bias: bool = True) -> tuple[cw.Linear, Tensor]:
    rows, inputs = PLANS[plan]
    torch.manual_seed(0)
    layer = cw.Linear(inputs, 200 if plan == "input" else 4, bias, dtype=torch.float64)
    return layer, randn(rows, inputs).requires_grad_()


def gradients(layer: cw.Linear, x: Tensor, y: Tensor, **options: Any) -> list[Tensor]:
    return list(torch.autograd.grad(y, [x, *layer.parameters()], randn(*y.shape, seed=5), **options))


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for i, (own, other) in enumerate(zip(found, expected, strict=True)):
        assert_identical(str(i), own, other)


plans = pytest.mark.parametrize("plan", PLANS)


@plans
def test_it_is_this_node(plan: str) -> None:
    layer, x = layer_and_input(plan)
    y = layer(x)
    assert y.grad_fn is not None
    assert y.grad_fn.name() == "consequentialism::EmendedLinearBackward"
    assert [type(node).__name__ for node, _ in y.grad_fn.next_functions] == ["AccumulateGrad"] * 3
    assert len(layer_and_input(plan, bias=False)[0](x).grad_fn.next_functions) == 2


@plans
def test_a_graph_that_is_kept_gives_the_same_again_and_one_that_is_not_an_error(plan: str) -> None:
    layer, x = layer_and_input(plan)
    y = layer(x)
    first = gradients(layer, x, y, retain_graph=True)
    assert_same(gradients(layer, x, y), first)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        gradients(layer, x, y)


@plans
def test_hooks_on_what_is_saved(plan: str) -> None:
    layer, x = layer_and_input(plan)
    expected = gradients(layer, x, layer(x))
    packed: list[Tensor] = []
    unpacked: list[int] = []

    def pack(tensor: Tensor) -> int:
        packed.append(tensor.detach().clone())
        return len(packed) - 1

    def unpack(place: int) -> Tensor:
        unpacked.append(place)
        return packed[place]

    with saved_tensors_hooks(pack, unpack):
        y = layer(x)
    assert len(packed) >= 2
    assert not unpacked
    assert_same(gradients(layer, x, y), expected)
    assert sorted(unpacked) == list(range(len(packed)))


@plans
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints(plan: str, reentrant: bool) -> None:
    layer, x = layer_and_input(plan)
    layer(x).backward(randn(*layer(x).shape, seed=5))
    expected = [parameter.grad for parameter in (x, *layer.parameters())]
    for parameter in (x, *layer.parameters()):
        parameter.grad = None
    y = checkpoint(layer, x, use_reentrant=reentrant)
    y.backward(randn(*y.shape, seed=5))
    assert_same([p.grad for p in (x, *layer.parameters())], expected)  # type: ignore[misc, arg-type]


def test_a_change_in_place_of_what_is_saved_is_an_error() -> None:
    layer, x = layer_and_input("gradient")
    for changed in (x, layer.weight):
        y = layer(x)
        with torch.no_grad():
            changed.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            gradients(layer, x, y)


class Ignored(torch.autograd.Function):
    """A copy that hands no gradient on."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return y.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> None:
        return None


def test_an_output_that_nothing_depends_on_has_a_gradient_of_zeros() -> None:
    layer, x = layer_and_input("gradient")
    Ignored.apply(layer(x)).sum().backward()
    for parameter in (x, *layer.parameters()):
        assert parameter.grad is not None
        assert not parameter.grad.any()


@contextmanager
def seen(names: list[str]) -> Iterator[None]:
    class Seeing(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.append(function.__name__)
            return function(*args, **(kwargs or {}))

    with Seeing():
        yield


@pytest.mark.parametrize("bias", [True, False])
def test_modes_and_profilers_see_the_ops(bias: bool) -> None:
    layer, x = layer_and_input("gradient", bias)
    y = layer(x)
    expected = gradients(layer, x, y)
    names: list[str] = []
    with seen(names):
        assert_same(gradients(layer, x, layer(x)), expected)
    assert {"gram_inverse.default", "weight_grad.default", "mm.default"} <= set(names)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        assert_same(gradients(layer, x, layer(x)), expected)
    found = {event.name for event in profile.events()}
    assert {"consequentialism::gram_inverse", "consequentialism::weight_grad", "aten::mm"} <= found


def test_the_op_refuses_what_it_has_no_rule_for() -> None:
    layer, x = layer_and_input("gradient")
    op, plan = torch.ops.consequentialism.emended_linear, ("dual", "gradient", 1.0, "relative", "nlms")
    with pytest.raises(RuntimeError, match="functorch transform"):
        torch.func.grad(lambda v: op(v, layer.weight, layer.bias, *plan).sum())(x)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x.detach(), randn(*x.shape))
        with pytest.raises(RuntimeError, match="no forward-mode derivative"):
            op(dual, layer.weight, layer.bias, *plan)
    for i, (word, wrong) in enumerate(
        {"form": "both", "applied_to": "none", "damping_mode": "x", "scale": "y"}.items()
    ):
        told = list(plan)
        told[i + (i > 1)] = wrong
        with pytest.raises(ValueError, match=word):
            op(x, layer.weight, layer.bias, *told)


def test_a_graph_is_freed() -> None:
    layer, x = layer_and_input("gradient")
    gc.disable()
    try:
        kept = weakref.ref(x)
        y = layer(x)
        layer(y[:, :1].repeat(1, 16)).sum().backward()
        del x, y
        assert kept() is None
    finally:
        gc.enable()


def test_a_deep_graph_is_freed_without_recursion() -> None:
    layer = cw.Linear(2, 2)
    y = torch.ones(1, 2)
    for _ in range(30_000):
        y = layer(y)
    del y


def test_threads_share_a_graph() -> None:
    layer, x = layer_and_input("gradient")
    y = layer(x)
    expected, found = gradients(layer, x, y, retain_graph=True), []

    def run() -> None:
        for _ in range(50):
            found.append(gradients(layer, x, y, retain_graph=True))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 200
    for own in found:
        assert_same(own, expected)


@plans
@pytest.mark.parametrize("bias", [True, False])
def test_compiled_autograd_calls_it(plan: str, bias: bool) -> None:
    layer, x = layer_and_input(plan, bias)
    parameters = [x, *layer.parameters()]
    layer(x).square().sum().backward()
    expected = [parameter.grad for parameter in parameters]
    for _ in range(2):
        for parameter in parameters:
            parameter.grad = None
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
            layer(x).square().sum().backward()
        assert_same([p.grad for p in parameters], expected)  # type: ignore[misc, arg-type]
    layer.weight.requires_grad_(False)
    x.grad = None
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        layer(x).square().sum().backward()
    assert_identical("dx", x.grad, expected[0])


@pytest.mark.parametrize("needs_weight", [True, False])
@pytest.mark.parametrize("form", ["dual", "primal"])
@pytest.mark.parametrize("side", ["input", "gradient", "fused"])
def test_the_op_gives_zeros_for_no_rows(side: str, form: str, needs_weight: bool) -> None:
    x, weight, bias = randn(0, 4).requires_grad_(), randn(3, 4).requires_grad_(needs_weight), randn(3).requires_grad_()
    settings = (form, side, 1.0, "absolute", "raw", None, 0.0)
    torch.ops.consequentialism.emended_linear(x, weight, bias, *settings).sum().backward()
    for one in (x, weight, bias) if needs_weight else (x, bias):
        assert_identical("gradient", one.grad, torch.zeros_like(one))


IGNORED = {
    "compiled": lambda: (cw.Linear(16, 4), torch.ones(8, 16)),
    "compiled, of emended inputs": lambda: (cw.Linear(64, 200), torch.ones(8, 64)),
    "reference": lambda: (cw.Linear(16, 4, backend="reference"), torch.ones(8, 16)),
    "convolution": lambda: (cw.Conv1d(3, 4, 2), torch.ones(2, 3, 9)),
    "embedding": lambda: (cw.Embedding(7, 3), torch.tensor([1, 2])),
}


@pytest.mark.parametrize("form", IGNORED)
def test_compiled_autograd_takes_a_missing_gradient_for_zeros_as_eager_mode_does(form: str) -> None:
    layer, x = IGNORED[form]()
    inputs = [x.requires_grad_()] if x.is_floating_point() else []
    parameters = [*inputs, *layer.parameters()]
    Ignored.apply(layer(x)).sum().backward()
    expected = [torch.zeros_like(parameter) for parameter in parameters]
    assert_same([p.grad for p in parameters], expected)  # type: ignore[misc, arg-type]
    for _ in range(2):
        for parameter in parameters:
            parameter.grad = None
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
            Ignored.apply(layer(x)).sum().backward()
        assert_same([p.grad for p in parameters], expected)  # type: ignore[misc, arg-type]
