"""The head-to-head grid on nanoGPT.

It varies exponent, damping and placing of the coordinates; then how often they are refreshed, their memory and their
blocks, one at a time. Each rate is found by a walk over octaves, with a seed of its own: one walk for a plain
optimizer, and in coordinates one for each placing and exponent. Every run is a line of ``head_to_head.csv``, written
when it ends; a run that is already in the file is not repeated.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

from . import recipe_stages
from .recipe_stages import SEARCH_SEED, Bench, RecipeRow
from .recipes import PLACINGS, START, Setting

FILE = "head_to_head.csv"
TASK = "nanogpt"
OPTIMIZERS = ("coordinates-adamw", "coordinates-muon")
PLAIN = {"coordinates-adamw": "adamw", "coordinates-muon": "muon"}
SEEDS = (0, 1)
EXPONENTS = (0.125, 0.25, 0.5, 1.0)
DAMPINGS = (0.01, 0.03, 0.1, 0.3, 1.0)
TUNED_DAMPING = 0.1  # the rates' walk is at the middle one
REFRESHES = (1, 10, 25, 50, 200)
MEMORIES = (0.0, 0.9, 0.95, 0.99)
BLOCKS = (64, 128, 256, 512)  # the widest input of nanoGPT's layers is 512: that is no cut at all
# The package's defaults, but for one refresh and block of both optimizers, so that they are compared alike.
BASE = {name: dataclasses.replace(START[name], refresh_every=10, block=256) for name in OPTIMIZERS}


def measure(bench: Bench) -> None:
    """What of it is of the optimizers that are asked for, a seed after the other."""
    if TASK in bench.tasks:
        for seed in SEEDS[: bench.seeds]:
            for setting in (one for one in settings() if one.optimizer in bench.optimizers):
                recipe_stages.row_of(bench, TASK, at_its_rate(bench, setting), seed, evaluations=1, file=FILE)


def settings() -> Iterator[Setting]:
    """What is compared, at the rate that each optimizer's search begins with; the plain optimizers first."""
    yield from (START[PLAIN[name]] for name in OPTIMIZERS)
    change = dataclasses.replace
    starts = [BASE[name] for name in OPTIMIZERS]
    seen = {change(start, exponent=s, damping=c, placing=where): None
            for s in EXPONENTS for c in DAMPINGS for where in PLACINGS for start in starts}  # fmt: skip
    for start in starts:
        seen |= dict.fromkeys(change(start, refresh_every=refresh) for refresh in REFRESHES)
        seen |= dict.fromkeys(change(start, memory=memory) for memory in MEMORIES)
        seen |= dict.fromkeys(change(start, block=block) for block in BLOCKS)
    yield from seen


def at_its_rate(bench: Bench, setting: Setting) -> Setting:
    """The setting with the best rate of a `walk` from that which its optimizer's search begins with."""
    first = beginning(setting)

    def score(lr: float) -> float:
        tried = dataclasses.replace(first, lr=lr)
        return recipe_stages.row_of(bench, TASK, tried, SEARCH_SEED, evaluations=1, file=FILE).score

    return dataclasses.replace(setting, lr=walk(first.lr, score))


def beginning(setting: Setting) -> Setting:
    """The setting at which the walk begins that finds this one's rate: one walk an optimizer, placing and exponent."""
    if setting.placing is None:
        return START[setting.optimizer]
    base = BASE[setting.optimizer]
    return dataclasses.replace(base, exponent=setting.exponent, placing=setting.placing, damping=TUNED_DAMPING)


def walk(lr: float, score: Callable[[float], float]) -> float:
    """The rate with the lowest score: half to four times ``lr``, an octave apart, and beyond while the last is best."""
    found = {lr * factor: score(lr * factor) for factor in (0.5, 1.0, 2.0, 4.0)}
    while True:
        best = min(found, key=lambda tried: found[tried])
        beyond = [rate for rate in (best / 2, best * 2) if rate not in found]
        if not beyond:
            return best
        found |= {rate: score(rate) for rate in beyond}


def walked(rows: Iterable[RecipeRow]) -> dict[Setting, tuple[float, int]]:
    """The best rate of each finished walk, by `beginning`, and the steps of its schedule: the longest counts."""
    scores: dict[tuple[int, Setting], dict[float, float]] = {}
    for row in rows:
        if row.seed == SEARCH_SEED:
            scores.setdefault((row.steps, beginning(row.setting)), {})[row.lr] = row.score
    found = {}
    for (steps, first), tried in sorted(scores.items(), key=lambda item: item[0][0]):
        with contextlib.suppress(KeyError):  # a walk that was cut
            found[first] = walk(first.lr, tried.__getitem__), steps
    return found


def counted(rows: Sequence[RecipeRow]) -> list[RecipeRow]:
    """The runs that count: those of the longest schedule, at the best rate of their walk."""
    mine = [row for row in rows if row.seed in SEEDS]
    longest, walks = max((row.steps for row in mine), default=0), walked(rows)
    return [
        row for row in mine if row.steps == longest and row.lr == walks.get(beginning(row.setting), (math.nan, 0))[0]
    ]


def runs(rows: Iterable[RecipeRow], optimizer: str, **chosen: object) -> list[RecipeRow]:
    """The runs that count of an optimizer in coordinates with these values, and with `BASE`'s values of the rest."""
    fields = ("exponent", "damping", "placing", "refresh_every", "memory", "block")
    wanted = {field: getattr(BASE[optimizer], field) for field in fields} | chosen
    return [
        row
        for row in rows
        if row.optimizer == optimizer and all(getattr(row, field) == value for field, value in wanted.items())
    ]
