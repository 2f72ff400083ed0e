"""One case after the other in a process of its own, so that a provider that ends the process costs only itself.

The worker writes down in a journal what it is about to run and what it has measured. Where it dies or hangs, the
supervisor notes whose turn it was and starts another worker, which goes on with the rest.
"""

from __future__ import annotations

import gc
import json
import math
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .device import Device, Run, quantiles

OK = "ok"
DEAD_EXIT = 17  # of a worker whose device no longer computes
TIMING = "all providers in turns"
WARM_ROUNDS = 3
LEAST_ROUNDS = 10
CASE_SECONDS = 6.0  # of timing, unless the least rounds take longer
GRACE = 8.0  # seconds
START_PATIENCE = 120.0  # until a worker's first line


class Work(NamedTuple):
    """What a provider runs, and how far off it is: the largest relative error against float64, None if unknown."""

    run: Run
    error: Callable[[], float] | None = None


@dataclass
class Case:
    """One comparison. ``providers`` build their `Work`; an ImportError there means that a peer is not installed."""

    op: str
    shape: str
    dtype: str
    providers: dict[str, Callable[[], Work]]
    baseline: str
    bound: float  # of the error
    modes: tuple[str, ...] = ("graph", "eager")
    least_bytes: float = 0.0  # that a call of the baseline moves, if it reads its inputs and writes its results once
    least_flops: float = 0.0  # that it computes

    @property
    def key(self) -> str:
        return f"{self.op} {self.shape} {self.dtype}"


@dataclass
class Row:
    """One line of the results; times in microseconds, of one call."""

    op: str
    provider: str
    mode: str  # "graph", "eager", or both where nothing was timed
    shape: str
    dtype: str
    state: str = OK  # or why there are no times
    median_us: float | None = None
    p20_us: float | None = None
    p80_us: float | None = None
    ratio: float | None = None  # to the baseline in the same mode
    error: float | None = None
    peak_bytes: int | None = None
    floor_us: float | None = None  # of the baseline's least bytes and operations, by what the device reaches
    gb_s: float | None = None  # those bytes by the time
    tflop_s: float | None = None


@dataclass
class Journal:
    """What has been begun and what has been found, as lines of JSON."""

    path: Path
    rows: list[Row] = field(default_factory=list)
    ended: set[str] = field(default_factory=set)  # cases
    begun: tuple[str, str] | None = None  # case and provider
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for line in self.path.read_text().splitlines() if self.path.exists() else []:
            try:
                self._take(json.loads(line))
            except json.JSONDecodeError:  # cut off by a death
                continue

    def _take(self, entry: dict[str, Any]) -> None:
        if "begin" in entry:
            self.begun = (entry["begin"][0], entry["begin"][1])
        elif "row" in entry:
            self.rows.append(Row(**entry["row"]))
        elif "end" in entry:
            self.ended.add(entry["end"])
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

    def begin(self, case: str, provider: str) -> None:
        self._write({"begin": [case, provider]})

    def row(self, row: Row) -> None:
        self._write({"row": asdict(row)})

    def end(self, case: str) -> None:
        self._write({"end": case})

    def note(self, **meta: Any) -> None:
        self._write({"meta": meta})

    def settled(self, case: Case) -> set[str]:
        """The providers of a case that are not tried again."""
        return {r.provider for r in self.rows if (r.op, r.shape, r.dtype) == (case.op, case.shape, case.dtype)}


class DeviceDead(Exception):
    """The device no longer computes for this process."""


def run_case(case: Case, device: Device, rounds: int, journal: Journal) -> None:
    """Build, check and time the providers of a case, those that can be; a row for each in the journal."""
    settled = journal.settled(case)
    runs: dict[tuple[str, str], Run] = {}
    known: dict[str, dict[str, Any]] = {}
    for name, build in case.providers.items():
        if name in settled:
            continue
        journal.begin(case.key, name)
        try:
            work = build()
            error = None if work.error is None else work.error()
            if error is not None and not error <= case.bound:
                raise ValueError(f"refused: relative error {error:.2g}, allowed {case.bound:g}")
            known[name] = {"error": error, "peak_bytes": device.peak_bytes(work.run)}
        except Exception as problem:
            _report(case, name, "+".join(case.modes), problem, device, journal)
            continue
        for mode in case.modes:
            try:
                runs[name, mode] = device.capture(work.run) if mode == "graph" else work.run
                device.microseconds(runs[name, mode], mode == "graph")
            except Exception as problem:
                runs.pop((name, mode), None)
                _report(case, name, mode, problem, device, journal)
    journal.begin(case.key, TIMING)
    times: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    end = time.monotonic() + CASE_SECONDS
    for round_ in range(WARM_ROUNDS + rounds):
        if round_ >= WARM_ROUNDS + LEAST_ROUNDS and time.monotonic() > end:
            break
        for name, mode in list(times):
            try:
                microseconds = device.microseconds(runs[name, mode], mode == "graph")
            except Exception as problem:
                del times[name, mode]
                _report(case, name, mode, problem, device, journal)
                continue
            if round_ >= WARM_ROUNDS:
                times[name, mode].append(microseconds)
    for row in _rows(case, times, known, journal.meta):
        journal.row(row)
    journal.end(case.key)


