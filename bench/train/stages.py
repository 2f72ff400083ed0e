"""The stages: the grid search, the runs that count, the cost of a step. Each leaves CSV files that the next one
reads; rows of other tasks and optimizers in them are kept.

Steps do not depend on what else the machine does, so that grid search and runs share the cores out, one process and one
thread each. Seconds do: the cost of a step is measured in one process, all optimizers of a task in turns, and seconds
to the target are steps times that cost.
"""

from __future__ import annotations

import multiprocessing
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from consequentialism.errors import UserError, need
from consequentialism.experiments.data import Samples
from consequentialism.experiments.settings import Trial
from consequentialism.experiments.train import Run

from .. import table
from ..environment import environment
from . import claims as sweep
from .cost import step_costs
from .methods import METHODS, TRIALS, missing
from .rows import FILES, CurveRow, GridRow, RunRow, SkipRow, TimeRow
from .tasks import TASKS, VALIDATION, Task
from .tune import GRID_SEED, final_score, jump, rank, search, train


@dataclass(frozen=True)
class Plan:
    """What is asked for.

    Attributes:
        tasks: Names of tasks.
        optimizers: Names of optimizers; SGD is always timed, for the ratios.
        device: The device to train on.
        root: Folder of MNIST's files.
        seeds: Runs with the best trial.
        grid: Trials of each optimizer, at most.
        blocks: How many blocks of ten steps are timed.
        workers: Processes for grid search and runs.
        out: Folder of the CSV files.
    """

    tasks: tuple[str, ...]
    optimizers: tuple[str, ...]
    device: str
    root: Path
    seeds: int
    grid: int
    blocks: int
    workers: int
    out: Path

    def task(self, name: str) -> Task:
        """The task of that name."""
        return TASKS[name]

    def data(self, task: Task) -> Samples:
        """The task's data on the device."""
        return task.data(self.root).to(torch.device(self.device))


Job = tuple[str, str]  # a task and an optimizer, by name


def skipped(plan: Plan) -> list[SkipRow]:
    """Who cannot take part."""
    found = []
    for task in plan.tasks:
        for optimizer in plan.optimizers:
            reason = missing(METHODS[optimizer], plan.task(task).kinds)
            if reason is not None:
                found.append(SkipRow(task, optimizer, reason))
    return found


def tune(plan: Plan) -> None:
    """The grid search; writes ``grid.csv`` and ``skipped.csv``. An optimizer that raises is named there with its error,
    and the others go on without it."""
    skips = skipped(plan)
    kept = _kept(plan, "skipped.csv", _pairs(plan))
    _write(plan, "skipped.csv", [*kept, *skips])
    jobs = _jobs(plan, skips)
    rows = _kept(plan, "grid.csv", jobs)
    for job, found in _spread(plan, _tune, jobs, "grid search"):
        if isinstance(found, Exception):
            skips.append(SkipRow(job[0], job[1], f"failed: {type(found).__name__}: {str(found).splitlines()[0][:200]}"))
            print(f"skipped: {job[1]} on {job[0]}: {skips[-1].reason}", file=sys.stderr)
            _write(plan, "skipped.csv", [*kept, *skips])
            continue
        rows += found
        _write(plan, "grid.csv", sorted(rows, key=_order))


def run(plan: Plan) -> None:
    """The runs with the best trials of ``grid.csv``; writes ``runs.csv`` and ``curves.csv``."""
    best = winners(plan)
    rows, curves = _kept(plan, "runs.csv", best), _kept(plan, "curves.csv", best)
    jobs = [(task, optimizer, trial) for (task, optimizer), trial in best.items()]
    for job, found in _spread(plan, _run, jobs, "runs"):
        if isinstance(found, Exception):
            raise RuntimeError(f"{job[1]} on {job[0]} failed") from found
        some, evaluations = found
        rows += some
        curves += evaluations
        _write(plan, "runs.csv", sorted(rows, key=_order))
        _write(plan, "curves.csv", sorted(curves, key=_order))


def cost(plan: Plan) -> None:
    """The cost of a step of every best trial; writes ``times.csv``."""
    best = winners(plan)
    rows = _kept(plan, "times.csv", [*best, *((task, "sgd") for task in plan.tasks)])
    for name in _progress(plan.tasks, "cost of a step"):
        task = plan.task(name)
        trials = {optimizer: trial for (of, optimizer), trial in best.items() if of == name}
        trials.setdefault("sgd", Trial("sgd", 0.01))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            costs = step_costs(task, plan.data(task), trials, plan.blocks)
        here = asdict(environment(torch.device(plan.device).type))
        rows += [
            TimeRow(
                **here,
                task=name,
                optimizer=optimizer,
                lr=trials[optimizer].lr,
                damping=trials[optimizer].damping,
                ms=median(found.ms),
                start_ms=found.start_ms,
                p20_ms=found.quantile(0.2),
                p80_ms=found.quantile(0.8),
                ratio=found.ratio,
                blocks=len(found.ms),
            )
            for optimizer, found in costs.items()
        ]
        _write(plan, "times.csv", sorted(rows, key=_order))


def claims(plan: Plan) -> None:
    """The sweep behind the paper's claims, whatever the tasks; writes ``sweep.csv`` and ``smooth.csv``."""
    jobs = list(sweep.points())
    if plan.grid < TRIALS:
        jobs = [(trial, batch_size) for trial, batch_size in jobs if batch_size == sweep.SHOWN_BATCH]
    order = {job: index for index, job in enumerate(jobs)}
    rows: dict[int, sweep.SweepRow] = {}
    for (trial, _), row in _spread(plan, _sweep, jobs, "sweep"):
        if isinstance(row, Exception):
            raise RuntimeError(f"{trial} failed") from row
        rows[order[Trial(row.optimizer, row.lr, row.damping), row.batch_size]] = row
    found = [rows[index] for index in sorted(rows)]
    _write(plan, "sweep.csv", found)
    _write(plan, "smooth.csv", sweep.smooth_rows())


