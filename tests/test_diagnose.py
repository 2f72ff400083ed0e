"""`diagnose`: its figures against their definitions, and a model that is as before."""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from cases import F32, F64, randn
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

import consequentialism as cw
from consequentialism.insight import layers
from consequentialism.insight.batch import check
from consequentialism.insight.diagnose import Report


class Transposed(nn.Module):
    """A linear layer with a weight ``[I, O]`` of another name."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(randn(6, 4, dtype=F32))
        self.bias = nn.Parameter(randn(4, dtype=F32))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.kernel + self.bias


cw.register(Transposed, like=nn.Linear, weight="kernel", transposed=True)


class Everything(nn.Module):
    """Layers of every kind, state in buffers, random numbers and activations in place."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(20, 6, padding_idx=0, max_norm=1.0)
        self.first = nn.Conv1d(6, 8, 3, padding=1, groups=2, padding_mode="circular")
        self.norm = nn.BatchNorm1d(8)
        self.up = nn.ConvTranspose1d(8, 6, 3, stride=2, groups=2)
        self.wide = nn.Linear(6, 6, bias=False)
        self.drop = nn.Dropout(0.3)
        self.own = Transposed()

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = torch.relu_(self.norm(self.first(self.tokens(tokens).mT)))
        return self.own(self.drop(torch.relu_(self.wide(self.up(hidden).mean(-1)))))


def everything() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    return Everything(), (torch.randint(0, 20, (16, 5)), torch.randint(0, 4, (16,)))


def test_every_kind_of_layer_has_a_row() -> None:
    model, batch = everything()
    report = cw.diagnose(model, batch, cross_entropy)
    assert [
        (layer.name, layer.rows, layer.inputs, layer.outputs, layer.groups, layer.form) for layer in report.layers
    ] == [
        ("tokens", 80, 20, 6, 1, "diagonal"),
        ("first", 80, 10, 8, 2, "primal"),
        ("up", 176, 13, 6, 2, "primal"),
        ("wide", 16, 6, 6, 1, "primal"),
        ("own", 16, 7, 4, 1, "primal"),
    ]
    for layer in report.layers:
        numbers = [value for value in layer.to_dict().values() if isinstance(value, float)]
        assert all(map(math.isfinite, numbers)), layer
        assert layer.measured_cost > 0
        assert layer.matrix.diagonal().unique().tolist() in ([1.0], [0.0, 1.0]), "rows of zeros ask for nothing"
    assert report["wide"].predicted_cost is not None
    assert 1 < report["wide"].predicted_cost < 4


@pytest.mark.parametrize("scale", ["nlms", "raw", "gradient"])
def test_gradients_are_those_of_the_layers(scale: Any) -> None:
    model, batch = everything()
    model.double().eval()  # no dropout, so that each run has the same outputs
    gradients = []
    for emended in (False, True):
        own = copy.deepcopy(model)
        own = cw.convert(own, damping=0.3, scale=scale) if emended else own
        cross_entropy(own(batch[0]), batch[1]).backward()
        gradients.append({name: p.grad for name, p in own.named_parameters()})
    report = cw.diagnose(model, batch, cross_entropy, damping=0.3, scale=scale)
    converted = cw.diagnose(cw.convert(model, damping=0.3, scale=scale), batch, cross_entropy)
    for layer, again in zip(report.layers, converted.layers, strict=True):
        names = [name for name in gradients[0] if name.startswith(layer.name + ".")]
        plain, emended = (torch.cat([one[name].flatten() for name in names]) for one in gradients)
        assert layer.norm_ratio == pytest.approx(float(emended.norm() / plain.norm()), rel=1e-7), layer.name
        assert layer.cosine == pytest.approx(float(plain @ emended / plain.norm() / emended.norm()), rel=1e-7)
        assert again.norm_ratio == layer.norm_ratio
        assert again.interference_emended == layer.interference_emended


