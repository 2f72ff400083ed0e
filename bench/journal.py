"""What has been begun and what has been found, on disk, so that it outlives the process that measures."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .case import Case, Row

Begun = tuple[str, str, str, str]  # op, shape, type and provider


@dataclass
class Journal:
    """Lines of JSON; those of an earlier process are read first."""

    path: Path
    rows: list[Row] = field(default_factory=list)
    ended: set[tuple[str, str, str]] = field(default_factory=set)  # cases
    begun: Begun | None = None
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for line in self.path.read_text().splitlines() if self.path.exists() else []:
            try:
                self._take(json.loads(line))
            except json.JSONDecodeError:  # cut off by a death
                continue

    def _take(self, entry: dict[str, Any]) -> None:
        if "begin" in entry:
            op, shape, dtype, provider = entry["begin"]
            self.begun = (op, shape, dtype, provider)
        elif "row" in entry:
            self.rows.append(Row(**entry["row"]))
        elif "end" in entry:
            op, shape, dtype = entry["end"]
            self.ended.add((op, shape, dtype))
            self.begun = None
        else:
            self.meta.update(entry["meta"])

    def _write(self, entry: dict[str, Any]) -> None:
        self._take(entry)
        with self.path.open("a") as file:
            file.write("\n" if file.tell() and not self._complete() else "")
            file.write(json.dumps(entry) + "\n")

    def _complete(self) -> bool:
        return self.path.read_bytes().endswith(b"\n")

    def begin(self, case: tuple[str, str, str], provider: str) -> None:
        self._write({"begin": [*case, provider]})

    def row(self, row: Row) -> None:
        self._write({"row": asdict(row)})

    def end(self, case: tuple[str, str, str]) -> None:
        self._write({"end": list(case)})

    def note(self, **meta: Any) -> None:
        self._write({"meta": meta})

    def settled(self, case: Case) -> set[str]:
        """The providers of a case that are not tried again."""
        return {r.provider for r in self.rows if (r.op, r.shape, r.dtype) == case.key}
