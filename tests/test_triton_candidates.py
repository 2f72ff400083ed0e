"""Every configuration that a plan or the tuner may pick and the suite leaves out, compiled for sm_80, sm_90 and gfx942.

For other chips, the launches that need most: sm_86 (also 8.9), sm_100 and sm_120.

``make triton-compile`` runs this, as CI does: minutes where nothing is in Triton's cache.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from test_triton_compile import ELSEWHERE, check_compiled, each, selected, triton_aot
from triton_aot import MAIN_TARGETS, Case

pytestmark = pytest.mark.slow
MOST_MEMORY = ("gram-fp64-fp64-dual-64-8w3s", "gram-fp32-fp32-dual-64-8w4s", "emend-fp64-fp64-dual-64-8w3s")


def others() -> Iterator[tuple[Case, str]]:
    """What `test_triton_compile` leaves out; for AMD, where nothing is timed, what differs most; likewise elsewhere."""
    done = {(case.name, target) for case, target in selected()}
    for target in triton_aot.TARGETS:
        for case in triton_aot.cases(target):
            alike = case.first or "primal" in case.name or "-32" in case.name or "fp16" in case.name
            if target not in MAIN_TARGETS:
                left_out = case.name not in (*ELSEWHERE, *MOST_MEMORY)
            else:
                left_out = (case.name, target) in done or (target == "gfx942" and alike)
            if not left_out:
                yield case, target


@each(others())
def test_compiled(case: Case, target: str) -> None:
    check_compiled(case, target)
