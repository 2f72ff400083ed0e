"""`FusedSGD`: the weights of plain SGD, no gradient in memory, and an error wherever that cannot be right."""

from __future__ import annotations

import copy
import gc
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import BACKENDS, BF16, F16, F32, F64, TOLERANCE, Shape, assert_close, assert_identical, device_of, randn
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

import consequentialism as cw
from consequentialism import autograd, cost
from consequentialism.optim import FusedSGD, SpentGradient

LR = 0.125
# One shape for each plan of the cost model, without a bias; half types take the first two only.
PLANS: dict[cost.Plan, Shape] = {
    cost.Plan("dual", "input"): (12, 20, 40),
    cost.Plan("primal", "input"): (40, 12, 50),
    cost.Plan("dual", "gradient"): (12, 40, 9),
    cost.Plan("primal", "gradient"): (50, 12, 17),
}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def layers(dtype: torch.dtype = F64, **options: Any) -> nn.Sequential:
    return nn.Sequential(cw.Linear(6, 9, dtype=dtype, **options), nn.Tanh(), cw.Linear(9, 4, dtype=dtype, **options))


def squares(out: Tensor) -> Tensor:
    return out.square().mean()


Backward = Callable[[nn.Module, Tensor], None]


def backward(model: nn.Module, x: Tensor) -> None:
    squares(model(x)).backward()


def assert_steps_as_sgd(
    model: nn.Module,
    x: Tensor,
    bound: float = TOLERANCE[F64],
    steps: int = 3,
    run: Backward = backward,
    lr: float = LR,
) -> None:
    """Twins, one with each optimizer; every parameter's total change must agree. ``model`` ends up stepped."""
    twin = copy.deepcopy(model)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    fused, plain = FusedSGD(model, lr), torch.optim.SGD(twin.parameters(), lr)
    for _ in range(steps):
        for one, optimizer in ((model, fused), (twin, plain)):
            optimizer.zero_grad()
            run(one, x)
            optimizer.step()
    for name, expected in twin.named_parameters():
        own = model.get_parameter(name)
        assert own.grad is None or not isinstance(own.grad, SpentGradient)
        assert own.dtype == expected.dtype
        change, wanted = own.detach() - start[name], expected.detach() - start[name]
        assert_close(name, change, wanted, bound)
        if expected.requires_grad:
            assert wanted.abs().max() > 0, f"{name} was not trained"


# --- the weights are those of plain SGD -----------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
@pytest.mark.parametrize("plan", PLANS, ids="-".join)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_plan(backend: str, plan: cost.Plan, dtype: torch.dtype, bias: bool) -> None:
    rows, inputs, outputs = PLANS[plan]
    assert cost.choose(rows, inputs + bias, outputs, dtype, cw.Options()) == plan
    device = device_of(backend)
    model = nn.Sequential(cw.Linear(inputs, outputs, bias, backend=backend, device=device, dtype=dtype))
    assert_steps_as_sgd(model, randn(rows, inputs, dtype=dtype, device=device), 10 * TOLERANCE[dtype])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("plan", PLANS, ids="-".join)
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


class Mixed(nn.Module):
    """Emended and plain layers, an embedding, a norm, and two layers on one input."""

    def __init__(self, sparse: bool = False) -> None:
        super().__init__()
        self.table = cw.Embedding(11, 6, sparse=sparse, dtype=F64)
        self.left = cw.Linear(6, 8, damping=0.3, dtype=F64)
        self.right = cw.Linear(6, 8, bias=False, scale="gradient", dtype=F64)
        self.norm = nn.LayerNorm(8, dtype=F64)
        self.plain = nn.Linear(8, 5, dtype=F64)
        self.last = cw.Linear(5, 3, damping=0.5, damping_mode="absolute", scale="raw", dtype=F64)

    def forward(self, x: Tensor) -> Tensor:
        x = self.table(x)
        return self.last(torch.relu(self.plain(self.norm(self.left(x) * self.right(x)))))


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
@pytest.mark.parametrize("plan", PLANS, ids="-".join)
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
    prepared = autograd.prepare(x, False, 3, layer.options(), cw.reference, True, False)
    with torch.no_grad():
        autograd.update(layer.weight, None, prepared, x, dy, torch.tensor(8.0) if device_scalar else 8.0)
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
        prepared = autograd.prepare(x, True, outputs, cw.Options(), cw.reference, True, True)
        weight, bias = torch.zeros(outputs, inputs, dtype=dtype), torch.zeros(outputs, dtype=dtype)
        lr = torch.tensor(0.3, dtype=F32) if device_scalar else torch.tensor(0.3, dtype=F32).item()
        autograd.update(weight, bias, prepared, x, dy, lr)
        dw, db = cw.reference.emended_weight_grad(x.double(), dy.double(), True)
        assert db is not None
        assert_close("weight", weight, -0.3 * dw, max(TOLERANCE[dtype], 1e-7))
        assert_close("bias", bias, -0.3 * db, max(TOLERANCE[dtype], 1e-7))
        dy[0, 0] = float("inf")
        autograd.update(weight, bias, prepared, x, dy, lr)
        assert weight.isnan().all()
        assert bias.isnan().all()


