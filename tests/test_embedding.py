"""`Embedding`: the linear formula on one-hot rows, without the rows."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from cases import DTYPES, EXACT, TOLERANCE, assert_close, assert_identical, randn
from torch import Tensor, nn

import consequentialism as cw

F64 = torch.float64
INDICES = torch.tensor([[1, 2, 1, 5], [1, 0, 2, 2]])
OPTIONS = [
    {"scale": scale, "damping_mode": mode, "damping": damping}
    for scale, mode, damping in product(("nlms", "raw", "gradient"), ("relative", "absolute"), (1.0, 0.1))
]


def one_hot(indices: Tensor, rows: int, padding_idx: int | None = None) -> Tensor:
    x = nn.functional.one_hot(indices.reshape(-1), rows).double()
    if padding_idx is not None:
        x[indices.reshape(-1) == padding_idx] = 0
    return x


def grad_of(layer: nn.Embedding, indices: Tensor, dy: Tensor) -> Tensor:
    layer.zero_grad()
    layer(indices).backward(dy)
    assert layer.weight.grad is not None
    return layer.weight.grad


@pytest.mark.parametrize("rows", [6, 30])  # more occurrences than embeddings, and fewer
@pytest.mark.parametrize("padding_idx", [None, 1])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_is_the_linear_formula_on_one_hot_rows(options: dict, padding_idx: int | None, rows: int) -> None:
    layer = cw.Embedding(rows, 4, padding_idx, dtype=F64, **options)
    dy = randn(2, 4, 4)
    x = one_hot(INDICES, rows, padding_idx)
    expected = cw.reference.emended_weight_grad(x, dy.reshape(-1, 4), False, **options)[0].T
    assert_close("dw", grad_of(layer, INDICES, dy), expected, EXACT)
    flat = INDICES.reshape(-1), dy.reshape(-1, 4)
    assert_close("reference", cw.reference.emended_embedding_grad(*flat, rows, padding_idx, **options), expected, EXACT)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_types(dtype: torch.dtype) -> None:
    layer = cw.Embedding(6, 4, dtype=dtype)
    dy = randn(2, 4, 4, dtype=dtype)
    own = grad_of(layer, INDICES, dy)
    assert own.dtype == dtype
    expected = cw.reference.emended_embedding_grad(INDICES.reshape(-1), dy.double().reshape(-1, 4), 6)
    assert_close("dw", own, expected, TOLERANCE[dtype])


def test_forward_is_torch_s_with_every_argument() -> None:
    torch.manual_seed(0)
    plain = nn.Embedding(6, 4, padding_idx=-1, max_norm=0.8, norm_type=1.0)
    emended = cw.Embedding(6, 4, padding_idx=-1, max_norm=0.8, norm_type=1.0)
    emended.load_state_dict(plain.state_dict())
    assert_identical("y", emended(INDICES), plain(INDICES))
    assert_identical("renormed weight", emended.weight.detach(), plain.weight.detach())
    assert emended.padding_idx == plain.padding_idx == 5
    assert repr(emended) == repr(plain)


def test_sparse_gradient_is_the_dense_one() -> None:
    dense = cw.Embedding(6, 4, dtype=F64)
    sparse = cw.Embedding(6, 4, sparse=True, dtype=F64)
    dy = randn(2, 4, 4)
    own = grad_of(sparse, INDICES, dy)
    assert own.is_sparse
    assert_close("dw", own.to_dense(), grad_of(dense, INDICES, dy), EXACT)
    torch.optim.SparseAdam(sparse.parameters()).step()


def test_padding_gets_no_gradient_and_rows_not_looked_up_none() -> None:
    layer = cw.Embedding(6, 4, padding_idx=1, dtype=F64)
    own = grad_of(layer, INDICES, randn(2, 4, 4))
    assert not own[[1, 3, 4]].any()
    assert own[[0, 2, 5]].all()


def test_no_look_ups_give_a_zero_gradient() -> None:
    layer = cw.Embedding(6, 4)
    assert not grad_of(layer, torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4)).any()


def test_nan_reaches_the_rows_it_belongs_to() -> None:
    for bad in (torch.nan, torch.inf):
        dy = randn(2, 4, 4)
        dy[0, 1, 2] = bad
        own = grad_of(cw.Embedding(6, 4, dtype=F64), INDICES, dy)
        assert own[2, 2].isnan()
        assert own[1].isfinite().all()


def test_repeats_are_bitwise_equal() -> None:
    layer = cw.Embedding(6, 4)
    dy = randn(2, 4, 4, dtype=torch.float32)
    first = grad_of(layer, INDICES, dy).clone()
    for _ in range(10):
        assert_identical("dw", grad_of(layer, INDICES, dy), first)


def test_frozen_and_no_grad() -> None:
    layer = cw.Embedding(6, 4)
    with torch.no_grad():
        assert not layer(INDICES).requires_grad
    layer.weight.requires_grad_(False)
    assert not layer(INDICES).requires_grad
    assert not cw.Embedding(6, 4, _weight=torch.ones(6, 4), _freeze=True).weight.requires_grad


def test_scale_grad_by_freq_is_refused() -> None:
    with pytest.raises(ValueError, match="scale_grad_by_freq must be False, got True"):
        cw.Embedding(6, 4, scale_grad_by_freq=True)


def test_bad_options_are_refused() -> None:
    with pytest.raises(ValueError, match="damping must be finite and above 0, got -1"):
        cw.Embedding(6, 4, damping=-1)
