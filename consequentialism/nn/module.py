"""`EmendedModule`, the base of all emended layers, and `set_samples`, which speaks to all of a model."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Generic, TypeVar, cast, overload

import torch
from torch import Tensor, nn

from .. import _torch
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
    serial: int  # the place among all layers that this process has made
    recorder: Recorder | None = None  # set by `attach`, on this instance only
    watched: Watched | None = None  # set by convert, until the layer has run
    weight_name: ClassVar[str] = "weight"  # of the parameter; `register` may say others
    bias_name: ClassVar[str] = "bias"
    transposed: ClassVar[bool] = False  # whether a linear layer's weight is [I, O]
    # Serves what is usual, without Python, and returns None for the rest; a compiler does not see through it.
    shortcut: ClassVar[Callable[[EmendedModule, Tensor], Tensor | None] | None] = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not _keeps_shortcut(cls):
            cls.shortcut = None

    def forward(self, input: Tensor) -> Tensor:
        if not (torch.compiler.is_compiling() or _torch.is_traced_by_fx()):
            shortcut = type(self).shortcut
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
        self.__dict__.setdefault("serial", next(_serials))

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

    def __deepcopy__(self, memo: dict[int, Any]) -> EmendedModule:
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        memo[id(self.options)] = self.options.changed(samples=None)  # its group cannot be copied: it is the same
        kept = {name: value for name, value in self.__dict__.items() if name != "serial"}
        copied.__dict__.update(copy.deepcopy(kept, memo), serial=next(_serials))
        if copied.watched is not None:
            copied.watched.bind(copied)
        return copied

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in self.__dict__.items() if name != "serial"}
        state["options"] = self.options.changed(process_group=None, samples=None)
        state["process_group"] = SavedGroup(self.options.process_group)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = {**state, "serial": next(_serials)}
        state["options"] = state["options"].changed(process_group=state.pop("process_group").group)
        super().__setstate__(state)
        if self.watched is not None:
            self.watched.bind(self)

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


def _keeps_shortcut(cls: type[EmendedModule]) -> bool:
    """Whether a class forwards as the one that named its shortcut does, and finds weight and bias where it looks."""
    named = next(base for base in cls.__mro__ if "shortcut" in base.__dict__)
    own: Any = cls  # whose attributes a type checker would call methods
    methods = ("emended_forward", "options_now", "note_run")
    return (
        all(getattr(own, name) is getattr(named, name) for name in methods)
        and own.__getattr__ is nn.Module.__getattr__
        and own.__getattribute__ is nn.Module.__getattribute__
        and all(
            isinstance(base.__dict__.get(name, OptionalBias()), OptionalBias)
            for base in cls.__mro__
            for name in (cls.weight_name, cls.bias_name)
        )
    )


class OptionalBias:
    """The bias of modules that may have no attribute of that name; not None itself, which would hide the parameter."""

    def __get__(self, module: Any, owner: type) -> Any:
        return self if module is None else module._parameters.get("bias")


def set_samples(model: nn.Module, samples: int | Tensor | None) -> None:
    """Say how many samples the loss divides by, to all emended layers of ``model``, until it is said again.

    ``scale="nlms"`` multiplies a gradient by the number of samples, because a mean-reduced loss has divided by it. That
    number is taken to be the rows of linear and embedding layers (all leading dimensions, rows of zeros included) and
    the batch size of convolutions. Where the loss divides by another one, such as the tokens that are not padding, the
    labels that are not ignored, or the sequences, say so before forward:

        cw.set_samples(model, labels != -100)

    It must stay as it is until backward has ended, for checkpointing runs forward again there. It is not saved: not in
    ``state_dict``, not in copies and pickles. ``scale="raw"`` and ``"gradient"`` do not count samples.

    Args:
        model: Any module, also a single layer.
        samples: An integer of at least 0; a 0-dimensional tensor; a mask, whose sum it is; or None, the default. The
            host does not read a tensor. Of 0 samples the gradient is zero. With ``process_group=``, of this rank's
            batch; the ranks' are summed.

    Raises:
        TypeError: ``model`` is no module, or ``samples`` of another type.
        ValueError: A number below 0.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {model!r} ({type(model).__name__})")
    if samples is not None:
        check_samples(samples)
    counts: dict[torch.device, Tensor] = {}  # a tensor, so that torch.compile does not compile for each number
    for layer in model.modules():
        if not isinstance(layer, EmendedModule):
            continue
        if samples is None:
            layer.samples = None
            continue
        device = samples.device if isinstance(samples, Tensor) else next(layer.parameters()).device
        if device not in counts:
            counts[device] = count(samples, device)
        layer.samples = counts[device]
