"""Classes that are not torch's own: subclasses, registered ones, transformers' `Conv1D`, and those made at run time."""

from __future__ import annotations

import copy
import pickle
import sys
import types
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import F64, TOLERANCE, assert_close, assert_identical, oracle, randn
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

import consequentialism as cw
from consequentialism.nn.module import EmendedModule


class Labelled(nn.Linear):
    """A subclass that leaves forward alone and takes other arguments."""

    def __init__(self, size: int, label: str) -> None:
        super().__init__(size, 3)
        self.label = label


class Own(nn.Module):
    """A linear layer of a user's own, with names and a layout of his own."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.kernel = nn.Parameter(randn(inputs, outputs))
        self.offset = nn.Parameter(randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.kernel + self.offset


class Doubled(Own):
    """A subclass with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class OwnConv(nn.Module):
    """A convolution without bias, stride or any other attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(randn(3, 4, 2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.conv1d(x, self.weight)


@pytest.fixture
def registered() -> None:
    cw.register(Own, like=nn.Linear, weight="kernel", bias="offset", transposed=True)
    cw.register(OwnConv, like=nn.Conv1d)


@pytest.fixture
def conv1d(monkeypatch: pytest.MonkeyPatch) -> type[nn.Module]:
    """A class as transformers' `Conv1D`, under its name."""
    module = types.ModuleType("transformers.pytorch_utils")

    class Conv1D(nn.Module):
        def __init__(self, nf: int, nx: int) -> None:
            super().__init__()
            self.nf, self.nx = nf, nx
            self.weight = nn.Parameter(randn(nx, nf))
            self.bias = nn.Parameter(randn(nf, seed=1))

        def forward(self, x: Tensor) -> Tensor:
            size = (*x.size()[:-1], self.nf)
            return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(size)

    Conv1D.__module__, Conv1D.__qualname__ = module.__name__, "Conv1D"
    module.Conv1D = Conv1D  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return Conv1D


