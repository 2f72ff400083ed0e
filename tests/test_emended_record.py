"""What a forward records: rows counted once, whatever runs them; shared inputs; batches that do not enter."""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import F64, assert_close, assert_identical, randn
from emended_helpers import EXACT, mlp, parameters_of, squares, train
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import consequentialism as cw
from consequentialism.optim import memory
from consequentialism.optim.record import Slot


def emended(model: nn.Module, **options: Any) -> cw.optim.Emended:
    options = {"memory": 0, "refresh_every": 1, **options}
    return cw.optim.Emended(torch.optim.SGD(model.parameters(), 0.1), model, **options)


def moment(*batches: Tensor, bias: bool = True) -> Tensor:
    rows = torch.cat(batches)
    rows = torch.cat([rows, rows.new_ones(rows.shape[0], 1)], 1) if bias else rows
    return rows.T @ rows / rows.shape[0]


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_counts_rows_once(reentrant: bool) -> None:
    model = mlp(F64)
    twin = copy.deepcopy(model)
    first, second = emended(model), emended(twin)
    x = randn(20, 6).requires_grad_()
    squares(checkpoint(model, x, use_reentrant=reentrant)).backward()
    squares(twin(x)).backward()
    first.step()
    second.step()
    for own, other in ((model[0], twin[0]), (model[2], twin[2])):
        one, two = first.state[own.weight], second.state[other.weight]
        assert float(one["gram_rows"]) == 20
        assert_identical("moment", one["input_gram"], two["input_gram"])


def test_checkpointing_over_micro_batches() -> None:
    model = mlp(F64)
    optimizer = emended(model)
    parts = (randn(20, 6), randn(7, 6, seed=1))
    for part, reentrant in zip(parts, (True, False), strict=True):
        squares(checkpoint(model, part.requires_grad_(), use_reentrant=reentrant)).backward()
    optimizer.step()
    state = optimizer.state[model[0].weight]
    assert float(state["gram_rows"]) == 27
    assert_close("moment", state["input_gram"], moment(*parts), EXACT)


def test_eval_and_no_grad_record_nothing() -> None:
    model = mlp(F64)
    optimizer = emended(model)
    with torch.no_grad():
        model(randn(5, 6, seed=1))
    with torch.inference_mode():
        model(randn(5, 6, seed=1))
    model.eval()
    squares(model(randn(5, 6, seed=2)))
    model.train()
    model(randn(5, 6, seed=3))  # a forward without a backward
    x = randn(20, 6)
    squares(model(x)).backward()
    optimizer.step()
    assert_close("moment", optimizer.state[model[0].weight]["input_gram"], moment(x), EXACT)


def test_memory_is_the_mean_over_rows_with_forgetting() -> None:
    layer = nn.Linear(6, 4, dtype=F64)
    optimizer = emended(layer, memory=0.8)
    batches = [randn(rows, 6, seed=rows) for rows in (20, 5, 40)]
    for batch in batches:
        optimizer.zero_grad()
        squares(layer(batch)).backward()
        optimizer.step()
    weights = [0.8**2, 0.8, 1.0]
    total = sum(w * len(b) for w, b in zip(weights, batches, strict=True))
    expected = sum(w * len(b) * moment(b) for w, b in zip(weights, batches, strict=True)) / total
    assert_close("moment", optimizer.state[layer.weight]["input_gram"], expected, EXACT)


def test_equal_batches_follow_the_formula_corrected_for_its_start() -> None:
    layer = nn.Linear(6, 4, dtype=F64)
    optimizer = emended(layer, memory=0.9, refresh_every=3)
    own = torch.zeros(7, 7, dtype=F64)
    for step in range(9):
        batch = randn(20, 6, seed=step)
        optimizer.zero_grad()
        squares(layer(batch)).backward()
        optimizer.step()
        if step in (0, 1, 2, 3, 6):
            own = 0.9 * own + 0.1 * moment(batch)
    assert_close("moment", optimizer.state[layer.weight]["input_gram"], own / (1 - 0.9**5), EXACT)


@pytest.mark.parametrize("spoilt", [math.nan, math.inf, 1e200])
def test_a_batch_that_is_not_finite_does_not_enter(spoilt: float) -> None:
    layer = nn.Linear(6, 4, dtype=F64)
    optimizer = emended(layer, memory=0.5)
    x = randn(20, 6)
    squares(layer(x)).backward()
    optimizer.step()
    before = {key: value.clone() for key, value in optimizer.state[layer.weight].items()}
    optimizer.zero_grad()
    bad = x.clone()
    bad[3, 2] = spoilt
    squares(layer(bad)).backward()
    layer.zero_grad()
    squares(layer(x)).backward()  # a micro-batch beside it enters
    optimizer.step()
    after = {key: value.clone() for key, value in optimizer.state[layer.weight].items()}
    assert_close("moment", after["input_gram"], moment(x), EXACT)
    optimizer.zero_grad()
    squares(layer(bad)).backward()
    weights = parameters_of(layer)
    for parameter in layer.parameters():
        parameter.grad.zero_()  # type: ignore[union-attr]
    optimizer.step()
    for key in ("input_gram", "root", "gram_rows"):
        assert_identical(key, optimizer.state[layer.weight][key], after[key])
        assert before[key].isfinite().all()
    for own, expected in zip(layer.parameters(), weights, strict=True):
        assert_identical("parameter", own.detach(), expected)


