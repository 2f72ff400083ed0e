"""`Embedding`: the linear formula on one-hot rows, and torch's layer in everything else."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from cases import (
    BF16,
    DTYPES,
    EXACT,
    F32,
    F64,
    HALF_TYPES,
    LIMIT,
    TOLERANCE,
    assert_close,
    assert_identical,
    oracle,
    randn,
)
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import consequentialism as cw

VOCABULARY, WIDTH = 9, 4
# Index 5 never occurs, 2 often, 0 is what padding_idx names below.
INDICES = torch.tensor([[2, 2, 0, 1], [2, 8, 7, 0], [3, 3, 2, 6]])


def one_hot(indices: Tensor, padding_idx: int | None = None) -> Tensor:
    """The input of the linear layer that an embedding is, ``[N, V]``; zeros at ``padding_idx``."""
    rows = nn.functional.one_hot(indices.reshape(-1), VOCABULARY).double()
    if padding_idx is not None:
        rows[indices.reshape(-1) == padding_idx] = 0
    return rows


def gradient_of(layer: nn.Embedding, dy: Tensor, indices: Tensor = INDICES) -> Tensor:
    layer.zero_grad()
    layer(indices).backward(dy)
    assert layer.weight.grad is not None
    return layer.weight.grad


@pytest.mark.parametrize("padding_idx", [None, 0, 8, -1])
@pytest.mark.parametrize("damping_mode", ["relative", "absolute"])
@pytest.mark.parametrize("scale", ["nlms", "raw", "gradient"])
@pytest.mark.parametrize("rows", [12, 5])
def test_is_the_linear_formula_on_one_hot_rows(
    rows: int, scale: str, damping_mode: str, padding_idx: int | None
) -> None:
    options: dict[str, Any] = {"damping": 0.3, "damping_mode": damping_mode, "scale": scale}
    indices, dy = INDICES.reshape(-1)[:rows], randn(rows, WIDTH)
    layer = cw.Embedding(VOCABULARY, WIDTH, padding_idx, dtype=F64, **options)
    expected = oracle(one_hot(indices, layer.padding_idx), dy, False, **options)[0].T
    assert_close("dw", gradient_of(layer, dy, indices), expected, EXACT)
    if layer.padding_idx is not None:
        assert_identical("dw of the padding", layer.weight.grad[layer.padding_idx], torch.zeros(WIDTH, dtype=F64))
    linear = cw.Linear(VOCABULARY, WIDTH, bias=False, dtype=F64, **options)
    linear(one_hot(indices, layer.padding_idx)).backward(dy)
    assert linear.weight.grad is not None
    assert_close("dw of cw.Linear", linear.weight.grad.T, expected, EXACT)
    own = cw.reference.emended_embedding_grad(indices, dy, VOCABULARY, layer.padding_idx, **options)
    assert_close("dw of the reference", own, expected, EXACT)


def test_formula_by_hand() -> None:
    layer = cw.Embedding(VOCABULARY, WIDTH, damping=0.5, damping_mode="absolute", scale="raw", dtype=F64)
    dy = randn(*INDICES.shape, WIDTH)
    own = gradient_of(layer, dy)
    for v in range(VOCABULARY):
        occurrences = INDICES.eq(v)
        assert_close(f"dw[{v}]", own[v], dy[occurrences].sum(0) / (occurrences.sum() + 0.5), EXACT)


def test_output_is_torchs() -> None:
    own, plain = cw.Embedding(VOCABULARY, WIDTH, 0), nn.Embedding(VOCABULARY, WIDTH, 0)
    plain.load_state_dict(own.state_dict())
    own.load_state_dict(plain.state_dict())
    for indices in (INDICES, INDICES[0], INDICES[0, 0], INDICES.int(), INDICES.T):
        assert_identical("y", own(indices), plain(indices))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("leading", [(), (12,), (3, 4), (1, 2, 6)])
def test_types_and_leading_dimensions(dtype: torch.dtype, leading: tuple[int, ...]) -> None:
    indices = INDICES.reshape(leading) if leading else INDICES[1, 1]
    dy = randn(*leading, WIDTH, dtype=dtype)
    layer = cw.Embedding(VOCABULARY, WIDTH, dtype=dtype)
    own = gradient_of(layer, dy, indices)
    assert own.dtype == dtype
    expected = oracle(one_hot(indices), dy.reshape(-1, WIDTH), False)[0].T
    assert_close("dw", own, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
def test_many_repetitions_in_a_half_type(dtype: torch.dtype) -> None:
    # A half type counts to 256 (bfloat16) or 2048 (float16) and no further.
    indices = torch.arange(10_000) % 2
    dy = 1 + 0.1 * randn(10_000, WIDTH)
    layer = cw.Embedding(VOCABULARY, WIDTH, scale="raw", dtype=dtype)
    own = gradient_of(layer, dy.to(dtype), indices)
    expected = oracle(one_hot(indices), dy.to(dtype), False, scale="raw")[0].T
    assert_close("dw", own, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("padding_idx", [None, 0])
def test_sparse_gradient(padding_idx: int | None) -> None:
    dy = randn(*INDICES.shape, WIDTH)
    dense = cw.Embedding(VOCABULARY, WIDTH, padding_idx, dtype=F64)
    sparse = cw.Embedding(VOCABULARY, WIDTH, padding_idx, sparse=True, dtype=F64)
    own = gradient_of(sparse, dy)
    assert own.is_sparse
    assert_close("dw", own.to_dense(), gradient_of(dense, dy), EXACT)
    sparse.load_state_dict(dense.state_dict())
    for layer, optimizer in (
        (dense, torch.optim.SGD(dense.parameters(), lr=0.1)),
        (sparse, torch.optim.SGD(sparse.parameters(), lr=0.1)),
    ):
        gradient_of(layer, dy)
        optimizer.step()
    assert_close("weight", sparse.weight, dense.weight, EXACT)
    torch.optim.SparseAdam(sparse.parameters()).step()


@pytest.mark.parametrize("norm_type", [1.0, 2.0])
def test_max_norm(norm_type: float) -> None:
    own = cw.Embedding(VOCABULARY, WIDTH, max_norm=0.5, norm_type=norm_type, dtype=F64)
    plain = nn.Embedding(VOCABULARY, WIDTH, max_norm=0.5, norm_type=norm_type, dtype=F64)
    plain.load_state_dict(own.state_dict())
    dy = randn(*INDICES.shape, WIDTH)
    assert_identical("y", own(INDICES), plain(INDICES))
    assert_identical("weight", own.weight, plain.weight)
    with torch.no_grad():
        own.weight.mul_(10)
        plain.weight.mul_(10)
        assert_identical("y, no_grad", own(INDICES.T), plain(INDICES.T))
    assert_identical("weight", own.weight, plain.weight)
    assert_close("dw", gradient_of(own, dy), oracle(one_hot(INDICES), dy.reshape(-1, WIDTH), False)[0].T, EXACT)


@pytest.mark.parametrize("shape", [(0,), (3, 0)])
@pytest.mark.parametrize("sparse", [False, True])
def test_empty_batch(shape: tuple[int, ...], sparse: bool) -> None:
    layer = cw.Embedding(VOCABULARY, WIDTH, 0, sparse=sparse)
    out = layer(torch.zeros(shape, dtype=torch.int64))
    assert out.shape == (*shape, WIDTH)
    out.sum().backward()
    assert layer.weight.grad is not None
    assert_identical("dw", layer.weight.grad.to_dense(), torch.zeros(VOCABULARY, WIDTH))


def test_only_padding_gives_zero() -> None:
    layer = cw.Embedding(VOCABULARY, WIDTH, 0)
    own = gradient_of(layer, randn(5, WIDTH, dtype=F32), torch.zeros(5, dtype=torch.int64))
    assert_identical("dw", own, torch.zeros(VOCABULARY, WIDTH))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_are_not_hidden(value: float) -> None:
    dy = randn(*INDICES.shape, WIDTH, dtype=F32)
    dy[1, 1, 2] = value
    own = gradient_of(cw.Embedding(VOCABULARY, WIDTH), dy)
    assert own[8, 2].isnan()


def test_nothing_is_computed_without_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the emended function was called")

    monkeypatch.setattr("consequentialism.nn.embedding.EmendedEmbedding.apply", refuse)
    layer = cw.Embedding(VOCABULARY, WIDTH)
    with torch.no_grad():
        layer(INDICES)
    layer.requires_grad_(False)
    assert not layer(INDICES).requires_grad
    with pytest.raises(AssertionError, match="was called"):
        layer.requires_grad_(True)(INDICES)


def test_second_derivative_is_an_error() -> None:
    layer = cw.Embedding(VOCABULARY, WIDTH)
    (gradient,) = torch.autograd.grad(layer(INDICES).square().sum(), layer.weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_autocast_leaves_an_embedding_alone() -> None:
    layer, dy = cw.Embedding(VOCABULARY, WIDTH), randn(*INDICES.shape, WIDTH, dtype=F32)
    expected = gradient_of(layer, dy).clone()
    layer.zero_grad()
    with torch.autocast("cpu", dtype=BF16):
        out = layer(INDICES)
        assert out.dtype == F32
        out.backward(dy)
    assert_identical("dw", layer.weight.grad, expected)


def test_loss_scaling_commutes_and_runs_repeat() -> None:
    layer, dy = cw.Embedding(VOCABULARY, WIDTH), randn(*INDICES.shape, WIDTH, dtype=F32)
    own = gradient_of(layer, dy).clone()
    assert_identical("dw of a scaled loss", gradient_of(layer, 1024 * dy), 1024 * own)
    assert_identical("dw again", gradient_of(layer, dy), own)


def test_gradients_accumulate_and_the_weight_may_be_tied() -> None:
    layer = cw.Embedding(VOCABULARY, WIDTH, dtype=F64)
    head = cw.Linear(WIDTH, VOCABULARY, bias=False, dtype=F64)
    head.weight = layer.weight
    dy = randn(*INDICES.shape, VOCABULARY)
    hidden = layer(INDICES)
    head(hidden).backward(dy)
    flat_dy = dy.reshape(-1, VOCABULARY)
    of_head = oracle(hidden.detach().reshape(-1, WIDTH), flat_dy, False)[0]
    of_layer = oracle(one_hot(INDICES), flat_dy @ layer.weight.detach(), False)[0].T
    assert_close("dw", layer.weight.grad, of_head + of_layer, EXACT)


def test_constructor_repr_and_copies() -> None:
    assert repr(cw.Embedding(9, 4)) == repr(nn.Embedding(9, 4))
    assert repr(cw.Embedding(9, 4, 0, 1.0)) == repr(nn.Embedding(9, 4, 0, 1.0))
    layer = cw.Embedding(9, 4, sparse=True, damping=0.1)
    assert "damping=0.1" in repr(layer)
    for other in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)):
        assert type(other) is cw.Embedding
        assert repr(other) == repr(layer)
        assert_identical("weight", other.weight, layer.weight)
    weights = randn(9, 4, dtype=F32)
    loaded = cw.Embedding.from_pretrained(weights, freeze=False, padding_idx=1)
    assert type(loaded) is cw.Embedding
    assert_identical("weight", loaded.weight.detach(), weights)
    assert_close(
        "dw",
        gradient_of(loaded, randn(*INDICES.shape, 4, dtype=F32)),
        oracle(one_hot(INDICES, 1), randn(*INDICES.shape, 4, dtype=F32).reshape(-1, 4), False)[0].T,
        TOLERANCE[F32],
    )
    assert not cw.Embedding.from_pretrained(weights).weight.requires_grad


def test_scale_grad_by_freq_is_refused() -> None:
    with pytest.raises(ValueError, match="scale_grad_by_freq must be False, got True"):
        cw.Embedding(9, 4, scale_grad_by_freq=True)


def test_index_out_of_range_is_torchs_error() -> None:
    with pytest.raises(IndexError):
        cw.Embedding(9, 4)(torch.tensor([9]))


def test_one_step_moves_each_row_by_its_mean_error() -> None:
    # Small damping, scale="raw", lr 1: every embedding moves by the mean of its errors, however often it occurs.
    layer = cw.Embedding(VOCABULARY, WIDTH, damping=1e-9, damping_mode="absolute", scale="raw", dtype=F64)
    before, dy = layer.weight.detach().clone(), randn(*INDICES.shape, WIDTH)
    gradient_of(layer, dy)
    torch.optim.SGD(layer.parameters(), lr=1.0).step()
    assert_close("dw[2]", before[2] - layer.weight[2], dy[INDICES == 2].mean(0), LIMIT)


@pytest.mark.parametrize("sparse", [False, True])
def test_no_width(sparse: bool) -> None:
    layer = cw.Embedding(VOCABULARY, 0, sparse=sparse)
    layer(INDICES).sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.shape == (VOCABULARY, 0)


class LargestTensor(TorchDispatchMode):
    """How many elements the largest result of any operation had."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.layout == torch.strided:
                self.largest = max(self.largest, tensor.numel())
        return result


