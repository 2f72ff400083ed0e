"""Optimizers by name: what a trial makes of a model, and how one training step is taken."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from ..nn.convert import convert
from .settings import PREFIX, Trial

Loss = Callable[[Tensor, Tensor], Tensor]  # scores and targets to their mean loss
Step = Callable[[Tensor, Tensor], Tensor]  # inputs and targets of one batch to their loss, before the step
Method = Callable[[nn.Module, Trial, Loss], Step]

FACTORIES: dict[str, Callable[[Iterable[nn.Parameter], float], torch.optim.Optimizer]] = {
    "sgd": lambda parameters, lr: torch.optim.SGD(parameters, lr=lr),
    "nag": lambda parameters, lr: torch.optim.SGD(parameters, lr=lr, momentum=0.9, nesterov=True),
    "rmsprop": lambda parameters, lr: torch.optim.RMSprop(parameters, lr=lr),
    "adam": lambda parameters, lr: torch.optim.Adam(parameters, lr=lr),
}


def prepare(model: nn.Module, trial: Trial, loss: Loss) -> Step:
    """Convert ``model`` in place if the trial is of an emended optimizer, and return its training step."""
    if trial.damping is not None:
        convert(model, damping=trial.damping)
    return ordinary_step(model, FACTORIES[trial.optimizer.removeprefix(PREFIX)](model.parameters(), trial.lr), loss)


def ordinary_step(
    model: nn.Module, optimizers: torch.optim.Optimizer | list[torch.optim.Optimizer], loss: Loss
) -> Step:
    """Forward, backward, step: of one optimizer, or of several that share the parameters out among them."""
    every = optimizers if isinstance(optimizers, list) else [optimizers]

    def step(x: Tensor, y: Tensor) -> Tensor:
        for optimizer in every:
            optimizer.zero_grad()
        value = loss(model(x), y)
        value.backward()
        for optimizer in every:
            optimizer.step()
        return value

    return step
