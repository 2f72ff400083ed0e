"""`EmendedModule`, the base of all emended layers, and `set_samples`, which speaks to all of a model."""

from __future__ import annotations

import copy
import functools
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar, Generic, TypeVar, cast, overload

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .. import _torch
from ..autograd import side_stream
from ..errors import shown
from ..functional import plain_path
from ..options import (
    OPTION_NAMES,
    DampingMode,
    LinearOptions,
    Options,
    Scale,
    Solver,
    check_option_names,
    check_samples,
)
from ..samples import count
from ..solve.distributed import Peers, SavedGroup
from .recorder import Recorder
from .watch import Watched, note_compiled

Value = TypeVar("Value")
_serials = itertools.count(1)


class Option(Generic[Value]):
    """One field of a layer's `options` as an attribute of the layer, which may be written between steps."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, layer: None, owner: type) -> Option[Value]: ...
    @overload
    def __get__(self, layer: EmendedModule, owner: type) -> Value: ...
    def __get__(self, layer: EmendedModule | None, owner: type) -> Option[Value] | Value:
        if layer is None:
            return self
        value: Value = getattr(layer.options, self.name)
        return value

    def __set__(self, layer: EmendedModule, value: Value) -> None:
        check_option_names([self.name], [*layer.option_names(), "samples"], type(layer).__name__)
        changed: Any = {self.name: value}
        layer.options = layer.options.changed(**changed)


class EmendedModule(nn.Module):
    """The base of emended layers: their options, checked once, and what they hold beside torch's own attributes.

    It stands before torch's own class, whose ``forward`` serves where nothing is to be emended; a subclass has
    `emended_forward`.
    """

    OPTIONS: ClassVar[frozenset[str]] = LinearOptions.__optional_keys__  # their names, as far as the layer uses them

    options: Options = Options()  # the class's serves classes of `register` that are called anew
    damping = Option[float]()
    damping_mode = Option[DampingMode]()
    scale = Option[Scale]()
    backend = Option[str]()
    process_group = Option[Any]()
    patch_bytes = Option[int]()
    solver = Option[Solver]()
    iterations = Option[int]()
    samples = Option["int | Tensor | None"]()  # of this batch alone: neither copied nor saved

    qualified_name: str | None = None  # set by convert: where in the model the layer is
    _emended_serial: int = 0  # the place among all layers that this process has made
    recorder: Recorder | None = None  # set by `attach`, on this instance only
    watched: Watched | None = None  # set by convert, until the layer has run
    weight_name: ClassVar[str] = "weight"  # of the parameter; `register` may say others
    bias_name: ClassVar[str] = "bias"
    weight_transposed: ClassVar[bool] = False  # whether a linear layer's weight is [I, O]
    _emended_form: ClassVar[Any] = None  # the `registry.Form` of a class that `convert` made
    _emended_plain: ClassVar[type[nn.Module] | None] = None  # the class that `convert` made it of
    # Serves what is usual, without Python, and returns None for the rest; a compiler does not see through it.
    shortcut: ClassVar[Callable[[EmendedModule, Tensor], Tensor | None] | None] = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not _keeps_shortcut(cls):
            cls.shortcut = None
        _finish_setstate(cls)

    def forward(self, input: Tensor) -> Tensor:
        if not (torch.compiler.is_compiling() or _torch.is_traced_by_fx()):
            shortcut = None if side_stream.is_open() else type(self).shortcut
            y = None if shortcut is None else shortcut(self, input)
            if y is not None:
                return y
        if plain_path.is_plain(self, input):
            return plain_path.plain_forward(self, input, super().forward)
        self.note_run()
        if getattr(input, "is_nested", False):
            raise TypeError(
                f"{type(self).__name__}: input must be a dense tensor where a gradient is emended, got a nested one: "
                "give its rows as a tensor, input.values(), or call consequentialism.revert on this layer"
            )
        return self.emended_forward(input)

    def note_run(self) -> None:
        """Called by every forward that emends: the layer makes its own gradient."""
        if torch.compiler.is_compiling():
            note_compiled(self)
        elif self.watched is not None:
            self.watched.run_by(self)

    def emended_forward(self, input: Tensor) -> Tensor:
        """The output of torch's own forward, with emended gradients of weight and bias."""
        raise NotImplementedError

    def check_input(self, input: Any) -> None:
        """Raise in this package's words what torch's own forward has refused, where there are better words."""

    def weight_and_bias(self) -> tuple[Any, Any]:
        """What the layer computes with, by its names; a bias that is a flag, False, is none."""
        bias = getattr(self, self.bias_name, None)
        return getattr(self, self.weight_name), None if bias is False else bias

    def emended_parameters(self) -> Iterator[nn.Parameter]:
        """Weight and bias, or what they are computed from where they are parametrised."""
        parametrized = getattr(self, "parametrizations", {})
        for name in (self.weight_name, self.bias_name):
            parameter = self._parameters.get(name)
            if parameter is not None:
                yield parameter
            elif name in parametrized:
                yield from parametrized[name].parameters()
            else:  # as torch.nn.utils' pruning, weight_norm and spectral_norm name them
                own = (self._parameters.get(name + end) for end in ("_orig", "_g", "_v"))
                yield from (found for found in own if found is not None)

    @classmethod
    def option_names(cls) -> list[str]:
        """The options that a layer of this class uses, but for ``samples``, which are a batch's."""
        return [name for name in OPTION_NAMES if name in cls.OPTIONS]

    @classmethod
    def settings_from(cls, options: Mapping[str, Any]) -> Options:
        """The checked options of a constructor's keywords."""
        check_option_names(options, cls.option_names(), cls.__name__)
        return Options(**options)

    def set_options(self, options: Options) -> None:
        """Take over those of the checked options that the layer uses."""
        self.options = Options(**{name: getattr(options, name) for name in (*self.option_names(), "samples")})
        self.__dict__.setdefault(SERIAL, next(_serials))

    def attach(self, recorder: Recorder | None) -> None:
        """Let a recorder serve this layer's forward, or None."""
        self.__dict__.pop("recorder", None)
        if recorder is not None:
            self.recorder = recorder

    def options_now(self) -> Options:
        """The options of a forward: in eval mode without the process group, as SyncBatchNorm."""
        options = self.options
        if options.process_group is None:
            return options
        return options.changed(process_group=cast(Any, Peers(options.process_group, self)) if self.training else None)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        memo[id(self.options)] = self.options.changed(samples=None)  # its group cannot be copied: it is the same
        own = _method_below(self, "__deepcopy__")
        parametrized = parametrize.is_parametrized(self)  # whose class refuses to be pickled, and can be copied
        if own is not None:
            copied = own(memo)
        elif not parametrized and any(own_method(self, name) is not None for name in ("__reduce_ex__", "__reduce__")):
            copied = _copied_by(self.__reduce_ex__(4), self, memo)
        else:
            arguments, named = copy.deepcopy(new_arguments(self), memo)
            copied = memo[id(self)] = type(self).__new__(type(self), *arguments, **named)
            state = EmendedModule.__getstate__(self) if parametrized else self.__getstate__()
            copied.__setstate__(copy.deepcopy(state, memo))
            return copied
        if copied is not self:
            from .convert import emend_again  # which imports this module

            emend_again(copied, type(self), copy.deepcopy(saved_beside(self), memo))
        return copied

    def __getstate__(self) -> dict[str, Any]:
        """The state of the plain class, a dict, with everything that belongs to the emended layer under one key.

        In a class that is built on an emended one these attributes stand among the others, unless a name of theirs is
        already in its state, because such a class may write a state into its `__dict__`.
        """
        own = _method_below(self, "__getstate__")
        state, saved = self.__dict__ if own is None else own(), saved_beside(self)
        if not isinstance(state, dict):
            return {KEY: {**saved, "state": state}}
        rest = without_beside(state, self)
        return {**rest, **({KEY: saved} if self._emended_plain is not None or rest.keys() & saved.keys() else saved)}

    def __setstate__(self, state: Any) -> None:
        """Take a state. One without that key leaves the layer the options that it has."""
        state, saved = _divided(state) if isinstance(state, dict) else (state, {})
        beside = restored_beside(saved, self.options)
        self.__dict__.update(beside)
        super().__setstate__(saved.get("state", state))
        self.__dict__.update(beside)  # which a class that calls its constructor there has begun anew
        begin(self)

    def __prepare_scriptable__(self) -> EmendedModule:
        raise TypeError(plain_path.refusal(self, "torch.jit.script"))

    @property
    def qconfig(self) -> Any:
        """What ``torch.ao.quantization`` sets on every module of a model that it is given."""
        if "qconfig" not in self.__dict__:
            raise AttributeError("qconfig")
        return self.__dict__["qconfig"]

    @qconfig.setter
    def qconfig(self, value: Any) -> None:
        if value is not None:
            raise TypeError(plain_path.refusal(self, "torch.ao.quantization"))
        warnings.warn(
            plain_path.refusal(self, "torch.ao.quantization, which leaves alone what it is not told of,"), stacklevel=4
        )
        self.__dict__["qconfig"] = value

    @qconfig.deleter
    def qconfig(self) -> None:
        del self.__dict__["qconfig"]

    def extra_repr(self) -> str:
        own, default = self.options, Options()
        shown = (name for name in self.option_names() if name != "process_group")
        changed = [f"{name}={getattr(own, name)!r}" for name in shown if getattr(own, name) != getattr(default, name)]
        if self.recorder is not None and self.recorder.label:
            changed.append(self.recorder.label)
        return ", ".join([super().extra_repr(), *changed])