@pytest.mark.parametrize("rows", [5, 40])
def test_figures_by_their_definitions(rows: int) -> None:
    layer = nn.Linear(9, 3).double()
    x, target = randn(rows, 9, dtype=F64), randn(rows, 3, dtype=F64)
    (found,) = cw.diagnose(layer, (x, target), mse_loss, damping=0.2).layers
    dy = 2 * (layer(x) - target).detach() / target.numel()
    wide = torch.cat([x, torch.ones(rows, 1)], 1)
    gram = wide @ wide.T
    c = 0.2 * gram.trace() / min(rows, 10)
    assert found.damping_c == pytest.approx(float(c))
    smoothed = gram @ torch.linalg.inv(gram + c * torch.eye(rows))
    for name, change in (("", gram), ("_emended", smoothed)):
        own = change.diagonal()[:, None] * dy
        others = change @ dy - own
        assert getattr(found, f"interference{name}") == pytest.approx(float(others.norm() / own.norm()))
        undone = -(others * dy).sum(1).clamp(max=0).sum() / (own * dy).sum()
        assert getattr(found, f"undone{name}") == pytest.approx(float(undone))
        matrix = change * (dy @ dy.T)
        assert torch.allclose(getattr(found, f"matrix{name}"), matrix / matrix.diagonal()[:, None])
    eigenvalues = torch.linalg.eigvalsh(gram if rows <= 10 else wide.T @ wide)
    shares = eigenvalues / eigenvalues.sum()
    assert found.effective_rank == pytest.approx(float((-(shares * shares.log()).sum()).exp()))
    assert found.condition == pytest.approx(float((eigenvalues[-1] + c) / (eigenvalues[0] + c)))
    assert found.top_share == pytest.approx(1.0)
    mean = wide.mean(0)
    assert found.mean_share == pytest.approx(float((wide @ mean / mean.norm()).square().sum() / gram.trace()))


def test_an_embedding_is_a_linear_layer_of_one_hot_rows() -> None:
    indices, weight = torch.tensor([1, 4, 4, 0, 1, 4]), randn(5, 3, dtype=F64)
    lookup = nn.Embedding(5, 3, _weight=weight.clone())
    linear = nn.Linear(5, 3, bias=False).double()
    linear.weight = nn.Parameter(weight.T.clone())
    target = randn(6, 3, dtype=F64)
    (one,) = cw.diagnose(lookup, (indices, target), mse_loss, damping=0.5).layers
    (other,) = cw.diagnose(linear, (nn.functional.one_hot(indices, 5).double(), target), mse_loss, damping=0.5).layers
    for name in ("damping_c", "interference", "interference_emended", "undone", "undone_emended", "cosine",
                 "norm_ratio", "effective_rank", "mean_share", "top_share", "condition"):  # fmt: skip
        assert getattr(one, name) == pytest.approx(getattr(other, name)), name
    assert torch.allclose(one.matrix, other.matrix)
    assert torch.allclose(one.matrix_emended, other.matrix_emended)


def test_what_is_known_of_interference() -> None:
    layer = nn.Linear(8, 3, bias=False).double()
    orthogonal = torch.linalg.qr(randn(8, 8, dtype=F64))[0][:4]
    target = randn(4, 3, dtype=F64)
    (apart,) = cw.diagnose(layer, (orthogonal, target), mse_loss).layers
    assert apart.interference < 1e-12
    independent = randn(4, 8, dtype=F64) + 3
    (close,) = cw.diagnose(layer, (independent, target), mse_loss, damping=1e-9).layers
    assert close.interference > 1
    assert close.interference_emended < 1e-6
    (plain,) = cw.diagnose(layer, (independent, target), mse_loss, damping=1e9).layers
    assert plain.interference_emended == pytest.approx(plain.interference, rel=1e-6)
    assert plain.cosine == pytest.approx(1)


def state_of(model: nn.Module) -> list[Any]:
    """Everything that must be as before, as bytes where it is a tensor."""
    tensors = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)]
    found: list[Any] = [(id(t), t.requires_grad, t._version, t.detach().clone().numpy().tobytes()) for t in tensors]
    for module in model.modules():
        found.append((type(module), module.training, list(module._forward_hooks), list(module._forward_pre_hooks)))
        found.append({key: id(value) for key, value in module.__dict__.items() if not key.startswith("_")})
    return [*found, torch.get_rng_state().numpy().tobytes(), random.getstate(), str(numpy.random.get_state())]


def fails(scores: Tensor, labels: Tensor) -> Tensor:
    random.random(), numpy.random.rand()
    raise RuntimeError("by purpose")


