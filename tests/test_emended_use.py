"""`Emended` as an optimizer among optimizers: state, checkpoints, schedulers, scaling, clipping, closures, groups."""

from __future__ import annotations

import copy
import math
import warnings
from pathlib import Path
from typing import Any

import emended_helpers
import pytest
import torch
import torch.distributed.checkpoint as dcp
from cases import F64, assert_close, assert_identical, randn
from emended_helpers import EXACT, mlp, parameters_of, squares, train
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

import consequentialism as cw
from consequentialism.optim import memory

F32 = torch.float32
INNER = {
    "SGD": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, 0.02),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 0.02),
    "Adafactor": lambda p: torch.optim.Adafactor(p, 0.02),
    "ScheduleFree": lambda p: pytest.importorskip("pytorch_optimizer").ScheduleFreeSGD(p, lr=0.05),
    "SOAP": lambda p: pytest.importorskip("pytorch_optimizer").SOAP(p, lr=0.01),
}
OPTIONS: dict[str, Any] = {"refresh_every": 3, "memory": 0.5}


def make(model: nn.Module, name: str = "AdamW", **options: Any) -> cw.optim.Emended:
    return cw.optim.Emended(INNER[name](model.parameters()), model, **{**OPTIONS, **options})


def batches(first: int, last: int, dtype: torch.dtype = F32) -> list[Any]:
    return [randn(20, 6, seed=step, dtype=dtype) for step in range(first, last)]


def run(model: nn.Module, optimizer: torch.optim.Optimizer, rows: list[Any]) -> None:
    for x in rows:
        train(model, optimizer, x, 1)


def assert_same(model: nn.Module, twin: nn.Module) -> None:
    for (name, own), expected in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert_identical(name, own.detach(), expected.detach())


@pytest.mark.parametrize("name", INNER)
@pytest.mark.parametrize("steps", [1, 4, 6])
def test_resuming_is_bitwise(name: str, steps: int, tmp_path: Path) -> None:
    model = mlp(F32)
    optimizer = make(model, name)
    run(model, optimizer, batches(0, steps))
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "saved.pt")
    run(model, optimizer, batches(steps, steps + 5))
    saved = torch.load(tmp_path / "saved.pt", weights_only=name != "SOAP")
    other = mlp(F32)
    resumed = make(other, name)
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    run(other, resumed, batches(steps, steps + 5))
    assert_same(other, model)


def test_state_stands_in_the_weights_state() -> None:
    model = mlp(torch.bfloat16)
    optimizer = make(model)
    assert isinstance(optimizer, torch.optim.Optimizer)
    run(model, optimizer, batches(0, 2, torch.bfloat16))
    state = optimizer.state[model[0].weight]
    assert {"input_gram", "root", "gram_rows", "emended_steps", "exp_avg"} <= set(state)
    assert "root" not in optimizer.state[model[0].bias]
    twin = make(mlp(torch.bfloat16))
    twin.load_state_dict(optimizer.state_dict())
    loaded = twin.state[twin.units[0].weight]
    for key in ("input_gram", "root", "gram_rows"):  # torch's own way would round them to the weight's type
        assert_identical(key, loaded[key], state[key])
    assert loaded["exp_avg"].dtype == torch.bfloat16


