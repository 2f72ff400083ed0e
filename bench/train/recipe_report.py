"""What the report says of the recipes, the head-to-head grid and the cost of a step, from their CSV files alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from .. import table
from ..markdown import markdown, number, where
from . import grid_report, recipe_stages, step_cost
from .methods import CHOLESKY, COORDINATES, OUTPUTS
from .recipe_stages import SEARCH_SEED, RecipeRow, RecipeTimeRow
from .recipes import EVALUATIONS, LABELS, RECIPES, START, Kind, Recipe
from .step_cost import StepCostRow


def text(folder: Path, pictures: str) -> list[str]:
    """The sections of whatever files there are."""
    found = recipe_stages.rows_in(folder)
    parts: list[str] = []
    times = _times(folder)
    if found:
        parts += [
            "## Well-known tasks",
            'Measured by `make bench-train ARGS="--data FOLDER"`, with cosine schedules with warm-up, and gradients '
            "clipped to a norm of 1.",
            "Every optimizer may have eight trials. They have a seed of their own and search one knob after the other: "
            "the learning rate, the auxiliary rate of Muon's AdamW, in coordinates the damping (Muon's together with "
            "the exponent), and weight decay. The column *trials* says how many were made. In coordinates each pair of "
            "refresh (steps from one to the next) and block (the most inputs taken together) has a search of its own.",
            "*Steps to AdamW's end* is the share of the schedule after which a run is as good as AdamW is at its end: "
            "the first such point on the straight lines between the run's twenty evaluations, median over the seeds. "
            "Each run has the whole schedule; a shorter one would get there sooner. The cost of a step is measured for "
            "all optimizers in turns, on one thread, in processor time. CIFAR-10 is 12,000 of its training images, as "
            "JPEG, whose pixels differ slightly from the binary release.",
        ]
    for task in dict.fromkeys(row.task for row in found):
        for steps in sorted({row.steps for row in found if row.task == task}):
            own = [row for row in found if (row.task, row.steps) == (task, steps)]
            parts += _task(RECIPES[task], steps, own, times)
    parts += grid_report.text(folder, pictures)
    if (folder / step_cost.FILE).exists():
        parts += _costs(table.read(folder / step_cost.FILE, StepCostRow))
    return parts


FORMS = {  # of the optimizers in coordinates
    COORDINATES: "",
    CHOLESKY: ', `root="cholesky"`',
    OUTPUTS: ', `root="cholesky"`, `output_exponent=1/3`',
}


def overview(folder: Path) -> str:
    """README's table: when an optimizer in coordinates is as good as the plain one is at its end.

    Optimizers in coordinates have the package's default refresh and blocks; those in Cholesky's coordinates, and in
    coordinates of the outputs too, have lines of their own. Each task is shown with the longest schedule that several
    seeds ran; nothing where there is none.
    """
    found = recipe_stages.rows_in(folder)
    times = _times(folder)
    lines, shown = [], []
    tasks = dict.fromkeys(row.task for row in found)
    for task, (form, note) in itertools.product(tasks, FORMS.items()):
        recipe = RECIPES[task]
        several = [row.steps for row in found if row.task == task and row.seed not in (0, SEARCH_SEED)]
        own = [row for row in found if row.task == task and row.steps == max(several, default=0)]
        cells = []
        for name in ("adamw", "muon"):
            if form + name not in START:
                cells += ["", ""]
                continue
            kinds = START[form + name].kind, START[name].kind
            mine, other = (counted(own, kind) for kind in kinds)
            steps = share(recipe, mine, other)
            pair = [times.get((task, kind)) for kind in kinds]
            if math.isnan(steps) or pair[0] is None or pair[1] is None:
                break
            ends = (_score(recipe, median(row.score for row in some)) for some in (other, mine))
            seconds = steps * pair[0].ratio / pair[1].ratio
            cells += [" / ".join(ends), f"{number(steps, '.2f')} ({number(seconds, '.2f')})"]
            shown += [*other, *mine]
        else:
            if own:
                lines.append((f"{recipe.title}, {own[0].steps:,} steps{note}", *cells))
    if not lines:
        return ""
    headings = (
        "trained to the end of a schedule", "AdamW / in coordinates", "as good after: steps (seconds)",
        "Muon / in coordinates", "as good after: steps (seconds)",
    )  # fmt: skip
    note = (
        "Validation loss or test accuracy at the end, plain / in coordinates. *As good after* is when the optimizer in "
        "coordinates is as good as the plain one is at its end, as a share of the plain one's steps and, in brackets, "
        f"of its seconds. Medians over seeds. ({where(shown)})"
    )
    return f"{markdown(headings, lines)}\n\n{note}"


def _times(folder: Path) -> dict[tuple[str, Kind], RecipeTimeRow]:
    path = folder / recipe_stages.TIMES
    rows = table.read(path, RecipeTimeRow) if path.exists() else []
    return {(row.task, row.kind): row for row in rows}


def counted(own: Sequence[RecipeRow], kind: Kind) -> list[RecipeRow]:
    """A kind's runs that count: those of other seeds than the search's with the setting that won it, or that alone."""
    mine = [row for row in own if row.setting.kind == kind]
    searched = [row for row in mine if row.seed == SEARCH_SEED]
    if not searched:
        return []
    best = recipe_stages.better(RECIPES[mine[0].task], searched)
    return [row for row in mine if row.setting == best.setting and row.seed != SEARCH_SEED] or [best]


def share(recipe: Recipe, mine: Sequence[RecipeRow], other: Sequence[RecipeRow]) -> float:
    """The share of the schedule after which a run is as good as another's end; median over the seeds that both have."""
    ends = {row.seed: row.curve()[-1][1] for row in other}  # rounded as the evaluations are
    close = [row for row in mine if len(row.curve()) == EVALUATIONS + 1 and row.seed in ends]
    shares = [_reached(recipe, row, ends[row.seed]) / row.steps for row in close]
    return median(shares) if shares else math.nan