def _report(case: Case, provider: str, mode: str, problem: Exception, device: Device, journal: Journal) -> None:
    text = next(iter(str(problem).splitlines()), "")
    if isinstance(problem, ImportError):
        state = f"skipped: {text}"
    elif isinstance(problem, ValueError) and text.startswith("refused"):
        state = text
    else:
        state = f"failed: {type(problem).__name__}: {text}"
    journal.row(Row(case.op, provider, mode, case.shape, case.dtype, state))
    if not isinstance(problem, ImportError) and not device.alive():
        raise DeviceDead(state) from problem


def _rows(
    case: Case, times: dict[tuple[str, str], list[float]], known: dict[str, dict[str, Any]], meta: dict[str, Any]
) -> Iterable[Row]:
    found = {key: quantiles(one) for key, one in times.items()}
    bandwidth = meta.get("bandwidth_gb_s", math.inf)
    rate = meta.get(f"{case.dtype}_tflop_s", math.inf)
    floor = max(1e-3 * case.least_bytes / bandwidth, 1e-6 * case.least_flops / rate)
    for (name, mode), (median, p20, p80) in found.items():
        base = found.get((case.baseline, mode))
        yield Row(
            op=case.op,
            provider=name,
            mode=mode,
            shape=case.shape,
            dtype=case.dtype,
            median_us=median,
            p20_us=p20,
            p80_us=p80,
            ratio=None if base is None else median / base[0],
            floor_us=floor if floor > 0 else None,
            gb_s=1e-3 * case.least_bytes / median if case.least_bytes else None,
            tflop_s=1e-6 * case.least_flops / median if case.least_flops else None,
            **known[name],
        )


def work_through(
    makers: Iterable[Callable[[], Case]], device: Device, rounds: int, journal: Journal, end: float
) -> None:
    """All cases that have not ended, until the time, by `time.time`, is up."""
    for make in makers:
        try:
            case = make()
        except Exception as problem:
            journal.row(Row("case", "", "", "", "", f"failed: {type(problem).__name__}: {problem}"))
            continue
        if case.key in journal.ended:
            continue
        if time.time() > end:
            for name in case.providers.keys() - journal.settled(case):
                journal.row(Row(case.op, name, "+".join(case.modes), case.shape, case.dtype, "skipped: no time left"))
            journal.end(case.key)
            continue
        run_case(case, device, rounds, journal)
        del case
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def supervise(worker: list[str], path: Path, end: float, patience: float) -> None:
    """Run workers until one comes to its end, or the time is up.

    Args:
        worker: The command of a worker, which reads and writes the journal at ``path``.
        end: By `time.time`; a worker is given `GRACE` seconds more to stop by itself.
        patience: Seconds without a line in the journal after which a worker that has begun counts as hung.
    """
    while True:
        process = subprocess.Popen(worker)
        try:
            why = _wait(process, path, end + GRACE, patience)
        finally:
            process.kill()
        if why is None:
            return
        journal = Journal(path)
        if journal.begun is None:  # it died before or between cases: another would too
            journal.note(stopped=why)
            return
        case, provider = journal.begun
        op, shape, dtype = case.split(" ")
        reported = any((r.op, r.shape, r.dtype, r.provider) == (op, shape, dtype, provider) for r in journal.rows)
        if process.returncode != DEAD_EXIT and not reported:
            journal.row(Row(op, provider, "graph+eager", shape, dtype, f"died: {why}"))
            if provider == TIMING:
                journal.end(case)
        if time.time() > end:
            journal.note(stopped="no time left")
            return


def _wait(process: subprocess.Popen[bytes], path: Path, end: float, patience: float) -> str | None:
    """Why the worker came to no good end, or None."""
    size, since, allowed = _size(path), time.time(), max(patience, START_PATIENCE)
    while process.poll() is None:
        time.sleep(0.05)
        now, present = time.time(), _size(path)
        if present != size:
            size, since, allowed = present, now, patience
        if now - since > allowed or now > end:
            process.kill()
            process.wait()
            return f"hung for {allowed:g} s" if now - since > allowed else "no time left"
    return None if process.returncode == 0 else f"exit code {process.returncode}"


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
