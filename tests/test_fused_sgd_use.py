"""`FusedSGD` as one optimizer among torch's: schedulers, state, release, partial backward passes."""

from __future__ import annotations

import copy
import gc
import io
import pickle

import pytest
import torch
from cases import F32, F64, TOLERANCE, assert_close, assert_identical, randn
from fused_sgd_helpers import (
    LR,
    Mixed,
    assert_steps_now,
    backward,
    layers,
    squares,
)
from torch import Tensor, nn
from torch.nn import functional as F

import consequentialism as cw
from consequentialism.optim import FusedSGD, SpentGradient


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
    model = Mixed()
    twin = copy.deepcopy(model)
    for one, optimizer in ((model, FusedSGD(model, 0.01)), (twin, torch.optim.SGD(twin.parameters(), 0.01))):
        for _ in range(2):
            optimizer.zero_grad(set_to_none)
            backward(one, torch.arange(11))
            optimizer.step()
            one.zero_grad(set_to_none)
    for name, expected in twin.named_parameters():
        assert_close(name, model.get_parameter(name), expected, TOLERANCE[F64])


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
    twin = copy.deepcopy(model)
    linear = [p for m in twin.modules() if isinstance(m, cw.Linear) for p in m.parameters()]
    known = {id(p) for p in linear}
    others = [p for p in twin.parameters() if id(p) not in known]
    plain = torch.optim.SGD([{"params": linear, "lr": 0.1}, {"params": others, "lr": 0.01}])
    for one, optimizer in ((model, FusedSGD(model, 0.1, other_lr=0.01)), (twin, plain)):
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, [0.1, 0.01], total_steps=4, cycle_momentum=False)
        for _ in range(3):
            optimizer.zero_grad()
            backward(one, torch.arange(11))
            optimizer.step()
            scheduler.step()
    for name, expected in twin.named_parameters():
        assert_close(name, model.get_parameter(name), expected, 1e-10)


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
    assert isinstance(model.left.recorder, cw.optim.LayerStep)
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
        assert copied[0].recorder is None
        backward(copied, randn(10, 6))
        assert copied[0].weight.grad is not None
    assert isinstance(model[0].recorder, cw.optim.LayerStep)
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
            assert model[0].recorder is None
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