def _reached(recipe: Recipe, row: RecipeRow, goal: float) -> float:
    """Steps to the goal, on straight lines between evaluations; infinity where none is as good."""
    before, before_score = 0.0, goal  # a run that begins there needs no step
    for step, score in row.curve():
        if score <= goal if recipe.by_loss else score >= goal:
            if before_score == goal or not math.isfinite(before_score):
                return step
            return before + (step - before) * (goal - before_score) / (score - before_score)
        before, before_score = step, score
    return math.inf


def _task(
    recipe: Recipe, steps: int, own: Sequence[RecipeRow], times: dict[tuple[str, Kind], RecipeTimeRow]
) -> list[str]:
    found = {row.setting.kind for row in own}
    kinds = [kind for name in START for kind in sorted(kind for kind in found if kind[0] == name)]
    runs = {kind: some for kind in kinds if (some := counted(own, kind))}
    if not runs:
        return []
    headings = (
        "optimizer", "refresh, block", "lr", "auxiliary lr", "weight decay", "damping", "exponent", "trials",
        "validation loss" if recipe.by_loss else "test accuracy", "of the seeds", "training loss",
        "steps to AdamW's end", "to Muon's end", "ms a step / AdamW's",
    )  # fmt: skip
    trials = {kind: sum(row.setting.kind == kind and row.seed == SEARCH_SEED for row in own) for kind in runs}
    plain = START["adamw"].kind, START["muon"].kind
    lines = []
    for kind, some in runs.items():
        name, *rest = kind
        first = some[0]
        scores = [row.score for row in some]
        time = times.get((recipe.name, kind))
        lines.append(
            (
                LABELS[name],
                ", ".join(f"{value}" for value in rest if value is not None),
                f"{first.lr:g}",
                *("" if value is None else f"{value:g}" for value in (first.aux_lr, first.weight_decay)),
                *("" if value is None else f"{value:g}" for value in (first.damping, first.exponent)),
                str(trials[kind]),
                _score(recipe, median(scores)),
                "the search's alone"
                if first.seed == SEARCH_SEED
                else f"{len(some)}: {_score(recipe, min(scores))} to {_score(recipe, max(scores))}",
                f"{median(row.train_loss for row in some):.3f}",
                *(_share(recipe, some, runs.get(other, [])) for other in plain),
                "" if time is None else f"{time.ratio:.2f}",
            )
        )
    every = [row for some in runs.values() for row in some]
    notes = [f"Batches of {recipe.batch_size}; {where(every)}."]
    if steps < recipe.steps:
        notes.append(f"A short schedule: the task's own has {recipe.steps:,} steps.")
    if recipe.mark is not None:
        notes.append(f"Published: {recipe.mark[0]:g} ({recipe.mark[1]}).")
    fewer = [f"{_label(kind)} {trials[kind]}" for kind in runs if trials[kind] < max(trials.values())]
    if fewer:
        notes.append(f"Fewer trials than the others' {max(trials.values())} had: {', '.join(fewer)}.")
    at_border = [f"{which} of {_label(kind)}" for kind in runs for which in borders(own, kind)]
    if at_border:
        notes.append(f"The best value is at the border of what was tried: {', '.join(at_border)}.")
    return [f"### {recipe.title}, {steps:,} steps", " ".join(notes), markdown(headings, lines)]


