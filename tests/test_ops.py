"""The ops themselves: opcheck, layouts, arguments, and factors that break down."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from cases import (
    BACKENDS,
    BF16,
    DTYPES,
    EXACT,
    F16,
    F32,
    F64,
    SHAPES,
    TOLERANCE,
    TOLERANCE_ABSOLUTE,
    Shape,
    assert_close,
    assert_identical,
    device_of,
    needs_kernels,
    oracle,
    randn,
)
from torch import Tensor

from consequentialism import reference
from consequentialism.backend import compiled as ops
from consequentialism.backend import dispatch
from consequentialism.backend.schemas import COORDINATE_OPS, OPS, STEP_OPS
from consequentialism.options import BACKENDS as BACKEND_NAMES

LAYOUTS: dict[str, Callable[[int, int, torch.dtype], Tensor]] = {
    "contiguous": lambda n, m, dtype: randn(n, m, dtype=dtype),
    "transposed": lambda n, m, dtype: randn(m, n, dtype=dtype).T,
    "sliced": lambda n, m, dtype: randn(n, 2 * m + 3, dtype=dtype)[:, 3 : m + 3],
    "strided": lambda n, m, dtype: randn(2 * n, 2 * m, dtype=dtype)[::2, ::2],
    "expanded rows": lambda n, m, dtype: randn(1, m, dtype=dtype).expand(n, m),
    "expanded columns": lambda n, m, dtype: randn(n, 1, dtype=dtype).expand(n, m),
    "offset": lambda n, m, dtype: randn(n + 1, m, dtype=dtype)[1:],
}
OPCHECK_CASES = [*product([F32], LAYOUTS), *product([F64, BF16, F16], ["contiguous", "transposed"])]
OPTIONS = (0.5, "relative", "nlms")
# What opcheck's own default set is, less the derivative, which belongs to an autograd Function.
OPCHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


def op(name: str) -> Any:
    return getattr(torch.ops.consequentialism, name).default


def kernels(backend: str, x: Tensor) -> Any:
    return dispatch.select(backend, x)


@needs_kernels
@pytest.mark.parametrize(("dtype", "layout"), OPCHECK_CASES, ids=str)
@pytest.mark.parametrize("form", ["dual", "primal"])
def test_opcheck_of_x(form: str, dtype: torch.dtype, layout: str) -> None:
    for bias, (rows, inputs) in ((True, (5, 7)), (False, (7, 5)), (True, (1, 1))):
        x = LAYOUTS[layout](rows, inputs, dtype)
        torch.library.opcheck(op("input_gram"), (x, bias, form), test_utils=OPCHECKS)
        torch.library.opcheck(op("gram_inverse"), (x, bias, form, *OPTIONS), test_utils=OPCHECKS)
        torch.library.opcheck(op("emended_input"), (x, bias, form, *OPTIONS), test_utils=OPCHECKS)


@needs_kernels
@pytest.mark.parametrize(("dtype", "layout"), OPCHECK_CASES, ids=str)
def test_opcheck_of_weight_grad(dtype: torch.dtype, layout: str) -> None:
    dy, rows = LAYOUTS[layout](6, 4, dtype), LAYOUTS[layout](6, 5, dtype)
    wide = F64 if dtype == F64 else F32
    for column in (torch.ones(6, dtype=wide), torch.ones(0, dtype=wide)):
        torch.library.opcheck(op("weight_grad"), (dy, rows, column), test_utils=OPCHECKS)


@needs_kernels
@pytest.mark.parametrize("scale", ["nlms", "raw", "gradient"])
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_opcheck_of_damped_inverse(dtype: torch.dtype, scale: str) -> None:
    for gram in (torch.eye(5, dtype=dtype), torch.eye(10, dtype=dtype)[::2, ::2], torch.ones(1, 1, dtype=dtype)):
        for damping_mode in ("relative", "absolute"):
            arguments = (gram, 0.5, damping_mode, scale, 5, 9)
            torch.library.opcheck(op("damped_inverse"), arguments, test_utils=OPCHECKS)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(5, 7, 3), (40, 33, 3), (130, 129, 5)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_layout_does_not_matter(backend: str, dtype: torch.dtype, shape: Shape, layout: str) -> None:
    rows, inputs, outputs = shape
    x = LAYOUTS[layout](rows, inputs, dtype).to(device_of(backend))
    dy = LAYOUTS[layout](rows, outputs, dtype).to(device_of(backend))
    module = kernels(backend, x)
    for form in ("dual", "primal"):
        arguments = (True, form, 5.0, "relative", "nlms")  # an expanded x has rank 1
        expected = reference.emended_input(x.double(), *arguments)
        for name, a, b in zip(("y", "column"), module.emended_input(x, *arguments), expected, strict=True):
            assert_close(f"{name} {form}", a, b, TOLERANCE[dtype])
    wide = F64 if dtype == F64 else F32
    column = torch.linspace(1, 2, rows, dtype=wide)
    own = module.weight_grad(dy, x, column)
    assert_close("dw", own[0], dy.double().T @ x.double(), TOLERANCE[dtype])
    assert_close("db", own[1], dy.double().T @ column.double(), TOLERANCE[dtype])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gram_and_inverse_are_whole_and_symmetric(backend: str, shape: Shape, bias: bool) -> None:
    x = randn(*shape[:2], device=device_of(backend))
    module = kernels(backend, x)
    for form in ("dual", "primal"):
        gram = module.input_gram(x, bias, form)
        assert_close(f"gram {form}", gram, reference.input_gram(x, bias, form), EXACT)
        assert_close(f"gram^T {form}", gram.T, gram, EXACT)
        inverse = module.gram_inverse(x, bias, form, *OPTIONS)
        assert_close(f"inverse {form}", inverse, reference.gram_inverse(x, bias, form, *OPTIONS), EXACT)
        own = module.damped_inverse(gram, *OPTIONS, min(shape[0], shape[1] + bias), shape[0])
        assert_close(f"damped_inverse {form}", own, inverse, EXACT)


@pytest.mark.parametrize("order", [1, 2, 63, 64, 65, 127, 128, 129, 200, 257])
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_damped_inverse(backend: str, dtype: torch.dtype, order: int) -> None:
    rows = randn(order, order + 5)
    gram = (rows @ rows.T).to(device_of(backend), dtype)
    before = gram.clone()
    for damping_mode, scale in (("relative", "nlms"), ("absolute", "raw"), ("relative", "gradient")):
        own = kernels(backend, gram).damped_inverse(gram, 0.5, damping_mode, scale, order, 7)
        c = 0.5 if damping_mode == "absolute" else 0.5 * gram.double().trace() / order
        multiplier = {"nlms": 7, "raw": 1, "gradient": c}[scale]
        expected = multiplier * torch.linalg.inv(gram.double() + c * torch.eye(order, dtype=F64, device=gram.device))
        bounds = TOLERANCE if damping_mode == "relative" else TOLERANCE_ABSOLUTE
        assert_close("inverse", own, expected, bounds[dtype])
        assert_identical("gram", gram, before)


@needs_kernels
@pytest.mark.parametrize(("dtype", "layout"), OPCHECK_CASES, ids=str)
def test_opcheck_of_fused_weight_grad(dtype: torch.dtype, layout: str) -> None:
    for bias, (rows, inputs) in ((True, (5, 7)), (False, (7, 5)), (True, (1, 1)), (True, (0, 3))):
        x, dy = LAYOUTS[layout](rows, inputs, dtype), LAYOUTS[layout](rows, 3, dtype)
        torch.library.opcheck(op("fused_weight_grad"), (x, dy, bias, *OPTIONS), test_utils=OPCHECKS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_fused_weight_grad_is_the_gradient(backend: str, dtype: torch.dtype) -> None:
    for rows, inputs, outputs in (*SHAPES, (0, 3, 2)):
        for bias in (True, False):
            x = randn(rows, inputs, dtype=dtype, device=device_of(backend))
            dy = randn(rows, outputs, seed=1, dtype=dtype, device=device_of(backend))
            dw, db = kernels(backend, x).fused_weight_grad(x, dy, bias, 1.0, "relative", "nlms")
            expected = oracle(x, dy, bias)
            assert dw.dtype == db.dtype == dtype
            assert_close("dw", dw, expected[0], TOLERANCE[dtype])
            assert_close("db", db, torch.zeros(0) if expected[1] is None else expected[1], TOLERANCE[dtype])


@pytest.mark.parametrize("order", [1, 9, 64, 129])
@pytest.mark.parametrize("backend", [b for b in ("cpu", "reference") if dispatch.backends()[b] == "available"])
def test_damped_inverse_of_groups_is_that_of_each(backend: str, order: int) -> None:
    rows = randn(5, order, order + 5)
    rows[1], rows[3, 0] = 0, math.nan
    gram = rows @ rows.mT
    gram[4] -= 0.9 * gram[4].diagonal().mean() * torch.eye(order, dtype=F64)  # retried with more damping
    module = kernels(backend, gram)
    how: Any = (0.5, "relative", "nlms", order, 7)
    finite = gram[[0, 1, 2, 4]]
    batched = module.damped_inverse(finite.reshape(2, 2, order, order), *how)
    assert_identical("batch", batched.flatten(0, 1), module.damped_inverse(finite, *how))
    assert module.damped_inverse(gram[:0], *how).shape == (0, order, order)
    for damping_mode, scale in (("relative", "nlms"), ("absolute", "raw"), ("relative", "gradient")):
        own = module.damped_inverse(gram, 0.5, damping_mode, scale, order, 7)
        each = torch.stack([module.damped_inverse(one, 0.5, damping_mode, scale, order, 7) for one in gram])
        assert own[3].isnan().all()
        for k in (0, 1, 2, 4):
            assert_close(f"inverse of {k}", own[k], each[k], EXACT)


def test_every_backend_has_every_op() -> None:
    assert (*dispatch.REGISTRY, "auto") == (*BACKEND_NAMES[1:], "auto")
    for entry in dispatch.REGISTRY.values():
        if entry.reason_unavailable() is None:
            assert all(callable(getattr(entry.backend(), name)) for name in OPS)
            assert entry.backend().LIMITS.fused_rows > 0


@needs_kernels
def test_the_compiled_ops_have_the_schemas_of_the_table() -> None:
    own = {"emended_linear"}  # has a derivative, and so no fake
    prefix = "consequentialism::"
    compiled = {
        s.name.removeprefix(prefix): str(s) for s in torch._C._jit_get_all_schemas() if s.name.startswith(prefix)
    }
    ops_of_table = {**OPS, **COORDINATE_OPS, **STEP_OPS}
    for name, (schema, _) in ops_of_table.items():
        expected = schema.replace(" dtype)", " dtype, str method)") if name == "conv_gram" else schema
        assert str(op(name)._schema) == str(torch._C.parse_schema(f"consequentialism::{name}{expected}"))
    traced = {"emended_weight_grad", "emended_conv_weight_grad"}  # defined in Python, see autograd/traced_ops.py
    assert compiled.keys() == ops_of_table.keys() | own | traced


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_op_weight_grad_takes_few_rows_of_a_half_type(dtype: torch.dtype) -> None:
    dy, rows, column = (randn(*shape).to(dtype) for shape in ((8, 3), (8, 5), (8,)))
    dw, db = op("weight_grad")(dy, rows, column)
    assert dw.dtype == db.dtype == dtype
    torch.testing.assert_close(dw, (dy.double().T @ rows.double()).to(dtype))
    torch.testing.assert_close(db, (dy.double().T @ column.double()).to(dtype))


def indefinite(smallest: float, order: int = 70) -> Tensor:
    """A symmetric matrix with eigenvalues 1 but for one."""
    basis = torch.linalg.qr(randn(order, order))[0]
    values = torch.ones(order, dtype=F64)
    values[-1] = smallest
    return basis @ torch.diag(values) @ basis.T


@pytest.mark.parametrize(("smallest", "growth"), [(-0.005, 1), (-0.05, 10), (-0.5, 100), (-5.0, 1000)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_breakdown_is_retried_with_more_damping(backend: str, smallest: float, growth: int) -> None:
    gram = indefinite(smallest).to(device_of(backend))
    before = ops.breakdowns()
    own = kernels(backend, gram).damped_inverse(gram, 0.01, "absolute", "raw", 70, 70)
    eye = torch.eye(70, dtype=F64, device=gram.device)
    assert_close("inverse", own, torch.linalg.inv(gram + 0.01 * growth * eye), EXACT)
    counted = backend != "reference" and growth > 1
    assert ops.breakdowns() - before == (1 if counted else 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_breakdown_for_good_takes_the_diagonal(backend: str) -> None:
    gram = indefinite(-500.0).to(device_of(backend))
    gram += torch.diag(600 - gram.diagonal())  # a positive diagonal, no positive matrix
    gram[0, 1] = gram[1, 0] = 1e6
    own = kernels(backend, gram).damped_inverse(gram, 0.01, "absolute", "nlms", 70, 3)
    assert_close("inverse", own, torch.diag(3 / (gram.diagonal() + 0.01)), EXACT)


@pytest.mark.parametrize("damping", [1e-300, 1e-40, 1e-20])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_tiny_absolute_damping_of_duplicate_rows_stays_finite(backend: str, dtype: torch.dtype, damping: float) -> None:
    x = randn(3, 20, dtype=dtype, device=device_of(backend))[torch.arange(12) // 4]
    emended, column = kernels(backend, x).emended_input(x, True, "dual", damping, "absolute", "raw")
    assert emended.isfinite().all()
    assert column.isfinite().all()


@pytest.mark.parametrize("damping_mode", ["relative", "absolute"])
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_damped_inverse_of_nothing_and_of_nan(backend: str, dtype: torch.dtype, damping_mode: str) -> None:
    zero = torch.zeros(5, 5, dtype=dtype, device=device_of(backend))
    module = kernels(backend, zero)
    for scale in ("nlms", "raw", "gradient"):
        assert_identical("inverse", module.damped_inverse(zero, 1.0, damping_mode, scale, 5, 5), zero)
        for value in (math.nan, math.inf):
            gram = torch.eye(5, dtype=dtype, device=zero.device)
            gram[2, 2] = value
            assert module.damped_inverse(gram, 1.0, damping_mode, scale, 5, 5).isnan().all()


@needs_kernels
def test_bad_arguments_of_ops() -> None:
    x, gram = randn(4, 3), torch.eye(3, dtype=F64)
    own = torch.ops.consequentialism
    for call, error, words in (
        (lambda: own.input_gram(x[0], True, "dual"), ValueError, ("x", "[N, I]", "[3]")),
        (lambda: own.input_gram(x.int(), True, "dual"), TypeError, ("x", "float16", "Int")),
        (lambda: own.input_gram(x, True, "both"), ValueError, ("form", "both", "'dual'", "'primal'")),
        (lambda: own.gram_inverse(x, True, "dual", 0.0, "relative", "raw"), ValueError, ("damping", "0")),
        (lambda: own.gram_inverse(x, True, "dual", math.nan, "relative", "raw"), ValueError, ("damping", "nan")),
        (lambda: own.emended_input(x, True, "dual", 1.0, "none", "raw"), ValueError, ("damping_mode", "none")),
        (lambda: own.emended_input(x, True, "dual", 1.0, "relative", "none"), ValueError, ("scale", "none", "'raw'")),
        (
            lambda: own.damped_inverse(randn(3), 1.0, "relative", "raw", 3, 3),
            ValueError,
            ("gram", "[..., n, n]", "[3]"),
        ),
        (lambda: own.damped_inverse(x, 1.0, "relative", "raw", 3, 3), ValueError, ("gram", "[..., n, n]", "[4, 3]")),
        (lambda: own.damped_inverse(gram.to(BF16), 1.0, "relative", "raw", 3, 3), TypeError, ("gram", "BFloat16")),
        (lambda: own.damped_inverse(gram, 1.0, "relative", "raw", 0, 3), ValueError, ("rank", "0")),
        (lambda: own.weight_grad(x, x[:2], x[:, 0]), ValueError, ("dy", "rows", "[4, 3]", "[2, 3]")),
        (lambda: own.fused_weight_grad(x, x[:2], True, *OPTIONS), ValueError, ("dy", "x", "[2, 3]", "[4, 3]")),
        (lambda: own.fused_weight_grad(x, x.float(), True, *OPTIONS), TypeError, ("dy", "x", "Float", "Double")),
        (lambda: own.fused_weight_grad(x, x, True, 0.0, "relative", "raw"), ValueError, ("damping", "0")),
        (lambda: own.emended_input(x, True, "dual", *OPTIONS, F32), TypeError, ("gram_dtype", "float64", "Float")),
        (lambda: reference.emended_input(x, True, "dual", *OPTIONS, F32), TypeError, ("gram_dtype", "float32")),
        (lambda: own.weight_grad(x, x, x[:2, 0]), ValueError, ("column", "[2]", "[4, 3]")),
    ):
        with pytest.raises(error) as caught:
            call()
        for word in words:
            assert word in str(caught.value), f"{word!r} is not in {caught.value}"
