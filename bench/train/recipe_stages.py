"""The stages of the recipes: the search, the runs that count and the cost of a step.

Every run is a line of ``recipes.csv``, written when the run ends. A run that is already in the file is not repeated, so
an interrupted stage goes on where it stopped. Runs go one after the other in this process.
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
from consequentialism.experiments.methods import Step
from consequentialism.experiments.settings import Schedule
from consequentialism.experiments.train import batches, class_loss, clock_for, step_count, timed_step

from .. import table
from ..environment import Environment, environment
from .recipes import EVALUATIONS, RECIPES, START, Kind, Recipe, Setting, prepare, start, trials

SEARCH_SEED = 100
PROBE = 256  # training samples of which the loss is reported
PIECE = 64  # samples that are evaluated at once
TURN = 10  # steps that are timed before it is the next optimizer's turn
TURNS = 5  # of a round, whose 50 steps hold whole numbers of refreshes, one in 10 or 25
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
    train_loss: float  # the loss on training samples after the last step
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
    refresh_every: int | None
    block: int | None
    ms: float  # a step, median over rounds of fifty
    ratio: float  # to AdamW's, median over rounds
    blocks: int

    @property
    def kind(self) -> Kind:
        """The kind of the row's setting."""
        return self.optimizer, self.refresh_every, self.block


@dataclass(frozen=True)
class Bench:
    """What the stages need to know.

    Attributes:
        folder: The folder of the data.
        out: The folder of the CSV files.
        device: The device to train on.
        tasks: Names of recipes whose data are there.
        optimizers: Names.
        steps: The length of a schedule; None: the task's own.
        seeds: Runs that count.
        most: Trials of each optimizer.
        blocks: Rounds of the timing.
        refresh_every: The steps from one refresh to the next in a search in coordinates; None: the package's default.
        block: The most inputs that are taken together in such a search; None: the package's default.
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
    refresh_every: int | None = None
    block: int | None = None

    def data(self, recipe: Recipe) -> tuple[Samples, int]:
        """The task's data on the device, and the number of classes."""
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
    """A run's row: read from the file, or made by a run now and added to the file.

    Args:
        bench: Folders, device and settings.
        task: The task's name.
        setting: The optimizer and its settings.
        seed: The seed of the initial weights and of the order of the batches.
        evaluations: How many evaluations follow the one before any step; the last is after the last step.
        steps: The length of the schedule; None: ``bench.budget``.
        file: The CSV file's name in ``bench.out``.
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

    first = start(RECIPES[task], name, bench.refresh_every, bench.block)
    for setting in trials(first, best, bench.most):
        rows.append(row_of(bench, task, setting, SEARCH_SEED, evaluations=1))


def searched(bench: Bench, task: str) -> list[Setting]:
    """The best setting of each kind that was searched with these steps, one optimizer after the other."""
    recipe = RECIPES[task]
    wanted = (task, SEARCH_SEED, bench.budget(recipe))
    rows = [row for row in rows_in(bench.out) if (row.task, row.seed, row.steps) == wanted]
    kinds = dict.fromkeys(row.setting.kind for name in bench.optimizers for row in rows if row.optimizer == name)
    return [better(recipe, [row for row in rows if row.setting.kind == kind]).setting for kind in kinds]


def run(bench: Bench) -> None:
    """The runs with the best settings, other seeds."""
    for task in bench.tasks:
        best = searched(bench, task)
        for seed in range(bench.seeds):
            for setting in best:
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
    adamw = START["adamw"]
    settings = {adamw.kind: adamw} | {setting.kind: setting for setting in searched(bench, task)}
    size = recipe.batch_size
    batches = [(data.train_x[k * size : (k + 1) * size], data.train_y[k * size : (k + 1) * size]) for k in range(TURN)]
    steps: dict[Kind, Step] = {}
    ms: dict[Kind, list[float]] = {kind: [] for kind in settings}
    for kind, setting in settings.items():
        model = problem.build(SEARCH_SEED).to(bench.device)
        steps[kind] = prepare(model, setting, problem.loss, recipe, TURN * (TURNS * bench.blocks + 1), 0)
    order = list(settings)
    clock = clock_for(torch.device(bench.device))
    for turn in range(TURNS * bench.blocks + 1):
        for kind in order:
            seconds = [timed_step(steps[kind], x, y, clock)[0] for x, y in batches]
            if turn:  # the first warms up
                ms[kind].append(1e3 * mean(seconds))
        order = order[1:] + order[:1]
    rounds = {kind: [mean(own[k : k + TURNS]) for k in range(0, len(own), TURNS)] for kind, own in ms.items()}
    here = asdict(environment(torch.device(bench.device).type))
    return [
        RecipeTimeRow(
            **here,
            task=task,
            optimizer=kind[0],
            refresh_every=kind[1],
            block=kind[2],
            ms=median(own),
            ratio=median(mine / plain for mine, plain in zip(own, rounds[adamw.kind], strict=True)),
            blocks=bench.blocks,
        )
        for kind, own in rounds.items()
    ]


STAGES = {"tune": tune, "run": run, "cost": cost}
