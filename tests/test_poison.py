"""The suite's own guard: memory that nobody has written holds NaN."""

from __future__ import annotations

import pytest
import torch
from cases import needs_kernels, randn

from consequentialism.backend import compiled as ops


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_empty_holds_nan(dtype: torch.dtype) -> None:
    assert torch.empty(1000, dtype=dtype).isnan().all()
    assert torch.ones(2, dtype=dtype).new_empty(3).isnan().all()


@needs_kernels
def test_compiled_kernels_fill_what_they_return() -> None:
    x, dy = randn(7, 5), randn(7, 3, seed=1)
    for form in ("dual", "primal"):
        emended, column = ops.emended_input(x, True, form, 0.5, "relative", "nlms")
        for tensor in (ops.input_gram(x, True, form), emended, column, *ops.weight_grad(dy, emended, column)):
            assert tensor.isfinite().all()
