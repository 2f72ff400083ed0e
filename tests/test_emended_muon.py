"""`consequentialism.optim.Muon`: which matrices it takes, its numbers, its arguments."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from cases import F64, assert_close, assert_identical, randn
from emended_helpers import EXACT, mlp, squares, train
from torch import Tensor, nn

import consequentialism as cw
from consequentialism.optim.steps import orthogonalised

NS = (3.4445, -4.7750, 2.0315)


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6, dtype=F64)
        self.c_attn = nn.Linear(6, 18, dtype=F64)
        self.conv = nn.Conv1d(6, 6, 3, padding=1, dtype=F64)
        self.norm = nn.LayerNorm(6, dtype=F64)
        self.head = nn.Linear(6, 11, False, dtype=F64)

    def forward(self, x: Tensor) -> Tensor:
        x = self.table(x)
        q, k, v = self.c_attn(self.norm(x)).chunk(3, -1)
        x = x + (q @ k.mT).softmax(-1) @ v
        return self.head(x + self.conv(x.mT).mT)


TOKENS = torch.arange(40).view(5, 8) * 7 % 11


def test_which_matrices_it_takes() -> None:
    model = Transformer()
    optimizer = cw.optim.Muon(model, 0.02, aux={"lr": 1e-3})
    assert [unit.name for unit in optimizer.units] == ["c_attn", "conv"]
    taken, rest = optimizer.param_groups
    assert {id(p) for p in taken["params"]} == {id(model.c_attn.weight), id(model.conv.weight)}
    assert len(taken["params"]) + len(rest["params"]) == len(list(model.parameters()))
    assert optimizer.exponent == 0.25
    assert optimizer.scale == "gradient"
    model.head.weight = model.table.weight
    assert [u.name for u in cw.optim.Muon(model, 0.02, aux={"lr": 1e-3}).units] == ["c_attn", "conv"]
    by_hand = cw.optim.Muon(model, 0.02, aux={"lr": 1e-3}, filter_fn=lambda module, _: module is model.conv)
    assert [unit.name for unit in by_hand.units] == ["conv"]
    alone = nn.Linear(6, 4)
    assert [unit.name for unit in cw.optim.Muon(alone, 0.02, aux={"lr": 1e-3}).units] == [""]


@pytest.mark.parametrize("split", [False, True])
def test_numbers(split: bool) -> None:
    """One step by the formulas; the rest is AdamW's."""
    model = Transformer()
    start, twin = copy.deepcopy(model), copy.deepcopy(model)
    optimizer = cw.optim.Muon(
        model,
        0.02,
        aux={"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.2},
        weight_decay=0.5,
        damping=0.1,
        qkv=("c_attn",) if split else (),
    )
    plain = torch.optim.AdamW(twin.parameters(), 1e-3, betas=(0.9, 0.95), weight_decay=0.2)
    for one, stepped in ((model, optimizer), (twin, plain)):
        squares(one(TOKENS)).backward()
        stepped.step()
    for name, own in model.named_parameters():
        if name not in ("c_attn.weight", "conv.weight"):
            assert_close(name, own, twin.get_parameter(name), EXACT)
    for layer, outputs in (("c_attn", 18), ("conv", 6)):
        weight = model.get_submodule(layer).weight
        root = optimizer.state[weight]["root"]
        kept = (twin.get_submodule(layer).weight.grad.flatten(1) @ root) * 0.05
        wanted = kept * 0.95 + kept / 0.05 * 0.05
        parts = wanted.chunk(3 if split and layer == "c_attn" else 1)
        change = torch.cat([orthogonalised(p, NS, 5, 1e-7) * max(1, p.shape[0] / p.shape[1]) ** 0.5 for p in parts])
        before = start.get_submodule(layer).weight
        expected = before * (1 - 0.02 * 0.5) - 0.02 * (change @ root).view(before.shape)
        assert_close(layer, weight, expected, EXACT)
        assert outputs == weight.shape[0]


def test_the_root_of_a_hidden_matrix_has_no_bias() -> None:
    model = Transformer()
    optimizer = cw.optim.Muon(model, 0.02, aux={"lr": 1e-3}, memory=0)
    seen: list[Tensor] = []
    model.c_attn.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().reshape(-1, 6)))
    squares(model(TOKENS)).backward()
    optimizer.step()
    assert_close("moment", optimizer.state[model.c_attn.weight]["input_gram"], seen[0].T @ seen[0] / 40, EXACT)


def test_infinite_damping_is_plain_muon_and_adamw() -> None:
    model = mlp(F64)
    twin = copy.deepcopy(model)
    optimizer = cw.optim.Muon(model, 0.02, aux={"lr": 1e-3, "weight_decay": 0.01}, damping=float("inf"))
    muon = torch.optim.Muon([twin[0].weight], 0.02)
    adamw = torch.optim.AdamW([twin[0].bias, *twin[2].parameters()], 1e-3)
    x = randn(30, 6)
    for _ in range(4):
        train(model, optimizer, x, 1)
        twin.zero_grad()
        squares(twin(x)).backward()
        muon.step()
        adamw.step()
    for name, own in model.named_parameters():
        bound = 0.05 if name == "0.weight" else 1e-2  # torch's Muon orthogonalises in bfloat16
        assert_close(name, own, twin.get_parameter(name), bound)


