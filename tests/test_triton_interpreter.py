"""Triton kernels in Triton's interpreter, over the cases of every other backend.

Triton decides whether it interprets when kernels are defined, so a process of its own runs them. What takes too long
for every run of the suite is left to ``make triton``, which runs all cases.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
# By file; 300x130x400 alone takes as long as all other shapes.
SELECTED = {
    "test_linear.py": "(output_and_input_gradient and float32 and True and not 400) or "
    "(options_reach and gradient and absolute) or leading_dimensions or options_may_change or gradients_accumulate or "
    "retained_graph",
    "test_identities.py": "formula and True and not 400",
    "test_accuracy.py": "(test_types and (raw or gradient) and not float32) or "
    "(bitwise and bfloat16 and (31 or 33)) or any_size or wide_gram",
    "test_ops.py": "(test_damped_inverse and float32 and (64 or 65 or 129)) or breakdown or (tiny and float32) or "
    "(layout and bfloat16 and 7)",
    "test_contracts.py": "(dead_inputs and raw and relative) or (empty_batch and float16) or no_inputs or opposite or "
    "second_derivative or (one_bad_entry and float32 and nan and relative) or (large_finite and float16) or frozen or "
    "left_as",
    "test_compile.py": "full_graph and float32 and 4",
    "test_coordinates_ops.py": "apart or not_a_number or parts",
}
# A process takes seconds to start, and two run side by side.
PARTS = {
    "shared cases": ([*SELECTED], " or ".join(f"({file} and ({which}))" for file, which in SELECTED.items())),
    "own kernels": (["test_triton_kernels.py"], ""),
}


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.timeout(600)
@pytest.mark.parametrize("part", PARTS)
def test_in_the_interpreter(part: str) -> None:
    files, selection = PARTS[part]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *(str(TESTS / f) for f in files)]
    command += ["-m", "triton or interpreter", "-k", selection]
    finished = subprocess.run(
        command,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert finished.returncode == 0, finished.stdout[-8000:] + finished.stderr[-2000:]
    assert " passed" in finished.stdout
    assert "skipped" not in finished.stdout, finished.stdout[-4000:]
