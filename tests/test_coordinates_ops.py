"""The ops of steps in emended coordinates on every backend: the decayed Gram, the inverse root, products with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import (
    BACKENDS,
    DTYPES,
    F32,
    F64,
    FACTOR,
    FLOOR,
    TOLERANCE,
    assert_close,
    assert_identical,
    device_of,
    error_of,
    make_input,
    randn,
)
from torch import Tensor

from consequentialism.backend import dispatch
from consequentialism.backend.reference import coordinates
from consequentialism.precision import compute_dtype
from consequentialism.solve import root as solve

each_backend = pytest.mark.parametrize("backend", BACKENDS)
GRAMS = (
    (1, 1, 1, False),
    (7, 5, 1, True),
    (33, 31, 2, True),
    (70, 65, 3, False),
    (300, 130, 2, True),
    (9, 64, 4, True),
)
ROWS = ((1, 1, 1), (2, 5, 7), (1, 33, 31), (3, 64, 65), (2, 70, 130))


def ops_of(backend: str) -> Any:
    return dispatch.select(backend, torch.empty(0, device=device_of(backend)))


def blocks_of(x: Tensor, blocks: int, bias: bool) -> Tensor:
    """The diagonal blocks of ``x1^T x1`` by their definition."""
    rows = torch.cat([x, x.new_ones(x.shape[0], 1)], 1) if bias else x
    gram, spans = rows.T @ rows, coordinates.block_spans(x.shape[1], blocks)
    order = coordinates.block_order(x.shape[1], blocks, bias)
    expected = x.new_zeros(blocks, order, order)
    for i, (begin, end) in enumerate(spans):
        end += bias and i == blocks - 1
        expected[i, : end - begin, : end - begin] = gram[begin:end, begin:end]
    return expected


@each_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decayed_gram(backend: str, dtype: torch.dtype) -> None:
    for rows, inputs, blocks, bias in GRAMS:
        x = randn(rows, inputs).to(device_of(backend), dtype)
        before = blocks_of(randn(rows, inputs, seed=1), blocks, bias)
        given = before.to(x.device, compute_dtype(dtype))
        kept = given.clone()
        own = ops_of(backend).decayed_gram(given, x, bias, 0.75, 0.5)
        fresh = blocks_of(x.double().cpu(), blocks, bias)
        assert own.dtype == compute_dtype(dtype)
        assert_identical("gram given", given, kept)
        if backend != "reference":
            assert_identical("symmetric", own.mT, own)
        assert_close("decayed", own, 0.75 * kept.double().cpu() + 0.5 * fresh, TOLERANCE[own.dtype])
        nothing = torch.full_like(given, torch.nan)
        alone = ops_of(backend).decayed_gram(nothing, x, bias, 0.0, 1.0)
        assert_close("without memory", alone, fresh, TOLERANCE[own.dtype])
        assert_identical("again", ops_of(backend).decayed_gram(given, x, bias, 0.75, 0.5), own)


@each_backend
def test_decayed_gram_of_columns_and_rows_apart(backend: str) -> None:
    x = randn(40, 60, dtype=F32).to(device_of(backend))
    for view in (x[::2, :31], x.T[:, 3:], x[:0]):
        inputs = view.shape[1]
        before = torch.zeros(2, *2 * [coordinates.block_order(inputs, 2, True)], device=x.device)
        own = ops_of(backend).decayed_gram(before, view, True, 1.0, 2.0)
        assert_close("decayed", own, 2 * blocks_of(view.double().cpu(), 2, True), TOLERANCE[F32])


def positive(count: int, order: int, low: float, dtype: torch.dtype) -> Tensor:
    """Symmetric ``[count, order, order]`` with eigenvalues from ``low`` to 1."""
    vectors = torch.linalg.qr(randn(count, order, order))[0]
    values = torch.logspace(0, torch.log10(torch.tensor(low)).item(), order, dtype=F64)
    matrix = (vectors * values) @ vectors.mT
    return ((matrix + matrix.mT) / 2).to(dtype)


def by_eigenvalues(matrix: Tensor, exponent: float, dtype: torch.dtype = F64) -> Tensor:
    """By their definition, the eigenvalues found in ``dtype``."""
    values, vectors = torch.linalg.eigh(matrix.to("cpu", dtype))
    return (vectors * values.pow(exponent)[..., None, :]) @ vectors.mT


@each_backend
@pytest.mark.parametrize("root", solve.ROOTS)
@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
def test_inverse_root(backend: str, root: int, dtype: torch.dtype) -> None:
    for count, order, low in ((1, 1, 0.5), (3, 5, 0.9999), (2, 33, 1e-2), (1, 65, 3e-5), (1, 130, 1e-3)):
        matrix = positive(count, order, low, dtype)
        plan = solve.plan(root, low * 0.9, dtype)
        own = ops_of(backend).inverse_root(matrix.to(device_of(backend)), plan.root, plan.coefficients)
        expected = by_eigenvalues(matrix, -1 / root)
        assert own.dtype == dtype
        plain = 1e-11 if dtype == F64 else error_of(by_eigenvalues(matrix, -1 / root, F32), expected)
        assert error_of(own, expected) <= FACTOR * plain + FLOOR.get(dtype, 0), f"{low}: {plain:.2g} by eigh"
        assert_close("symmetric", own.mT, own, TOLERANCE[dtype])


@each_backend
def test_inverse_root_passes_on_what_is_not_a_number(backend: str) -> None:
    matrix = positive(2, 40, 0.1, F32)
    matrix[0, 3, 3] = torch.nan
    plan = solve.plan(4, 0.1, F32)
    own = ops_of(backend).inverse_root(matrix.to(device_of(backend)), plan.root, plan.coefficients).cpu()
    assert own[0].isnan().any()
    assert_close("the other", own[1], by_eigenvalues(matrix[1], -0.25), 2e-5)


@each_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_root_product(backend: str, dtype: torch.dtype) -> None:
    for count, outputs, order in ROWS:
        rows = randn(count, outputs, order).to(device_of(backend), dtype)
        root = positive(count, order, 0.01, compute_dtype(dtype)).to(rows.device)
        expected = rows.double().cpu() @ root.double().cpu()
        own = ops_of(backend).root_product(rows, root)
        assert own.dtype == root.dtype
        assert_close("product", own, expected, TOLERANCE[root.dtype])
        weight = randn(count, outputs, order, seed=1).to(rows.device, dtype)
        before = weight.double().cpu().clone()
        ops_of(backend).add_root_product_(weight, rows, root, -0.5)
        assert_close("weight", weight, before - 0.5 * expected, TOLERANCE[dtype])


@each_backend
def test_root_product_of_parts(backend: str) -> None:
    """A block's columns of a wider matrix, a root without its border, a weight that lies in a wider one."""
    wide, square = randn(5, 90, dtype=F32).to(device_of(backend)), positive(1, 41, 0.1, F32).to(device_of(backend))
    rows, root = wide[None, :, 3:43], square[:, :-1, :-1]
    expected = rows.double().cpu() @ root.double().cpu()
    assert_close("product", ops_of(backend).root_product(rows, root), expected, TOLERANCE[F32])
    weight = torch.zeros_like(wide)
    ops_of(backend).add_root_product_(weight[None, :, 50:], rows, root, 2.0)
    assert_close("weight", weight[None, :, 50:], 2 * expected, TOLERANCE[F32])
    assert not weight[:, :50].any()