def _sweep(plan: Plan, trial: Trial, batch_size: int) -> sweep.SweepRow:
    return sweep.sweep_row(trial, batch_size)


STAGES: dict[str, Callable[[Plan], None]] = {"tune": tune, "run": run, "cost": cost, "claims": claims}


def winners(plan: Plan) -> dict[Job, Trial]:
    """The best trial of each task and optimizer, as the grid search left them in ``grid.csv``: its row ends "reached"
    with the fewest steps, or has the best score where the target was missed, see `rank`."""
    found: dict[Job, GridRow] = {}
    for row in table.read(plan.out / "grid.csv", GridRow):
        if row.task in plan.tasks and row.optimizer in plan.optimizers:
            key = (row.task, row.optimizer)
            task, best = TASKS[row.task], found.get(key)
            if best is None or _rank(task, row) < _rank(task, best):
                found[key] = row
    if not found:
        raise UserError(f"{plan.out / 'grid.csv'} has no row of these tasks and optimizers: run the stage tune first")
    return {key: Trial(row.optimizer, row.lr, row.damping) for key, row in found.items()}


def _rank(task: Task, row: GridRow) -> tuple[float, float]:
    return rank(task, row.steps, row.score, row.end)


def _jobs(plan: Plan, skips: Iterable[SkipRow]) -> list[Job]:
    out = {(skip.task, skip.optimizer) for skip in skips}
    return [pair for pair in _pairs(plan) if pair not in out]


def _pairs(plan: Plan) -> list[Job]:
    return [(task, name) for task in plan.tasks for name in plan.optimizers]


def _kept(plan: Plan, name: str, jobs: Collection[Job]) -> list[Any]:
    """The rows that the file has of other jobs than ``jobs``."""
    path = plan.out / name
    rows: list[Any] = table.read(path, FILES[name]) if path.exists() else []
    return [row for row in rows if (row.task, row.optimizer) not in jobs]


def _tune(plan: Plan, task_name: str, optimizer: str) -> list[GridRow]:
    task, method = plan.task(task_name), METHODS[optimizer]
    trials = method.trials("conv" in task.kinds)
    if len(trials) > plan.grid:  # evenly spread over the whole grid
        trials = tuple(trials[round((k + 0.5) * len(trials) / plan.grid - 0.5)] for k in range(plan.grid))
    _, outcomes = search(task, method, plan.data(task), trials)
    here = asdict(environment(torch.device(plan.device).type))
    return [
        GridRow(
            **here,
            task=task_name,
            optimizer=optimizer,
            lr=found.run.trial.lr,
            damping=found.run.trial.damping,
            seed=GRID_SEED,
            steps=found.steps,
            end=found.end,
            score=task.score(found.run, -1),
            trained=len(found.losses),
        )
        for found in outcomes
    ]


def _run(plan: Plan, task_name: str, optimizer: str, trial: Trial) -> tuple[list[RunRow], list[CurveRow]]:
    task, method = plan.task(task_name), METHODS[optimizer]
    data = plan.data(task).without_validation(VALIDATION)
    here = asdict(environment(torch.device(plan.device).type))
    rows, runs = [], []
    for seed in range(plan.seeds):
        found = train(task, method, data, trial, seed)
        rows.append(
            RunRow(
                **here,
                task=task_name,
                optimizer=optimizer,
                lr=trial.lr,
                damping=trial.damping,
                seed=seed,
                target=task.target,
                steps=found.steps,
                score=final_score(task, found.run),
                train_loss=found.run.final_train_loss,
                jump=jump(found.losses),
            )
        )
        runs.append(found.run)
    return rows, curve(task, optimizer, runs)


def curve(task: Task, optimizer: str, runs: Sequence[Run]) -> list[CurveRow]:
    """Medians over the runs that got as far."""
    found = []
    longest = max(runs, key=lambda run: len(run.steps))
    for index, step in enumerate(longest.steps):
        some = [run for run in runs if len(run.steps) > index]
        loss, score = median(run.train_loss[index] for run in some), median(task.score(run, index) for run in some)
        found.append(CurveRow(task.name, optimizer, step, loss, score))
    return found


def _order(row: Any) -> tuple[int, int]:
    """A row's place: as tasks and optimizers are listed."""
    return list(TASKS).index(row.task), list(METHODS).index(row.optimizer)


def _write(plan: Plan, name: str, rows: Sequence[Any]) -> None:
    table.write(rows, FILES[name], plan.out / name)


def _spread(
    plan: Plan, work: Callable[..., Any], jobs: Sequence[tuple[Any, ...]], label: str
) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Each job as it is done, with what ``work`` gave for it, or with the exception that it ended in.

    Raises:
        UserError: A job raised it.
    """
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(plan.workers, mp_context=spawn, initializer=_alone) as pool:
        futures = {pool.submit(work, plan, *job): job for job in jobs}
        try:
            for future in _progress(as_completed(futures), label, len(futures)):
                error = future.exception()
                if isinstance(error, (UserError, BrokenProcessPool)):
                    raise error
                yield futures[future], future.result() if error is None else error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _alone() -> None:
    """A worker's start: one thread, no warnings of peers."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")


def _progress(items: Iterable[Any], label: str, total: int | None = None) -> Iterable[Any]:
    return need("tqdm").tqdm(items, desc=label, total=total, mininterval=1.0)
