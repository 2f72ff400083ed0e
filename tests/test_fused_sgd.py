"""`FusedSGD`: the weights of plain SGD, and no gradient in memory."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from cases import BACKENDS, BF16, F16, F32, F64, TOLERANCE, assert_close, assert_identical, device_of, randn
from fused_sgd_helpers import (
    LR,
    PLANS,
    Mixed,
    assert_steps_as_sgd,
    backward,
    layers,
    squares,
)
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

import consequentialism as cw
from consequentialism.autograd import linear as autograd
from consequentialism.optim import FusedSGD, SpentGradient, step
from consequentialism.solve import cost


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: "-".join(plan[:4]))
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_plan(backend: str, plan: cost.Plan, dtype: torch.dtype, bias: bool) -> None:
    rows, inputs, outputs = PLANS[plan]
    assert cost.choose(rows, inputs + bias, outputs, dtype, cw.Options()) == plan
    device = device_of(backend)
    model = nn.Sequential(cw.Linear(inputs, outputs, bias, backend=backend, device=device, dtype=dtype))
    assert_steps_as_sgd(model, randn(rows, inputs, dtype=dtype, device=device), 10 * TOLERANCE[dtype])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: "-".join(plan[:4]))
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_weights(backend: str, plan: cost.Plan, dtype: torch.dtype, bias: bool) -> None:
    # Weights near zero, so that their own rounding does not hide the update; one step, for it is rounded again.
    rows, inputs, outputs = PLANS[plan]
    device = device_of(backend)
    model = nn.Sequential(cw.Linear(inputs, outputs, bias, backend=backend, device=device, dtype=dtype))
    x, dy = randn(rows, inputs, dtype=dtype, device=device), randn(rows, outputs, seed=1, dtype=dtype, device=device)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    assert_steps_as_sgd(model, x, 2 * TOLERANCE[dtype], steps=1, run=lambda m, x: m(x).backward(dy))


@pytest.mark.parametrize("backend", BACKENDS)
def test_several_layers_and_leading_dimensions(backend: str) -> None:
    device = device_of(backend)
    assert_steps_as_sgd(layers(backend=backend, device=device), randn(3, 5, 6, device=device), steps=10)


@pytest.mark.parametrize("leading", [(), (1,)])
def test_one_row(leading: tuple[int, ...]) -> None:
    assert_steps_as_sgd(layers(), randn(*leading, 6))


@pytest.mark.parametrize("leading", [(0,), (3, 0)])
def test_empty_batch_changes_nothing(leading: tuple[int, ...]) -> None:
    model = layers()
    before = copy.deepcopy(model.state_dict())
    optimizer = FusedSGD(model, LR)
    x = torch.zeros(*leading, 6, dtype=F64, requires_grad=True)
    for _ in range(2):
        model(x).sum().backward()
        optimizer.step()
    assert x.grad is not None
    for name, value in model.state_dict().items():
        assert_identical(name, value, before[name])


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize(("inputs", "outputs"), [(0, 3), (4, 0)])
def test_no_inputs_or_no_outputs(inputs: int, outputs: int) -> None:
    model = cw.Linear(inputs, outputs, dtype=F64)
    twin = copy.deepcopy(model)
    for one, optimizer in ((model, FusedSGD(model, LR)), (twin, torch.optim.SGD(twin.parameters(), LR))):
        one(randn(6, inputs)).sum().backward()
        optimizer.step()
    assert_close("bias", model.bias, twin.bias, TOLERANCE[F64])


@pytest.mark.parametrize("sparse", [False, True])
def test_mixed_with_other_layers(sparse: bool) -> None:
    model = Mixed(sparse)
    assert_steps_as_sgd(model, torch.arange(24).reshape(4, 6) % 11, 1e-10, steps=6, lr=0.01)


def test_other_lr() -> None:
    model = Mixed()
    twin, x = copy.deepcopy(model), torch.arange(24) % 11
    plain = torch.optim.SGD(cw.param_groups(twin, lr=0.01, other={"lr": 0.003}))
    own = {id(p) for m in model.modules() if isinstance(m, cw.Linear) for p in m.parameters()}
    fused = FusedSGD(model, 0.01, other_lr=0.003)
    assert [len(group["params"]) for group in fused.param_groups] == [5, 5]
    assert {id(p) for p in fused.param_groups[0]["params"]} == own
    plain.param_groups[0]["params"] = [p for m in twin.modules() if isinstance(m, cw.Linear) for p in m.parameters()]
    plain.param_groups[1]["params"].append(twin.table.weight)
    for one, optimizer in ((model, fused), (twin, plain)):
        backward(one, x)
        optimizer.step()
    for name, expected in twin.named_parameters():
        assert_close(name, model.get_parameter(name), expected, TOLERANCE[F64])


def test_input_gradient_is_that_of_the_old_weights() -> None:
    model, x = layers(), randn(10, 6).requires_grad_()
    twin = copy.deepcopy(model)
    (expected,) = torch.autograd.grad(squares(twin(x)), x)
    optimizer = FusedSGD(model, LR)
    backward(model, x)
    assert_identical("dx", x.grad, expected)
    optimizer.step()


@pytest.mark.parametrize("frozen", ["0.weight", "0.bias", "2.weight", "2.bias"])
def test_frozen_parameters(frozen: str) -> None:
    model = layers()
    model.get_parameter(frozen).requires_grad_(False)
    before = model.get_parameter(frozen).clone()
    assert_steps_as_sgd(model, randn(10, 6))
    assert_identical(frozen, model.get_parameter(frozen), before)


def test_frozen_layer_and_no_grad() -> None:
    model = layers()
    model[0].requires_grad_(False)
    assert_steps_as_sgd(model, randn(10, 6))
    with torch.no_grad():
        before = model(randn(10, 6))
        assert_identical("y", model(randn(10, 6)), before)
    model.requires_grad_(False)
    assert not model(randn(10, 6)).requires_grad


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_autocast(dtype: torch.dtype, inside: bool) -> None:
    def run(model: nn.Module, x: Tensor) -> None:
        with torch.autocast("cpu", dtype=dtype):
            out = model(x)
            assert out.dtype == dtype
            if inside:
                out.float().square().mean().backward()
        if not inside:
            out.float().square().mean().backward()

    assert_steps_as_sgd(layers(F32), randn(20, 6, dtype=F32), TOLERANCE[dtype], steps=2, run=run)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant: bool) -> None:
    def run(model: nn.Module, x: Tensor) -> None:
        first, second = model[0], model[1]
        out = checkpoint(first, x, use_reentrant=reentrant)
        squares(checkpoint(second, out, use_reentrant=reentrant)).backward()

    x = randn(10, 6).requires_grad_()
    model = nn.Sequential(layers(), nn.Sequential(nn.Tanh(), cw.Linear(4, 4, dtype=F64)))
    assert_steps_as_sgd(model, x, run=run)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["x", "dy"])
@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: "-".join(plan[:4]))
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_bad_entry_does_what_it_does_to_sgd(backend: str, plan: cost.Plan, where: str, value: float) -> None:
    rows, inputs, outputs = PLANS[plan]
    device = device_of(backend)
    for lr in (LR, 0.0):
        layer = cw.Linear(inputs, outputs, backend=backend, device=device, dtype=F32)
        tensors = {"x": randn(rows, inputs, dtype=F32), "dy": randn(rows, outputs, seed=1, dtype=F32)}
        tensors[where][rows // 2, -1] = value
        twin = copy.deepcopy(layer)
        for one, optimizer in ((layer, FusedSGD(layer, lr)), (twin, torch.optim.SGD(twin.parameters(), lr))):
            one(tensors["x"].to(device)).backward(tensors["dy"].to(device))
            optimizer.step()
        for own, expected in zip(layer.parameters(), twin.parameters(), strict=True):
            assert expected.isnan().all()
            assert own.isnan().all(), f"lr={lr}: {own.isnan().sum()} of {own.numel()} are NaN"


@pytest.mark.parametrize("device_scalar", [False, True])
def test_large_finite_errors_stay_finite(device_scalar: bool) -> None:
    layer = cw.Linear(4, 3, bias=False, scale="raw", dtype=F16)
    nn.init.zeros_(layer.weight)
    x, dy = randn(100, 4, dtype=F16), torch.full((100, 3), torch.finfo(F16).max / 2, dtype=F16)
    plan = cost.plan(x, False, 3, layer.options)
    prepared = autograd.prepare(x, False, 3, layer.options, cw.reference, True, False, plan)
    with torch.no_grad():
        step.update(layer.weight, None, prepared, x, dy, torch.tensor(8.0) if device_scalar else 8.0)
    expected = -8 * cw.reference.emended_weight_grad(x.double(), dy.double(), False, scale="raw")[0]
    assert_close("weight", layer.weight, expected, TOLERANCE[F16])


@pytest.mark.parametrize("device_scalar", [False, True])
@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=str)
def test_update_with_a_rate_on_the_device(dtype: torch.dtype, device_scalar: bool) -> None:
    # The branch that a CUDA graph needs, on whatever device there is.
    for plan, (rows, inputs, outputs) in PLANS.items():
        if dtype in (BF16, F16) and plan.applied_to == "gradient":
            continue
        x, dy = randn(rows, inputs, dtype=dtype), randn(rows, outputs, seed=1, dtype=dtype)
        prepared = autograd.prepare(x, True, outputs, cw.Options(), cw.reference, True, True, plan)
        weight, bias = torch.zeros(outputs, inputs, dtype=dtype), torch.zeros(outputs, dtype=dtype)
        lr = torch.tensor(0.3, dtype=F32) if device_scalar else torch.tensor(0.3, dtype=F32).item()
        step.update(weight, bias, prepared, x, dy, lr)
        dw, db = cw.reference.emended_weight_grad(x.double(), dy.double(), True)
        assert db is not None
        assert_close("weight", weight, -0.3 * dw, max(TOLERANCE[dtype], 1e-7))
        assert_close("bias", bias, -0.3 * db, max(TOLERANCE[dtype], 1e-7))
        dy[0, 0] = float("inf")
        step.update(weight, bias, prepared, x, dy, lr)
        assert weight.isnan().all()
        assert bias.isnan().all()


@pytest.mark.parametrize("sparse", [False, True])
def test_whole_steps_with_a_rate_on_the_device(monkeypatch: pytest.MonkeyPatch, sparse: bool) -> None:
    monkeypatch.setattr(cw.optim.fused_sgd, "rate", lambda lr, parameter: torch.as_tensor(lr, dtype=F64))
    assert_steps_as_sgd(Mixed(sparse), torch.arange(24) % 11, 1e-10, lr=0.01)


def test_a_rate_stays_out_of_a_cuda_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnCuda:
        is_cuda = True
        device = torch.device("meta")

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    for lr in (0.5, torch.tensor(0.5)):
        with pytest.raises(RuntimeError, match="give it as a tensor on meta"):
            cw.optim.fused_sgd.rate(lr, OnCuda())  # type: ignore[arg-type]
    kept = cw.optim.fused_sgd.rate(torch.ones(1, device="meta"), OnCuda())  # type: ignore[arg-type]
    assert isinstance(kept, Tensor)
    assert kept.shape == ()
    with pytest.raises(RuntimeError, match="meta, a parameter on cpu"):
        cw.optim.fused_sgd.rate(torch.ones((), device="meta"), torch.zeros(3))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert cw.optim.fused_sgd.rate(torch.tensor(0.5), OnCuda()) == 0.5  # type: ignore[arg-type]


def largest_allocation(run: Callable[[], None]) -> int:
    """Bytes of the largest single allocation while ``run`` runs, from the profiler's memory events."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    return max((e.nbytes() for e in events if e.name() == "[memory]"), default=0)


