"""Steps in coordinates of every kind of layer, and what is left alone."""

from __future__ import annotations

import math
import sys
import types
from typing import Any

import pytest
import torch
from cases import F64, assert_close, assert_identical, randn
from emended_helpers import EXACT, squares, train
from torch import Tensor, nn
from torch.nn import functional as F

import consequentialism as cw

CONVOLUTIONS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "1d": (nn.Conv1d(4, 6, 3, stride=2, padding=1, dtype=F64), (5, 4, 11)),
    "2d": (nn.Conv2d(4, 6, (3, 2), dilation=(1, 2), dtype=F64), (5, 4, 8, 7)),
    "3d": (nn.Conv3d(2, 3, 2, bias=False, dtype=F64), (3, 2, 4, 4, 5)),
    "groups": (nn.Conv2d(4, 6, 3, groups=2, dtype=F64), (5, 4, 7, 7)),
    "depthwise": (nn.Conv2d(4, 4, 3, groups=4, padding="same", dtype=F64), (5, 4, 7, 7)),
    "same, even kernel": (nn.Conv1d(4, 6, 4, padding="same", dtype=F64), (5, 4, 11)),
    "valid": (nn.Conv1d(4, 6, 3, padding="valid", dtype=F64), (5, 4, 11)),
    "reflect": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect", dtype=F64), (5, 4, 7, 7)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution_is_the_emended_one(name: str) -> None:
    """SGD without memory: that of `consequentialism`'s own convolutions with samples for rows."""
    layer, shape = CONVOLUTIONS[name]
    x = randn(*shape)
    emended = cw.convert(_copy(layer), damping=0.1)
    _same_step(layer, emended, x)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2, "padding": 1, "output_padding": 1},
        {"stride": (2, 3), "dilation": (2, 1)},
        {"groups": 2, "stride": 2},
        {"bias": False, "padding": 2},
    ],
)
def test_transposed_convolution(options: dict[str, Any]) -> None:
    """The map is linear in the weight: its rows are its derivatives with respect to one output's weights."""
    layer = nn.ConvTranspose2d(4, 6, 3, dtype=F64, **options)
    x = randn(3, 4, 5, 4)
    groups, bias = layer.groups, layer.bias is not None
    optimizer = cw.optim.Emended(
        torch.optim.SGD(layer.parameters(), 1.0), layer, memory=0, refresh_every=1, scale="gradient"
    )
    squares(layer(x)).backward()
    optimizer.step()
    moment = optimizer.state[layer.weight]["input_gram"].view(groups, *optimizer.state[layer.weight]["root"].shape[-2:])
    for group in range(groups):
        jacobian = torch.func.jacrev(lambda weight: torch.func.functional_call(layer, {"weight": weight}, (x,)))(
            layer.weight.detach()
        )  # [B, O, H, W, C, O/groups, k, k]
        outputs = layer.weight.shape[1]
        channels = slice(group * 4 // groups, (group + 1) * 4 // groups)
        rows = jacobian[:, group * outputs, :, :, channels, 0].flatten(0, 2).flatten(1)
        if bias:
            rows = torch.cat([rows, rows.new_ones(rows.shape[0], 1)], 1)
        assert_close(f"moment of group {group}", moment[group], rows.T @ rows / rows.shape[0], EXACT)


BLOCKS: dict[str, tuple[nn.Module, tuple[int, ...], int, bool]] = {
    "whole channels": (nn.Conv2d(4, 6, 3, padding=1, dtype=F64), (3, 4, 5, 6), 20, True),
    "of groups": (nn.Conv2d(8, 6, (3, 2), groups=2, dtype=F64), (3, 8, 5, 6), 12, True),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2, dtype=F64), (3, 4, 4, 3), 20, True),
    "channels that do not divide": (nn.Conv1d(5, 4, 3, dtype=F64), (3, 5, 9), 8, False),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_of_a_convolution_are_those_of_its_gram(name: str) -> None:
    """Of whole channels where they divide, and then no Gram of all inputs is made."""
    layer, shape, block, aligned = BLOCKS[name]
    x, found = randn(*shape), []
    for most in (block, 10**6):
        twin = _copy(layer)
        optimizer = cw.optim.Emended(torch.optim.SGD(twin.parameters(), 0.1), twin, block=most)
        squares(twin(x)).backward()
        (unit,) = optimizer.units
        assert unit.slot.gram is not None
        found.append((unit.blocks, unit.slot.gram.matrix.clone()))
    (blocks, own), (_, whole) = found
    assert blocks.count > 1
    assert blocks.aligned == aligned
    assert not aligned or all(begin % math.prod(layer.kernel_size) == 0 for begin, _ in blocks.spans)
    assert_close("Gram", own, blocks.of(whole[:, 0]), EXACT)