def test_layers_that_share_do_so_again_after_loading() -> None:
    model = nn.ModuleList(nn.Linear(6, 4) for _ in range(2))
    optimizer = make(model)

    def step(optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        x = randn(20, 6, dtype=F32)
        (squares(model[0](x)) + squares(model[1](x))).backward()
        optimizer.step()

    step(optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    del optimizer
    other = make(model)
    other.load_state_dict(saved)
    assert other.state[model[0].weight]["root"] is other.state[model[1].weight]["root"]
    step(other)


def test_loading_into_another_refresh_rule() -> None:
    model = mlp(F32)
    optimizer = make(model, refresh_every=5)
    run(model, optimizer, batches(0, 7))
    other = make(model, refresh_every=2)
    other.load_state_dict(optimizer.state_dict())
    recording = []
    for x in batches(7, 12):
        recording.append(other._recorder.recording)
        run(model, other, [x])
    assert recording == [step % 2 == 0 for step in range(7, 12)]


@pytest.mark.parametrize("steps", [0, 4])
@pytest.mark.parametrize("full", [False, True])
def test_distributed_checkpoint(steps: int, full: bool, tmp_path: Path) -> None:
    model = mlp(F32)
    optimizer = make(model)
    run(model, optimizer, batches(0, steps))
    options = StateDictOptions(full_state_dict=full)

    def state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        return {
            "model": get_model_state_dict(model, options=options),
            "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
        }

    saved = state(model, optimizer)
    assert "input_gram" in saved["optimizer"]["state"]["0.weight"]
    dcp.save(saved, checkpoint_id=tmp_path / "checkpoint", no_dist=True)
    run(model, optimizer, batches(steps, steps + 5))
    other = mlp(F32)
    resumed = make(other)
    loaded = state(other, resumed)
    dcp.load(loaded, checkpoint_id=tmp_path / "checkpoint", no_dist=True)
    set_model_state_dict(other, loaded["model"], options=options)
    set_optimizer_state_dict(other, resumed, loaded["optimizer"], options=options)
    run(other, resumed, batches(steps, steps + 5))
    assert_same(other, model)


def test_a_checkpoint_that_does_not_fit() -> None:
    model = mlp(F32)
    optimizer = make(model)
    run(model, optimizer, batches(0, 4))
    saved = copy.deepcopy(optimizer.state_dict())
    before = copy.deepcopy(optimizer.state_dict())

    def changed(key: str, value: Any) -> dict[str, Any]:
        state = copy.deepcopy(saved)
        state["state"][0][key] = value
        return state

    without = copy.deepcopy(saved)
    del without["state"][0]["root"]
    for state, match in (
        (
            changed("input_gram", torch.zeros(3, 3)),
            r"input_gram of layer '0' must have the shape \[7, 7\], got \[3, 3\]",
        ),
        (changed("root", torch.full((7, 7), math.nan)), "root of layer '0' has NaN or infinity"),
        (changed("input_gram", torch.full((7, 7), math.inf)), "input_gram of layer '0' has NaN or infinity"),
        (changed("gram_rows", torch.tensor(-1.0)), "gram_rows of layer '0' must be finite and at least 0, got -1.0"),
        (changed("gram_rows", "many"), "gram_rows of layer '0' must be finite and at least 0, got 'many'"),
        (changed("root", None), r"root of layer '0' must be a tensor of real numbers, got None \(NoneType\)"),
        (changed("input_gram", torch.eye(7) * 1j), "input_gram of layer '0' must be a tensor of real .*complex64"),
        (changed("emended_steps", -3), "emended_steps of layer '0' must be a whole number of at least 0, got -3"),
        (changed("emended_steps", torch.tensor(2.5)), "emended_steps of layer '0' must be a whole number of at least"),
        (without, "no coordinates of layers '0'"),
    ):
        with pytest.raises(ValueError, match=match):
            optimizer.load_state_dict(state)
        for key, value in before["state"][0].items():
            assert_identical(key, optimizer.state_dict()["state"][0][key], value)
    other = make(mlp(F32), block=2)
    with pytest.raises(ValueError, match="must have the shape"):
        other.load_state_dict(saved)
    fewer = make(mlp(F32), filter_fn=lambda _, name: name == "0")
    with pytest.raises(ValueError, match="has coordinates of parameters 2, which are stepped plainly here"):
        fewer.load_state_dict(saved)
    assert not fewer.state
    single = nn.Linear(6, 4)
    with pytest.raises(ValueError, match="parameter group"):
        make(single).load_state_dict(saved)


def test_a_state_of_the_plain_optimizer_begins_the_coordinates_anew() -> None:
    model = mlp(F32)
    plain = torch.optim.AdamW(model.parameters(), 0.02)
    run(model, plain, batches(0, 3))
    optimizer = make(model)
    with pytest.warns(UserWarning, match="the coordinates begin anew"):
        optimizer.load_state_dict(plain.state_dict())
    run(model, optimizer, batches(3, 5))
    assert float(optimizer.state[model[0].weight]["step"]) == 5


def test_a_state_in_coordinates_is_announced_where_nothing_is() -> None:
    model = mlp(F32)
    optimizer = make(model)
    run(model, optimizer, batches(0, 3))
    plain = make(model, damping=math.inf)
    with pytest.warns(UserWarning, match="moments in its coordinates are taken for plain ones"):
        plain.load_state_dict(optimizer.state_dict())
    assert "root" not in plain.state[model[0].weight]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain.load_state_dict(plain.state_dict())


def test_grad_scaler_unscales_and_skips() -> None:
    model = mlp(F32)
    twin = copy.deepcopy(model)
    optimizer, plain = make(model), make(twin)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=100)

    def step(x: Any) -> None:
        optimizer.zero_grad()
        scaler.scale(squares(model(x))).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()

    for x in batches(0, 3):
        step(x)
        plain.zero_grad()
        squares(twin(x)).backward()
        nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
        plain.step()
    for own, expected in zip(model.parameters(), twin.parameters(), strict=True):
        assert_close("parameter", own, expected, 1e-5)
    weights, state = parameters_of(model), copy.deepcopy(optimizer.state_dict())
    spoilt = randn(20, 6, dtype=F32)
    spoilt[0, 0] = math.inf
    step(spoilt)
    for own, expected in zip(model.parameters(), weights, strict=True):
        assert_identical("parameter", own.detach(), expected)
    for key, value in state["state"][0].items():
        assert_identical(key, optimizer.state_dict()["state"][0][key], value)
    step(randn(20, 6, dtype=F32))
    assert float(optimizer.state[model[0].weight]["gram_rows"]) == float(state["state"][0]["gram_rows"]) * 0.5 + 10


def test_fused_inner_optimizer_under_a_scaler() -> None:
    model = mlp(F32)
    inner = torch.optim.AdamW(model.parameters(), 0.02, fused=True)
    twin = copy.deepcopy(model)
    optimizer = cw.optim.Emended(inner, model)
    plain = cw.optim.Emended(torch.optim.AdamW(twin.parameters(), 0.02), twin)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    x = randn(20, 6, dtype=F32)
    scaler.scale(squares(model(x))).backward()
    squares(twin(x)).backward()
    scaler.step(optimizer)
    scaler.update()
    plain.step()
    for own, expected in zip(model.parameters(), twin.parameters(), strict=True):
        assert_close("parameter", own, expected, 1e-5)
    weights = parameters_of(model)
    model[0].weight.grad[0, 0] = math.inf
    scaler.step(optimizer)
    for own, expected in zip(model.parameters(), weights, strict=True):
        assert_identical("parameter", own.detach(), expected)


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("shard_state", [False, True])
def test_an_early_state_begins_the_coordinates_anew(shard_state: bool) -> None:
    """Loaded between two refreshes: the next step refreshes, as that of a new optimizer does."""
    model = mlp(F64)
    twin = copy.deepcopy(model)
    x = randn(20, 6)

    def emended(of: nn.Module) -> cw.optim.Emended:
        return cw.optim.Emended(torch.optim.SGD(of.parameters(), 0.2), of, shard_state=shard_state)

    optimizer = emended(model)
    weights, begun = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, x, 6)
    model.load_state_dict(weights)
    optimizer.load_state_dict(begun)
    assert train(model, optimizer, x, 3) == train(twin, emended(twin), x, 3)


