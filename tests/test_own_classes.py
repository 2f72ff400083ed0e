"""Classes of a user's own after `convert`: their names, flags, copies and pickles stay what they were."""

from __future__ import annotations

import copy
import inspect
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import F32, F64, TOLERANCE, assert_close, assert_identical, oracle, randn
from torch import Tensor, nn
from torch.nn import functional as F

import consequentialism as cw
from consequentialism.nn.module import EmendedModule


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


class Locked(nn.Linear):
    """Copied and pickled without its lock, and without its cache."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.lock: Any = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.lock = threading.Lock()


class Packed(nn.Linear):
    """Its state is no dictionary."""

    def __getstate__(self) -> tuple[int, int, Tensor, Tensor]:  # type: ignore[override]
        return self.in_features, self.out_features, self.weight.detach(), self.bias.detach()

    def __setstate__(self, state: Any) -> None:
        self.__init__(*state[:2])  # type: ignore[misc]
        self.weight, self.bias = nn.Parameter(state[2]), nn.Parameter(state[3])


class Copied(nn.Linear):
    """Copies itself by its constructor."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Copied:
        copied = Copied(self.in_features, self.out_features)
        copied.load_state_dict(self.state_dict())
        memo[id(self)] = copied
        return copied


class Shared(nn.Linear):
    """Is its own copy."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Shared:
        return self


def pickled(module: Any) -> Any:
    return pickle.loads(pickle.dumps(module))


@pytest.mark.parametrize(
    ("kind", "again"),
    [
        (Locked, pickled),
        (Locked, copy.deepcopy),
        (Locked, copy.copy),
        (Packed, pickled),
        (Packed, copy.deepcopy),
        (Copied, pickled),
        (Copied, copy.deepcopy),
        (Shared, copy.deepcopy),
    ],
)
def test_copies_as_the_class_makes_them_are_emended(kind: Any, again: Callable[[Any], Any]) -> None:
    model = cw.convert(nn.Sequential(kind(5, 3)), damping=0.2)
    x, dy = randn(4, 5, dtype=F32), randn(4, 3, seed=2, dtype=F32)
    made = again(model)
    layer, other = model[0], made[0]
    assert type(other) is type(layer)
    assert (other.damping, other.qualified_name) == (0.2, "0")
    if kind is Locked and again is not copy.copy:
        assert other.lock is not layer.lock
    if kind is not Shared and again is not copy.copy:
        assert other.serial != layer.serial
        assert other.weight is not layer.weight
    grads = [torch.autograd.grad(one(x), [one.weight], dy)[0] for one in (layer, other)]
    assert_identical("dw", grads[1], grads[0])
    assert_close("dw", grads[0], oracle(x.double(), dy.double(), damping=0.2)[0].float(), TOLERANCE[F32])
    assert type(cw.revert(made)[0]) is kind
