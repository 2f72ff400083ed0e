"""``batch_factors``: the same gradients as layers on their own, in one call, and nothing left behind."""

from __future__ import annotations

import gc
import threading
from typing import Any

import pytest
import torch
from cases import (
    BF16,
    DTYPES,
    F16,
    F32,
    F64,
    SHAPES,
    TOLERANCE,
    assert_close,
    assert_identical,
    needs_kernels,
    oracle,
    randn,
)
from factor_batch_helpers import assert_same, batch_of, calls, gradients, network, pair
from torch import Tensor, nn

import consequentialism as cw
from consequentialism import reference
from consequentialism.backend import compiled as ops

__all__ = ["calls"]


@needs_kernels
@pytest.mark.parametrize(
    "options", [(1.0, "relative", "nlms"), (1e-5, "relative", "raw"), (0.5, "absolute", "gradient")], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_op_is_the_single_ops(dtype: torch.dtype, options: tuple[Any, ...]) -> None:
    xs = [randn(rows, inputs, seed=i, dtype=dtype) for i, (rows, inputs, _) in enumerate([*SHAPES, (330, 400, 1)])]
    xs.append(xs[3].expand(4, *xs[3].shape)[2].t())  # another layout
    count = len(xs)
    biases = [i % 2 == 0 for i in range(count)]
    forms = ["dual" if i % 3 else "primal" for i in range(count)]
    applied = [i % 4 < 2 for i in range(count)]
    kept, columns = ops.emended_inputs(xs, biases, forms, applied, *options)
    truth = reference.emended_inputs(xs, biases, forms, applied, *options)
    for i, (x, bias, form) in enumerate(zip(xs, biases, forms, strict=True)):
        if applied[i]:
            expected = ops.emended_input(x, bias, form, *options)
            assert_identical(f"column {i}", columns[i], expected[1])
        else:
            expected = (ops.gram_inverse(x, bias, form, *options),)
            assert columns[i].shape == (0,)
        assert_identical(f"kept {i}", kept[i], expected[0])
        assert [kept[i].dtype, columns[i].dtype] == [truth[0][i].dtype, truth[1][i].dtype]
        assert [kept[i].shape, columns[i].shape] == [truth[0][i].shape, truth[1][i].shape]
        if options[0] == 1.0:
            assert_close(f"reference {i}", kept[i], truth[0][i], TOLERANCE[dtype])


@needs_kernels
@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    op = torch.ops.consequentialism.emended_inputs.default
    xs = [randn(5, 7, dtype=dtype), randn(7, 5, seed=1, dtype=dtype).t(), randn(3, 2, seed=2, dtype=dtype)]
    arguments = (xs, [True, False, True], ["dual", "primal", "dual"], [True, False, False], 0.5, "relative", "nlms")
    torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"))


@needs_kernels
def test_bad_arguments_of_the_op() -> None:
    op, x = torch.ops.consequentialism.emended_inputs, randn(4, 3)
    for arguments, words in (
        (([x, x], [True], ["dual"] * 2, [True] * 2, 1.0, "relative", "nlms"), "equally long, got 2, 1, 2 and 2"),
        (([x], [True], ["both"], [True], 1.0, "relative", "nlms"), "form must be 'dual' or 'primal', got 'both'"),
        (([x], [True], ["dual"], [True], 0.0, "relative", "nlms"), "damping must be finite and above 0, got 0"),
        (([x, x[0]], [True] * 2, ["dual"] * 2, [True] * 2, 1.0, "relative", "nlms"), r"x must have the shape \[N, I\]"),
    ):
        with pytest.raises(ValueError, match=words):
            op(*arguments)


@needs_kernels
def test_one_bad_matrix_does_not_touch_the_others() -> None:
    xs = [randn(40, 50, seed=i, dtype=F32) for i in range(5)]
    xs[1] = torch.zeros(40, 50)
    xs[2][3, 3] = float("nan")
    xs[3] = xs[3] * 1e-22  # squares underflow in float32
    kept, _ = ops.emended_inputs(xs, [True] * 5, ["dual"] * 5, [True] * 5, 1.0, "relative", "raw")
    for x, own in zip(xs, kept, strict=True):
        expected = ops.emended_input(x, True, "dual", 1.0, "relative", "raw")[0]
        assert torch.equal(own, expected) or (own.isnan().all() and expected.isnan().all())
    assert kept[2].isnan().all()
    assert kept[0].isfinite().all()


# Training.


@pytest.mark.parametrize("options", [{}, {"damping": 1e-5}, {"scale": "gradient", "damping_mode": "absolute"}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 8, 40, 330])
def test_bitwise_the_layers_on_their_own(rows: int, dtype: torch.dtype, options: dict) -> None:
    alone, batched = pair(dtype, (12, 20, 340, 5), **options)
    x, dy = randn(rows, 12, dtype=dtype), randn(rows, 5, seed=1, dtype=dtype)
    assert_same(alone, batched, lambda model: model(x).backward(dy))


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_against_float64(backend: str) -> None:
    model = cw.convert(network(), batch_factors=True, backend=backend, damping=0.3)
    x, dy = randn(8, 12), randn(8, 5, seed=1)
    seen: list[tuple[Tensor, Tensor]] = []

    def watch(layer: nn.Module, args: tuple[Tensor], out: Tensor) -> None:
        out.register_hook(lambda dy: seen.append((args[0].detach(), dy)))

    for layer in model[::2]:
        layer.register_forward_hook(watch)
    model(x).backward(dy)
    for layer, (own_x, own_dy) in zip(model[::2], reversed(seen), strict=True):
        dw, db = oracle(own_x, own_dy, layer.bias is not None, damping=0.3)
        assert_close("dw", layer.weight.grad, dw, TOLERANCE[F64])
        assert_close("db", None if layer.bias is None else layer.bias.grad, db, TOLERANCE[F64])


@needs_kernels
def test_one_call_a_backward(calls: list[int]) -> None:
    _, model = pair()
    for step in range(1, 3):
        out = model(randn(8, 12))
        assert len(calls) == step - 1, "prepared in forward"
        assert len(batch_of(model)) == 3
        out.sum().backward()
        assert calls == [3] * step
        assert len(batch_of(model)) == 0


@needs_kernels
def test_layers_with_other_options_are_apart(calls: list[int]) -> None:
    alone, batched = pair(widths=(12, 20, 7, 5, 6))
    for model in (alone, batched):
        model[2].damping = model[4].damping = 0.1
    x = randn(8, 12)
    assert_same(alone, batched, lambda model: model(x).sum().backward())
    assert sorted(calls) == [2, 2]


def test_options_are_those_of_forward() -> None:
    alone, batched = pair()

    def train(model: nn.Module) -> None:
        out = model(randn(8, 12))
        model[0].damping = 30.0
        out.sum().backward()

    assert_same(alone, batched, train)


def test_several_forwards_before_a_backward(calls: list[int]) -> None:
    alone, batched = pair()

    def train(model: nn.Module) -> Tensor:
        first, second = model(randn(8, 12)), model(randn(9, 12, seed=2))
        third = model(randn(4, 12, seed=3))
        (first.sum() + second.square().sum()).backward()
        return third.detach()

    assert_same(alone, batched, train)
    assert sum(calls) == 6, "the third forward has no backward"


def test_each_forward_has_its_own_backward(calls: list[int]) -> None:
    alone, batched = pair()

    def train(model: nn.Module) -> None:
        losses = [model(randn(8, 12, seed=s)).square().sum() for s in range(3)]
        losses[1].backward()
        losses[2].backward()
        losses[0].backward()

    assert_same(alone, batched, train)
    assert sum(calls) == 9


def test_gradient_accumulation() -> None:
    alone, batched = pair()

    def train(model: nn.Module) -> None:
        for s in range(3):
            model(randn(8, 12, seed=s)).square().sum().backward()

    assert_same(alone, batched, train)


def test_a_dropped_graph_is_neither_kept_nor_factored(calls: list[int]) -> None:
    _, model = pair()
    gc.disable()  # by counting references alone
    try:
        for s in range(5):
            model(randn(8, 12, seed=s))
            assert len(batch_of(model)) == 0
    finally:
        gc.enable()
    out = model(randn(8, 12))
    model(randn(8, 12)).sum().backward()
    assert sum(calls) == 3
    assert len(batch_of(model)) == 3
    del out
    assert len(batch_of(model)) == 0


def test_inputs_are_freed_with_backward() -> None:
    _, model = pair()
    x = randn(8, 12)
    out = model(x)
    node = out.grad_fn
    out.sum().backward()
    assert node is not None
    waiting = [node]
    deferred = []
    while waiting:
        one = waiting.pop()
        deferred += [one.deferred] if hasattr(one, "deferred") else []
        waiting += [following for following, _ in one.next_functions if following is not None]
    assert len(deferred) == 3
    assert all(d.x is None and d.prepared is None for d in deferred)


def test_a_layer_used_twice() -> None:
    alone, batched = pair(widths=(6, 6, 6))

    def train(model: nn.Module) -> None:
        model(model(randn(8, 6))).square().sum().backward()

    assert_same(alone, batched, train)


def test_leading_dimensions_and_an_empty_batch() -> None:
    alone, batched = pair()
    assert_same(alone, batched, lambda model: model(randn(2, 3, 4, 12).transpose(0, 1)).square().sum().backward())
    assert_same(alone, batched, lambda model: model(randn(12)).square().sum().backward())
    batched.zero_grad()
    batched(randn(0, 12)).sum().backward()
    assert all(g is not None and not g.any() for g in gradients(batched).values())


@pytest.mark.parametrize("frozen", ["0", "0.weight", "2.weight", "4.bias", "4.weight"])
def test_frozen(frozen: str) -> None:
    alone, batched = pair()
    for model in (alone, batched):
        target = model.get_parameter(frozen) if "." in frozen else model.get_submodule(frozen)
        target.requires_grad_(False)
    x = randn(8, 12, seed=5).requires_grad_()

    def train(model: nn.Module) -> Tensor:
        (dx,) = torch.autograd.grad(model(x).square().sum(), x, retain_graph=False)
        model(x.detach()).square().sum().backward()
        return dx

    assert_same(alone, batched, train)


def test_evaluation_in_between() -> None:
    alone, batched = pair()

    def train(model: nn.Module) -> Tensor:
        out = model(randn(8, 12))
        with torch.no_grad():
            seen = model.eval()(randn(30, 12, seed=4))
        with torch.inference_mode():
            model(randn(30, 12, seed=4))
        model.train()
        out.square().sum().backward()
        return seen

    assert_same(alone, batched, train)


def test_retain_graph_and_a_freed_graph() -> None:
    alone, batched = pair()

    def train(model: nn.Module) -> None:
        loss = model(randn(8, 12)).square().sum()
        loss.backward(retain_graph=True)
        loss.backward(retain_graph=True)
        loss.backward()
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()

    assert_same(alone, batched, train)


def test_backward_through_a_part_prepares_that_part(calls: list[int]) -> None:
    alone, batched = pair()

    def train(model: nn.Module) -> None:
        hidden = model[:2](randn(8, 12))
        loss = model[2:](hidden).square().sum()
        (dh,) = torch.autograd.grad(loss, hidden, retain_graph=True)
        hidden.backward(2 * dh, retain_graph=True)
        loss.backward()

    assert_same(alone, batched, train)
    assert sum(calls) == 3


def test_a_backward_inside_a_backward() -> None:
    alone, batched = pair()

    class Inner(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, model: nn.Module) -> Tensor:
            ctx.model = model
            return x.clone()

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
            with torch.enable_grad():
                ctx.model(randn(6, 12, seed=9)).square().sum().backward()
            return dy, None

    def train(model: nn.Module) -> None:
        hidden = Inner.apply(model[:2](randn(8, 12)), model)
        model[2:](hidden).square().sum().backward()

    assert_same(alone, batched, train)


def test_an_input_modified_in_place_is_refused() -> None:
    _, model = pair()
    hidden = model[0](randn(8, 12))
    x = hidden.detach().clone()
    out = model[2](x)
    x.add_(1)
    with pytest.raises(RuntimeError, match=r"input \[8, 20\].*modified by an inplace operation.*version 1.*version 0"):
        out.sum().backward()
    del hidden, out
    model(randn(8, 12)).sum().backward()
    assert len(batch_of(model)) == 0


def test_a_backward_that_failed_may_be_tried_again() -> None:
    _, model = pair(widths=(12, 20, 7, 5, 6))
    model[2].damping = model[4].damping = 0.1  # prepared after the first and the last
    x, between = randn(8, 12), randn(8, 7, seed=1)
    out = model[:4](x).sum() + model[4:](between).sum()
    between.add_(1)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.backward(retain_graph=True)


def test_no_second_derivative() -> None:
    _, model = pair()
    out = model(randn(8, 12)).square().sum()
    (dw,) = torch.autograd.grad(out, model[0].weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dw.sum().backward()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite_gives_nan(value: float) -> None:
    _, model = pair(F32)
    x = randn(8, 12, dtype=F32)
    x[1, 1] = value
    model[::2](x).sum().backward()  # without tanh, which makes infinity finite
    assert all(g is not None and g.isnan().all() for g in gradients(model).values())


def test_autocast() -> None:
    alone, batched = pair(F32)

    def train(model: nn.Module) -> None:
        with torch.autocast("cpu", dtype=BF16):
            out = model(randn(8, 12, dtype=F32))
            loss = out.float().square().sum()
            loss.backward()

    assert_same(alone, batched, train)


def test_threads_share_a_model() -> None:
    alone, batched = pair(widths=(12, 20, 20, 20, 5))
    expected, found = {}, {}

    def run(model: nn.Module, results: dict[int, Any], s: int) -> None:
        for i in range(10):
            loss = model(randn(8, 12, seed=100 * s + i)).square().sum()
            results[s, i] = torch.autograd.grad(loss, list(model.parameters()))

    for s in range(4):
        run(alone, expected, s)
    threads = [threading.Thread(target=run, args=(batched, found, s)) for s in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for key, own in expected.items():
        for a, b in zip(found[key], own, strict=True):
            assert_identical("dw", a, b)
    assert len(batch_of(batched)) == 0
