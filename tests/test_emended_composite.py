"""Steps in coordinates of attentions' and recurrent layers' input projections."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from cases import F64, assert_close, randn
from emended_helpers import EXACT, squares, train
from torch import Tensor, nn
from torch.nn import functional as F

import consequentialism as cw

OPTIONS: dict[str, Any] = {"memory": 0, "refresh_every": 1, "damping": 0.1, "block": 1024}
WIDTH = 6


class Apart(nn.Module):
    """An attention of layers of its own, with the weights of torch's."""

    def __init__(self, of: nn.MultiheadAttention) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(WIDTH, WIDTH, dtype=F64) for _ in range(3))
        self.out, self.heads = nn.Linear(WIDTH, WIDTH, dtype=F64), of.num_heads
        with torch.no_grad():
            for part, weight, bias in zip(
                self.parts, of.in_proj_weight.chunk(3), of.in_proj_bias.chunk(3), strict=True
            ):
                part.weight.copy_(weight)
                part.bias.copy_(bias)
            self.out.load_state_dict(of.out_proj.state_dict())

    def forward(self, *inputs: Tensor) -> Tensor:
        split = [p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p, x in zip(self.parts, inputs, strict=True)]
        return self.out(F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2))


def inputs_of(case: str) -> tuple[Tensor, Tensor, Tensor]:
    x, memory, other = randn(3, 5, WIDTH), randn(3, 8, WIDTH, seed=1), randn(3, 8, WIDTH, seed=2)
    return {"self": (x, x, x), "cross": (x, memory, memory), "all apart": (x, memory, other)}[case]


@pytest.mark.parametrize("case", ["self", "cross", "all apart"])
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_attention_steps_as_three_linear_layers(case: str, name: str) -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True, dtype=F64)
    apart, inputs = Apart(attention), inputs_of(case)
    for model in (attention, apart):
        inner = getattr(torch.optim, name)(model.parameters(), lr=0.1)
        keep_out = {"filter_fn": lambda module, name: name != "out"}  # whose input torch's attention does not show
        optimizer = cw.optim.Emended(inner, model, **OPTIONS, **keep_out)
        for _ in range(3):
            optimizer.zero_grad()
            out = model(*inputs)
            squares(out[0] if isinstance(out, tuple) else out).backward()
            optimizer.step()
        if model is attention:
            assert "out_proj" in optimizer.left_alone[""]
    assert_close("weight", attention.in_proj_weight, torch.cat([part.weight for part in apart.parts]), EXACT)
    assert_close("bias", attention.in_proj_bias, torch.cat([part.bias for part in apart.parts]), EXACT)
    assert_close("out", attention.out_proj.weight, apart.out.weight, EXACT)


@pytest.mark.parametrize("case", ["self", "all apart"])
def test_muon_takes_an_attention_as_its_matrices(case: str) -> None:
    """Queries', keys' and values' by Muon in coordinates, the output's by Muon without; the last layer is the head."""
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True, dtype=F64)
    apart, inputs = Apart(attention), inputs_of(case)
    head = nn.Linear(WIDTH, 3, dtype=F64)
    for inner in (attention, apart):
        model = nn.ModuleList([inner, copy.deepcopy(head)])
        hidden = {"filter_fn": lambda module, name: "parts" in name} if inner is apart else {}
        optimizer = cw.optim.Muon(model, 0.02, aux={"lr": 1e-3}, **OPTIONS, **hidden)
        out = inner(*inputs)
        squares(model[1](out[0] if isinstance(out, tuple) else out)).backward()
        optimizer.step()
        if inner is attention:
            assert [len(group["params"]) for group in optimizer.param_groups] == [1, 1, 4]
            assert [group.get("parts") for group in optimizer.param_groups] == [3, 1, 1]
            assert optimizer.param_groups[1]["params"][0] is attention.out_proj.weight
            assert "out_proj" in optimizer.left_alone["0"]
    assert_close("weight", attention.in_proj_weight, torch.cat([part.weight for part in apart.parts]), EXACT)


def test_muon_leaves_recurrent_layers_to_adamw() -> None:
    model = nn.ModuleList([nn.LSTM(WIDTH, 4), nn.Linear(4, 4), nn.Linear(4, 3)])
    optimizer = cw.optim.Muon(model, 0.02, aux={"lr": 1e-3})
    muon = [p for group in optimizer.param_groups if group["use_muon"] for p in group["params"]]
    assert [id(p) for p in muon] == [id(model[1].weight)]