def test_layers_added_later_are_refreshed_at_once() -> None:
    model = mlp(F64)
    optimizer = cw.optim.Emended(torch.optim.SGD(model[0].parameters(), 0.2), model)
    train(model, optimizer, randn(20, 6), 3)
    optimizer.add_param_group({"params": list(model[2].parameters())})
    assert optimizer.is_recording
    train(model, optimizer, randn(20, 6), 1)
    assert float(optimizer.state[model[2].weight]["gram_rows"]) > 0


@pytest.mark.usefixtures("one_process")
def test_a_shard_that_was_never_dealt_out_is_whole() -> None:
    model = mlp(F64)
    optimizer = cw.optim.Emended(torch.optim.AdamW(model.parameters(), 0.02), model, shard_state=True)
    train(model, optimizer, randn(20, 6), 1)
    optimizer.consolidate_state_dict()
    assert set(memory.KEYS) <= set(optimizer.state_dict()["state"][0])
    fresh = cw.optim.Emended(torch.optim.AdamW(model.parameters(), 0.02), model, shard_state=True)
    fresh.consolidate_state_dict()
    assert all(set(memory.KEYS) <= set(state) for state in fresh.state_dict()["state"].values())


@pytest.mark.filterwarnings("error::UserWarning")
def test_schedulers() -> None:
    model = mlp(F64)
    twin = copy.deepcopy(model)
    optimizer = cw.optim.Emended(torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), model)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=10)
    plain = cw.optim.Emended(torch.optim.SGD(twin.parameters(), 0.1, momentum=0.9), twin)
    for x in batches(0, 6, F64):
        for group, own in zip(plain.param_groups, optimizer.param_groups, strict=True):
            group.update(lr=own["lr"], momentum=own["momentum"])
        run(model, optimizer, [x])
        run(twin, plain, [x])
        scheduler.step()
    assert_same(model, twin)
    assert optimizer.param_groups is optimizer.optimizer.param_groups


