"""What the report says of the training benchmarks, from their CSV files alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

from consequentialism.experiments.settings import PREFIX

from .. import table
from ..markdown import markdown, number, where
from . import defaults, recipe_report, show
from .claims import (
    BATCH_SIZES,
    LEARNT,
    RATES,
    SHOWN_BATCH,
    SMOOTH_SEEDS,
    STEPS,
    SweepRow,
    best,
    best_loss,
    within_twice,
)
from .methods import METHODS, NEVER, TRIALS, is_own
from .rows import RunRow, SkipRow
from .show import TASKS, Line
from .tune import VALIDATION

TIE = 0.05  # of the time, either way
PLAIN = tuple(name for name in RATES if not name.startswith(PREFIX))  # of the sweep


def text(folder: Path, pictures: str) -> list[str]:
    """The sections on training: how it was done, the summary, a table a task, and the paper's other claims."""
    tasks = show.lines(folder)
    runs = table.read(folder / "runs.csv", RunRow)
    skips = table.read(folder / "skipped.csv", SkipRow)
    parts = [
        "## Training",
        f"Measured by `make bench-train`; {where(runs)}.",
        f"Every optimizer was tuned on the same grid of {TRIALS} trials, with another seed and {VALIDATION:.0%} of the "
        f"training samples held out for it. The best trial was then run with {_seeds(runs)}, and the tables show the "
        "medians of the steps to the target on the test samples. A target is reached at the first of two evaluations "
        "in a row that are as good. Seconds are steps times the cost of a step, which was measured on one thread for "
        "all optimizers of a task in turns. The cost of the grid search is given the same way; a trial that was beaten "
        "stopped there.",
        "Muon steps the weights of all linear layers but the last, and AdamW the rest. Without such layers, as in the "
        "convolutional networks, Muon is AdamW. ISAAC has linear layers only. K-FAC and SINGD leave other layers to "
        "SGD with momentum.",
        "In coordinates Muon steps convolutions too. *Cholesky's coordinates* are those of `root='cholesky'`; *outputs "
        "too* adds `output_exponent=1/3`. Refreshes are more frequent in the first ten steps of a run; where their "
        "extra cost was timed, seconds include it. These costs are in processor time, older ones in wall time; a ratio "
        "mixes the two only where an optimizer was not timed again.",
        "### Summary",
        summary(tasks),
        "### Where emended updates win, tie and lose in seconds",
        verdicts(tasks),
        f"![Test accuracy or loss over steps]({pictures}/curves.png)",
        f"![Seconds to the target]({pictures}/seconds.png)",
    ]
    for name, lines in tasks.items():
        task = TASKS[name]
        parts += [
            f"### {task.title}",
            f"To {show.target(task)}; batches of {task.batch_size}, at most {task.steps} steps.",
            markdown(show.HEADINGS, [show.cells(line, task) for line in lines]),
        ]
    parts += defaults.text(folder)
    reasons = dict.fromkeys(f"- {METHODS[s.optimizer].label}, {TASKS[s.task].title}: {s.reason}" for s in skips)
    parts += ["### Who did not take part", "\n".join([*reasons, *(f"- {reason}" for reason in NEVER.values())])]
    if (folder / "sweep.csv").exists():
        sweep = table.read(folder / "sweep.csv", SweepRow)
        parts += [
            "### The paper's other claims",
            f"Scikit-learn's digits, {STEPS} steps of the demo's network, {len(sweep)} runs; {where(sweep)}. "
            f"In comparisons a loss below {LEARNT:g} counts as {LEARNT:g}.",
            claims(sweep),
            "Medians over batch sizes:",
            _claims_text(sweep),
            f"The loss after every step at batch size {SHOWN_BATCH}, each optimizer with the demo's tuned settings; "
            f"the median and the range of {SMOOTH_SEEDS} seeds:",
            f"![Loss after every step]({pictures}/smooth.png)",
            f"![Loss over the learning rate]({pictures}/settings.png)",
            f"![With and without momentum]({pictures}/momentum.png)",
        ]
    return [*parts, *recipe_report.text(folder, pictures)]


