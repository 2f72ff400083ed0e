"""The runner: one case after the other. Each provider is built, checked and then timed, in turns with the others."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Iterator
from typing import Any

import torch

from .case import ALL_MODES, Case, Row, Unavailable
from .journal import Journal
from .roofline import PeakRates
from .timing import Device, Run, paired_ratio, quantiles

TIMING = "all providers in turns"
WARM_ROUNDS = 1
CASE_SECONDS = 12.0  # of timing one case, at most, unless the least rounds take longer

Turns = dict[tuple[str, str], list[list[float]]]  # milliseconds, by provider and mode, by round


class DeviceDead(Exception):
    """The device no longer computes for this process."""


def run_case(
    case: Case, device: Device, reached: PeakRates, journal: Journal, seconds: float, latest: float = math.inf
) -> None:
    """A row for each provider of a case in the journal.

    Args:
        seconds: That timing takes, about, but for the device's least rounds.
        latest: The time, by `time.time`, after which one round must do.
    """
    runs, known = _prepare(case, device, journal)
    end = time.time() + seconds
    journal.begin(case.key, TIMING)
    turns: Turns = {key: [] for key in runs}
    order = list(runs)
    for round_ in range(WARM_ROUNDS + device.most_rounds):
        least = device.least_rounds if time.time() < latest else 1
        if round_ >= WARM_ROUNDS + least and time.time() > end:
            break
        for key in [key for key in order if key in turns]:
            try:
                turn = device.turn(runs[key], key[1])
            except Exception as problem:
                del turns[key]
                _report(case, *key, problem, device, journal)
                continue
            if round_ >= WARM_ROUNDS:
                turns[key].append(turn)
        order = order[1:] + order[:1]
    for row in _rows(case, turns, known, reached):
        journal.row(row)
    journal.end(case.key)


def _prepare(
    case: Case, device: Device, journal: Journal
) -> tuple[dict[tuple[str, str], Run], dict[str, dict[str, Any]]]:
    """What can be timed, by provider and mode; and of each provider its error and its memory."""
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
            work.free()
            known[name] = {"error": error, "peak_bytes": device.peak_bytes(work.run)}
        except Exception as problem:
            _report(case, name, ALL_MODES, problem, device, journal)
            continue
        for mode in case.modes:
            try:
                runs[name, mode] = device.capture(work.run) if mode == "graph" else work.run
                device.turn(runs[name, mode], mode)
            except Exception as problem:
                runs.pop((name, mode), None)
                _report(case, name, mode, problem, device, journal)
    return runs, known


def _report(case: Case, provider: str, mode: str, problem: Exception, device: Device, journal: Journal) -> None:
    text = next(iter(str(problem).splitlines()), "")
    if isinstance(problem, Unavailable):
        state = f"skipped: {text}"
    elif isinstance(problem, ValueError) and text.startswith("refused"):
        state = text
    else:
        state = f"failed: {type(problem).__name__}: {text}"
    journal.row(Row(case.op, provider, mode, case.shape, case.dtype, state))
    if not isinstance(problem, Unavailable) and not device.alive():
        raise DeviceDead(state) from problem


def _rows(case: Case, turns: Turns, known: dict[str, dict[str, Any]], reached: PeakRates) -> Iterator[Row]:
    floors = {name: reached.floor_ms(case.least_of(name), case.dtype) for name in [*known, case.baseline]}
    base_floor = floors[case.baseline]
    for (name, mode), rounds in turns.items():
        median, p20, p80 = quantiles([call for turn in rounds for call in turn])
        base, least, floor = turns.get((case.baseline, mode)), case.least_of(name), floors[name]
        yield Row(
            op=case.op,
            provider=name,
            mode=mode,
            shape=case.shape,
            dtype=case.dtype,
            median_ms=median,
            p20_ms=p20,
            p80_ms=p80,
            calls=sum(map(len, rounds)),
            baseline=case.baseline,
            ratio=None if base is None else paired_ratio(rounds, base),
            target=case.target(name, mode),
            least_bytes=least.bytes or None,
            least_flops=least.flops or None,
            floor_ms=floor or None,
            floor_fraction=floor / median if floor and median else None,
            floor_ratio=floor / base_floor if floor and base_floor else None,
            bandwidth_gb_s=reached.bandwidth_gb_s,
            matrix_tflop_s=reached.tflop_s.get(case.dtype),
            **known[name],
        )


def work_through(cases: list[Case], device: Device, reached: PeakRates, journal: Journal, end: float) -> None:
    """All cases that have not ended, until the time, by `time.time`, is up. What is left of it they share."""
    left = [case for case in cases if case.key not in journal.ended]
    cases.clear()  # a case keeps its tensors
    while left:
        case = left.pop(0)
        if time.time() > end:
            for name in [name for name in case.providers if name not in journal.settled(case)]:
                journal.row(Row(case.op, name, ALL_MODES, case.shape, case.dtype, "skipped: no time left"))
            journal.end(case.key)
            continue
        share = (end - time.time()) / (1 + len(left))
        run_case(case, device, reached, journal, min(share, CASE_SECONDS), end)
        del case
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
