"""The keywords that every emended layer and function shares, and their checks."""

from __future__ import annotations

import difflib
import math
import numbers
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from torch import SymInt, Tensor
from typing_extensions import TypedDict, Unpack  # torch requires it; typing has Unpack from Python 3.11 on

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

DampingMode = Literal["relative", "absolute"]
Scale = Literal["nlms", "raw", "gradient"]
Form = Literal["dual", "primal"]
ConvMethod = Literal["direct", "displaced"]
Solver = Literal["auto", "cholesky", "cg"]

DAMPING_MODES: tuple[DampingMode, ...] = ("relative", "absolute")
SCALES: tuple[Scale, ...] = ("nlms", "raw", "gradient")
SOLVERS: tuple[Solver, ...] = ("auto", "cholesky", "cg")
BACKENDS = ("auto", "cpu", "cuda", "triton", "reference")


class Ridge(NamedTuple):
    """The ridge that is added to a Gram before it is inverted, and the scale of the inverse; see `Options`."""

    damping: float = 1.0
    damping_mode: DampingMode = "relative"
    scale: Scale = "nlms"


@dataclass(frozen=True)
class Options:
    """How a gradient is emended.

    Attributes:
        damping: The ridge, a finite number above 0: relative to ``trace(x x^T) / min(N, I)``, the mean non-zero
            eigenvalue of the input Gram, or absolute, as ``damping_mode`` says.
        damping_mode: ``"relative"`` or ``"absolute"``.
        scale: ``"nlms"`` (the formula times the number of samples; ``lr`` is NLMS's step size), ``"raw"`` (the formula
            as it stands) or ``"gradient"`` (the formula times the ridge ``c``, so that large damping is plain
            backpropagation). The samples are the rows of linear and embedding layers, rows of zeros included, and the
            batch size of convolutions, unless ``samples`` says otherwise.
        backend: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"triton"`` or ``"reference"``.
        process_group: The group whose ranks together hold the batch, or None.
        patch_bytes: Memory that a convolution may take for unfolded patches, in bytes; a whole number above 0.
        solver: ``"cholesky"`` (exact), ``"cg"`` (conjugate gradients, for Grams too large to factor at every step; the
            error is that of ``docs/solvers.md``) or ``"auto"``: conjugate gradients where they cost less and
            ``damping`` is so large that their error is below the rounding of the result, else Cholesky.
        iterations: How many conjugate gradient iterations, an integer above 0.
        samples: The number that a mean-reduced loss divides by, where it is not the number of samples above: an integer
            of at least 0, a 0-dimensional tensor, a mask whose sum is taken, or None. ``scale="nlms"`` multiplies by
            it; the ridge counts all rows. With 0 samples the gradient is zero. With a process group it is this rank's
            number. Tensors are read on their device. See `consequentialism.set_samples`.
    """

    damping: float = 1.0
    damping_mode: DampingMode = "relative"
    scale: Scale = "nlms"
    backend: str = "auto"
    process_group: ProcessGroup | None = None
    patch_bytes: int = 64 * 2**20
    solver: Solver = "auto"
    iterations: int = 16
    samples: int | Tensor | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if type(self.damping) is not float:
            object.__setattr__(self, "damping", as_number("damping", self.damping, "a number above 0"))
        check_damping(self.damping)
        check_choice("damping_mode", self.damping_mode, DAMPING_MODES)
        check_choice("scale", self.scale, SCALES)
        check_choice("backend", self.backend, BACKENDS)
        check_choice("solver", self.solver, SOLVERS)
        for name, allowed in (("patch_bytes", "a whole number above 0"), ("iterations", "an integer above 0")):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                object.__setattr__(self, name, as_count(name, value, allowed))
        if self.samples is not None:
            check_samples(self.samples)
        if self.solver == "cg" and self.process_group is not None:
            raise ValueError("solver must be 'auto' or 'cholesky' with a process_group, got 'cg'")

    @property
    def ridge(self) -> Ridge:
        """The three that belong to the inverse, in the order of the ops' arguments."""
        return Ridge(self.damping, self.damping_mode, self.scale)

    def changed(self, **changes: Unpack[OptionsDict]) -> Options:
        """A copy with ``changes``; unlike `dataclasses.replace` torch.compile sees through it."""
        return Options(**{**{name: getattr(self, name) for name in OPTION_NAMES}, **changes})


