"""Which classes have an emended form: torch's own, subclasses that add nothing to forward, and those of `register`."""

from __future__ import annotations

import copy
import functools
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import nn
from torch.nn.utils import parametrize

from .conv import Conv1d, Conv2d, Conv3d
from .conv_transpose import ConvTranspose1d, ConvTranspose2d, ConvTranspose3d
from .embedding import Embedding
from .linear import Linear
from .module import KEY, OWN_SETSTATE, EmendedModule, new_arguments, own_method, saved_beside, without_beside

EMENDED: dict[type[nn.Module], type[EmendedModule]] = {
    nn.Linear: Linear,
    nn.Embedding: Embedding,
    nn.Conv1d: Conv1d,
    nn.Conv2d: Conv2d,
    nn.Conv3d: Conv3d,
    nn.ConvTranspose1d: ConvTranspose1d,
    nn.ConvTranspose2d: ConvTranspose2d,
    nn.ConvTranspose3d: ConvTranspose3d,
}
PLAIN: dict[type[nn.Module], type[nn.Module]] = {emended: plain for plain, emended in EMENDED.items()}

# What a layer's map needs beside its parameters, for classes that have no such attribute.
_CONV = {"dilation": 1, "groups": 1, "padding": 0, "padding_mode": "zeros", "stride": 1}
_TRANSPOSED = {**_CONV, "output_padding": 0}
DEFAULTS: dict[type[nn.Module], dict[str, Any]] = {
    nn.Linear: {},
    nn.Embedding: {
        "max_norm": None,
        "norm_type": 2.0,
        "padding_idx": None,
        "scale_grad_by_freq": False,
        "sparse": False,
    },
    nn.Conv1d: _CONV,
    nn.Conv2d: _CONV,
    nn.Conv3d: _CONV,
    nn.ConvTranspose1d: _TRANSPOSED,
    nn.ConvTranspose2d: _TRANSPOSED,
    nn.ConvTranspose3d: _TRANSPOSED,
}


class Form(NamedTuple):
    """Which map a class's forward computes, and with which of its parameters."""

    like: type[nn.Module]
    weight: str = "weight"
    bias: str = "bias"
    transposed: bool = False

    def dimensions(self) -> int:
        """The weight's number of dimensions."""
        convolutions: dict[type[nn.Module], int] = {
            nn.Conv1d: 3,
            nn.Conv2d: 4,
            nn.Conv3d: 5,
            nn.ConvTranspose1d: 3,
            nn.ConvTranspose2d: 4,
            nn.ConvTranspose3d: 5,
        }
        return convolutions.get(self.like, 2)

    def obstacle(self, module: nn.Module) -> str | None:
        """What a module says of itself that its map does not have; None where there is nothing."""
        held = {*module._parameters, *module._buffers, *module._modules} & DEFAULTS[self.like].keys()
        if held:
            return f"its {min(held)} is a parameter, buffer or module, where {self.like.__name__} has a plain value"
        mode = getattr(module, "padding_mode", "zeros")
        if "output_padding" in DEFAULTS[self.like] and mode != "zeros":
            return f"its padding_mode is {mode!r}, which transposed convolutions do not have"
        return None


_REGISTERED: dict[type[nn.Module], Form] = {}
# By name, for none of these packages is imported here. timm's class adds a branch for torch.jit.script.
_KNOWN = {
    "transformers.pytorch_utils.Conv1D": Form(nn.Linear, transposed=True),
    "transformers.modeling_utils.Conv1D": Form(nn.Linear, transposed=True),
    "timm.layers.linear.Linear": Form(nn.Linear),
    "timm.models.layers.linear.Linear": Form(nn.Linear),
}