@pytest.mark.parametrize("shape", [(4, 11), (4, 8)])
def test_unbatched_convolution(shape: tuple[int, ...]) -> None:
    one, batched = (nn.Conv1d(4, 6, 3, dtype=F64) for _ in range(2))
    batched.load_state_dict(one.state_dict())
    x = randn(*shape)
    for layer, rows in ((one, x), (batched, x[None])):
        train(layer, cw.optim.Emended(torch.optim.SGD(layer.parameters(), 0.1), layer), rows, 2)
    assert_close("weight", one.weight, batched.weight, EXACT)


@pytest.mark.parametrize("shape", [(20, 6), (2, 5, 6), (6,), (1, 6)])
def test_linear_of_any_rank(shape: tuple[int, ...]) -> None:
    layer = nn.Linear(6, 5, dtype=F64)
    _same_step(layer, cw.convert(_copy(layer), damping=0.1), randn(*shape))


@pytest.mark.parametrize("padding_idx", [None, 0])
@pytest.mark.parametrize("block", [4, 1024])
def test_embedding(padding_idx: int | None, block: int) -> None:
    layer = nn.Embedding(11, 4, padding_idx, dtype=F64)
    start, indices = layer.weight.detach().clone(), torch.arange(30).view(5, 6) * 7 % 9
    options: dict[str, Any] = {"damping": 0.1, "memory": 0, "refresh_every": 1, "block": block}
    optimizer = cw.optim.Emended(torch.optim.SGD(layer.parameters(), 0.5), layer, **options)
    dy = randn(5, 6, 4)
    layer(indices).backward(dy)
    gradient = layer.weight.grad
    assert gradient is not None
    optimizer.step()
    counts = torch.bincount(indices.flatten(), minlength=11).double()
    if padding_idx is not None:
        counts[padding_idx] = 0
    moment = counts / 30
    expected = start - 0.5 * gradient / (moment + 0.1 * moment.mean())[:, None]
    assert_close("weight", layer.weight, expected, EXACT)


class Conv1D(nn.Module):
    """As `transformers`' own: a linear layer with the weight ``[I, O]``."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.nf, self.nx = outputs, inputs
        self.weight = nn.Parameter(torch.randn(inputs, outputs, dtype=F64))
        self.bias = nn.Parameter(torch.zeros(outputs, dtype=F64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)


Conv1D.__module__, Conv1D.__qualname__ = "transformers.pytorch_utils", "Conv1D"


@pytest.mark.parametrize("name", ["SGD", "AdamW", "RMSprop"])
def test_transposed_linear_layer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("transformers.pytorch_utils")
    module.Conv1D = Conv1D  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    layer, twin = Conv1D(5, 6), nn.Linear(6, 5, dtype=F64)
    with torch.no_grad():
        twin.weight.copy_(layer.weight.T)
        twin.bias.zero_()
    for one in (layer, twin):
        inner = getattr(torch.optim, name)(one.parameters(), lr=0.05)
        train(one, cw.optim.Emended(inner, one, block=4), randn(3, 7, 6), 4)
    assert_close("weight", layer.weight, twin.weight.T, EXACT)
    assert_close("bias", layer.bias, twin.bias, EXACT)


class Tied(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        if kind == "linear":
            self.first, self.second = nn.Linear(6, 6, dtype=F64), nn.Linear(6, 6, dtype=F64)
        elif kind == "embedding":
            self.first, self.second = nn.Embedding(6, 6, dtype=F64), nn.Linear(6, 6, False, dtype=F64)
        else:
            self.first, self.second = Conv1D(6, 6), nn.Linear(6, 6, dtype=F64)
        self.first.weight = self.second.weight

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.first(x)
        return hidden, self.second(hidden)


def test_tied_linear_layers_sum_their_grams() -> None:
    model = Tied("linear")
    optimizer = cw.optim.Emended(torch.optim.SGD(model.parameters(), 0.1), model, memory=0, refresh_every=1)
    x = randn(20, 6)
    hidden, out = model(x)
    squares(out).backward()
    biases = [model.first.bias.detach().clone(), model.second.bias.detach().clone()]
    optimizer.step()
    rows = torch.cat([x, hidden.detach()])
    assert_close("moment", optimizer.state[model.second.weight]["input_gram"], rows.T @ rows / 40, EXACT)
    for bias, before in zip((model.first.bias, model.second.bias), biases, strict=True):
        assert bias.grad is not None
        assert_close("a bias is stepped plainly", bias, before - 0.1 * bias.grad, EXACT)


def test_a_head_tied_to_its_embedding_takes_the_linear_use() -> None:
    model = Tied("embedding")
    optimizer = cw.optim.Emended(torch.optim.SGD(model.parameters(), 0.1), model, memory=0, refresh_every=1)
    hidden, out = model(torch.arange(20) % 6)
    squares(out).backward()
    optimizer.step()
    rows = hidden.detach()
    assert_close("moment", optimizer.state[model.second.weight]["input_gram"], rows.T @ rows / 20, EXACT)


def test_a_weight_that_two_layers_use_differently() -> None:
    model = Tied("transposed")
    inner = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(
        ValueError, match="layers 'first' and 'second' use one weight differently, as a linear layer with"
    ):
        cw.optim.Emended(inner, model)
    cw.optim.Emended(inner, nn.Sequential(model, nn.Linear(6, 6)), filter_fn=lambda _, name: name == "0.second")


class Experts(nn.Module):
    """Weights of three dimensions that a product of batches takes: ``[E, N, I] -> [E, N, O]``."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(randn(2, 6, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(x, self.weight)


