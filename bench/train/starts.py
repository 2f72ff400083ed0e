"""docs/rates.md: with which learning rates and dampings the tuned runs of the benchmark won, as starts for others."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..markdown import document
from . import show
from .methods import METHODS, is_own
from .show import TASKS, Line

INTRODUCTION = (
    "These learning rates and dampings won the benchmark's grid for each optimizer and kind of network, so they are "
    "where to begin. The rates of the grid are an octave apart; `cw.find_damping` searches around them on your own "
    'network. With the default `scale="nlms"`, rates do not depend on the batch size.',
    "If nothing is known about a network, begin with a rate of 1 for SGD, 0.1 for SGD with a momentum of 0.9, and the "
    "usual rates for RMSProp and Adam; with a damping of 1, or 0.03 to 0.3 for convolutions, whose patches are alike.",
)
HEADINGS = ("optimizer", "task", "learning rate", "damping", "steps to the target")


def text(results: Path) -> str:
    """The page, from the results of every device."""
    parts = [
        "# Starting rates and dampings",
        *INTRODUCTION,
    ]
    for folder in sorted(path for path in results.iterdir() if (path / "train" / "runs.csv").exists()):
        parts += [f"## {folder.name}", table(show.lines(folder / "train"))]
    parts.append("Written by `make report`.")
    return document(parts) + "\n"


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
