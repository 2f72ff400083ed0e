"""Roots of the outputs' side: by their definition in float64, where they stand, and what is refused."""

from __future__ import annotations

import copy
import io
import itertools
import math
import weakref
from typing import Any

import pytest
import torch
from cases import F64, TOLERANCE, assert_close, assert_identical, randn
from emended_helpers import EXACT, parameters_of, squares, train
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import consequentialism as cw
from consequentialism.optim import inside, outputs
from consequentialism.solve.root import eigen_power


class Conv1D(nn.Module):
    """`transformers`' layer, its weight ``[I, O]``."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(randn(inputs, outputs)), nn.Parameter(randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


def power(moment: Tensor, damping: float, exponent: float) -> Tensor:
    """``((B + c I) / t)^-q``."""
    t = moment.trace() / moment.shape[0]
    values, vectors = torch.linalg.eigh(moment / t + damping * torch.eye(moment.shape[0], dtype=F64))
    return vectors @ values.pow(-exponent).diag() @ vectors.T


def emended(model: nn.Module, inner: type[torch.optim.Optimizer] = torch.optim.AdamW, **options: Any) -> Any:
    options = {"output_exponent": 0.25, "damping": 0.1, **options}
    return cw.optim.Emended(inner(model.parameters(), lr=0.01), model, **options)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("exponent", [0.25, 0.5, 1.0])
def test_sgd_multiplies_by_both_roots_twice(bias: bool, exponent: float) -> None:
    x, dy = randn(40, 6), randn(40, 5, seed=1)
    layer = nn.Linear(6, 5, bias, dtype=F64)
    start = copy.deepcopy(layer)
    options: Any = {"scale": "gradient", "memory": 0.0, "output_exponent": exponent, "output_damping": 0.2}
    optimizer = emended(layer, torch.optim.SGD, **options)
    layer(x).backward(dy)
    optimizer.step()
    rows = torch.cat([x, x.new_ones(40, 1)], 1) if bias else x
    gradient = dy.T @ rows
    right = power(rows.T @ rows / 40, 0.1, 0.5)
    left = power(gradient @ right @ right @ gradient.T, 0.2, exponent)
    change = -0.01 * left @ left @ gradient @ right @ right
    assert_close("weight", layer.weight - start.weight, change[:, :6], EXACT)
    if bias:
        assert_close("bias", layer.bias - start.bias, change[:, 6], EXACT)


def test_blocks_of_outputs_are_layers_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two layers on one input, and one layer of both their outputs in two blocks that share a trace."""
    monkeypatch.setattr(outputs, "BLOCK", 4)
    x, dy = randn(40, 3), randn(40, 8, seed=1)
    dy[:, 4:] = dy[:, :4]
    both, one = nn.Linear(3, 8, dtype=F64), nn.Linear(3, 4, dtype=F64)
    with torch.no_grad():
        one.weight.copy_(both.weight[:4])
    before = one.weight.detach().clone()
    first, second = emended(both), emended(one)
    for layer, optimizer, errors in ((both, first, dy), (one, second, dy[:, :4])):
        layer(x).backward(errors)
        optimizer.step()
    assert first.state[both.weight]["output_root"].shape == (1, 2, 4, 4)
    assert (one.weight - before).abs().max() > 0
    assert_close("block", both.weight[:4], one.weight, EXACT)


@pytest.mark.parametrize(
    ("layer", "plain", "x"),
    [
        (Conv1D(5, 6), nn.Linear(6, 5, dtype=F64), randn(20, 6)),
        (nn.Conv2d(6, 5, 1, dtype=F64), nn.Linear(6, 5, dtype=F64), randn(20, 6)),
        (nn.ConvTranspose1d(6, 5, 1, dtype=F64), nn.Linear(6, 5, dtype=F64), randn(20, 6)),
    ],
    ids=["transposed", "conv", "conv-transposed"],
)
def test_other_layers_step_as_the_linear_layer_that_they_are(layer: Any, plain: nn.Linear, x: Tensor) -> None:
    if isinstance(layer, Conv1D):
        cw.register(Conv1D, like=nn.Linear, transposed=True)
    outward = isinstance(layer, (Conv1D, nn.ConvTranspose1d))
    with torch.no_grad():
        weight = layer.weight.flatten(1)
        plain.weight.copy_(weight.T if outward else weight)
        plain.bias.copy_(layer.bias)
    shaped = x if isinstance(layer, Conv1D) else x.view(20, 6, *[1] * (layer.weight.ndim - 2))
    own, expected = emended(layer), emended(plain)
    for _ in range(3):
        for model, optimizer, inputs in ((layer, own, shaped), (plain, expected, x)):
            optimizer.zero_grad()
            (model(inputs).reshape(20, 5) - 1).square().mean().backward()
            optimizer.step()
    now = layer.weight.detach().flatten(1)
    assert_close("weight", now.T if outward else now, plain.weight, EXACT)
    assert_close("bias", layer.bias, plain.bias, EXACT)


