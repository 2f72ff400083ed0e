"""Conjugate gradients: the bounds on their error, the contracts at the edges, and when the cost model takes them."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from cases import (
    BACKENDS,
    BF16,
    DTYPES,
    EXACT,
    F16,
    F32,
    F64,
    FACTOR,
    FLOOR,
    HALF_TYPES,
    KINDS,
    SMALL_SHAPES,
    TOLERANCE,
    TOLERANCE_ABSOLUTE,
    TRANSFORM,
    Shape,
    assert_close,
    assert_grads_close,
    assert_identical,
    device_of,
    error_of,
    join,
    make_input,
    oracle,
    randn,
    relative_ridge,
    solved,
    with_ones,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import consequentialism as cw
from consequentialism import reference
from consequentialism.options import Ridge
from consequentialism.solve import conjugate, cost
from consequentialism.solve.cost import Plan

STORED, FREE = Plan("primal", "gradient", "cg", "stored"), Plan("primal", "gradient", "cg", "free")
# O on both sides of where products with x become cheaper than the Gram, so that both plans are taken.
SHAPES: tuple[Shape, ...] = ((40, 24, 10), (24, 40, 10), (70, 65, 2), (200, 5, 3), (1, 7, 3), (7, 1, 3), (5, 60, 1))
ENOUGH = 60  # iterations, for these shapes at a damping of 1


@pytest.fixture(params=["stored", "free"])
def only(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """One of the two ways to multiply by the Gram, whatever it costs."""
    monkeypatch.setattr(cost, "_CG_PLANS", (FREE if request.param == "free" else STORED,))
    return request.param


def emended(x: Tensor, dy: Tensor, bias: bool = True, **options: Any) -> tuple[Tensor, Tensor | None]:
    return cw.emended_weight_grad(x, dy, bias=bias, solver="cg", **options)


def energy(error: Tensor, x: Tensor, bias: bool, damping: float) -> float:
    """``trace(E (x^T x + c I) E^T)`` under a root, for ``E [O, I]``."""
    change = error @ with_ones(x, bias).T
    return math.sqrt(change.square().sum().item() + relative_ridge(x, bias, damping) * error.square().sum().item())


sizes = st.one_of(st.integers(1, 12), st.sampled_from((33, 64, 90)))


@given(
    kind=st.sampled_from(KINDS),
    rows=sizes,
    inputs=sizes,
    outputs=st.integers(1, 4),
    bias=st.booleans(),
    damping=st.sampled_from((1e-4, 1e-2, 0.1, 1.0, 10.0, 100.0)),
    iterations=st.integers(1, 40),
    gram=st.sampled_from(("stored", "free")),
    seed=st.integers(0, 100),
)
def test_error_is_within_its_bounds(
    kind: str,
    rows: int,
    inputs: int,
    outputs: int,
    bias: bool,
    damping: float,
    iterations: int,
    gram: str,
    seed: int,
) -> None:
    x, dy = make_input(kind, rows, inputs, seed), randn(rows, outputs, seed=seed + 9)
    exact = join(*solved(x, dy, bias, relative_ridge(x, bias, damping)))
    found = []
    for k in (iterations, iterations + 1):
        options = cw.Options(damping=damping, scale="raw", solver="cg", iterations=k)
        system = conjugate.System(bias, options.ridge, k, x.dtype)
        stored = system.gram(x, reference) if gram == "stored" else None
        found.append(join(*conjugate.weight_grad(system, stored, x, dy, reference)))
    ratio = min(rows, inputs + bias) / damping
    rounding = EXACT * (1 + ratio) ** 0.5
    share = energy(found[0] - exact, x, bias, damping) / energy(exact, x, bias, damping)
    root = math.sqrt(1 + ratio)
    assert share <= conjugate.error_bound(ratio, iterations) + rounding
    assert conjugate.error_bound(ratio, iterations) <= min(1, 2 * ((root - 1) / (root + 1)) ** iterations)
    # From below, and never back, in the plain norm.
    errors, lengths = [(dw - exact).norm() for dw in found], [dw.norm() for dw in found]
    assert errors[1] <= errors[0] + rounding * exact.norm() <= exact.norm() * (1 + 2 * rounding)
    assert lengths[0] <= lengths[1] + rounding * exact.norm() <= exact.norm() * (1 + 2 * rounding)


def test_the_bound_is_not_idle() -> None:
    # Eigenvalues spread evenly over the whole range: what Chebyshev's polynomial is worst at.
    values = torch.linspace(0, 1, 400, dtype=F64)
    damping = 400 * 1e-2 / values.sum().item()  # c = 0.01
    x, dy = torch.diag(values.sqrt()), torch.eye(400, dtype=F64).sum(1, keepdim=True)
    exact = join(*solved(x, dy, False, relative_ridge(x, False, damping)))
    own = join(*emended(x, dy, False, damping=damping, scale="raw", iterations=10))
    share = energy(own - exact, x, False, damping) / energy(exact, x, False, damping)
    chebyshev = 2 * ((math.sqrt(101) - 1) / (math.sqrt(101) + 1)) ** 10
    assert chebyshev / 20 < share < chebyshev
    steepest_descent = 2 * (100 / 102) ** 10  # what a method without conjugate directions is held to
    assert chebyshev < steepest_descent / 5


def test_first_iteration_is_the_plain_gradient_times_a_length() -> None:
    x, dy = randn(30, 20), randn(30, 4, seed=1)
    own, plain = emended(x, dy, False, iterations=1)[0], dy.T @ x
    lengths = (own * plain).sum(1, keepdim=True) / plain.square().sum(1, keepdim=True)
    assert_close("dw", own, lengths * plain, EXACT)
    assert lengths.std() > 0.01 * lengths.mean()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scale", ["nlms", "raw", "gradient"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_converged_is_the_oracle(backend: str, only: str, dtype: torch.dtype, scale: str, bias: bool) -> None:
    device = device_of(backend)
    for rows, inputs, outputs in SHAPES:
        x, dy = randn(rows, inputs, dtype=dtype), randn(rows, outputs, seed=1, dtype=dtype)
        own = emended(x.to(device), dy.to(device), bias, scale=scale, backend=backend, iterations=ENOUGH)
        assert own[0].dtype == dtype
        assert_grads_close(own, oracle(x, dy, bias, scale=scale), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
def test_absolute_damping(only: str, dtype: torch.dtype) -> None:
    for rows, inputs, outputs in SHAPES:
        x, dy = randn(rows, inputs, dtype=dtype), randn(rows, outputs, seed=1, dtype=dtype)
        for scale in ("nlms", "raw", "gradient"):
            options = {"damping": 0.5, "damping_mode": "absolute", "scale": scale}
            own = emended(x, dy, iterations=4 * ENOUGH, **options)
            assert_grads_close(own, oracle(x, dy, **options), TOLERANCE_ABSOLUTE[dtype])


@pytest.mark.parametrize("dtype", [F64, F32, *HALF_TYPES], ids=str)
def test_iterations_after_convergence_change_nothing(only: str, dtype: torch.dtype) -> None:
    for kind in ("random", "low_rank", "duplicates"):
        x, dy = make_input(kind, 12, 5).to(dtype), randn(12, 3, seed=1, dtype=dtype)
        dy[:, 1] = 0  # converged from the start
        own = emended(x, dy, iterations=400)
        assert_identical("row", own[0][1], torch.zeros_like(own[0][1]))
        assert_grads_close(own, oracle(x, dy), TOLERANCE[dtype])


@pytest.mark.parametrize("factor", [1e-18, 1e-12, 1e12, 1e18])
@pytest.mark.parametrize("shape", SMALL_SHAPES, ids=str)
def test_float32_range_of_inputs(only: str, shape: Shape, factor: float) -> None:
    rows, inputs, outputs = shape
    x, dy = (factor * randn(rows, inputs)).to(F32), randn(rows, outputs, seed=1, dtype=F32)
    own = emended(x, dy, False, scale="raw", iterations=ENOUGH)
    assert_grads_close(own, oracle(x, dy, False, scale="raw"), TOLERANCE[F32])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loss_scaling_commutes(only: str, dtype: torch.dtype) -> None:
    x, dy = randn(40, 24, dtype=dtype), 8 * randn(40, 10, seed=1, dtype=dtype).clamp(-16, 16)
    own, scaled = emended(x, dy), emended(x, 128 * dy)
    for name, a, b in zip(("dw", "db"), own, scaled, strict=True):
        assert a is not None
        assert b is not None
        normal = a.abs() > 100 * torch.finfo(dtype).tiny
        assert_identical(f"{name} of a scaled loss", b[normal], 128 * a[normal])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bitwise_deterministic(only: str, dtype: torch.dtype) -> None:
    x, dy = randn(200, 130, dtype=dtype), randn(200, 30, seed=1, dtype=dtype)
    first = emended(x, dy)
    for _ in range(3):
        again = emended(x.clone(), dy.clone())
        assert_identical("dw", again[0], first[0])
        assert_identical("db", again[1], first[1])


@pytest.mark.parametrize("damping_mode", ["relative", "absolute"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dead_inputs_give_exactly_zero(only: str, dtype: torch.dtype, damping_mode: str) -> None:
    for rows, inputs, outputs in SMALL_SHAPES:
        x, dy = torch.zeros(rows, inputs, dtype=dtype), randn(rows, outputs, dtype=dtype)
        for scale in ("nlms", "raw", "gradient"):
            dw, _ = emended(x, dy, False, scale=scale, damping_mode=damping_mode)
            assert_identical("dw", dw, torch.zeros_like(dw))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["x", "dy"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_bad_entry_spoils_everything(only: str, dtype: torch.dtype, where: str, value: float) -> None:
    for rows, inputs, outputs in ((1, 1, 1), (1, 5, 3), (6, 4, 3), (4, 9, 2), (65, 33, 12)):
        for bias in (True, False):
            for damping_mode in ("relative", "absolute"):
                tensors = {"x": randn(rows, inputs, dtype=dtype), "dy": randn(rows, outputs, seed=1, dtype=dtype)}
                tensors[where][rows // 2, -1] = value
                dw, db = emended(tensors["x"], tensors["dy"], bias, damping_mode=damping_mode)
                assert dw.isnan().all()
                assert db is None or db.isnan().all()


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(0, 5, 3), (6, 0, 3), (6, 4, 0)])
def test_empty(only: str, rows: int, inputs: int, outputs: int) -> None:
    for bias in (True, False):
        layer = cw.Linear(inputs, outputs, bias, solver="cg")
        layer(randn(rows, inputs, dtype=F32)).sum().backward()
        for name, parameter in layer.named_parameters():
            assert parameter.grad is not None
            assert parameter.grad.shape == parameter.shape
            assert parameter.grad.isfinite().all(), name


def test_large_finite_dy_stays_finite(only: str) -> None:
    for dtype in (F32, *HALF_TYPES):
        x = randn(100, 4, dtype=dtype)
        dy = torch.full((100, 3), torch.finfo(dtype).max / (2 if dtype == F16 else 1e4), dtype=dtype)
        dw, _ = emended(x, dy, False, scale="raw")
        assert_close("dw", dw, oracle(x, dy, False, scale="raw")[0], TOLERANCE[dtype])


@given(
    groups=st.sampled_from(((), (3,), (2, 2))),
    order=st.integers(1, 40),
    rows=st.integers(1, 6),
    scale=st.sampled_from(("nlms", "raw", "gradient")),
    damping_mode=st.sampled_from(("relative", "absolute")),
)
def test_solve_gram_is_the_factor_applied(
    groups: tuple[int, ...], order: int, rows: int, scale: Any, damping_mode: Any
) -> None:
    x = randn(*groups, 50, order) * torch.logspace(-1, 1, order, dtype=F64)
    gram, right = x.mT @ x, randn(*groups, rows, order, seed=1)
    own = conjugate.solve_gram(gram, right, Ridge(0.8, damping_mode, scale), order, 17, 200)
    assert own.shape == right.shape
    for own_one, gram_one, right_one in zip(
        own.reshape(-1, rows, order), gram.reshape(-1, order, order), right.reshape(-1, rows, order), strict=True
    ):
        expected = right_one @ reference.damped_inverse(gram_one, 0.8, damping_mode, scale, order, 17)
        assert_close("solution", own_one, expected, EXACT)
        alone = conjugate.solve_gram(gram_one, right_one, Ridge(0.8, damping_mode, scale), order, 17, 200)
        assert_close("alone", own_one, alone, EXACT)


def test_solve_gram_groups_are_apart() -> None:
    # A dead, an infinite and a sound group in one batch.
    x = randn(3, 20, 6)
    x[0], x[1, 3, 2] = 0, math.inf
    right = randn(3, 4, 6, seed=1)
    own = conjugate.solve_gram(x.mT @ x, right, Ridge(1.0, "relative", "raw"), 6, 20, 30)
    assert_identical("dead", own[0], torch.zeros_like(own[0]))
    assert own[1].isnan().all()
    expected = right[2] @ reference.damped_inverse(x[2].mT @ x[2], 1.0, "relative", "raw", 6, 20)
    assert_close("sound", own[2], expected, EXACT)


@pytest.mark.parametrize("frozen", ["", "weight", "bias", "x"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_layer_is_the_function(backend: str, only: str, frozen: str) -> None:
    device = device_of(backend)
    x, dy = randn(2, 20, 12, device=device), randn(2, 20, 5, seed=1, device=device)
    layer = cw.Linear(12, 5, solver="cg", iterations=7, damping=0.2, backend=backend, device=device, dtype=F64)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(name != frozen)
    x.requires_grad_(frozen != "x")
    out = layer(x)
    assert_identical("y", out, nn.functional.linear(x, layer.weight, layer.bias))
    out.backward(dy)
    dw, db = emended(x.detach(), dy, damping=0.2, iterations=7, backend=backend)
    assert error_of(dw, oracle(x.reshape(-1, 12), dy.reshape(-1, 5), damping=0.2)[0]) > 1e-6  # not converged
    for name, own, expected in (("weight", layer.weight.grad, dw), ("bias", layer.bias.grad, db)):
        assert_identical(name, own, None if name == frozen else expected)
    assert_close("dx", x.grad, None if frozen == "x" else dy @ layer.weight.detach(), EXACT)


def test_options_of_a_layer() -> None:
    layer = cw.Linear(5, 3, solver="cg", iterations=9)
    assert "solver='cg'" in repr(layer)
    assert "iterations=9" in repr(layer)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.options == layer.options
    model = cw.convert(nn.Sequential(nn.Linear(5, 3), nn.Embedding(4, 2)), solver="cholesky", iterations=3)
    assert (model[0].solver, model[0].iterations) == ("cholesky", 3)
    assert "solver" not in repr(model[1]), "an embedding solves nothing"
    cw.revert(model)
    assert not any(hasattr(module, name) for module in model for name in ("solver", "iterations"))


def test_process_group_is_refused() -> None:
    with pytest.raises(ValueError, match=r"solver.*'auto' or 'cholesky'.*process_group.*'cg'"):
        cw.Linear(5, 3, solver="cg", process_group=object())


@pytest.mark.parametrize("bias", [True, False])
def test_compile_full_graph(only: str, bias: bool) -> None:
    torch._dynamo.reset()
    layer = cw.Linear(12, 5, bias, solver="cg", dtype=F64)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (4, 30, 31):
        x, dy = randn(rows, 12), randn(rows, 5, seed=1)
        found = []
        for run in (layer, compiled):
            layer.zero_grad()
            run(x).backward(dy)
            found.append([parameter.grad for parameter in layer.parameters()])
        for expected, own in zip(*found, strict=True):
            assert_close("gradient", own, expected, TRANSFORM[F64])
    torch._dynamo.reset()


def test_func_transforms(only: str) -> None:
    layer = cw.Linear(6, 3, solver="cg", iterations=5, dtype=F64)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    x, target = randn(4, 9, 6), randn(4, 9, 3, seed=1)

    def loss(parameters: dict[str, Tensor], x: Tensor, target: Tensor) -> Tensor:
        return (functional_call(layer, parameters, (x,)) - target).square().sum()

    batched = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x, target)
    for k in range(4):
        dw, db = emended(x[k], 2 * (layer(x[k]) - target[k]).detach(), iterations=5)
        for own in (grad(loss)(parameters, x[k], target[k]), {name: g[k] for name, g in batched.items()}):
            assert_close("dw", own["weight"], dw, EXACT)
            assert_close("db", own["bias"], db, EXACT)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_fused_sgd_steps_as_sgd(only: str, bias: bool, dtype: torch.dtype) -> None:
    layer = cw.Linear(12, 17, bias, solver="cg", dtype=dtype)
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)  # so that the weights' own rounding does not hide the update
    twin = copy.deepcopy(layer)
    fused, plain = cw.optim.FusedSGD(nn.Sequential(layer), 0.3), torch.optim.SGD(twin.parameters(), 0.3)
    x, dy = randn(40, 12, dtype=dtype), randn(40, 17, seed=1, dtype=dtype)
    for one, optimizer in ((layer, fused), (twin, plain)):
        one(x).backward(dy)
        optimizer.step()
    for own, expected in zip(layer.parameters(), twin.parameters(), strict=True):
        assert_close("parameter", own, expected, 2 * TOLERANCE[dtype])
        assert own.abs().max() > 0


SIZES = (30, 700, 3000)


@pytest.mark.parametrize("outputs", [1, 40, 900])
@pytest.mark.parametrize("inputs", SIZES)
@pytest.mark.parametrize("rows", SIZES)
def test_the_cheaper_way_to_multiply_by_the_gram(rows: int, inputs: int, outputs: int) -> None:
    options = cw.Options(solver="cg", iterations=5)
    by_hand = {
        STORED: rows * inputs**2 + 5 * max(outputs, 64) * (2 * inputs**2 + 10 * inputs),
        FREE: 5 * max(outputs, 64) * (4 * rows * inputs + 10 * inputs),
    }
    assert by_hand[cost.choose(rows, inputs, outputs, F32, options)] == min(by_hand.values())


def test_auto() -> None:
    def chosen(dtype: torch.dtype = F32, sizes: Shape = (8192, 2304, 32), **options: Any) -> str:
        return cost.choose(*sizes, dtype, cw.Options(**{"iterations": 32, "damping": 100.0, **options})).solver

    assert chosen() == "cg"
    assert chosen(solver="cholesky") == "cholesky"
    assert chosen(damping=1.0) == "cholesky"  # the bound is not small enough
    assert chosen(damping=1.0, solver="cg") == "cg"
    assert chosen(iterations=8) == "cholesky"
    assert chosen(F64) == "cholesky"
    assert chosen(damping_mode="absolute", damping=1e9) == "cholesky"
    assert chosen(process_group=object()) == "cholesky"
    assert chosen(sizes=(8192, 2304, 2304)) == "cholesky"  # the factor costs less
    assert chosen(sizes=(8192, 64, 10)) == "cholesky"


@given(
    rows=st.integers(1, 20_000),
    inputs=st.integers(1, 6_000),
    outputs=st.integers(1, 200),
    iterations=st.integers(1, 12),
    dtype=st.sampled_from((BF16, F32)),
)
def test_auto_takes_the_cheaper_of_both(
    rows: int, inputs: int, outputs: int, iterations: int, dtype: torch.dtype
) -> None:
    # At a damping for which any bound above 0 holds: what is ruled out without counting is never the cheaper.
    if rows < inputs or cost.max_rank_over_damping(iterations, torch.finfo(dtype).eps / 2) == 0:
        return
    sizes, damped = (rows, inputs, outputs), {"damping": 1e30, "iterations": iterations}
    direct = cost.choose(*sizes, dtype, cw.Options(solver="cholesky", **damped))
    cg = cost.choose(*sizes, dtype, cw.Options(solver="cg", **damped))
    cheaper = cost.flops(cg, *sizes, iterations) < cost.flops(direct, *sizes, factor=cost.FACTOR_TIME)
    assert cost.choose(*sizes, dtype, cw.Options(**damped)).solver == ("cg" if cheaper else "cholesky")


@pytest.mark.parametrize("dtype", [F32, *HALF_TYPES], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_where_auto_takes_it_the_error_is_that_of_plain_pytorch(
    kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost, "FACTOR_TIME", 10**9)  # always, where the bound allows it
    monkeypatch.setattr(cost, "FEWEST_OUTPUTS", 0)
    for iterations in (8, 16, 32):
        ratio = cost.max_rank_over_damping(iterations, torch.finfo(dtype).eps / 2)
        for rows, inputs, outputs in ((40, 36, 1), (200, 130, 4), (130, 130, 4)) if ratio else ():
            damping = 1.001 * inputs / ratio
            options: dict[str, Any] = {"damping": damping, "iterations": iterations}
            assert cost.choose(rows, inputs, outputs, dtype, cw.Options(**options)).solver == "cg"
            assert cost.choose(rows, rows + 1, outputs, dtype, cw.Options(**options)).solver == "cholesky"
            own_errors, plain_errors = [], []
            for draw in range(3):
                x = make_input(kind, rows, inputs, seed=10 * draw).to(dtype)
                dy = randn(rows, outputs, seed=10 * draw + 9, dtype=dtype)
                expected = oracle(x, dy, False, damping=damping, scale="raw")[0]
                plain = solved(x, dy, False, relative_ridge(x, False, damping))[0]
                own = cw.emended_weight_grad(x, dy, bias=False, scale="raw", **options)[0]
                own_errors.append(error_of(own, expected) ** 2)
                plain_errors.append(error_of(plain, expected) ** 2)
            allowed = FACTOR * math.sqrt(sum(plain_errors) / 3) + FLOOR[dtype]
            error = math.sqrt(sum(own_errors) / 3)
            assert error <= allowed, f"{rows}x{inputs}x{outputs}: {error:.3g}, allowed {allowed:.3g}"


@pytest.mark.parametrize(("seed", "rows", "damping", "iterations"), [(16, 2, 0.1, 200), (92, 3, 0.01, 80)])
def test_more_iterations_than_needed_change_nothing(seed: int, rows: int, damping: float, iterations: int) -> None:
    torch.manual_seed(seed)
    x, dy = torch.randn(rows, 6), torch.randn(rows, 64)
    own = cw.emended_weight_grad(x, dy, damping=damping, solver="cg", iterations=iterations)
    exact = cw.emended_weight_grad(x.double(), dy.double(), damping=damping)
    for found, expected in zip(own, exact, strict=True):
        assert_close("gradient", found, expected, TOLERANCE[F32])