def register(
    cls: type[nn.Module],
    *,
    like: type[nn.Module],
    weight: str = "weight",
    bias: str = "bias",
    transposed: bool = False,
) -> None:
    """Let `convert` emend a layer class of your own, whose forward computes what one of torch's layers computes.

    This is not checked: with the same input, weight and bias, ``cls.forward`` must return what ``like`` returns.
    `convert` then makes such modules instances of a subclass of ``cls`` in which the gradients of the two parameters
    are emended; `revert` makes them instances of ``cls`` again. Subclasses of ``cls`` are served too, unless they
    override forward. `transformers`' ``Conv1D`` and `timm`'s ``Linear`` are built in, and subclasses of torch's layers
    that do not override forward need no registration.

        cw.register(MyLinear, like=torch.nn.Linear, weight="kernel", transposed=True)

    Args:
        cls: A subclass of `torch.nn.Module` whose ``forward`` takes only the input.
        like: `torch.nn.Linear`, `torch.nn.Embedding`, or one of torch's convolutions and transposed convolutions.
            Attributes with that layer's names, such as ``stride`` and ``padding_idx``, are read where ``cls`` has them;
            torch's defaults hold for the others.
        weight: The name of the weight parameter.
        bias: The name of the bias parameter. A module may have no such attribute, or None.
        transposed: Whether a linear layer's weight is ``[I, O]``.

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: A ``like`` that has no emended form, ``transposed`` where ``like`` is not `torch.nn.Linear`, or a
            renamed parameter where ``cls`` also has an attribute of the usual name.
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f"cls must be a subclass of torch.nn.Module, got {cls!r} ({type(cls).__name__})")
    if issubclass(cls, EmendedModule):
        raise TypeError(f"cls must not be an emended class, got {cls!r}")
    if like not in EMENDED:
        allowed = ", ".join(f"torch.nn.{plain.__name__}" for plain in EMENDED)
        raise ValueError(f"like must be one of {allowed}, got {like!r}")
    for name, value in (("weight", weight), ("bias", bias)):
        if not isinstance(value, str):
            raise TypeError(f"{name} must be the name of a parameter, got {value!r} ({type(value).__name__})")
        if value != name and (issubclass(cls, like) or hasattr(cls, name)):
            raise ValueError(
                f"{name} must be {name!r} where cls has an attribute of that name already, got {value!r} for {cls!r}"
            )
    if not isinstance(transposed, bool):
        raise TypeError(f"transposed must be True or False, got {transposed!r} ({type(transposed).__name__})")
    if transposed and like is not nn.Linear:
        raise ValueError(f"transposed must be False where like is torch.nn.{like.__name__}, got True")
    _REGISTERED[cls] = Form(like, weight, bias, transposed)


def form_of(cls: type[nn.Module]) -> Form | None:
    """The form of a plain class, or None where its forward is none that is known."""
    for base in cls.__mro__:
        if not issubclass(base, nn.Module):
            continue
        form = _REGISTERED.get(base) or _KNOWN.get(f"{base.__module__}.{base.__qualname__}")
        if form is None and base in EMENDED:
            form = Form(base)
        if form is not None and _same_forward(cls, base):
            return form
    return None


def like_name(cls: type[nn.Module]) -> str | None:
    """The name of torch's own layer or the registered class that ``cls`` is a subclass of, or None."""
    return next((base.__name__ for base in cls.__mro__ if base in EMENDED or base in _REGISTERED), None)


def _same_forward(cls: type[nn.Module], base: type[nn.Module]) -> bool:
    """Whether ``cls`` computes what its base ``base`` does."""
    return all(getattr(cls, name, None) is getattr(base, name, None) for name in ("forward", "_conv_forward"))


def emended_class(cls: type[nn.Module], form: Form) -> type[EmendedModule]:
    """The class that takes the place of the plain ``cls``."""
    return EMENDED.get(cls) or _subclass(cls, form)  # type: ignore[arg-type]