def _seeds(runs: Sequence[RunRow]) -> str:
    """How many runs count, and on which tasks more."""
    counts = {task: len({row.seed for row in runs if row.task == task}) for task in {row.task for row in runs}}
    fewest = min(counts.values())
    more = [f"{counts[task]} on {task} (`--seeds {counts[task]}`)" for task in sorted(counts) if counts[task] > fewest]
    return f"{fewest} seeds" + (f", {' and '.join(more)}" if more else "")


def summary(tasks: dict[str, list[Line]]) -> str:
    """One line a task: Adam, the best of the others, and the best emended optimizer, in seconds and in steps."""
    headings = (
        "task", "target", "Adam, s (steps)", "fastest other, s (steps)", "fewest steps, others",
        "fastest emended, s (steps)", "fewest steps, emended", "seconds: emended / best other",
    )  # fmt: skip
    rows = []
    for name, lines in tasks.items():
        others, emended = [line for line in lines if not is_emended(line)], [line for line in lines if is_emended(line)]
        adam = next((line for line in lines if line.optimizer == "adam"), None)
        if not others or not emended:
            continue
        other, own = fewest(others, lambda line: line.seconds), fewest(emended, lambda line: line.seconds)
        other_steps, own_steps = fewest(others, lambda line: line.steps), fewest(emended, lambda line: line.steps)
        rows.append(
            (
                TASKS[name].title,
                show.target(TASKS[name]),
                "" if adam is None else _both(adam),
                f"{METHODS[other.optimizer].label} {_both(other)}",
                f"{METHODS[other_steps.optimizer].label} {number(other_steps.steps, 'g')}",
                f"{METHODS[own.optimizer].label.removeprefix('emended ')} {_both(own)}",
                f"{METHODS[own_steps.optimizer].label.removeprefix('emended ')} {number(own_steps.steps, 'g')}",
                f"**{own.seconds / other.seconds:.2f}**" if math.isfinite(own.seconds + other.seconds) else "",
            )
        )
    return markdown(headings, rows)


def _both(line: Line) -> str:
    return f"{line.seconds:.2f} ({line.steps:g})" if math.isfinite(line.seconds) else "not reached"


def verdicts(tasks: dict[str, list[Line]]) -> str:
    """Where the best emended optimizer wins, ties and loses in seconds, and why."""
    found = []
    for name, lines in tasks.items():
        others, emended = [line for line in lines if not is_emended(line)], [line for line in lines if is_emended(line)]
        if not others or not emended:
            continue
        other, own = fewest(others, lambda line: line.seconds), fewest(emended, lambda line: line.seconds)
        soap = next((line for line in lines if line.optimizer == "soap"), None)
        text = f"- {TASKS[name].title}: **{_verdict(own.seconds, other.seconds)}**. " + _why(own, other)
        if soap is not None and math.isfinite(soap.steps):
            steps = fewest(emended, lambda line: line.steps)
            text += (
                f" SOAP takes {soap.steps:g} steps, {METHODS[steps.optimizer].label} {number(steps.steps, 'g')}; "
                f"a step of SOAP costs {soap.ms / steps.ms:.1f} times as much."
            )
        found.append(text)
    return "\n".join(found)


def _verdict(own: float, other: float) -> str:
    if not math.isfinite(own):
        return "loses: no emended optimizer reached the target" if math.isfinite(other) else "nobody reached the target"
    if own < (1 - TIE) * other:
        return "wins"
    return "ties" if own <= (1 + TIE) * other else "loses"


def _why(own: Line, other: Line) -> str:
    names = METHODS[own.optimizer].label, METHODS[other.optimizer].label
    text = ""
    if math.isfinite(own.seconds) and math.isfinite(other.seconds) and own.steps and other.steps:
        text = (
            f"{names[0]} takes {own.steps:g} steps and {names[1]} {other.steps:g}; a step costs "
            f"{own.ms / other.ms:.2f} times as much, and the ratio of seconds is {own.seconds / other.seconds:.2f}. "
        )
    score = (
        (lambda line: f"{line.score:.3f}") if TASKS[own.task].by_loss else (lambda line: f"{100 * line.score:.1f} %")
    )
    return text + (
        f"At the end of the budget their training losses are {own.train_loss:.2g} and {other.train_loss:.2g}, the test "
        f"{'loss' if TASKS[own.task].by_loss else 'accuracy'} {score(own)} and {score(other)}."
    )


