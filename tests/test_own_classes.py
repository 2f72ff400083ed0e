"""Classes of a user's own after `convert`: their names, flags, copies and pickles stay what they were."""

from __future__ import annotations

import copy
import functools
import inspect
import io
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import F32, F64, TOLERANCE, assert_close, assert_identical, oracle, randn
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel

import consequentialism as cw
from consequentialism.nn.module import EmendedModule, hidden_name
from consequentialism.nn.registry import DEFAULTS
from consequentialism.solve.distributed import SavedGroup


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
    for again in (model, copy.deepcopy(model), pickled(nn.Sequential(model[1], model[2]))):
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


def made_of(cls: Any, inputs: int, outputs: int, state: dict[str, Tensor]) -> Any:
    layer = cls(inputs, outputs)
    layer.load_state_dict(state)
    return layer


class Reduced(nn.Linear):
    """Pickled and copied by a function of its module's, with its class's name."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.lock = threading.Lock()

    def __reduce__(self) -> Any:
        return made_of, (Reduced, self.in_features, self.out_features, self.state_dict())


class ReducedByType(Reduced):
    """By its own type and a state, whatever the protocol."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        state = {name: value for name, value in self.__dict__.items() if name != "lock"}
        return type(self), (self.in_features, self.out_features), state


class FromSuper(nn.Linear):
    """By what Python gives."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return super().__reduce_ex__(protocol)


class Inherited(Copied):
    """Its copy is a `Copied`."""


class OfEmended(cw.Linear):
    """Built on an emended layer, without its lock in its state."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.lock: Any = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        state = dict(super().__getstate__())
        del state["lock"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.lock = threading.Lock()


class AttributesOfEmended(OfEmended):
    """Its state is all attributes but the lock, those of emended layers among them."""

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "lock"}


class ReducedEmended(cw.Linear):
    """Its damping and its weights are all that it is made of."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, damping=0.2)
        self.lock = threading.Lock()

    def __reduce__(self) -> Any:
        return made_of, (type(self), self.in_features, self.out_features, self.state_dict())


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
        (Reduced, pickled),
        (Reduced, copy.deepcopy),
        (Reduced, copy.copy),
        (ReducedByType, pickled),
        (ReducedByType, copy.deepcopy),
        (FromSuper, pickled),
        (FromSuper, copy.deepcopy),
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
        assert other._emended_serial != layer._emended_serial
        assert other.weight is not layer.weight
    grads = [torch.autograd.grad(one(x), [one.weight], dy)[0] for one in (layer, other)]
    assert_identical("dw", grads[1], grads[0])
    assert_close("dw", grads[0], oracle(x.double(), dy.double(), damping=0.2)[0].float(), TOLERANCE[F32])
    assert type(cw.revert(made)[0]) is kind


@pytest.mark.parametrize("kind", [OfEmended, AttributesOfEmended, ReducedEmended])
@pytest.mark.parametrize("again", [pickled, copy.deepcopy])
def test_copies_of_a_class_built_on_an_emended_one(kind: Any, again: Callable[[Any], Any]) -> None:
    layer = kind(5, 3)
    layer.damping = 0.2
    layer.samples = 3
    other = again(layer)
    assert type(other) is kind
    assert other.lock is not layer.lock
    assert (other.damping, other.samples) == (0.2, None)
    assert other._emended_serial != layer._emended_serial
    assert_identical("weight", other.weight, layer.weight)


class Updated(cw.Linear):
    """Writes its state into its attributes."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


class Updates:
    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


class UpdatedByMixin(Updates, cw.Linear):
    """By a method of a class beside the emended one."""


