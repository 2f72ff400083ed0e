"""Rows as text: a table, what is wrong or missing, and whether the targets are met."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from .case import ALL_MODES, OK, Case, Row

SKIPPED = "skipped"
Columns = Sequence[tuple[str, str]]  # heading, and "left" or "right"
COLUMNS: Columns = (
    *((name, "left") for name in ("op", "shape", "dtype", "provider", "mode")),
    *((name, "right") for name in ("ms", "p20", "p80", "ratio", "floor", "target", "of floor", "MB", "error")),
)


def table(rows: Iterable[Row]) -> None:
    """Print a line for each row that was timed. ``floor`` is of the ratio, ``of floor`` how near the time is to it."""
    timed = [row for row in rows if row.state == OK]
    lines = [
        [
            *(row.op, row.shape, row.dtype, row.provider, row.mode),
            *(_number(one, "#.4g") for one in (row.median_ms, row.p20_ms, row.p80_ms)),
            *(_number(one, ".2f") for one in (row.ratio, row.floor_ratio, row.target)),
            _number(row.floor_fraction, ".0%"),
            _number(None if row.peak_bytes is None else row.peak_bytes / 1e6, ".1f"),
            _number(row.error, ".0e"),
        ]
        for row in timed
    ]
    ends = [a.op != b.op or a.shape != b.shape or a.dtype != b.dtype for a, b in itertools.pairwise(timed)]
    print_table(COLUMNS, lines, [*ends, True])


def print_table(columns: Columns, lines: Sequence[Sequence[str]], ends: Sequence[bool] = ()) -> None:
    """Print a table by rich, or as plain text where rich is not installed; ``ends`` are the lines with a rule below."""
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print("\n".join(plain(columns, lines)))
        return
    made = Table(box=box.SIMPLE_HEAD)
    for name, side in columns:
        made.add_column(name, justify="right" if side == "right" else "left", no_wrap=True)
    for index, line in enumerate(lines):
        made.add_row(*line, end_section=index < len(ends) and ends[index])
    console = Console()
    if not console.is_terminal:
        console.width = 200  # a log is not cut to a terminal's width
    console.print(made)


def plain(columns: Columns, lines: Sequence[Sequence[str]]) -> list[str]:
    """The table as lines of text."""
    every = [[name for name, _ in columns], *lines]
    widths = [max(len(line[i]) for line in every) for i in range(len(columns))]
    pads: list[Callable[[str, int], str]] = [str.rjust if side == "right" else str.ljust for _, side in columns]
    return [
        "  ".join(pad(cell, width) for pad, cell, width in zip(pads, line, widths, strict=True)).rstrip()
        for line in every
    ]


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def problems(rows: Iterable[Row]) -> list[str]:
    """A line for each provider that is wrong, failed or died."""
    return [
        f"{row.op} {row.shape} {row.dtype}, {row.provider} ({row.mode}): {row.state}"
        for row in rows
        if row.state != OK and not row.state.startswith(SKIPPED)
    ]


def skipped(rows: Iterable[Row]) -> list[str]:
    """A line for each provider that was not measured, and why."""
    places: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.state.startswith(SKIPPED):
            reason = row.state.removeprefix(SKIPPED).lstrip(": ")
            places.setdefault((row.provider, reason), []).append(row.op)
    return [f"{name} ({', '.join(dict.fromkeys(ops))}): {reason}" for (name, reason), ops in places.items()]


def about(meta: Mapping[str, Any]) -> list[str]:
    """A line for each thing that holds of the whole run."""
    lines = []
    for name, value in meta.items():
        every = value.items() if isinstance(value, dict) else [("", value)]
        texts = [f"{key} {one:.4g}" if isinstance(one, float) else f"{key} {one}" for key, one in every]
        lines += [f"{name}: {', '.join(text.strip() for text in texts)}"] if value else []
    return lines


def verdicts(cases: Iterable[Case], rows: Iterable[Row]) -> list[str]:
    """A line for each target: met, missed, or why it was not measured."""
    found = {row.key: row for row in rows}
    lines = []
    for case in cases:
        for aim in case.targets:
            if not {aim.own[0], aim.other[0]} <= case.providers.keys():
                continue
            what = f"{' '.join(case.key)}: {', '.join(aim.own)} / {', '.join(aim.other)}"
            own, other = (_row(found, case, *end) for end in (aim.own, aim.other))
            times = [row.median_ms for row in (own, other) if row is not None and row.median_ms is not None]
            if own is None or other is None or len(times) < 2:
                why = "; ".join(dict.fromkeys(_state(row) for row in (own, other) if row is None or row.state != OK))
                lines.append(f"no time  {what}, at most {aim.most:.2f}: {why}")
                continue
            paired = aim.other == (case.baseline, aim.own[1]) and own.ratio is not None
            ratio = own.ratio if paired and own.ratio is not None else times[0] / times[1]
            verdict = "met" if ratio <= aim.most else "MISSED"
            lines.append(f"{verdict:8} {what} = {ratio:.2f}, at most {aim.most:.2f}")
    return lines


def _row(found: Mapping[tuple[str, str, str, str, str], Row], case: Case, provider: str, mode: str) -> Row | None:
    place = (case.shape, case.dtype)
    return found.get((case.op, provider, mode, *place)) or found.get((case.op, provider, ALL_MODES, *place))


def _state(row: Row | None) -> str:
    return "not run" if row is None else f"{row.provider}: {row.state}"