def claims(rows: Sequence[SweepRow]) -> str:
    """The sweep's figures: one line an optimizer and batch size."""
    headings = (
        "optimizer", "batch size", "best loss", "lr", "damping", "settings within twice its best",
        "within twice the best plain", "steps after which the loss rose", "std of a step's change of log10 loss",
    )  # fmt: skip
    lines = []
    every = list(rows)
    for optimizer in RATES:
        for size in (size for size in BATCH_SIZES if any(row.batch_size == size for row in rows)):
            chosen = best(every, optimizer, size)
            lines.append(
                (
                    METHODS[optimizer].label,
                    str(size),
                    f"{chosen.loss:.2g}",
                    f"{chosen.lr:.3g}",
                    "" if chosen.damping is None else f"{chosen.damping:g}",
                    f"{within_twice(every, optimizer, size, (optimizer,)):.0%}",
                    f"{within_twice(every, optimizer, size, PLAIN):.0%}",
                    f"{chosen.rises:.0%}",
                    f"{chosen.jump:.2f}",
                )
            )
    return markdown(headings, lines)


def _claims_text(rows: Sequence[SweepRow]) -> str:
    """What the sweep says of each claim, whatever it says."""
    every = list(rows)
    sizes = [size for size in BATCH_SIZES if any(row.batch_size == size for row in rows)]

    def each(figure: Callable[[str, int], float], names: Sequence[str], form: str) -> str:
        return ", ".join(f"{METHODS[name].label} {median(figure(name, s) for s in sizes):{form}}" for name in names)

    bases = ("sgd", "nag", "adam")

    def momentum(prefix: str) -> float:
        return median(best_loss(every, prefix + "sgd", s) / best_loss(every, prefix + "nag", s) for s in sizes)

    pairs = [name for base in bases for name in (base, PREFIX + base)]
    items = (
        "- Smoother convergence. The share of steps after which the training loss rose: "
        + each(lambda name, size: best(every, name, size).rises, pairs, ".0%")
        + ".",
        "- Less dependence on hyper-parameters. The share of settings whose final loss is within twice the optimizer's "
        + "best: "
        + each(lambda name, size: within_twice(every, name, size, (name,)), pairs, ".0%")
        + "; within twice the best of the plain optimizers: "
        + each(lambda name, size: within_twice(every, name, size, PLAIN), pairs, ".0%")
        + ".",
        "- Less need for momentum. The best final loss without momentum, as a multiple of that with it: "
        + f"plain {momentum(''):.2g}, emended {momentum(PREFIX):.2g}.",
    )
    return "\n".join(items)


def overview(tasks: dict[str, list[Line]]) -> str:
    """One line a task for README: steps of Adam, of the best other and of the best emended optimizer, and the time."""
    headings = (
        "task", "target", "steps of Adam", "fewest steps, others", "fewest steps, emended",
        "seconds: emended / best other",
    )  # fmt: skip
    rows, fewest_steps, fewest_seconds = [], 0, 0
    for name, lines in tasks.items():
        others, emended = [line for line in lines if not is_emended(line)], [line for line in lines if is_emended(line)]
        if not others or not emended:
            continue
        adam = next((line for line in lines if line.optimizer == "adam"), None)
        other, own = fewest(others, lambda line: line.steps), fewest(emended, lambda line: line.steps)
        ratio = fewest(emended, lambda line: line.seconds).seconds / fewest(others, lambda line: line.seconds).seconds
        fewest_steps += own.steps < other.steps
        fewest_seconds += ratio < 1
        rows.append(
            (
                TASKS[name].title,
                show.target(TASKS[name]),
                "" if adam is None else number(adam.steps, "g"),
                f"{METHODS[other.optimizer].label} {number(other.steps, 'g')}",
                f"{METHODS[own.optimizer].label.removeprefix('emended ')} {number(own.steps, 'g')}",
                f"**{ratio:.2f}**" if math.isfinite(ratio) else "",
            )
        )
    return (
        f"The best emended optimizer takes fewer steps than every other one on {fewest_steps} of {len(rows)} tasks, "
        f"and fewer seconds on {fewest_seconds}.\n\n{markdown(headings, rows)}"
    )


def is_emended(line: Line) -> bool:
    """Whether the line is of an emended optimizer, in either form."""
    return is_own(line.optimizer)


def fewest(lines: Sequence[Line], key: Callable[[Line], float]) -> Line:
    """The line with the lowest figure."""
    return min(lines, key=key)
