"""torch.compile, torch.func and derivatives of derivatives: right, or a clear error, never the plain gradient silently."""

from __future__ import annotations

import pytest
import torch
from cases import TRANSFORM, assert_close, assert_grads_close, randn
from torch import Tensor
from torch.func import functional_call, grad, jvp, vmap

import consequentialism as cw

F64 = torch.float64
X, Y = randn(7, 5), randn(7, 3, seed=1)


def make_layer(**options: object) -> cw.Linear:
    torch.manual_seed(0)
    return cw.Linear(5, 3, dtype=F64, **options)  # type: ignore[arg-type]


def loss_of(layer: torch.nn.Module, x: Tensor = X, y: Tensor = Y) -> Tensor:
    return (layer(x) - y).square().mean()


def eager_grads(layer: cw.Linear, x: Tensor = X, y: Tensor = Y) -> tuple[Tensor, Tensor]:
    return torch.autograd.grad(loss_of(layer, x, y), (layer.weight, layer.bias))  # type: ignore[return-value]


def functional_loss(layer: cw.Linear, x: Tensor = X, y: Tensor = Y):  # noqa: ANN201
    return lambda parameters, x=x, y=y: (functional_call(layer, parameters, x) - y).square().mean()


def parameters_of(layer: cw.Linear) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in layer.named_parameters()}


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("options", [{}, {"damping_mode": "absolute"}, {"scale": "gradient"}, {"backend": "reference"}])
def test_compiled_without_a_break_gives_the_same_numbers(options: dict[str, str], dynamic: bool) -> None:
    layer = make_layer(**options)
    compiled = torch.compile(lambda x, y: loss_of(layer, x, y), fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (7, 2, 40):  # both forms
        x, y = randn(rows, 5, seed=rows), randn(rows, 3, seed=rows + 1)
        own = torch.autograd.grad(compiled(x, y), (layer.weight, layer.bias))
        assert_grads_close(own, eager_grads(layer, x, y), TRANSFORM[F64])


def test_compiled_with_inductor() -> None:
    layer = cw.Linear(20, 30)
    x = randn(9, 20, dtype=torch.float32).requires_grad_()
    wanted = (layer.weight, layer.bias, x)
    expected = torch.autograd.grad(layer(x).square().mean(), wanted)
    compiled = torch.compile(lambda x: layer(x).square().mean(), fullgraph=True)
    for name, own, eager in zip("Wbx", torch.autograd.grad(compiled(x), wanted), expected, strict=True):
        assert_close(name, own, eager, TRANSFORM[torch.float32])


def test_compiled_embedding() -> None:
    layer = cw.Embedding(6, 4, dtype=F64)
    indices = torch.tensor([[1, 2, 1], [5, 0, 1]])
    (expected,) = torch.autograd.grad(layer(indices).square().mean(), layer.weight)
    compiled = torch.compile(lambda i: layer(i).square().mean(), fullgraph=True, backend="aot_eager")
    (own,) = torch.autograd.grad(compiled(indices), layer.weight)
    assert_close("dw", own, expected, TRANSFORM[F64])


def test_changed_damping_reaches_a_compiled_layer() -> None:
    layer = make_layer()
    compiled = torch.compile(lambda: loss_of(layer), fullgraph=True, backend="aot_eager")
    for damping in (1.0, 0.01):
        layer.damping = damping
        own = torch.autograd.grad(compiled(), (layer.weight, layer.bias))
        assert_grads_close(own, eager_grads(layer), TRANSFORM[F64])


def test_func_grad_is_the_emended_gradient() -> None:
    layer = make_layer()
    own = grad(functional_loss(layer))(parameters_of(layer))
    assert_grads_close((own["weight"], own["bias"]), eager_grads(layer), TRANSFORM[F64])


def test_vmap_of_grad_emends_each_batch_by_itself() -> None:
    layer = make_layer()
    xs, ys = randn(4, 7, 5), randn(4, 7, 3, seed=1)
    own = vmap(grad(functional_loss(layer)), in_dims=(None, 0, 0))(parameters_of(layer), xs, ys)
    for i in range(4):
        assert_grads_close((own["weight"][i], own["bias"][i]), eager_grads(layer, xs[i], ys[i]), TRANSFORM[F64])


def test_per_sample_gradients_are_nlms() -> None:
    layer = make_layer()
    own = vmap(grad(functional_loss(layer)), in_dims=(None, 0, 0))(parameters_of(layer), X, Y)
    for i in range(7):
        expected = eager_grads(layer, X[i : i + 1], Y[i : i + 1])
        assert_grads_close((own["weight"][i], own["bias"][i]), expected, TRANSFORM[F64])


def test_grad_of_vmap_sums_the_batches() -> None:
    layer = make_layer()
    xs, ys = randn(4, 7, 5), randn(4, 7, 3, seed=1)
    loss = functional_loss(layer)
    own = grad(lambda p: vmap(loss, in_dims=(None, 0, 0))(p, xs, ys).sum())(parameters_of(layer))
    each = [eager_grads(layer, x, y) for x, y in zip(xs, ys, strict=True)]
    expected = tuple(sum(parts) for parts in zip(*each, strict=True))
    assert_grads_close((own["weight"], own["bias"]), expected, TRANSFORM[F64])


def test_compile_over_func_grad_is_refused() -> None:
    layer = make_layer()
    compiled = torch.compile(grad(functional_loss(layer)), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="drops the emended gradient"):
        compiled(parameters_of(layer))


def test_compile_over_func_grad_with_breaks_is_right() -> None:
    layer = make_layer()
    own = torch.compile(grad(functional_loss(layer)), backend="aot_eager")(parameters_of(layer))
    assert_grads_close((own["weight"], own["bias"]), eager_grads(layer), TRANSFORM[F64])


def test_second_derivatives_are_refused() -> None:
    layer = make_layer()
    (first,) = torch.autograd.grad(loss_of(layer), layer.weight, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        first.sum().backward()
    nested = grad(lambda p: grad(functional_loss(layer))(p)["weight"].sum())
    with pytest.raises(RuntimeError, match="cannot be nested"):
        nested(parameters_of(layer))


def test_second_derivatives_of_an_embedding_are_refused() -> None:
    layer = cw.Embedding(6, 4)
    (first,) = torch.autograd.grad(layer(torch.tensor([1, 2])).square().sum(), layer.weight, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        first.sum().backward()


def test_forward_mode_is_refused() -> None:
    parameters = parameters_of(make_layer())
    with pytest.raises(NotImplementedError, match="jvp"):
        jvp(functional_loss(make_layer()), (parameters,), (parameters,))


def test_an_embedding_under_a_transform_is_refused() -> None:
    layer = cw.Embedding(6, 4)
    with pytest.raises(RuntimeError, match=r"torch\.func"):
        grad(lambda w: functional_call(layer, {"weight": w}, torch.tensor([1, 2])).sum())(layer.weight.detach())
