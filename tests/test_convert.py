"""`convert`, `revert` and `param_groups`: into an existing model and out of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import F32, F64, TOLERANCE, assert_close, assert_identical, oracle, randn
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm

import consequentialism as cw
from consequentialism.nn.module import EmendedModule


class Block(nn.Module):
    """Nested, with a layer in a list, one in a dict, and one that is nobody's child twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.layers = nn.ModuleList([nn.Linear(6, 6), nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6, bias=False))])
        self.heads = nn.ModuleDict({"a": nn.Linear(6, 3)})

    def forward(self, indices: Tensor) -> Tensor:
        x = self.embed(indices)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.heads["a"](x)


class Scaled(nn.Linear):
    """A subclass with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Renamed(nn.Linear):
    """A subclass without code of its own."""


def emended_names(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, EmendedModule)}


def converted_quietly(model: nn.Module, **options: Any) -> nn.Module:
    """Convert, with any warning an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return cw.convert(model, **options)


def test_nested_model_and_back() -> None:
    model = Block()
    before = {name: (id(module), type(module), dict(module.__dict__)) for name, module in model.named_modules()}
    parameters = [id(p) for p in model.parameters()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain_repr = repr(model)
    assert converted_quietly(model, damping=0.3, scale="raw") is model
    assert emended_names(model) == {"embed", "layers.0", "layers.1.1", "heads.a"}
    for name in emended_names(model):
        module = model.get_submodule(name)
        assert (module.damping, module.scale, module.damping_mode) == (0.3, "raw", "relative")
    assert [id(p) for p in model.parameters()] == parameters
    assert list(model.state_dict()) == list(state)
    assert cw.revert(model) is model
    for name, module in model.named_modules():
        identity, kind, attributes = before[name]
        assert id(module) == identity
        assert type(module) is kind
        assert set(module.__dict__) == set(attributes), name
    assert repr(model) == plain_repr
    for name, tensor in model.state_dict().items():
        assert_identical(name, tensor, state[name])


def test_converted_model_has_the_emended_gradient() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, dy = randn(8, 5), randn(8, 3, seed=1)
    before = model(x)
    cw.convert(model, damping=0.2)
    hidden = torch.tanh(model[0](x)).detach()
    assert_identical("y", model(x), before)
    model(x).backward(dy)
    assert_close("dw", model[2].weight.grad, oracle(hidden, dy, damping=0.2)[0], TOLERANCE[F64])
    cw.revert(model).zero_grad()
    model(x).backward(dy)
    assert_close("plain dw", model[2].weight.grad, dy.T @ hidden, TOLERANCE[F64])


@pytest.mark.parametrize("layer", [nn.Linear(5, 3), nn.Embedding(5, 3), nn.Linear(5, 3, bias=False)])
def test_root_module(layer: nn.Module) -> None:
    kind = type(layer)
    assert converted_quietly(layer) is layer
    assert isinstance(layer, (cw.Linear, cw.Embedding))
    assert cw.revert(layer) is layer
    assert type(layer) is kind


def test_revert_of_a_constructed_layer() -> None:
    layer = cw.revert(cw.Linear(5, 3, damping=0.3))
    assert type(layer) is nn.Linear
    assert set(layer.__dict__) == set(nn.Linear(5, 3).__dict__)
    assert repr(layer) == repr(nn.Linear(5, 3))


def test_filter_gets_module_and_name() -> None:
    model, seen = Block(), {}

    def first_only(module: nn.Module, name: str) -> bool:
        seen[name] = module
        return name.startswith("layers")

    converted_quietly(model, filter_fn=first_only)
    assert emended_names(model) == {"layers.0", "layers.1.1"}
    assert set(seen) == {"embed", "layers.0", "layers.1.1", "heads.a"}
    for name, module in seen.items():
        assert model.get_submodule(name) is module


def test_filter_silences_what_cannot_be_emended() -> None:
    model = nn.Sequential(nn.Linear(5, 3), Scaled(3, 3))
    converted_quietly(model, filter_fn=lambda module, name: name == "0")
    assert emended_names(model) == {"0"}


def test_reconvert_takes_new_options() -> None:
    model = converted_quietly(nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 2)), damping=0.1)
    converted_quietly(model, damping=0.5, filter_fn=lambda module, name: name == "1")
    assert [layer.damping for layer in model] == [0.1, 0.5]
    converted_quietly(model, scale="raw")  # keeps what it does not name
    assert [(layer.damping, layer.scale) for layer in model] == [(0.1, "raw"), (0.5, "raw")]


