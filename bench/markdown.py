"""Pieces of text that the reports share."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence

from .case import Row
from .environment import Environment


def markdown(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table; the first column is text, the others are figures."""
    rule = ["---", *("---:" for _ in headings[1:])]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (headings, rule, *lines))


def document(parts: Iterable[str]) -> str:
    """The parts as paragraphs, prose and items of lists in lines of at most 140 characters."""
    blocks = "\n\n".join(parts).split("\n\n")
    return "\n\n".join(
        block if block.startswith(("|", "#", "![")) else "\n".join(map(_wrapped, block.splitlines()))
        for block in blocks
    )


def _wrapped(line: str) -> str:
    indent = "  " if line.startswith("- ") else ""
    return textwrap.fill(line, 140, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def number(value: float, form: str) -> str:
    """A figure, or nothing for what was not reached."""
    return format(value, form) if math.isfinite(value) else "not reached"


def where(rows: Sequence[Environment | Row]) -> str:
    """Machine, versions and commits; each machine with versions once."""
    commits: dict[str, dict[str, None]] = {}
    for row in rows:
        if row.commit:
            commits.setdefault(_where(row), {})[row.commit] = None
    return "; ".join(
        f"{place} at commit{'s' if len(found) > 1 else ''} {', '.join(found)}" for place, found in commits.items()
    )


def _where(row: Environment | Row) -> str:
    cuda = f", CUDA {row.cuda}" if row.cuda else ""
    return (
        f"{row.device}, {row.threads} thread{'s' if row.threads > 1 else ''}, torch {row.torch}{cuda}, "
        f"Python {row.python}, consequentialism {row.version}"
    )
