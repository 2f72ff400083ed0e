"""Classes of a user's own after `convert`: their names, flags and inputs stay what they were."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
from cases import F32, F64, TOLERANCE, assert_close, assert_identical, oracle, randn
from torch import Tensor, nn
from torch.nn import functional as F

import consequentialism as cw
from consequentialism.nn.module import EmendedModule, hidden_name
from consequentialism.nn.registry import DEFAULTS


class Named(nn.Module):
    """Its input is called ``x``; ``bias`` and ``scaled`` are flags."""

    def __init__(self, bias: bool = True, transposed: bool = False) -> None:
        super().__init__()
        self.bias, self.transposed = bias, transposed
        self.kernel = nn.Parameter(randn(5, 3))
        self.offset = nn.Parameter(randn(3, seed=1)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.kernel
        return y + self.offset if self.offset is not None else y


class Flag(nn.Module):
    """``bias`` says that there is none, under the usual name."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = False
        self.weight = nn.Parameter(randn(3, 5))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class Words(nn.Module):
    """An embedding under names of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = True
        self.table = nn.Parameter(randn(7, 3))

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.table)


class Padded(nn.Module):
    """A convolution that pads by itself."""

    def __init__(self, padding: Any, mode: str) -> None:
        super().__init__()
        self.padding, self.padding_mode, self.dilation = padding, mode, 2
        self.bias = True
        self.filters = nn.Parameter(randn(3, 2, 2))
        self.offset = nn.Parameter(randn(3, seed=1))
        self.same = nn.Conv1d(2, 3, 2, padding=padding, padding_mode=mode, dilation=2, dtype=F64)

    def forward(self, signal: Tensor) -> Tensor:
        with torch.no_grad():
            self.same.weight.copy_(self.filters)
        own = {"weight": self.filters, "bias": self.offset}
        return torch.func.functional_call(self.same, own, (signal,))


class Upsampling(nn.Module):
    """A transposed convolution whose ``padding_mode`` torch does not have."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.padding_mode = mode
        self.weight = nn.Parameter(randn(2, 3, 2))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv_transpose1d(x, self.weight)


@pytest.fixture(autouse=True)
def registered() -> None:
    cw.register(Named, like=nn.Linear, weight="kernel", bias="offset", transposed=True)
    cw.register(Flag, like=nn.Linear)
    cw.register(Words, like=nn.Embedding, weight="table", bias="nothing")
    cw.register(Padded, like=nn.Conv1d, weight="filters", bias="offset")
    cw.register(Upsampling, like=nn.ConvTranspose1d)


@pytest.mark.parametrize("bias", [True, False])
def test_a_flag_in_the_place_of_a_renamed_bias(bias: bool) -> None:
    layer = cw.convert(Named(bias), damping=0.2)
    x, dy = randn(4, 5), randn(4, 3, seed=2)
    layer(x).backward(dy)
    dw, db = oracle(x, dy, bias=bias, damping=0.2)
    assert_close("dw", layer.kernel.grad.t(), dw, TOLERANCE[F64])
    if bias:
        assert_close("db", layer.offset.grad, db, TOLERANCE[F64])
    assert (layer.bias, layer.transposed) == (bias, False)


def test_a_flag_that_says_there_is_no_bias() -> None:
    layer = cw.convert(Flag(), damping=0.2)
    x, dy = randn(4, 5), randn(4, 3, seed=2)
    layer(x).backward(dy)
    assert_close("dw", layer.weight.grad, oracle(x, dy, bias=False, damping=0.2)[0], TOLERANCE[F64])


def test_an_embedding_under_names_of_its_own() -> None:
    layer, plain = cw.convert(Words(), damping=0.2), cw.Embedding(7, 3, damping=0.2, dtype=F64)
    plain.load_state_dict({"weight": layer.table.detach()})
    tokens = torch.tensor([1, 1, 4])
    for one in (layer(tokens=tokens), plain(tokens)):
        one.square().sum().backward()
    assert_identical("dw", layer.table.grad, plain.weight.grad)


@pytest.mark.parametrize("mode", ["reflect", "zeros"])
@pytest.mark.parametrize("padding", [2, "same", "valid", (1,)], ids=str)
def test_padding_of_a_registered_convolution(padding: Any, mode: str) -> None:
    """Of the layer, and of steps in coordinates."""
    x = randn(2, 2, 9)
    layer = Padded(padding, mode)
    expected = layer(x).detach()
    twin = cw.convert(layer.same, damping=0.2)
    cw.convert(layer, damping=0.2, filter_fn=lambda module, name: not name)
    assert isinstance(layer, EmendedModule)
    y = layer(signal=x)
    assert_close("y", y, expected, TOLERANCE[F64])
    y.square().sum().backward()
    with torch.no_grad():
        twin.bias.copy_(layer.offset)
    twin(x).square().sum().backward()
    assert_close("dw", layer.filters.grad, twin.weight.grad, TOLERANCE[F64])
    stepped, other = Padded(padding, mode), copy.deepcopy(cw.revert(twin))
    pairs = [(stepped, [stepped.filters, stepped.offset]), (other, [other.weight, other.bias])]
    for model, parameters in pairs:
        for parameter in parameters:
            parameter.grad = None
        optimizer = cw.optim.Emended(torch.optim.SGD(parameters, 0.1), model)
        assert len(optimizer.units) == 1
        model(x).square().sum().backward()
        optimizer.step()
    assert_close("stepped", stepped.filters, other.weight, TOLERANCE[F64])


