"""Rows as pictures, one for each op: ratios to the baseline with their floors, and how near the times are to theirs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from consequentialism.errors import UserError

from .case import OK, Row

WIDTH = 0.8  # of a group of bars


def save(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Draw ``folder/<op>.png`` of each op that was timed.

    Raises:
        UserError: matplotlib is not installed, or the folder cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("no plots: matplotlib is not installed: pip install consequentialism[bench]") from None
    paths = []
    timed = [row for row in rows if row.state == OK]
    for op in dict.fromkeys(row.op for row in timed):
        chosen = [row for row in timed if row.op == op]
        figure = Figure(figsize=(12, 4.5), layout="constrained")
        ratios, floors = figure.subplots(1, 2)
        first = chosen[0]
        figure.suptitle(f"{op}, {first.device}, torch {first.torch}, {first.version} at {first.commit}", fontsize=9)
        _bars(ratios, chosen, "ratio", f"time / {first.baseline}, one run")
        _bars(floors, chosen, "floor_fraction", "fraction of the roofline")
        ratios.legend(fontsize=7)
        path = folder / f"{op}.png"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, dpi=120)
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error.strerror}") from None
        paths.append(path)
    return paths


def _bars(axes: Any, rows: Sequence[Row], field: str, label: str) -> None:
    """A bar for each row, in a group for each place; across it a line at the floor of its ratio."""
    places = list(dict.fromkeys((row.shape, row.dtype, row.mode) for row in rows))
    providers = list(dict.fromkeys(row.provider for row in rows))
    width = WIDTH / len(providers)
    for index, provider in enumerate(providers):
        own = [row for row in rows if row.provider == provider and getattr(row, field) is not None]
        left = [places.index((row.shape, row.dtype, row.mode)) - WIDTH / 2 + index * width for row in own]
        axes.bar(left, [getattr(row, field) for row in own], width, align="edge", label=provider)
        for x, row in zip(left, own, strict=True):
            if field == "ratio" and provider != row.baseline and row.floor_ratio is not None:
                axes.hlines(row.floor_ratio, x, x + width, "black")
    several = len({place[1:] for place in places}) > 1
    names = ["\n".join(place) if several else place[0] for place in places]
    axes.set_xticks(range(len(places)), names, rotation=30, ha="right", fontsize=7)
    axes.set_ylabel(label)
