"""What the report says of the recipes, the head-to-head grid and the cost of a step, from their CSV files alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from .. import table
from ..markdown import markdown, number, where
from . import step_cost, whole
from .recipes import LABELS, LEAN, PLACINGS, RECIPES, START, Recipe
from .step_cost import StepCostRow
from .whole import (
    BLOCKS,
    DAMPINGS,
    EXPONENTS,
    GRID_OPTIMIZERS,
    GRID_TASK,
    MEMORIES,
    REFRESHES,
    SEARCH_SEED,
    RecipeRow,
    RecipeTimeRow,
)

GRID_PICTURE = "grid.png"


def rows(folder: Path) -> list[RecipeRow]:
    """Of ``recipes.csv``; none where there is no such file."""
    path = folder / whole.FILE
    return table.read(path, RecipeRow) if path.exists() else []


def text(folder: Path, pictures: str) -> list[str]:
    """The sections of whatever files there are."""
    found = rows(folder)
    parts: list[str] = []
    times: dict[tuple[str, str], RecipeTimeRow] = {}
    if (folder / whole.TIMES).exists():
        times = {(row.task, row.optimizer): row for row in table.read(folder / whole.TIMES, RecipeTimeRow)}
    if found:
        parts += [
            "## Tasks that outsiders know",
            '`make bench-train ARGS="--data FOLDER"`; cosine schedules with warm-up, clipping to a norm of 1. '
            "Everybody may have eight trials, one knob after the other: the rate, the auxiliary rate of Muon's AdamW, "
            "weight decay, and in coordinates the damping. Steps to another's end are those of the first of twenty "
            "evaluations that is as good, each on the schedule of its own; a shorter schedule would get there sooner. "
            "The cost of a step is measured for all optimizers in turns, on one thread in the process's own time. "
            f"Lean: refreshed every {LEAN['refresh_every']} steps, blocks of {LEAN['block']}. CIFAR-10 is 12,000 of "
            "its training images, as JPEG, whose pixels differ slightly from the binary release.",
        ]
    for task in dict.fromkeys(row.task for row in found):
        for steps in sorted({row.steps for row in found if row.task == task}):
            own = [row for row in found if (row.task, row.steps) == (task, steps)]
            parts += _task(RECIPES[task], steps, own, times)
    parts += grid_text(found, pictures)
    if (folder / step_cost.FILE).exists():
        parts += _costs(table.read(folder / step_cost.FILE, StepCostRow))
    return parts


def counted(own: Sequence[RecipeRow], name: str) -> list[RecipeRow]:
    """An optimizer's runs that count: those of other seeds than the search's with the setting that won it, or that
    alone."""
    mine = [row for row in own if row.optimizer == name and row.placing != "before"]
    searched = [row for row in mine if row.seed == SEARCH_SEED]
    if not searched:
        return []
    best = whole.better(RECIPES[mine[0].task], searched)
    return [row for row in mine if row.setting == best.setting and row.seed != SEARCH_SEED] or [best]


def share(recipe: Recipe, mine: Sequence[RecipeRow], other: Sequence[RecipeRow]) -> float:
    """The share of the schedule after which a run is as good as another's end; median over the seeds that both have."""
    ends = {row.seed: row.curve()[-1][1] for row in other}  # rounded as the evaluations are
    shares = [_reached(recipe, row, ends[row.seed]) / row.steps for row in mine if row.seed in ends]
    return median(shares) if shares else math.nan


def _reached(recipe: Recipe, row: RecipeRow, goal: float) -> float:
    good = (step for step, score in row.curve() if (score <= goal if recipe.by_loss else score >= goal))
    return next(good, math.inf)


def _task(
    recipe: Recipe, steps: int, own: Sequence[RecipeRow], times: dict[tuple[str, str], RecipeTimeRow]
) -> list[str]:
    runs = {name: counted(own, name) for name in START}
    runs = {name: some for name, some in runs.items() if some}
    if not runs:
        return []
    headings = (
        "optimizer", "lr", "auxiliary lr", "weight decay", "damping", "exponent", "trials",
        "validation loss" if recipe.by_loss else "test accuracy", "of the seeds", "training loss",
        "steps to AdamW's end", "to Muon's", "ms a step, to AdamW's",
    )  # fmt: skip
    lines = []
    for name, some in runs.items():
        first = some[0]
        scores = [row.score for row in some]
        time = times.get((recipe.name, name))
        lines.append(
            (
                LABELS[name],
                f"{first.lr:g}",
                *("" if value is None else f"{value:g}" for value in (first.aux_lr, first.weight_decay)),
                *("" if value is None else f"{value:g}" for value in (first.damping, first.exponent)),
                str(sum(row.optimizer == name and row.seed == SEARCH_SEED for row in own)),
                _score(recipe, median(scores)),
                f"{len(some)}: {_score(recipe, min(scores))} to {_score(recipe, max(scores))}",
                f"{median(row.train_loss for row in some):.3f}",
                *(_share(recipe, some, runs.get(other, [])) for other in ("adamw", "muon")),
                "" if time is None else f"{time.ratio:.2f}",
            )
        )
    every = [row for some in runs.values() for row in some]
    mark = "" if recipe.mark is None else f" Published: {recipe.mark[0]:g} ({recipe.mark[1]})."
    return [
        f"### {recipe.title}, {steps:,} steps",
        f"Batches of {recipe.batch_size}; {where(every)}.{mark}",
        markdown(headings, lines),
    ]


