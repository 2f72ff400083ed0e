"""`find_damping`: a short search over damping and learning rate that leaves model and optimizer as they are."""

from __future__ import annotations

import copy
import itertools
import json
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from typing_extensions import Unpack

from ..nn.convert import convert, revert
from ..nn.linear import EmendedModule
from ..optim.emended import Emended
from ..options import OptionsDict, as_count, as_number, options_from
from .batch import NotFinite, check, loss_of, undisturbed
from .diagnose import aligned
from .layers import eligible

DAMPINGS = (0.03, 0.1, 0.3, 1.0, 3.0)
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)  # of an optimizer's own rate
# Rates that are tried with a class of torch's; NLMS's step size for SGD.
RATES = {"SGD": (0.25, 0.5, 1.0, 2.0, 4.0), "*": (0.0003, 0.001, 0.003, 0.01, 0.03)}
HOPELESS = 4.0  # a trial whose loss is so many times the first is given up

Maker = Callable[..., torch.optim.Optimizer]


@dataclass(frozen=True)
class Try:
    """A trial: its damping (None: the plain layers), its learning rate, and the loss that it came to.

    The loss is infinite where the trial diverged.
    """

    damping: float | None
    lr: float
    loss: float


class Found:
    """What `find_damping` returns; its ``str`` is a table, and notebooks show a heat map.

    Attributes:
        tries: All trials, the plain ones among them.
        start: The loss before any step.
        steps: The number of steps of each trial.
        target: What takes the damping: ``"convert"`` or ``"Emended"``.
        at_border: Whether the best damping or rate is the least or the largest that was tried.
    """

    def __init__(self, tries: list[Try], start: float, steps: int, target: str) -> None:
        self.tries, self.start, self.steps, self.target = tries, start, steps, target
        best = self.best
        dampings, rates = sorted({t.damping for t in self.emended if t.damping}), sorted({t.lr for t in self.emended})
        ends = [(best.damping, dampings), (best.lr, rates)]
        self.at_border = any(len(values) > 1 and value in (values[0], values[-1]) for value, values in ends)

    @property
    def emended(self) -> list[Try]:
        """The trials with a damping."""
        return [one for one in self.tries if one.damping is not None]

    @property
    def best(self) -> Try:
        """The emended trial with the least loss; of equals, that with the larger damping."""
        return min(self.emended, key=lambda one: (one.loss, -(one.damping or 0)))

    @property
    def damping(self) -> float:
        """The best one."""
        best = self.best.damping
        assert best is not None
        return best

    @property
    def lr(self) -> float:
        """The learning rate that goes with it."""
        return self.best.lr

    @property
    def options(self) -> dict[str, float]:
        """The options for ``convert(model, **options)``, or for ``Emended(optimizer, model, **options)``."""
        return {"damping": self.damping}

    def __str__(self) -> str:
        rates = sorted({one.lr for one in self.tries})
        loss = {(one.damping, one.lr): one.loss for one in self.tries}
        names: list[float | None] = [*sorted({t.damping for t in self.emended if t.damping is not None})]
        if any(one.damping is None for one in self.tries):
            names = [None, *names]
        cells = [["damping", *(f"lr {rate:g}" for rate in rates)]]
        for name in names:
            shown = ["plain" if name is None else f"{name:g}"]
            for rate in rates:
                mark = "*" if (name, rate) == (self.damping, self.lr) else " "
                shown.append((_loss_text(loss[name, rate]) if (name, rate) in loss else "") + mark)
            cells.append(shown)
        return "\n".join([*aligned(cells, left=1), *self._advice()])

    __repr__ = __str__

    def _advice(self) -> list[str]:
        call = "cw.convert(model, " if self.target == "convert" else "cw.optim.Emended(optimizer, model, "
        use = f"{call}damping={self.damping:g}), lr {self.lr:g}"
        lines = [f"loss after {self.steps} steps, from {self.start:.4g}. Use {use}."]
        if self.at_border:
            lines.append("The best is at the border of what was tried: give dampings= or rates= that go further.")
        return lines

    def to_json(self, path: str | Path | None = None) -> str:
        """All trials as JSON, also written to ``path`` where there is one; null stands for a loss that diverged."""
        tries = [{**vars(t), "loss": t.loss if math.isfinite(t.loss) else None} for t in self.tries]
        content = {"start": self.start, "steps": self.steps, "damping": self.damping, "lr": self.lr, "tries": tries}
        return _written(json.dumps(content), path)

    def to_html(self, path: str | Path | None = None) -> str:
        """One page with the heat map, also written to ``path`` where there is one.

        Raises:
            UserError: matplotlib is not installed.
        """
        from .pages import page

        return _written(page("Damping and learning rate", self._repr_html_()), path)

    def _repr_html_(self) -> str:
        from .pages import found_body

        return found_body(self)


