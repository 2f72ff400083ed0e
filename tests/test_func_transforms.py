"""torch.func: grad, vmap(grad) and grad(vmap) are right; what cannot be right raises."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import F64, TRANSFORM, assert_close, oracle, randn
from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value, jacrev, jvp, stack_module_state, vjp, vmap

import consequentialism as cw

pytestmark = pytest.mark.usefixtures("fresh_compiler")
BOUND = TRANSFORM[F64]


def loss(weight: Tensor, bias: Tensor, x: Tensor, target: Tensor) -> Tensor:
    return (cw.emended_linear(x, weight, bias, damping=0.3) - target).square().sum()


def expected(weight: Tensor, bias: Tensor, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor | None]:
    x, target = x.reshape(-1, x.shape[-1]), target.reshape(-1, target.shape[-1])
    return oracle(x, 2 * (x @ weight.T + bias - target), damping=0.3)


ARGUMENTS = (randn(3, 5), randn(3, seed=1), randn(8, 5, seed=2), randn(8, 3, seed=3))
WIDE = (randn(3, 5), randn(3, seed=1), randn(4, 5, seed=2), randn(4, 3, seed=3))


@pytest.mark.parametrize("arguments", [ARGUMENTS, WIDE], ids=["primal", "dual"])
def test_grad(arguments: tuple[Tensor, ...]) -> None:
    dw, db = grad(loss, argnums=(0, 1))(*arguments)
    assert_close("dw", dw, expected(*arguments)[0], BOUND)
    assert_close("db", db, expected(*arguments)[1], BOUND)
    gradient, value = grad_and_value(loss)(*arguments)
    assert_close("dw", gradient, expected(*arguments)[0], BOUND)
    assert_close("loss", value, loss(*arguments), BOUND)


def test_grad_of_the_input_is_true() -> None:
    weight, bias, x, target = ARGUMENTS
    dx = grad(loss, argnums=2)(*ARGUMENTS)
    assert_close("dx", dx, 2 * (x @ weight.T + bias - target) @ weight, BOUND)


def test_vjp() -> None:
    weight, bias, x, target = ARGUMENTS
    _, pull = vjp(lambda w: cw.emended_linear(x, w, bias, damping=0.3), weight)
    assert_close("dw", pull(target)[0], oracle(x, target, damping=0.3)[0], BOUND)


def test_functional_call_of_a_layer() -> None:
    layer = cw.Linear(5, 3, dtype=F64)
    x, dy = randn(8, 5), randn(8, 3, seed=1)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    gradients = grad(lambda p: (functional_call(layer, p, (x,)) * dy).sum())(parameters)
    assert_close("dw", gradients["weight"], oracle(x, dy)[0], BOUND)
    assert_close("db", gradients["bias"], oracle(x, dy)[1], BOUND)


def test_vmap_of_grad_is_each_samples_own() -> None:
    weight, bias, _, _ = ARGUMENTS
    x, target = randn(6, 4, 5), randn(6, 4, 3, seed=1)
    dw, db = vmap(grad(loss, argnums=(0, 1)), in_dims=(None, None, 0, 0))(weight, bias, x, target)
    assert dw.shape == (6, 3, 5)
    for k in range(6):
        own = expected(weight, bias, x[k], target[k])
        assert_close(f"dw of {k}", dw[k], own[0], BOUND)
        assert_close(f"db of {k}", db[k], own[1], BOUND)


def test_vmap_of_grad_over_single_rows_is_nlms() -> None:
    weight, bias, x, target = ARGUMENTS
    dw = vmap(grad(loss), in_dims=(None, None, 0, 0))(weight, bias, x, target)
    for k in range(8):
        assert_close(f"dw of {k}", dw[k], expected(weight, bias, x[k : k + 1], target[k : k + 1])[0], BOUND)


def test_vmap_over_models() -> None:
    models = [cw.Linear(5, 3, dtype=F64) for _ in range(4)]
    parameters, _ = stack_module_state(models)
    x, dy = randn(8, 5), randn(8, 3, seed=1)
    base = cw.Linear(5, 3, dtype=F64, device="meta")

    def objective(p: dict[str, Tensor]) -> Tensor:
        return (functional_call(base, p, (x,)).square() * dy).sum()

    gradients = vmap(grad(objective))({name: p.detach() for name, p in parameters.items()})
    for k, model in enumerate(models):
        own = oracle(x, 2 * model(x).detach() * dy)
        assert_close(f"dw of {k}", gradients["weight"][k], own[0], BOUND)
        assert_close(f"db of {k}", gradients["bias"][k], own[1], BOUND)


def test_grad_of_vmap_sums_each_samples_own() -> None:
    weight, bias, _, _ = ARGUMENTS
    x, target = randn(6, 4, 5), randn(6, 4, 3, seed=1)

    def objective(weight: Tensor) -> Tensor:
        return vmap(loss, in_dims=(None, None, 0, 0))(weight, bias, x, target).sum()

    own = sum(expected(weight, bias, x[k], target[k])[0] for k in range(6))
    assert_close("dw", grad(objective)(weight), own, BOUND)


def test_vmap_of_the_forward_alone() -> None:
    weight, bias, _, _ = ARGUMENTS
    x = randn(6, 4, 5)
    out = vmap(lambda one: cw.emended_linear(one, weight, bias))(x)
    assert_close("y", out, x @ weight.T + bias, BOUND)
    layer = cw.Linear(5, 3, dtype=F64)
    out = vmap(layer)(x)
    assert_close("y of a layer", out, nn.functional.linear(x, layer.weight, layer.bias), BOUND)


@pytest.mark.parametrize(
    "nested",
    [
        lambda w, *rest: grad(lambda v: grad(loss)(v, *rest).square().sum())(w),
        lambda w, *rest: jacrev(lambda v: grad(loss)(v, *rest))(w),
        lambda w, *rest: torch.func.hessian(lambda v: loss(v, *rest))(w),
        lambda w, *rest: jvp(lambda v: loss(v, *rest), (w,), (torch.ones_like(w),)),
    ],
    ids=["grad of grad", "jacrev of grad", "hessian", "jvp"],
)
def test_nested_and_forward_mode_raise(nested: Callable[..., object]) -> None:
    with pytest.raises(RuntimeError):
        nested(*ARGUMENTS)


def test_nested_error_says_so() -> None:
    with pytest.raises(RuntimeError, match=r"consequentialism.*nested"):
        grad(lambda w: grad(loss)(w, *ARGUMENTS[1:]).square().sum())(ARGUMENTS[0])


def never_the_plain_gradient(run: Callable[[], Tensor]) -> None:
    """Right, or an error that names the package; anything else is the silent plain gradient."""
    error: Exception | None = None
    try:
        own = run()
    except Exception as caught:
        error = caught
    if error is None:
        assert_close("dw", own, expected(*ARGUMENTS)[0], BOUND)
    else:
        assert "emended gradient" in str(error), str(error)


@pytest.mark.parametrize("fullgraph", [True, False])
def test_compiled_grad_is_never_silently_plain(fullgraph: bool) -> None:
    compiled = torch.compile(lambda *a: grad(loss)(*a), fullgraph=fullgraph, backend="aot_eager")
    never_the_plain_gradient(lambda: compiled(*ARGUMENTS))


def test_compiled_grad_in_a_full_graph_raises() -> None:
    compiled = torch.compile(grad(loss), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="drops the emended gradient"):
        compiled(*ARGUMENTS)


def test_grad_of_a_compiled_function_is_never_silently_plain() -> None:
    compiled = torch.compile(loss, backend="aot_eager")
    never_the_plain_gradient(lambda: grad(compiled)(*ARGUMENTS))


@pytest.mark.parametrize("order", ["compile(vmap(grad))", "compile(grad(functional_call))", "compile(vjp)"])
def test_other_compiled_transforms(order: str) -> None:
    weight, bias, x, target = ARGUMENTS
    layer = cw.Linear(5, 3, damping=0.3, dtype=F64)

    def batched(weight: Tensor) -> Tensor:
        return vmap(grad(loss), in_dims=(None, None, 0, 0))(weight, bias, x[None], target[None])[0]

    def called(weight: Tensor) -> Tensor:
        def objective(weight: Tensor) -> Tensor:
            out = functional_call(layer, {"weight": weight, "bias": bias}, (x,))
            return (out - target).square().sum()

        return grad(objective)(weight)

    def pulled(weight: Tensor) -> Tensor:
        value, pull = vjp(lambda w: loss(w, bias, x, target), weight)
        return pull(torch.ones_like(value))[0]

    run = {"compile(vmap(grad))": batched, "compile(grad(functional_call))": called, "compile(vjp)": pulled}[order]
    assert_close("dw in eager", run(weight), expected(*ARGUMENTS)[0], BOUND)
    never_the_plain_gradient(lambda: torch.compile(run, backend="aot_eager")(weight))


def test_embedding_refuses_transforms() -> None:
    layer = cw.Embedding(9, 4)
    parameters = {"weight": layer.weight.detach()}
    with pytest.raises(RuntimeError, match=r"Embedding does not support torch\.func"):
        grad(lambda p: functional_call(layer, p, (torch.tensor([1, 2]),)).sum())(parameters)
