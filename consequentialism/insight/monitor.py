"""`Monitor`: the figures of `diagnose` while a model trains, from few rows, and warnings in plain words."""

from __future__ import annotations

import csv
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from ..backend import compiled as ops
from ..errors import shown
from ..nn.hooks import spent
from ..nn.watch import listed
from ..optim.emended import Emended
from ..optim.record import gram_of
from ..options import Options, as_count
from ..precision import HALF_TYPES
from .figures import evenly_spaced
from .layers import Seen, eligible

FIGURES = (
    "rows",
    "dead_inputs",
    "mean_share",
    "effective_rank",
    "interference",
    "interference_emended",
    "cosine",
    "lost_to_rounding",
    "stale",
)
MOST_SAMPLES = 4  # of a convolution's batch: their patches are what a sample's rows are taken from

# When a figure is worth a warning.
ALIKE = 0.98  # of the trace in the direction of the mean row
DEAD = 0.9  # of the inputs
LOST = 0.5  # of the weights that should have moved
STALE = 4.0  # times, either way

ADVICE = {
    "unseen": "no layer was seen: on the sampled step the model's own forward did not run in train mode, or its layers "
    "are inside a graph of torch.compile. Monitor the model before it is compiled, or leave compiling out meanwhile",
    "degenerate": "nearly all input rows of {layers} are alike: their mean holds over {alike:.0%} of the Gram's trace, "
    "and little is left to tell samples apart by. Normalise or centre them before, or raise the damping there",
    "dead": "most inputs of {layers} are 0 in every row, and their weights get no gradient: units before have died. "
    "Lower the learning rate, or look at the initialisation",
    "half": "steps on {layers} are lost to rounding: most weights of a half type did not move. Keep the weights in "
    "float32 and use torch.autocast, or an optimizer with master weights",
    "retries": "{count} factors broke down since the last sample and were tried again with more damping: rows are "
    "copies of each other, or badly scaled. Raise the damping, or normalise the inputs",
    "stale": "the memory of consequentialism.optim.Emended is stale for {layers}: its root takes today's inputs for "
    "{times:g} times larger or smaller than they are, or more. Lower memory= or refresh_every=",
}
Log = Callable[[int, dict[str, float]], Any]


