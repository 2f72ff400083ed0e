"""What the report says of the head-to-head grid, from its CSV file alone."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean

from ..markdown import markdown, where
from . import head_to_head, recipe_stages
from .head_to_head import BASE, BLOCKS, DAMPINGS, EXPONENTS, MEMORIES, OPTIMIZERS, PLAIN, REFRESHES, TASK, runs
from .recipe_stages import RecipeRow
from .recipes import LABELS, PLACINGS, RECIPES, Placing

PICTURE = "grid.png"
Point = tuple[Placing, float, float]  # placing, exponent, damping


def rows(folder: Path) -> list[RecipeRow]:
    """The runs that count, of the longest schedule that was run and of the seeds with the most runs, so that every
    mean is over the same seeds; none where there is no such file."""
    found = head_to_head.counted(recipe_stages.rows_in(folder, head_to_head.FILE))
    counts = Counter(row.seed for row in found)
    return [row for row in found if counts[row.seed] == max(counts.values())]


def points(name: str, found: Sequence[RecipeRow]) -> Iterator[tuple[Point, float]]:
    """The points of an optimizer's grid that were run and their final losses, means over the seeds."""
    for placing in PLACINGS:
        for exponent in EXPONENTS:
            for damping in DAMPINGS:
                loss = mean_loss(runs(found, name, placing=placing, exponent=exponent, damping=damping))
                if not math.isnan(loss):
                    yield (placing, exponent, damping), loss


def shown(found: Sequence[RecipeRow]) -> list[str]:
    """The optimizers of whose grid a point was run."""
    return [name for name in OPTIMIZERS if any(points(name, found))]


def mean_loss(some: Sequence[RecipeRow]) -> float:
    """Infinity where one of the runs diverged, NaN where there are none."""
    return mean(row.score for row in some) if some else math.nan


def text(folder: Path, pictures: str) -> list[str]:
    """The section: a table an optimizer, one for each of the rest, and the picture."""
    found = rows(folder)
    if not found:
        return []
    walks = head_to_head.walked(recipe_stages.rows_in(folder, head_to_head.FILE))
    steps, seeds, base = found[0].steps, len({row.seed for row in found}), BASE[OPTIMIZERS[0]]
    asked = f"--stage grid --task {TASK} --steps {steps} --seeds {seeds} --data FOLDER"
    parts = [
        "## Exponent, damping and placing, head to head",
        f'Measured by `make bench-train ARGS="{asked}"`; {RECIPES[TASK].title}, a schedule of {steps:,} steps; '
        f"{where(found)}.",
        "The tables show the final validation loss, "
        f"{'of one seed' if seeds == 1 else f'the mean of {seeds} seeds'}. An empty cell was not run; *diverged* means "
        "that a loss was not finite. With the placing *around*, the optimizer gets `g S` and its answer is multiplied "
        "by `S`; with *before*, it gets `g S` and its answer is applied as it is.",
        "The rate of each optimizer, placing and exponent comes from a walk over octaves, with a seed of its own, at "
        f"damping {head_to_head.TUNED_DAMPING:g}; the plain optimizer's rate comes from the same walk. Where a number "
        "of steps is given beside a rate, the walk had a shorter schedule, whose best rate need not be the best of the "
        "whole one. The auxiliary rate and weight decay are those that the searches above begin with. Except in the "
        f"tables about these settings, both optimizers are refreshed every {base.refresh_every} steps, in blocks of "
        f"{base.block}, with a memory of {base.memory:g}.",
    ]
    for name in shown(found):
        headings = (f"{LABELS[name]}: placing, exponent", "lr", *(f"damping {damping:g}" for damping in DAMPINGS))
        lines = []
        for placing in PLACINGS:
            for exponent in EXPONENTS:
                cells = [runs(found, name, placing=placing, exponent=exponent, damping=d) for d in DAMPINGS]
                setting = dataclasses.replace(BASE[name], placing=placing, exponent=exponent)
                lr, walk = walks.get(head_to_head.beginning(setting), (math.nan, steps))
                rate = f"{lr:g}" if walk == steps else f"{lr:g} ({walk} steps)"
                lines.append(
                    (f"{placing}, {exponent:g}", "" if math.isnan(lr) else rate, *(_cell(some) for some in cells))
                )
        parts += [markdown(headings, lines), _verdict(name, found)]
    for field, values in (("refresh_every", REFRESHES), ("memory", MEMORIES), ("block", BLOCKS)):
        lines = [(LABELS[name], *(_cell(runs(found, name, **{field: v})) for v in values)) for name in OPTIMIZERS]
        if any(sum(map(bool, line[1:])) > 1 for line in lines):  # more than the default
            parts.append(markdown((f"`{field}`", *(f"{value:g}" for value in values)), lines))
    return [*parts, f"![Validation loss by exponent, damping and placing]({pictures}/{PICTURE})"]


def _cell(some: Sequence[RecipeRow]) -> str:
    loss = mean_loss(some)
    if math.isnan(loss):
        return ""
    return f"{loss:.3f}" if math.isfinite(loss) else "diverged"


def _verdict(name: str, found: Sequence[RecipeRow]) -> str:
    """The best point, whether it lies at a border, and where the plain optimizer and the default stand."""
    start = BASE[name]
    all_points = dict(points(name, found))
    best = min(all_points, key=lambda point: all_points[point])
    borders = [
        f"{field} {value:g}"
        for field, value, values in (("exponent", best[1], EXPONENTS), ("damping", best[2], DAMPINGS))
        if value in (values[0], values[-1])
    ]
    plain = mean_loss([row for row in found if row.optimizer == PLAIN[name]])
    defaults = runs(found, name)
    default = mean_loss(defaults)
    better = sum(loss < default for loss in all_points.values())
    return (
        f"{LABELS[PLAIN[name]]} alone: {plain:.3f}. Best: {best[0]}, exponent {best[1]:g}, damping {best[2]:g}, "
        f"{all_points[best]:.3f}, "
        + (f"at the grid's border ({', '.join(borders)})" if borders else "within the grid")
        + f". The package's defaults, {start.placing}, exponent {start.exponent:g}, damping {start.damping:g}: "
        + ("not run." if math.isnan(default) else f"{_cell(defaults)}; {better} of the other points are better.")
    )
