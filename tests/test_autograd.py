"""The two owners of a linear layer's derivative, in C++ for eager mode and in Python for the rest: the same bits."""

from __future__ import annotations

import math
import warnings
from itertools import product
from typing import Any

import pytest
import torch
from cases import BACKENDS, DTYPES, F32, F64, Recorder, assert_identical, device_of, needs_kernels, randn
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import consequentialism as cw
from consequentialism import Options
from consequentialism.autograd.linear import EmendedLinear, prepare
from consequentialism.backend import compiled as ops
from consequentialism.functional.linear import emended_linear_with
from consequentialism.solve import cost

# N, I, O by the plan they take in float32: dual and primal, on the input and on the gradient.
PLANS = {
    cost.Plan("dual", "input"): (5, 40, 60),
    cost.Plan("dual", "gradient"): (20, 64, 6),
    cost.Plan("primal", "input"): (12, 8, 30),
    cost.Plan("primal", "gradient"): (70, 9, 5),
}
# Whether x, weight and bias want gradients, and whether there is a bias at all.
NEEDED = [
    (needed, has_bias)
    for needed, has_bias in product(product((True, False), repeat=3), (True, False))
    if needed[1] or (needed[2] and has_bias)
]


def python_linear(x: Tensor, weight: Tensor, bias: Tensor | None, options: Options) -> Tensor:
    """`cw.emended_linear` by the Python Function."""
    need_bias = bias is not None and bias.requires_grad
    rows = x.detach().reshape(-1, x.shape[-1])
    prepared = prepare(rows, bias is not None, weight.shape[0], options, ops, weight.requires_grad, need_bias)
    return EmendedLinear.apply(x, weight, bias, ops, None, *prepared.flat())


@pytest.mark.parametrize("shape", PLANS.values(), ids=[f"{p.form}-{p.applied_to}" for p in PLANS])
def test_the_shapes_take_the_plans_they_stand_for(shape: tuple[int, int, int]) -> None:
    rows, inputs, outputs = shape
    assert PLANS[cost.choose(rows, inputs + 1, outputs, F32, Options())] == shape


