"""First contact of the CUDA kernels with a GPU: each kind of call in each type, in a process of its own.

    python tools/gpu_first.py                    all kinds and types, a line for each as soon as it is known
    python tools/gpu_first.py gram_dual repeat   these kinds
    python tools/gpu_first.py --here gram_dual   in this process, for a sanitizer
    python tools/gpu_first.py --repeats 3 graph  fewer runs of repeat, graph and streams, for a slow tool

A line says ``right``, ``WRONG`` with the error or what was found, ``DIED`` with the exit code, or ``HUNG``: a kernel
that hangs or kills its process costs its own line only. An error of order 1 is a wrong layout or index, one of 1e-3 in
float32 a lost term of the split. memcheck alone may complain of ``stage_copies`` at ragged edges where nothing is
wrong: ptxas keeps the size of a partial copy in the low bits of its address. Where racecheck alone reports
``factor_tile`` against ``substitute_forward`` or ``subtract_quarter``, suspect first how the tool sees ``bar.arrive``
with a partial count.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def here(kind: str, name: str, device: str) -> str:
    """Run one kind in one type in this process; what is to be said of it."""
    import gpu_kinds

    dtype = gpu_kinds.TYPES[name]
    bound = gpu_kinds.bound_of(kind, dtype)
    try:
        error = gpu_kinds.KINDS[kind](dtype, device)
    except Exception as problem:  # whatever it is, it belongs on this line
        return f"WRONG {kind} {name}: {type(problem).__name__}: {str(problem).splitlines()[0][:150]}"
    return f"{'right' if error <= bound else 'WRONG'} {kind} {name}: error {error:.2g}, {bound:g} allowed"


def apart(kind: str, name: str, device: str, seconds: float) -> str:
    """Run a kind in a process of its own."""
    import gpu_kinds

    start = time.monotonic()
    environment = {"OMP_NUM_THREADS": "2", **os.environ}  # many at once, each with its oracle on the CPU
    command = [sys.executable, __file__, "--here", "--device", device, "--type", name]
    command += ["--repeats", str(gpu_kinds.REPEATS), kind]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=environment)
    except subprocess.TimeoutExpired:
        return f"HUNG  {kind} {name}: no end after {seconds:g} s"
    lines = [line for line in done.stdout.splitlines() if line.startswith(("right", "WRONG"))]
    if not lines:
        last = (done.stderr.strip() or "nothing was said").splitlines()[-1][:150]
        return f"DIED  {kind} {name}: exit code {done.returncode}: {last}"
    notes = "".join(f"; {line}" for line in done.stdout.splitlines() if line.startswith("passed over"))
    return f"{lines[-1]}, {time.monotonic() - start:.1f} s{notes}"


def main(arguments: list[str] | None = None) -> int:
    import gpu_kinds

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=", ".join(gpu_kinds.KINDS))
    parser.add_argument(
        "--type", action="append", choices=list(gpu_kinds.TYPES), help="instead of all; may be repeated"
    )
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: a rehearsal of the script")
    parser.add_argument("--here", action="store_true", help="in this process")
    parser.add_argument("--seconds", type=float, default=60, help="for one process (default: 60)")
    parser.add_argument("--jobs", type=int, default=min(12, os.cpu_count() or 1), help="processes at once")
    parser.add_argument(
        "--repeats",
        type=int,
        default=gpu_kinds.REPEATS,
        help="runs of repeat, graph and streams (default: %(default)s)",
    )
    chosen = parser.parse_args(arguments)
    if chosen.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {chosen.repeats}")
    gpu_kinds.REPEATS = chosen.repeats
    if unknown := set(chosen.kinds) - gpu_kinds.KINDS.keys():
        parser.error(f"KIND must be of {', '.join(gpu_kinds.KINDS)}, got {', '.join(sorted(unknown))}")
    cases = [(kind, name) for kind in chosen.kinds or gpu_kinds.KINDS for name in chosen.type or gpu_kinds.TYPES]
    wrong = 0
    with ThreadPoolExecutor(1 if chosen.here else chosen.jobs) as pool:
        if chosen.here:
            lines = (here(*case, chosen.device) for case in cases)
        else:
            futures = [pool.submit(apart, *case, chosen.device, chosen.seconds) for case in cases]
            lines = (future.result() for future in as_completed(futures))
        for line in lines:
            print(line, flush=True)
            wrong += not line.startswith("right")
    print(f"gpu_first: {len(cases) - wrong} of {len(cases)} right", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
