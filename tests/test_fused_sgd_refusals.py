"""`FusedSGD`: an error wherever the step cannot be taken rightly, before any weight moves where that can be seen."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import F16, F32, F64, TOLERANCE, assert_close, assert_identical, randn
from fused_sgd_helpers import (
    LR,
    assert_steps_now,
    assert_unchanged,
    backward,
    layers,
    squares,
)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.nn.utils import parametrize

import consequentialism as cw
from consequentialism.optim import FusedSGD, SpentGradient

pytestmark = pytest.mark.usefixtures("fresh_compiler")


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
    assert model[0].recorder is None


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
    assert model.body.recorder is None


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
    model, x = layers(), randn(10, 6, dtype=F32)
    twin = copy.deepcopy(model).float()
    optimizer = FusedSGD(model, LR)
    model.float()
    for one, step in ((model, optimizer), (twin, torch.optim.SGD(twin.parameters(), LR))):
        backward(one, x)
        step.step()
    for name, expected in twin.named_parameters():
        assert model.get_parameter(name).dtype == F32
        assert_close(name, model.get_parameter(name), expected, TOLERANCE[F32])


@pytest.mark.parametrize("kind", ["fake model", "real model"])
def test_fake_tensors_have_no_numbers_to_look_at(kind: str) -> None:
    # Memory estimators and shape inference run a whole training step so.
    model = layers() if kind == "real model" else None
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = layers() if model is None else model
        optimizer = FusedSGD(model, LR)
        x = randn(10, 6).requires_grad_()
        backward(model, x)
        optimizer.step()
        assert x.grad is not None
        assert x.grad.shape == x.shape
        assert all(p.grad is None for p in model.parameters())


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
        squares(compiled[isinstance(model[0].recorder, cw.optim.LayerStep)](x)).backward()

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
