"""The pictures of the training benchmarks, from their CSV files alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from consequentialism.errors import UserError, need
from consequentialism.experiments.settings import PREFIX

from .. import table
from . import recipe_report
from .claims import BATCH_SIZES, LEARNT, RATES, SmoothRow, SweepRow, best, best_loss
from .methods import COORDINATES, METHODS, inside, is_own
from .recipes import LABELS, PLACINGS
from .rows import CurveRow
from .show import TASKS, Line, lines
from .whole import DAMPINGS, EXPONENTS, GRID_OPTIMIZERS, RecipeRow

COLOURS = {
    "sgd": "#d62728",
    "nag": "#ff7f0e",
    "rmsprop": "#2ca02c",
    "adam": "#1f77b4",
    "adamw": "#17becf",
    "muon": "#9467bd",
    "soap": "#8c564b",
    "isaac": "#e377c2",
    "singd": "#7f7f7f",
    "kfac": "#bcbd22",
}
CEILING = 10.0  # losses above it are drawn as it


def style(optimizer: str) -> dict[str, Any]:
    """A line's colour and label; this package's forms have the colour of the plain optimizer and a thick line, in
    coordinates a dotted one."""
    own = is_own(optimizer)
    solid: Any = (0, (1, 1)) if optimizer.startswith(COORDINATES) else "-"
    return {
        "color": COLOURS[inside(optimizer)],
        "linestyle": solid if own else (0, (4, 2)),
        "linewidth": 2.2 if own else 1.2,
        "label": METHODS[optimizer].label,
    }


def draw(source: Path, folder: Path) -> list[Path]:
    """Draw every picture of the CSV files in ``source``; returns their paths in ``folder``.

    Raises:
        UserError: A file is missing or has another schema, or the folder cannot be written.
    """
    found = lines(source)
    sweep = table.read(source / "sweep.csv", SweepRow)
    pictures = {
        "curves.png": curves(table.read(source / "curves.csv", CurveRow)),
        "seconds.png": seconds(found),
        "smooth.png": smooth(table.read(source / "smooth.csv", SmoothRow)),
        "settings.png": settings(sweep),
        "momentum.png": momentum(sweep),
    }
    found_recipes = recipe_report.rows(source)
    if recipe_report.grid_steps(found_recipes) is not None:
        pictures[recipe_report.GRID_PICTURE] = grid(found_recipes)
    paths = []
    for name, figure in pictures.items():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            figure.savefig(folder / name, dpi=90)
        except OSError as error:
            raise UserError(f"{folder / name} cannot be written: {error.strerror or error}") from None
        paths.append(folder / name)
    return paths


def _figure(rows: int, columns: int, width: float, height: float) -> tuple[Any, list[Any]]:
    figure = need("matplotlib.figure").Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def curves(rows: Sequence[CurveRow]) -> Any:
    """Fewer iterations: the test score over steps, a panel a task, medians over seeds."""
    tasks = list(dict.fromkeys(row.task for row in rows))
    figure, panels = _figure(math.ceil(len(tasks) / 4), min(4, len(tasks)), 18, 4.2 * math.ceil(len(tasks) / 4))
    for panel, name in zip(panels, tasks, strict=False):
        task = TASKS[name]
        for optimizer in dict.fromkeys(row.optimizer for row in rows if row.task == name):
            mine = [row for row in rows if row.task == name and row.optimizer == optimizer]
            scores = [row.score if task.by_loss else 100 * row.score for row in mine]
            panel.plot([row.step for row in mine], scores, **style(optimizer))
        goal = task.target if task.by_loss else 100 * task.target
        panel.axhline(goal, color="black", linewidth=1, linestyle=":")
        panel.set_ylim((0.7 * goal, 2.5 * goal) if task.by_loss else (goal - 15, min(goal + 6, 100)))
        panel.set_title(task.title, fontsize=10)
        panel.set_xlabel("steps")
        panel.set_ylabel("test loss" if task.by_loss else "test accuracy, %")
        panel.grid(alpha=0.3)
    for panel in panels[len(tasks) :]:
        panel.set_axis_off()
    names: dict[str, Any] = {}
    for panel in panels:
        handles, labels = panel.get_legend_handles_labels()
        names |= dict(zip(labels, handles, strict=True))
    figure.legend(list(names.values()), list(names), loc="outside lower center", ncols=8, frameon=False)
    return figure


def seconds(found: dict[str, list[Line]]) -> Any:
    """Seconds to the target, a panel a task; a cross stands for a target that was missed."""
    figure, panels = _figure(math.ceil(len(found) / 4), min(4, len(found)), 18, 4.2 * math.ceil(len(found) / 4))
    for panel, (name, some) in zip(panels, found.items(), strict=False):
        for place, line in enumerate(reversed(some)):
            colour = COLOURS[inside(line.optimizer)]
            if math.isfinite(line.seconds):
                panel.barh(place, line.seconds, color=colour, alpha=1.0 if is_own(line.optimizer) else 0.45)
            else:
                panel.plot([0], [place], "x", color=colour)
        panel.set_yticks(range(len(some)), [METHODS[line.optimizer].label for line in reversed(some)], fontsize=7)
        panel.set_title(TASKS[name].title, fontsize=10)
        panel.set_xlabel("seconds to the target")
    for panel in panels[len(found) :]:
        panel.set_axis_off()
    return figure


def smooth(rows: Sequence[SmoothRow]) -> Any:
    """Smoother convergence: the loss over all training samples after every step, plain beside emended."""
    figure, panels = _figure(1, 3, 15, 4.2)
    for panel, base in zip(panels, ("sgd", "nag", "adam"), strict=True):
        for optimizer in (base, PREFIX + base):
            mine = [row for row in rows if row.optimizer == optimizer]
            panel.plot([row.step for row in mine], [max(row.loss, LEARNT) for row in mine], **style(optimizer))
        panel.set_yscale("log")
        panel.set_xlabel("steps")
        panel.set_ylabel("training loss")
        panel.grid(alpha=0.3)
        panel.legend(frameon=False)
    return figure


def settings(rows: Sequence[SweepRow]) -> Any:
    """Less dependence on hyper-parameters: the final loss over the learning rate, a panel a batch size."""
    sizes = sorted({row.batch_size for row in rows})
    figure, panels = _figure(1, len(sizes), 5.5 * len(sizes), 4.5)
    for panel, size in zip(panels, sizes, strict=True):
        for optimizer in RATES:
            mine = [row for row in rows if row.optimizer == optimizer and row.batch_size == size]
            chosen = best(mine, optimizer, size)
            shown = sorted((row for row in mine if row.damping == chosen.damping), key=lambda row: row.lr)
            octaves = [math.log2(row.lr / chosen.lr) for row in shown]
            panel.plot(octaves, [min(max(row.loss, LEARNT), CEILING) for row in shown], **style(optimizer))
        panel.set_yscale("log")
        panel.set_title(f"batch size {size}", fontsize=10)
        panel.set_xlabel("octaves of the learning rate from the best")
        panel.set_ylabel("training loss at the end")
        panel.grid(alpha=0.3)
    panels[0].legend(frameon=False, fontsize=8)
    return figure


def grid(rows: Sequence[RecipeRow]) -> Any:
    """The head-to-head grid: final validation losses, a panel an optimizer and placing, one scale an optimizer."""
    steps = recipe_report.grid_steps(rows)
    own = [row for row in rows if row.steps == steps]
    figure, panels = _figure(len(GRID_OPTIMIZERS), len(PLACINGS), 11, 3.4 * len(GRID_OPTIMIZERS))
    for index, (name, placing) in enumerate(itertools.product(GRID_OPTIMIZERS, PLACINGS)):
        values = {
            where: [
                [recipe_report.grid_mean(own, name, placing=where, exponent=s, damping=c) for c in DAMPINGS]
                for s in EXPONENTS
            ]
            for where in PLACINGS
        }
        known = [v for table in values.values() for line in table for v in line if math.isfinite(v)]
        panel = panels[index]
        if known:
            panel.imshow(values[placing], vmin=min(known), vmax=max(known), cmap="viridis_r", aspect="auto")
        for i, line in enumerate(values[placing]):
            for j, value in enumerate(line):
                if math.isfinite(value):
                    panel.text(j, i, f"{value:.3f}", ha="center", va="center", fontsize=8)
        panel.set_xticks(range(len(DAMPINGS)), [f"{damping:g}" for damping in DAMPINGS])
        panel.set_yticks(range(len(EXPONENTS)), [f"{exponent:g}" for exponent in EXPONENTS])
        panel.set_xlabel("damping")
        panel.set_ylabel("exponent")
        panel.set_title(f"{LABELS[name]}, {placing}", fontsize=10)
    return figure


def momentum(rows: Sequence[SweepRow]) -> Any:
    """Less need for momentum: the best final loss with and without it."""
    figure, panels = _figure(1, 1, 7, 4)
    sizes = [size for size in BATCH_SIZES if any(row.batch_size == size for row in rows)]
    for place, optimizer in enumerate(("sgd", "nag", "emended-sgd", "emended-nag")):
        heights = [best_loss(list(rows), optimizer, size) for size in sizes]
        colour = style(optimizer)["color"]
        alpha = 1.0 if optimizer.startswith(PREFIX) else 0.45
        left = [index + 0.2 * place for index in range(len(sizes))]
        panels[0].bar(left, heights, 0.18, color=colour, alpha=alpha, label=METHODS[optimizer].label)
    panels[0].set_yscale("log")
    panels[0].set_xticks([index + 0.3 for index in range(len(sizes))], [f"batch size {size}" for size in sizes])
    panels[0].set_ylabel("training loss at the end, best settings")
    panels[0].legend(frameon=False, fontsize=8)
    return figure
