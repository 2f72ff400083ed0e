"""`Gram`: its inverse in the units of the input, and over a batch."""

from __future__ import annotations

import pytest
import torch
from cases import BACKENDS, EXACT, F64, assert_close, device_of, randn

from consequentialism.backend import dispatch
from consequentialism.options import DampingMode, Ridge, Scale
from consequentialism.solve.gram import Gram


@pytest.mark.parametrize(
    ("damping_mode", "scale"), [("relative", "nlms"), ("absolute", "raw"), ("absolute", "gradient")]
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_inverse_of_x_in_a_unit(backend: str, damping_mode: DampingMode, scale: Scale) -> None:
    x = randn(3, 20, 6, device=device_of(backend))
    unit = torch.tensor([4.0, 0.5, 1.0], dtype=F64, device=x.device)[:, None, None]
    ops, ridge = dispatch.select(backend, x), Ridge(0.3, damping_mode, scale)
    scaled = x / unit
    own = Gram(scaled.mT @ scaled, count=20, rank=6, unit=unit).inverse(ops, ridge)
    gram = x.mT @ x
    trace = gram.diagonal(dim1=1, dim2=2).sum(1)
    c = (0.3 * trace / 6 if damping_mode == "relative" else torch.full_like(trace, 0.3))[:, None, None]
    expected = torch.linalg.inv(gram + c * torch.eye(6, dtype=F64, device=x.device))
    factor = {"nlms": 20 * unit**2, "raw": unit**2, "gradient": c}[scale]  # c and the Gram have the same unit
    assert_close("inverse", own, factor * expected, EXACT)


def test_a_window_enters_the_mean() -> None:
    """Sums of batches, without one that is not finite; then older rows forgotten by half."""
    old, batches = randn(7, 5), [randn(4, 5, seed=1), randn(9, 5, seed=2)]
    window = Gram(torch.zeros(5, 5, dtype=F64), torch.zeros(1, dtype=F64))
    mean = Gram(old.T @ old / 7, torch.tensor(7.0, dtype=F64))
    assert_close("no row", mean.decayed(0.5, window).matrix, mean.matrix, 0)
    for rows in (*batches, torch.full((3, 5), torch.inf, dtype=F64)):
        window.add_(Gram(rows.T @ rows, rows.shape[0]))
    fresh = mean.decayed(0.5, window)
    both = torch.cat(batches)
    assert_close("mean", fresh.matrix, (old.T @ old + both.T @ both) / 20, EXACT)
    assert_close("count", fresh.count, torch.tensor(10.0, dtype=F64), EXACT)