@pytest.mark.parametrize("root", solve.ROOTS)
@pytest.mark.parametrize("low", [0.9995, 0.3, 1e-2, 1e-4, 1e-8])
@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
def test_the_polynomials_take_every_eigenvalue_to_1(root: int, low: float, dtype: torch.dtype) -> None:
    values = torch.logspace(torch.log10(torch.tensor(low, dtype=F64)).item(), 0, 999, dtype=F64)
    own, found = values.clone(), torch.ones_like(values)
    steps = list(coordinates.steps_of(solve.plan(root, low, dtype).coefficients))
    for last, a, b, c in steps:
        turn = a + b * own + c * own**2
        own, found = own * turn**root, found * turn
        assert (turn > 0).all()
        assert last or own.max() <= 1 + 1e-9
    assert (found * values ** (1 / root) - 1).abs().max() <= 2 * solve.TOLERANCE[dtype]
    assert len(steps) <= 10


def test_arguments_are_checked() -> None:
    own = ops_of("auto")
    if own is coordinates or not hasattr(own, "module") or own.module is None:
        pytest.skip(f"backend cpu: {dispatch.backends()['cpu']}")
    x, gram, square = randn(5, 6), torch.zeros(2, 4, 4, dtype=F64), torch.eye(3)
    with pytest.raises(ValueError, match=r"b = 4 for 2 blocks of x \[5, 6\] with a bias, got \[2, 3, 3\]"):
        own.decayed_gram(gram[:, :3, :3], x, True, 1.0, 1.0)
    with pytest.raises(TypeError, match=r"gram must be Double for x of Double, got Float"):
        own.decayed_gram(gram.float(), x, True, 1.0, 1.0)
    with pytest.raises(ValueError, match=r"memory must be finite, got nan"):
        own.decayed_gram(gram, x, True, float("nan"), 1.0)
    with pytest.raises(ValueError, match=r"root must be a power of 2 of at least 2, got 3"):
        own.inverse_root(square, 3, [1.0, 0.0, 0.0])
    with pytest.raises(ValueError, match=r"coefficients must be three for each step, got 2"):
        own.inverse_root(square, 2, [1.0, 0.0])
    with pytest.raises(TypeError, match=r"matrix must be float32 or float64, got Half"):
        own.inverse_root(square.half(), 2, [1.0, 0.0, 0.0])
    with pytest.raises(ValueError, match=r"root \[2, 3, 3\] and rows \[1, 2, 3\]"):
        own.root_product(torch.ones(1, 2, 3), torch.ones(2, 3, 3))
    with pytest.raises(ValueError, match=r"got weight \[1, 2, 2\] and rows \[1, 2, 3\]"):
        own.add_root_product_(torch.ones(1, 2, 2), torch.ones(1, 2, 3), torch.ones(1, 3, 3), 1.0)


def test_opcheck() -> None:
    own = ops_of("auto")
    if getattr(own, "module", None) is None:
        pytest.skip(f"backend cpu: {dispatch.backends()['cpu']}")
    ops = torch.ops.consequentialism
    root = positive(2, 5, 0.1, F32)
    utilities = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    calls: list[tuple[Any, tuple[Any, ...]]] = [
        (ops.decayed_gram.default, (torch.zeros(2, 4, 4), make_input("random", 5, 7).float(), True, 0.5, 1.0)),
        (ops.inverse_root.default, (root, 2, solve.plan(2, 0.09, F32).coefficients)),
        (ops.root_product.default, (torch.ones(2, 3, 5), root)),
        (ops.add_root_product_.default, (torch.ones(2, 3, 5), torch.ones(2, 3, 5), root, -1.0)),
    ]
    for op, arguments in calls:
        torch.library.opcheck(op, arguments, test_utils=utilities)
