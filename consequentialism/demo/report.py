"""The table, the picture and the JSON file."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ..errors import UserError, need
from ..experiments.settings import PREFIX, is_emended
from ..experiments.train import Run
from ..version import __version__
from .search import Search, at_border
from .summary import Row

COLOURS = {"sgd": "#d62728", "nag": "#ff7f0e", "rmsprop": "#2ca02c", "adam": "#1f77b4"}
LABELS = {"sgd": "SGD", "nag": "NAG", "rmsprop": "RMSProp", "adam": "Adam"}


def label(optimizer: str) -> str:
    """``emended-sgd`` as ``emended SGD``."""
    return ("emended " if is_emended(optimizer) else "") + LABELS[optimizer.removeprefix(PREFIX)]


def print_table(config: Mapping[str, Any], rows: Sequence[Row], verdict: str | None) -> None:
    """One line an optimizer, the target and its rule, and the verdict."""
    table = _table(_title(config), "lr", "damping")
    emended_before = False
    for row in rows:
        if is_emended(row.trial.optimizer) and not emended_before:
            table.add_section()
            emended_before = True
        damping = "" if row.trial.damping is None else f"{row.trial.damping:g}"
        table.add_row(label(row.trial.optimizer), f"{row.trial.lr:.3g}", damping, *_figures(row))
    console = need("rich.console").Console(width=None if os.isatty(1) else 120)
    console.print(table)
    console.print(f"Target: {config['target']:.2%} test accuracy ({config['target_rule']}).", highlight=False)
    if verdict:
        console.print(verdict, highlight=False)


def print_grid(config: Mapping[str, Any], found: Search) -> None:
    """Every trial, by optimizer, the winner of each first."""
    table = _table(_title(config), "lr", "damping", "")
    for rows in found.values():
        table.add_section()
        for place, row in enumerate(rows):
            damping = "" if row.trial.damping is None else f"{row.trial.damping:g}"
            mark = "" if place else ("best, at the border" if at_border(row.trial) else "best")
            table.add_row(label(row.trial.optimizer), f"{row.trial.lr:.3g}", damping, mark, *_figures(row))
    console = need("rich.console").Console(width=None if os.isatty(1) else 140)
    console.print(table)
    console.print(f"Target: {config['target']:.2%} test accuracy ({config['target_rule']}).", highlight=False)


def write_json(path: Path, config: Mapping[str, Any], rows: Sequence[Row], groups: Sequence[Sequence[Run]]) -> None:
    """Config, versions, the table and the curves; null stands for what is not finite or was not reached."""
    content = {
        "config": config,
        "versions": {"consequentialism": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "summary": [dataclasses.asdict(row) for row in rows],
        "runs": [dataclasses.asdict(run) for runs in groups for run in runs],
    }
    _write(path, json.dumps(_finite(content), indent=1).encode())


def print_untuned(config: Mapping[str, Any], groups: Sequence[Sequence[Run]]) -> None:
    """One line: everybody's test accuracy after one epoch at the usual settings."""
    found = sorted(((after_an_epoch(config, runs), runs[0].trial) for runs in groups), key=lambda pair: -pair[0])
    shown = ", ".join(f"{label(trial.optimizer)} {accuracy:.1%} (lr {trial.lr:g})" for accuracy, trial in found)
    console = need("rich.console").Console(width=None if os.isatty(1) else 120)
    console.print(f"Untuned, test accuracy after one epoch: {shown}.", highlight=False)


def after_an_epoch(config: Mapping[str, Any], runs: Sequence[Run]) -> float:
    """Median test accuracy at the first evaluation after all training samples were seen once."""
    an_epoch = config["train_samples"] // config["batch_size"]
    place = next((i for i, step in enumerate(runs[0].steps) if step >= an_epoch), -1)
    return median(run.test_accuracy[place] for run in runs)


def draw(
    path: Path, config: Mapping[str, Any], untuned: Sequence[Sequence[Run]], groups: Sequence[Sequence[Run]]
) -> None:
    """Test accuracy: at the usual settings, and tuned against steps and seconds; several seeds as their median."""
    need("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 3)
    target = 100 * config["target"]
    an_epoch = config["train_samples"] // config["batch_size"]
    for runs in untuned:
        panels[0].plot(runs[0].steps, _percent(runs), **_style(runs[0].trial.optimizer))
    panels[0].axvline(an_epoch, color="black", linewidth=1, linestyle=":")
    panels[0].annotate("one epoch", (an_epoch, 2), textcoords="offset points", xytext=(4, 0), fontsize=9)
    panels[0].set_ylim(0, 100)
    panels[0].set_title("nobody tuned: usual rates, this package's defaults", fontsize=11)
    for runs in groups:
        style = _style(runs[0].trial.optimizer)
        panels[1].plot(runs[0].steps, _percent(runs), **style)
        panels[2].plot(_medians([run.seconds for run in runs]), _percent(runs), **style)
    for panel in panels[1:]:
        panel.axhline(target, color="black", linewidth=1, linestyle=":", label=f"target {target:.1f} %")
        panel.set_ylim(max(0.0, target - 12), min(100.0, target + 3))
    panels[1].set_title("each tuned on the same grid, by steps", fontsize=11)
    panels[2].set_title("each tuned on the same grid, by time", fontsize=11)
    for panel, quantity in zip(panels, ("steps", "steps", "seconds of training"), strict=True):
        panel.set_xlabel(quantity)
        panel.set_ylabel("test accuracy, %")
        panel.set_xlim(left=0)
        panel.grid(alpha=0.3)
    handles, names = panels[1].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False)
    figure.suptitle(_title(config))
    try:
        figure.savefig(path, dpi=110)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from None


def _style(name: str) -> dict[str, Any]:
    emended = is_emended(name)
    return {
        "color": COLOURS[name.removeprefix(PREFIX)],
        "linestyle": "-" if emended else (0, (4, 2)),
        "linewidth": 2.0 if emended else 1.3,
        "label": label(name),
    }


def _percent(runs: Sequence[Run]) -> list[float]:
    return [100 * accuracy for accuracy in _medians([run.test_accuracy for run in runs])]


def _table(title: str, *settings: str) -> Any:
    table = need("rich.table").Table(title=title)
    table.add_column("optimizer", no_wrap=True)
    for name in settings:
        table.add_column(name, justify="right")
    for name in ("final train loss", "test accuracy", "steps to target", "seconds to target", "ms a step"):
        table.add_column(name, justify="right")
    return table


def _figures(row: Row) -> tuple[str, ...]:
    steps = f"{row.steps:g}" if math.isfinite(row.steps) else "not reached"
    seconds = f"{row.seconds:.3f}" if math.isfinite(row.seconds) else "not reached"
    loss = "diverged" if not math.isfinite(row.train_loss) else f"{row.train_loss:.2g}"
    return loss, f"{row.test_accuracy:.2%}", steps, seconds, f"{row.ms_per_step:.2f}"


def _title(config: Mapping[str, Any]) -> str:
    seeds = config["seeds"]
    which = f"seed {seeds[0]}" if len(seeds) == 1 else f"median of {len(seeds)} seeds"
    return (
        f"{config['model']} on {config['data']} ({config['train_samples']:,} train, {config['test_samples']:,} test), "
        f"{config['epochs']} epochs, batch {config['batch_size']}, {which}, {config['device']}"
    )


def _medians(curves: Sequence[Sequence[float]]) -> list[float]:
    return [median(values) for values in zip(*curves, strict=True)]


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value


def _write(path: Path, content: bytes) -> None:
    try:
        path.write_bytes(content)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from None