@pytest.mark.parametrize("sparse", [False, True])
def test_whole_steps_with_a_rate_on_the_device(monkeypatch: pytest.MonkeyPatch, sparse: bool) -> None:
    monkeypatch.setattr(cw.optim, "rate", lambda lr, parameter: torch.as_tensor(lr, dtype=F64))
    assert_steps_as_sgd(Mixed(sparse), torch.arange(24) % 11, 1e-10, lr=0.01)


def test_a_rate_stays_out_of_a_cuda_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnCuda:
        is_cuda = True
        device = torch.device("meta")

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    for lr in (0.5, torch.tensor(0.5)):
        with pytest.raises(RuntimeError, match="give it as a tensor on meta"):
            cw.optim.rate(lr, OnCuda())  # type: ignore[arg-type]
    kept = cw.optim.rate(torch.ones(1, device="meta"), OnCuda())  # type: ignore[arg-type]
    assert isinstance(kept, Tensor)
    assert kept.shape == ()
    with pytest.raises(RuntimeError, match="meta, a parameter on cpu"):
        cw.optim.rate(torch.ones((), device="meta"), torch.zeros(3))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert cw.optim.rate(torch.tensor(0.5), OnCuda()) == 0.5  # type: ignore[arg-type]


# --- no gradient in memory ------------------------------------------------------------------------------------------


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
    assert case.startswith(" ".join(plan))
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


# --- an optimizer among torch's -------------------------------------------------------------------------------------


def test_trains() -> None:
    x = randn(96, 10, dtype=F32)
    target = (x[:, :3] * x[:, 3:6]).argmax(1)
    model = nn.Sequential(cw.Linear(10, 32), nn.Tanh(), cw.Linear(32, 3))
    optimizer = FusedSGD(model, lr=1.0)
    losses = []
    for _ in range(80):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss)  # graphs that stay alive do no harm
    assert losses[-1].item() < 0.25 * losses[0].item()


def test_gradients_are_spent_until_the_step_and_none_after() -> None:
    model, optimizer = (m := layers()), FusedSGD(m, LR)
    backward(model, randn(10, 6))
    assert all(isinstance(p.grad, SpentGradient) for p in model.parameters())
    optimizer.step()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_after_the_step_or_before_backward(set_to_none: bool) -> None:
    model, optimizer = (m := Mixed()), FusedSGD(m, 0.01)
    for _ in range(2):
        optimizer.zero_grad(set_to_none)
        backward(model, torch.arange(11))
        optimizer.step()
        model.zero_grad(set_to_none)


def test_step_without_backward_does_nothing() -> None:
    model = Mixed()
    before = copy.deepcopy(model.state_dict())
    optimizer = FusedSGD(model, LR)
    optimizer.step()
    model(torch.arange(11))
    optimizer.step()
    for name, value in model.state_dict().items():
        assert_identical(name, value, before[name])


