"""A comparison of two CSVs: ratios to the baseline, so that a machine that was slower altogether cancels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from consequentialism.errors import UserError

from . import table
from .case import Row
from .environment import git
from .show import Columns, print_table

SLOWER = 1.05  # a ratio that has grown by more is marked
RESULTS = "bench/results/{slug}/step_cost.csv"  # as committed, of each device
COLUMNS: Columns = (
    *((name, "left") for name in ("op", "shape", "dtype", "provider", "mode")),
    *((name, "right") for name in ("ratio, old", "ratio, new", "new / old")),
    ("", "left"),
)


class Change(NamedTuple):
    """A provider's ratio to the baseline in the old and in the new results."""

    op: str
    provider: str
    mode: str
    shape: str
    dtype: str
    old: float
    new: float

    @property
    def factor(self) -> float:
        return self.new / self.old

    @property
    def verdict(self) -> str:
        return "SLOWER" if self.factor > SLOWER else "faster" if self.factor < 1 / SLOWER else ""


def load(source: str, slug: str) -> list[Row]:
    """The rows of a CSV file; or of the one that a commit has for the device with this ``slug``.

    Nothing is built or measured of a commit: what is compared is what was committed.

    Raises:
        UserError: There is no such file or commit, the commit has no results, or they are of another schema.
    """
    if Path(source).is_file():
        return table.read(Path(source), Row)
    if git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{source}^{{commit}}") is None:
        raise UserError(f"argument --against: {source!r} is neither a file nor a commit of this checkout")
    path = RESULTS.format(slug=slug)
    text = git("show", f"{source}:{path}")
    if text is None:
        raise UserError(f"argument --against: commit {source!r} has no {path}")
    return table.parse(text, Row, f"{source}:{path}")


def compare(old: Iterable[Row], new: Iterable[Row]) -> list[Change]:
    """What both have timed, in the new one's order. A row whose baseline is another one in each is left out."""
    before = {row.key: row for row in old if row.ratio is not None}
    changes = []
    for row in new:
        match = before.get(row.key)
        if match is None or row.ratio is None or match.ratio is None or row.baseline != match.baseline:
            continue
        if row.provider != row.baseline:
            changes.append(Change(*row.key, match.ratio, row.ratio))
    return changes


def report(old: Sequence[Row], new: Sequence[Row]) -> None:
    """Print the comparison."""
    for name, rows in (("old", old), ("new", new)):
        for place in dict.fromkeys((r.device, r.threads, r.torch, r.version, r.commit) for r in rows):
            device, threads, torch, version, commit = place
            print(f"{name}: {device}, {threads} threads, torch {torch}, version {version}, commit {commit}")
    changes = compare(old, new)
    lines = [
        [
            *(one.op, one.shape, one.dtype, one.provider, one.mode),
            *(f"{one.old:.3f}", f"{one.new:.3f}", f"{one.factor:.3f}", one.verdict),
        ]
        for one in changes
    ]
    print_table(COLUMNS, lines)
    slower = sum(one.verdict == "SLOWER" for one in changes)
    print(f"{len(changes)} compared, {slower} slower by more than {SLOWER - 1:.0%}, ratio to the baseline by ratio")
    for name, own, other in (("old", old, new), ("new", new, old)):
        there = {row.key for row in other if row.ratio is not None}
        alone = sum(row.ratio is not None and row.key not in there for row in own)
        if alone:
            print(f"{alone} only in the {name} one")
