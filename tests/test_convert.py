"""`convert`, `revert` and `param_groups`."""

from __future__ import annotations

import warnings

import pytest
import torch
from cases import assert_identical, randn
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm

import consequentialism as cw

F32 = torch.float32


class Special(nn.Linear):
    """A subclass with code of its own."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


def nested() -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            "tokens": nn.Embedding(10, 6),
            "body": nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.ModuleList([nn.Linear(8, 6)])),
            "norm": nn.LayerNorm(6),
        }
    )


def classes(model: nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules()}


def convert_quietly(model: nn.Module, **options: object) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return cw.convert(model, **options)  # type: ignore[arg-type]


def test_nested_models_there_and_back() -> None:
    model = nested()
    before, state = classes(model), dict(model.named_parameters())
    attributes = {name: set(module.__dict__) for name, module in model.named_modules()}
    assert convert_quietly(model, damping=0.5) is model
    assert {name for name, kind in classes(model).items() if kind in (cw.Linear, cw.Embedding)} == {
        "tokens",
        "body.0",
        "body.2.0",
    }
    assert model["body"][0].damping == 0.5
    assert all(state[name] is parameter for name, parameter in model.named_parameters())
    assert cw.revert(model) is model
    assert classes(model) == before
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == attributes


def test_the_model_itself_may_be_a_layer() -> None:
    layer = nn.Linear(3, 2)
    assert type(convert_quietly(layer)) is cw.Linear
    assert type(cw.revert(layer)) is nn.Linear


def test_filter_fn_sees_layers_and_their_names_and_decides() -> None:
    model, seen = nested(), {}

    def filter_fn(module: nn.Module, name: str) -> bool:
        seen[name] = type(module)
        return name == "body.0"

    convert_quietly(model, filter_fn=filter_fn)
    assert seen == {"tokens": nn.Embedding, "body.0": nn.Linear, "body.2.0": nn.Linear}
    assert [type(m) for m in (model["tokens"], model["body"][0], model["body"][2][0])] == [
        nn.Embedding,
        cw.Linear,
        nn.Linear,
    ]


def test_hooks_and_optimizer_survive() -> None:
    layer = nn.Linear(6, 4)
    calls: list[int] = []
    layer.register_forward_hook(lambda *_: calls.append(1))
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    before = layer.weight.detach().clone()
    cw.convert(layer)
    x = randn(5, 6, dtype=F32)
    layer(x).square().mean().backward()
    optimizer.step()
    assert calls == [1]
    expected = cw.emended_weight_grad(x, 2 * nn.functional.linear(x, before, layer.bias.detach() + layer.bias.grad) / 20)
    assert_identical("step", layer.weight.detach(), before - layer.weight.grad)
    torch.testing.assert_close(layer.weight.grad, expected[0], rtol=1e-4, atol=1e-5)


def tied() -> nn.Module:
    model = nn.Sequential(nn.Embedding(10, 6), nn.Linear(6, 10, bias=False))
    model[1].weight = model[0].weight
    return model


def patched() -> nn.Module:
    layer = nn.Linear(3, 2)
    layer.forward = lambda x: x  # type: ignore[method-assign]
    return layer


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda: nn.Sequential(nn.MultiheadAttention(4, 2)), ["0: MultiheadAttention"]),
        (lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 2))), ["0: its parameters are parametrised"]),
        (lambda: nn.Sequential(spectral_norm(nn.Linear(3, 2))), ["0: its weight is computed"]),
        (tied, ["0: its weight is tied", "1: its weight is tied"]),
        (lambda: nn.Sequential(Special(3, 2)), ["0: Special is a subclass of Linear"]),
        (lambda: nn.Sequential(patched()), ["0: its forward is replaced"]),
        (lambda: nn.Sequential(nn.Embedding(3, 2, scale_grad_by_freq=True)), ["0: scale_grad_by_freq"]),
        (lambda: nn.Sequential(nn.LSTM(3, 2)), ["0: LSTM has no emended form"]),
        (lambda: nn.LSTM(3, 2), ["(the model itself): LSTM"]),
    ],
)
def test_what_cannot_be_emended_is_left_alone_and_named(make: object, parts: list[str]) -> None:
    model = make()  # type: ignore[operator]
    before = classes(model)
    with pytest.warns(UserWarning, match="left alone") as caught:
        cw.convert(model)
    assert classes(model) == before
    assert len(caught) == 1
    for part in parts:
        assert part in str(caught[0].message)


def test_a_transformer_layer_is_emended_around_its_attention() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    with pytest.warns(UserWarning, match="self_attn: MultiheadAttention"):
        cw.convert(model)
    assert type(model.linear1) is type(model.linear2) is cw.Linear
    assert not isinstance(model.self_attn.out_proj, cw.Linear)
    model(randn(2, 3, 8, dtype=F32)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_module_under_two_names_is_one_module() -> None:
    model = nn.Module()
    model.first = nn.Linear(3, 2)
    model.second = model.first
    convert_quietly(model)
    assert type(model.first) is cw.Linear


def test_converting_again_changes_the_options() -> None:
    layer = cw.Linear(3, 2, damping=1)
    convert_quietly(layer, damping=0.25, scale="raw")
    assert (layer.damping, layer.scale) == (0.25, "raw")


@pytest.mark.parametrize(
    ("options", "error", "part"),
    [
        ({"damping": 0}, ValueError, "damping"),
        ({"damping": "1"}, TypeError, "damping"),
        ({"scale": "sum"}, ValueError, "'nlms'"),
        ({"dampening": 1}, TypeError, "dampening"),
        ({"filter_fn": 3}, TypeError, "filter_fn"),
    ],
)
def test_bad_options_convert_nothing(options: dict, error: type[Exception], part: str) -> None:
    model = nested()
    before = classes(model)
    with pytest.raises(error, match=part):
        cw.convert(model, **options)
    assert classes(model) == before


def test_a_failing_filter_converts_nothing() -> None:
    model = nested()
    before = classes(model)

    def filter_fn(module: nn.Module, name: str) -> bool:
        if name == "body.2.0":
            raise KeyError(name)
        return True

    with pytest.raises(KeyError):
        cw.convert(model, filter_fn=filter_fn)
    assert classes(model) == before


@pytest.mark.parametrize("function", [cw.convert, cw.revert, lambda m: cw.param_groups(m, lr=1, other={})])
def test_only_modules(function: object) -> None:
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got 3"):
        function(3)  # type: ignore[operator]


def test_param_groups() -> None:
    model = convert_quietly(nested())
    groups = cw.param_groups(model, lr=0.7, other={"lr": 1e-3, "weight_decay": 0.1})
    emended = [model["tokens"], model["body"][0], model["body"][2][0]]
    assert {id(p) for p in groups[0]["params"]} == {id(p) for m in emended for p in m.parameters()}
    assert {id(p) for p in groups[1]["params"]} == {id(p) for p in model["norm"].parameters()}
    assert groups[0]["lr"] == 0.7
    assert {k: v for k, v in groups[1].items() if k != "params"} == {"lr": 1e-3, "weight_decay": 0.1}
    torch.optim.AdamW(groups)


def test_param_groups_leaves_out_an_empty_group() -> None:
    assert len(cw.param_groups(cw.Linear(3, 2), lr=1, other={})) == 1
    assert len(cw.param_groups(nn.Linear(3, 2), lr=1, other={"lr": 2})) == 1


@pytest.mark.parametrize(
    ("lr", "other", "error", "part"),
    [
        ("1", {}, TypeError, "lr"),
        (True, {}, TypeError, "lr"),
        (1, [1], TypeError, "other"),
        (1, {"params": []}, ValueError, "params"),
    ],
)
def test_param_groups_refuses(lr: object, other: object, error: type[Exception], part: str) -> None:
    with pytest.raises(error, match=part):
        cw.param_groups(cw.Linear(3, 2), lr=lr, other=other)  # type: ignore[arg-type]