@pytest.mark.parametrize("tensor", [False, True])
def test_schedulers(tensor: bool) -> None:
    model, x = Mixed(), torch.arange(11)
    twin = copy.deepcopy(model)
    pairs = []
    for one, make in ((model, FusedSGD), (twin, lambda m, lr: torch.optim.SGD(m.parameters(), lr))):
        optimizer = make(one, torch.tensor(0.1, dtype=F64) if tensor else 0.1)
        pairs.append((one, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)))
    for _ in range(5):
        for one, optimizer, scheduler in pairs:
            optimizer.zero_grad()
            backward(one, x)
            optimizer.step()
            scheduler.step()
    assert pairs[0][1].param_groups[0]["lr"] == pairs[1][1].param_groups[0]["lr"]
    for name, expected in twin.named_parameters():
        assert_close(name, model.get_parameter(name), expected, 1e-10)


def test_one_cycle_with_two_rates() -> None:
    model = Mixed()
    optimizer = FusedSGD(model, 0.1, other_lr=0.01)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, [0.1, 0.01], total_steps=4, cycle_momentum=False)
    for _ in range(3):
        backward(model, torch.arange(11))
        optimizer.step()
        scheduler.step()


def test_a_rate_given_as_a_tensor_is_used_as_it_is() -> None:
    layer, x, dy = cw.Linear(5, 3, dtype=F64), randn(8, 5), randn(8, 3, seed=1)
    rate = torch.tensor(0.5, dtype=F64)
    optimizer = FusedSGD(layer, rate)
    assert optimizer.param_groups[0]["lr"] is rate
    rate.fill_(0.25)
    before = layer.weight.detach().clone()
    layer(x).backward(dy)
    optimizer.step()
    assert_close("change", layer.weight.detach() - before, -0.25 * cw.emended_weight_grad(x, dy)[0], TOLERANCE[F64])


def test_state_dict_round_trip() -> None:
    optimizer = FusedSGD(Mixed(), 0.5, other_lr=0.25)
    optimizer.param_groups[0]["lr"] = 0.125
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    model = Mixed()
    loaded = FusedSGD(model, 1.0)
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    assert [group["lr"] for group in loaded.param_groups] == [0.125, 0.25]
    assert loaded.state_dict() == optimizer.state_dict()
    assert isinstance(model.left.layer_step, cw.optim.LayerStep)
    backward(model, torch.arange(11))
    loaded.step()


def test_the_model_itself_is_as_before() -> None:
    model = layers()
    text, names = repr(model), list(model.state_dict())
    optimizer = FusedSGD(model, LR)
    assert repr(model) == text
    assert list(model.state_dict()) == names
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False))
    for copied in copies:
        assert copied[0].layer_step is None
        backward(copied, randn(10, 6))
        assert copied[0].weight.grad is not None
    assert isinstance(model[0].layer_step, cw.optim.LayerStep)
    for attempt in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="state_dict"):
            attempt(optimizer)


def test_release() -> None:
    model, x = layers(), randn(10, 6)
    twin = copy.deepcopy(model)
    fused, plain = FusedSGD(model, LR), torch.optim.SGD(twin.parameters(), LR)
    for k in range(4):
        if k == 2:
            fused.release()
            assert model[0].layer_step is None
        for one, optimizer in ((model, fused), (twin, plain)):
            optimizer.zero_grad()
            backward(one, x)
            assert isinstance(one[0].weight.grad, SpentGradient) == (one is model and k < 2)
            optimizer.step()
    for name, expected in twin.named_parameters():
        assert_close(name, model.get_parameter(name), expected, TOLERANCE[F64])
    FusedSGD(model, LR)


def test_an_optimizer_that_is_gone_leaves_the_layers_as_they_were() -> None:
    model = layers()
    optimizer = FusedSGD(model, LR)
    before = model[0].weight.detach().clone()
    del optimizer
    gc.collect()
    backward(model, randn(10, 6))
    assert_identical("weight", model[0].weight.detach(), before)
    assert type(model[0].weight.grad) is Tensor


def test_gradients_of_the_input_alone_change_no_weight() -> None:
    # Adversarial examples, saliency: what asks for no weight gradient is no step.
    model, x = layers(), randn(10, 6).requires_grad_()
    before = copy.deepcopy(model.state_dict())
    (expected,) = torch.autograd.grad(squares(model(x)), x)
    optimizer = FusedSGD(model, LR)
    (dx,) = torch.autograd.grad(squares(model(x)), x)
    assert_identical("dx", dx, expected)
    squares(model(x)).backward(inputs=[x])
    assert_identical("x.grad", x.grad, expected)
    for name, value in model.state_dict().items():
        assert_identical(name, value, before[name])
    assert_steps_now(model, optimizer)


