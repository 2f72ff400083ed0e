"""The stages of the recipes: the search, the runs that count and the cost of a step.

Every run is a line of ``recipes.csv``, written as it comes; a run that is there is not made again, so that what was cut
goes on where it stood. Runs go one after the other in this process.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from statistics import mean, median

import torch
from torch import Tensor, nn

from consequentialism.errors import need
from consequentialism.experiments.data import Samples
from consequentialism.experiments.settings import Schedule
from consequentialism.experiments.train import batches, class_loss, clock_for, step_count, timed_step

from .. import table
from ..environment import Environment, environment
from .recipes import EVALUATIONS, RECIPES, START, Recipe, Setting, prepare, trials

SEARCH_SEED = 100
PROBE = 256  # training samples of which the loss is reported
PIECE = 64  # samples that are evaluated at once
FILE = "recipes.csv"
TIMES = "recipe_times.csv"


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
    scores: str  # of all evaluations, evenly spread, the first before any step; infinity or 0 once it diverged

    @property
    def setting(self) -> Setting:
        """What was chosen."""
        return Setting(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Setting)})

    def curve(self) -> list[tuple[float, float]]:
        """Steps and scores."""
        found = [float(score) for score in self.scores.split()]
        return [(self.steps * k / (len(found) - 1), score) for k, score in enumerate(found)]


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


def rows_in(folder: Path, file: str = FILE) -> list[RecipeRow]:
    """The lines of a file; none where there is no such file."""
    path = folder / file
    return table.read(path, RecipeRow) if path.exists() else []


def row_of(
    bench: Bench,
    task: str,
    setting: Setting,
    seed: int,
    evaluations: int = EVALUATIONS,
    steps: int | None = None,
    file: str = FILE,
) -> RecipeRow:
    """A run's row: the one that is there, or that of a run now, which is added to the file.

    Args:
        bench: See there.
        task: Its name.
        setting: The optimizer's.
        seed: Of the initial weights and the order of the batches.
        evaluations: After the one before any step; the last is after the last step.
        steps: Of the schedule; None: ``bench.budget``.
        file: In ``bench.out``.
    """
    recipe = RECIPES[task]
    steps = bench.budget(recipe) if steps is None else steps
    for row in rows_in(bench.out, file):
        if (row.task, row.setting, row.seed, row.steps) == (task, setting, seed, steps):
            return row
    row = _train(bench, recipe, setting, seed, steps, evaluations)
    table.append(row, RecipeRow, bench.out / file)
    return row


def _train(bench: Bench, recipe: Recipe, setting: Setting, seed: int, steps: int, evaluations: int) -> RecipeRow:
    data, classes = bench.data(recipe)
    problem = recipe.problem(classes)
    model = problem.build(seed).to(bench.device)
    step = prepare(model, setting, problem.loss, recipe, steps, seed)
    epochs = math.ceil(steps / step_count(len(data.train_x), Schedule(1, recipe.batch_size, 1), 1))
    order = batches(len(data.train_x), Schedule(epochs, recipe.batch_size, steps), seed)
    scores = [_score(recipe, model, data.test_x, data.test_y)]
    bar = need("tqdm").tqdm(total=steps, desc=f"{recipe.name} {setting.optimizer}", mininterval=5.0, leave=False)
    for taken, rows in enumerate(islice(order, steps), 1):
        try:
            loss = step(data.train_x[rows.to(bench.device)], data.train_y[rows.to(bench.device)]).item()
        except torch.linalg.LinAlgError:
            loss = math.inf
        if not math.isfinite(loss):
            break
        bar.update()
        if taken * evaluations % steps == 0:
            scores.append(_score(recipe, model, data.test_x, data.test_y))
    bar.close()
    worst = math.inf if recipe.by_loss else 0.0
    finished = len(scores) == evaluations + 1 and math.isfinite(scores[-1])
    train_loss = _evaluated(model, data.train_x[:PROBE], data.train_y[:PROBE])[0] if finished else math.inf
    scores += [worst] * (evaluations + 1 - len(scores))
    return RecipeRow(
        **asdict(environment(torch.device(bench.device).type)),
        task=recipe.name,
        **asdict(setting),
        seed=seed,
        steps=steps,
        score=scores[-1] if finished else worst,
        train_loss=train_loss,
        scores=" ".join(f"{score:.4g}" for score in scores),
    )


def _score(recipe: Recipe, model: nn.Module, x: Tensor, y: Tensor) -> float:
    loss, accuracy = _evaluated(model, x, y)
    return loss if recipe.by_loss else accuracy


@torch.no_grad()
def _evaluated(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Mean loss, infinity where it is not finite, and the share of classes that are right."""
    model.eval()
    scores = torch.cat([model(piece) for piece in x.split(PIECE)])
    model.train()
    loss = class_loss(scores, y).item()
    return loss if math.isfinite(loss) else math.inf, (scores.argmax(-1) == y).double().mean().item()


def tune(bench: Bench) -> None:
    """The search of every optimizer."""
    for task in bench.tasks:
        for name in bench.optimizers:
            _search(bench, task, name)


def _search(bench: Bench, task: str, name: str) -> None:
    rows: list[RecipeRow] = []

    def best(given: list[Setting]) -> Setting:
        return better(RECIPES[task], rows).setting

    for setting in trials(RECIPES[task], name, best, bench.most):
        rows.append(row_of(bench, task, setting, SEARCH_SEED, evaluations=1))


def searched(bench: Bench, task: str) -> dict[str, Setting]:
    """The best setting of each optimizer that was searched with these steps."""
    recipe, found = RECIPES[task], {}
    rows = rows_in(bench.out)
    for name in bench.optimizers:
        own = [row for row in rows if _is_of(row, task, name, SEARCH_SEED, bench.budget(recipe))]
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


STAGES = {"tune": tune, "run": run, "cost": cost}