class BegunAnew(cw.Linear):
    """By way of its constructor, whose options are others."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(1, 1)  # type: ignore[misc]
        self.__dict__.update(state)


class UpdatedWithin(Updated):
    """Keeps the state of its base within one of its own."""

    def __getstate__(self) -> dict[str, Any]:
        return {"within": super().__getstate__()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state["within"])


class UpdatedAlone(cw.Linear):
    """Writes all of its attributes as they are."""

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


def saved_and_loaded(module: Any) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def averaged(module: Any) -> Any:
    return AveragedModel(module).module


@pytest.mark.parametrize("kind", [Updated, UpdatedByMixin, BegunAnew, UpdatedWithin, UpdatedAlone])
@pytest.mark.parametrize("again", [pickled, copy.deepcopy, copy.copy, saved_and_loaded, averaged])
def test_a_state_that_a_class_writes_into_its_attributes(kind: Any, again: Callable[[Any], Any]) -> None:
    layer = kind(5, 3, damping=0.2)
    layer.qualified_name, layer.samples = "0", 3
    other = again(layer)
    assert type(other) is kind
    assert (other.damping, other.samples, other.qualified_name) == (0.2, None, "0")
    assert other._emended_serial != layer._emended_serial
    assert not {"_emended", "process_group"} & other.__dict__.keys()
    assert_identical("weight", other.weight, layer.weight)
    layer.samples = None
    x, dy = randn(4, 5, dtype=F32), randn(4, 3, seed=2, dtype=F32)
    grads = [torch.autograd.grad(one(x), [one.weight], dy)[0] for one in (layer, other)]
    assert_identical("dw", grads[1], grads[0])


@pytest.mark.parametrize("kind", [Updated, UpdatedByMixin, BegunAnew, UpdatedWithin])
@pytest.mark.parametrize("again", [copy.deepcopy, copy.copy])
def test_the_process_group_goes_with_such_a_state(
    kind: Any, again: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, group = kind(5, 3, damping=0.2), object()
    options = copy.copy(layer.options)
    object.__setattr__(options, "process_group", group)  # none that the options would take
    monkeypatch.setattr(type(options), "__post_init__", lambda self: None)
    layer.options = options
    other = again(layer)
    assert other.process_group is group
    assert other.damping == 0.2


def test_options_that_a_class_sets_in_its_state_stay() -> None:
    class Damped(cw.Linear):
        def __setstate__(self, state: Any) -> None:
            self.__dict__.update(state)
            self.damping = 0.5

    assert copy.deepcopy(Damped(5, 3, damping=0.2)).damping == 0.5


def test_a_class_that_writes_its_state_is_reverted_with_its_own_method() -> None:
    plain = cw.revert(nn.Sequential(Updated(5, 3), UpdatedByMixin(5, 3)))
    assert type(plain[0]).__setstate__ is Updated.__setstate__.__wrapped__  # type: ignore[attr-defined]
    assert type(plain[1]).__setstate__ is Updates.__setstate__
    for layer, other in zip(plain, copy.deepcopy(plain), strict=True):
        assert not isinstance(other, EmendedModule)
        assert_identical("weight", other.weight, layer.weight)


def rebuilt(cls: Any, state: dict[str, Any]) -> Any:
    made = cls.__new__(cls)
    made.__dict__.update(state)
    return made


class Rebuilt(nn.Linear):
    """By a function that writes a state into its attributes."""

    def __reduce__(self) -> Any:
        return rebuilt, (type(self), self.__getstate__())


class CopiedByState(nn.Linear):
    """Copies itself so."""

    def __deepcopy__(self, memo: dict[int, Any]) -> CopiedByState:
        made: CopiedByState = rebuilt(type(self), copy.deepcopy(self.__getstate__(), memo))
        return made


class RebuiltEmended(cw.Linear):
    """So, and built on an emended layer."""

    def __reduce__(self) -> Any:
        return rebuilt, (type(self), self.__getstate__())


@pytest.mark.parametrize("kind", [Rebuilt, CopiedByState, RebuiltEmended])
@pytest.mark.parametrize("again", [copy.deepcopy, pickled])
def test_a_copy_that_holds_a_state_is_converted_again(kind: Any, again: Callable[[Any], Any]) -> None:
    model = nn.Sequential(kind(5, 3))
    made = again(cw.convert(model, damping=0.2))
    assert made[0].damping == 0.2
    assert "_emended" not in made[0].__dict__
    cw.revert(made)
    assert made[0].__dict__.keys() == nn.Linear(5, 3).__dict__.keys()
    cw.convert(made, damping=0.3)  # and warns of nothing
    assert made[0].damping == 0.3


def made_by(how: tuple[Any, ...], state: dict[str, Tensor]) -> Any:
    return made_of(*how, state)


def made_by_name(how: dict[str, Any], sizes: list[Any]) -> Any:
    assert sizes[0] is how["cls"]
    return made_of(how["cls"], *sizes[1:], how["state"])


class ReducedInTuple(nn.Linear):
    def __reduce__(self) -> Any:
        return made_by, ((type(self), self.in_features, self.out_features), self.state_dict())


class ReducedInDict(nn.Linear):
    def __reduce__(self) -> Any:
        return made_by_name, ({"cls": type(self), "state": self.state_dict()}, [type(self), 5, 3])


class ReducedByPartial(nn.Linear):
    def __reduce__(self) -> Any:
        return functools.partial(type(self), bias=True), (self.in_features, self.out_features), self.__dict__


class ReducedWithItself(nn.Linear):
    """Its state names its class, and holds a list that holds itself."""

    def __reduce__(self) -> Any:
        ring: list[Any] = []
        ring.append(ring)
        return type(self), (self.in_features, self.out_features), {**self.__dict__, "kind": type(self), "ring": ring}


@pytest.mark.parametrize("kind", [ReducedInTuple, ReducedInDict, ReducedByPartial, ReducedWithItself])
@pytest.mark.parametrize("again", [pickled, copy.deepcopy, saved_and_loaded])
def test_a_class_that_is_named_within_what_a_copy_is_made_of(kind: Any, again: Callable[[Any], Any]) -> None:
    layer = cw.convert(kind(5, 3), damping=0.2)
    other = again(layer)
    assert type(other) is type(layer)
    assert other.damping == 0.2
    assert_identical("weight", other.weight, layer.weight)
    assert type(cw.revert(other)) is kind


@pytest.mark.parametrize("kind", [Locked, Reduced])
def test_a_parametrised_layer_is_copied_with_its_parametrisation(kind: Any) -> None:
    layer = cw.convert(kind(5, 3), damping=0.2)
    layer.lock = None
    parametrize.register_parametrization(layer, "weight", nn.Tanh())
    copied = copy.deepcopy(layer)
    assert copied.damping == 0.2
    assert parametrize.is_parametrized(copied)
    assert_identical("weight", copied.weight, layer.weight)


def test_the_copy_that_an_inherited_method_makes_is_emended() -> None:
    model = cw.convert(nn.Sequential(Inherited(5, 3)), damping=0.2)
    copied = copy.deepcopy(model)
    layer = copied[0]
    assert isinstance(layer, EmendedModule)
    assert isinstance(layer, Copied)
    assert (layer.damping, layer.qualified_name) == (0.2, "0")
    assert type(cw.revert(copied)[0]) is Copied


def test_a_copy_that_cannot_be_emended_is_announced() -> None:
    class Other(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    class Own(nn.Linear):
        def __deepcopy__(self, memo: dict[int, Any]) -> Other:
            return Other(self.in_features, self.out_features)

    layer = cw.convert(Own(5, 3))
    with pytest.warns(UserWarning, match="converted nothing.*Other is a subclass of Linear with code of its own"):
        assert type(copy.deepcopy(layer)) is Other


def test_states_of_older_versions() -> None:
    """Options stood among the attributes, and the process group beside them."""
    layer = cw.Linear(5, 3, damping=0.2)
    attributes = {name: value for name, value in layer.__dict__.items() if name != "_emended_serial"}
    older = {**attributes, "process_group": SavedGroup(None), "qualified_name": "0"}
    loaded = cw.Linear.__new__(cw.Linear)
    loaded.__setstate__(older)
    assert (loaded.damping, loaded.qualified_name) == (0.2, "0")
    assert "process_group" not in loaded.__dict__
    assert_identical("weight", loaded.weight, layer.weight)
    del attributes["options"]
    loaded = cw.Linear.__new__(cw.Linear)
    loaded.__setstate__(attributes)
    assert loaded.options == cw.Options()


def test_a_shallow_copy_leaves_the_layer_watched() -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.inner = nn.Linear(5, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.first(x), self.inner.weight)

    model = cw.convert(Around())
    shallow = copy.copy(model.inner)
    del shallow
    with pytest.warns(UserWarning, match="the weights of inner got a gradient although the layers' own forward"):
        model(randn(4, 5, dtype=F32)).sum().backward()