def assert_steps_now(model: nn.Module, optimizer: FusedSGD) -> None:
    before = [p.detach().clone() for p in model.parameters()]
    backward(model, randn(10, 6))
    optimizer.step()
    for old, parameter in zip(before, model.parameters(), strict=True):
        assert not torch.equal(old, parameter)


@pytest.mark.parametrize("chosen", ["0.weight", "0.bias", "2.weight"])
@pytest.mark.parametrize("rows", [3, 40])
def test_backward_into_some_inputs(rows: int, chosen: str) -> None:
    def run(model: nn.Module, x: Tensor) -> None:
        squares(model(x)).backward(inputs=[model.get_parameter(chosen)])

    model = layers()
    twin, x = copy.deepcopy(model), randn(rows, 6)
    for one, optimizer in ((model, FusedSGD(model, LR)), (twin, torch.optim.SGD(twin.parameters(), LR))):
        run(one, x)
        optimizer.step()
    for name, expected in twin.named_parameters():
        assert_close(name, model.get_parameter(name), expected, TOLERANCE[F64])


def test_a_forward_whose_graph_lives_on_does_no_harm() -> None:
    model, x = layers(), randn(10, 6)
    optimizer = FusedSGD(model, LR)
    kept = [model(x) for _ in range(3)]
    assert_steps_now(model, optimizer)
    assert len(kept) == 3


def test_backward_through_an_old_graph_is_an_error() -> None:
    model, optimizer = (m := layers()), FusedSGD(m, LR)
    stale = squares(model(randn(10, 6)))
    assert_steps_now(model, optimizer)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stale.backward()


# --- refused --------------------------------------------------------------------------------------------------------