KEY = "_emended"  # of a state; and what names begin with that an emended layer's class has for itself
SERIAL = "_emended_serial"
BESIDE = ("options", "qualified_name", "recorder", "watched")  # what an instance has beside its plain class's
_SAVED = (*BESIDE, "process_group")
OURS = (*_SAVED, KEY, SERIAL)


def without_beside(state: dict[str, Any], layer: EmendedModule) -> dict[str, Any]:
    """A layer's attributes, or the state that its class makes of them, without what only the emended class has."""

    def is_ours(name: str, value: Any) -> bool:  # and not one that a class's own state calls so
        own = layer.__dict__.get(name)
        return value is own or (type(value) is type(own) and not isinstance(own, (str, int)))

    return {name: value for name, value in state.items() if name not in OURS or not is_ours(name, value)}


def new_arguments(layer: EmendedModule) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the ``__new__`` of a layer's class takes for a copy, as Python asks the class for it."""
    for name in ("__getnewargs_ex__", "__getnewargs__"):
        asked = own_method(layer, name)
        if asked is not None:
            return asked() if name.endswith("ex__") else (asked(), {})
    return (), {}


def saved_beside(layer: EmendedModule) -> dict[str, Any]:
    """What an instance has beside the attributes of its plain class, to be copied or pickled."""
    options = layer.options
    return {
        **{name: layer.__dict__[name] for name in BESIDE if name in layer.__dict__},
        "options": options.changed(process_group=None, samples=None),
        "process_group": SavedGroup(options.process_group),
    }


