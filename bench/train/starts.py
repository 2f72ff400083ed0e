"""docs/rates.md: with which learning rates and dampings the tuned runs of the benchmark won, as starts for others."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from . import show
from .methods import METHODS, is_own
from .show import TASKS, Line

INTRODUCTION = (
    "What won the benchmark's grid for each optimizer and kind of network, and so where to begin. Rates are those of "
    'the grid, an octave apart; `cw.find_damping` looks around them on your own network. With `scale="nlms"`, the '
    "default, rates do not depend on the batch size. Where nothing is known: SGD 1, SGD with a momentum of 0.9 0.1, "
    "and the usual rates of RMSProp and Adam; damping 1, and 0.03 to 0.3 for convolutions, whose patches are alike."
)
HEADINGS = ("optimizer", "task", "learning rate", "damping", "steps to the target")


def text(results: Path) -> str:
    """The page, from the results of every device."""
    parts = [
        "# Starting rates and dampings",
        INTRODUCTION,
    ]
    for folder in sorted(path for path in results.iterdir() if (path / "train" / "runs.csv").exists()):
        parts += [f"## {folder.name}", table(show.lines(folder / "train"))]
    parts.append("Written by `make report`.")
    return "\n\n".join(parts) + "\n"


def table(tasks: Mapping[str, Sequence[Line]]) -> str:
    """One line an optimizer and task, those that reached the target."""
    found = [line for lines in tasks.values() for line in lines if is_own(line.optimizer) and math.isfinite(line.steps)]
    order = list(METHODS)
    rows = [
        (
            METHODS[line.optimizer].label,
            TASKS[line.task].title,
            f"{line.lr:g}",
            "" if line.damping is None else f"{line.damping:g}",
            f"{line.steps:g}",
        )
        for line in sorted(found, key=lambda line: (order.index(line.optimizer), list(tasks).index(line.task)))
    ]
    rule = ("---", "---", "---:", "---:", "---:")
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (HEADINGS, rule, *rows))
