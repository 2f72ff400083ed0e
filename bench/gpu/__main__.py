"""``python -m bench.gpu``: layers, steps and ops on a GPU, each in a CUDA graph and eager.

Every call is timed on a cold cache, the providers of a comparison in turns; a provider that is wrong against float64 is
not timed, one that fails has a row that says so. The targets are those of an H100.
"""

from __future__ import annotations

import argparse
import importlib
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

import consequentialism as cw

from ..environment import commit
from . import report
from .device import Cuda, Device, Host, roofline
from .run import DEAD_EXIT, DeviceDead, Journal, supervise, work_through

PATIENCE = 40.0  # seconds for one provider, its build and check included
DEFAULT_CASES = f"{__package__}.cases:cases"


def main(arguments: list[str] | None = None) -> int:
    """0 where everything that is installed ran and was right; 2 without a device."""
    parser = argparse.ArgumentParser(prog=__package__, description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/gpu/gpu.csv"), help="the CSV (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="fewer shapes and rounds")
    parser.add_argument("--seconds", type=float, default=115.0, help="after which no case is begun")
    parser.add_argument("--rehearse", action="store_true", help="small shapes on the CPU, to try the script itself")
    parser.add_argument("--patience", type=float, default=PATIENCE, help=argparse.SUPPRESS)
    parser.add_argument("--cases", default=DEFAULT_CASES, help=argparse.SUPPRESS)
    parser.add_argument("--worker", type=float, metavar="END", help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    journal = chosen.out.with_suffix(".journal")
    if chosen.worker is not None:
        return worker(chosen, journal)
    state = cw.backends()["cuda"]
    if state != cw.dispatch.AVAILABLE and not chosen.rehearse:
        print(f"bench.gpu: backend cuda: {state}", file=sys.stderr)
        return 2
    end = time.time() + chosen.seconds
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    journal.unlink(missing_ok=True)
    own = sys.argv[1:] if arguments is None else arguments
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    command = [sys.executable, "-m", str(__package__), *own, "--worker", str(end)]
    try:
        supervise(command, journal, end, chosen.patience)
    except (KeyboardInterrupt, SystemExit):  # what has been measured is kept
        Journal(journal).note(stopped="stopped from outside")
    return finish(Journal(journal), chosen.out)


def worker(chosen: argparse.Namespace, path: Path) -> int:
    """Go through the cases, from where the journal stands."""
    device: Device = Host() if chosen.rehearse else Cuda()
    journal = Journal(path)
    if "device" not in journal.meta:
        about: dict[str, Any] = {"device": device.name(), "torch": torch.__version__, "cuda": torch.version.cuda}
        journal.note(**about, version=cw.__version__, commit=commit())
        journal.note(**roofline(device))
    module, name = chosen.cases.split(":")
    makers = getattr(importlib.import_module(module), name)(device, chosen.quick)
    rounds = 3 if chosen.rehearse else 40 if chosen.quick else 100
    try:
        work_through(makers, device, rounds, journal, chosen.worker)
    except DeviceDead as dead:
        print(f"bench.gpu: the device no longer computes after: {dead}", file=sys.stderr)
        return DEAD_EXIT
    return 0


def finish(journal: Journal, out: Path) -> int:
    """Write and print what was found; the targets last."""
    meta = {"stopped": "", **journal.meta}
    report.write(journal.rows, meta, out)
    print(report.table(journal.rows))
    print(", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in meta.items() if v != ""))
    wrong = report.problems(journal.rows)
    print("\n".join(["", *(f"PROBLEM  {line}" for line in wrong), *report.verdicts(journal.rows)]))
    print(f"wrote {out} and {out.with_suffix('.json')}")
    return 1 if wrong or meta["stopped"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