def test_groups_have_roots_of_their_own() -> None:
    layer = nn.Conv1d(4, 6, 1, groups=2, dtype=F64)
    optimizer = emended(layer)
    train(layer, optimizer, randn(8, 4, 3), 3)
    root = optimizer.state[layer.weight]["output_root"]
    assert root.shape == (2, 1, 3, 3)
    assert not torch.equal(root[0], root[1])


def test_accumulation_is_the_union() -> None:
    x = randn(24, 6)
    model = nn.Sequential(nn.Linear(6, 5, dtype=F64), nn.Tanh(), nn.Linear(5, 3, dtype=F64))
    twin = copy.deepcopy(model)
    whole, parts = emended(model, memory=0.5), emended(twin, memory=0.5)
    for _ in range(3):
        whole.zero_grad()
        squares(model(x)).backward()
        whole.step()
        parts.zero_grad()
        for chunk in x.chunk(3):
            (squares(twin(chunk)) / 3).backward()
        parts.step()
    for one, other in zip(parameters_of(model), parameters_of(twin), strict=True):
        assert_close("parameter", one, other, EXACT)


@pytest.mark.parametrize("inner", [torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.SGD])
def test_own_steps_are_those_of_the_wrapper(inner: type[torch.optim.Optimizer]) -> None:
    model = nn.Sequential(nn.Linear(6, 5, dtype=F64))
    twin = copy.deepcopy(model)
    own, wrapper = emended(model, inner), emended(twin, inner)
    wrapper._own_step = None
    x = randn(20, 6)
    train(model, own, x, 5)
    train(twin, wrapper, x, 5)
    for one, other in zip(parameters_of(model), parameters_of(twin), strict=True):
        assert_close("parameter", one, other, EXACT)


def test_without_an_exponent_nothing_is_there_and_nothing_changes() -> None:
    model, x = nn.Linear(6, 5, dtype=F64), randn(20, 6)
    twin = copy.deepcopy(model)
    own, plain = emended(model, output_exponent=0.0), emended(twin, output_exponent=0)
    train(model, own, x, 3)
    train(twin, plain, x, 3)
    assert "output_root" not in own.state[model.weight]
    assert_identical("weight", model.weight, twin.weight)


def test_embeddings_have_none() -> None:
    model = nn.Sequential(nn.Embedding(7, 4, dtype=F64), nn.Linear(4, 3, dtype=F64))
    optimizer = emended(model)
    train(model, optimizer, torch.arange(7), 2)
    assert "output_root" not in optimizer.state[model[0].weight]
    assert "output_root" in optimizer.state[model[1].weight]


def test_weights_with_one_output_a_group_have_none() -> None:
    """Their root would be a number, the same for all."""
    x = randn(3, 4, 7, 7)
    for inner in (torch.optim.SGD, torch.optim.AdamW):
        model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4, dtype=F64), nn.Flatten(), nn.Linear(100, 1, dtype=F64))
        twin = copy.deepcopy(model)
        optimizer = emended(model, inner)
        train(model, optimizer, x, 3)
        train(twin, emended(twin, inner, output_exponent=0.0), x, 3)
        assert all("output_root" not in state for state in optimizer.state.values())
        for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
            assert_identical("weight", mine, other)


def test_older_moments_are_forgotten_by_the_steps_that_passed() -> None:
    """A layer that is met late brings a refresh of its own."""
    model, x = nn.ModuleList(nn.Linear(6, 5, dtype=F64) for _ in range(2)), randn(20, 6)
    optimizer = emended(model, refresh_every=8, memory=0.5)
    moments = []
    for step in range(17):
        optimizer.zero_grad()
        loss = model[0](x).square().sum()
        (loss + model[1](x).square().sum() if step > 10 else loss).backward()
        before = local_copy(optimizer, model[0].weight)
        optimizer.step()
        after = local_copy(optimizer, model[0].weight)
        if before is None or after["output_steps"] != before["output_steps"]:
            moments.append((0 if before is None else int(before["output_steps"]), int(after["output_steps"])))
    assert moments == [(step, step + 1) for step in range(8)] + [(8, 9), (9, 13), (13, 17)]


def local_copy(optimizer: Any, weight: nn.Parameter) -> Any:
    return copy.deepcopy(optimizer.state[weight]) if weight in optimizer.state else None