class OwnLinear(nn.Module):
    """A user's own linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel, self.offset = nn.Parameter(randn(6, 4)), nn.Parameter(randn(4, seed=1))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.kernel + self.offset


class OwnConv(nn.Module):
    """A user's own convolution, with a stride and no other setting."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.stride = nn.Parameter(randn(4, 3, 2)), 2

    def forward(self, x: Tensor) -> Tensor:
        return F.conv1d(x, self.weight, stride=self.stride)


def test_registered_classes_step_as_torchs_own() -> None:
    cw.register(OwnLinear, like=nn.Linear, weight="kernel", bias="offset", transposed=True)
    cw.register(OwnConv, like=nn.Conv1d)
    linear, conv = nn.Linear(6, 4, dtype=F64), nn.Conv1d(3, 4, 2, stride=2, bias=False, dtype=F64)
    own_linear, own_conv = OwnLinear(), OwnConv()
    with torch.no_grad():
        linear.weight.copy_(own_linear.kernel.T)
        linear.bias.copy_(own_linear.offset)
        conv.weight.copy_(own_conv.weight)
    for model, x in (((linear, own_linear), randn(20, 6)), ((conv, own_conv), randn(5, 3, 9))):
        for layer in model:
            inner = torch.optim.AdamW(layer.parameters(), 0.1)
            train(layer, cw.optim.Emended(inner, layer, refresh_every=1, damping=0.1), x, 3)
    assert_close("weight", own_linear.kernel.T, linear.weight, EXACT)
    assert_close("bias", own_linear.offset, linear.bias, EXACT)
    assert_close("convolution", own_conv.weight, conv.weight, EXACT)
    with pytest.raises(ValueError, match=r"are emended by consequentialism\.convert already"):
        cw.optim.Emended(torch.optim.SGD(own_linear.parameters(), 0.1), cw.convert(own_linear))


