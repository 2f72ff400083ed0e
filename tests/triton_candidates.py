"""Every configuration that a plan or the tuner may pick and the suite leaves out, compiled for sm_80, sm_90 and gfx942.

``make triton-compile`` runs this, as CI does: minutes where nothing is in Triton's cache.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton_aot
from test_triton_compile import check_compiled, each, selected
from triton_aot import Case


def others() -> Iterator[tuple[Case, str]]:
    """What `test_triton_compile` leaves out; for AMD, where nothing is timed, what differs most."""
    done = {(case.name, target) for case, target in selected()}
    for target in triton_aot.TARGETS:
        for case in triton_aot.cases(target):
            alike = case.first or "primal" in case.name or "-32" in case.name or "fp16" in case.name
            if (case.name, target) not in done and not (target == "gfx942" and alike):
                yield case, target


@each(others())
def test_compiled(case: Case, target: str) -> None:
    check_compiled(case, target)
