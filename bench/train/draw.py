"""The pictures of the training benchmarks, from their CSV files alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from consequentialism.errors import UserError, need
from consequentialism.experiments.methods import FACTORIES
from consequentialism.experiments.settings import PREFIX

from .. import table
from . import grid_report
from .claims import BATCH_SIZES, LEARNT, RATES, SmoothRow, SweepRow, best, best_loss
from .head_to_head import BASE, DAMPINGS, EXPONENTS, PLAIN
from .methods import CHOLESKY, COORDINATES, METHODS, OUTPUTS, inside, is_own
from .recipe_stages import RecipeRow
from .recipes import LABELS, PLACINGS
from .rows import CurveRow
from .show import TASKS, Line, lines

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
GREY = {"color": "#bbbbbb", "linewidth": 0.8, "zorder": 1}
CEILING = 10.0  # losses above it are drawn as it


def style(optimizer: str) -> dict[str, Any]:
    """A line's colour and label; this package's forms have the colour of the plain optimizer and a thick line, in
    coordinates a dotted one."""
    own = is_own(optimizer)
    solid: Any = (0, (1, 1)) if optimizer.startswith((COORDINATES, CHOLESKY, OUTPUTS)) else "-"
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
        "curves.png": curves(table.read(source / "curves.csv", CurveRow), found),
        "seconds.png": seconds(found),
        "smooth.png": smooth(table.read(source / "smooth.csv", SmoothRow)),
        "settings.png": settings(sweep),
        "momentum.png": momentum(sweep),
    }
    points = grid_report.rows(source)
    if grid_report.shown(points):
        pictures[grid_report.PICTURE] = grid(points)
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


def curves(rows: Sequence[CurveRow], found: dict[str, list[Line]]) -> Any:
    """Fewer iterations: the test score over steps, a panel a task, medians over seeds.

    In colour the best plain optimizer, Muon, SOAP and the best of this package; the others are grey.
    """
    tasks = list(dict.fromkeys(row.task for row in rows))
    figure, panels = _figure(math.ceil(len(tasks) / 4), min(4, len(tasks)), 18, 4.4 * math.ceil(len(tasks) / 4))
    for panel, name in zip(panels, tasks, strict=False):
        task = TASKS[name]
        shown = highlighted(found.get(name, []))
        names = dict.fromkeys(row.optimizer for row in rows if row.task == name)
        for optimizer in sorted(names, key=lambda optimizer: optimizer in shown):
            mine = [row for row in rows if row.task == name and row.optimizer == optimizer]
            scores = [row.score if task.by_loss else 100 * row.score for row in mine]
            look = style(optimizer) if optimizer in shown else GREY
            panel.plot([row.step for row in mine], scores, **look)
        goal = task.target if task.by_loss else 100 * task.target
        panel.axhline(goal, color="black", linewidth=1, linestyle=":")
        panel.set_ylim((0.7 * goal, 2.5 * goal) if task.by_loss else (goal - 15, min(goal + 6, 100)))
        panel.set_title(task.title, fontsize=10)
        panel.set_xlabel("steps")
        panel.set_ylabel("test loss" if task.by_loss else "test accuracy, %")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8, framealpha=0.8, loc="upper right" if task.by_loss else "lower right")
    for panel in panels[len(tasks) :]:
        panel.set_axis_off()
    return figure


def highlighted(some: Sequence[Line]) -> set[str]:
    """Lines of one task's panel: the plain optimizer with the fewest steps, Muon, SOAP, our two with the fewest."""

    def fewest(lines: Sequence[Line], count: int) -> set[str]:
        sign = 1 if TASKS[some[0].task].by_loss else -1
        return {line.optimizer for line in sorted(lines, key=lambda line: (line.steps, sign * line.score))[:count]}

    plain = [line for line in some if line.optimizer in (*FACTORIES, "adamw")]
    own = [line for line in some if is_own(line.optimizer)]
    return fewest(plain, 1) | fewest(own, 2) | {line.optimizer for line in some if line.optimizer in ("muon", "soap")}


def seconds(found: dict[str, list[Line]]) -> Any:
    """Seconds to the target, a panel a task; a target that was missed has no bar, and says so."""
    figure, panels = _figure(math.ceil(len(found) / 4), min(4, len(found)), 18, 4.2 * math.ceil(len(found) / 4))
    for panel, (name, some) in zip(panels, found.items(), strict=False):
        for place, line in enumerate(reversed(some)):
            if math.isfinite(line.seconds):
                alpha = 1.0 if is_own(line.optimizer) else 0.45
                panel.barh(place, line.seconds, color=COLOURS[inside(line.optimizer)], alpha=alpha)
            else:
                panel.annotate("not reached", (0, place), (4, 0), textcoords="offset points", va="center", fontsize=7)
        panel.set_xlim(left=0)
        panel.set_ylim(-0.7, len(some) - 0.3)
        panel.set_yticks(range(len(some)), [METHODS[line.optimizer].label for line in reversed(some)], fontsize=7)
        panel.set_title(TASKS[name].title, fontsize=10)
        panel.set_xlabel("seconds to the target")
    for panel in panels[len(found) :]:
        panel.set_axis_off()
    return figure


