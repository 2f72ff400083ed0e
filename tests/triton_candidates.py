"""Every configuration that the tuner may pick, compiled for sm_80 and sm_90, and sm_80's own that the suite leaves out.

``make triton-compile`` runs this, as CI does: minutes where nothing is in Triton's cache.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton_aot
from test_triton_compile import check_compiled, each, selected
from triton_aot import Case


def others() -> Iterator[tuple[Case, str]]:
    """What `test_triton_compile` leaves out. Nothing is timed on AMD."""
    done = {(case.name, target) for case, target in selected()}
    for target in ("sm_80", "sm_90"):
        for case in triton_aot.cases(target):
            if (case.name, target) not in done:
                yield case, target


@each(others())
def test_compiled(case: Case, target: str) -> None:
    check_compiled(case, target)