@functools.cache
def _subclass(cls: type[nn.Module], form: Form) -> type[EmendedModule]:
    own = EMENDED[form.like]
    namespace: dict[str, Any] = {
        "__doc__": cls.__doc__,
        "__init__": cls.__init__,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__reduce_ex__": _reduce,
        "_emended_plain": cls,
        "_emended_form": form,
        "weight_name": form.weight,
        "bias_name": form.bias,
        "weight_transposed": form.transposed,
    }
    if issubclass(cls, form.like):
        bases: tuple[type, ...] = (own, cls)
        if _names(cls, own) != list(inspect.signature(own.forward).parameters)[1:]:
            namespace["forward"] = _forward_of(cls, own)
    else:
        bases = (EmendedModule, cls)
        borrowed = {name: getattr(own, name) for name in ("emended_forward", "check_input", "shortcut")}
        defaults = {name: value for name, value in DEFAULTS[form.like].items() if not hasattr(cls, name)}
        namespace.update(borrowed, **defaults)
        namespace["forward"] = _forward_of(cls, EmendedModule)
    return type(cls)(cls.__name__, bases, namespace)  # type: ignore[misc, no-any-return]


def _names(cls: type[nn.Module], own: type[EmendedModule]) -> list[str]:
    """What callers of ``cls.forward`` may name of that which ``own.forward`` takes; its names for ``*args``."""
    parameters = list(inspect.signature(cls.forward).parameters.values())[1:]
    ours = list(inspect.signature(own.forward).parameters)[1:]
    theirs = [each.name for each in parameters if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)]
    open_ended = len(theirs) < max(len(parameters), 1)
    return [*theirs, *(ours[len(theirs) :] if open_ended else [])][: len(ours)]


def _forward_of(cls: type[nn.Module], own: type[EmendedModule]) -> Callable[..., Any]:
    """The forward of ``own`` for callers of ``cls.forward``, who may name what it takes as that does."""
    names = _names(cls, own)

    @functools.wraps(cls.forward)
    def forward(self: EmendedModule, *inputs: Any, **named: Any) -> Any:
        given = dict(zip(names, inputs, strict=False)) | named
        if len(inputs) + len(named) != len(given) or not {names[0]} <= given.keys() <= set(names):
            taken = " and ".join(map(repr, names))
            raise TypeError(
                f"forward of a registered {cls.__name__} takes its input {taken} alone, got {len(inputs)} positional "
                f"arguments and {sorted(named)}"
            )
        return own.forward(self, *(given[name] for name in names if name in given))

    return forward


def _reduce(module: EmendedModule, protocol: Any) -> Any:
    """Reduce a layer to its plain class, which a reader can find by name; in the class's own way where it has one."""
    emended = type(module)
    plain: Any = emended._emended_plain
    by_protocol, by_itself = own_method(module, "__reduce_ex__"), own_method(module, "__reduce__")
    if by_protocol is None and by_itself is None:
        return _new, (plain, emended._emended_form, *new_arguments(module)), module.__getstate__()
    reduced = by_protocol(protocol) if by_protocol is not None else by_itself()  # type: ignore[misc]
    if isinstance(reduced, str):  # the name of a constant
        return reduced
    make, arguments, *rest = reduced
    make, *arguments = (_exchanged(value, emended, plain) for value in (make, *arguments))
    if rest and isinstance(rest[0], dict) and KEY not in rest[0]:
        rest[0] = without_beside(rest[0], module)
    if rest:
        rest[0] = _exchanged(rest[0], emended, plain)
    return _made_again, (plain, emended._emended_form, saved_beside(module), make, *arguments), *rest


