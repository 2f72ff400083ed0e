"""Targets, table, CSV and JSON."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

from .cases import DTYPES, LAYERS, MLP, MLP_ROWS, STEP
from .run import OK, Row

EAGER_ROWS, EAGER_SPEEDUP = 128, 5.0  # up to so many rows, so much faster than the stock operations, eager
MLP_TARGET = 1.25


class Target(NamedTuple):
    """The time of ``own`` over that of ``other``, each a provider and a mode, is to be at most ``most``."""

    op: str
    shape: str
    dtype: str
    own: tuple[str, str]
    other: tuple[str, str]
    most: float


def targets() -> list[Target]:
    """Those of the project, on an H100."""
    made = []
    for shape in LAYERS:
        assert shape.target is not None
        for dtype in DTYPES:
            own = ("cuda", "graph")
            made.append(Target("linear", shape.name, dtype, own, ("plain", "graph"), shape.target))
            if shape.rows <= EAGER_ROWS:
                made.append(Target("linear", shape.name, dtype, own, ("stock", "eager"), 1 / EAGER_SPEEDUP))
    assert STEP.target is not None
    made += [Target("step", STEP.name, dtype, ("fused", "graph"), ("plain", "graph"), STEP.target) for dtype in DTYPES]
    mlp = f"{MLP_ROWS}x{'-'.join(map(str, MLP))}"
    made.append(Target("mlp", mlp, "float32", ("cuda", "graph"), ("plain", "graph"), MLP_TARGET))
    return made


def verdicts(rows: list[Row]) -> list[str]:
    """A line for each target: met, missed, or why it was not measured."""
    found = {(r.op, r.shape, r.dtype, r.provider, r.mode): r for r in rows}
    lines = []
    for target in targets():
        place = (target.op, target.shape, target.dtype)
        what = f"{' '.join(place)}: {', '.join(target.own)} / {', '.join(target.other)}"
        ends = [found.get((*place, *end)) or _reason(rows, place, end[0]) for end in (target.own, target.other)]
        times = [end.median_us for end in ends if isinstance(end, Row) and end.median_us is not None]
        if len(times) < 2:
            why = "; ".join(_state(end) for end in ends if not isinstance(end, Row) or end.median_us is None)
            lines.append(f"no time  {what}, at most {target.most:.2f}: {why}")
            continue
        ratio = times[0] / times[1]
        lines.append(f"{'met' if ratio <= target.most else 'MISSED':8} {what} = {ratio:.2f}, at most {target.most:.2f}")
    return lines


def _reason(rows: list[Row], place: tuple[str, str, str], provider: str) -> Row | None:
    found = (r for r in rows if (r.op, r.shape, r.dtype) == place and r.provider == provider and r.state != OK)
    return next(found, None)


def _state(end: Row | None) -> str:
    return "not run" if end is None else f"{end.provider}: {end.state}"


def problems(rows: list[Row]) -> list[str]:
    """A line for each provider that is wrong, failed or died; peers that are not installed are none."""
    return [
        f"{row.op} {row.shape} {row.dtype}, {row.provider} ({row.mode}): {row.state}"
        for row in rows
        if row.state != OK and not row.state.startswith("skipped")
    ]


def table(rows: list[Row]) -> str:
    """One line for each row."""
    head = ("us", "p20", "p80", "ratio", "x floor", "GB/s", "TFLOP/s", "MB", "error")
    lines = [f"{'op':8}{'provider':15}{'mode':6}{'shape':28}{'dtype':9}" + "".join(f"{name:>9}" for name in head)]
    for row in rows:
        start = f"{row.op:8}{row.provider:15}{row.mode:6}{row.shape:28}{row.dtype:9}"
        if row.state != OK:
            lines.append(f"{start} {row.state}")
            continue
        assert row.median_us is not None
        over = None if row.floor_us is None else row.median_us / row.floor_us
        megabytes = None if row.peak_bytes is None else row.peak_bytes / 1e6
        numbers = [(row.median_us, ".1f"), (row.p20_us, ".1f"), (row.p80_us, ".1f"), (row.ratio, ".2f"), (over, ".1f")]
        numbers += [(row.gb_s, ".0f"), (row.tflop_s, ".1f"), (megabytes, ".1f"), (row.error, ".0e")]
        lines.append(start + "".join(f"{'' if n is None else format(n, f):>9}" for n, f in numbers))
    return "\n".join(line.rstrip() for line in lines)


def write(rows: list[Row], meta: dict[str, Any], path: Path) -> None:
    """``path`` as CSV, with what is the same for all lines in each of them, and beside it as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=[*(f.name for f in fields(Row)), *meta], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            values = {**asdict(row), **meta}
            writer.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in values.items()})
    result = {"meta": meta, "targets": verdicts(rows), "rows": [asdict(row) for row in rows]}
    path.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
