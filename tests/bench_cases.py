"""Cases of which some end their process; see test_bench_run.py."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from bench.case import Case, Work


def cases(device: Any) -> list[Case]:
    calls = iter(range(10**6))

    def late() -> None:
        if next(calls) > 5:
            os._exit(6)

    bad: dict[str, Callable[[], Work]] = {
        "exits": lambda: Work(lambda: os._exit(5)),
        "hangs": lambda: Work(lambda: time.sleep(1000)),
        "timing": lambda: Work(late),
    }

    def make(op: str) -> Case:
        providers = {"plain": lambda: Work(lambda: None)}
        if op in bad:
            providers = {"bad": bad[op], **providers}
        return Case(op, "1 2", "float32", providers, "plain", 1.0, device.modes)

    return [make(op) for op in (*bad, "last")]