def quietly(call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return call(*arguments, **options)


def assert_linear(layer: nn.Module, weight: str, bias: str, transposed: bool) -> None:
    """The layer has an oracle's gradients after convert, and torch's own after revert."""
    kind, keys = type(layer), set(layer.__dict__)
    x, dy = randn(2, 4, 5), randn(2, 4, 3, seed=1)
    before = layer(x)
    assert quietly(cw.convert, layer, damping=0.2) is layer
    assert isinstance(layer, EmendedModule)
    assert isinstance(layer, kind)
    y = layer(x)
    assert_close("y", y, before, TOLERANCE[F64])
    y.backward(dy)
    expected = oracle(x.reshape(-1, 5), dy.reshape(-1, 3), damping=0.2)
    dw = layer.get_parameter(weight).grad
    assert_close("dw", dw.t() if transposed else dw, expected[0], TOLERANCE[F64])
    assert_close("db", layer.get_parameter(bias).grad, expected[1], TOLERANCE[F64])
    groups = cw.param_groups(layer, lr=1.0, other={})
    assert [len(group["params"]) for group in groups] == [2]
    copied = copy.deepcopy(layer)
    assert type(copied) is type(layer)
    assert_identical("y of a copy", copied(x), layer(x))
    assert type(cw.revert(layer)) is kind
    assert set(layer.__dict__) == keys


def test_a_subclass_that_leaves_forward_alone_is_taken() -> None:
    layer = Labelled(5, "a").double()
    assert_linear(layer, "weight", "bias", False)
    loaded = pickle.loads(pickle.dumps(quietly(cw.convert, layer, damping=0.3)))
    assert (type(loaded), loaded.damping, loaded.label) == (type(layer), 0.3, "a")


def test_linear_of_timm_by_its_name() -> None:
    class Linear(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            if torch.jit.is_scripting():
                return F.linear(input, self.weight.to(input.dtype), self.bias)
            return F.linear(input, self.weight, self.bias)

    unknown = nn.Sequential(Linear(4, 3, dtype=F64))
    with pytest.warns(UserWarning, match="a subclass of Linear with code of its own"):
        cw.convert(unknown)
    Linear.__module__, Linear.__qualname__ = "timm.layers.linear", "Linear"
    model = cw.convert(nn.Sequential(Linear(4, 3, dtype=F64)))
    assert isinstance(model[0], Linear)
    x, dy = randn(6, 4, dtype=F64), randn(6, 3, seed=1, dtype=F64)
    model(x).backward(dy)
    assert_close("dw", model[0].weight.grad, oracle(x, dy)[0], TOLERANCE[F64])


def test_conv1d_of_transformers_is_a_linear_layer(conv1d: type[nn.Module]) -> None:
    assert_linear(conv1d(3, 5), "weight", "bias", True)


@pytest.mark.usefixtures("registered")
def test_a_registered_class() -> None:
    assert_linear(Own(5, 3), "kernel", "offset", True)


@pytest.mark.usefixtures("registered")
def test_a_registered_convolution_without_attributes() -> None:
    layer, plain = OwnConv(), cw.Conv1d(4, 3, 2, bias=False, dtype=F64)
    plain.load_state_dict(layer.state_dict())
    x = randn(2, 4, 6)
    for one in (quietly(cw.convert, layer), plain):
        one(x).square().sum().backward()
    assert_identical("dw", layer.weight.grad, plain.weight.grad)


@pytest.mark.usefixtures("registered")
def test_a_subclass_with_a_forward_of_its_own_is_left_alone() -> None:
    with pytest.warns(UserWarning, match="Doubled is a subclass of Own with code of its own"):
        assert type(cw.convert(Doubled(5, 3))) is Doubled


@pytest.mark.parametrize(
    ("arguments", "options", "error", "word"),
    [
        ((5,), {"like": nn.Linear}, TypeError, "cls must be a subclass"),
        ((cw.Linear,), {"like": nn.Linear}, TypeError, "cls must not be an emended class"),
        ((Own,), {"like": nn.Bilinear}, ValueError, "like must be one of"),
        ((Own,), {"like": nn.Linear, "weight": 1}, TypeError, "weight must be the name"),
        ((Own,), {"like": nn.Linear, "transposed": 1}, TypeError, "transposed must be True or False"),
        ((Own,), {"like": nn.Conv1d, "transposed": True}, ValueError, "transposed must be False"),
    ],
    ids=str,
)
def test_bad_arguments_of_register(arguments: Any, options: Any, error: type[Exception], word: str) -> None:
    with pytest.raises(error, match=word):
        cw.register(*arguments, **options)


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


def parametrised(layer: nn.Module) -> nn.Module:
    parametrize.register_parametrization(layer, "weight", Halved())
    return layer


def at_run_time(layer: nn.Module) -> nn.Module:
    layer.__class__ = type("Tagged", (type(layer),), {"tag": "kept"})
    return layer


LAYERS = [lambda: nn.Linear(5, 3), lambda: nn.Conv2d(2, 3, 2), lambda: nn.Embedding(5, 3), lambda: Labelled(5, "a")]


@pytest.mark.parametrize("make", LAYERS)
@pytest.mark.parametrize("change", [parametrised, at_run_time])
def test_classes_made_at_run_time(change: Callable[[nn.Module], nn.Module], make: Callable[[], nn.Module]) -> None:
    kind = type(make())
    layer = change(quietly(cw.convert, make(), damping=0.3, scale="raw"))
    model = nn.Sequential(layer)
    quietly(cw.convert, model, damping=5.0)
    assert (layer.damping, layer.scale) == (5.0, "raw")
    assert [len(group["params"]) for group in cw.param_groups(model, lr=1.0, other={})] == [len([*layer.parameters()])]
    named = type(layer).__name__
    cw.revert(model)
    assert not isinstance(layer, EmendedModule)
    assert isinstance(layer, kind)
    assert type(layer).__name__ == named
    if change is parametrised:
        parametrize.remove_parametrizations(layer, "weight")
        assert type(layer) is kind
    else:
        assert layer.tag == "kept"


class Louder(cw.Linear):
    """Code that needs an emended layer."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_revert_refuses_before_anything_is_changed() -> None:
    model = nn.Sequential(cw.Linear(5, 5), Louder(5, 5), cw.Linear(5, 5))
    kinds = [type(layer) for layer in model]
    with pytest.raises(TypeError, match=r"revert cannot give .*Louder"):
        cw.revert(model)
    assert [type(layer) for layer in model] == kinds
    assert model[0].damping == 1.0


@pytest.mark.usefixtures("one_process")
def test_a_sharded_layer() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    layer = quietly(cw.convert, nn.Linear(5, 3), damping=0.3)
    fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))
    quietly(cw.convert, layer, damping=5.0)
    assert layer.damping == 5.0
    assert [len(group["params"]) for group in cw.param_groups(layer, lr=1.0, other={})] == [2]
    cw.revert(layer)
    assert isinstance(layer, FSDPModule)
    assert not isinstance(layer, EmendedModule)
    layer(torch.randn(4, 5)).sum().backward()


class Parent(nn.Module):
    """A model with a matrix of its own, as a VisionTransformer has."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.zeros(1, 4, 5))
        self.head = nn.Linear(5, 3)


def test_a_bare_parameter_is_named_as_such() -> None:
    with pytest.warns(UserWarning, match="left alone inner.position: a parameter of Parent itself"):
        cw.convert(nn.ModuleDict({"inner": Parent()}))


def test_a_convert_that_converts_nothing_says_so() -> None:
    for model in (nn.ReLU(), nn.Sequential(nn.LayerNorm(4))):
        with pytest.warns(UserWarning, match="converted nothing"):
            cw.convert(model)
    with pytest.warns(UserWarning, match="converted nothing"):
        cw.convert(nn.Linear(5, 3), filter_fn=lambda module, name: False)


def test_a_parameter_of_another_name_beside_one_of_the_usual_name_is_refused() -> None:
    class Kernel(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return F.linear(input, self.kernel, self.bias)

    class Property(nn.Module):
        @property
        def weight(self) -> Tensor:
            return self.kernel.t()

    for cls in (Kernel, Property):
        with pytest.raises(ValueError, match="weight must be 'weight' where cls has"):
            cw.register(cls, like=nn.Linear, weight="kernel")
