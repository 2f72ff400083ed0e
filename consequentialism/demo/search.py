"""The grid search behind the recorded settings.

The target is that of `consequentialism.demo.summary`, over every trial of every plain optimizer: the best that any
plain optimizer reaches at any learning rate. Each optimizer's winner is the trial that reaches it in the fewest steps
(median over seeds); ties, and trials that miss it, are settled by the higher final test accuracy, then by the lower
training loss. The rule thus favours plain and emended optimizers alike in what the demo then measures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..experiments.settings import EMENDED_LR, Trial, grid, is_emended
from ..experiments.train import Run
from .summary import Row, plain_target, summarise

Search = dict[str, list[Row]]


def search(
    optimizers: Sequence[str],
    model: str,
    run_trial: Callable[[Trial], list[Run]],
    target: float | None,
    test_samples: int,
) -> tuple[float, Search]:
    """Run the grids.

    Args:
        optimizers: The optimizers whose grids are searched.
        model: Which the grids depend on.
        run_trial: Trains with a trial, once a seed.
        target: The target accuracy; None for the rule above, which takes at least one plain optimizer.
        test_samples: Size of the test set, for that rule.

    Returns:
        The target, and for each optimizer a row a trial, the winner first.
    """
    groups = {name: [run_trial(trial) for trial in grid(name, model)] for name in optimizers}
    if target is None:
        target = plain_target((runs for group in groups.values() for runs in group), test_samples)
    if target is None:
        raise ValueError("target must be given where no optimizer is plain")
    rows = {name: [summarise(runs, target) for runs in group] for name, group in groups.items()}
    return target, {name: sorted(found, key=_order) for name, found in rows.items()}


def at_border(trial: Trial) -> bool:
    """Whether the learning rate is the lowest or the highest of the grid."""
    name = trial.optimizer
    rates = EMENDED_LR[name] if is_emended(name) else [other.lr for other in grid(name, "")]
    return trial.lr in (min(rates), max(rates))


def _order(row: Row) -> tuple[float, float, float]:
    return row.steps, -row.test_accuracy, row.train_loss
