"""The compiled ops by themselves: schemas, fakes and kernels agree (opcheck), and bad arguments are refused."""

from __future__ import annotations

import pytest
import torch
from cases import DTYPES, assert_close, needs_kernels, randn
from torch import Tensor

from consequentialism import ops, reference

pytestmark = needs_kernels

OPS = torch.ops.consequentialism
LAYOUTS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.t().contiguous().t(),
    "sliced": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "strided": lambda x: torch.stack([x, x], 2)[:, :, 0],
    "expanded": lambda x: x[:1].expand(x.shape),
}


def opcheck(op: object, *arguments: object) -> None:
    torch.library.opcheck(op, arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", ["dual", "primal"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck_of_the_ops_on_x(dtype: torch.dtype, bias: bool, form: str, layout: str) -> None:
    x = LAYOUTS[layout](randn(5, 7, dtype=dtype))
    opcheck(OPS.input_gram.default, x, bias, form)
    opcheck(OPS.input_inverse.default, x, bias, form, 1.0, "relative", "nlms")
    opcheck(OPS.emended_input.default, x, bias, form, 0.5, "absolute", "gradient")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_opcheck_of_factor(dtype: torch.dtype) -> None:
    x = randn(6, 9, dtype=dtype)
    opcheck(OPS.factor.default, x @ x.T, 1.0, "relative", "raw", 6, 6)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("column", [0, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck_of_weight_grad(dtype: torch.dtype, column: int, layout: str) -> None:
    dy, rows = LAYOUTS[layout](randn(5, 3, dtype=dtype)), randn(5, 7, seed=1, dtype=dtype)
    kept = rows.float() if dtype == torch.float16 else rows
    opcheck(OPS.weight_grad.default, dy, kept, torch.ones(column, dtype=reference.compute_dtype(dtype)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("n", [1, 31, 64, 65, 97, 128, 129, 200])
@pytest.mark.parametrize("form", ["dual", "primal"])
def test_input_gram_is_the_reference_s_and_symmetric(form: str, n: int, layout: str) -> None:
    x = LAYOUTS[layout](randn(n, 40))
    for bias in (True, False):
        gram = ops.input_gram(x, bias, form)
        assert_close("gram", gram, reference.input_gram(x, bias, form), 1e-13)
        assert torch.equal(gram, gram.T)


@pytest.mark.parametrize("n", [1, 2, 63, 64, 65, 127, 128, 129, 191, 193, 256, 300, 513])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_factor_inverts(dtype: torch.dtype, n: int) -> None:
    x = randn(n, n + 20, dtype=dtype)
    gram = x @ x.T
    before = gram.clone()
    inverse = ops.factor(gram, 1.0, "relative", "raw", n, n)
    c = gram.diagonal().sum() / n
    product = inverse.double() @ (gram.double() + c.double() * torch.eye(n, dtype=torch.float64))
    assert_close("P (G + c I)", product, torch.eye(n, dtype=torch.float64), 1e-5 if dtype == torch.float32 else 1e-12)
    assert torch.equal(gram, before), "factor changed its input"


def test_factor_reads_only_the_lower_triangle() -> None:
    x = randn(150, 200)
    gram = x @ x.T
    garbage = gram.tril() + torch.full_like(gram, torch.nan).triu(1)
    whole, lower = (ops.factor(g, 1.0, "relative", "nlms", 150, 150) for g in (gram, garbage))
    assert torch.equal(whole, lower)


def test_a_broken_factor_is_retried_and_counted() -> None:
    gram = torch.diag(torch.tensor([1.0, 1.0, -1e-3], dtype=torch.float64))  # no ridge of 1e-4 mends it, 1e-2 does
    before = ops.breakdowns()
    inverse = ops.factor(gram, 1e-4, "absolute", "raw", 3, 3)
    assert ops.breakdowns() == before + 1
    expected = 1 / (gram.diagonal() + 1e-2)
    assert_close("inverse", inverse.diagonal(), expected, 1e-12)
    assert_close("reference", reference.factor(gram, 1e-4, "absolute", "raw", 3, 3).diagonal(), expected, 1e-12)


def test_the_diagonal_stands_in_where_no_ridge_helps() -> None:
    gram = torch.diag(torch.tensor([2.0, -1.0], dtype=torch.float64))
    for factor in (ops.factor, reference.factor):
        assert_close("P", factor(gram, 1e-6, "absolute", "raw", 2, 2).diagonal(), torch.tensor([0.5, -1.0]), 1e-5)


@pytest.mark.parametrize("factor", [ops.factor, reference.factor])
def test_factor_of_zero_and_of_nan(factor: object) -> None:
    zero = torch.zeros(4, 4, dtype=torch.float64)
    assert torch.equal(factor(zero, 1.0, "relative", "nlms", 4, 4), zero)  # type: ignore[operator]
    for bad in (torch.nan, torch.inf):
        gram = torch.eye(4)
        gram[1, 1] = bad
        assert factor(gram, 1.0, "relative", "nlms", 4, 4).isnan().all()  # type: ignore[operator]


X = randn(4, 5, dtype=torch.float32)


@pytest.mark.parametrize(
    ("call", "error", "parts"),
    [
        (lambda: ops.input_gram(X[0], True, "dual"), ValueError, ["x", "[N, I]", "[5]"]),
        (lambda: ops.input_gram(X.long(), True, "dual"), TypeError, ["x", "float32", "Long"]),
        (lambda: ops.input_gram(X, True, "cubic"), ValueError, ["form", "'dual'", "'cubic'"]),
        (lambda: ops.emended_input(X, True, "dual", -1.0, "relative", "nlms"), ValueError, ["damping", "-1"]),
        (lambda: ops.emended_input(X, True, "dual", 1.0, "other", "nlms"), ValueError, ["damping_mode", "'other'"]),
        (lambda: ops.emended_input(X, True, "dual", 1.0, "relative", "sum"), ValueError, ["scale", "'sum'"]),
        (lambda: ops.factor(X, 1.0, "relative", "nlms", 4, 4), ValueError, ["gram", "[4, 5]"]),
        (lambda: ops.factor(X[:, :4].half(), 1.0, "relative", "nlms", 4, 4), TypeError, ["gram", "Half"]),
        (lambda: ops.factor(X[:, :4], 1.0, "relative", "nlms", 0, 4), ValueError, ["rank", "0"]),
        (lambda: ops.weight_grad(X[:3], X, X[:, 0]), ValueError, ["dy", "[3, 5]", "[4, 5]"]),
        (lambda: ops.weight_grad(X, X, X[:2, 0]), ValueError, ["column", "[2]", "[4, 5]"]),
    ],
)
def test_bad_arguments_name_themselves(call: object, error: type[Exception], parts: list[str]) -> None:
    with pytest.raises(error) as raised:
        call()  # type: ignore[operator]
    for part in parts:
        assert part in str(raised.value)


def test_an_op_has_no_derivative_of_its_own() -> None:
    x: Tensor = randn(4, 5).requires_grad_()
    emended, _ = ops.emended_input(x, True, "dual", 1.0, "relative", "nlms")
    with pytest.raises(RuntimeError, match="derivative for consequentialism::emended_input is not implemented"):
        emended.sum().backward()
