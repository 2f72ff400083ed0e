"""Derivatives that an emended layer does not have: each is refused with the package's name and the remedy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import F64, TRANSFORM, assert_close, oracle, randn
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import consequentialism as cw

# A layer's maker with its input.
LAYERS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "linear": (lambda: nn.Linear(5, 3, dtype=F64), randn(8, 5)),
    "linear, no bias": (lambda: nn.Linear(5, 3, bias=False, dtype=F64), randn(2, 4, 5)),
    "conv": (lambda: nn.Conv1d(2, 3, 2, dtype=F64), randn(4, 2, 6)),
    "embedding": (lambda: nn.Embedding(7, 3, dtype=F64), torch.tensor([[0, 3], [6, 3]])),
}
PATHS: dict[str, dict[str, Any]] = {
    "eager": {},
    "reference": {"backend": "reference"},
    "cg": {"solver": "cg"},
}


def emended(kind: str, **options: Any) -> tuple[nn.Sequential, Tensor]:
    make, x = LAYERS[kind]
    return cw.convert(nn.Sequential(make()), **options), x


def assert_refused(run: Callable[[], Any]) -> None:
    with pytest.raises(RuntimeError, match=r"consequentialism: .*consequentialism\.revert\(model\)"):
        run()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", LAYERS)
def test_second_derivative(kind: str, path: str) -> None:
    model, x = emended(kind, **PATHS[path])
    weight = model[0].weight
    (dw,) = torch.autograd.grad(model(x).square().sum(), weight, create_graph=True)
    assert_refused(lambda: torch.autograd.grad(dw.sum(), weight, allow_unused=True, retain_graph=True))
    assert_refused(lambda: dw.sum().backward())


@pytest.mark.parametrize("path", ["eager", "reference", "cg"])
def test_hessian_of_autograd_is_not_zero_in_silence(path: str) -> None:
    x, weight = randn(8, 5), randn(3, 5)

    def loss(weight: Tensor) -> Tensor:
        return cw.emended_linear(x, weight, **PATHS[path]).square().sum()

    assert_refused(lambda: torch.autograd.functional.hessian(loss, weight))


def call(model: nn.Module, x: Tensor) -> tuple[Callable[[Any], Tensor], dict[str, Tensor]]:
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    return lambda p: functional_call(model, p, (x,)), parameters


@pytest.mark.parametrize("kind", ["linear", "linear, no bias", "conv"])
def test_jacobians_over_parameters(kind: str) -> None:
    model, x = emended(kind)
    run, parameters = call(model, x)
    y = run(parameters)
    tangents = {name: torch.ones_like(p) for name, p in parameters.items()}
    for transform in (
        lambda: jacrev(run)(parameters),
        lambda: jacfwd(run)(parameters),
        lambda: hessian(lambda p: run(p).square().sum())(parameters),
        lambda: jvp(run, (parameters,), (tangents,)),
        lambda: vmap(vjp(run, parameters)[1])(torch.ones(4, *y.shape, dtype=F64)),
        lambda: grad(lambda p: grad(lambda q: run(q).square().sum())(p)[next(iter(p))].sum())(parameters),
    ):
        assert_refused(transform)


@pytest.mark.parametrize("kind", ["linear", "linear, no bias", "conv"])
def test_jacobians_of_the_input_are_true(kind: str) -> None:
    model, x = emended(kind)
    _, parameters = call(model, x)
    own = jacrev(lambda x: functional_call(model, parameters, (x,)))(x)
    plain = cw.revert(model)
    assert_close("jacobian", own, jacrev(lambda x: functional_call(plain, parameters, (x,)))(x), TRANSFORM[F64])


def test_each_samples_own_gradient_is_none_of_these() -> None:
    model, _ = emended("linear")
    x, dy = randn(6, 4, 5), randn(6, 4, 3, seed=1)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def objective(p: dict[str, Tensor], x: Tensor, dy: Tensor) -> Tensor:
        return (functional_call(model, p, (x,)) * dy).sum()

    for in_dims, own_x in (((None, 0, 0), x), ((None, None, 0), x[:1].expand(6, -1, -1))):
        gradients = vmap(grad(objective), in_dims=in_dims)(parameters, x if in_dims[1] == 0 else x[0], dy)
        for k in range(6):
            assert_close(f"dw of {k}", gradients["0.weight"][k], oracle(own_x[k], dy[k])[0], TRANSFORM[F64])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", ["linear", "linear, no bias", "conv"])
def test_forward_mode(kind: str, path: str) -> None:
    model, x = emended(kind, **PATHS[path])
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        assert_refused(lambda: model(dual))
        model(x).sum().backward()  # beside a tangent, not with one
        with torch.no_grad():
            tangent = forward_ad.unpack_dual(model(dual)).tangent
    expected = cw.revert(model)(x + 1) - cw.revert(model)(x)
    assert_close("tangent", tangent, expected, TRANSFORM[F64])


def test_a_jacobian_row_by_row_has_emended_rows() -> None:
    """`torch.autograd.functional.jacobian` cannot be told from training steps; docs/usage.md says so."""
    layer, x = cw.Linear(4, 2, bias=False, dtype=F64), randn(3, 4)
    jacobian = torch.autograd.functional.jacobian(
        lambda weight: functional_call(layer, {"weight": weight}, (x,)), layer.weight.detach()
    )
    dy = torch.zeros(3, 2, dtype=F64)
    dy[1, 0] = 1
    assert_close("row", jacobian[1, 0], oracle(x, dy, False)[0], TRANSFORM[F64])
