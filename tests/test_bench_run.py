"""The benchmark's runner: times by a false clock, refusals, failures that stay with their provider."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bench_cases
import pytest
import torch

import bench.__main__ as command
import bench.worker
from bench import show, table
from bench.case import ALL_MODES, OK, Case, Row, Target, Unavailable, Work
from bench.journal import Journal
from bench.roofline import Minimum, PeakRates
from bench.timing import Device, Host, Rehearsal
from bench.worker import TIMING, WARM_ROUNDS, DeviceDead, run_case, work_through

ROOT = Path(__file__).resolve().parent.parent
REACHED = PeakRates(1000.0, {"float32": 50.0})
PLACE = ("linear", "64x784x1600", "float32")


class Clock:
    """Goes on by what the work says, in milliseconds."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def takes(self, *milliseconds: float) -> Callable[[], None]:
        turns = itertools.cycle(milliseconds)

        def run() -> None:
            self.now += 1e-3 * next(turns)

        return run


def case(providers: dict[str, Callable[[], Work]], **changes: Any) -> Case:
    return Case(*PLACE, providers, "plain", 1e-4, **{"modes": ("eager",), **changes})


def fails(problem: Exception) -> Callable[[], Any]:
    def run() -> None:
        raise problem

    return run


def go(made: Case, device: Device, journal: Journal) -> dict[tuple[str, str], Row]:
    run_case(made, device, REACHED, journal, 0.0)
    return {(row.provider, row.mode): row for row in journal.rows}


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "journal")


def test_medians_ratios_and_floors_by_a_false_clock(journal: Journal) -> None:
    clock = Clock()
    providers = {"plain": lambda: Work(clock.takes(10)), "own": lambda: Work(clock.takes(15), lambda: 1e-6)}
    targets = (Target(("own", "eager"), ("plain", "eager"), 1.4),)
    made = case(providers, least=Minimum(4e9, 1e11), emended=Minimum(4e9, 5e11), targets=targets)
    rows = go(made, Host(clock), journal)
    own, plain = rows["own", "eager"], rows["plain", "eager"]
    assert (own.state, own.error, own.baseline, own.target) == (OK, 1e-6, "plain", 1.4)
    assert (own.median_ms, own.p20_ms, own.p80_ms, own.ratio) == pytest.approx((15, 15, 15, 1.5))
    assert plain.floor_ms == pytest.approx(4)  # 4 GB at 1000 GB/s; the operations would take 2
    assert own.floor_ms == pytest.approx(10)  # 5e11 at 50 TFLOP/s
    assert (own.floor_fraction, own.floor_ratio) == pytest.approx((10 / 15, 2.5))
    assert (plain.ratio, plain.floor_ratio, plain.target) == (1, 1, None)
    assert (own.bandwidth_gb_s, own.matrix_tflop_s, own.least_flops) == (1000, 50, 5e11)
    assert own.calls == Host.least_rounds * 5
    assert journal.ended == {PLACE}


def test_a_drift_of_the_machine_cancels_in_the_ratio(journal: Journal) -> None:
    clock = Clock()

    def drifting(milliseconds: float) -> Callable[[], None]:
        def run() -> None:
            clock.now += 1e-3 * milliseconds * (1 + 0.01 * clock.now)

        return run

    providers = {"plain": lambda: Work(drifting(100)), "own": lambda: Work(drifting(150))}
    rows = go(case(providers), Host(clock), journal)
    assert rows["own", "eager"].ratio == pytest.approx(1.5, rel=0.02)
    last, first = rows["plain", "eager"].p80_ms, rows["plain", "eager"].p20_ms
    assert last is not None
    assert first is not None
    assert last > first * 1.01, "the clock did drift"


def test_warm_rounds_are_not_counted(journal: Journal) -> None:
    clock = Clock()
    before = 3  # for the peak, and for a turn of a call that warms and, as it takes long, one that is timed
    slow = [1000.0] * (before + 2 * WARM_ROUNDS)
    rows = go(case({"plain": lambda: Work(clock.takes(*slow, *[10.0] * 90))}), Host(clock), journal)
    assert rows["plain", "eager"].p80_ms == pytest.approx(10)