def test_resuming_and_schedulers() -> None:
    model = Transformer()
    optimizer = cw.optim.Muon(model, 0.02, aux={"lr": 1e-3}, qkv=("c_attn",), refresh_every=3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
    train(model, optimizer, TOKENS, 4)
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.018, 0.018, 0.0009])
    other = Transformer()
    other.load_state_dict(model.state_dict())
    resumed = cw.optim.Muon(other, 0.02, aux={"lr": 1e-3}, qkv=("c_attn",), refresh_every=3)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, TOKENS, 4)
    train(other, resumed, TOKENS, 4)
    for (name, own), expected in zip(other.named_parameters(), model.parameters(), strict=True):
        assert_identical(name, own.detach(), expected.detach())


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"aux": {}}, ValueError, "aux must have 'lr'"),
        ({"aux": {"lr": 1e-3, "momentum": 1}}, ValueError, "aux must have 'lr' and may have 'betas'"),
        ({"aux": 0.1}, TypeError, "aux must be a dict of AdamW's options, got 0.1"),
        ({"aux": {"lr": -1e-3}}, ValueError, r"aux\['lr'\] must be finite and at least 0, got -0.001"),
        ({"aux": {"lr": "x"}}, TypeError, r"aux\['lr'\] must be a number or a tensor, got 'x'"),
        ({"aux": {"lr": 1e-3, "betas": 0.9}}, ValueError, r"aux\['betas'\] must be two numbers, got 0.9"),
        ({"aux": {"lr": 1e-3, "betas": (0.9, 1)}}, ValueError, r"aux\['betas'\] must be at least 0 and below 1"),
        ({"aux": {"lr": 1e-3, "eps": -1}}, ValueError, r"aux\['eps'\] must be at least 0, got -1"),
        ({"aux": {"lr": 1e-3, "weight_decay": "x"}}, TypeError, r"aux\['weight_decay'\] must be a number, got 'x'"),
        ({"aux": {"lr": 1e-3, "amsgrad": 1}}, TypeError, r"aux\['amsgrad'\] must be True or False, got 1"),
        ({"lr": -1.0}, ValueError, "lr must be finite and at least 0, got -1.0"),
        ({"lr": math.inf}, ValueError, "lr must be finite and at least 0, got inf"),
        ({"lr": torch.tensor([0.1, 0.2])}, ValueError, "lr must be a tensor with one element"),
        ({"lr": "x"}, TypeError, "lr must be a number or a tensor, got 'x'"),
        ({"nesterov": 1}, TypeError, "nesterov must be True or False, got 1"),
        ({"ns_steps": 0}, ValueError, "ns_steps must be an integer of at least 1, got 0"),
        ({"ns_steps": 2.5}, TypeError, "ns_steps must be an integer of at least 1, got 2.5"),
        ({"ns_coefficients": (1, 2)}, ValueError, r"ns_coefficients must be three numbers, got \(1, 2\)"),
        ({"eps": -1.0}, ValueError, "eps must be at least 0, got -1.0"),
        ({"momentum": None}, TypeError, "momentum must be a number, got None"),
        ({"momentum": 1.0}, ValueError, "momentum must be at least 0 and below 1, got 1.0"),
        ({"weight_decay": -1.0}, ValueError, "weight_decay must be at least 0, got -1.0"),
        ({"adjust_lr_fn": "x"}, ValueError, "adjust_lr_fn must be None, 'original' or 'match_rms_adamw', got 'x'"),
        ({"qkv": "c_attn"}, TypeError, "qkv must be a sequence of names, got 'c_attn'"),
        ({"qkv": (3,)}, TypeError, "qkv must be a sequence of names, got one with 3"),
        ({"qkv": ("query",)}, ValueError, "qkv: no name of a hidden matrix ends in 'query'; they are '"),
        ({"qkv": ("conv",), "filter_fn": lambda *_: True}, None, ""),
        ({"filter_fn": lambda *_: False}, ValueError, "no hidden matrix"),
        ({"damping": -1.0}, ValueError, "damping must be above 0"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception] | None, match: str) -> None:
    model = Transformer()
    arguments = {"lr": 0.02, "aux": {"lr": 1e-3}, **arguments}
    if error is None:
        cw.optim.Muon(model, **arguments)
        return
    with pytest.raises(error, match=match):
        cw.optim.Muon(model, **arguments)
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module"):
        cw.optim.Muon(None, **arguments)  # type: ignore[arg-type]


def test_sparse_gradients_are_refused_before_anything_moves() -> None:
    model = nn.Sequential(nn.Embedding(7, 4, sparse=True), nn.Linear(4, 4), nn.Linear(4, 3))
    optimizer = cw.optim.Muon(model, 0.02, aux={"lr": 1e-3})
    squares(model(torch.tensor([1, 5]))).backward()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"dense.*torch.sparse_coo"):
        optimizer.step()
    for name, value in model.state_dict().items():
        assert_identical(name, value, before[name])