OPTION_NAMES = tuple(field.name for field in fields(Options))


class EmbeddingOptions(TypedDict, total=False):
    """The fields of `Options` that mean something to an embedding, as keywords."""

    damping: float
    damping_mode: DampingMode
    scale: Scale
    process_group: ProcessGroup | None


class LinearOptions(EmbeddingOptions, total=False):
    """The options of a linear layer, as keywords."""

    backend: str
    solver: Solver
    iterations: int


class ConvOptions(LinearOptions, total=False):
    """The options of a convolution, as keywords."""

    patch_bytes: int


class OptionsDict(ConvOptions, total=False):
    """All of them, each with its default: what ``**options`` stands for. ``samples`` are those of a batch."""

    samples: int | Tensor | None


def check_option_names(options: Iterable[str], names: Sequence[str] = OPTION_NAMES, owner: str = "") -> None:
    """Raise unless every one of ``options`` is in ``names``, those that ``owner`` has, or the fields of `Options`."""
    for name in options:
        if name not in names:
            meant = difflib.get_close_matches(name, names, n=1)
            hint = f" (did you mean {meant[0]!r}?)" if meant else ""
            has = f"{owner} has" if owner else "there is"
            raise TypeError(f"{has} no option {name!r}{hint}; the options are {', '.join(names)}")


def options_from(keywords: Mapping[str, Any]) -> Options:
    """The checked `Options` of a function's ``**options``; a misspelt name is told from those that there are."""
    check_option_names(keywords)
    return Options(**keywords)


def check_damping(damping: float) -> None:
    """Raise unless ``damping`` is finite and above 0."""
    if not 0 < as_number("damping", damping, "a number above 0") <= sys.float_info.max:
        raise ValueError(f"damping must be finite and above 0, got {damping!r}")


def as_number(name: str, value: Any, allowed: str = "a number") -> float:
    """``value``, a real number of Python's or numpy's, as a float; one too large for that is infinity."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be {allowed}, got {value!r} ({type(value).__name__})")
    if type(value) is float:  # or a tracer's
        return value
    number: Any = value
    try:
        return float(number)
    except OverflowError:
        return math.inf if number > 0 else -math.inf


def as_count(name: str, value: Any, allowed: str) -> int:
    """``value``, an integer of Python's or numpy's above 0, as an int."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be {allowed}, got {value!r} ({type(value).__name__})")
    if int(value) < 1:
        raise ValueError(f"{name} must be {allowed}, got {value!r}")
    return int(value)


def is_whole(value: Any) -> bool:
    """Whether ``value`` is an integer of Python's, numpy's or a tracer's."""
    return type(value) is int or (isinstance(value, (numbers.Integral, SymInt)) and not isinstance(value, bool))


def check_samples(samples: Any) -> None:
    """Raise unless ``samples`` is an integer of at least 0 or a real tensor, which is not read."""
    allowed = "an integer of at least 0, a tensor (a number or a mask) or None"
    if isinstance(samples, Tensor):
        if samples.is_complex():
            raise TypeError(f"samples must be {allowed}, got a tensor of {samples.dtype}")
        return
    if isinstance(samples, bool) or not isinstance(samples, numbers.Integral):
        raise TypeError(f"samples must be {allowed}, got {samples!r} ({type(samples).__name__})")
    if int(samples) < 0:
        raise ValueError(f"samples must be {allowed}, got {samples!r}")


def check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Raise unless ``value`` is one of ``allowed``."""
    if not isinstance(value, str):
        raise TypeError(
            f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r} ({type(value).__name__})"
        )
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
