"""CSV files whose lines are the fields of a dataclass: one schema, checked on reading.

A field is a ``str``, ``int``, ``float`` or ``bool``, or one of them ``| None``, which is written as nothing.
"""

from __future__ import annotations

import csv
import io
import typing
from collections.abc import Iterable
from dataclasses import asdict, fields
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar

from consequentialism.errors import UserError

Line = TypeVar("Line")  # a dataclass

DIGITS = 6  # of a float, significant


def write(lines: Iterable[Line], schema: type[Line], path: Path) -> None:
    """Write ``lines``, with a header; the folder is made.

    Raises:
        UserError: The file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=columns(schema), lineterminator="\n")
            writer.writeheader()
            writer.writerows({k: _text(v) for k, v in asdict(line).items()} for line in lines)  # type: ignore[call-overload]
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None


def append(line: Line, schema: type[Line], path: Path) -> None:
    """Add a line at the end of a file, at once; where there is none, it is made, with a header.

    Raises:
        UserError: The file cannot be written.
    """
    if not path.exists():
        write([], schema, path)
    text = io.StringIO()
    csv.DictWriter(text, fieldnames=columns(schema), lineterminator="\n").writerow(
        {k: _text(v) for k, v in asdict(line).items()}  # type: ignore[call-overload]
    )
    try:
        with path.open("a", newline="") as file:
            file.write(text.getvalue())
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None


def read(path: Path, schema: type[Line]) -> list[Line]:
    """The lines of a file.

    Raises:
        UserError: The file cannot be read, its columns are not the schema's, or a value is none of its type.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or 'not a text file'}") from None
    return parse(text, schema, str(path))


def parse(text: str, schema: type[Line], name: str) -> list[Line]:
    """The rows of a file's text; ``name`` stands for the file in errors."""
    reader = csv.DictReader(io.StringIO(text, newline=""))
    expected, found = columns(schema), list(reader.fieldnames or [])
    if set(expected) != set(found) or len(found) != len(expected):
        missing = [column for column in expected if column not in found]
        unknown = [column for column in found if column not in expected]
        parts = [f"{what} {', '.join(which)}" for what, which in (("missing", missing), ("unknown", unknown)) if which]
        raise UserError(f"{name}: a CSV of another schema: {'; '.join(parts) or 'columns stand twice'}")
    types = typing.get_type_hints(schema)
    lines = []
    for record in reader:
        place = f"{name}:{reader.line_num}"
        if None in record or None in record.values():
            raise UserError(f"{place}: not {len(expected)} values")
        lines.append(schema(**{column: _value(record[column], types[column], column, place) for column in expected}))
    return lines


def columns(schema: type[Any]) -> list[str]:
    """The names of the fields, in their order."""
    return [field.name for field in fields(schema)]


def _text(value: object) -> object:
    return f"{value:.{DIGITS}g}" if isinstance(value, float) else value


def _value(text: str, kind: Any, column: str, place: str) -> object:
    if isinstance(kind, UnionType):
        if text == "":
            return None
        (kind,) = (one for one in typing.get_args(kind) if one is not type(None))
    try:
        return {"True": True, "False": False}[text] if kind is bool else kind(text)
    except (ValueError, KeyError):
        raise UserError(f"{place}: {column} is no {kind.__name__}: {text!r}") from None