def restored_beside(saved: dict[str, Any], options: Options) -> dict[str, Any]:
    """The attributes of an instance, from what `saved_beside` gave or a part of it; ``options`` where it has none."""
    options = saved.get("options", options).changed(samples=None)
    if "process_group" in saved:
        options = options.changed(process_group=saved["process_group"].group)
    return {**{name: saved[name] for name in BESIDE if name in saved}, "options": options}


def _divided(state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A state without what `saved_beside` gave, and that: under its key, or among the rest where options are."""
    if KEY in state:
        return {name: value for name, value in state.items() if name != KEY}, state[KEY]
    if not isinstance(state.get("options"), Options):
        return {name: value for name, value in state.items() if name != SERIAL}, {}
    rest = {name: value for name, value in state.items() if name not in OURS}
    return rest, {name: state[name] for name in _SAVED if name in state}


def _finish_setstate(cls: type[EmendedModule]) -> None:
    """Have a class's ``__setstate__`` that stands before this package's leave what was saved where it belongs."""
    above = cls.__mro__[: cls.__mro__.index(EmendedModule)]
    holder = next((base for base in above if "__setstate__" in base.__dict__), None)
    if holder is None or hasattr(holder.__dict__["__setstate__"], OWN_SETSTATE):
        return
    own = holder.__dict__["__setstate__"]

    @functools.wraps(own)
    def __setstate__(self: EmendedModule, state: Any) -> None:
        rest, given = _divided(state) if isinstance(state, dict) else ({}, {})
        if isinstance(state, dict) and "state" not in given:
            state = {**restored_beside(given, self.options), **rest}
        own.__get__(self)(state)
        attributes = self.__dict__
        for name in rest.keys() & set(_SAVED):  # the class's own, which it may have written into its attributes
            if name in given and attributes.get(name) is rest[name]:
                attributes[name] = given[name]
        saved = {name: attributes[name] for name in _SAVED if name in attributes} | attributes.pop(KEY, {})
        attributes.pop("process_group", None)
        attributes.update(restored_beside(saved, self.options))
        begin(self)

    setattr(__setstate__, OWN_SETSTATE, own if holder is cls else None)
    cls.__setstate__ = __setstate__  # type: ignore[method-assign]


OWN_SETSTATE = "_emended_own"  # of that function: what the class itself has in its place, or None


def begin(layer: EmendedModule) -> None:
    """Called on a copy, or what was unpickled."""
    layer.__dict__[SERIAL] = next(_serials)
    if layer.watched is not None and not layer.watched.bound():  # a shallow copy is a replica
        layer.watched.bind(layer)


def own_method(layer: EmendedModule, name: str) -> Callable[..., Any] | None:
    """A method that the layer's class has from a user's, and not from torch, Python or this package; or None."""
    return _method_of(type(layer).__mro__, layer, name)


def _method_below(layer: EmendedModule, name: str) -> Callable[..., Any] | None:
    """The `own_method` that ``super()`` finds in `EmendedModule`; None without one."""
    order = type(layer).__mro__
    return _method_of(order[order.index(EmendedModule) + 1 :], layer, name)


def _method_of(classes: Iterable[type], layer: EmendedModule, name: str) -> Callable[..., Any] | None:
    for cls in classes:
        made = cls.__dict__.get("_emended_plain") is not None  # by `convert`
        if name in cls.__dict__ and not made and cls not in (EmendedModule, nn.Module, object):
            return cast(Callable[..., Any], cls.__dict__[name].__get__(layer))
    return None


def _copied_by(reduced: Any, layer: EmendedModule, memo: dict[int, Any]) -> Any:
    """What `copy.deepcopy` makes of the value of ``__reduce_ex__``."""
    if isinstance(reduced, str):  # the name of a constant
        return layer
    make, arguments, *rest = reduced
    copied = memo[id(layer)] = make(*(copy.deepcopy(argument, memo) for argument in arguments))
    if rest and rest[0] is not None:
        copied.__setstate__(copy.deepcopy(rest[0], memo))
    return copied


def hidden_name(module: nn.Module, like: type[nn.Module]) -> str | None:
    """An attribute of a plain module, or of its class, that an emended layer has for itself; None without one.

    Args:
        like: The class of torch that is known to have none.
    """
    instance = {*module.__dict__, *module._parameters, *module._buffers, *module._modules}
    known = {base for cls in (like, nn.Module) for base in cls.__mro__}
    own = instance.union(*(cls.__dict__ for cls in type(module).__mro__ if cls not in known))
    return next((name for name in sorted(own) if name in _NAMES or name.startswith(KEY)), None)


# Those of methods that torch has too are no concern.
_NAMES = {name for name in EmendedModule.__dict__ if not name.startswith("__") and not hasattr(nn.Module, name)}
_NAMES -= {"qconfig"}  # of torch.ao, which sets it on plain layers


def _keeps_shortcut(cls: type[EmendedModule]) -> bool:
    """Whether a class forwards as the one that named its shortcut does, and finds weight and bias where it looks."""
    named = next(base for base in cls.__mro__ if "shortcut" in base.__dict__)
    own: Any = cls  # whose attributes a type checker would call methods
    methods = ("emended_forward", "options_now", "note_run", "weight_and_bias")
    return (
        all(getattr(own, name) is getattr(named, name) for name in methods)
        and own.__getattr__ is nn.Module.__getattr__
        and own.__getattribute__ is nn.Module.__getattribute__
        and not hasattr(cls, cls.weight_name)
        and not hasattr(cls, cls.bias_name)
    )


def set_samples(model: nn.Module, samples: int | Tensor | None) -> None:
    """Tell all emended layers of ``model`` how many samples the loss divides by, until it is called again.

    ``scale="nlms"`` multiplies a gradient by the number of samples, because a mean-reduced loss has divided by it. By
    default this number is the rows of linear and embedding layers (all leading dimensions, rows of zeros included) and
    the batch size of convolutions. Where the loss divides by another number, such as the tokens that are not padding,
    the labels that are not ignored, or the sequences, call this before forward:

        cw.set_samples(model, labels != -100)

    Do not change it until backward has ended, because checkpointing runs forward again there. It is not saved in
    ``state_dict``, copies or pickles. ``scale="raw"`` and ``"gradient"`` do not count samples, nor does
    `optim.Emended`: a model without emended layers is warned of.

    Args:
        model: Any module, also a single layer.
        samples: An integer of at least 0; a 0-dimensional tensor; a mask, whose sum is taken; or None for the default.
            The host does not read a tensor. With 0 samples the gradient is zero. With ``process_group=`` it is the
            number of this rank's batch, and the ranks' numbers are summed.

    Raises:
        TypeError: ``model`` is not a module, or ``samples`` has another type.
        ValueError: A number below 0.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {shown(model)}")
    if samples is not None:
        check_samples(samples)
    layers = [layer for layer in model.modules() if isinstance(layer, EmendedModule)]
    if not layers and samples is not None:
        warnings.warn(
            "consequentialism.set_samples: the model has no emended layer, and nothing else counts samples",
            UserWarning,
            stacklevel=2,
        )
    counts: dict[torch.device, Tensor] = {}  # a tensor, so that torch.compile does not compile for each number
    for layer in layers:
        if samples is None:
            layer.samples = None
            continue
        device = samples.device if isinstance(samples, Tensor) else next(layer.parameters()).device
        if device not in counts:
            counts[device] = count(samples, device)
        layer.samples = counts[device]
