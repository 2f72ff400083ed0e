"""What a step costs: all optimizers of a task take turns in one process, so that drift of the machine cancels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import mean, median

import torch

from consequentialism.experiments.data import Samples
from consequentialism.experiments.settings import Trial
from consequentialism.experiments.train import clock_for, timed_step

from .methods import METHODS
from .tasks import Task

BLOCK = 10  # steps; what SOAP, SINGD and K-FAC do every tenth step happens once in each block
SEED = 200


@dataclass(frozen=True)
class Cost:
    """Milliseconds a step: one entry a block.

    Args:
        start_ms: What a run's first block takes beyond a later one; emended coordinates refresh more often there.
    """

    ms: list[float]
    start_ms: float
    ratio: float

    def quantile(self, share: float) -> float:
        """The blocks' quantile, between 0 and 1."""
        return sorted(self.ms)[min(int(share * len(self.ms)), len(self.ms) - 1)]


def step_costs(task: Task, data: Samples, trials: Mapping[str, Trial], blocks: int) -> dict[str, Cost]:
    """The cost of every optimizer's step, by name; ``trials`` holds "sgd", which the ratios are to."""
    problem = task.problem(data)
    schedule = task.schedule(len(data.train_x))
    steps = {}
    batches = [
        (data.train_x[rows], data.train_y[rows])
        for rows in torch.arange(len(data.train_x)).split(schedule.batch_size)[:BLOCK]
        if len(rows) == schedule.batch_size
    ]
    ms: dict[str, list[float]] = {name: [] for name in trials}
    order = list(trials)
    clock = clock_for(data.train_x.device)
    for block in range(blocks + 1):
        for name in order:
            if block < 2:  # the first block warms up; then the run starts anew
                model = problem.build(SEED).to(data.train_x.device)
                steps[name] = METHODS[name].prepare(model, trials[name], problem.loss)
            seconds = [timed_step(steps[name], *batches[k % len(batches)], clock)[0] for k in range(BLOCK)]
            if block:
                ms[name].append(1e3 * mean(seconds))
        order = order[1:] + order[:1]
    plain = ms["sgd"]
    return {
        name: Cost(
            own,
            max(BLOCK * (own[0] - median(own)), 0.0),
            median(mine / other for mine, other in zip(own, plain, strict=True)),
        )
        for name, own in ms.items()
    }
