"""`consequentialism.optim.Emended` where the model or the groups change during training."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import F64, assert_close, assert_identical, randn
from emended_helpers import EXACT, mlp, parameters_of, squares, train
from torch import nn

import consequentialism as cw
from consequentialism.optim.checks import check_moved


def emended(model: nn.Module, lr: float = 0.5, **options: Any) -> cw.optim.Emended:
    return cw.optim.Emended(torch.optim.SGD(model.parameters(), lr), model, **options)


def adamw(model: nn.Module) -> cw.optim.Emended:
    return cw.optim.Emended(torch.optim.AdamW(model.parameters(), 0.01), model)


def test_a_layer_unfrozen_between_refreshes_waits_for_one() -> None:
    model = mlp(F64)
    model[0].requires_grad_(False)
    optimizer = cw.optim.Emended(torch.optim.SGD(model.parameters(), 0.2), model)
    x = 10 * randn(20, 6)
    train(model, optimizer, x, 5)
    model[0].requires_grad_(True)
    before = parameters_of(model)
    train(model, optimizer, x, 1)
    assert_identical("waiting", model[0].weight.detach(), before[0])
    assert (model[2].weight != before[2]).any()
    assert optimizer.is_recording
    train(model, optimizer, x, 1)
    assert float(optimizer.state[model[0].weight]["gram_rows"]) > 0
    assert (model[0].weight != before[0]).any()


def test_an_expert_first_used_between_refreshes_is_emended() -> None:
    experts = nn.ModuleList([nn.Linear(16, 4, dtype=F64), nn.Linear(16, 4, dtype=F64)])
    optimizer, x = emended(experts), 10 * randn(256, 16)
    train(experts[0], optimizer, x, 11)
    losses = train(experts[1], optimizer, x, 8)
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize("tied", [False, True])
def test_a_weight_replaced_afterwards_is_refused(tied: bool) -> None:
    model = nn.Sequential(nn.Linear(8, 8, False), nn.ReLU(), nn.Linear(8, 8, False))
    optimizer = emended(model)
    model[2].weight = model[0].weight if tied else nn.Parameter(torch.randn(8, 8))
    squares(model(torch.randn(5, 8))).backward()
    before = parameters_of(model)
    with pytest.raises(RuntimeError, match="the weights of '2' were replaced or tied"):
        optimizer.step()
    for own, expected in zip(parameters_of(model), before, strict=True):
        assert_identical("weight", own, expected)


def test_biases_added_later_begin_their_layers_anew() -> None:
    model = mlp(F64)
    weights, biases = [model[0].weight, model[2].weight], [model[0].bias, model[2].bias]
    optimizer = cw.optim.Emended(torch.optim.AdamW(weights, 0.02), model)
    train(model, optimizer, randn(20, 6), 3)
    optimizer.add_param_group({"params": biases})
    train(model, optimizer, randn(20, 6), 1)
    assert optimizer.state[model[0].weight]["root"].shape == (7, 7)
    assert float(optimizer.state[model[0].weight]["gram_rows"]) == 20 * (1 - 0.95)


@pytest.mark.parametrize("first", ["group", "move"])
def test_a_model_that_is_moved_near_a_group_keeps_its_moments(first: str) -> None:
    model, x = mlp(torch.float32), randn(20, 6)
    optimizer = cw.optim.Emended(torch.optim.SGD(model[0].parameters(), 0.1), model, refresh_every=4)
    train(model, optimizer, x.float(), 5)
    before = optimizer.state[model[0].weight]["input_gram"].clone()
    if first == "move":
        model.double()
    optimizer.add_param_group({"params": list(model[2].parameters())})
    model.double()
    losses = train(model, optimizer, x, 4)
    assert losses[-1] < losses[0]
    types = [optimizer.state[model[i].weight]["root"].dtype for i in (0, 2)]
    assert types == [torch.float32, F64], "the second layer has had no state that would stay behind"
    moment = optimizer.state[model[0].weight]["input_gram"]
    assert (moment - before).norm() < 1e-5 * before.norm(), "the same batch: it was neither lost nor begun anew"


def test_a_group_without_layers_costs_the_known_ones_no_step() -> None:
    model = nn.Sequential(nn.Linear(6, 5, dtype=F64), nn.LayerNorm(5, dtype=F64))
    optimizer = cw.optim.Emended(torch.optim.SGD(model[0].parameters(), 0.1), model, refresh_every=4)
    train(model, optimizer, randn(20, 6), 6)
    before = model[0].weight.detach().clone()
    optimizer.add_param_group({"params": list(model[1].parameters())})
    train(model, optimizer, randn(20, 6), 1)
    assert (model[0].weight != before).any()


@pytest.mark.parametrize("fits", [False, True])
def test_a_model_moved_after_a_load_is_followed_where_it_was_refused(fits: bool) -> None:
    model, x = mlp(torch.float32), randn(20, 6)
    donor = copy.deepcopy(model)
    of_donor, optimizer = emended(donor), emended(model)
    train(donor, of_donor, x.float(), 1)
    saved = of_donor.state_dict()
    if fits:
        optimizer.load_state_dict(saved)
    else:
        saved["state"][2]["root"].fill_(float("nan"))  # of the second layer, once the first was looked at
        with pytest.raises(ValueError, match="root of layer '2' has NaN"):
            optimizer.load_state_dict(saved)
    model.double()
    train(model, optimizer, x, 3)
    types = [optimizer.state[model[i].weight]["root"].dtype for i in (0, 2)]
    assert types == [torch.float32 if fits else F64] * 2


def test_a_model_moved_after_a_plain_load_is_followed() -> None:
    model, x = mlp(torch.float32), randn(20, 6)
    optimizer = emended(model)
    train(model, optimizer, x.float(), 2)
    with pytest.warns(UserWarning, match="begin anew"):
        optimizer.load_state_dict(plain_state(model))
    model.double()
    train(model, optimizer, x, 2)
    assert optimizer.state[model[0].weight]["root"].dtype == F64


def adafactor(model: nn.Module) -> cw.optim.Emended:
    """Its state of a matrix is a row and a column."""
    return cw.optim.Emended(torch.optim.Adafactor(model.parameters(), 0.1), model)


@pytest.mark.parametrize("make", [adamw, adafactor, cw.optim.Muon], ids=["AdamW", "Adafactor", "Muon"])
@pytest.mark.parametrize("target", [F64, torch.bfloat16])
def test_a_model_moved_between_steps_is_told_how_its_state_follows(make: Any, target: torch.dtype) -> None:
    model, x = mlp(torch.float32), randn(20, 6)
    optimizer = make(model, lr=0.01, aux={"lr": 0.01}) if make is cw.optim.Muon else make(model)
    train(model, optimizer, x.float(), 3)
    model.to(target)
    squares(model(x.to(target))).backward()
    before, steps = parameters_of(model), int(optimizer._steps)
    saying = rf"layer '0' was torch.float32 on cpu at its last step and is {target} on cpu now.*load_state_dict\(opt"
    with pytest.raises(RuntimeError, match=saying):
        optimizer.step()
    for own, expected in zip(parameters_of(model), before, strict=True):
        assert_identical("weight", own, expected)
    optimizer.load_state_dict(optimizer.state_dict())
    assert int(optimizer._steps) == steps
    losses = train(model, optimizer, x.to(target), 30)
    assert losses[-1] < losses[0]
    root = optimizer.state[model[0].weight]["root"]
    assert root.dtype == (F64 if target == F64 else torch.float32)


def test_scales_beside_a_quantized_moment_do_not_follow() -> None:
    weight = nn.Parameter(torch.zeros(4, 5, dtype=torch.bfloat16))
    unit: Any = SimpleNamespace(own=weight, name="0", stepped_as=(torch.float32, weight.device))
    scales = {"absmax1": torch.ones(3), "step": torch.tensor(1.0), "output_root": torch.eye(4)}
    check_moved([unit], {weight: {"state1": torch.zeros(4, 5, dtype=torch.uint8), **scales}})
    check_moved([unit], {weight: {"output_root": torch.eye(4)}})
    with pytest.raises(RuntimeError, match=r"layer '0' was torch.float32 on cpu at its last"):
        check_moved([unit], {weight: {"row_var": torch.ones(4, 1)}})


def test_a_model_on_another_device_is_told_so_in_forward() -> None:
    model = mlp(F64)
    optimizer = emended(model)
    train(model, optimizer, randn(20, 6), 1)
    model.to("meta")
    saying = r"Linear's weight is on meta now.* on cpu: optimizer\.load_state_dict\(optimizer\.state_dict\(\)\) takes"
    with pytest.raises(RuntimeError, match=saying):
        model(randn(20, 6).to("meta"))


def test_steps_of_a_graph_are_not_counted_where_a_new_layer_waits_for_a_refresh() -> None:
    model = mlp(F64)
    optimizer = cw.optim.Emended(torch.optim.SGD(model[0].parameters(), 0.1), model)
    train(model, optimizer, randn(20, 6), 3)
    optimizer.replayed()
    optimizer.add_param_group({"params": list(model[2].parameters())})
    with pytest.raises(ValueError, match="steps must be taken eagerly now, where a refresh is due, got 1"):
        optimizer.replayed()


def plain_state(model: nn.Module) -> dict[str, Any]:
    """What SGD with momentum saves after a step."""
    plain = torch.optim.SGD(model.parameters(), 0.5, momentum=0.9)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    plain.step()
    return plain.state_dict()


def test_a_group_that_is_refused_changes_nothing() -> None:
    class Unknown(torch.optim.Optimizer):
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.data.add_(parameter.grad, alpha=-group["lr"])

    model = mlp(F64)
    inner = Unknown(model[0].parameters(), {"lr": 0.1, "weight_decay": 0.0})
    optimizer = cw.optim.Emended(inner, model, refresh_every=1)
    train(model, optimizer, randn(20, 6), 2)
    with pytest.raises(ValueError, match="weight"):
        optimizer.add_param_group({"params": list(model[2].parameters()), "weight_decay": 0.1})
    assert len(optimizer.param_groups) == 1
    rows = float(optimizer.state[model[0].weight]["gram_rows"])
    train(model, optimizer, randn(20, 6), 1)
    assert float(optimizer.state[model[0].weight]["gram_rows"]) != rows


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_a_recurrent_layer_of_which_only_the_last_state_is_used(kind: type[nn.Module]) -> None:
    """One function, read from the outputs or from the last state."""
    found = []
    for last in (False, True):
        torch.manual_seed(0)
        layer: Any = kind(5, 4, batch_first=True, dtype=F64)
        optimizer = emended(layer)
        out, state = layer(randn(6, 7, 5))
        squares((state[0] if kind is nn.LSTM else state)[-1] if last else out[:, -1]).backward()
        optimizer.step()
        found.append(layer.weight_ih_l0.detach())
    assert_close("weight", found[1], found[0], EXACT)


def test_both_outputs_of_a_recurrent_layer_enter_its_rows_once() -> None:
    layer = nn.GRU(5, 4, batch_first=True, dtype=F64)
    optimizer = emended(layer)
    out, state = layer(randn(6, 7, 5))
    (squares(out) + squares(state)).backward()
    optimizer.step()
    assert float(optimizer.state[layer.weight_ih_l0]["gram_rows"]) == pytest.approx(42 * (1 - 0.95))


@pytest.mark.parametrize("own_step", [False, True])
def test_hooks_of_the_optimizer_inside_see_every_gradient(own_step: bool) -> None:
    class Subclass(torch.optim.SGD):
        pass

    model = mlp(F64)
    inner = (torch.optim.SGD if own_step else Subclass)(model.parameters(), 0.1)
    seen: list[int] = []

    def zeroed(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        seen.append(len(gradients))
        for gradient in gradients:
            gradient.zero_()

    inner.register_step_pre_hook(zeroed)
    inner.register_step_post_hook(lambda *_: seen.append(-1))
    optimizer = cw.optim.Emended(inner, model)
    before = copy.deepcopy(parameters_of(model))
    train(model, optimizer, randn(20, 6), 2)
    assert seen == [4, -1, 4, -1]
    for own, expected in zip(parameters_of(model), before, strict=True):
        assert_identical("weight", own, expected)