@pytest.mark.parametrize("padding_idx", [None, 0])
@pytest.mark.parametrize("integers", [torch.int32, torch.int64])
def test_a_sparse_gradient_has_nothing_of_the_vocabularys_size(integers: torch.dtype, padding_idx: int | None) -> None:
    vocabulary = 100_000
    options: dict[str, Any] = {"damping": 0.3, "padding_idx": padding_idx}
    layer = cw.Embedding(vocabulary, WIDTH, sparse=True, dtype=F64, **options)
    y, dy = layer(INDICES.to(integers)), randn(*INDICES.shape, WIDTH)
    with LargestTensor() as seen:
        y.backward(dy)
    assert 0 < seen.largest <= INDICES.numel() * WIDTH
    expected = cw.reference.emended_embedding_grad(INDICES.reshape(-1), dy.reshape(-1, WIDTH), vocabulary, **options)
    assert_close("dw", layer.weight.grad.to_dense(), expected, EXACT)


@pytest.mark.parametrize("scale", ["nlms", "raw", "gradient"])
@pytest.mark.parametrize("damping_mode", ["relative", "absolute"])
def test_sparse_and_dense_agree(scale: str, damping_mode: str) -> None:
    dy = randn(*INDICES.shape, WIDTH)
    found = []
    for sparse in (False, True):
        options: dict[str, Any] = {"damping": 0.3, "scale": scale, "damping_mode": damping_mode}
        layer = cw.Embedding(VOCABULARY, WIDTH, 0, sparse=sparse, dtype=F64, **options)
        cw.set_samples(layer, 7)
        found.append(gradient_of(layer, dy).to_dense() if sparse else gradient_of(layer, dy))
    assert_close("dw", found[1], found[0], EXACT)


def test_a_registered_table_whose_padding_counts_from_the_end() -> None:
    """-1 is the last row, and not torch's sign for none."""

    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.padding_idx = nn.Parameter(randn(5, 2, dtype=F32)), -1

        def forward(self, indices: Tensor) -> Tensor:
            return nn.functional.embedding(indices, self.weight, self.padding_idx)

    cw.register(Table, like=nn.Embedding)
    table = cw.convert(Table())
    table(torch.tensor([0, 4, 4])).sum().backward()
    assert table.weight.grad is not None
    assert not table.weight.grad[-1].any()
    assert table.weight.grad[0].all()