def test_a_transposed_convolution_pads_with_zeros_alone() -> None:
    with pytest.warns(UserWarning, match="padding_mode is 'reflect', which transposed convolutions do not have"):
        assert not isinstance(cw.convert(Upsampling("reflect")), EmendedModule)
    layer = Upsampling("reflect")
    with pytest.raises(ValueError, match="padding_mode is 'reflect', which transposed convolutions do not have"):
        cw.optim.Emended(torch.optim.SGD(layer.parameters(), 0.1), layer)
    assert isinstance(cw.convert(Upsampling("zeros")), EmendedModule)


@pytest.mark.parametrize("compiled", [False, True])
def test_an_input_by_its_own_name(compiled: bool) -> None:
    layer, x = Named(), randn(4, 5)
    expected = layer(x=x)
    cw.convert(layer)
    assert [*inspect.signature(layer.forward).parameters] == ["x"]
    call = torch.compile(layer, backend="eager", fullgraph=True) if compiled else layer
    for y in (call(x=x), call(x)):
        assert_close("y", y, expected, TOLERANCE[F64])
        (dw,) = torch.autograd.grad(y, [layer.kernel], randn(4, 3, seed=2))
        assert_close("dw", dw.t(), oracle(x, randn(4, 3, seed=2))[0], TOLERANCE[F64])
    for wrong in ({"input": x}, {"x": x, "y": x}, {}):
        with pytest.raises(TypeError):
            layer(**wrong)
    with pytest.raises(TypeError):
        layer(x, x=x)


@pytest.mark.parametrize("kind", [nn.Linear, nn.Conv1d, nn.ConvTranspose1d])
def test_an_input_by_its_own_name_in_a_subclass_of_torchs_layer(kind: Any) -> None:
    linear = kind is nn.Linear

    class Own(kind):  # type: ignore[misc]
        def forward(self, signal: Tensor) -> Tensor:
            return super().forward(signal)

    cw.register(Own, like=kind)
    layer, x = Own(5, 3, **({} if linear else {"kernel_size": 2})), randn(4, 5, 7, dtype=F32)
    x = x[..., 0] if linear else x
    expected = layer(signal=x).detach()
    cw.convert(layer, damping=0.2)
    assert [*inspect.signature(layer.forward).parameters] == ["signal"]
    named, placed = layer(signal=x), layer(x)
    assert_close("y", named.detach(), expected, TOLERANCE[F32])
    grads = [torch.autograd.grad(y.square().sum(), [layer.weight])[0] for y in (named, placed)]
    assert_identical("dw", grads[0], grads[1])
    plain = torch.autograd.grad(cw.revert(layer)(x).square().sum(), [layer.weight])[0]
    assert not torch.allclose(grads[0], plain)
    cw.convert(layer)
    for wrong in ({"input": x}, {"signal": x, "output_size": [9]}, {}):
        with pytest.raises(TypeError, match="takes its input 'signal' alone"):
            layer(**wrong)


def test_a_transposed_convolutions_output_size_in_a_subclass() -> None:
    class Own(nn.ConvTranspose1d):
        def forward(self, signal: Tensor, output_size: list[int] | None = None) -> Tensor:
            return super().forward(signal, output_size)

    cw.register(Own, like=nn.ConvTranspose1d)
    layer, x = cw.convert(Own(5, 3, 2, stride=2)), randn(4, 5, 7, dtype=F32)
    for y in (layer(x, [15]), layer(signal=x, output_size=[15]), layer(x, output_size=[15])):
        assert y.shape == (4, 3, 15)


def test_a_forward_of_any_arguments_in_a_subclass() -> None:
    class Any1(nn.Linear):
        def forward(self, *args: Any, **named: Any) -> Tensor:
            return super().forward(*args, **named)

    class Any2(nn.ConvTranspose1d):
        def forward(self, *args: Any, **named: Any) -> Tensor:
            return super().forward(*args, **named)

    class Size(nn.ConvTranspose1d):
        def forward(self, x: Tensor, size: list[int] | None = None) -> Tensor:
            return super().forward(x, size)

    for own, like in ((Any1, nn.Linear), (Any2, nn.ConvTranspose1d), (Size, nn.ConvTranspose1d)):
        cw.register(own, like=like)
    linear, x = Any1(5, 3), randn(4, 5, dtype=F32)
    expected = linear(x).detach()
    cw.convert(linear)
    for y in (linear(x), linear(input=x)):
        assert_close("y", y.detach(), expected, TOLERANCE[F32])
    x = randn(4, 5, 7, dtype=F32)
    anything, sized = (cw.convert(own(5, 3, 2, stride=2)) for own in (Any2, Size))
    for y in (anything(x, [15]), anything(x, output_size=[15]), sized(x, [15]), sized(x=x, size=[15])):
        assert y.shape == (4, 3, 15)
    with pytest.raises(TypeError, match="takes its input 'x' and 'size' alone"):
        sized(x, output_size=[15])


