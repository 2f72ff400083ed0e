"""The GPU benchmark without a GPU: times by a false clock, refusals, failures that stay with their provider."""

from __future__ import annotations

import csv
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench_gpu_cases
import pytest
import torch

from bench.gpu import cases, report
from bench.gpu.__main__ import main
from bench.gpu.device import Cuda, Host, quantiles, roofline
from bench.gpu.run import OK, TIMING, WARM_ROUNDS, Case, DeviceDead, Journal, Row, Work, run_case, work_through

ROOT = Path(__file__).resolve().parent.parent


class Clock:
    """Goes on by what the work says."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def takes(self, *microseconds: float) -> Callable[[], None]:
        turns = itertools.cycle(microseconds)

        def run() -> None:
            self.now += 1e-6 * next(turns)

        return run


def case(providers: dict[str, Callable[[], Work]], **changes: Any) -> Case:
    return Case("linear", "64x784x1600", "float32", providers, "plain", 1e-4, **changes)


def fails(problem: Exception) -> Callable[[], Any]:
    def run() -> None:
        raise problem

    return run


def states(journal: Journal) -> dict[tuple[str, str], str]:
    return {(row.provider, row.mode): row.state for row in journal.rows}


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "journal")


def test_medians_and_ratios_by_a_false_clock(journal: Journal) -> None:
    clock = Clock()
    providers = {"plain": lambda: Work(clock.takes(10)), "cuda": lambda: Work(clock.takes(15), lambda: 1e-6)}
    journal.note(bandwidth_gb_s=1000.0, float32_tflop_s=50.0)
    run_case(case(providers, least_bytes=4e6, least_flops=1e8), Host(clock), 20, journal)
    by = {(row.provider, row.mode): row for row in journal.rows}
    assert set(by) == set(itertools.product(["plain", "cuda"], ["graph", "eager"]))
    for mode in ("graph", "eager"):
        row = by["cuda", mode]
        assert row.state == OK
        assert (row.median_us, row.p20_us, row.p80_us) == pytest.approx((15, 15, 15))
        assert row.ratio == pytest.approx(1.5)
        assert row.error == 1e-6
        assert row.floor_us == pytest.approx(4)  # 4 MB at 1000 GB/s; the operations would take 2
        assert row.gb_s == pytest.approx(4e6 / 15e-6 / 1e9)
        assert row.tflop_s == pytest.approx(1e8 / 15e-6 / 1e12)
        assert by["plain", mode].ratio == pytest.approx(1)
    assert journal.ended == {"linear 64x784x1600 float32"}


@pytest.mark.parametrize(("queued", "waits"), [(True, []), (False, ["synchronize"])])
def test_a_call_is_timed_by_events_on_a_cold_cache(
    monkeypatch: pytest.MonkeyPatch, queued: bool, waits: list[str]
) -> None:
    done: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            done.append("record")

        def synchronize(self) -> None:
            done.append("event")

        def elapsed_time(self, stop: Event) -> float:
            return 0.25  # ms

    class Buffer:
        def sum(self) -> None:
            done.append("flush")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("synchronize"))
    device = object.__new__(Cuda)
    device._buffer = Buffer()  # type: ignore[assignment]
    assert device.microseconds(lambda: done.append("run"), queued) == 250
    assert done == ["flush", *waits, "record", "run", "record", "event"]


def test_a_capture_that_breaks_off_leaves_the_stream_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    current = ["default"]

    class Stream:
        name = "side"

        def wait_stream(self, other: Any) -> None:
            return None

    class Current(Stream):
        def __init__(self) -> None:
            self.name = current[-1]

    class Using:
        def __init__(self, stream: Stream) -> None:
            self.stream = stream

        def __enter__(self) -> None:
            self.before = current[-1]
            current.append(self.stream.name)

        def __exit__(self, *_: object) -> None:
            current.append(self.before)

    class Graph:
        def __init__(self, graph: object) -> None:
            return None

        def __enter__(self) -> None:
            current.append("capture")

        def __exit__(self, *_: object) -> None:
            raise RuntimeError("capture_end")  # as torch's does, before it leaves its stream

    def run() -> None:
        if current[-1] == "capture":
            raise ValueError("not capturable")

    names = {"Stream": Stream, "stream": Using, "current_stream": Current, "CUDAGraph": object, "graph": Graph}
    for name, fake in names.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    with pytest.raises(RuntimeError, match="capture_end"):
        object.__new__(Cuda).capture(run)
    assert current[-1] == "default"


def test_quantiles() -> None:
    assert quantiles([float(i) for i in range(101)]) == (50, 20, 80)
    assert quantiles([3.0]) == (3, 3, 3)
    low, high = quantiles([1.0, 1.0, 100.0])[1:]
    assert 1 <= low <= high <= 100


def test_a_wrong_provider_is_refused_and_not_timed(journal: Journal) -> None:
    runs: list[str] = []
    for name, error in (("bad", 1e-3), ("nan", float("nan"))):
        providers = {
            "plain": lambda: Work(lambda: None),
            name: lambda name=name, error=error: Work(lambda: runs.append(name), lambda: error),
        }
        run_case(case(providers), Host(), 3, journal)
        (row,) = (row for row in journal.rows if row.provider == name)
        assert row.state.startswith("refused: relative error")
        assert row.median_us is None
    assert runs == []
    assert len(report.problems(journal.rows)) == 2


def test_a_failure_is_its_providers_alone(journal: Journal) -> None:
    class NoGraphs(Host):
        def capture(self, run: Any) -> Any:
            run()
            if getattr(run, "captured", True):
                return run
            raise RuntimeError("cannot be captured\nand more")

    def uncapturable() -> None:
        return None

    uncapturable.captured = False  # type: ignore[attr-defined]
    turns = iter(range(100))

    def fails_late() -> None:
        if next(turns) > 6:
            raise RuntimeError("late")

    providers = {
        "plain": lambda: Work(lambda: None),
        "build": fails(RuntimeError("no such kernel")),
        "peer": fails(ImportError("No module named 'peer'")),
        "check": lambda: Work(lambda: None, fails(ZeroDivisionError("by zero"))),
        "run": lambda: Work(fails(torch.OutOfMemoryError("no memory"))),
        "capture": lambda: Work(uncapturable),
        "late": lambda: Work(fails_late),
        "cuda": lambda: Work(lambda: None),
    }
    run_case(case(providers), NoGraphs(), 12, journal)
    found = states(journal)
    assert found["build", "graph+eager"] == "failed: RuntimeError: no such kernel"
    assert found["peer", "graph+eager"] == "skipped: No module named 'peer'"
    assert found["check", "graph+eager"] == "failed: ZeroDivisionError: by zero"
    assert found["run", "graph+eager"].startswith("failed: OutOfMemoryError")
    assert found["capture", "graph"] == "failed: RuntimeError: cannot be captured"
    assert found["capture", "eager"] == OK
    assert found["late", "graph"] == found["late", "eager"] == "failed: RuntimeError: late"
    assert [found[name, mode] for name in ("plain", "cuda") for mode in ("graph", "eager")] == [OK] * 4
    assert not any("peer" in line for line in report.problems(journal.rows))
    assert len(report.problems(journal.rows)) == 6


def test_a_dead_device_ends_the_worker_and_the_next_leaves_its_provider_out(journal: Journal) -> None:
    class Dies(Host):
        def alive(self) -> bool:
            return False

    providers = {"plain": lambda: Work(lambda: None), "bad": lambda: Work(fails(RuntimeError("illegal access")))}
    with pytest.raises(DeviceDead, match="illegal access"):
        run_case(case(providers), Dies(), 3, journal)
    again = Journal(journal.path)
    assert again.begun == ("linear 64x784x1600 float32", "bad")
    assert not again.ended
    run_case(case(providers), Dies(), 3, again)
    assert states(again)["plain", "graph"] == OK
    assert states(again)["bad", "graph+eager"].startswith("failed: RuntimeError: illegal access")


def test_what_is_not_begun_in_time_says_so(journal: Journal) -> None:
    def broken() -> Case:
        raise RuntimeError("no memory")

    made = case({"plain": lambda: Work(lambda: None)})
    work_through([broken, lambda: made], Host(), 3, journal, time.time() - 1)
    assert [row.state for row in journal.rows] == ["failed: RuntimeError: no memory", "skipped: no time left"]
    work_through([lambda: made], Host(), 3, journal, time.time() + 100)
    assert len(journal.rows) == 2, "an ended case is not begun again"


def test_journal_survives_a_line_cut_off(journal: Journal) -> None:
    journal.begin("a b c", "plain")
    journal.row(Row("a", "plain", "graph", "b", "c"))
    with journal.path.open("a") as file:
        file.write('{"row": {"op": "a", "prov')
    again = Journal(journal.path)
    again.end("a b c")
    last = Journal(journal.path)
    assert (len(last.rows), last.ended) == (1, {"a b c"})


def run_script(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests")}
    command = [sys.executable, "-m", "bench.gpu", "--rehearse", "--out", str(out), *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)


def test_a_provider_that_kills_or_hangs_the_process_costs_itself_only(tmp_path: Path) -> None:
    out = tmp_path / "new" / "gpu.csv"
    done = run_script(out, "--cases", "bench_gpu_cases:cases", "--patience", "20", "--seconds", "270")
    rows = json.loads(out.with_suffix(".json").read_text())["rows"]
    found = {(row["op"], row["provider"], row["mode"]): row["state"] for row in rows}
    assert done.returncode == 1, done.stdout + done.stderr
    assert found["exits", "bad", "graph+eager"] == "died: exit code 5", found
    assert found["hangs", "bad", "graph+eager"] == "died: hung for 20 s"
    assert found["timing", TIMING, "graph+eager"] == "died: exit code 6"
    for op in ("exits", "hangs", "last"):
        assert found[op, "plain", "graph"] == found[op, "plain", "eager"] == OK
    assert done.stdout.count("PROBLEM") == 3
    assert bench_gpu_cases.__file__


def test_rehearsal_of_the_whole_script(tmp_path: Path) -> None:
    out = tmp_path / "gpu.csv"
    done = run_script(out, "--seconds", "270")
    assert done.returncode == 0, done.stdout + done.stderr
    with out.open() as file:
        lines = list(csv.DictReader(file))
    assert {line["op"] for line in lines} == {"linear", "step", "mlp", "deep", "factor", "factors", "parts", "whole"}
    for line in lines:
        assert line["state"] == OK or line["state"].startswith("skipped: "), line
        assert line["state"] != OK or float(line["median_us"]) > 0
        assert line["device"] == "rehearsal on the CPU"
        assert float(line["bandwidth_gb_s"]) > 0
    skipped = {line["provider"] for line in lines if line["state"] != OK}
    assert skipped <= {"isaac", "triton", "planned", "recompute", "cooperative"}
    whole = json.loads(out.with_suffix(".json").read_text())
    assert len(whole["rows"]) == len(lines)
    assert whole["targets"] == [line for line in done.stdout.splitlines() if line.startswith("no time")]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "backend cuda" in capsys.readouterr().err


def ok(op: str, provider: str, mode: str, shape: str, dtype: str, median: float) -> Row:
    return Row(op, provider, mode, shape, dtype, OK, median, median, median, 1.0, 1e-6, 10, 1.0, 1.0, 1.0)


def test_verdicts() -> None:
    place = ("64x784x1600", "float32")
    rows = [
        ok("linear", "plain", "graph", *place, 10),
        ok("linear", "cuda", "graph", *place, 14),
        ok("linear", "stock", "eager", *place, 69),
        ok("linear", "plain", "graph", "64x784x1600", "bfloat16", 10),
        Row("linear", "cuda", "graph+eager", "64x784x1600", "bfloat16", "refused: relative error 1, allowed 0.01"),
    ]
    lines = report.verdicts(rows)
    assert len(lines) == len(report.targets())
    (met,) = (line for line in lines if line.startswith("met"))
    assert "64x784x1600 float32: cuda, graph / plain, graph = 1.40, at most 1.50" in met
    (missed,) = (line for line in lines if line.startswith("MISSED"))
    assert "cuda, graph / stock, eager = 0.20, at most 0.20" in missed  # 14 / 69 is above 1 / 5
    refused = [line for line in lines if "64x784x1600 bfloat16" in line]
    assert all("no time" in line and "cuda: refused: relative error 1" in line for line in refused)
    assert sum("not run" in line for line in lines) == len(lines) - 3
    assert report.table(rows).count("\n") == len(rows)


def test_every_target_is_a_case_of_the_gpu() -> None:
    class NoDevice(Host):
        type = "meta"  # cases are made, not built

    places = set()
    for quick in (False, True):
        for make in cases.cases(NoDevice(), quick):
            if make.func in (cases.layer_case, cases.step_case, cases.network_case):  # type: ignore[attr-defined]
                made = make()
                places |= {(made.op, made.shape, made.dtype, provider) for provider in made.providers}
                assert set(made.modes) == {"graph", "eager"}
                assert made.baseline in made.providers
    for target in report.targets():
        for provider, _ in (target.own, target.other):
            assert (target.op, target.shape, target.dtype, provider) in places
    assert len({(t.op, t.shape) for t in report.targets()}) == 8


def test_shapes_of_the_cases_have_no_spaces() -> None:
    for make in cases.cases(Host(), quick=False):
        assert len(make().key.split(" ")) == 3


def test_roofline_of_the_host() -> None:
    reached = roofline(Host(), rounds=2)
    assert set(reached) == {"bandwidth_gb_s", "bfloat16_tflop_s", "float32_tflop_s"}
    assert all(value > 0 for value in reached.values())


@pytest.mark.parametrize("rows", [6, 40])  # dual and primal
def test_stock_layer_is_emended(rows: int) -> None:
    torch.manual_seed(0)
    x, dy = torch.randn(rows, 12), torch.randn(rows, 5)
    layer = cases.StockLinear(12, 5)
    layer(x).backward(dy)
    assert cases.relative_error([layer.weight.grad, layer.bias.grad], cases.emended(x, dy)) < 1e-5


def test_relative_error_sees_a_nan() -> None:
    good, bad = torch.ones(2), torch.tensor([1.0, float("nan")])
    assert cases.relative_error([good, bad, good], [good] * 3) != cases.relative_error([good], [good])
    assert not cases.relative_error([good, bad, good], [good] * 3) <= 1e9


def test_warm_rounds_are_not_counted(journal: Journal) -> None:
    clock = Clock()
    before = 2  # for the peak, and to see whether it can be timed
    providers = {"plain": lambda: Work(clock.takes(*[1000] * (before + WARM_ROUNDS), *[10] * 50))}
    run_case(case(providers, modes=("eager",)), Host(clock), 5, journal)
    assert journal.rows[0].p80_us == pytest.approx(10)
