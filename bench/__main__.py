"""The cost of layers, training steps and single ops beside torch's own, as a table, a CSV and plots.

It works the same way on the CPU and on a GPU. Providers take turns, each is compared with float64 before it is timed,
and each row has its floor from bytes and operations. What cannot be measured has a row that says why.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch

from consequentialism.errors import Parser, UserError, prepare_file, prepare_folder

from . import compare, plot, registry, show, table
from .case import Case, Row
from .environment import Environment, environment, slug
from .journal import Journal
from .roofline import DTYPES, PeakRates, measure
from .supervise import DEAD_EXIT, supervise
from .timing import Cuda, Device, Host, Rehearsal
from .worker import DeviceDead, work_through

SECONDS = {("cpu", False): 240.0, ("cpu", True): 35.0, ("cuda", False): 300.0, ("cuda", True): 60.0}
GRACE = {"cpu": 60.0, "cuda": 8.0}  # after which a case that was begun in time is broken off
PATIENCE = 60.0  # seconds for one provider: its build, its check, and its compilation
DEVICES: dict[str, type[Host] | type[Cuda]] = {"cpu": Host, "cuda": Cuda, "rehearsal": Rehearsal}


def numbers(text: str) -> tuple[int, ...]:
    """``3,4,5`` as integers, each at least 1."""
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be integers with commas between, got {text!r}") from None
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"each must be at least 1, got {text!r}")
    return found


def seconds(text: str) -> float:
    """A number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return value