def test_closure_and_hooks() -> None:
    model = mlp(F64)
    twin = copy.deepcopy(model)
    optimizer, plain = make(model), make(twin)
    x, calls = randn(20, 6), []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))

    def closure() -> Any:
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = squares(model(x))
        loss.backward()
        calls.append("loss")
        return loss

    loss = optimizer.step(closure)
    assert float(loss) == train(twin, plain, x, 1)[0]
    assert calls == ["before", "loss", "after"]
    assert_same(model, twin)


def test_state_dict_hooks() -> None:
    model = mlp(F32)
    optimizer, calls = make(model), []
    run(model, optimizer, batches(0, 1))
    optimizer.register_state_dict_pre_hook(lambda *_: calls.append("save"))
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "more": 1})
    optimizer.register_load_state_dict_pre_hook(lambda _, state: {k: v for k, v in state.items() if k != "more"})
    optimizer.register_load_state_dict_post_hook(lambda *_: calls.append("loaded"))
    saved = optimizer.state_dict()
    assert saved["more"] == 1
    optimizer.load_state_dict(saved)
    assert calls == ["save", "loaded"]


def test_groups_of_their_own_and_added_ones() -> None:
    """A rate and a decay for each group, also for weight and bias of one layer; a layer added later takes part."""
    model = mlp(F64)
    twin = copy.deepcopy(model)
    first, second = model[0], model[2]
    inner = torch.optim.SGD(
        [{"params": [first.weight], "lr": 0.1, "weight_decay": 0.1}, {"params": [first.bias]}], lr=0.3
    )
    optimizer = cw.optim.Emended(inner, model, memory=0, refresh_every=1, damping=0.1)
    assert [unit.name for unit in optimizer.units] == ["0"]
    optimizer.add_param_group({"params": list(second.parameters()), "lr": 0.2})
    assert [unit.name for unit in optimizer.units] == ["0", "2"]
    x = randn(20, 6)
    hidden = twin[1](twin[0](x))
    squares(twin[2](hidden)).backward()
    train(model, optimizer, x, 1)
    for layer, rows, rates, decay in ((twin[0], x, (0.1, 0.3), 0.1), (twin[2], hidden.detach(), (0.2, 0.2), 0.0)):
        rows = torch.cat([rows, rows.new_ones(20, 1)], 1)
        moment = rows.T @ rows / 20
        n = rows.shape[1]
        values, vectors = torch.linalg.eigh(moment + 0.1 * moment.trace() / n * torch.eye(n, dtype=F64))
        root = (vectors * values**-0.5) @ vectors.T
        gradient = torch.cat([layer.weight.grad + decay * layer.weight, layer.bias.grad[:, None]], 1) @ root
        rate = torch.tensor([rates[0]] * (n - 1) + [rates[1]], dtype=F64)
        change = (gradient * rate) @ root
        own = model[0] if layer is twin[0] else model[2]
        assert_close("weight", own.weight, layer.weight - change[:, :-1], EXACT)
        assert_close("bias", own.bias, layer.bias - change[:, -1], EXACT)