def smooth(rows: Sequence[SmoothRow]) -> Any:
    """Smoother convergence: the loss over all training samples after every step; median and range of the seeds."""
    figure, panels = _figure(1, 3, 15, 4.2)
    for panel, base in zip(panels, ("sgd", "nag", "adam"), strict=True):
        for optimizer in (base, PREFIX + base):
            mine = [row for row in rows if row.optimizer == optimizer]
            by_step = [
                [row.loss if math.isfinite(row.loss) else CEILING for row in group]
                for _, group in itertools.groupby(sorted(mine, key=lambda row: row.step), key=lambda row: row.step)
            ]
            look, steps = style(optimizer), range(len(by_step))
            damping = "" if mine[0].damping is None else f", damping {mine[0].damping:g}"
            look["label"] += f", lr {mine[0].lr:g}{damping}"
            panel.plot(steps, [median(losses) for losses in by_step], **look)
            low, high = [min(losses) for losses in by_step], [max(losses) for losses in by_step]
            panel.fill_between(steps, low, high, color=look["color"], alpha=0.15, linewidth=0)
        panel.set_yscale("log")
        panel.set_xlabel("steps")
        panel.set_ylabel("training loss")
        panel.grid(alpha=0.3)
        panel.set_ylim(bottom=LEARNT)
        panel.legend(frameon=False, fontsize=9, loc="lower left")
    return figure


def _mark_learnt(panel: Any) -> None:
    """Say where losses are cut."""
    panel.axhline(LEARNT, color="black", linewidth=1, linestyle=":")
    panel.set_title(" ".join(filter(None, (panel.get_title(), f"(below {LEARNT:g} drawn as that)"))), fontsize=10)
    panel.set_ylim(bottom=0.6 * LEARNT)


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
        _mark_learnt(panel)
        panel.set_xlabel("octaves of the learning rate from the best")
        panel.set_ylabel("training loss at the end")
        panel.grid(alpha=0.3)
    panels[0].legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0, 0.08))
    return figure


def grid(rows: Sequence[RecipeRow]) -> Any:
    """The head-to-head grid: final validation losses, a panel an optimizer and placing.

    Green is better than the plain optimizer and purple worse; one scale an optimizer, cut at as much on either side.
    """
    names = grid_report.shown(rows)
    figure, panels = _figure(len(names), len(PLACINGS), 12, 3.6 * len(names))
    for index, (name, placing) in enumerate(itertools.product(names, PLACINGS)):
        panel = panels[index]
        losses = dict(grid_report.points(name, rows))
        plain = grid_report.mean_loss([row for row in rows if row.optimizer == PLAIN[name]])
        half = max(abs(plain - min(losses.values())), 1e-3)
        table_of = [[losses.get((placing, s, c), math.nan) for c in DAMPINGS] for s in EXPONENTS]
        shown = [[min(max(loss, plain - half), plain + half) for loss in line] for line in table_of]
        panel.imshow(shown, vmin=plain - half, vmax=plain + half, cmap="PRGn_r", aspect="auto")
        best = min(losses, key=lambda point: losses[point])
        for (i, s), (j, c) in itertools.product(enumerate(EXPONENTS), enumerate(DAMPINGS)):
            loss = table_of[i][j]
            if math.isnan(loss):
                continue
            dark = abs(min(loss, plain + half) - plain) > 0.6 * half
            panel.text(
                j, i, f"{loss:.3f}" if math.isfinite(loss) else "diverged",
                ha="center", va="center", fontsize=9, color="white" if dark else "black",
                weight="bold" if (placing, s, c) == best else "normal",
            )  # fmt: skip
            if (placing, s, c) == (BASE[name].placing, BASE[name].exponent, BASE[name].damping):
                edge = {"fill": False, "edgecolor": "black", "linewidth": 1.8}
                panel.add_patch(need("matplotlib.patches").Rectangle((j - 0.48, i - 0.48), 0.96, 0.96, **edge))
        panel.set_xticks(range(len(DAMPINGS)), [f"{damping:g}" for damping in DAMPINGS])
        panel.set_yticks(range(len(EXPONENTS)), [f"{exponent:g}" for exponent in EXPONENTS])
        panel.set_xlabel("damping")
        panel.set_ylabel("exponent")
        panel.set_title(f"{LABELS[name]}, {placing} ({LABELS[PLAIN[name]]} alone: {plain:.3f})", fontsize=10)
    steps = rows[0].steps
    figure.suptitle(
        f"nanoGPT, {steps} steps: validation loss. Green: better than the plain optimizer; purple: worse. "
        "Box: the default; bold: the best.",
        fontsize=10,
    )
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
    _mark_learnt(panels[0])
    panels[0].set_xticks([index + 0.3 for index in range(len(sizes))], [f"batch size {size}" for size in sizes])
    panels[0].set_ylabel("training loss at the end, best settings")
    panels[0].legend(frameon=False, fontsize=8)
    return figure
