"""What only the Triton backend has, for a process with ``TRITON_INTERPRET=1``; `test_triton_interpreter` starts it."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from itertools import product

import pytest
import torch
from cases import (
    BF16,
    F16,
    F32,
    F64,
    FLOOR,
    SHAPES,
    SMALL_SHAPES,
    TOLERANCE,
    Shape,
    assert_close,
    assert_grads_close,
    assert_identical,
    error_of,
    make_input,
    oracle,
    randn,
)
from test_conv_gram import EMPTY, empty_gram
from torch import Tensor

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

import consequentialism as cw
from consequentialism import check, reference
from consequentialism.backend import compiled as ops
from consequentialism.backend import dispatch
from consequentialism.backend.triton import conv_gram, fused_weight_grad, launch, plans, tune
from consequentialism.precision import terms_of_inverse

pytestmark = pytest.mark.interpreter
FEW_ROWS = [shape for shape in SHAPES if shape[0] <= plans.MAX_FUSED_ROWS]
OPS = torch.ops.consequentialism_triton
RIDGE = launch.Damping(0.5, True, 8, 1.0, False)


def test_the_interpreter_serves_cpu_tensors() -> None:
    assert cw.backends()["triton"] == "available"
    assert dispatch.device_of("triton") == "cpu"
    assert dispatch.select("triton", randn(2, 3)).INTERPRETED
    assert dispatch.select("auto", randn(2, 3)) is (ops if "cpu" in ops.device_types else reference)


def test_check_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "SHAPES", check.SHAPES[:1])
    monkeypatch.setattr(check, "CONVOLUTIONS", check.CONVOLUTIONS[1::3])
    found = check._check_backend("triton")
    assert found.passed, found.line()
    assert found.cases > 0


@pytest.mark.parametrize(
    ("dtype", "shape"), [*product([F32], FEW_ROWS), *product([F64, BF16, F16], SMALL_SHAPES)], ids=str
)
def test_fused_weight_grad(dtype: torch.dtype, shape: Shape) -> None:
    rows, inputs, outputs = shape
    x, dy = randn(rows, inputs, dtype=dtype), randn(rows, outputs, seed=1, dtype=dtype)
    for bias, scale in ((True, "nlms"), (False, "gradient")):
        dw, db = fused_weight_grad(x, dy, bias, 0.7, "relative", scale)
        assert dw.dtype == db.dtype == dtype
        own = dw, db if bias else None
        assert_grads_close(own, oracle(x, dy, bias, damping=0.7, scale=scale), TOLERANCE[dtype])


@pytest.mark.parametrize("size", [1e-20, 1e-18, 1e18, 1e19])
def test_what_float32_cannot_square_is_right_or_nan(size: float) -> None:
    x, dy = (size * randn(6, 9)).to(F32), randn(6, 3, seed=1, dtype=F32)
    dw, _ = cw.emended_weight_grad(x, dy, bias=False, scale="raw", backend="triton")
    if 1e-18 <= size <= 1e18:
        assert_close("dw", dw, oracle(x, dy, False, scale="raw")[0], TOLERANCE[F32])
    else:
        assert dw.isnan().any()


def test_fused_weight_grad_is_deterministic() -> None:
    x, dy = randn(33, 70, dtype=BF16), randn(33, 130, seed=1, dtype=BF16)
    first = fused_weight_grad(x, dy, True, 1.0, "relative", "nlms")
    again = fused_weight_grad(x.clone(), dy.clone(), True, 1.0, "relative", "nlms")
    assert_identical("dw", again[0], first[0])
    assert_identical("db", again[1], first[1])


@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
def test_fused_weight_grad_at_the_edges(dtype: torch.dtype) -> None:
    x, dy = randn(5, 40, dtype=dtype), randn(5, 70, seed=1, dtype=dtype)
    zeros = fused_weight_grad(torch.zeros_like(x), dy, False, 1.0, "relative", "nlms")[0]
    assert_identical("dw of dead inputs", zeros, torch.zeros(70, 40, dtype=dtype))
    for empty in fused_weight_grad(x[:0], dy[:0], True, 1.0, "relative", "nlms"):
        assert_identical("of no rows", empty, torch.zeros_like(empty))
    for tensor, where in ((x, (4, 39)), (dy, (0, 69))):
        for value in (math.nan, math.inf):
            kept = tensor[where].clone()
            tensor[where] = value
            for gradient in fused_weight_grad(x, dy, True, 1.0, "absolute", "raw"):
                assert gradient.isnan().all()
            tensor[where] = kept


def test_fused_weight_grad_counts_a_breakdown_once() -> None:
    x = randn(3, 40, dtype=F32)[torch.arange(12) // 4]  # four times the same
    before = ops.breakdowns()
    dw, _ = fused_weight_grad(x, randn(12, 70, seed=1, dtype=F32), False, 1e-300, "absolute", "raw")
    assert dw.isfinite().all()
    assert ops.breakdowns() == before + 1


def test_more_rows_than_one_launch_holds_take_several() -> None:
    rows = plans.MAX_FUSED_ROWS + 1
    x, dy = randn(rows, 3), randn(rows, 2, seed=1)
    assert_grads_close(fused_weight_grad(x, dy, True, 1.0, "relative", "nlms"), oracle(x, dy), TOLERANCE[F64])


def test_few_programs_write_all_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "PROCESSORS", 3)  # two tiles of inputs, so one group that writes three tiles of outputs
    x, dy = randn(5, 40, dtype=F32), randn(5, 150, seed=1, dtype=F32)
    assert_grads_close(fused_weight_grad(x, dy, True, 1.0, "relative", "nlms"), oracle(x, dy), TOLERANCE[F32])


def test_a_batch_of_matrices_in_one_launch() -> None:
    grams = torch.stack([randn(40, 50, seed=seed) @ randn(40, 50, seed=seed).T for seed in range(3)])
    grams[1] = 0
    grams[2, 3, 3] = math.nan
    own = launch.inverse_of(grams, RIDGE._replace(rank=40))
    assert_close("first", own[0], reference.damped_inverse(grams[0], 0.5, "relative", "raw", 40, 40), 1e-10)
    assert_identical("of nothing", own[1], torch.zeros_like(own[1]))
    assert own[2].isnan().all()


@pytest.mark.parametrize("works", [True, False])
def test_orders_beyond_one_program(monkeypatch: pytest.MonkeyPatch, works: bool) -> None:
    monkeypatch.setattr(plans, "MAX_INVERSE_ORDER", 20)  # as if a matrix were too large for our kernel
    basis = torch.linalg.qr(randn(40, 40))[0]
    values = torch.ones(40, dtype=F64)
    values[-1] = 0.5 if works else -0.05
    gram = basis @ torch.diag(values) @ basis.T
    before = ops.breakdowns()
    for scale in ("nlms", "gradient"):
        own = launch.damped_inverse(gram, 0.01, "absolute", scale, 40, 7)
        assert_close("inverse", own, reference.damped_inverse(gram, 0.01, "absolute", scale, 40, 7), 1e-10)
    assert ops.breakdowns() - before == (0 if works else 2)
    for special in (torch.zeros_like(gram), gram + math.inf):
        own = launch.damped_inverse(special, 0.01, "relative", "nlms", 40, 7)
        assert torch.equal(own.isnan(), reference.damped_inverse(special, 0.01, "relative", "nlms", 40, 7).isnan())


@pytest.mark.parametrize(("switch", "on", "off"), [("allow_tf32", True, False), ("fp32_precision", "tf32", "ieee")])
def test_tf32_only_where_torch_allows_it(switch: str, on: object, off: object) -> None:
    # torch's reader of the old switch raises where the new one was used.
    assert launch._precision(F32) == launch._exact(F32) == "tf32x3"
    setattr(torch.backends.cuda.matmul, switch, on)
    try:
        assert launch._precision(F32) == "tf32"
        assert launch._exact(F32) == "tf32x3"
        assert launch._precision(F64) == "ieee"
    finally:
        setattr(torch.backends.cuda.matmul, switch, off)


@pytest.mark.parametrize("form", ["dual", "primal"])
@pytest.mark.parametrize(("damping", "terms"), [(0.05, 2), (0.005, 3)])
def test_bfloat16_meets_the_inverse_in_terms(form: str, damping: float, terms: int) -> None:
    # Correlated rows: an inverse rounded to bfloat16 would be off by percents.
    x = make_input("correlated", 24, 40 if form == "dual" else 12).to(BF16)
    assert terms_of_inverse((24 if form == "dual" else 13) / damping) == terms
    arguments = (True, form, damping, "relative", "raw")
    exact = reference.emended_input(x.double(), *arguments)[0]
    own = launch.emended_input(x, *arguments)[0]
    assert error_of(own, exact) <= (1.1 if terms == 3 else 1.15) * error_of(exact.to(BF16), exact)


@pytest.mark.parametrize("scale", [1.0, 1e-6, 4e5])
def test_float16s_weight_gradient_keeps_its_digits(scale: float) -> None:
    """In a unit: y is within float16's range, below and above it."""
    y, dy = randn(40, 70, dtype=F32) * scale, (randn(40, 9, seed=1) / max(scale, 1e-3)).to(F16)
    dw = launch.weight_grad(dy, y, y.new_empty(0))[0]
    expected = dy.double().T @ y.double()
    plain = (dy.float().T @ y).to(F16)
    assert dw.dtype == F16
    assert error_of(dw, expected) <= 2 * error_of(plain, expected) + FLOOR[F16]
    y[3, 4] = math.inf
    assert launch.weight_grad(dy, y, y.new_empty(0))[0].isnan().all()


