"""Classes of a user's own after `convert`: their copies and pickles are what the class makes them, and emended."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import F32, TOLERANCE, assert_close, assert_identical, oracle, randn
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel

import consequentialism as cw
from consequentialism.nn.module import EmendedModule
from consequentialism.solve.distributed import SavedGroup


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
    """A class that reduces to its own type and a state, whatever the protocol."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        state = {name: value for name, value in self.__dict__.items() if name != "lock"}
        return type(self), (self.in_features, self.out_features), state


class FromSuper(nn.Linear):
    """A class that reduces by what Python gives."""

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
    """A class whose state is updated by a method of a class beside the emended one."""


class BegunAnew(cw.Linear):
    """A class that is rebuilt by its constructor, with other options."""

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
    """A class that is rebuilt by a function that writes a state into its attributes."""

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


class Sized(nn.Linear):
    """Its ``__new__`` has to be told something."""

    def __new__(cls, size: int) -> Any:
        made = super().__new__(cls)
        made.__dict__["size"] = size
        return made

    def __init__(self, size: int) -> None:
        super().__init__(size, size)

    def __getnewargs__(self) -> tuple[int]:
        return (self.__dict__["size"],)


class SizedByName(nn.Linear):
    def __new__(cls, *, size: int) -> Any:
        made = super().__new__(cls)
        made.__dict__["size"] = size
        return made

    def __init__(self, *, size: int) -> None:
        super().__init__(size, size)

    def __getnewargs_ex__(self) -> tuple[tuple[()], dict[str, int]]:
        return (), {"size": self.__dict__["size"]}


@pytest.mark.parametrize("kind", [Sized, SizedByName])
@pytest.mark.parametrize("again", [pickled, copy.deepcopy, copy.copy, saved_and_loaded])
def test_a_class_whose_new_takes_arguments(kind: Any, again: Callable[[Any], Any]) -> None:
    layer = cw.convert(kind(size=4), damping=0.2)
    other = again(layer)
    assert type(other) is type(layer)
    assert (other.damping, other.size) == (0.2, 4)
    assert_identical("weight", other.weight, layer.weight)


class StateOfItsNames(nn.Linear):
    """A key of its state has a name that an emended layer has for itself."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.mine = ("theirs",)

    def __getstate__(self) -> dict[str, Any]:
        return {"options": self.mine, "process_group": "theirs", "qualified_name": "theirs", "rest": self.state_dict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(5, 3)  # type: ignore[misc]
        self.mine = state["options"]
        assert (state["process_group"], state["qualified_name"]) == ("theirs", "theirs")
        self.load_state_dict(state["rest"])


class StateOfItsNamesOnEmended(cw.Linear):
    """So, and built on an emended layer."""

    mine = ("theirs",)

    def __getstate__(self) -> dict[str, Any]:
        return {"options": self.mine, "rest": super().__getstate__()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state["rest"])
        self.mine = state["options"]


class StateInReduce(nn.Linear):
    mine = ("theirs",)

    def __reduce__(self) -> Any:
        return type(self), (5, 3), {"options": self.mine, "rest": self.state_dict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.mine = state["options"]
        self.load_state_dict(state["rest"])


@pytest.mark.parametrize("kind", [StateOfItsNames, StateOfItsNamesOnEmended, StateInReduce])
@pytest.mark.parametrize("again", [pickled, copy.deepcopy, copy.copy, saved_and_loaded])
def test_a_state_with_names_of_an_emended_layers(kind: Any, again: Callable[[Any], Any]) -> None:
    layer = cw.convert(kind(5, 3), damping=0.2)
    layer.qualified_name = "0"
    other = again(layer)
    assert type(other) is type(layer)
    assert (other.damping, other.qualified_name, other.mine) == (0.2, "0", ("theirs",))
    assert_identical("weight", other.weight, layer.weight)


@pytest.mark.parametrize("kind", [nn.Linear, Locked])
def test_a_reverted_parametrised_layer_is_copied_as_a_plain_one(kind: Any) -> None:
    layer = cw.convert(kind(5, 3))
    layer.lock = None
    parametrize.register_parametrization(layer, "weight", nn.Tanh())
    copied = copy.deepcopy(cw.revert(layer))
    assert type(copied) is type(layer)
    assert not isinstance(copied, EmendedModule)
    assert_identical("weight", copied.weight, layer.weight)
    with pytest.raises(RuntimeError, match="only supported through state_dict"):
        pickle.dumps(layer)