def assert_unchanged(
    model: nn.Module, run: Callable[[], Any], match: str, error: type[Exception] = RuntimeError
) -> None:
    """``run`` raises, and no parameter has moved."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(error, match=match):
        run()
    for name, parameter in model.named_parameters():
        assert_identical(name, parameter.detach(), before[name])


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"lr": "fast"}, TypeError),
        ({"lr": True}, TypeError),
        ({"lr": None}, TypeError),
        ({"lr": -1.0}, ValueError),
        ({"lr": float("nan")}, ValueError),
        ({"lr": float("inf")}, ValueError),
        ({"lr": torch.ones(2)}, ValueError),
        ({"lr": torch.ones((), requires_grad=True)}, ValueError),
        ({"lr": 1.0, "other_lr": -1.0}, ValueError),
        ({"lr": 1.0, "momentum": 0.9}, TypeError),
        ({"lr": 1.0, "weight_decay": 0.1}, TypeError),
    ],
    ids=str,
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception]) -> None:
    model = layers()
    with pytest.raises(error, match=next(reversed(arguments))):
        FusedSGD(model, **arguments)
    assert model[0].layer_step is None


def test_bad_models() -> None:
    with pytest.raises(TypeError, match="model"):
        FusedSGD(layers().parameters(), 1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="convert"):
        FusedSGD(nn.Linear(3, 3), 1.0)


class Tied(nn.Module):
    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.body = cw.Linear(6, 6, dtype=F64)
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


@pytest.mark.parametrize("kind", ["emended", "plain", "memory"])
def test_tied_weights(kind: str) -> None:
    head = (nn.Linear if kind == "plain" else cw.Linear)(6, 6, dtype=F64)
    model = Tied(head)
    if kind == "memory":
        head.weight.data = model.body.weight.data
    else:
        head.weight = model.body.weight
    assert_unchanged(model, lambda: FusedSGD(model, LR), "body: .*tied", ValueError)
    assert model.body.layer_step is None


def test_weights_tied_later() -> None:
    model, x = Tied(nn.Linear(6, 6, dtype=F64)), randn(10, 6)
    optimizer = FusedSGD(model, LR)
    model.head.weight = model.body.weight
    with pytest.raises(RuntimeError, match=r"FusedSGD.*already updated"):
        backward(model, x)
    optimizer.release()
    model = Tied(cw.Linear(6, 6, dtype=F64))
    optimizer = FusedSGD(model, LR)
    model.head.weight = model.body.weight
    assert_unchanged(model, lambda: backward(model, x), "not those that the optimizer was made with")


def test_a_layer_used_twice() -> None:
    model = layers()
    model.append(cw.Linear(4, 6, dtype=F64))
    optimizer = FusedSGD(model, LR)
    x = randn(10, 6)
    assert_unchanged(model, lambda: squares(model(model(x))).backward(), "used more than once")
    assert_unchanged(model, lambda: (squares(model(x)) + squares(model(2 * x))).backward(), "used more than once")
    assert_steps_now(model, optimizer)


def test_a_weight_used_outside_its_layer() -> None:
    x = randn(10, 6)
    for penalty in (lambda w: w.square().sum(), lambda w: F.linear(x, w).square().mean()):
        model = cw.Linear(6, 4, dtype=F64)
        optimizer = FusedSGD(model, LR)
        with pytest.raises(RuntimeError, match=r"FusedSGD|modified by an inplace operation"):
            (squares(model(x)) + penalty(model.weight)).backward()
        del optimizer
        model = cw.Linear(6, 4, dtype=F64)
        optimizer = FusedSGD(model, LR)
        penalty(model.weight).backward()
        assert_unchanged(model, optimizer.step, "its own backward did not make")
        assert_unchanged(model, lambda: backward(model, x), "its own backward did not make")  # noqa: B023


def test_accumulation() -> None:
    model, x = layers(), randn(10, 6)
    optimizer = FusedSGD(model, LR)
    backward(model, x)
    assert_unchanged(model, lambda: backward(model, x), r"second backward .* before step\(\)")
    optimizer.zero_grad()
    assert_unchanged(model, lambda: backward(model, x), r"second backward .* before step\(\)")


def test_backward_twice_through_one_graph() -> None:
    model = layers()
    optimizer = FusedSGD(model, LR)
    loss = squares(model(randn(10, 6)))
    loss.backward(retain_graph=True)
    assert_unchanged(model, loss.backward, "second backward")
    optimizer.step()


def test_gradients_thrown_away_before_the_step() -> None:
    for clear in ("optimizer", "model"):
        model = layers()
        optimizer = FusedSGD(model, LR)
        backward(model, randn(10, 6))
        (optimizer if clear == "optimizer" else model).zero_grad()
        assert_unchanged(model, optimizer.step, "cleared or replaced between backward and step")


def test_gradients_left_from_before() -> None:
    model = layers()
    backward(model, randn(10, 6))
    optimizer = FusedSGD(model, LR)
    assert_unchanged(model, lambda: backward(model, randn(10, 6)), "zero_grad")
    optimizer.zero_grad()
    assert_steps_now(model, optimizer)


@pytest.mark.parametrize(
    "use",
    [
        lambda ps: nn.utils.clip_grad_norm_(ps, 1.0),
        lambda ps: nn.utils.clip_grad_norm_(ps, 1.0, foreach=True),
        lambda ps: nn.utils.clip_grad_value_(ps, 1.0),
        lambda ps: nn.utils.get_total_norm([p.grad for p in ps]),
        lambda ps: torch.optim.SGD(ps, 1.0).step(),
        lambda ps: torch.optim.Adam(ps).step(),
        lambda ps: ps[0].grad.norm(),
        lambda ps: ps[0].grad.mul_(0.5),
        lambda ps: ps[0].grad.clone(),
        lambda ps: ps[0].grad.data,
        lambda ps: ps[0].square().sum().backward(),
        lambda ps: torch.optim.SGD(ps, 1.0).zero_grad(set_to_none=False),
    ],
)
def test_every_use_of_a_gradient_raises(use: Callable[[list[nn.Parameter]], Any]) -> None:
    model = layers()
    optimizer = FusedSGD(model, LR)
    backward(model, randn(10, 6))
    parameters = list(model.parameters())
    assert_unchanged(model, lambda: use(parameters), "already updated")
    optimizer.step()


@pytest.mark.parametrize("unscale", [True, False])
@pytest.mark.parametrize("plain_too", [True, False])
def test_grad_scaler(plain_too: bool, unscale: bool) -> None:
    model = layers(F32)
    if plain_too:
        model.append(nn.Linear(4, 4))
    optimizer = FusedSGD(model, LR)
    scaler = torch.amp.GradScaler("cpu")
    with torch.autocast("cpu", dtype=F16):
        loss = squares(model(randn(10, 6, dtype=F32)).float())
    scaler.scale(loss).backward()
    with pytest.raises(RuntimeError, match="GradScaler"):
        scaler.unscale_(optimizer) if unscale else scaler.step(optimizer)


def test_grad_scaler_that_is_off() -> None:
    model = layers()
    optimizer = FusedSGD(model, LR)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    before = model[0].weight.detach().clone()
    scaler.scale(squares(model(randn(10, 6)))).backward()
    scaler.step(optimizer)
    scaler.update()
    assert not torch.equal(before, model[0].weight)


@pytest.mark.parametrize("kind", ["tensor", "post accumulate"])
@pytest.mark.parametrize("when", ["before", "after", "after forward"])
def test_hooks_on_parameters(when: str, kind: str) -> None:
    def register(parameter: nn.Parameter) -> Any:
        if kind == "tensor":
            return parameter.register_hook(lambda g: 2 * g)
        return parameter.register_post_accumulate_grad_hook(lambda p: None)

    model, x = layers(), randn(10, 6)
    if when == "before":
        handle = register(model[0].weight)
        assert_unchanged(model, lambda: FusedSGD(model, LR), "0: a parameter has hooks", ValueError)
        handle.remove()
    optimizer = FusedSGD(model, LR)
    if when == "after":
        handle = register(model[0].bias)
        assert_unchanged(model, lambda: backward(model, x), "'0': a parameter has hooks")
        handle.remove()
    if when == "after forward":
        loss = squares(model(x))
        handle = register(model[0].weight)
        assert_unchanged(model, loss.backward, "'0': a parameter has hooks")
        handle.remove()
    assert_steps_now(model, optimizer)


def test_module_hooks_work() -> None:
    model, seen = layers(), []
    optimizer = FusedSGD(model, LR)
    model[2].register_full_backward_hook(lambda module, dx, dy: seen.append(dx))
    assert_steps_now(model, optimizer)
    assert len(seen) == 1


def test_process_group_and_more_than_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    model = layers()
    optimizer = FusedSGD(model, LR)
    model[0].process_group = object()
    assert_unchanged(model, lambda: backward(model, randn(10, 6)), "process_group")
    optimizer.release()
    assert_unchanged(model, lambda: FusedSGD(model, LR), "process_group", ValueError)
    model[0].process_group = None
    optimizer = FusedSGD(model, LR)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *_: 2)
    assert_unchanged(model, lambda: backward(model, randn(10, 6)), "more than one process")
    optimizer.release()
    assert_unchanged(model, lambda: FusedSGD(model, LR), "more than one process", ValueError)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
def test_ddp_of_one_process() -> None:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = layers()
        optimizer = FusedSGD(model, LR)
        parallel = nn.parallel.DistributedDataParallel(model)
        assert_unchanged(model, lambda: backward(parallel, randn(10, 6)), "DistributedDataParallel")
        optimizer.release()
        assert_unchanged(model, lambda: FusedSGD(parallel, LR), "DistributedDataParallel", ValueError)
        with pytest.raises(ValueError, match="DistributedDataParallel"):
            FusedSGD(nn.ModuleDict({"inner": parallel}), LR)
        FusedSGD(model, LR)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("key", ["momentum", "weight_decay", "maximize", "nesterov"])
def test_more_than_sgd_in_a_group(key: str) -> None:
    model = layers()
    optimizer = FusedSGD(model, LR)
    more = nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match=key):
        optimizer.add_param_group({"params": [more], key: 0.5})
    optimizer.add_param_group({"params": [more], "lr": 0.5})
    state = optimizer.state_dict()
    state["param_groups"][0][key] = 0.5
    with pytest.raises(ValueError, match=key):
        optimizer.load_state_dict(state)
    assert key not in optimizer.param_groups[0]
    optimizer.param_groups[1][key] = 0.5
    with pytest.raises(ValueError, match=key):
        optimizer.step()


def test_a_group_of_ones_own_is_stepped() -> None:
    model = layers()
    optimizer = FusedSGD(model, LR)
    more = nn.Parameter(torch.zeros(3, dtype=F64))
    optimizer.add_param_group({"params": [more], "lr": 0.5})
    more.sum().backward()
    optimizer.step()
    assert_identical("more", more.detach(), torch.full((3,), -0.5, dtype=F64))


def test_closure() -> None:
    optimizer = FusedSGD(layers(), LR)
    with pytest.raises(RuntimeError, match="closure"):
        optimizer.step(lambda: 0.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("tensor", [False, True])
def test_rate_changed_between_backward_and_step(tensor: bool) -> None:
    model = layers()
    optimizer = FusedSGD(model, torch.tensor(LR) if tensor else LR)
    backward(model, randn(10, 6))
    optimizer.param_groups[0]["lr"] *= 0.5
    assert_unchanged(model, optimizer.step, "learning rate changed")


def test_two_optimizers_of_one_layer() -> None:
    model = layers()
    first = FusedSGD(model, LR)
    with pytest.raises(ValueError, match="another FusedSGD"):
        FusedSGD(model, LR)
    first.release()
    FusedSGD(model, LR)


def test_replaced_and_parametrised_weights() -> None:
    x = randn(10, 6)
    for change in ("replace", "parametrise", "assign"):
        model = layers()
        optimizer = FusedSGD(model, LR)
        if change == "replace":
            model[0].weight = nn.Parameter(model[0].weight.detach().clone())
        elif change == "assign":
            model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
        else:
            parametrize.register_parametrization(model[0], "weight", nn.Tanh())
        assert_unchanged(model, lambda: backward(model, x), "not those that the optimizer was made with")  # noqa: B023
        optimizer.release()
        if change == "parametrise":
            with pytest.raises(ValueError, match="computed"):
                FusedSGD(model, LR)


def test_moved_to_another_type() -> None:
    # torch keeps the parameters when it converts a module in place, so the optimizer goes on.
    model = layers()
    optimizer = FusedSGD(model, LR)
    model.float()
    backward(model, randn(10, 6, dtype=F32))
    optimizer.step()


def test_revert() -> None:
    model = layers()
    optimizer = FusedSGD(model, LR)
    cw.revert(model)
    backward(model, randn(10, 6))
    assert type(model[0].weight.grad) is Tensor
    assert_unchanged(model, optimizer.step, "reverted")
    optimizer.release()
    before = model[0].weight.detach() - LR * model[0].weight.grad
    optimizer.step()
    assert_identical("weight", model[0].weight.detach(), before)


def test_released_between_forward_and_backward() -> None:
    model = layers()
    optimizer = FusedSGD(model, LR)
    loss = squares(model(randn(10, 6)))
    optimizer.release()
    assert_unchanged(model, loss.backward, "released or deleted")


def test_create_graph() -> None:
    model, x = layers(), randn(10, 6).requires_grad_()
    optimizer = FusedSGD(model, LR)
    assert_unchanged(model, lambda: squares(model(x)).backward(create_graph=True), "create_graph")
    assert_unchanged(model, lambda: torch.autograd.grad(squares(model(x)), x, create_graph=True), "create_graph")
    assert_steps_now(model, optimizer)


def test_autograd_grad_of_a_weight() -> None:
    model = layers()
    optimizer = FusedSGD(model, LR)
    for name, parameter in model.named_parameters():
        loss = squares(model(randn(10, 6)))
        layer = name.partition(".")[0]
        assert_unchanged(model, lambda: torch.autograd.grad(loss, parameter), f"autograd.grad .*'{layer}'")  # noqa: B023
    assert_steps_now(model, optimizer)


@pytest.mark.parametrize("transform", ["grad", "vmap", "vjp", "grad of the input", "jvp"])
def test_func_transforms(transform: str) -> None:
    layer, x = cw.Linear(5, 3, dtype=F64), randn(8, 5)
    optimizer = FusedSGD(layer, LR)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def objective(parameters: dict[str, Tensor]) -> Tensor:
        return squares(torch.func.functional_call(layer, parameters, (x,)))

    run: dict[str, Callable[[], Any]] = {
        "grad": lambda: torch.func.grad(objective)(parameters),
        "vmap": lambda: torch.func.vmap(layer)(x),
        "vjp": lambda: torch.func.vjp(objective, parameters),
        "grad of the input": lambda: torch.func.grad(lambda x: squares(layer(x)))(x),
        "jvp": lambda: torch.func.jvp(layer, (x,), (x,)),
    }
    assert_unchanged(layer, run[transform], r"torch\.func")
    with torch.no_grad():
        assert_close("y", torch.func.vmap(layer)(x), layer(x), TOLERANCE[F64])
    optimizer.release()


def test_functional_call_with_other_weights() -> None:
    layer, x = cw.Linear(5, 3, dtype=F64), randn(8, 5)
    optimizer = FusedSGD(layer, LR)
    other = {name: p.detach().clone().requires_grad_() for name, p in layer.named_parameters()}
    assert_unchanged(layer, lambda: torch.func.functional_call(layer, other, (x,)), "not those")
    optimizer.release()


def test_compile_of_a_full_graph() -> None:
    model = layers()
    optimizer = FusedSGD(model, LR)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_unchanged(model, lambda: compiled(randn(10, 6)), r"FusedSGD does not support torch\.compile", Exception)
    with torch.no_grad():
        assert_close("y", compiled(randn(10, 6)), model(randn(10, 6)), TOLERANCE[F64])
    optimizer.release()


@pytest.mark.parametrize("warm", [False, True])
def test_compile_with_graph_breaks_is_right(warm: bool) -> None:
    def run(model: nn.Module, x: Tensor) -> None:
        squares(compiled[isinstance(model[0].layer_step, cw.optim.LayerStep)](x)).backward()

    model, x = layers(), randn(10, 6)
    twin = copy.deepcopy(model)
    compiled = {True: torch.compile(model, backend="aot_eager"), False: twin}
    if warm:  # a graph compiled before the optimizer must not be stale
        squares(compiled[True](x)).backward()
        assert type(model[0].weight.grad) is Tensor
        model.zero_grad()
    fused, plain = FusedSGD(model, LR), torch.optim.SGD(twin.parameters(), LR)
    for _ in range(3):
        for one, optimizer in ((model, fused), (twin, plain)):
            run(one, x)
            assert isinstance(one[0].weight.grad, SpentGradient) == (one is model)
            optimizer.step()
            optimizer.zero_grad()
    for name, expected in twin.named_parameters():
        assert_close(name, model.get_parameter(name), expected, TOLERANCE[F64])


def test_compiled_training_step() -> None:
    model = layers()
    twin, x = copy.deepcopy(model), randn(10, 6)
    fused, plain = FusedSGD(model, LR), torch.optim.SGD(twin.parameters(), LR)

    @torch.compile(backend="aot_eager")
    def train(model: nn.Module, optimizer: Any, x: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = squares(model(x))
        loss.backward()
        optimizer.step()
        return loss

    for _ in range(3):
        train(model, fused, x)
        backward(twin, x)
        plain.step()
        plain.zero_grad()
    for name, expected in twin.named_parameters():
        assert_close(name, model.get_parameter(name), expected, TOLERANCE[F64])


@pytest.mark.filterwarnings("ignore:Anomaly Detection", "ignore:Error detected in")
def test_anomaly_detection() -> None:
    layer, x = cw.Linear(5, 3, dtype=F64), randn(8, 5)
    optimizer = FusedSGD(layer, LR)
    x[0, 0] = float("nan")
    with torch.autograd.detect_anomaly(), pytest.raises(RuntimeError, match="NaN or infinite"):
        layer(x).backward(randn(8, 3))
    optimizer.release()


def test_data_parallel_replicas_are_refused() -> None:
    # torch.nn.DataParallel copies a module's attributes to replicas whose weights are no parameters.
    model = layers()
    optimizer = FusedSGD(model, LR)
    replica = model[0]._replicate_for_data_parallel()
    replica.weight = model[0].weight * 1
    replica.bias = model[0].bias * 1
    assert_unchanged(model, lambda: replica(randn(10, 6)), "not those that the optimizer was made with")
    optimizer.release()