def _label(kind: Kind) -> str:
    name, refresh_every, block = kind
    if kind in (START[name].kind, (name, None, None)):
        return LABELS[name]
    return f"{LABELS[name]} ({refresh_every}, {block})"


def borders(own: Sequence[RecipeRow], kind: Kind) -> list[str]:
    """Which values of a kind's best setting are the lowest or the highest that its search tried."""
    tried = [row for row in own if row.setting.kind == kind and row.seed == SEARCH_SEED]
    best = recipe_stages.better(RECIPES[tried[0].task], tried)
    found = []
    for knob, label in (("lr", "lr"), ("aux_lr", "auxiliary lr"), ("damping", "damping")):
        values = {value for row in tried if (value := getattr(row, knob)) is not None}
        if len(values) > 1 and getattr(best, knob) in (min(values), max(values)):
            found.append(f"{label} {getattr(best, knob):g}")
    return found


def _score(recipe: Recipe, score: float) -> str:
    return number(score, ".3f") if recipe.by_loss else f"{100 * score:.1f} %"


def _share(recipe: Recipe, mine: Sequence[RecipeRow], other: Sequence[RecipeRow]) -> str:
    found = share(recipe, mine, other)
    return "" if math.isnan(found) else number(found, ".2f")


def _costs(found: Sequence[StepCostRow]) -> list[str]:
    sizes = list(dict.fromkeys((row.rows, row.width) for row in found))
    names = list(dict.fromkeys(row.optimizer for row in found))
    headings = ("ms a step", *(f"N = {rows:,}, width {width}" for rows, width in sizes))
    by = {(row.optimizer, row.rows, row.width): row for row in found}
    lines = [(step_cost.LABELS[name], *(_cost(by[name, n, w]) for n, w in sizes)) for name in names]
    period, of_muon = (step_cost.PERIODS[name] for name in ("coordinates-adamw", "coordinates-muon"))
    return [
        "## What a step in coordinates costs",
        f'Measured by `make bench-train ARGS="--stage step-cost"`; {where(found)}.',
        f"A step is forward, backward and optimizer step of a transformer's block and a head. One step in {period} "
        f"refreshes the coordinates, with Muon one in {of_muon}. Figures are medians of {found[0].rounds} rounds in "
        "which the optimizers take turns. In brackets: the ratio to the optimizer inside, AdamW or Muon, as the sum of "
        "a step without refresh and what the refreshes add.",
        markdown(headings, lines),
    ]


def step_costs(folder: Path) -> str:
    """README's sentence: what a step in coordinates costs, as a multiple of the plain optimizer's; empty if untimed."""
    path = folder / step_cost.FILE
    found = table.read(path, StepCostRow) if path.exists() else []
    parts = []
    for rows, width in dict.fromkeys((row.rows, row.width) for row in found):
        ratios = {row.optimizer: row.ratio for row in found if (row.rows, row.width) == (rows, width)}
        shown = [f"{ratios[f'coordinates-{name}']:.2f} times {LABELS[name]}'s" for name in ("adamw", "muon")]
        parts.append(f"{' and '.join(shown)} at {rows:,} rows and width {width}")
    if not parts:
        return ""
    return f"A transformer block's whole step in coordinates costs {'; '.join(parts)}. ({where(found)})"


def _cost(row: StepCostRow) -> str:
    if row.optimizer not in step_cost.INSIDE:
        return f"{row.ms:.1f}"
    refreshes = max(row.ratio - row.ordinary_ratio, 0.0)  # medians: a little below 0 where they cost next to nothing
    return f"{row.ms:.1f} ({row.ratio:.2f} = {row.ordinary_ratio:.2f} + {refreshes:.2f})"