def test_zero_grad_forgets_a_skipped_step() -> None:
    """As GradScaler skips one: nothing that is recorded keeps anything of it, whenever zero_grad is called."""
    for late in (True, False):
        layer = nn.Linear(6, 4, dtype=F64)
        optimizer = emended(layer)
        squares(layer(randn(20, 6, seed=1))).backward()
        x = randn(10, 6, seed=2)
        if not late:
            optimizer.zero_grad()
        loss = squares(layer(x))
        if late:
            optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert_close("moment", optimizer.state[layer.weight]["input_gram"], moment(x), EXACT)


class Attention(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(6, 6, bias, dtype=F64) for _ in range(3))
        self.out = nn.Linear(6, 4, dtype=F64)
        self.skip = False

    def forward(self, x: Tensor) -> Tensor:
        scores = (self.q(x) @ self.k(x).mT).softmax(-1) if not self.skip else torch.eye(x.shape[-2], dtype=F64)
        return self.out(scores @ self.v(x))


def test_layers_of_one_input_share_moment_and_root(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Attention()
    optimizer = emended(model, memory=0.5)
    grams = []
    original = cw.optim.layers.Kind.gram
    monkeypatch.setattr(cw.optim.layers.Kind, "gram", lambda *a: grams.append(1) or original(*a))
    for step in range(2):
        optimizer.zero_grad()
        squares(model(randn(5, 8, 6, seed=step))).backward()
        optimizer.step()
    assert len(grams) == 4  # one for q, k and v, one for out, twice
    states = [optimizer.state[layer.weight] for layer in (model.q, model.k, model.v)]
    for key in ("input_gram", "root"):
        assert states[0][key] is states[1][key] is states[2][key]
        assert optimizer.state[model.out.weight][key] is not states[0][key]
    shared = states[0]["input_gram"].clone()
    model.skip = True  # v alone: it goes its own way
    optimizer.zero_grad()
    x = randn(5, 8, 6, seed=9)
    squares(model(x)).backward()
    optimizer.step()
    assert_identical("q's", optimizer.state[model.q.weight]["input_gram"], shared)
    assert optimizer.state[model.k.weight]["input_gram"] is optimizer.state[model.q.weight]["input_gram"]
    own = optimizer.state[model.v.weight]["input_gram"]
    assert (own - shared).abs().max() > 1e-6


def test_an_expert_without_rows_keeps_its_moment() -> None:
    experts = nn.ModuleList(nn.Linear(6, 4, dtype=F64) for _ in range(2))
    optimizer = emended(experts, memory=0.5)
    x = randn(20, 6)
    for step in range(3):
        optimizer.zero_grad()
        loss = squares(experts[0](x))
        if step == 1:
            loss = loss + squares(experts[1](x[:7]))
        if step == 2:
            loss = loss + experts[1](x[:0]).sum()
        loss.backward()
        optimizer.step()
    state = optimizer.state[experts[1].weight]
    assert_close("moment", state["input_gram"], moment(x[:7]), EXACT)
    assert float(state["gram_rows"]) == 3.5
    identity = optimizer.state[experts[1].weight]["root"]
    assert identity.isfinite().all()


def test_dead_inputs_leave_the_plain_step() -> None:
    layer = nn.Linear(6, 4, False, dtype=F64)
    before = layer.weight.detach().clone()
    optimizer = emended(layer)
    squares(layer(torch.zeros(5, 6, dtype=F64))).backward()
    optimizer.step()
    assert_identical("weight", layer.weight.detach(), before)
    assert_identical("root", optimizer.state[layer.weight]["root"], torch.eye(6, dtype=F64))


def test_refresh_rule() -> None:
    """One step in so many, and the first ones after 1, 2, 4, ... steps."""
    due = {0, 1, 2, 4, 8}
    layer = nn.Linear(6, 4, dtype=F64)
    optimizer = emended(layer, refresh_every=4)
    roots, recording = [], []
    for step in range(9):
        recording.append(optimizer._recorder.recording)
        train(layer, optimizer, randn(10, 6, seed=step), 1)
        roots.append(optimizer.state[layer.weight]["root"].clone())
    assert recording == [step in due for step in range(9)]
    assert [bool((one - two).abs().max() > 0) for one, two in itertools.pairwise(roots)] == [
        step in due for step in range(1, 9)
    ]
    assert int(optimizer.state[layer.weight]["emended_steps"]) == 9


@pytest.mark.parametrize(("every", "due"), [(1, range(30)), (3, (0, 1, 2, 3, 6, 9)), (10, (0, 1, 2, 4, 8, 10, 20))])
def test_steps_to_a_refresh(every: int, due: Sequence[int]) -> None:
    for step in range(due[-1]):
        assert memory.steps_to_refresh(step, every) == min(d for d in due if d >= step) - step


class Around(nn.Module):
    """Passes its layer's weight around the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(6, 6, dtype=F64), nn.Linear(6, 4, dtype=F64)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(nn.functional.linear(x, self.inner.weight, self.inner.bias))


def test_a_layer_whose_forward_does_not_run_is_named() -> None:
    model = Around()
    optimizer = emended(model)
    with pytest.warns(
        UserWarning, match=r"has seen no input of 'inner', which have gradients.*stepped plainly"
    ) as caught:
        train(model, optimizer, randn(20, 6), 1)
    assert [Path(warning.filename).name for warning in caught] == ["emended_helpers.py"]  # where the step is taken
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, randn(20, 6), 2)


def test_input_by_keyword_and_with_autocast() -> None:
    layer = nn.Linear(6, 4)
    optimizer = emended(layer)
    x = randn(20, 6, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = squares(layer(input=x))
    loss.backward()
    optimizer.step()
    own = optimizer.state[layer.weight]["input_gram"]
    assert own.dtype == torch.float32
    assert_close("moment", own, moment(x.double()), 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_weights_have_wide_moments(dtype: torch.dtype) -> None:
    layer = nn.Linear(6, 4, dtype=dtype)
    optimizer = emended(layer)
    start = layer.weight.detach().clone()
    train(layer, optimizer, randn(20, 6, dtype=dtype), 2)
    assert optimizer.state[layer.weight]["root"].dtype == torch.float32
    assert layer.weight.dtype == dtype
    assert not torch.equal(layer.weight, start)


def test_a_second_use_adds_its_rows() -> None:
    layer = nn.Linear(6, 6, dtype=F64)
    optimizer = emended(layer)
    x = randn(20, 6)
    hidden = layer(x)
    squares(layer(hidden)).backward()
    optimizer.step()
    assert_close("moment", optimizer.state[layer.weight]["input_gram"], moment(x, hidden.detach()), EXACT)


def test_copies_of_the_model_record_nothing(tmp_path: Any) -> None:
    model = mlp(F64)
    optimizer = emended(model)
    copied = copy.deepcopy(model)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    x = randn(20, 6)
    for other in (copied, loaded):
        squares(other(randn(7, 6))).backward()
    squares(model(x)).backward()
    optimizer.step()
    assert_close("moment", optimizer.state[model[0].weight]["input_gram"], moment(x), EXACT)


@pytest.mark.usefixtures("even_refreshes")
def test_between_refreshes_a_forward_leaves_nothing() -> None:
    model = mlp(F64)
    optimizer = emended(model, refresh_every=2)
    left = []
    for step in range(4):
        out = model(randn(20, 6, seed=step))
        left.append((bool(out._backward_hooks), any(unit.slot.gram is not None for unit in optimizer.units)))
        squares(out).backward()
        optimizer.step()
    assert left == [(True, True), (False, False)] * 2


def test_hooks_go_with_the_optimizer() -> None:
    model = mlp(F64)
    optimizer = emended(model)
    assert all(model[i]._forward_hooks for i in (0, 2))
    del optimizer
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("compiled", [False, True])
def test_a_model_that_is_moved_before_the_first_step(compiled: bool) -> None:
    """Trainers put a model on its device, or in its type, once they have its optimizer."""
    torch._dynamo.reset()
    model = mlp(torch.float32)
    twin = copy.deepcopy(model).double()
    moved, other = (cw.optim.Emended(torch.optim.AdamW(m.parameters(), 0.02), m) for m in (model, twin))
    model.double()
    forward = torch.compile(model, backend="aot_eager") if compiled else model
    for _ in range(4):
        for run, optimizer in ((forward, moved), (twin, other)):
            optimizer.zero_grad()
            squares(run(randn(20, 6))).backward()
            optimizer.step()
    assert moved.state[model[0].weight]["root"].dtype == F64
    for own, expected in zip(model.parameters(), twin.parameters(), strict=True):
        assert_close("parameter", own.detach(), expected.detach(), 1e-12)


def test_a_full_graph_of_a_model_that_was_moved_says_what_to_do() -> None:
    torch._dynamo.reset()
    model = mlp(torch.float32)
    optimizer = emended(model)
    with pytest.raises(Exception, match="for a full graph make it after that"):
        torch.compile(model.double(), backend="eager", fullgraph=True)(randn(20, 6))
    del optimizer


def test_a_slot_follows_a_weight_to_its_device() -> None:
    slot = Slot((1, 1, 3, 3), torch.float32, torch.device("meta"))
    weight = nn.Parameter(torch.zeros(2, 3))
    slot.open()
    assert slot.is_left_behind(weight)
    slot.follow(weight)
    assert slot.gram is not None
    assert slot.gram.matrix.device.type == "cpu"
    assert not slot.is_left_behind(weight)
    slot.kept = True
    assert not slot.is_left_behind(weight.double()), "its state would stay behind"