@needs_kernels
@pytest.mark.parametrize(("needed", "has_bias"), NEEDED, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", PLANS.values(), ids=[f"{p.form}-{p.applied_to}" for p in PLANS])
def test_same_bits(shape: tuple[int, int, int], dtype: torch.dtype, needed: tuple[bool, ...], has_bias: bool) -> None:
    rows, inputs, outputs = shape
    values = (randn(rows, inputs), randn(outputs, inputs, seed=1), randn(outputs, seed=2))
    dy = randn(rows, outputs, seed=3, dtype=dtype)
    results = []
    for linear in (emended_linear_with, python_linear):
        x, weight, bias = (v.to(dtype).requires_grad_(n) for v, n in zip(values, needed, strict=True))
        out = linear(x, weight, bias if has_bias else None, Options(damping=0.7))
        assert ("consequentialism::" in out.grad_fn.name()) == (linear is not python_linear), out.grad_fn.name()
        out.backward(dy)
        results.append((out, x.grad, weight.grad, bias.grad))
    for name, own, expected in zip(("y", "dx", "dw", "db"), *results, strict=True):
        assert_identical(name, own, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("leading", [(), (6,), (2, 3, 4)], ids=str)
def test_leading_dimensions(leading: tuple[int, ...], backend: str) -> None:
    layer = cw.Linear(5, 3, dtype=F64, backend=backend, device=device_of(backend))
    x = randn(*leading, 5, device=device_of(backend)).requires_grad_()
    dy = randn(*leading, 3, seed=1, device=device_of(backend))
    layer(x).backward(dy)
    flat = cw.reference.emended_weight_grad(x.detach().reshape(-1, 5), dy.reshape(-1, 3))
    assert layer.weight.grad is not None
    assert x.grad is not None
    torch.testing.assert_close(layer.weight.grad, flat[0])
    torch.testing.assert_close(layer.bias.grad, flat[1])
    torch.testing.assert_close(x.grad, dy @ layer.weight.detach())


@needs_kernels
@pytest.mark.parametrize("shape", PLANS.values(), ids=[f"{p.form}-{p.applied_to}" for p in PLANS])
def test_opcheck(shape: tuple[int, int, int]) -> None:
    rows, inputs, outputs = shape
    x, weight, bias = randn(rows, inputs), randn(outputs, inputs, seed=1), randn(outputs, seed=2)
    plan = cost.choose(rows, inputs + 1, outputs, F64, Options())
    options = (plan.form, plan.applied_to, 1.0, "relative", "nlms")
    for tensors in ((x, weight, bias), (x, weight, None), (x[None], weight, bias)):
        leaves = [None if t is None else t.clone().requires_grad_() for t in tensors]
        torch.library.opcheck(torch.ops.consequentialism.emended_linear.default, (*leaves, *options))


@needs_kernels
def test_the_gradient_of_the_input_alone_costs_no_weight_gradient() -> None:
    layer, x = cw.Linear(64, 8), randn(8, 64, dtype=F32).requires_grad_()
    out = layer(x)
    with Recorder() as recorder:
        torch.autograd.grad(out.sum(), x)
    assert not [name for name in recorder.names if "weight_grad" in name]


@needs_kernels
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_not_finite_errors_reach_every_weight(value: float) -> None:
    for rows, inputs, outputs in PLANS.values():
        layer = cw.Linear(inputs, outputs)
        dy = torch.zeros(rows, outputs)
        dy[0, 0] = value
        layer(randn(rows, inputs, dtype=F32)).backward(dy)
        assert all(p.grad is not None and p.grad.isnan().all() for p in layer.parameters())


@needs_kernels
def test_the_op_called_by_itself_names_what_does_not_fit() -> None:
    x, weight = randn(4, 3).requires_grad_(), randn(2, 3).requires_grad_()
    op = torch.ops.consequentialism.emended_linear
    with pytest.raises(ValueError, match="form must be 'dual' or 'primal', got 'third'"):
        op(x, weight, None, "third", "input", 1.0, "relative", "nlms")
    with pytest.raises(ValueError, match="applied_to must be 'input', 'gradient' or 'fused', got 'both'"):
        op(x, weight, None, "dual", "both", 1.0, "relative", "nlms")
    with pytest.raises(ValueError, match="damping must be finite and above 0, got 0"):
        op(x, weight, None, "dual", "input", 0.0, "relative", "nlms")
    with pytest.raises(RuntimeError, match="shapes"):
        op(x, weight.t(), None, "dual", "input", 1.0, "relative", "nlms")


def penalised(model: torch.nn.Module, x: Tensor) -> Tensor:
    """A gradient penalty, where the output's own gradient has no history."""
    (dx,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    return dx.flatten(1).norm(dim=1).sub(1).square().mean()


@pytest.mark.parametrize("options", [{}, {"backend": "reference"}, {"solver": "cg"}], ids=str)
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_a_gradient_penalty_is_an_error_and_no_other_gradient(kind: str, options: dict[str, Any]) -> None:
    layer = torch.nn.Linear(4, 3) if kind == "linear" else torch.nn.Conv1d(2, 3, 2)
    x = randn(5, 4, dtype=F32) if kind == "linear" else randn(5, 2, 4, dtype=F32)
    model = cw.convert(torch.nn.Sequential(layer), **options)
    loss = penalised(model, x.requires_grad_())
    assert loss.requires_grad
    with pytest.raises(RuntimeError, match="once_differentiable"):
        loss.backward()
    model(x).sum().backward(create_graph=True)
    assert layer.weight.grad is not None


@pytest.mark.parametrize("leading", [(2, 3), (2, 1, 3)], ids=str)
@pytest.mark.parametrize(("inputs", "outputs"), [(0, 3), (3, 0)])
def test_no_inputs_and_no_outputs(inputs: int, outputs: int, leading: tuple[int, ...]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of weights without elements
        layer = cw.Linear(inputs, outputs)
    layer(torch.ones(*leading, inputs)).sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.shape == (outputs, inputs)
    assert layer.bias.grad is not None
    assert layer.bias.grad.isfinite().all()


@pytest.mark.skipif(
    torch.__version__ < "2.12", reason="torch 2.11: sympy fails on a symbolic comparison (as_coeff_Mul)"
)
def test_symbolic_sizes_of_a_tracer() -> None:
    layer = cw.Linear(4, 3)
    parameters = [p.detach().requires_grad_() for p in layer.parameters()]

    def gradients(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        out = torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))
        return torch.autograd.grad(out.sum(), (weight, bias))

    x = randn(5, 4, dtype=F32)
    traced = make_fx(gradients, tracing_mode="symbolic")(x, *parameters)
    for own, expected in zip(traced(x, *parameters), gradients(x, *parameters), strict=True):
        torch.testing.assert_close(own, expected)


@pytest.mark.parametrize("options", [{}, {"backend": "reference"}], ids=str)
def test_autocast_around_backward_changes_nothing(options: dict[str, Any]) -> None:
    model = cw.convert(torch.nn.Sequential(torch.nn.Linear(32, 32)), **options)
    dy = randn(8, 32, seed=1, dtype=F32)
    results = []
    for enabled in (False, True):
        x = randn(8, 32, dtype=F32).requires_grad_()
        out = model(x)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out.backward(dy)
        results.append(x.grad)
    assert_identical("dx", results[1], results[0])


def test_a_layer_that_backward_does_not_run_does_not_matter() -> None:
    model = cw.convert(torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 3)))
    x = randn(5, 4, dtype=F32)
    h = model[0](x)
    x.add_(1)
    assert torch.autograd.grad(model[1](h).sum(), h)[0].shape == (5, 8)
