"""The cost model: the cheapest plan wherever it keeps the digits."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch

from consequentialism import Options, reference
from consequentialism.solve import cost
from consequentialism.solve.cost import Plan

SIZES = (1, 7, 64, 300, 2000)
ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(("rows", "inputs", "outputs"), list(product(SIZES, repeat=3)))
def test_well_conditioned_float32_takes_the_cheapest_of_the_four(rows: int, inputs: int, outputs: int) -> None:
    n, m = rows, inputs
    by_hand = {
        Plan("dual", "input"): n * n * m + n**3 + 2 * n * n * m,
        Plan("dual", "gradient"): n * n * m + n**3 + 2 * n * n * outputs,
        Plan("primal", "input"): m * m * n + m**3 + 2 * n * m * m,
        Plan("primal", "gradient"): m * m * n + m**3 + 2 * outputs * m * m,
    }
    chosen = cost.choose(rows, inputs, outputs, torch.float32, Options())
    assert by_hand[chosen] == min(by_hand.values()) == cost.min_flops(rows, inputs, outputs)


def test_the_three_kinds_of_layer() -> None:
    assert cost.choose(128, 1024, 4096, torch.float32, Options()) == Plan("dual", "input")
    assert cost.choose(128, 1024, 16, torch.float32, Options()) == Plan("dual", "gradient")
    assert cost.choose(8192, 256, 1024, torch.float32, Options()) == Plan("primal", "gradient")


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.bfloat16, Options()),
        (torch.float16, Options()),
        (torch.float32, Options(damping=1e-3)),
        (torch.float32, Options(damping_mode="absolute")),
    ],
)
def test_the_inverse_is_applied_to_the_input_where_rounding_would_be_amplified(
    dtype: torch.dtype, options: Options
) -> None:
    assert cost.choose(128, 1024, 16, dtype, options).applied_to == "input"
    assert cost.choose(8192, 256, 16, dtype, options).applied_to == "input"


@pytest.mark.parametrize(
    ("rows", "inputs", "dtype", "limit"),
    [
        (100, 100, torch.float32, 2e3),
        (101, 100, torch.float32, 6e3),
        (100, 101, torch.float32, 2e3),
        (100, 200, torch.bfloat16, 5e4),
        (200, 100, torch.float16, 5e4),
    ],
    ids=str,
)
def test_where_float32_is_enough(rows: int, inputs: int, dtype: torch.dtype, limit: float) -> None:
    damping = min(rows, inputs) / limit
    assert reference.float32_is_enough(rows, inputs, dtype, 1.001 * damping, "relative")
    assert not reference.float32_is_enough(rows, inputs, dtype, 0.999 * damping, "relative")
    assert not reference.float32_is_enough(rows, inputs, dtype, damping, "absolute")
