"""The stages of the recipes: the search, the runs that count, the head-to-head grid and the cost of a step.

Every run is a line of ``recipes.csv``, written as it comes; a run that is there is not made again, so that what was cut
goes on where it stood. Runs go one after the other in this process.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median

import torch

from consequentialism.errors import need
from consequentialism.experiments.data import Samples
from consequentialism.experiments.settings import Schedule, Trial
from consequentialism.experiments.train import Run, clock_for, step_count, timed_step, training

from .. import table
from ..environment import Environment, environment
from .recipes import EVALUATIONS, PLACINGS, RECIPES, START, Recipe, Setting, prepare, trials

SEARCH_SEED = 100
GRID_SEEDS = (0, 1)
PROBE = 256  # training samples of which the loss is reported
FILE = "recipes.csv"
TIMES = "recipe_times.csv"
EXPONENTS = (0.125, 0.25, 0.5, 1.0)
DAMPINGS = (0.01, 0.03, 0.1, 0.3, 1.0)
REFRESHES = (1, 10, 50, 200)
MEMORIES = (0.0, 0.9, 0.95, 0.99)
BLOCKS = (64, 128, 512)  # the widest input of nanoGPT's layers is 512: that is no cut at all
GRID_TASK = "nanogpt"
GRID_OPTIMIZERS = ("coordinates-adamw", "coordinates-muon")


@dataclass(frozen=True)
class RecipeRow(Environment):
    """One run to the end of its schedule."""

    task: str
    optimizer: str
    lr: float
    aux_lr: float | None
    weight_decay: float
    damping: float | None
    exponent: float | None
    placing: str | None
    refresh_every: int | None
    memory: float | None
    block: int | None
    seed: int
    steps: int
    score: float  # validation loss, or accuracy, after the last step; infinity or 0 where it diverged
    train_loss: float  # likewise, on training samples
    scores: str  # of all evaluations, one every twentieth of the steps, the first before any

    @property
    def setting(self) -> Setting:
        """What was chosen."""
        return Setting(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Setting)})

    def curve(self) -> list[tuple[float, float]]:
        """Steps and scores."""
        found = [float(score) for score in self.scores.split()]
        return [(self.steps * k / EVALUATIONS, score) for k, score in enumerate(found)]


@dataclass(frozen=True)
class RecipeTimeRow(Environment):
    """What a step of a setting costs, all of a task in turns."""

    task: str
    optimizer: str
    ms: float  # a step, median over blocks of ten
    ratio: float  # to AdamW's, median over rounds
    blocks: int


@dataclass(frozen=True)
class Bench:
    """What the stages need to know.

    Attributes:
        folder: Of the data.
        out: Of the CSV files.
        device: To train on.
        tasks: Names of recipes whose data are there.
        optimizers: Names.
        steps: Of a schedule; None: the task's own.
        seeds: Runs that count.
        most: Trials of each optimizer.
        blocks: Of ten steps, in the timing.
    """

    folder: Path
    out: Path
    device: str
    tasks: Sequence[str]
    optimizers: Sequence[str]
    steps: int | None
    seeds: int
    most: int
    blocks: int

    def data(self, recipe: Recipe) -> tuple[Samples, int]:
        """On the device, and the number of classes."""
        samples, classes = recipe.data(self.folder)
        return samples.to(torch.device(self.device)), classes

    def budget(self, recipe: Recipe) -> int:
        """Steps, a multiple of the evaluations."""
        return max(round((self.steps or recipe.steps) / EVALUATIONS), 1) * EVALUATIONS


def better(recipe: Recipe, rows: Sequence[RecipeRow]) -> RecipeRow:
    """The row with the best score."""
    return min(rows, key=lambda row: row.score if recipe.by_loss else -row.score)


def row_of(bench: Bench, task: str, setting: Setting, seed: int) -> RecipeRow:
    """A run's row: the one that is there, or that of a run now, which is added to the file."""
    recipe = RECIPES[task]
    steps = bench.budget(recipe)
    path = bench.out / FILE
    for row in table.read(path, RecipeRow) if path.exists() else []:
        if (row.task, row.setting, row.seed, row.steps) == (task, setting, seed, steps):
            return row
    row = _train(bench, recipe, setting, seed, steps)
    table.append(row, RecipeRow, path)
    return row


