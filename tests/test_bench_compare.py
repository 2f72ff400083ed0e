"""Comparisons of two CSVs, plots of rows, and what the command line says of bad input."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import compare, plot, table
from bench.__main__ import main
from bench.case import OK, Row
from bench.environment import git
from consequentialism.errors import UserError


def row(provider: str, ratio: float | None, shape: str = "2x3x4", op: str = "linear", state: str = OK) -> Row:
    made = Row(op, provider, "eager", shape, "float32", state, 1.0, 1.0, 1.0, 5, "plain", ratio, floor_ratio=1.1)
    return replace(made, device="a processor", threads=2, torch="2.13.0", version="0.1.0", commit="abc")


OLD = [row("plain", 1.0), row("own", 1.25), row("peer", 2.0), row("gone", 3.0), row("own", 1.2, "5x6x7")]
NEW = [row("plain", 1.0), row("own", 1.5), row("peer", 1.8), row("new", 3.0), row("own", 1.2, "5x6x7")]


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    paths = tmp_path / "old.csv", tmp_path / "new.csv"
    for path, rows in zip(paths, (OLD, NEW), strict=True):
        table.write(rows, Row, path)
    return str(paths[0]), str(paths[1])


def test_ratios_of_ratios() -> None:
    changes = compare.compare(OLD, NEW)
    assert [(one.provider, one.shape) for one in changes] == [("own", "2x3x4"), ("peer", "2x3x4"), ("own", "5x6x7")]
    assert [one.factor for one in changes] == pytest.approx([1.2, 0.9, 1.0])
    assert [one.verdict for one in changes] == ["SLOWER", "faster", ""]


def test_a_machine_that_is_slower_altogether_cancels() -> None:
    slower = [replace(one, median_ms=3.0) for one in OLD]
    assert all(one.factor == 1 for one in compare.compare(OLD, slower))


def test_what_has_no_ratio_or_another_baseline_is_left_out() -> None:
    assert compare.compare([row("own", None)], [row("own", 1.0)]) == []
    assert compare.compare([row("own", 1.0)], [row("own", None, state="failed: x")]) == []
    assert compare.compare([replace(row("own", 1.0), baseline="torch")], [row("own", 1.0)]) == []


def test_two_files_are_compared_and_nothing_is_measured(
    files: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--against", *files]) == 0
    said = capsys.readouterr().out
    assert said.startswith("old: a processor, 2 threads, torch 2.13.0, version 0.1.0, commit abc\n")
    assert "3 compared, 1 slower by more than 5%" in said
    assert "1 only in the old one\n1 only in the new one" in said
    assert "1.200" in next(line for line in said.splitlines() if "SLOWER" in line)


def test_a_commits_results_are_read(monkeypatch: pytest.MonkeyPatch, files: tuple[str, str]) -> None:
    text = Path(files[0]).read_text()
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(compare, "git", lambda *arguments: asked.append(arguments) or text)
    assert compare.load("v1", "cpu-2-threads") == OLD
    assert asked[-1] == ("show", "v1:bench/results/cpu-2-threads/step_cost.csv")


BAD = {
    "provider": ["--provider", "fast"],
    "op": ["--op", "pool3d"],
    "shape": ["--shape", "3,4"],
    "shape of words": ["--shape", "a,b,c"],
    "shape of nothing": ["--shape", "3,4,0"],
    "dtype": ["--dtype", "int8"],
    "device": ["--device", "abacus"],
    "threads": ["--threads", "0"],
    "seconds": ["--seconds", "soon"],
    "no time": ["--seconds", "-1"],
    "unknown": ["--speed"],
    "neither file nor commit": ["--against", "no-such-thing"],
    "three": ["--against", "a", "b", "c"],
}


@pytest.mark.parametrize("arguments", BAD.values(), ids=BAD)
def test_bad_arguments_are_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("consequentialism bench: error: ")
    assert said.err.count("\n") == 1
    assert arguments[-1] in said.err or arguments[0] in said.err


def test_a_csv_of_another_schema_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "old.csv"
    path.write_text("op,provider,shape,dtype,threads,median_ms,flop_floor\n")
    assert main(["--against", str(path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"consequentialism bench: error: {path}: a CSV of another schema: missing mode, state, ")
    assert said.endswith("; unknown flop_floor\n")
    assert said.count("\n") == 1


@pytest.mark.skipif(git("rev-parse", "HEAD") is None, reason="not in a git checkout")
def test_a_commit_without_results_of_the_device() -> None:
    with pytest.raises(UserError, match="commit 'HEAD' has no bench/results/abacus/"):
        compare.load("HEAD", "abacus")


def test_plots_are_of_rows(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    rows = [*OLD, row("own", None, state="failed: x", op="damped_inverse"), row("own", 1.5, op="step")]
    paths = plot.save(rows, tmp_path / "new")
    assert paths == [tmp_path / "new" / "linear.png", tmp_path / "new" / "step.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_without_matplotlib_there_are_no_plots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match="no plots: matplotlib is not installed"):
        plot.save(OLD, tmp_path)


def test_the_number_of_threads_is_given_back(capsys: pytest.CaptureFixture[str]) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert main(["--device", "cpu", "--against", "one", "two", "three"]) == 2
        assert "--against" in capsys.readouterr().err  # the device, and so its threads, was chosen by then
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