def left_alone(model: nn.Module, *words: str) -> None:
    """Convert; the one warning has every word, and names this file's line."""
    with pytest.warns(UserWarning, match="left alone") as caught:
        cw.convert(model)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    for word in words:
        assert word in str(caught[0].message), f"{word!r} is not in: {caught[0].message}"


def test_multihead_attention_is_left_alone() -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(6, 2), "out": nn.Linear(6, 3)})
    left_alone(model, "attention", "MultiheadAttention")
    assert emended_names(model) == {"out"}
    assert type(model["attention"].out_proj).__name__ == "NonDynamicallyQuantizableLinear"


@pytest.mark.parametrize("batch_first", [True, False])
def test_transformer_encoder_layer(batch_first: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=batch_first).double()
    x = randn(4, 5, 8)
    expected = layer(x)
    left_alone(layer, "self_attn")
    assert emended_names(layer) == {"linear1", "linear2"}
    assert_close("y", layer(x), expected, TOLERANCE[F64])
    seen: list[Tensor] = []
    layer.linear2.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    out = layer(x)
    layer.linear2.register_full_backward_hook(lambda module, grad_input, grad_output: seen.append(grad_output[0]))
    out = layer(x)
    out.square().sum().backward()
    hidden, dy = seen[1].reshape(-1, 16), seen[2].reshape(-1, 8)
    assert_close("dw", layer.linear2.weight.grad, oracle(hidden, dy)[0], TOLERANCE[F64])
    layer.eval()
    with torch.no_grad():
        assert_close("y in eval", layer(x), expected, TOLERANCE[F64])


