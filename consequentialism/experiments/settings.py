"""Learning rates and damping: the grids that were searched, and the best of each, recorded.

Every optimizer got 12 trials: a plain one 12 learning rates, each sqrt(2) times the one before; an emended one 4
learning rates times 3 dampings. The winner is chosen by `consequentialism.demo.search`; repeat it with
``python -m consequentialism demo --grid --seeds 3 --data digits`` (or ``mnist5k``), on the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import UserError


@dataclass(frozen=True)
class Schedule:
    """How long to train on a data set.

    Attributes:
        epochs: Passes over the training set.
        batch_size: Samples a step; a last, smaller batch is left out.
        eval_every: Steps between evaluations.
    """

    epochs: int
    batch_size: int
    eval_every: int


@dataclass(frozen=True)
class Trial:
    """One optimizer with its hyper-parameters.

    Attributes:
        optimizer: A name of `OPTIMIZERS`.
        lr: Learning rate.
        damping: Relative damping of the emended layers; None for a plain optimizer.
    """

    optimizer: str
    lr: float
    damping: float | None = None


PREFIX = "emended-"
PLAIN = ("sgd", "nag", "rmsprop", "adam")
OPTIMIZERS = (*PLAIN, *(PREFIX + name for name in PLAIN))

SCHEDULES: dict[str | tuple[str, str], Schedule] = {  # by data set, or by data set and model
    "digits": Schedule(epochs=15, batch_size=128, eval_every=2),
    "mnist5k": Schedule(epochs=8, batch_size=128, eval_every=4),
    "mnist": Schedule(epochs=3, batch_size=128, eval_every=25),
    ("mnist5k", "cnn"): Schedule(epochs=4, batch_size=128, eval_every=6),
    ("mnist5k", "resnet"): Schedule(epochs=3, batch_size=128, eval_every=6),
    "mnist1d": Schedule(epochs=20, batch_size=128, eval_every=8),
}

LOWEST_LR = {"sgd": 2**-4.5, "nag": 2**-6.5, "rmsprop": 2**-12.5, "adam": 2**-11.5}
EMENDED_LR = {
    "emended-sgd": (0.5, 1.0, 2.0, 4.0),
    "emended-nag": (0.05, 0.1, 0.2, 0.4),
    "emended-rmsprop": (0.0003, 0.001, 0.003, 0.01),
    "emended-adam": (0.0003, 0.001, 0.003, 0.01),
}
DAMPING = (0.3, 1.0, 3.0)
# The patches of a convolution are alike, so that few directions hold most of the Gram's trace.
CONV_DAMPING = (0.03, 0.1, 0.3)
CONV_MODELS = ("cnn", "resnet", "conv1d")
SAME_AS = {"mnist": "mnist5k"}
RECORDED: dict[tuple[str, str], tuple[Trial, ...]] = {
    ("digits", "mlp"): (
        Trial("sgd", 1.0),
        Trial("nag", 0.25),
        Trial("rmsprop", 0.00276),
        Trial("adam", 0.011),
        Trial("emended-sgd", 1.0, 0.3),
        Trial("emended-nag", 0.05, 0.3),
        Trial("emended-rmsprop", 0.001, 3.0),
        Trial("emended-adam", 0.003, 3.0),
    ),
    ("mnist5k", "mlp"): (
        Trial("sgd", 0.5),
        Trial("nag", 0.0884),
        Trial("rmsprop", 0.00195),
        Trial("adam", 0.00552),
        Trial("emended-sgd", 4.0, 3.0),
        Trial("emended-nag", 0.4, 3.0),
        Trial("emended-rmsprop", 0.001, 3.0),
        Trial("emended-adam", 0.01, 3.0),
    ),
    # Searched with one seed, and of the emended optimizers SGD alone.
    ("mnist5k", "cnn"): (
        Trial("sgd", 0.177),
        Trial("nag", 0.0884),
        Trial("rmsprop", 0.00138),
        Trial("adam", 0.00781),
        Trial("emended-sgd", 2.0, 0.03),
    ),
    ("mnist5k", "resnet"): (
        Trial("sgd", 1.0),
        Trial("nag", 0.177),
        Trial("rmsprop", 0.00195),
        Trial("adam", 0.000977),
        Trial("emended-sgd", 4.0, 0.3),
    ),
    ("mnist1d", "conv1d"): (
        Trial("sgd", 0.5),
        Trial("nag", 0.177),
        Trial("rmsprop", 0.00781),
        Trial("adam", 0.0156),
        Trial("emended-sgd", 0.5, 0.1),
    ),
}
# What people begin with, where nobody tunes: the usual rates of the plain optimizers, and this package's defaults, with
# SGD's NLMS step size of 1 and a tenth of it under a momentum of 0.9.
UNTUNED = {
    "sgd": Trial("sgd", 0.1),
    "nag": Trial("nag", 0.1),
    "rmsprop": Trial("rmsprop", 0.001),
    "adam": Trial("adam", 0.001),
    "emended-sgd": Trial("emended-sgd", 1.0, 1.0),
    "emended-nag": Trial("emended-nag", 0.1, 1.0),
    "emended-rmsprop": Trial("emended-rmsprop", 0.001, 1.0),
    "emended-adam": Trial("emended-adam", 0.001, 1.0),
}
UNTUNED_EPOCHS = 4
TARGET = {
    ("digits", "mlp"): 0.9817,
    ("mnist5k", "mlp"): 0.9399,
    ("mnist5k", "cnn"): 0.97,
    ("mnist5k", "resnet"): 0.9388,
    ("mnist1d", "conv1d"): 0.9124,
}


def schedule(data: str, model: str) -> Schedule:
    """How long ``model`` trains on ``data`` by default."""
    return SCHEDULES.get((data, model), SCHEDULES[data])


def is_emended(optimizer: str) -> bool:
    """Whether the name is that of an emended optimizer."""
    return optimizer.startswith(PREFIX)


def grid(optimizer: str, model: str) -> list[Trial]:
    """The 12 trials of an optimizer."""
    if is_emended(optimizer):
        dampings = CONV_DAMPING if model in CONV_MODELS else DAMPING
        return [Trial(optimizer, lr, damping) for damping in dampings for lr in EMENDED_LR[optimizer]]
    return [Trial(optimizer, float(f"{LOWEST_LR[optimizer] * 2 ** (k / 2):.3g}")) for k in range(12)]


def recorded_optimizers(data: str, model: str) -> list[str]:
    """The optimizers with a recorded trial; all where there is no record."""
    trials = RECORDED.get((SAME_AS.get(data, data), model), ())
    return [trial.optimizer for trial in trials] or list(OPTIMIZERS)


def recorded(data: str, model: str, optimizer: str) -> Trial:
    """The best trial of the grid.

    Raises:
        UserError: None is recorded for this data set and model.
    """
    for trial in RECORDED.get((SAME_AS.get(data, data), model), ()):
        if trial.optimizer == optimizer:
            return trial
    raise UserError(f"no learning rate is recorded for {optimizer} with {model} on {data}: find one with --grid")


def recorded_target(data: str, model: str) -> float | None:
    """The target that the grid search found, for runs without a plain optimizer; None where there is no record."""
    return TARGET.get((SAME_AS.get(data, data), model))