@pytest.mark.parametrize("damping", [0.1, 0.01, 0.001])
def test_wide_outputs_lose_nothing_to_rounding(damping: float) -> None:
    """Few outputs of many hold the trace: the largest eigenvalue is then far above the ridge."""
    blocks = torch.diag_embed(torch.full((2, 64), 1e-6)).float()
    generator = torch.Generator().manual_seed(0)
    g, turn = torch.randn(8, 8, generator=generator), torch.linalg.qr(torch.randn(64, 64, generator=generator))[0]
    blocks[0, :8, :8] += 4096 * (g @ g.T) / (g @ g.T).trace()
    blocks = turn @ blocks @ turn.T
    made = outputs.Outputs(0.25, damping, 0.95)._roots_of(blocks, 4096)
    assert_close("root", made, eigen_power(blocks.double(), damping, 0.25), TOLERANCE[torch.float32])


def test_many_groups_take_linear_room() -> None:
    unit = cw.optim.Emended(torch.optim.SGD((layer := nn.Conv2d(512, 1024, 1, groups=512)).parameters()), layer).units[
        0
    ]
    how, state = outputs.Outputs(0.25, 0.1, 0.95), {}
    how.complete(unit, state)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            largest = max([largest, *(own.numel() for own in tree_leaves(result) if isinstance(own, Tensor))])
            return result

    with Watch():
        how.take([(unit, state, torch.rand_like(state["output_gram"]))], 1)
    assert largest <= 2 * state["output_gram"].numel()


def test_a_step_has_room_for_one_layer_alone() -> None:
    """Also where roots of outputs are made: what is kept of a layer's gradient is a moment."""
    model, x = nn.Sequential(*(nn.Linear(96, 96, bias=False) for _ in range(12))), torch.randn(32, 96)
    optimizer = emended(model)
    train(model, optimizer, x, 1)
    model(x).square().sum().backward()
    alive: list[int] = []
    whole = outputs.moment_of

    def counted(unit: Any, gradients: Any) -> Any:
        alive.append(sum(own() is not None for own in seen))
        seen.append(weakref.ref(gradients[0]))
        return whole(unit, gradients)

    seen: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inside, "moment_of", counted)
        optimizer.step()
    assert len(alive) == 12
    assert max(alive) <= 1


def test_gradients_that_are_zero_or_not_finite_leave_the_root() -> None:
    layer, x = nn.Linear(6, 5, dtype=F64), randn(20, 6)
    optimizer = emended(layer, refresh_every=1)
    (layer(x) * 0).sum().backward()
    optimizer.step()
    state = optimizer.state[layer.weight]
    assert_identical("identity", state["output_root"][0, 0], torch.eye(5, dtype=F64))
    optimizer.zero_grad()
    train(layer, optimizer, x, 1)
    moment, root = state["output_gram"].clone(), state["output_root"].clone()
    assert not torch.equal(root[0, 0], torch.eye(5, dtype=F64))
    optimizer.zero_grad()
    (layer(x) * math.inf).sum().backward()
    optimizer.step()
    assert_identical("moment", state["output_gram"], moment)
    assert_identical("root", state["output_root"], root)


def test_gradients_that_cancel_over_outputs_make_a_root() -> None:
    """As those of a layer before a softmax: all entries of their moment together are zero."""
    layer, errors = nn.Linear(4, 2, dtype=F64), randn(8, 1, seed=1)
    optimizer = emended(layer)
    layer(randn(8, 4)).backward(torch.cat([errors, -errors], 1))
    optimizer.step()
    state = optimizer.state[layer.weight]
    moment = state["output_gram"][0, 0]
    assert float(moment.sum()) == 0
    assert_close("root", state["output_root"][0, 0], power(moment, 0.1, 0.25), EXACT)


def test_every_step_makes_the_root_anew_until_the_first_interval_is_over() -> None:
    layer, x = nn.Linear(6, 5, dtype=F64), randn(20, 6)
    optimizer = emended(layer, refresh_every=4)
    roots, inputs = [torch.eye(5, dtype=F64)[None, None]], [torch.eye(7, dtype=F64)]
    for _ in range(9):
        train(layer, optimizer, x, 1)
        roots.append(optimizer.state[layer.weight]["output_root"].clone())
        inputs.append(optimizer.state[layer.weight]["root"].clone())
    changed = [not torch.equal(one, two) for one, two in itertools.pairwise(roots)]
    assert changed == [step in (0, 1, 2, 3, 4, 8) for step in range(9)]
    assert torch.equal(inputs[3], inputs[4])  # after step 3, in which the inputs' root stays