def added_names(like: Any) -> set[str]:
    """All that `convert` adds to a class of a user's or its instance, and torch's layer has not."""
    made = {"bias": True}

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(*WEIGHTS[like]))

        def forward(self, x: Tensor) -> Tensor:
            return x

    class Sub(like):  # type: ignore[misc]
        pass

    cw.register(Own, like=like)
    sub = Sub(*WEIGHTS[like][:2]) if len(WEIGHTS[like]) == 2 else Sub(*WEIGHTS[like][:3], **made)
    names: set[str] = set()
    for module, plain in ((Own(), Own), (sub, Sub)):
        before = {*module.__dict__}
        cw.convert(module, damping=0.2)
        assert isinstance(module, EmendedModule)
        names |= module.__dict__.keys() - before
        names |= {name for cls in type(module).__mro__ if cls not in plain.__mro__ for name in cls.__dict__}
    of_torch = {"qconfig", *DEFAULTS[like], *(name for name in names if hasattr(like, name))}
    return {name for name in names if not (name.startswith("__") and name.endswith("__"))} - of_torch


WEIGHTS: dict[Any, tuple[int, ...]] = {
    nn.Linear: (5, 3),
    nn.Embedding: (5, 3),
    nn.Conv1d: (4, 2, 2),
    nn.ConvTranspose2d: (4, 2, 2, 2),
}


@pytest.mark.parametrize("like", WEIGHTS)
def test_every_name_that_an_emended_layer_adds_is_refused(like: Any) -> None:
    names = added_names(like)
    assert {"options", "damping", "recorder", "_emended_serial", "_emended_form", "_emended_plain"} <= names
    for name in names:
        own = type("Own", (like,), {name: 0.5})
        layer = own(*WEIGHTS[like][:2]) if len(WEIGHTS[like]) == 2 else own(*WEIGHTS[like][:3])
        assert hidden_name(layer, like) == name


@pytest.mark.parametrize("name", ["serial", "form", "plain_class", "_state"])
def test_names_of_a_users_own_stay(name: str) -> None:
    class Own(nn.Linear):
        pass

    setattr(Own, name, lambda self: 1)
    shown = getattr(Own, name)
    Own.extra_repr = lambda self: str(shown(self))  # type: ignore[method-assign]
    layer, instance, buffer = Own(5, 3), nn.Linear(5, 3), nn.Linear(5, 3)
    setattr(instance, name, 7)
    buffer.register_buffer(name, torch.tensor(7))
    model = cw.convert(nn.Sequential(layer, instance, buffer))
    for again in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(nn.Sequential(*model[1:])))):
        assert all(isinstance(one, EmendedModule) for one in again)
        assert [int(getattr(one, name)) for one in again[-2:]] == [7, 7]
    assert getattr(layer, name)() == 1
    assert repr(layer).startswith("Own(1")
    cw.revert(model)
    assert getattr(instance, name) == 7
    assert int(getattr(buffer, name)) == int(buffer.state_dict()[name]) == 7


def test_a_module_in_the_place_of_a_convolutions_setting() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.padding = nn.ConstantPad1d(1, 0.0)
            self.weight = nn.Parameter(randn(3, 2, 2))

        def forward(self, x: Tensor) -> Tensor:
            return F.conv1d(self.padding(x), self.weight)

    cw.register(Own, like=nn.Conv1d)
    with pytest.warns(UserWarning, match="its padding is a parameter, buffer or module, where Conv1d has a plain"):
        layer = cw.convert(Own())
    assert layer(randn(1, 2, 4)).shape == (1, 3, 5)


@pytest.mark.parametrize("where", ["instance", "class", "buffer"])
@pytest.mark.parametrize("name", ["scale", "options", "samples"])
def test_an_attribute_that_a_converted_layer_would_hide(name: str, where: str) -> None:
    """It would be one of the layer's own, and code that reads it would read another value."""

    class Scaled(nn.Linear):
        pass

    if where == "class":
        setattr(Scaled, name, 0.5)
    layer = Scaled(5, 3)
    if where == "instance":
        setattr(layer, name, 0.5)
    if where == "buffer":
        layer.register_buffer(name, torch.tensor(0.5))
    with pytest.warns(UserWarning, match=f"it has an attribute {name!r}, which an emended layer has too"):
        cw.convert(layer)
    assert type(layer) is Scaled
    assert float(getattr(layer, name)) == 0.5