def test_what_is_left_alone_is_stepped_plainly() -> None:
    class Own(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    class Same(nn.Linear):
        pass

    model = nn.ModuleDict(
        {
            "own": Own(6, 6, dtype=F64),
            "same": Same(6, 6, dtype=F64),
            "norm": nn.LayerNorm(6, dtype=F64),
            "parametrised": nn.utils.parametrizations.weight_norm(nn.Linear(6, 6, dtype=F64)),
            "attention": nn.MultiheadAttention(6, 1, dtype=F64),
            "sparse": nn.Embedding(6, 6, sparse=True, dtype=F64),
            "lazy": nn.LazyLinear(6, dtype=F64),
            "experts": Experts(),
        }
    )
    dense = [p for name, p in model.named_parameters() if not name.startswith(("lazy", "sparse"))]
    optimizer = cw.optim.Emended(torch.optim.SGD(dense, 0.1, weight_decay=0.1), model, refresh_every=1)
    assert [unit.name for unit in optimizer.units] == ["same", "attention"]  # its input projection
    assert set(optimizer.left_alone) == {"own", "parametrised", "attention", "sparse", "lazy", "experts"}
    assert optimizer.left_alone["experts"].startswith("weight of Experts: no layer is called whose input could be seen")
    x = randn(20, 6)
    loss = squares(model["parametrised"](model["norm"](model["own"](model["same"](x)))))
    loss.backward()
    expected = {
        n: p - 0.1 * (p.grad + 0.1 * p) for n, p in model.named_parameters() if getattr(p, "grad", None) is not None
    }
    optimizer.step()
    for name, value in expected.items():
        if not name.startswith("same"):
            assert_close(name, model.get_parameter(name), value, EXACT)
    assert (model["same"].weight - expected["same.weight"]).abs().max() > 1e-6


def test_frozen_parameters() -> None:
    """A frozen weight keeps nothing; a frozen bias is no column; a layer that is thawed later begins then."""
    model = nn.Sequential(nn.Linear(6, 6, dtype=F64), nn.Linear(6, 4, dtype=F64))
    model[0].weight.requires_grad_(False)
    model[1].bias.requires_grad_(False)
    optimizer = cw.optim.Emended(torch.optim.SGD(model.parameters(), 0.1), model, refresh_every=1)
    before = [p.detach().clone() for p in model.parameters()]
    train(model, optimizer, randn(20, 6), 2)
    assert_identical("frozen weight", model[0].weight.detach(), before[0])
    assert_identical("frozen bias", model[1].bias.detach(), before[3])
    assert (model[0].bias - before[1]).abs().max() > 0
    assert optimizer.state[model[1].weight]["input_gram"].shape == (6, 6)
    model[0].weight.requires_grad_(True)
    train(model, optimizer, randn(20, 6), 2)
    assert float(optimizer.state[model[0].weight]["gram_rows"]) > 0


def test_converted_layers_are_refused() -> None:
    model = cw.convert(nn.Sequential(nn.Linear(6, 6, dtype=F64), nn.Linear(6, 4, dtype=F64)))
    inner = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(ValueError, match=r"layers '0', '1' are emended by consequentialism.convert already.*revert"):
        cw.optim.Emended(inner, model)
    reverted = cw.revert(model)
    optimizer = cw.optim.Emended(inner, reverted, filter_fn=lambda _, name: name == "0")
    with pytest.raises(ValueError, match=r"Emended steps layer '0' in coordinates already.*filter_fn"):
        cw.convert(reverted)
    assert not any(isinstance(module, cw.Linear) for module in reverted.modules())
    cw.convert(reverted, filter_fn=lambda _, name: name == "1")  # each layer has one of the two
    train(reverted, optimizer, randn(20, 6), 2)
    again = cw.optim.Emended(inner, reverted, filter_fn=lambda _, name: name == "0")
    assert [unit.name for unit in again.units] == ["0"]


def _copy(layer: nn.Module) -> nn.Module:
    import copy

    return copy.deepcopy(layer)


def _same_step(layer: nn.Module, emended: nn.Module, x: Tensor) -> None:
    start = {name: p.detach().clone() for name, p in layer.named_parameters()}
    emended.load_state_dict(layer.state_dict())
    plain = torch.optim.SGD(emended.parameters(), 0.1)
    options: dict[str, Any] = {"damping": 0.1, "memory": 0, "refresh_every": 1}
    if isinstance(layer, nn.Linear) and x.numel() // 6 < 7:  # a relative damping of few rows is relative to them
        rows = x.reshape(-1, 6)
        options["damping"] = 0.1 * 7 / min(len(rows), 7)
    optimizer = cw.optim.Emended(torch.optim.SGD(layer.parameters(), 0.1), layer, **options)
    for one in (layer, emended):
        squares(one(x)).backward()
    optimizer.step()
    plain.step()
    for name, own in layer.named_parameters():
        expected = emended.get_parameter(name) - start[name]
        assert_close(name, own - start[name], expected, EXACT)
        assert expected.abs().max() > 0
    with torch.no_grad():
        for name, own in layer.named_parameters():
            own.copy_(start[name])
    del optimizer