def _train(bench: Bench, recipe: Recipe, setting: Setting, seed: int, steps: int) -> RecipeRow:
    data, classes = bench.data(recipe)
    run = Run(Trial(setting.optimizer, setting.lr, setting.damping), seed)
    epochs = math.ceil(steps / step_count(len(data.train_x), Schedule(1, recipe.batch_size, 1), 1))
    schedule = Schedule(epochs, recipe.batch_size, steps // EVALUATIONS)
    losses: list[float] = []
    progress = training(
        run,
        recipe.problem(classes),
        data,
        schedule,
        lambda model, trial, loss: prepare(model, setting, loss, recipe, steps, seed),
        PROBE,
    )
    label = f"{recipe.name} {setting.optimizer} {setting.lr:g}"
    bar = need("tqdm").tqdm(total=steps, desc=label, mininterval=5.0, leave=False)
    while len(losses) < steps:
        try:
            losses.append(next(progress))
        except torch.linalg.LinAlgError:
            losses.append(math.inf)
        bar.update()
        if not math.isfinite(losses[-1]):
            break
    bar.close()
    scores = run.test_loss if recipe.by_loss else run.test_accuracy
    worst = math.inf if recipe.by_loss else 0.0
    finished = len(losses) == steps and math.isfinite(losses[-1])
    return RecipeRow(
        **asdict(environment(torch.device(bench.device).type)),
        task=recipe.name,
        **asdict(setting),
        seed=seed,
        steps=steps,
        score=scores[-1] if finished else worst,
        train_loss=run.train_loss[-1] if finished else math.inf,
        scores=" ".join(f"{score:.4g}" for score in scores),
    )


def tune(bench: Bench) -> None:
    """The search of every optimizer."""
    for task in bench.tasks:
        for name in bench.optimizers:
            _search(bench, task, name)


def _search(bench: Bench, task: str, name: str) -> None:
    rows: list[RecipeRow] = []

    def best(given: list[Setting]) -> Setting:
        return better(RECIPES[task], rows).setting

    for setting in trials(name, best, bench.most):
        rows.append(row_of(bench, task, setting, SEARCH_SEED))


def searched(bench: Bench, task: str) -> dict[str, Setting]:
    """The best setting of each optimizer that was searched with these steps."""
    path = bench.out / FILE
    recipe, found = RECIPES[task], {}
    rows = table.read(path, RecipeRow) if path.exists() else []
    for name in bench.optimizers:
        own = [row for row in rows if _is_of(row, task, name, SEARCH_SEED, bench.budget(recipe))]
        own = [row for row in own if row.placing != "before"]
        if own:
            found[name] = better(recipe, own).setting
    return found


def _is_of(row: RecipeRow, task: str, name: str, seed: int, steps: int) -> bool:
    return (row.task, row.optimizer, row.seed, row.steps) == (task, name, seed, steps)


def run(bench: Bench) -> None:
    """The runs with the best settings, other seeds."""
    for task in bench.tasks:
        best = searched(bench, task)
        for seed in range(bench.seeds):
            for setting in best.values():
                row_of(bench, task, setting, seed)


def grid_settings() -> Iterator[Setting]:
    """The head-to-head grid: exponent, damping and placing, then what else there is, each with the defaults of the
    rest."""
    starts = [START[name] for name in GRID_OPTIMIZERS]
    change = dataclasses.replace
    for exponent in EXPONENTS:
        for damping in DAMPINGS:
            for placing in PLACINGS:
                for start in starts:
                    yield change(start, exponent=exponent, damping=damping, placing=placing)
    for start in starts:
        yield from (change(start, refresh_every=refresh) for refresh in REFRESHES)
        yield from (change(start, memory=memory) for memory in MEMORIES)
        yield from (change(start, block=block) for block in BLOCKS)


def grid(bench: Bench) -> None:
    """The head-to-head grid on nanoGPT, two seeds."""
    if GRID_TASK in bench.tasks:
        for seed in GRID_SEEDS:
            for setting in grid_settings():
                row_of(bench, GRID_TASK, setting, seed)


def cost(bench: Bench) -> None:
    """What a step costs with the settings that were found, AdamW's included; writes ``recipe_times.csv``."""
    path = bench.out / TIMES
    rows = [row for row in (table.read(path, RecipeTimeRow) if path.exists() else []) if row.task not in bench.tasks]
    for task in bench.tasks:
        rows += _costs(bench, task)
        table.write(rows, RecipeTimeRow, path)


def _costs(bench: Bench, task: str) -> list[RecipeTimeRow]:
    recipe = RECIPES[task]
    data, classes = bench.data(recipe)
    problem = recipe.problem(classes)
    settings = {"adamw": START["adamw"]} | searched(bench, task)
    size = recipe.batch_size
    batches = [(data.train_x[k * size : (k + 1) * size], data.train_y[k * size : (k + 1) * size]) for k in range(10)]
    steps, ms = {}, {name: [0.0] * 0 for name in settings}
    for name, setting in settings.items():
        model = problem.build(SEARCH_SEED).to(bench.device)
        steps[name] = prepare(model, setting, problem.loss, recipe, 10 * (bench.blocks + 1), 0)
    order = list(settings)
    clock = clock_for(torch.device(bench.device))
    for block in range(bench.blocks + 1):
        for name in order:
            seconds = [timed_step(steps[name], x, y, clock)[0] for x, y in batches]
            if block:  # the first warms up
                ms[name].append(1e3 * mean(seconds))
        order = order[1:] + order[:1]
    here = asdict(environment(torch.device(bench.device).type))
    return [
        RecipeTimeRow(
            **here,
            task=task,
            optimizer=name,
            ms=median(own),
            ratio=median(mine / plain for mine, plain in zip(own, ms["adamw"], strict=True)),
            blocks=bench.blocks,
        )
        for name, own in ms.items()
    ]


STAGES = {"tune": tune, "run": run, "cost": cost, "grid": grid}