@pytest.mark.parametrize("name", ["AdamW", "NAdam"])
def test_steps_of_the_optimizer_inside_are_announced_once(name: str) -> None:
    model = mlp(F64)
    inner = getattr(torch.optim, name)(model.parameters(), 0.01)
    optimizer = cw.optim.Emended(inner, model)
    train(model, optimizer, randn(20, 6), 3)
    with pytest.warns(UserWarning, match=f"the {name} inside is stepped itself, plainly; step the Emended") as caught:
        train(model, inner, randn(20, 6), 3)
    assert [warning.filename for warning in caught] == [emended_helpers.__file__]
    plain = cw.optim.Emended(getattr(torch.optim, name)(model.parameters(), 0.01), model, damping=math.inf)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, plain, randn(20, 6), 2)
        train(model, plain.optimizer, randn(20, 6), 2)


def test_it_cannot_be_copied() -> None:
    model = mlp(F32)
    optimizer = make(model)
    with pytest.raises(TypeError, match="Emended cannot be copied or pickled, it belongs to its model"):
        copy.deepcopy(optimizer)
    assert "Emended(damping=0.03" in repr(optimizer)
    assert "AdamW" in repr(optimizer)
    with pytest.raises(AttributeError, match="nothing_like_it"):
        optimizer.nothing_like_it  # noqa: B018


def test_an_inner_step_that_raises_leaves_everything() -> None:
    model = mlp(F64)
    optimizer = make(model, "RMSprop")
    run(model, optimizer, batches(0, 1, F64))
    squares(model(randn(20, 6))).backward()
    weights, gradients = parameters_of(model), [p.grad for p in model.parameters()]
    optimizer.optimizer.register_step_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("no")))
    with pytest.raises(RuntimeError, match="no"):
        optimizer.step()
    for parameter, weight, gradient in zip(model.parameters(), weights, gradients, strict=True):
        assert_identical("parameter", parameter.detach(), weight)
        assert parameter.grad is gradient
    assert "root" in optimizer.state[model[0].weight]


def test_memory_beyond_the_plain_optimizer() -> None:
    """The state holds the moment and the root; between refreshes nothing else is kept."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
    optimizer = make(model)
    run(model, optimizer, [randn(100, 64, dtype=F32)] * 4)
    ours = sum(
        value.nbytes
        for state in optimizer.state.values()
        for key, value in state.items()
        if key in ("input_gram", "root", "gram_rows", "emended_steps")
    )
    assert ours == 2 * (2 * 65 * 65 * 4 + 16)
    assert all(unit.slot.gram is None for unit in optimizer.units)


TAKES: dict[str, tuple[Any, int]] = {  # with the largest temporary in sizes of a layer
    "SGD": (lambda m: cw.optim.Emended(torch.optim.SGD(m.parameters(), 0.1, momentum=0.9, nesterov=True), m), 3),
    "AdamW": (lambda m: cw.optim.Emended(torch.optim.AdamW(m.parameters(), 0.01), m), 3),
    "Muon": (lambda m: cw.optim.Muon(m, 0.01, aux={"lr": 0.01}), 6),
}


@pytest.mark.parametrize("name", TAKES)
def test_a_step_has_one_layers_temporaries(name: str) -> None:
    """Whatever the number of layers; counted in all allocations and frees of a step between refreshes."""
    make_one, most = TAKES[name]
    peaks = []
    for count in (3, 9):
        model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(count)))
        optimizer = make_one(model)
        for step in range(2):
            x = randn(100, 64, seed=step, dtype=F32)
            train(model, optimizer, x, 1)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            optimizer.step()
        held = peak = 0
        for event in profile.profiler.kineto_results.events():
            if event.name() == "[memory]":
                held += event.nbytes()
                peak = max(peak, held)
        peaks.append(peak)
        assert held == 0
    assert peaks[1] == pytest.approx(peaks[0], rel=0.01)
    assert peaks[1] <= 1.01 * most * 64 * 65 * 4
