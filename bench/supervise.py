"""The measuring process under supervision, so that a provider that ends or hangs it costs only itself.

The worker writes down in a journal what it is about to run and what it has measured. Where it dies or hangs, the
supervisor notes whose turn it was and starts another worker, which goes on with the rest.
"""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

from .case import ALL_MODES, Row
from .journal import Journal
from .worker import TIMING

DEAD_EXIT = 17  # of a worker whose device no longer computes
START_PATIENCE = 120.0  # until a worker's first line


def supervise(worker: list[str], path: Path, end: float, grace: float, patience: float) -> None:
    """Run workers until one comes to its end, or the time is up.

    Args:
        worker: The command of a worker, which reads and writes the journal at ``path``.
        end: When to stop, by `time.time`; a worker is given ``grace`` seconds more to stop by itself.
        patience: Seconds without a line in the journal after which a worker that has begun counts as hung.
    """
    quiet = {**os.environ, "KINETO_LOG_LEVEL": "99"}  # read when torch loads: the profiler's chatter stays off
    while True:
        process = subprocess.Popen(worker, env=quiet)
        try:
            why = _wait(process, path, end + grace, patience)
        finally:
            process.kill()
        if why is None:
            return
        journal = Journal(path)
        if journal.begun is None:  # it died before or between cases: another would too
            journal.note(stopped=why)
            return
        op, shape, dtype, provider = journal.begun
        reported = any((r.op, r.shape, r.dtype, r.provider) == journal.begun for r in journal.rows)
        if process.returncode != DEAD_EXIT and not reported:
            journal.row(Row(op, provider, ALL_MODES, shape, dtype, f"died: {why}"))
            if provider == TIMING:
                journal.end((op, shape, dtype))
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
