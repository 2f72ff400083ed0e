"""The table of errors in docs/solvers.md is what conjugate gradients give."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from cases import BF16, F16, F32, F64, error_of, make_input, oracle, randn
from torch import Tensor

import consequentialism as cw
from consequentialism.solve import cost

DOCUMENT = Path(__file__).resolve().parent.parent / "docs/solvers.md"
ROWS, INPUTS, OUTPUTS = 600, 300, 20
ITERATIONS = (4, 8, 16, 32)
LEAST = 1e-10  # below this it is rounding


def activations(rows: int, inputs: int) -> Tensor:
    """ReLUs of features whose covariance has the eigenvalues 1, 1/2, 1/3, ..."""
    features = randn(rows, inputs) / torch.arange(1, inputs + 1, dtype=F64).sqrt()
    return torch.relu(features @ randn(inputs, inputs, seed=1))


def error(kind: str, damping: float, iterations: int) -> float:
    x = activations(ROWS, INPUTS) if kind == "activations" else make_input(kind, ROWS, INPUTS)
    dy = randn(ROWS, OUTPUTS, seed=9)
    expected = oracle(x, dy, False, damping=damping)[0]
    return error_of(
        cw.emended_weight_grad(x, dy, bias=False, damping=damping, solver="cg", iterations=iterations)[0], expected
    )


def stated() -> list[tuple[str, float, list[float]]]:
    """The table's rows: kind, damping, an error for each number of iterations."""
    found = re.findall(r"^\| (\w+) \| ([\d.]+) \|((?: [\d.e-]+ \|){4})$", DOCUMENT.read_text(), re.MULTILINE)
    return [
        (kind, float(damping), [float(e) for e in errors.split("|") if e.strip()]) for kind, damping, errors in found
    ]


def test_the_table_is_there() -> None:
    assert len({kind for kind, _, _ in stated()}) >= 6
    assert {damping for _, damping, _ in stated()} == {1.0, 0.1, 0.01}


def test_where_auto_takes_it_is_as_stated() -> None:
    rows = re.findall(r"^\| (\d+) \|((?: (?:[\d.]+|never) \|){4})$", DOCUMENT.read_text(), re.MULTILINE)
    assert len(rows) == 4
    for iterations, ratios in rows:
        for dtype, ratio in zip((F64, F32, BF16, F16), ratios.split("|"), strict=False):
            own = cost.max_rank_over_damping(int(iterations), torch.finfo(dtype).eps / 2)
            assert own == pytest.approx(float(ratio.replace("never", "0")), rel=0.02), f"{iterations} {dtype}"


@pytest.mark.parametrize(("kind", "damping", "errors"), stated(), ids=lambda value: str(value))
def test_errors_are_as_stated(kind: str, damping: float, errors: list[float]) -> None:
    for iterations, expected in zip(ITERATIONS, errors, strict=True):
        own = error(kind, damping, iterations)
        assert expected / 1.2 - LEAST <= own <= 1.2 * expected + LEAST, f"{iterations} iterations: {own:.2g}"