def _score(recipe: Recipe, score: float) -> str:
    return number(score, ".3f") if recipe.by_loss else f"{100 * score:.1f} %"


def _share(recipe: Recipe, mine: Sequence[RecipeRow], other: Sequence[RecipeRow]) -> str:
    found = share(recipe, mine, other)
    return "" if math.isnan(found) else number(found, ".2f")


def grid_mean(found: Sequence[RecipeRow], name: str, **chosen: object) -> float:
    """The mean final loss over the grid's seeds of the runs with these values and the defaults of the rest."""
    wanted = {field: getattr(START[name], field) for field in ("exponent", "damping", "placing", "refresh_every",
        "memory", "block", "lr", "aux_lr", "weight_decay")} | chosen  # fmt: skip
    scores = [
        row.score
        for row in found
        if row.task == GRID_TASK
        and row.optimizer == name
        and row.seed in whole.GRID_SEEDS
        and all(getattr(row, field) == value for field, value in wanted.items())
    ]
    return sum(scores) / len(scores) if scores else math.nan


def grid_steps(found: Sequence[RecipeRow]) -> int | None:
    """The schedule's steps of which the grid has the most runs."""
    counts = [row.steps for row in found if row.placing == "before" and row.seed in whole.GRID_SEEDS]
    return max(set(counts), key=counts.count) if counts else None


def grid_text(found: Sequence[RecipeRow], pictures: str) -> list[str]:
    """The head-to-head grid: one table an optimizer and placing, and one of the rest."""
    steps = grid_steps(found)
    if steps is None:
        return []
    own = [row for row in found if row.steps == steps and row.task == GRID_TASK]
    parts = [
        "## Exponent, damping and placing, head to head",
        f'`make bench-train ARGS="--stage grid --task {GRID_TASK} --steps {steps} --data FOLDER"`; '
        f"{RECIPES[GRID_TASK].title}, {steps:,} steps, at one rate an optimizer: "
        + ", ".join(f"{LABELS[name]} {START[name].lr:g}" for name in GRID_OPTIMIZERS)
        + ". Final validation loss, mean of the seeds that were run; empty: not run yet. Around: `g S` goes in and the "
        "answer is multiplied by `S`; before: `g S` goes in and the answer is applied as it is.",
    ]
    for name in GRID_OPTIMIZERS:
        headings = (f"{LABELS[name]}: placing, exponent", *(f"damping {damping:g}" for damping in DAMPINGS))
        lines = [
            (
                f"{placing}, {exponent:g}",
                *(_cell(grid_mean(own, name, placing=placing, exponent=exponent, damping=d)) for d in DAMPINGS),
            )
            for placing in PLACINGS
            for exponent in EXPONENTS
        ]
        parts.append(markdown(headings, lines))
    for field, values in (("refresh_every", REFRESHES), ("memory", MEMORIES), ("block", BLOCKS)):
        lines = [
            (LABELS[name], *(_cell(grid_mean(own, name, **{field: value})) for value in values))
            for name in GRID_OPTIMIZERS
        ]
        if any(cell for line in lines for cell in line[1:]):
            parts.append(markdown((f"`{field}`", *(f"{value:g}" for value in values)), lines))
    return [*parts, f"![Validation loss by exponent, damping and placing]({pictures}/{GRID_PICTURE})"]


def _cell(value: float) -> str:
    return "" if math.isnan(value) else number(value, ".3f")


def _costs(found: Sequence[StepCostRow]) -> list[str]:
    sizes = list(dict.fromkeys((row.rows, row.width) for row in found))
    names = list(dict.fromkeys(row.optimizer for row in found))
    headings = ("ms a step (to the optimizer inside)", *(f"N = {rows:,}, width {width}" for rows, width in sizes))
    by = {(row.optimizer, row.rows, row.width): row for row in found}
    lines = [
        (step_cost.LABELS[name], *(f"{by[name, n, w].ms:.1f} ({by[name, n, w].ratio:.2f})" for n, w in sizes))
        for name in names
    ]
    return [
        "## What a step in coordinates costs",
        f'`make bench-train ARGS="--stage step-cost"`; forward, backward and step of a transformer\'s block and a '
        f"head, one step in {step_cost.PERIOD} refreshing; medians of {found[0].rounds} rounds in which the "
        f"optimizers take turns; {where(found)}.",
        markdown(headings, lines),
    ]