@pytest.mark.parametrize("error", [1e-3, float("nan")])
def test_a_wrong_provider_is_refused_and_not_timed(journal: Journal, error: float) -> None:
    runs: list[str] = []
    providers = {"plain": lambda: Work(lambda: None), "bad": lambda: Work(lambda: runs.append(""), lambda: error)}
    rows = go(case(providers), Host(), journal)
    row = rows["bad", ALL_MODES]
    assert row.state == f"refused: relative error {error:.2g}, allowed 0.0001"
    assert row.median_ms is None
    assert runs == []
    assert len(show.problems(journal.rows)) == 1


def test_what_a_call_left_is_freed_before_its_memory_is_measured(journal: Journal) -> None:
    held: list[torch.Tensor] = []

    def run() -> None:
        held.clear()
        held.append(torch.zeros(1000) + 1)

    rows = go(case({"plain": lambda: Work(run, lambda: run() or 0.0, held.clear)}), Host(), journal)
    peak = rows["plain", "eager"].peak_bytes
    assert peak is not None
    assert 8000 <= peak < 9000  # two tensors of 4,000 bytes


def test_a_failure_is_its_providers_alone(journal: Journal) -> None:
    class NoGraphs(Rehearsal):
        least_rounds = most_rounds = 6

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
        "peer": fails(Unavailable("No module named 'peer'")),
        "check": lambda: Work(lambda: None, fails(ZeroDivisionError("by zero"))),
        "run": lambda: Work(fails(torch.OutOfMemoryError("no memory"))),
        "capture": lambda: Work(uncapturable),
        "late": lambda: Work(fails_late),
        "own": lambda: Work(lambda: None),
    }
    rows = go(case(providers, modes=("graph", "eager")), NoGraphs(), journal)
    found = {key: row.state for key, row in rows.items()}
    assert found["build", ALL_MODES] == "failed: RuntimeError: no such kernel"
    assert found["peer", ALL_MODES] == "skipped: No module named 'peer'"
    assert found["check", ALL_MODES] == "failed: ZeroDivisionError: by zero"
    assert found["run", ALL_MODES].startswith("failed: OutOfMemoryError")
    assert found["capture", "graph"] == "failed: RuntimeError: cannot be captured"
    assert found["capture", "eager"] == OK
    assert found["late", "graph"] == found["late", "eager"] == "failed: RuntimeError: late"
    assert [found[name, mode] for name in ("plain", "own") for mode in ("graph", "eager")] == [OK] * 4
    assert show.skipped(journal.rows) == ["peer (linear): No module named 'peer'"]
    assert len(show.problems(journal.rows)) == 6


def test_without_its_baseline_a_provider_has_no_ratio(journal: Journal) -> None:
    rows = go(case({"plain": fails(RuntimeError("no")), "own": lambda: Work(lambda: None)}), Host(), journal)
    assert rows["own", "eager"].state == OK
    assert rows["own", "eager"].ratio is None


def test_a_dead_device_ends_the_worker_and_the_next_leaves_its_provider_out(journal: Journal) -> None:
    class Dies(Host):
        def alive(self) -> bool:
            return False

    providers = {"plain": lambda: Work(lambda: None), "bad": lambda: Work(fails(RuntimeError("illegal access")))}
    with pytest.raises(DeviceDead, match="illegal access"):
        go(case(providers), Dies(), journal)
    again = Journal(journal.path)
    assert again.begun == (*PLACE, "bad")
    assert not again.ended
    rows = go(case(providers), Dies(), again)
    assert rows["plain", "eager"].state == OK
    assert rows["bad", ALL_MODES].state.startswith("failed: RuntimeError: illegal access")


def test_what_is_not_begun_in_time_says_so(journal: Journal) -> None:
    providers = {"plain": lambda: Work(lambda: None)}
    work_through([case(providers)], Host(), REACHED, journal, time.time() - 1)
    assert [row.state for row in journal.rows] == ["skipped: no time left"]
    work_through([case(providers)], Host(), REACHED, journal, time.time() + 100)
    assert len(journal.rows) == 1, "an ended case is not begun again"