def test_attention_with_widths_of_its_own() -> None:
    attention = nn.MultiheadAttention(WIDTH, 2, kdim=4, vdim=5, dtype=F64)
    inputs = randn(7, 3, WIDTH), randn(8, 3, 4, seed=1), randn(8, 3, 5, seed=2)
    optimizer = cw.optim.Emended(torch.optim.AdamW(attention.parameters(), 0.1), attention, **OPTIONS)
    squares(attention(inputs[0], value=inputs[2], key=inputs[1])[0]).backward()
    optimizer.step()
    for name, x in zip(("q", "k", "v"), inputs, strict=True):
        rows = x.flatten(0, 1)
        weight = attention.get_parameter(f"{name}_proj_weight")
        assert_close(name, optimizer.state[weight]["input_gram"], rows.T @ rows / len(rows), EXACT)


def test_transformer_layers() -> None:
    """Every matrix but the attentions' output projections; checkpoints go on bit for bit."""
    torch.manual_seed(0)
    model = nn.Transformer(8, 2, 1, 1, 16, dropout=0.0, batch_first=True)
    optimizer = cw.optim.Emended(torch.optim.AdamW(model.parameters(), 0.01), model, refresh_every=2)
    names = {unit.name for unit in optimizer.units}
    layers = {"encoder.layers.0": ["self_attn"], "decoder.layers.0": ["self_attn", "multihead_attn"]}
    wanted = {f"{where}.{own}" for where, more in layers.items() for own in ("linear1", "linear2", *more)}
    assert names == wanted
    assert len(optimizer.left_alone) == 3
    x, target = torch.randn(4, 5, 8), torch.randn(4, 7, 8)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = squares(model(x, target))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    other = cw.optim.Emended(torch.optim.AdamW(model.parameters(), 0.01), model, refresh_every=2)
    other.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("packed", [False, True])
def test_recurrent_input_projections(kind: type[nn.RNNBase], packed: bool) -> None:
    layer = kind(4, 5, num_layers=2, bidirectional=True, dtype=F64)
    x: Any = randn(7, 3, 4)
    rows = x.flatten(0, 1)
    if packed:
        x = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([7, 4, 2]))
        rows = x.data
    optimizer = cw.optim.Emended(torch.optim.SGD(layer.parameters(), 0.5), layer, **OPTIONS)
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    out = layer(x)[0]
    squares(out.data if packed else out).backward()
    optimizer.step()
    rows = torch.cat([rows, rows.new_ones(len(rows), 1)], 1)
    moment = rows.T @ rows / len(rows)
    ridge = 0.1 * moment.trace() / 5 * torch.eye(5, dtype=F64)
    for name, parameter in layer.named_parameters():
        gradient, change = parameter.grad, parameter - before[name]
        assert gradient is not None
        if name in ("weight_ih_l0", "weight_ih_l0_reverse"):
            bias = layer.get_parameter(name.replace("weight", "bias")).grad
            whole = torch.cat([gradient, bias[:, None]], 1) @ torch.linalg.inv(moment + ridge)
            assert_close(name, change, -0.5 * whole[:, :-1], EXACT)
        elif name not in ("bias_ih_l0", "bias_ih_l0_reverse"):
            assert_close(f"{name} is stepped plainly", change, -0.5 * gradient, EXACT)
    assert "inputs arise inside" in optimizer.left_alone[""]


def test_cells_count_every_call() -> None:
    cell, x = nn.GRUCell(4, 5, dtype=F64), randn(6, 3, 4)
    optimizer = cw.optim.Emended(torch.optim.SGD(cell.parameters(), 0.1), cell, **OPTIONS)
    hidden = x.new_zeros(3, 5)
    for step in x:
        hidden = cell(step, hidden)
    squares(hidden).backward()
    optimizer.step()
    rows = torch.cat([x.flatten(0, 1), x.new_ones(18, 1)], 1)
    assert_close("moment", optimizer.state[cell.weight_ih]["input_gram"], rows.T @ rows / 18, EXACT)


def test_an_attention_with_code_of_its_own_is_left_alone() -> None:
    class Own(nn.MultiheadAttention):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(args[0], args[0], args[0])

    model = nn.ModuleList([Own(WIDTH, 2, dtype=F64), nn.Linear(WIDTH, 3, dtype=F64)])
    optimizer = cw.optim.Emended(torch.optim.SGD(model.parameters(), 0.1), model)
    assert optimizer.left_alone == {"0": "its forward is not torch's own"}
    train(model[1], optimizer, randn(20, WIDTH), 1)