MEMORY_CASES = {
    "dual input": ((16, 128, 512), F32, False, 1 / 8),
    "dual input, float16": ((16, 128, 512), F16, False, 1 / 2),
    "dual input, autocast": ((16, 128, 512), F32, True, 1 / 4),
    "dual gradient": ((16, 512, 128), F32, False, 1 / 2),
    "primal input": ((160, 128, 512), F64, False, None),
    "primal gradient": ((600, 128, 512), F32, False, 1 / 4),
}


@pytest.mark.parametrize("case", MEMORY_CASES)
def test_no_tensor_of_the_weights_size_is_allocated(case: str) -> None:
    (rows, inputs, outputs), dtype, autocast, share = MEMORY_CASES[case]
    plan = cost.choose(rows, inputs + 1, outputs, BF16 if autocast else dtype, cw.Options())
    assert case.startswith(" ".join(plan[:2]))
    x = randn(rows, inputs, dtype=dtype)
    dy = randn(rows, outputs, seed=1, dtype=BF16 if autocast else dtype)
    layer = cw.Linear(inputs, outputs, dtype=dtype)
    size = layer.weight.numel() * layer.weight.element_size()

    def largest() -> int:
        with torch.autocast("cpu", dtype=BF16, enabled=autocast):
            out = layer(x)
        return largest_allocation(lambda: out.backward(dy))

    assert largest() >= size  # the measure sees the gradient
    layer.weight.grad = layer.bias.grad = None
    optimizer = FusedSGD(layer, LR)
    own = largest()
    optimizer.step()
    assert own < size, f"{own} bytes at once, the weight has {size}"
    if share is not None:
        assert own <= share * size, f"{own} bytes at once, {own / size:.2f} of the weight"


def test_a_spent_gradient_takes_no_memory() -> None:
    parameter = nn.Parameter(torch.zeros(512, 512))
    assert largest_allocation(lambda: setattr(parameter, "grad", SpentGradient(parameter))) == 0
    assert parameter.grad is not None
    assert "512" in repr(parameter.grad)
