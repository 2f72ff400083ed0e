"""The command line as a user meets it: in processes of its own."""

from __future__ import annotations

import csv
import gzip
import json
import shlex
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import consequentialism as cw
from consequentialism import cli

IDX_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def run(*arguments: str | Path, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "consequentialism", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout)


def run_here(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Without the seconds that a process takes to start, for the many ways to be refused; an exception passes."""
    try:
        code = cli.main([*map(str, arguments)])
    except SystemExit as end:
        code = end.code  # type: ignore[assignment]
    printed = capsys.readouterr()
    return subprocess.CompletedProcess(arguments, code, printed.out, printed.err)


def assert_one_clear_line(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if not line.startswith("usage:") and line[:1] != " "]
    assert len(lines) == 1, done.stderr
    for part in parts:
        assert part in lines[0], done.stderr


def write_mnist(folder: Path, *, compress: bool = False, train: int = 300, test: int = 60) -> None:
    """A small data set in MNIST's format, whose classes can be told apart."""
    generator = np.random.default_rng(0)
    for kind, count in (("train", train), ("t10k", test)):
        labels = generator.integers(0, 10, count).astype(np.uint8)
        images = generator.integers(0, 60, (count, 28, 28)).astype(np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[2 * label : 2 * label + 2] = 250
        contents = {
            f"{kind}-images-idx3-ubyte": struct.pack(">IIII", 2051, count, 28, 28) + images.tobytes(),
            f"{kind}-labels-idx1-ubyte": struct.pack(">II", 2049, count) + labels.tobytes(),
        }
        for name, content in contents.items():
            if compress:
                (folder / f"{name}.gz").write_bytes(gzip.compress(content))
            else:
                (folder / name).write_bytes(content)


def test_info_names_versions_and_backends() -> None:
    done = run("info")
    assert done.returncode == 0
    assert cw.__version__ in done.stdout
    for name, state in cw.backends().items():
        assert f"backend {name}" in done.stdout
        assert state in done.stdout


def test_check_passes_with_one_line_for_each_backend() -> None:
    done = run("check")
    assert done.returncode == 0, done.stdout
    assert [line.split()[0] for line in done.stdout.splitlines()] == list(cw.backends())


def test_check_fails_on_a_wrong_backend(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from consequentialism import reference

    right = reference.weight_grad
    monkeypatch.setattr(
        reference, "weight_grad", lambda dy, rows, column: tuple(1.001 * t for t in right(dy, rows, column))
    )
    assert cli.main(["check"]) == 1
    assert "reference  FAIL" in capsys.readouterr().out


def test_bad_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["fly"], ["bench", "--shape", "3,4"], ["bench", "--seconds", "-1"]):
        assert_one_clear_line(run_here(capsys, *arguments), "error:")
    assert_one_clear_line(run(), "error:")


@pytest.mark.parametrize(
    ("arguments", "saying"),
    [
        (["demo", "--out", "file"], "--out {}/file cannot be written: it is a file, and must be a folder"),
        (["bench-train", "--task", "digits", "--out", "file"], "{}/file cannot be written: it is a file"),
        (["bench", "--out", "file/x.csv"], "--out {}/file cannot be written: it is a file, and must be a folder"),
        (["bench", "--out", "folder"], "--out {}/folder cannot be written: it is a folder, and must be a file"),
        (["bench", "--plot", "file"], "--plot {}/file cannot be written: it is a file"),
    ],
)
def test_what_cannot_be_written_is_said_before_any_work(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], saying: str
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    done = run_here(capsys, *arguments[:-1], tmp_path / arguments[-1])
    assert_one_clear_line(done, saying.format(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
    assert not list((tmp_path / "folder").iterdir())


def test_a_task_without_its_data_is_no_success(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    done = run_here(capsys, "bench-train", "--task", "nanogpt", "--data", tmp_path, "--out", tmp_path / "out")
    assert_one_clear_line(
        done, f"argument --task: nothing is left to run. nanogpt: no tinyshakespeare.txt in {tmp_path}"
    )
    assert not (tmp_path / "out").exists()


def test_ctrl_c_ends_in_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "backends", stopped)
    done = run_here(capsys, "info")
    assert (done.returncode, done.stderr) == (130, "\nconsequentialism info: stopped\n")


def test_bench_writes_its_csv(tmp_path: Path) -> None:
    out = tmp_path / "new" / "cost.csv"
    peers = ("naive", "isaac", "consequentialism", "reference", "stock")
    done = run("bench", "--shape", "16,20,12", "--seconds", "200", "--rehearse", "--dtype", "float32", "--out", out,
               *(part for name in peers for part in ("--provider", name)))  # fmt: skip
    assert done.returncode == 0, done.stderr
    with out.open() as file:
        rows = list(csv.DictReader(file))
    assert {row["provider"] for row in rows} == {"plain", "naive", "isaac", "consequentialism", "reference", "stock"}
    assert all(float(row["median_ms"]) > 0 and float(row["ratio"]) > 0 and int(row["peak_bytes"]) > 0 for row in rows)
    assert {row["ratio"] for row in rows if row["provider"] == "plain"} == {"1"}


def test_demo_reports_all_that_it_measured(tmp_path: Path) -> None:
    done = run("demo", "--epochs", "2", "--optimizer", "adam", "--optimizer", "emended-sgd", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert "emended-sgd" in done.stdout
    assert "adam" in json.dumps(results)
    assert {run["trial"]["lr"] for run in results["runs"] if run["trial"]["optimizer"] == "adam"} == {0.001, 0.011}
    assert "Untuned, test accuracy after one epoch: emended SGD" in done.stdout
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("compress", [False, True])
def test_demo_reads_mnist_from_a_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path, compress: bool) -> None:
    write_mnist(tmp_path, compress=compress)
    done = run_here(capsys, "demo", "--data", "mnist", "--root", tmp_path, "--epochs", "1", "--target", "0.5",
                    "--optimizer", "emended-sgd", "--out", tmp_path / "out")  # fmt: skip
    assert not done.returncode, done.stderr


@pytest.mark.parametrize("name", IDX_FILES)
def test_demo_names_a_missing_file(capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str) -> None:
    write_mnist(tmp_path)
    (tmp_path / name).unlink()
    done = run_here(capsys, "demo", "--data", "mnist", "--root", tmp_path, "--out", tmp_path / "out")
    assert_one_clear_line(done, name[:12])


@pytest.mark.parametrize("name", IDX_FILES)
@pytest.mark.parametrize("damage", ["truncated", "magic", "empty"])
def test_demo_names_a_damaged_file(capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str, damage: str) -> None:
    write_mnist(tmp_path)
    content = (tmp_path / name).read_bytes()
    damaged = {"truncated": content[:-5], "magic": b"\x00\x00\x08\x07" + content[4:], "empty": b""}[damage]
    (tmp_path / name).write_bytes(damaged)
    done = run_here(capsys, "demo", "--data", "mnist", "--root", tmp_path, "--out", tmp_path / "out")
    assert_one_clear_line(done, name)


def test_demo_names_a_broken_gzip_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    write_mnist(tmp_path, compress=True)
    path = tmp_path / f"{IDX_FILES[0]}.gz"
    path.write_bytes(path.read_bytes()[:-20])
    done = run_here(capsys, "demo", "--data", "mnist", "--root", tmp_path, "--out", tmp_path / "out")
    assert_one_clear_line(done, IDX_FILES[0])


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--optimizer", "adamw"], "adamw"),
        (["--data", "cifar"], "cifar"),
        (["--model", "rnn"], "rnn"),
        (["--model", "conv1d", "--optimizer", "emended-sgd", "--target", "0.9"], "mlp"),
        (["--device", "abacus"], "abacus"),
        (["--epochs", "0"], "0"),
        (["--batch-size", "-3"], "-3"),
        (["--target", "1.5"], "1.5"),
        (["--damping", "0"], "0"),
        (["--data", "mnist", "--root", "/does/not/exist"], "/does/not/exist"),
    ],
)
def test_demo_refuses_bad_arguments_in_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], part: str
) -> None:
    assert_one_clear_line(run_here(capsys, "demo", "--out", tmp_path, *arguments), part)


def test_a_closed_pipe_ends_quietly() -> None:
    command = f"{shlex.quote(sys.executable)} -m consequentialism info | head -n 1"
    finished = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=120)
    assert finished.stdout.startswith("consequentialism"), finished
    assert "Traceback" not in finished.stderr
    assert "BrokenPipe" not in finished.stderr


def test_the_benchmarks_of_a_checkout_are_found_by_their_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in sys.modules if name.split(".")[:2] == ["consequentialism", "bench"]]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)  # as where nothing is installed
    monkeypatch.setitem(sys.modules, "bench", None)  # somebody else's cannot be taken
    module = cli._bench_module("shapes")
    assert module.__name__ == "consequentialism.bench.shapes"
    assert Path(str(module.__file__)).parent == Path(cli.__file__).resolve().parent.parent / "bench"
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "package" / "cli.py"))
    with pytest.raises(SystemExit, match="neither installed nor in"):
        cli._bench_module("shapes")