@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize("loss", [cross_entropy, fails])
def test_the_model_is_as_before(converted: bool, loss: Callable[..., Tensor]) -> None:
    model, batch = everything()
    if converted:
        cw.convert(model)
    cross_entropy(model(batch[0]), batch[1]).backward()
    model.own.register_forward_hook(lambda module, args, output: 2 * output)  # type: ignore[union-attr]
    model.wide.eval()  # type: ignore[union-attr]
    before = state_of(model)
    if loss is fails:
        with pytest.raises(RuntimeError, match="by purpose"):
            cw.diagnose(model, batch, loss)
    else:
        cw.diagnose(model, batch, loss)
    assert state_of(model) == before


def test_optimizers_that_live_in_layers_take_no_step() -> None:
    x, target = randn(8, 4, dtype=F32), randn(8, 2, dtype=F32)
    fused = cw.convert(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)))
    optimizer = cw.optim.FusedSGD(fused, lr=0.1)
    before = state_of(fused)
    cw.diagnose(fused, (x, target), mse_loss)
    assert state_of(fused) == before
    del optimizer
    plain = nn.Sequential(nn.Linear(4, 2))
    inside = cw.optim.Emended(torch.optim.SGD(plain.parameters(), lr=0.1), plain)
    cw.diagnose(plain, (x, target), mse_loss)
    assert not inside._recorder.ran()


def test_a_layer_that_never_ran_is_still_named_by_convert() -> None:
    model = cw.convert(nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)}))
    x = randn(4, 3, dtype=F32)
    cw.diagnose(model, x, lambda m, batch: m["b"](m["a"](batch)).square().mean())
    with pytest.warns(UserWarning, match="weights of b got a gradient"):
        nn.functional.linear(model["a"](x), model["b"].weight).sum().backward()


def test_calls_in_every_way() -> None:
    model, x, y = nn.Linear(3, 2), randn(4, 3, dtype=F32), randn(4, 2, dtype=F32)
    losses = [
        cw.diagnose(model, (x, y), mse_loss).loss,
        cw.diagnose(model, {"input": x}, lambda outputs, batch: mse_loss(outputs, y)).loss,
        cw.diagnose(model, x, lambda outputs: mse_loss(outputs, y)).loss,
        cw.diagnose(model, [x, y], lambda model, batch: mse_loss(model(batch[0]), batch[1])).loss,
    ]
    with torch.no_grad():
        losses.append(cw.diagnose(model, (x, y), mse_loss).loss)
        assert losses == [float(mse_loss(model(x), y))] * 5


def test_a_compiled_model_runs_eagerly(fresh_compiler: None) -> None:
    model, x, y = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), randn(4, 3, dtype=F32), randn(4, 2, dtype=F32)
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    report = cw.diagnose(compiled, (x, y), mse_loss)
    assert [layer.name for layer in report.layers] == ["0", "1"]
    assert report.loss == cw.diagnose(model, (x, y), mse_loss).loss


def test_checkpointing_and_a_layer_called_twice() -> None:
    from torch.utils.checkpoint import checkpoint

    layer, x = nn.Linear(3, 3), randn(4, 3, dtype=F32)
    twice = cw.diagnose(layer, x, lambda m, b: checkpoint(lambda z: m(m(z)), b, use_reentrant=False).square().sum())
    assert twice[""].rows == 8


def test_bad_input_is_said() -> None:
    linear, x, y = nn.Linear(3, 2), randn(4, 3, dtype=F32), randn(4, 2, dtype=F32)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got 3"):
        cw.diagnose(3, (x, y), mse_loss)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="loss_fn must be callable, got 3"):
        cw.diagnose(linear, (x, y), 3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="loss_fn must return a tensor, got 3"):
        cw.diagnose(linear, (x, y), lambda a, b: 3)
    with pytest.raises(ValueError, match="no layer that can be emended"):
        cw.diagnose(nn.LayerNorm(3), x, lambda z: z.sum())
    with pytest.raises(ValueError, match="batch must have at least one sample"):
        cw.diagnose(linear, (x[:0], y[:0]), mse_loss)
    with pytest.raises(ValueError, match="finite loss, got nan"):
        cw.diagnose(linear, (x, y), lambda a, b: (a - b).sum() * math.nan)
    with pytest.raises(ValueError, match=r"one floating-point number, got \[4, 2\]"):
        cw.diagnose(linear, (x, y), lambda a, b: a - b)
    with pytest.raises(ValueError, match="ran none of the layers"):
        cw.diagnose(linear, (x, y), lambda m, b: (b[0] - 1).sum())
    with pytest.raises(ValueError, match="most_rows must be an integer above 0, got 0"):
        cw.diagnose(linear, (x, y), mse_loss, most_rows=0)
    with pytest.raises(TypeError, match="did you mean 'damping'"):
        cw.diagnose(linear, (x, y), mse_loss, dampin=0.1)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"got a DataLoader; next\(iter\(loader\)\) is its first"):
        cw.diagnose(linear, torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y)), mse_loss)
    with pytest.raises(ValueError, match="in memory, they are on the meta device"):
        cw.diagnose(nn.Linear(3, 2, device="meta"), (x.to("meta"), y.to("meta")), mse_loss)
    two = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3, device="meta"))
    with pytest.raises(ValueError, match="one device, its parameters are on cpu, meta"):
        check(two, (x, y), mse_loss)