class Monitor:
    """A monitor that logs what a model's steps do to each other, every so many steps, and warns once of each problem.

    On a sampled step it reads a few rows of every layer that can be emended, converted or not, and after the
    optimizer's step it fetches all figures from the device at once. Between samples it has no hook in the model, and
    the host waits for nothing. It does not see layers inside a graph of torch.compile, and says so once.

        monitor = cw.Monitor(model, optimizer, log="run.csv")

    Figures, by ``"layer/figure"``, of the rows that were looked at; of a grouped convolution, of its first group:

    - ``rows``: How many.
    - ``dead_inputs``: Share of the inputs that are 0 in all rows of the batch; of a convolution, of its channels.
    - ``mean_share``, ``effective_rank``, ``interference``, ``interference_emended``, ``cosine``: As
      `consequentialism.insight.diagnose.Layer`, at the layer's damping.
    - ``lost_to_rounding``: Share of the weights with a gradient that the step left as they were; of half types only.
    - ``stale``: Of `optim.Emended`: the mean square consequence of a unit step with fresh inputs, in units of that with
      those in memory; 1 where nothing has changed.

    and ``"retries"``: factors that broke down since the last sample. A figure that has no meaning is NaN.

    Args:
        model: The model whose forward runs in train mode.
        optimizer: The optimizer whose steps count. Its hooks are used: `torch.optim.Optimizer.register_step_post_hook`.
        every: Steps from a sample to the next, at least 1. The first step is one.
        log: Where figures go: a function called as ``log(step, figures)``; the path of a CSV file, which is written
            anew, a line a layer; a TensorBoard ``SummaryWriter``, or anything with ``add_scalar(name, value, step)``;
            several of these in a list; or None. `latest` has the last ones in any case.
        rows: The most rows of each layer that are looked at, evenly spaced.
        warn: Whether to warn.

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: A model without layers that can be emended, or a number out of its range.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        every: int = 200,
        log: Any = None,
        rows: int = 32,
        warn: bool = True,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {shown(model)}")
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {shown(optimizer)}")
        if not isinstance(warn, bool):
            raise TypeError(f"warn must be True or False, got {warn!r} ({type(warn).__name__})")
        self.every = as_count("every", every, "an integer above 0")
        self.rows = as_count("rows", rows, "an integer above 0")
        self.optimizer, self.warn = optimizer, warn
        self.step = 0
        self.latest: dict[str, float] = {}
        self._layers, _ = eligible(model.module if isinstance(model, DistributedDataParallel) else model)
        known = {id(p) for p in model.parameters()}
        if not any(id(p) in known for group in optimizer.param_groups for p in group["params"]):
            raise ValueError("optimizer has none of the model's parameters; give the one that trains it")
        self._logs, self._files = _logs_of(log)
        self._said: set[str] = set()
        self._retries = ops.breakdowns()
        self._taken: dict[str, _Taken] = {}
        self._weights: dict[str, Tensor] = {}
        self._hooks: list[RemovableHandle] = []
        self._steps = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        self._begin()

    def close(self) -> None:
        """Take everything off model and optimizer, and close the file."""
        for handle in (*self._hooks, *self._steps):
            handle.remove()
        self._hooks, self._steps = [], []
        for file in self._files:
            file.close()
        self._files, self._logs = [], []

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _begin(self) -> None:
        """The next step is a sample."""
        self._taken = {}
        for seen in self._layers:
            hook = _Hook(seen, self._taken, self.rows)
            self._hooks.append(seen.module.register_forward_hook(hook, with_kwargs=True))

    def _before_step(self, *_: Any) -> None:
        if not self._hooks:
            return
        weights = ((seen.name, _weight(seen)) for seen in self._layers if seen.name in self._taken)
        self._weights = {name: w.detach().clone() for name, w in weights if w.dtype in HALF_TYPES}

    def _after_step(self, *_: Any) -> None:
        if self._hooks:
            for handle in self._hooks:
                handle.remove()
            self._hooks = []
            with torch.no_grad():
                self._sample()
        self.step += 1
        if self.step % self.every == 0:
            self._begin()

    def _sample(self) -> None:
        sizes: dict[int, list[Seen]] = {}
        for seen in self._layers:
            taken = self._taken.get(seen.name)
            if taken is not None and taken.dy is not None:
                sizes.setdefault(taken.x.shape[0], []).append(seen)
        figures: dict[str, dict[str, float]] = {}
        parts = []
        for layers in sizes.values():
            some = [self._taken[seen.name] for seen in layers]
            device, others = some[0].x.device, []
            for seen, one in zip(layers, some, strict=True):
                pair = self._lost(seen), self._stale(seen, one)
                others.append(torch.stack([torch.as_tensor(e, dtype=torch.float64, device=device) for e in pair]))
            parts.append(torch.cat([_figures(some, [s.options(Options()) for s in layers]), torch.stack(others)], 1))
        names = [seen.name for layers in sizes.values() for seen in layers]
        for name, row in zip(names, torch.cat(parts).tolist() if parts else [], strict=True):  # the host waits here
            figures[name] = dict(zip(FIGURES, row, strict=True))
        self._taken, self._weights = {}, {}
        counted = ops.breakdowns()
        retries, self._retries = counted - self._retries, counted
        self.latest = {f"{name}/{key}": value for name, row in figures.items() for key, value in row.items()}
        self.latest["retries"] = float(retries)
        for log in self._logs:
            log(self.step, dict(self.latest))
        if self.warn:
            self._warn(figures, retries)

    def _lost(self, seen: Seen) -> Tensor | float:
        """Share of the weights with a gradient that did not move."""
        before, weight = self._weights.get(seen.name), _weight(seen)
        if before is None or weight.grad is None:
            return math.nan
        asked = weight.grad != 0
        return ((weight == before) & asked).sum().double() / asked.sum().clamp(min=1)

    def _stale(self, seen: Seen, taken: _Taken) -> Tensor | float:
        """``tr(S^T A' S) / tr(S^T A S)`` with today's ``A'``."""
        if not isinstance(self.optimizer, Emended):
            return math.nan
        unit = next((unit for unit in self.optimizer.units if unit.module is seen.module), None)
        state = {} if unit is None else self.optimizer.state.get(unit.weight, {})
        if unit is None or unit.diagonal or float(state.get("emended_steps", 0)) == 0:
            return math.nan
        if "root" not in state or float(state["gram_rows"]) == 0:  # with shard_state another rank has it
            return math.nan
        per_sample = self.optimizer.scale == "nlms"
        gram = gram_of(unit.kind, unit.blocks, taken.input, per_sample, unit.slot.dtype)
        root = state["root"].view(unit.slot.shape)
        metric = root @ root.mT
        fresh = (metric * gram.matrix / gram.count).sum()
        known = (metric * state["input_gram"].view(unit.slot.shape)).sum()
        return (fresh / known).double()

    def _warn(self, figures: Mapping[str, Mapping[str, float]], retries: int) -> None:
        def named(condition: Callable[[Mapping[str, float]], bool]) -> list[str]:
            return [name for name, figure in figures.items() if condition(figure)]

        def is_stale(ratio: float) -> bool:
            return ratio > STALE or ratio < 1 / STALE

        cases = {
            "unseen": [""] if not figures else [],
            "degenerate": named(lambda f: f["rows"] > 2 and f["mean_share"] > ALIKE and f["dead_inputs"] < DEAD),
            "dead": named(lambda f: f["dead_inputs"] > DEAD),
            "half": named(lambda f: f["lost_to_rounding"] > LOST),
            "stale": named(lambda f: is_stale(f["stale"])),
            "retries": [""] if retries else [],
        }
        for kind, layers in cases.items():
            if not layers or kind in self._said:
                continue
            self._said.add(kind)
            text = ADVICE[kind].format(
                layers="layer " + listed([repr(name) for name in layers]),
                alike=ALIKE,
                count=retries,
                times=STALE,
            )
            warnings.warn(f"consequentialism.Monitor at step {self.step}: {text}", UserWarning, stacklevel=2)


class _Taken:
    """What a sample has of one layer: some rows, and the loss's gradient at them."""

    def __init__(self, x: Tensor, input: Tensor, dead: Tensor) -> None:
        self.x, self.input, self.dead = x, input, dead  # [n, I], what these rows are of, and a share
        self.dy: Tensor | None = None  # [n, O]

    def ridge(self, options: Options) -> tuple[float, float]:
        """What the trace is multiplied by for ``c``, and what is added to it."""
        if options.damping_mode == "relative":
            return options.damping / min(self.x.shape), 0.0
        return 0.0, options.damping


def _figures(taken: Sequence[_Taken], options: Sequence[Options]) -> Tensor:
    """The first of `FIGURES` of layers with the same number of rows, ``[layers, figures]``, in float64.

    All by the Grams ``G`` of inputs and ``D`` of errors, ``[layers, n, n]``, and the eigenvectors of the first.
    """
    grams = torch.stack([one.x @ one.x.T for one in taken])
    errors = torch.stack([one.dy @ one.dy.T for one in taken if one.dy is not None])
    dead = torch.stack([one.dead.to(grams) for one in taken])
    n, tiny = grams.shape[-1], torch.finfo(grams.dtype).tiny
    values, vectors = torch.linalg.eigh(torch.nan_to_num(grams))
    values = values.clamp(min=0)  # [layers, n]
    total = values.sum(-1)
    by, plus = grams.new_tensor([one.ridge(o) for one, o in zip(taken, options, strict=True)]).unbind(1)
    inverse = 1 / (values + (by * total + plus)[:, None]).clamp(min=tiny)
    shares = values / total.clamp(min=tiny)[:, None]
    smoothed = (vectors * (values * inverse)[:, None]) @ vectors.mT  # G (G + c I)^-1
    again = (vectors * (values * inverse.square())[:, None]) @ vectors.mT
    plain, both, emended = ((errors * one).sum((1, 2)) for one in (grams, smoothed, again))
    along_mean = grams.sum(2)  # n times the products of the rows with their mean
    mean_share = along_mean.square().sum(1) / (along_mean.sum(1) * total).clamp(min=tiny)
    found = [
        torch.full_like(total, n),
        dead,
        mean_share,
        (-(shares * shares.clamp(min=tiny).log()).sum(1)).exp(),
        _interference(grams, errors),
        _interference(smoothed, errors),
        both / (plain * emended).sqrt().clamp(min=tiny),
    ]
    finite = grams.sum((1, 2)).isfinite() & errors.sum((1, 2)).isfinite()
    return torch.where(finite[:, None], torch.stack(found, 1), math.nan)


def _interference(change: Tensor, errors: Tensor) -> Tensor:
    """The interference of `figures`, from ``H`` and ``D``, ``[layers, n, n]``."""
    own = change.diagonal(dim1=1, dim2=2)
    others = change - torch.diag_embed(own)
    size = (own.square() * errors.diagonal(dim1=1, dim2=2)).sum(1)
    return (((others @ errors) * others).sum((1, 2)) / size.clamp(min=torch.finfo(size.dtype).tiny)).clamp(min=0).sqrt()


class _Hook:
    """A forward hook that takes the rows of the first call in training. A copied or pickled model has none."""

    def __init__(self, seen: Seen, taken: dict[str, _Taken], most: int) -> None:
        self.seen, self.taken, self.most = seen, taken, most

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        trains = module.training and torch.is_grad_enabled() and output.requires_grad
        if self.seen.name in self.taken or not trains or torch.compiler.is_compiling():
            return
        x = (args[0] if args else next(iter(kwargs.values()))).detach()
        if x.numel() == 0:
            return
        with torch.no_grad():
            one, rows_of_gradient = _some_rows(self.seen, x, self.most)
        self.taken[self.seen.name] = one

        def keep(gradient: Tensor) -> None:
            with torch.no_grad():
                one.dy = rows_of_gradient(gradient.detach()).double()

        output.register_hook(keep)

    def __reduce__(self) -> str | tuple[Any, ...]:
        return spent().__reduce__()

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return spent()


def _some_rows(seen: Seen, x: Tensor, most: int) -> tuple[_Taken, Callable[[Tensor], Tensor]]:
    """Some rows of a layer's input in float64, and what finds the same in the gradient at its output."""
    like = seen.form.like
    if like is nn.Linear or like is nn.Embedding:
        flat = x.reshape(-1) if like is nn.Embedding else x.reshape(-1, x.shape[-1])
        places = evenly_spaced(flat.shape[0], most, x.device)
        some = flat[places]

        def of_rows(gradient: Tensor) -> Tensor:
            return gradient.reshape(-1, gradient.shape[-1])[places]

        if like is nn.Embedding:
            same = some.unique(return_inverse=True)[1]
            rows = nn.functional.one_hot(same).double()
            padding = getattr(seen.module, "padding_idx", None)
            if padding is not None:
                rows = rows * (some != padding)[:, None]
            return _Taken(rows, some, torch.zeros(())), of_rows
        return _Taken(seen.rows_of(some)[0], some, (flat == 0).all(0).double().mean()), of_rows
    batched = x.ndim == seen.form.dimensions()
    samples = evenly_spaced(x.shape[0], MOST_SAMPLES, x.device) if batched else None
    some = x if samples is None else x[samples]
    rows = seen.rows_of(some)[0]  # the first group's
    places = evenly_spaced(rows.shape[0], most, x.device)
    beside = [d for d in range(x.ndim) if d != x.ndim - seen.form.dimensions() + 1]

    def of_patches(gradient: Tensor) -> Tensor:
        return seen.errors_of(gradient if samples is None else gradient[samples])[0][places]

    return _Taken(rows[places], some, (x == 0).all(dim=tuple(beside)).double().mean()), of_patches


def _weight(seen: Seen) -> Tensor:
    weight = seen.module._parameters[seen.form.weight]
    assert weight is not None
    return weight


def _logs_of(log: Any) -> tuple[list[Log], list[Any]]:
    """What a sample's figures are handed to, and the files to close."""
    logs: list[Log] = []
    files: list[Any] = []
    for one in log if isinstance(log, (list, tuple)) else [] if log is None else [log]:
        if isinstance(one, (str, Path)):
            file = open(one, "w", newline="", encoding="utf-8")  # noqa: SIM115
            files.append(file)
            logs.append(_to_csv(file))
        elif hasattr(one, "add_scalar"):
            logs.append(_to_board(one))
        elif callable(one):
            logs.append(one)
        else:
            raise TypeError(
                f"log must be a function, a path, a SummaryWriter, a list of these or None, got {one!r} "
                f"({type(one).__name__})"
            )
    return logs, files


def _to_csv(file: Any) -> Log:
    writer = csv.writer(file)
    writer.writerow(["step", "layer", *FIGURES, "retries"])

    def log(step: int, figures: dict[str, float]) -> None:
        layers = dict.fromkeys(name.rpartition("/")[0] for name in figures if "/" in name)
        for layer in layers:
            values = [f"{figures[f'{layer}/{figure}']:.6g}" for figure in FIGURES]
            writer.writerow([step, layer, *values, f"{figures['retries']:g}"])
        file.flush()

    return log


def _to_board(board: Any) -> Log:
    def log(step: int, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            if math.isfinite(value):
                board.add_scalar(f"consequentialism/{name}", value, step)

    return log