def test_replays_wait_for_the_first_interval() -> None:
    layer, x = nn.Linear(6, 5, dtype=F64), randn(20, 6)
    optimizer = emended(layer, refresh_every=4)
    train(layer, optimizer, x, 3)
    assert not optimizer.is_recording
    with pytest.raises(ValueError, match="steps must be taken eagerly now, where the outputs' roots are due, got 1"):
        optimizer.replayed()
    train(layer, optimizer, x, 2)
    optimizer.replayed(3)


def test_resumes_bit_for_bit() -> None:
    model, x = nn.Linear(6, 5, dtype=F64), randn(20, 6)
    optimizer = emended(model, refresh_every=3)
    train(model, optimizer, x, 5)
    twin = copy.deepcopy(model)
    saved = io.BytesIO()
    torch.save(optimizer.state_dict(), saved)
    saved.seek(0)
    resumed = emended(twin, refresh_every=3)
    resumed.load_state_dict(torch.load(saved))
    train(model, optimizer, x, 5)
    train(twin, resumed, x, 5)
    assert_identical("weight", twin.weight, model.weight)


def test_states_of_other_options_load() -> None:
    """One without roots of outputs begins them anew; one with them is taken without."""
    model, x = nn.Linear(6, 5, dtype=F64), randn(20, 6)
    with_roots, without = emended(model), emended(model, output_exponent=0.0)
    train(model, without, x, 2)
    with pytest.warns(UserWarning, match=r"without an output_exponent saved this state, here it is 0\.25"):
        with_roots.load_state_dict(without.state_dict())
    train(model, with_roots, x, 2)
    assert "output_root" in with_roots.state[model.weight]
    with pytest.warns(UserWarning, match="with an output_exponent saved this state, here it is 0"):
        without.load_state_dict(with_roots.state_dict())
    assert "output_root" not in without.state[model.weight]


def spoiled_root(how: str, root: Any) -> Any:
    return {"shape": root[..., :2, :2], "finite": root * math.nan, "number": 5, "complex": root * 1j}[how]


@pytest.mark.parametrize("spoiled", ["shape", "finite", "number", "complex", "missing", "later"])
def test_states_that_do_not_fit_are_refused(spoiled: str) -> None:
    model = nn.Linear(6, 5, dtype=F64)
    optimizer = emended(model)
    train(model, optimizer, randn(20, 6), 2)
    saved = copy.deepcopy(optimizer.state_dict())
    root = saved["state"][0].pop("output_root")
    if spoiled == "later":
        saved["state"][0].update(output_root=root, output_steps=torch.tensor(9))
    elif spoiled != "missing":
        saved["state"][0]["output_root"] = spoiled_root(spoiled, root)
    before = optimizer.state[model.weight]["output_root"].clone()
    with pytest.raises(ValueError, match=r"output_(root|steps) of layer"):
        optimizer.load_state_dict(saved)
    assert_identical("root", optimizer.state[model.weight]["output_root"], before)


def test_schedule_free_optimizers_keep_their_place() -> None:
    schedule_free = pytest.importorskip("pytorch_optimizer").ScheduleFreeSGD
    model, x = nn.Linear(6, 5, dtype=F64), randn(20, 6)
    optimizer = emended(model, schedule_free, refresh_every=1)
    optimizer.train()
    train(model, optimizer, x, 3)
    before = model.weight.detach().clone()
    optimizer.eval()
    assert (model.weight - before).abs().max() > 1e-6
    optimizer.train()
    assert_close("weight", model.weight, before, EXACT)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"output_exponent": 1.5}, ValueError, "output_exponent must be at least 0 and at most 1, got 1.5"),
        ({"output_exponent": -0.1}, ValueError, "output_exponent must be"),
        ({"output_exponent": math.nan}, ValueError, "output_exponent must be"),
        ({"output_exponent": None}, TypeError, "output_exponent must be a number, got None"),
        ({"output_damping": 0}, ValueError, "output_damping must be above 0 and finite, got 0"),
        ({"output_damping": math.inf}, ValueError, "output_damping must be above 0 and finite"),
        ({"output_damping": True}, TypeError, "output_damping must be a number, got True"),
        ({"damping": math.inf}, ValueError, "output_exponent must be 0 with damping=inf"),
    ],
)
def test_arguments_out_of_range(options: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        emended(nn.Linear(3, 2), **options)


def test_join_is_refused() -> None:
    with pytest.raises(RuntimeError, match="output_exponent must be 0 under Join"):
        emended(nn.Linear(3, 2)).join_hook()