def test_a_report_in_every_format(tmp_path: Any) -> None:
    model, batch = everything()
    report = cw.diagnose(model, batch, cross_entropy, most_rows=8)
    assert isinstance(report, Report)
    text = str(report).splitlines()
    assert text[0].split()[:3] == ["layer", "kind", "rows"]
    assert text[1].startswith("tokens  Embedding")
    assert max(map(len, text)) < 200
    found = json.loads(report.to_json(tmp_path / "report.json"))
    assert found == json.loads((tmp_path / "report.json").read_text())
    assert [layer["name"] for layer in found["layers"]] == ["tokens", "first", "up", "wide", "own"]
    assert len(found["layers"][1]["matrix"]) == 8
    with pytest.raises(KeyError, match="no layer 'x'; there are 'tokens'"):
        report["x"]


def test_a_page_needs_no_other_file(tmp_path: Any) -> None:
    report = cw.diagnose(nn.Linear(3, 2), (randn(4, 3, dtype=F32), randn(4, 2, dtype=F32)), mse_loss)
    page = report.to_html(tmp_path / "report.html")
    assert page == (tmp_path / "report.html").read_text()
    assert page.startswith("<!doctype html>")
    assert page.count("data:image/png;base64,") == 2
    assert "http" not in page, "no network"


def test_many_rows_are_taken_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same figures, and never more of the unfolded rows at once than asked for, or one line of a sample's."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, groups=2), nn.ConvTranspose2d(4, 2, 2), nn.Linear(8, 3))
    model, batch = model.double(), (randn(6, 2, 6, 7), randn(6, 2, 7, 3))
    largest: list[int] = []
    own = layers.Seen.blocks

    def noted(seen: layers.Seen) -> Any:
        for x, dy in own(seen):
            largest.append(x.nbytes)
            yield x, dy

    monkeypatch.setattr(layers.Seen, "blocks", noted)
    monkeypatch.setattr(layers.Seen, "rows", lambda _: pytest.fail("all rows at once"))
    found = []
    for most in (2**26, 800):
        monkeypatch.setattr(layers, "BLOCK_BYTES", most)
        largest.clear()
        found.append(cw.diagnose(model, batch, mse_loss, most_rows=7).to_dict()["layers"])
    assert max(largest) <= 800 + 8 * 2 * 20 * 7 * 8  # a line of two groups' rows, or one sample of a transposed one
    for whole, pieces in zip(*found, strict=True):
        assert whole["form"] == "primal"
        for key, value in whole.items():
            if isinstance(value, str):
                assert pieces[key] == value
            elif key not in ("measured_cost", "plain_ms"):
                torch.testing.assert_close(torch.tensor(pieces[key]), torch.tensor(value), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layer", [nn.Linear(4, 4), nn.Conv2d(3, 4, 3)])
def test_a_layer_that_saw_no_rows_is_left_out(layer: nn.Module) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.empty = nn.Linear(4, 2), layer

        def forward(self, x: Tensor) -> Tensor:
            nothing = x.new_empty(0, 4) if isinstance(self.empty, nn.Linear) else x.new_empty(0, 3, 5, 5)
            return self.used(x) + self.empty(nothing).sum()

    report = cw.diagnose(Model(), (randn(5, 4, dtype=F32), randn(5, 2, dtype=F32)), mse_loss)
    assert [own.name for own in report.layers] == ["used"]
    assert report.left_out == {"empty": "it saw no rows"}