def _exchanged(value: Any, emended: type, plain: type, inside: tuple[int, ...] = ()) -> Any:
    """The value with the plain class for the emended one, in tuples, lists, dicts and partials too."""
    if value is emended:
        return plain
    if inspect.ismethod(value) and value.__self__ is emended:
        return getattr(plain, value.__name__)
    if id(value) in inside:  # a list or dict that holds itself
        return value

    def each(values: Iterable[Any]) -> list[Any]:
        return [_exchanged(one, emended, plain, (*inside, id(value))) for one in values]

    def same(new: list[Any], old: Iterable[Any]) -> bool:
        return all(a is b for a, b in zip(new, old, strict=True))

    if type(value) in (tuple, list) or (isinstance(value, tuple) and hasattr(value, "_make")):
        new = each(value)
        if same(new, value):
            return value
        made = getattr(type(value), "_make", type(value))  # a named tuple's
        return made(new)
    if type(value) in (dict, OrderedDict):
        keys, values = each(value), each(value.values())
        unchanged = same(keys, value) and same(values, value.values())
        return value if unchanged else type(value)(zip(keys, values, strict=True))
    if type(value) is functools.partial:
        make, arguments, named = each((value.func, value.args, value.keywords))
        if same([make, arguments, named], (value.func, value.args, value.keywords)):
            return value
        return functools.partial(make, *arguments, **named)
    return value


def _made_again(cls: type[nn.Module], form: Form, saved: dict[str, Any], make: Callable[..., Any], *args: Any) -> Any:
    from .convert import emend_again  # which imports this module

    made = make(*args)
    emend_again(made, emended_class(cls, form), saved)
    return made


def _new(
    cls: type[nn.Module], form: Form, arguments: tuple[Any, ...] = (), named: Mapping[str, Any] = MappingProxyType({})
) -> EmendedModule:
    made = emended_class(cls, form)
    return made.__new__(made, *arguments, **named)


def plain_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The class that `revert` gives back in the place of an emended one.

    A class made over an emended one, as ``parametrize`` and ``fully_shard`` make them at run time, is made anew over
    the plain one.

    Raises:
        TypeError: A class that cannot be made anew.
    """
    if cls in PLAIN:
        return PLAIN[cls]
    made_of: type[nn.Module] | None = cls.__dict__.get("_emended_plain")
    if made_of is not None:
        return made_of
    return _over_plain(cls)  # type: ignore[arg-type]


@functools.cache
def _over_plain(cls: type[nn.Module]) -> type[nn.Module]:
    namespace = {name: value for name, value in cls.__dict__.items() if name not in _OF_CLASS}
    if hasattr(namespace.get("__setstate__"), OWN_SETSTATE):
        own_setstate = getattr(namespace.pop("__setstate__"), OWN_SETSTATE)
        namespace.update({} if own_setstate is None else {"__setstate__": own_setstate})
    if _calls_super(namespace.get("__init__")):
        del namespace["__init__"]  # it builds an emended layer; the plain one's own serves
    own = [name for name, value in namespace.items() if name in _OF_FORWARD or _calls_super(value)]
    if own or EmendedModule in cls.__bases__:
        raise TypeError(
            f"revert cannot give {cls.__module__}.{cls.__qualname__} a plain form: it is built on an emended layer and "
            f"has code of its own ({', '.join(own) or 'EmendedModule'}) that needs it; build the class on torch's own "
            "layer and convert its modules"
        )
    bases = tuple(plain_class(base) if issubclass(base, EmendedModule) else base for base in cls.__bases__)
    gives_state = namespace.get("__getstate__")
    if getattr(gives_state, "__module__", "") == parametrize.__name__ and not hasattr(bases[0], "__deepcopy__"):
        namespace["__deepcopy__"] = _copied_with_attributes  # which torch puts where a class has none
    return type(cls)(cls.__name__, bases, namespace)  # type: ignore[misc, no-any-return]


def _copied_with_attributes(layer: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """The copy of a layer whose class refuses to give a state, as those of ``parametrize`` do."""
    copied = memo[id(layer)] = layer.__new__(type(layer))
    copied.__dict__.update(copy.deepcopy(layer.__dict__, memo))
    return copied


_OF_CLASS = ("__dict__", "__weakref__", "shortcut")
_OF_FORWARD = ("forward", "emended_forward")


def _calls_super(value: Any) -> bool:
    """Whether a function keeps the class that it was written in, as ``super()`` does."""
    code = getattr(getattr(value, "__func__", value), "__code__", None)
    return code is not None and "__class__" in code.co_freevars