def test_the_time_is_shared_by_the_cases(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(bench.worker, "time", SimpleNamespace(time=clock))
    providers = {"plain": lambda: Work(clock.takes(10))}
    made = [Case("op", str(i), "float32", providers, "plain", 1.0, ("eager",)) for i in range(3)]
    work_through(made, Host(clock), REACHED, journal, 15)
    assert [row.state for row in journal.rows] == [OK] * 3
    assert all(380 <= row.calls <= 420 for row in journal.rows)  # five sixths of 5 s, 10 ms each
    assert 15 <= clock.now < 15.2


def test_one_round_must_do_where_the_time_is_up(journal: Journal) -> None:
    clock = Clock()
    run_case(case({"plain": lambda: Work(clock.takes(300))}), Host(clock), REACHED, journal, 0.0, latest=0.0)
    assert [row.calls for row in journal.rows] == [1]


def test_journal_survives_a_line_cut_off(journal: Journal) -> None:
    journal.begin(("a", "b 1", "c"), "plain")
    journal.row(Row("a", "plain", "graph", "b 1", "c"))
    with journal.path.open("a") as file:
        file.write('{"row": {"op": "a", "prov')
    again = Journal(journal.path)
    assert again.begun == ("a", "b 1", "c", "plain")
    again.end(("a", "b 1", "c"))
    last = Journal(journal.path)
    assert (len(last.rows), last.ended) == (1, {("a", "b 1", "c")})


def run_script(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests")}
    command = [sys.executable, "-m", "bench", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)


def test_a_provider_that_kills_or_hangs_the_process_costs_itself_only(tmp_path: Path) -> None:
    out = tmp_path / "new" / "cost.csv"
    done = run_script(
        "--rehearse", "--out", out, "--cases", "bench_cases:cases", "--patience", "10", "--seconds", "250"
    )
    found = {(row.op, row.provider, row.mode): row.state for row in table.read(out, Row)}
    assert done.returncode == 1, done.stdout + done.stderr
    assert found["exits", "bad", ALL_MODES] == "died: exit code 5", found
    assert found["hangs", "bad", ALL_MODES] == "died: hung for 10 s"
    assert found["timing", TIMING, ALL_MODES] == "died: exit code 6"
    for op in ("exits", "hangs", "last"):
        assert found[op, "plain", "graph"] == found[op, "plain", "eager"] == OK
    assert done.stdout.count("PROBLEM") == 3
    assert bench_cases.__file__


def test_rehearsal_of_a_gpus_cases(tmp_path: Path) -> None:
    out = tmp_path / "cost.csv"
    ops = ("linear", "conv2d", "step", "mlp", "damped_inverses", "fused_weight_grad", "weight_grad")
    done = run_script(
        "--rehearse", "--quick", "--dtype", "float32", "--out", out, *(part for op in ops for part in ("--op", op))
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = table.read(out, Row)
    assert {row.op for row in rows} == set(ops)
    for row in rows:
        assert row.state == OK or row.state.startswith("skipped: "), row
        assert row.device == "rehearsal on the CPU"
        assert row.state != OK or row.median_ms
        assert row.state != OK or row.error is not None, "every provider is held to float64"
        assert row.state != OK or (row.floor_ms and row.floor_fraction)
    assert {row.provider for row in rows if row.state != OK} <= {"isaac", "triton"}


def test_sigterm_ends_the_measuring_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was measured before it is kept; afterwards the process has its own handler again."""
    calls: list[int] = []
    stopped = []
    monkeypatch.setattr(command, "supervise", lambda *_: os.kill(os.getpid(), signal.SIGTERM) or time.sleep(5))
    monkeypatch.setattr(command, "_finish", lambda *arguments: stopped.append(arguments[3]["stopped"]) or 1)
    own = signal.signal(signal.SIGTERM, lambda number, _: calls.append(number))
    try:
        assert command.main(["--rehearse", "--quick"]) == 1
        assert (stopped, calls) == (["stopped from outside"], [])
        os.kill(os.getpid(), signal.SIGTERM)
        assert calls == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, own)
