"""CSV files of dataclasses: what is written is read again, another schema is refused in one line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from bench import table
from bench.environment import environment, slug
from consequentialism.errors import UserError


@dataclass
class Line:
    name: str
    count: int
    seconds: float | None = None
    right: bool = True


LINES = [Line("a, b", 3, 0.25), Line('"c"', -1, None, False), Line("d\ne", 0, float("inf"))]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "new" / "lines.csv"


def test_what_is_written_is_read_again(path: Path) -> None:
    table.write(LINES, Line, path)
    assert table.read(path, Line) == LINES
    table.write([], Line, path)
    assert path.read_text() == "name,count,seconds,right\n"
    assert table.read(path, Line) == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name,count,seconds\nx,1,2\n", "a CSV of another schema: missing right"),
        ("name,count,seconds,right,left\n", "a CSV of another schema: unknown left"),
        ("name,count,median,right\n", "a CSV of another schema: missing seconds; unknown median"),
        ("name,count,seconds,right,right\n", "a CSV of another schema: columns stand twice"),
        ("", "a CSV of another schema: missing name, count, seconds, right"),
        ("name,count,seconds,right\nx,1,2,True\nx,1.5,2,True\n", "3: count is no int: '1.5'"),
        ("name,count,seconds,right\nx,,2,True\n", "2: count is no int: ''"),
        ("name,count,seconds,right\nx,1,2,maybe\n", "2: right is no bool: 'maybe'"),
        ("name,count,seconds,right\nx,1,2\n", "2: not 4 values"),
        ("name,count,seconds,right\nx,1,2,True,5\n", "2: not 4 values"),
    ],
)
def test_another_schema_is_refused_in_one_line(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "lines.csv"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        table.read(path, Line)
    assert str(error.value) == f"{path}:{'' if said[0].isdigit() else ' '}{said}"


def test_the_order_of_the_columns_does_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "lines.csv"
    path.write_text("right,seconds,count,name\nTrue,,1,x\n")
    assert table.read(path, Line) == [Line("x", 1)]


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read: No such file"):
        table.read(tmp_path / "none.csv", Line)
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read: not a text file"):
        table.read(tmp_path / "binary.csv", Line)
    with pytest.raises(UserError, match="cannot be written"):
        table.write(LINES, Line, tmp_path)


def test_environment_of_the_processor() -> None:
    found = environment()
    assert (found.torch, found.threads) == (torch.__version__, torch.get_num_threads())
    assert found.device
    assert found.commit
    assert slug() == f"cpu-{found.threads}-threads"