class WeightStandardised(nn.Conv2d):
    """What weight standardisation does: another weight than the parameter."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


def replaced(layer: nn.Module) -> nn.Module:
    original = layer.forward
    layer.forward = lambda x: original(x) + 1  # type: ignore[method-assign]
    return layer


CANNOT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "weight_norm": (lambda: parametrizations.weight_norm(nn.Linear(5, 5)), "parametrised"),
    "spectral_norm, parametrised": (lambda: parametrizations.spectral_norm(nn.Linear(5, 5)), "parametrised"),
    "spectral_norm, old": (lambda: spectral_norm(nn.Linear(5, 5)), "computed"),
    "orthogonal": (lambda: parametrizations.orthogonal(nn.Linear(5, 5)), "parametrised"),
    "subclass": (lambda: Scaled(5, 5), "Scaled"),
    "instance's forward": (lambda: replaced(nn.Linear(5, 5)), "forward"),
    "Bilinear": (lambda: nn.Bilinear(5, 5, 5), "Bilinear"),
    "LazyConv2d": (lambda: nn.LazyConv2d(5, 1), "LazyConv2d has no shape yet"),
    "LazyLinear": (lambda: nn.LazyLinear(5), "LazyLinear has no shape yet"),
    "LazyConvTranspose1d": (lambda: nn.LazyConvTranspose1d(5, 1), "LazyConvTranspose1d has no shape yet"),
    "subclass of Conv2d": (lambda: WeightStandardised(5, 5, 1), "WeightStandardised is a subclass of Conv2d"),
    "LSTM": (lambda: nn.LSTM(5, 5), "LSTM"),
    "EmbeddingBag": (lambda: nn.EmbeddingBag(5, 5), "EmbeddingBag"),
    "scale_grad_by_freq": (lambda: nn.Embedding(5, 5, scale_grad_by_freq=True), "scale_grad_by_freq"),
}


@pytest.mark.parametrize("name", CANNOT)
@pytest.mark.filterwarnings("ignore:.*spectral_norm.*:FutureWarning")
def test_what_cannot_be_emended_is_named_and_untouched(name: str) -> None:
    make, word = CANNOT[name]
    odd = make()
    kind, attributes = type(odd), set(odd.__dict__)
    model = nn.ModuleDict({"odd": odd, "fine": nn.Linear(5, 5)})
    left_alone(model, "odd", word)
    assert type(odd) is kind
    assert set(odd.__dict__) == attributes
    assert emended_names(model) == {"fine"}


def test_tied_weights_are_left_alone() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(11, 6), "head": nn.Linear(6, 11, bias=False), "fine": nn.Linear(6, 6)})
    model["head"].weight = model["embed"].weight
    left_alone(model, "embed", "head", "tied")
    assert emended_names(model) == {"fine"}


def test_a_module_in_two_places_is_not_tied() -> None:
    shared = nn.Linear(5, 5)
    model = converted_quietly(nn.Sequential(shared, nn.Tanh(), shared))
    assert type(shared) is cw.Linear
    assert len(list(model.parameters())) == 2


def test_norms_and_activations_are_not_worth_a_warning() -> None:
    converted_quietly(nn.Sequential(nn.Linear(5, 5), nn.LayerNorm(5), nn.BatchNorm1d(5), nn.PReLU(), nn.Dropout()))


def test_convolutions_into_a_model_and_out_of_it() -> None:
    model = nn.Sequential(
        nn.Unflatten(1, (4, 6)), nn.Conv1d(4, 6, 3), nn.Unflatten(1, (2, 3)), nn.Conv2d(2, 4, 2, groups=2, bias=False),
        nn.Unflatten(1, (1, 4)), nn.Conv3d(1, 2, (2, 1, 1)), nn.Flatten(), nn.LazyLinear(3),
    ).double()  # fmt: skip
    x = randn(5, 24)
    expected = model(x)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert emended_names(converted_quietly(model, damping=0.3, patch_bytes=4096)) == {"1", "3", "5", "7"}
    assert [type(model[k]) for k in (1, 3, 5)] == [cw.Conv1d, cw.Conv2d, cw.Conv3d]
    assert model[3].patch_bytes == 4096
    assert_identical("y", model(x), expected)
    model(x).square().sum().backward()
    own = model[3].weight.grad.clone()
    model.load_state_dict(state, strict=True)
    cw.revert(model)
    assert [type(model[k]) for k in (1, 3, 5)] == [nn.Conv1d, nn.Conv2d, nn.Conv3d]
    assert "patch_bytes" not in model[3].__dict__
    model.zero_grad()
    model(x).square().sum().backward()
    assert not torch.allclose(own, model[3].weight.grad)


def test_frozen_layers_are_converted_too() -> None:
    model = nn.Sequential(nn.Linear(5, 5)).requires_grad_(False)
    assert emended_names(converted_quietly(model)) == {"0"}


def test_hooks_and_optimizer_survive() -> None:
    model = nn.Sequential(nn.Linear(5, 3)).double()
    calls: list[str] = []
    model[0].register_forward_hook(lambda *_: calls.append("forward"))
    model[0].register_forward_pre_hook(lambda *_: calls.append("pre"))
    model[0].weight.register_hook(lambda *_: calls.append("weight"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x, dy = randn(8, 5), randn(8, 3, seed=1)
    model(x).backward(dy)
    optimizer.step()
    momentum = optimizer.state[model[0].weight]["momentum_buffer"].clone()
    converted_quietly(model)
    calls.clear()
    optimizer.zero_grad()
    model(x).backward(dy)
    assert calls == ["pre", "forward", "weight"]
    before = model[0].weight.detach().clone()
    optimizer.step()
    expected = before - 0.1 * (0.9 * momentum + oracle(x, dy)[0])
    assert_close("weight", model[0].weight, expected, TOLERANCE[F64])


def test_training_mode_and_attributes_survive() -> None:
    model = nn.Sequential(nn.Linear(5, 3)).eval()
    model[0].note = "kept"  # type: ignore[assignment]
    converted_quietly(model)
    assert not model[0].training
    assert model[0].note == "kept"
    assert cw.revert(model)[0].note == "kept"


def test_state_dict_before_and_after() -> None:
    model = Block()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    converted_quietly(model).load_state_dict(state, strict=True)
    Block().load_state_dict(model.state_dict(), strict=True)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"damping": -1.0}, ValueError),
        ({"scale": "other"}, ValueError),
        ({"dampening": 1.0}, TypeError),
        ({"filter_fn": "layers"}, TypeError),
    ],
    ids=str,
)
def test_bad_options_convert_nothing(options: dict, error: type[Exception]) -> None:
    model = Block()
    with pytest.raises(error):
        cw.convert(model, **options)
    assert emended_names(model) == set()


def test_a_filter_that_raises_converts_nothing() -> None:
    model = Block()

    def fails_late(module: nn.Module, name: str) -> bool:
        if name == "heads.a":
            raise KeyError(name)
        return True

    with pytest.raises(KeyError):
        cw.convert(model, filter_fn=fails_late)
    assert emended_names(model) == set()


def test_a_warning_that_is_an_error_leaves_no_half() -> None:
    model = nn.Sequential(nn.Linear(5, 5), Scaled(5, 5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning):
            cw.convert(model)
    assert emended_names(model) in (set(), {"0"})
    for module in model.modules():
        assert isinstance(module, cw.Linear) == hasattr(module, "damping")


@pytest.mark.parametrize("call", [cw.convert, cw.revert, lambda m: cw.param_groups(m, lr=1.0, other={})])
@pytest.mark.parametrize("model", [None, "model", nn.Linear, [nn.Linear(2, 2)]], ids=["None", "str", "class", "list"])
def test_bad_model(call: Callable[[Any], Any], model: Any) -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
        call(model)


def test_param_groups() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), cw.Linear(4, 3, bias=False))
    groups = cw.param_groups(model, lr=1.0, other={"lr": 1e-3, "weight_decay": 0.1})
    assert [id(p) for p in groups[0]["params"]] == [id(model[2].weight)]
    assert {id(p) for p in groups[1]["params"]} == {id(p) for layer in model[:2] for p in layer.parameters()}
    assert {key: groups[0][key] for key in groups[0] if key != "params"} == {"lr": 1.0}
    assert {key: groups[1][key] for key in groups[1] if key != "params"} == {"lr": 1e-3, "weight_decay": 0.1}
    optimizer = torch.optim.SGD(groups, lr=0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [1.0, 1e-3]
    model(randn(8, 5, dtype=F32)).sum().backward()
    optimizer.step()
    assert len(cw.param_groups(cw.Linear(5, 3), lr=1.0, other={})) == 1
    assert len(cw.param_groups(nn.Linear(5, 3), lr=1.0, other={"lr": 0.1})) == 1
    assert cw.param_groups(nn.ReLU(), lr=1.0, other={}) == []
    assert cw.param_groups(cw.Linear(5, 3), lr=torch.tensor(0.5), other={})[0]["lr"] == 0.5


def test_param_groups_lists_a_tied_parameter_once() -> None:
    embed, head = cw.Embedding(11, 6), nn.Linear(6, 11, bias=False)
    head.weight = embed.weight
    groups = cw.param_groups(nn.Sequential(embed, head), lr=1.0, other={"lr": 0.1})
    assert [len(group["params"]) for group in groups] == [1]


@pytest.mark.parametrize(
    ("arguments", "error", "word"),
    [
        ({"lr": "1", "other": {}}, TypeError, "lr must be a number"),
        ({"lr": True, "other": {}}, TypeError, "lr must be a number"),
        ({"lr": 1.0, "other": None}, TypeError, "other must be a dict"),
        ({"lr": 1.0, "other": {"params": []}}, ValueError, "other must not name 'params'"),
    ],
    ids=str,
)
def test_bad_arguments_of_param_groups(arguments: dict, error: type[Exception], word: str) -> None:
    with pytest.raises(error, match=word):
        cw.param_groups(nn.Linear(5, 3), **arguments)


def test_a_class_that_cannot_be_subclassed_is_left_alone() -> None:
    class Tagged(nn.Linear):
        def __init_subclass__(cls, *, tag: str) -> None: ...

    model = nn.Sequential(nn.Linear(4, 4), Tagged(4, 4), nn.Linear(4, 4))
    with pytest.warns(UserWarning, match="1: its class cannot be subclassed"):
        cw.convert(model)
    assert [isinstance(layer, cw.Linear) for layer in model] == [True, False, True]


def test_pruned_and_normed_weights_are_in_the_emended_group() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    cw.convert(model)
    prune.l1_unstructured(model[0], "weight", 0.5)
    nn.utils.spectral_norm(model[1])
    emended, *others = cw.param_groups(model, lr=1.0, other={"lr": 1e-3})
    assert {id(p) for p in emended["params"]} == {id(p) for p in model.parameters()}
    assert not any(group["params"] for group in others)