@pytest.mark.parametrize("form", ["dual", "primal"])
def test_splits_of_the_gram_add_up(form: str) -> None:
    outer, inner = 5, 3 * plans.MIN_LENGTH + 17
    x = randn(outer, inner, dtype=F32) if form == "dual" else randn(inner, outer, dtype=F32)
    assert plans.plan_gram(outer, inner, 4).splits == 3
    gram = launch.input_gram(x, True, form)
    assert_close("gram", gram, reference.input_gram(x.double(), True, form), TOLERANCE[F32])
    assert_identical("gram^T", gram.T.contiguous(), gram)


class Clock:
    """A clock for `tune`, by which later candidates are faster; ``timed`` counts them."""

    def __init__(self) -> None:
        self.timed = 0

    def __call__(self, call: Callable[[], None], quantiles: tuple[float, ...]) -> list[float]:
        call()
        self.timed += 1
        return [1 / self.timed] * len(quantiles)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Candidates are timed as on a device, even those of the smallest launches."""
    clock = Clock()
    monkeypatch.setattr(tune, "INTERPRETED", False)
    monkeypatch.setattr(tune, "_benchmark", clock)
    monkeypatch.setattr(tune, "_chosen", {})
    monkeypatch.setattr(plans, "TUNED_PRODUCTS", 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return clock


def test_a_candidate_is_chosen_once_for_sizes_that_round_alike(clock: Clock) -> None:
    first = launch.input_gram(randn(33, 40, dtype=F32), True, "dual")
    candidates = plans.gram_candidates(plans.plan_gram(33, 40, 4), 33, 40, 4, False)
    assert clock.timed == len(candidates) == 4
    assert list(tune._chosen.values()) == [candidates[-1]]
    assert_identical("gram", launch.input_gram(randn(33, 40, dtype=F32), True, "dual"), first)
    launch.input_gram(randn(60, 64, dtype=F32), True, "dual")
    assert clock.timed == 4
    launch.input_gram(randn(33, 65, dtype=F32), True, "dual")
    launch.input_gram(randn(33, 40, dtype=F32), False, "dual")
    assert len(tune._chosen) == 3


def test_every_tuned_op_gives_the_same_bits(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "PROCESSORS", 1)  # so that one tile is enough for the large ones
    x = randn(40, 33, dtype=F32)
    arguments = (randn(2, 3, 5, 5, dtype=F32), [3, 3], [1, 1], [1, 1], [1, 1], 1, True, 1, F32)
    tuned = (*launch.emended_input(x, True, "primal", 1.0, "relative", "nlms"), conv_gram(*arguments))
    assert len(tune._chosen) == 3
    monkeypatch.setattr(plans, "TUNED_PRODUCTS", math.inf)
    fixed = (*launch.emended_input(x, True, "primal", 1.0, "relative", "nlms"), conv_gram(*arguments))
    for name, one, other in zip(("emended", "column", "gram"), tuned, fixed, strict=True):
        assert_identical(name, one, other)


def test_nothing_is_timed_in_a_capture_or_without_memory(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    x = randn(33, 40, dtype=F32)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    gram = launch.input_gram(x, True, "dual")
    assert clock.timed == len(tune._chosen) == 0
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    def no_memory(call: Callable[[], None], quantiles: tuple[float, ...]) -> list[float]:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(tune, "_benchmark", no_memory)
    assert_identical("gram", launch.input_gram(x, True, "dual"), gram)


def test_small_launches_have_one_candidate() -> None:
    for shape in SHAPES:
        plan = plans.plan_gram(*shape[:2], 4)
        assert plans.gram_candidates(plan, *shape[:2], 4, False) == (plan,)


def test_duplicates_are_as_accurate_as_plain_float32() -> None:
    for kind in ("duplicates", "correlated"):
        x = make_input(kind, 40, 24).to(F32)
        arguments = (True, "dual", 0.05, "relative", "raw")
        exact = reference.emended_input(x.double(), *arguments)[0]
        own = launch.emended_input(x, *arguments)[0]
        plain = reference.emended_input(x, *arguments)[0]
        assert error_of(own, exact) <= 2 * error_of(plain, exact) + 1e-6


def conv_patches(x: Tensor, kernel: int, stride: int, padding: int, dilation: int, groups: int) -> Tensor:
    """``[groups, N, I]``, by plain unfolding."""
    spatial = x.ndim - 2
    x = torch.nn.functional.pad(x, (padding, padding) * spatial)
    for i in range(spatial):
        x = x.unfold(2 + i, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
    x = x.unflatten(1, (groups, -1)).movedim(1, 0).movedim(2, 2 + spatial)
    return x.reshape(groups, x.shape[1] * math.prod(x.shape[2 : 2 + spatial]), -1)


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding", "dilation", "groups"),
    [
        ((2, 3, 7, 6), 3, 1, 1, 1, 1),
        ((2, 4, 9, 8), 2, 2, 0, 3, 2),
        ((3, 2, 300), 5, 1, 2, 1, 1),
        ((1, 2, 4, 5, 6), 2, 1, 1, 2, 1),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=str)
def test_conv_gram(
    dtype: torch.dtype, size: tuple[int, ...], kernel: int, stride: int, padding: int, dilation: int, groups: int
) -> None:
    x = randn(*size, dtype=dtype).transpose(0, 1).contiguous().transpose(0, 1)  # its strides are its own
    patches = conv_patches(x.double(), kernel, stride, padding, dilation, groups)
    wide = F64 if dtype == F64 else F32
    each = [[value] * (x.ndim - 2) for value in (kernel, stride, padding, dilation)]
    for bias in (True, False):
        rows = torch.cat([patches, patches.new_ones(*patches.shape[:2], 1)], 2) if bias else patches
        own = conv_gram(x, *each, groups, bias, 1, wide)
        assert_close("gram", own, rows.mT @ rows, TOLERANCE[wide])
        assert_identical("gram^T", own.mT.contiguous(), own)


@pytest.mark.parametrize("name", EMPTY)
def test_conv_gram_without_a_number(name: str) -> None:
    size, *arguments = EMPTY[name]
    for bias, (dtype, out) in product((True, False), ((F32, F32), (BF16, F64))):
        own = conv_gram(torch.zeros(size, dtype=dtype), *arguments, bias, 1, out)
        assert_identical("gram", own, empty_gram(size, arguments, bias).to(out))


@pytest.mark.parametrize(("form", "bias", "dtype"), [("dual", True, F32), ("primal", False, F16)], ids=str)
def test_opcheck(form: str, bias: bool, dtype: torch.dtype) -> None:
    options = (0.5, "relative", "nlms")
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    x, dy = randn(5, 7, dtype=dtype), randn(5, 3, dtype=dtype)
    torch.library.opcheck(OPS.input_gram.default, (x, bias, form), test_utils=checks)
    torch.library.opcheck(OPS.gram_inverse.default, (x, bias, form, *options), test_utils=checks)
    torch.library.opcheck(OPS.emended_input.default, (x, bias, form, *options), test_utils=checks)
    torch.library.opcheck(OPS.fused_weight_grad.default, (x, dy, bias, *options), test_utils=checks)
    column = torch.ones(5 if bias else 0)
    torch.library.opcheck(OPS.weight_grad.default, (dy, x, column), test_utils=checks)
    arguments = ([2, 2], [1, 1], [1, 0], [1, 1], 1, form == "dual", 1, F32)
    torch.library.opcheck(OPS.conv_gram.default, (randn(2, 3, 4, 4, dtype=F32), *arguments), test_utils=checks)
    torch.library.opcheck(OPS.damped_inverse.default, (torch.eye(5), *options, 5, 9), test_utils=checks)


def test_bad_arguments() -> None:
    x, gram = randn(4, 3), torch.eye(3, dtype=F64)
    for call, error, words in (
        (lambda: OPS.input_gram(x[0], True, "dual"), ValueError, ("x", "[N, I]", "[3]")),
        (lambda: OPS.input_gram(x.int(), True, "dual"), TypeError, ("x", "float16", "int32")),
        (lambda: OPS.input_gram(x, True, "both"), ValueError, ("form", "both", "'dual'", "'primal'")),
        (lambda: OPS.gram_inverse(x, True, "dual", 0.0, "relative", "raw"), ValueError, ("damping", "0")),
        (lambda: OPS.emended_input(x, True, "dual", 1.0, "none", "raw"), ValueError, ("damping_mode", "none")),
        (lambda: OPS.emended_input(x, True, "dual", 1.0, "relative", "none"), ValueError, ("scale", "none", "'raw'")),
        (lambda: OPS.damped_inverse(x, 1.0, "relative", "raw", 3, 3), ValueError, ("gram", "[..., n, n]", "[4, 3]")),
        (lambda: OPS.damped_inverse(gram.to(BF16), 1.0, "relative", "raw", 3, 3), TypeError, ("gram", "bfloat16")),
        (lambda: OPS.damped_inverse(gram, 1.0, "relative", "raw", 0, 3), ValueError, ("rank", "0")),
        (lambda: OPS.weight_grad(x, x[:2], x[:, 0]), ValueError, ("dy", "rows", "[4, 3]", "[2, 3]")),
        (lambda: OPS.weight_grad(x, x, x[:2, 0]), ValueError, ("column", "[2]", "[4, 3]")),
        (lambda: OPS.fused_weight_grad(x, x[:2], True, 1.0, "relative", "raw"), ValueError, ("dy", "[2, 3]")),
        (lambda: OPS.fused_weight_grad(x, x.float(), True, 1.0, "relative", "raw"), TypeError, ("dy", "float32")),
    ):
        with pytest.raises(error) as caught:
            call()
        for word in words:
            assert word in str(caught.value), f"{word!r} is not in {caught.value}"