def threads(text: str) -> int:
    """An integer from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer, at least 1, got {text!r}")
    return int(text)


def parser() -> Parser:
    """The command line's parser."""
    made = Parser(
        prog="consequentialism bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="ops and the numbers of their shapes:\n"
        + "\n".join(f"  {op.name:18} {op.numbers}" for op in registry.OPS.values()),
    )
    again = "may be repeated"
    made.add_argument("--op", choices=list(registry.OPS), action="append", help=f"an op (default: all); {again}")
    made.add_argument("--provider", action="append", help=f"a provider beside the baseline (default: all); {again}")
    made.add_argument("--shape", type=numbers, action="append", help=f"a shape, N,I,O (default: the op's own); {again}")
    made.add_argument("--dtype", choices=list(DTYPES), action="append", help=f"a type (default: the op's own); {again}")
    made.add_argument("--device", choices=("cpu", "cuda"), help="where to measure (default: a GPU where there is one)")
    made.add_argument("--threads", type=threads, help="threads of the CPU (default: 2)")
    made.add_argument("--seconds", type=seconds, help="time for all cases; those not begun by then are skipped")
    made.add_argument("--quick", action="store_true", help="fewer shapes, and nothing that must be compiled")
    made.add_argument("--out", type=Path, metavar="CSV", help="a file for the rows")
    made.add_argument("--plot", type=Path, metavar="FOLDER", help="a folder for plots of the rows")
    made.add_argument(
        "--against",
        nargs="+",
        metavar="CSV|COMMIT",
        help="compare with a CSV file, or with a commit's for this device; two of them are compared with each other, "
        "and nothing is measured",
    )
    made.add_argument("--rehearse", action="store_true", help="run a GPU's cases on the CPU, at small shapes")
    made.add_argument("--patience", type=float, default=PATIENCE, help=argparse.SUPPRESS)
    made.add_argument("--cases", help=argparse.SUPPRESS)  # module:function, instead of the registry
    made.add_argument("--worker", nargs=2, metavar=("JOURNAL", "END"), help=argparse.SUPPRESS)
    return made


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark.

    Returns:
        The exit code: 0 where everything that is installed was right, 1 where something was not, 2 for bad arguments.
    """
    own = sys.argv[1:] if arguments is None else arguments
    threads = torch.get_num_threads()
    try:
        chosen = parser().parse_args(own)
        return _worker(chosen) if chosen.worker else _run(chosen, own)
    except UserError as error:
        print(f"consequentialism bench: error: {error}", file=sys.stderr)
        return 2
    finally:
        torch.set_num_threads(threads)


def _device(chosen: argparse.Namespace) -> tuple[str, Device]:
    """The occasion and the device; sets the number of threads."""
    name = chosen.device or ("cuda" if torch.cuda.is_available() and not chosen.rehearse else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("argument --device: torch sees no CUDA device")
    if name == "cuda" and chosen.rehearse:
        raise UserError("argument --rehearse: not with --device cuda")
    if chosen.threads or name == "cpu":
        torch.set_num_threads(chosen.threads or (1 if chosen.rehearse else min(2, os.cpu_count() or 1)))
    occasion = "rehearsal" if chosen.rehearse else name
    return occasion, DEVICES[occasion]()


def _cases(chosen: argparse.Namespace, occasion: str, device: Device) -> list[Case]:
    if chosen.cases:
        module, function = chosen.cases.split(":")
        return getattr(importlib.import_module(module), function)(device)
    ops, providers, shapes, dtypes = (
        tuple(dict.fromkeys(one or ())) for one in (chosen.op, chosen.provider, chosen.shape, chosen.dtype)
    )
    return registry.plan(registry.Choice(occasion, ops, providers, shapes, dtypes, chosen.quick), device)


def _run(chosen: argparse.Namespace, own: list[str]) -> int:
    """Measure in processes of their own, and say what was found."""
    occasion, device = _device(chosen)
    if chosen.against and len(chosen.against) > 2:
        raise UserError(f"argument --against: one or two, got {len(chosen.against)}")
    older = [compare.load(source, slug(device.type)) for source in chosen.against or ()]
    if len(older) == 2:
        compare.report(*older)
        return 0
    cases = _cases(chosen, occasion, device)
    if chosen.out is not None:  # before any work, not after it
        prepare_file(chosen.out)
    if chosen.plot is not None:
        prepare_folder(chosen.plot, "--plot")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "journal"
        if chosen.out is not None:  # beside the CSV, where it outlives this process too
            path = chosen.out.with_suffix(".journal")
            path.unlink(missing_ok=True)
        end = time.time() + (chosen.seconds or SECONDS[device.type, chosen.quick and not chosen.rehearse])
        command = [sys.executable, "-m", "consequentialism", "bench", *own, "--worker", str(path), str(end)]
        try:
            with _exit_on_sigterm():
                supervise(command, path, end, GRACE[device.type], chosen.patience)
        except (KeyboardInterrupt, SystemExit):  # what has been measured is kept
            Journal(path).note(stopped="stopped from outside")
        journal = Journal(path)
    where: dict[str, Any] = {f.name: journal.meta[f.name] for f in fields(Environment) if f.name in journal.meta}
    rows = [replace(row, **where) for row in journal.rows]
    return _finish(chosen, cases, rows, journal.meta, older)


@contextlib.contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """A context in which SIGTERM raises SystemExit."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def _worker(chosen: argparse.Namespace) -> int:
    """Go through the cases, from where the journal stands."""
    occasion, device = _device(chosen)
    cases = _cases(chosen, occasion, device)
    journal = Journal(Path(chosen.worker[0]))
    if "bandwidth_gb_s" not in journal.meta:
        journal.note(**asdict(environment(device.type)))
        if chosen.rehearse:
            journal.note(device="rehearsal on the CPU")
        journal.note(**measure(device, tuple(dict.fromkeys(case.dtype for case in cases)))._asdict())
    reached = PeakRates(journal.meta["bandwidth_gb_s"], journal.meta["tflop_s"])
    try:
        work_through(cases, device, reached, journal, float(chosen.worker[1]))
    except DeviceDead as dead:
        print(f"bench: the device no longer computes after: {dead}", file=sys.stderr)
        return DEAD_EXIT
    return 0


def _finish(
    chosen: argparse.Namespace, cases: list[Case], rows: list[Row], meta: dict[str, Any], older: list[list[Row]]
) -> int:
    """Write and print what was found; the targets last."""
    if chosen.out is not None:
        table.write(rows, Row, chosen.out)
        chosen.out.with_suffix(".journal").unlink()
    show.table(rows)
    wrong = show.problems(rows)
    lines = [*show.about(meta), *(f"skipped  {line}" for line in show.skipped(rows))]
    lines += [*(f"PROBLEM  {line}" for line in wrong), *show.verdicts(cases, rows)]
    print("\n".join([*lines, *([f"wrote {chosen.out}"] if chosen.out is not None else [])]))
    if chosen.plot is not None:
        try:
            print("\n".join(f"drew {path}" for path in plot.save(rows, chosen.plot)))
        except UserError as error:  # the rows are there
            print(f"consequentialism bench: {error}", file=sys.stderr)
    for old in older:
        compare.report(old, rows)
    return 1 if wrong or meta.get("stopped") else 0


if __name__ == "__main__":
    raise SystemExit(main())
