"""Where a measurement was made: device, threads, versions, commit."""

from __future__ import annotations

import platform
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

import consequentialism as cw


@dataclass(frozen=True)
class Environment:
    """What every row of every CSV says of the run that measured it."""

    device: str  # its name, as the system gives it
    threads: int  # of torch, on the processor
    torch: str
    cuda: str  # that torch was built with; empty: none
    python: str
    version: str  # of this package
    commit: str


def environment(device: str = "cpu") -> Environment:
    """The environment of this process, as it is now. ``device`` is "cpu" or "cuda"."""
    return Environment(
        device=device_name(device),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        cuda=torch.version.cuda or "",
        python=platform.python_version(),
        version=cw.__version__,
        commit=commit(),
    )


def device_name(device: str = "cpu") -> str:
    """The name of the current GPU, or of the processor."""
    return torch.cuda.get_device_name() if device == "cuda" else processor()


def slug(device: str = "cpu") -> str:
    """The folder of this device's results in ``bench/results``: ``cpu-2-threads``, ``nvidia-h100-80gb-hbm3``."""
    if device == "cpu":
        return f"cpu-{torch.get_num_threads()}-threads"
    return re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")


def processor() -> str:
    """The processor's name, as the system gives it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def commit() -> str:
    """The checkout's commit, with ``-dirty`` where it has changes; "unknown" outside a checkout."""
    here = Path(__file__).resolve()
    tracked = git("ls-files", "--error-unmatch", here.name)  # an installed copy may lie in someone else's checkout
    return "unknown" if tracked is None else git("describe", "--always", "--dirty") or "unknown"


def git(*arguments: str) -> str | None:
    """What git answers in the folder of this file; None where it fails or is not there."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