def _written(text: str, path: str | Path | None) -> str:
    if path is not None:
        Path(path).write_text(text, encoding="utf-8")
    return text


def _loss_text(loss: float) -> str:
    return f"{loss:.4g}" if math.isfinite(loss) else "diverged"


def find_damping(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: Callable[..., Any],
    *,
    optimizer: torch.optim.Optimizer | Maker = torch.optim.SGD,
    dampings: Sequence[float] = DAMPINGS,
    rates: Sequence[float] | None = None,
    steps: int = 20,
    plain: bool = True,
    **options: Unpack[OptionsDict],
) -> Found:
    """Find a damping and a learning rate by short trainings on copies of the model.

    Every pair of a damping and a rate trains its own copy for ``steps`` steps from the same weights, on the same
    batches. The last fifth of the batches (at least one where there are two) is left out of training, and the trial's
    loss is the mean loss over it in eval mode. Afterwards model, optimizer and random number generators are the same
    bits as before. Like the result of a learning-rate finder this is a start: the best of 20 steps need not be the best
    of 20,000.

        found = cw.find_damping(model, loader, torch.nn.functional.cross_entropy, optimizer=torch.optim.SGD)
        cw.convert(model, **found.options)
        optimizer = torch.optim.SGD(model.parameters(), lr=found.lr)

    Args:
        model: A model, converted or not, on one device and without sharded weights, that `copy.deepcopy` can copy.
        batches: A loader or list of batches, of which at most ``steps`` and a fifth more are taken. An iterator is used
            up that far.
        loss_fn: As in `diagnose`.
        optimizer: A class or function that is called with parameters and ``lr=``; or an optimizer of the model, whose
            copy, with its state, takes the steps. Of an `optim.Emended` the damping of the coordinates is searched, and
            the layers stay plain.
        dampings: The dampings to try, above 0.
        rates: The learning rates to try, above 0. None: 1/4 to 4 times an optimizer's own; for a class, 0.25 to 4 with
            `torch.optim.SGD`, where it is NLMS's step size, else 0.0003 to 0.03. Groups keep their ratios.
        steps: The number of steps of each trial, at least 1.
        plain: Whether the plain layers are tried with the same rates, for comparison.
        **options: The other fields of `consequentialism.Options`, as for `convert`.

    Returns:
        A `Found`: print it for the table; ``options`` and ``lr`` are what to use.

    Raises:
        TypeError, ValueError: Bad arguments, as `diagnose`; no batch; a loss before the first step that is not finite;
            an optimizer of other parameters; what copy.deepcopy refuses; or no trial that came to a finite loss.
    """
    options_from(options)
    if "damping" in options:
        raise TypeError("find_damping takes dampings=, the values to try, not damping=")
    dampings = _numbers("dampings", dampings)
    steps = as_count("steps", steps, "an integer above 0")
    whole = model
    try:
        some = list(itertools.islice(batches, steps + max(1, steps // 4)))
    except TypeError:
        raise TypeError(f"batches must be iterable, got {batches!r} ({type(batches).__name__})") from None
    if not some:
        raise ValueError("batches must have at least one batch, got none")
    model = check(model, some, loss_fn)
    owner = _Owner(optimizer, whole, rates)
    if not owner.in_coordinates:
        eligible(model)
    held = some[-max(1, len(some) // 5) :] if len(some) > 1 else some
    train = some[: -len(held)] if len(some) > 1 else some
    tries = []
    with undisturbed(model):
        start = _mean_loss(copy.deepcopy(model), held, loss_fn)
        for damping in [*([None] if plain else []), *dampings]:
            for rate in owner.rates:
                with undisturbed(model):  # every trial draws the same random numbers
                    own, stepper = owner.copies(model, damping, rate, options)
                    tries.append(Try(damping, rate, _train(own, stepper, train, held, loss_fn, steps, start)))
    if not any(math.isfinite(one.loss) for one in tries if one.damping is not None):
        raise ValueError(f"every trial diverged, at rates {owner.rates[0]:g} to {owner.rates[-1]:g}: give lower rates=")
    return Found(tries, start, steps, "Emended" if owner.in_coordinates else "convert")


class _Owner:
    """Who takes the steps: what a trial's copy of the model is stepped by."""

    def __init__(self, optimizer: Any, model: nn.Module, rates: Sequence[float] | None) -> None:
        self.optimizer = optimizer
        self.in_coordinates = isinstance(optimizer, Emended)
        self.given = isinstance(optimizer, torch.optim.Optimizer)
        if not self.given and not callable(optimizer):
            raise TypeError(
                f"optimizer must be an optimizer or make one, got {optimizer!r} ({type(optimizer).__name__})"
            )
        if self.given:
            known = {id(p) for p in model.parameters()}
            if any(id(p) not in known for group in optimizer.param_groups for p in group["params"]):
                raise ValueError("optimizer has parameters that are not the model's")
            self.own = float(optimizer.param_groups[0].get("lr", math.nan))
            if rates is None and not self.own > 0:
                raise ValueError(f"optimizer has a learning rate of {self.own}: give rates=")
        if rates is None:
            kind = getattr(optimizer, "__name__", "*")
            rates = [self.own * f for f in FACTORS] if self.given else RATES.get(kind, RATES["*"])
        self.rates = _numbers("rates", rates)

    def copies(
        self, model: nn.Module, damping: float | None, rate: float, options: OptionsDict
    ) -> tuple[nn.Module, Any]:
        """A copy of the model with its damping, and an optimizer of the copy."""
        inner = self.optimizer.optimizer if self.in_coordinates else self.optimizer
        try:
            copied: tuple[nn.Module, Any] = copy.deepcopy((model, inner if self.given else None))
        except Exception as error:
            raise TypeError(f"model and optimizer must bear copy.deepcopy, which says: {error}") from error
        own, stepper = copied
        if self.in_coordinates:
            if damping is not None:
                before = self.optimizer
                same = {n: getattr(before, n) for n in ("exponent", "scale", "memory", "refresh_every", "block")}
                taken = {name for unit in before.units for name in unit.names}
                stepper = Emended(
                    stepper, own, damping=damping, process_group=None, filter_fn=lambda _, name: name in taken, **same
                )
        elif damping is None:
            revert(own)
        else:
            self._emend(own, damping, options)
        if not self.given:
            return own, self.optimizer(own.parameters(), lr=rate)
        for group in stepper.param_groups:
            if "lr" in group:
                group["lr"] = group["lr"] * (rate / self.own) if self.own > 0 else rate
        return own, stepper

    def _emend(self, own: nn.Module, damping: float, options: OptionsDict) -> None:
        if any(isinstance(module, EmendedModule) for module in own.modules()) and not options:
            for module in own.modules():
                if isinstance(module, EmendedModule):
                    module.damping = damping
            return
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "consequentialism.convert", UserWarning)
            chosen: OptionsDict = {**options, "damping": damping}
            convert(own, **chosen)
        if not any(isinstance(module, EmendedModule) for module in own.modules()):
            raise ValueError("model has no layer that can be emended")


def _train(
    model: nn.Module,
    optimizer: Any,
    train: Sequence[Any],
    held: Sequence[Any],
    loss_fn: Callable[..., Any],
    steps: int,
    start: float,
) -> float:
    """The loss over ``held`` after so many steps; infinity where it diverges."""
    try:
        for batch in itertools.islice(itertools.cycle(train), steps):
            optimizer.zero_grad()
            loss = loss_of(model, batch, loss_fn)
            if float(loss.detach()) > HOPELESS * abs(start) + 1:
                return math.inf
            loss.backward()
            optimizer.step()
        return _mean_loss(model, held, loss_fn)
    except NotFinite:
        return math.inf


@torch.no_grad()
def _mean_loss(model: nn.Module, batches: Sequence[Any], loss_fn: Callable[..., Any]) -> float:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        return sum(float(loss_of(model, batch, loss_fn)) for batch in batches) / len(batches)
    finally:
        for module, training in modes:
            module.training = training


def _numbers(name: str, values: Any) -> list[float]:
    """Numbers above 0, each once, in order."""
    if not isinstance(values, Sequence) or isinstance(values, str) or not values:
        raise TypeError(f"{name} must be a list of numbers above 0, got {values!r} ({type(values).__name__})")
    found = sorted({as_number(name, value, "a list of numbers above 0") for value in values})
    if not 0 < found[0] <= found[-1] < math.inf:
        raise ValueError(f"{name} must be finite numbers above 0, got {values!r}")
    return found
