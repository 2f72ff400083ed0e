"""What only a device can show: nothing waits for it, a step can be captured, results do not depend on streams."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import (
    BF16,
    DTYPES,
    F16,
    F32,
    F64,
    SHAPES,
    SMALL_SHAPES,
    TOLERANCE,
    Shape,
    assert_close,
    assert_grads_close,
    assert_identical,
    oracle,
    randn,
)
from test_conv_gram import EMPTY, empty_gram
from torch import Tensor

import consequentialism as cw
from consequentialism.backend import compiled as ops

pytestmark = pytest.mark.skipif(cw.backends()["cuda"] != "available", reason=f"backend cuda: {cw.backends()['cuda']}")
BACKENDS = ("cuda", "reference")
# One block, a cluster, cuSOLVER; both forms; every side that the inverse is applied to.
LAYERS: tuple[Shape, ...] = ((64, 784, 100), (300, 784, 100), (1100, 1200, 40), (500, 64, 900), (40, 300, 7))


@pytest.fixture(autouse=True)
def _full_precision() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def layer_and_batch(shape: Shape, dtype: torch.dtype, backend: str) -> tuple[cw.Linear, Tensor, Tensor]:
    rows, inputs, outputs = shape
    torch.manual_seed(0)
    layer = cw.Linear(inputs, outputs, backend=backend, device="cuda", dtype=dtype)
    return (
        layer,
        randn(rows, inputs, dtype=dtype, device="cuda"),
        randn(rows, outputs, seed=1, dtype=dtype, device="cuda"),
    )


def step(layer: cw.Linear, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    layer.weight.grad = layer.bias.grad = None
    layer(x).backward(dy)
    return layer.weight.grad, layer.bias.grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES + LAYERS, ids=str)
def test_layer_against_float64(shape: Shape, dtype: torch.dtype) -> None:
    layer, x, dy = layer_and_batch(shape, dtype, "cuda")
    assert_grads_close(step(layer, x, dy), oracle(x, dy), TOLERANCE[dtype])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", LAYERS, ids=str)
def test_nothing_waits_for_the_device(shape: Shape, dtype: torch.dtype, backend: str) -> None:
    layer, x, dy = layer_and_batch(shape, dtype, backend)
    step(layer, x, dy)  # libraries set themselves up
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(layer, x, dy)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("shape", LAYERS, ids=str)
def test_whole_step_in_a_graph(shape: Shape, dtype: torch.dtype, backend: str) -> None:
    layer, x, dy = layer_and_batch(shape, dtype, backend)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    held_x, held_dy = x.clone(), dy.clone()
    start = {name: value.clone() for name, value in layer.state_dict().items()}

    def train() -> None:
        optimizer.zero_grad(set_to_none=True)
        layer(held_x).backward(held_dy)
        optimizer.step()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            train()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        train()
    layer.load_state_dict(start)
    batches = [(randn(*x.shape, seed=s, dtype=dtype), randn(*dy.shape, seed=s + 1, dtype=dtype)) for s in (5, 7)]
    for new_x, new_dy in batches:
        held_x.copy_(new_x)
        held_dy.copy_(new_dy)
        graph.replay()
    replayed = layer.weight.detach().clone()
    layer.load_state_dict(start)
    for new_x, new_dy in batches:
        held_x.copy_(new_x)
        held_dy.copy_(new_dy)
        train()
    assert_identical("weight after two replays", replayed, layer.weight.detach())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", LAYERS, ids=str)
def test_the_same_bits_fifty_times(shape: Shape, dtype: torch.dtype) -> None:
    layer, x, dy = layer_and_batch(shape, dtype, "cuda")
    first = [gradient.clone() for gradient in step(layer, x, dy)]
    for _ in range(50):
        again = step(layer, x, dy)
        assert_identical("dw", again[0], first[0])
        assert_identical("db", again[1], first[1])


@pytest.mark.parametrize("shape", LAYERS, ids=str)
def test_two_streams_at_once(shape: Shape) -> None:
    layers = [layer_and_batch(shape, F32, "cuda") for _ in range(2)]
    expected = [gradient.clone() for gradient in step(*layers[0])]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in layers]
    for _ in range(5):
        for stream, parts in zip(streams, layers, strict=True):
            with torch.cuda.stream(stream):
                step(*parts)
    torch.cuda.synchronize()
    for layer, _, _ in layers:
        assert_identical("dw", layer.weight.grad, expected[0])


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("shape", LAYERS, ids=str)
def test_the_current_stream_is_used_throughout(shape: Shape, dtype: torch.dtype) -> None:
    layer, x, dy = layer_and_batch(shape, dtype, "cuda")
    expected = [gradient.clone() for gradient in step(layer, x, dy)]
    late_x, late_dy = torch.full_like(x, math.nan), torch.full_like(dy, math.nan)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(100_000_000)  # some 50 ms: work on another stream would be done, on NaN, before the copies
        late_x.copy_(x)
        late_dy.copy_(dy)
        own = step(layer, late_x, late_dy)
    torch.cuda.synchronize()
    assert_identical("dw", own[0], expected[0])
    assert_identical("db", own[1], expected[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", LAYERS, ids=str)
def test_every_entry_is_written(shape: Shape, dtype: torch.dtype) -> None:
    layer, x, dy = layer_and_batch(shape, dtype, "cuda")
    torch.cuda.empty_cache()
    torch.full((1 << 28,), math.nan, device="cuda")  # what the allocator hands out next is full of NaN
    assert_grads_close(step(layer, x, dy), oracle(x, dy), TOLERANCE[dtype])


@pytest.mark.parametrize("options", [{"damping": 1e-4}, {"damping_mode": "absolute"}, {"scale": "gradient"}], ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_nothing_waits_whatever_the_options(dtype: torch.dtype, options: dict[str, Any]) -> None:
    # The first two are computed in float64.
    for shape in LAYERS:
        _, x, dy = layer_and_batch(shape, dtype, "cuda")
        own = cw.emended_weight_grad(x, dy, backend="cuda", **options)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            again = cw.emended_weight_grad(x, dy, backend="cuda", **options)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert_identical("dw", again[0], own[0])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("where", ["x", "dy"])
def test_not_finite_gives_nan(where: str, dtype: torch.dtype, value: float) -> None:
    for shape in LAYERS:
        layer, x, dy = layer_and_batch(shape, dtype, "cuda")
        (x if where == "x" else dy)[3, 5] = value
        dw, db = step(layer, x, dy)
        assert dw.isnan().all()
        assert db.isnan().all()


@pytest.mark.parametrize("n", [1, 31, 32, 33, 64, 200, 288, 289, 500, 1025, 1056, 1057])
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_damped_inverse_of_every_kernel(n: int, dtype: torch.dtype) -> None:
    x = randn(n, n + 3, dtype=dtype, device="cuda")
    gram = x @ x.T
    own = ops.damped_inverse(gram, 1.0, "relative", "raw", n, n)
    expected = cw.reference.damped_inverse(gram.double().cpu(), 1.0, "relative", "raw", n, n)
    assert_close("inverse", own, expected, TOLERANCE[dtype])
    if n <= 1024:  # the kernel's; cuSOLVER's is not
        assert_identical("inverse and its mirror", own, own.T.contiguous())


@pytest.mark.parametrize("precision", ["tf32", "ieee"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torchs_new_switch_for_tf32(dtype: torch.dtype, precision: str) -> None:
    # Once it was used, torch's readers of the old switch raise.
    torch.backends.cuda.matmul.fp32_precision = precision
    bound = 5e-3 if precision == "tf32" and dtype == F32 else TOLERANCE[dtype]
    try:
        x, dy = randn(100, 300, dtype=dtype, device="cuda"), randn(100, 40, seed=1, dtype=dtype, device="cuda")
        dw, _ = cw.emended_weight_grad(x, dy, bias=False, backend="cuda")
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False  # sets both
    assert_close("dw", dw, oracle(x, dy, False)[0], bound)


@pytest.mark.parametrize("allowed", [True, False])
@pytest.mark.parametrize("size", [1.0, 1e4])
def test_float16_sums_are_not_used_where_they_are_allowed(size: float, allowed: bool) -> None:
    before = torch.backends.cuda.matmul.allow_fp16_accumulation
    rows, dy = randn(300, 784, dtype=F32, device="cuda"), randn(300, 100, seed=1, dtype=F16, device="cuda")
    column = randn(300, seed=2, dtype=F32, device="cuda")
    torch.backends.cuda.matmul.allow_fp16_accumulation = allowed
    try:
        dw, db = ops.weight_grad(dy / size, rows * size, column)
    finally:
        torch.backends.cuda.matmul.allow_fp16_accumulation = before
    assert_close("dw", dw, (dy / size).double().T @ (rows * size).double(), TOLERANCE[F16])
    assert_close("db", db, (dy / size).double().T @ column.double(), TOLERANCE[F16])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", EMPTY)
def test_convolutions_gram_without_a_number(name: str, dtype: torch.dtype) -> None:
    size, *arguments = EMPTY[name]
    x = torch.zeros(size, dtype=dtype, device="cuda")
    for bias in (True, False):
        for out in (F64,) if dtype == F64 else (F32, F64):
            own = ops.conv_gram(x, *arguments, bias, 2**26, out)
            assert_identical("gram", own.cpu(), empty_gram(size, arguments, bias).to(out))


@pytest.mark.parametrize("leading", [(5,), (2, 3), (40,)], ids=str)
@pytest.mark.parametrize("n", [40, 400, 1100])
def test_a_batch_of_inverses_is_each_of_them(n: int, leading: tuple[int, ...]) -> None:
    rows = randn(*leading, 4, n, dtype=F32, device="cuda")
    grams = rows.mT @ rows
    own = ops.damped_inverse(grams, 1.0, "relative", "raw", n, n)
    for one, gram in zip(own.flatten(0, -3), grams.flatten(0, -3), strict=True):
        assert_identical("inverse", one, ops.damped_inverse(gram, 1.0, "relative", "raw", n, n))


@pytest.mark.parametrize("n", [40, 400, 1100])
def test_breakdowns_are_retried_and_counted(n: int) -> None:
    gram = torch.eye(n, device="cuda")
    gram[n - 2, n - 2] = -5
    before = ops.breakdowns()
    own = ops.damped_inverse(gram, 1.0, "absolute", "raw", n, n)
    assert_close("inverse", own, torch.linalg.inv(gram.double() + 10 * torch.eye(n, device="cuda")), 1e-5)
    assert ops.breakdowns() == before + 1


@pytest.mark.parametrize("shape", SMALL_SHAPES, ids=str)
def test_opcheck(shape: Shape) -> None:
    rows, inputs, outputs = shape
    call = torch.ops.consequentialism
    x, dy = randn(rows, inputs, dtype=F32, device="cuda"), randn(rows, outputs, seed=1, dtype=F32, device="cuda")
    for form in ("dual", "primal"):
        for bias in (True, False):
            torch.library.opcheck(call.input_gram.default, (x, bias, form))
            gram = call.input_gram(x, bias, form)
            torch.library.opcheck(call.damped_inverse.default, (gram, 1.0, "relative", "raw", rows, rows))
            torch.library.opcheck(call.gram_inverse.default, (x, bias, form, 1.0, "relative", "nlms"))
            torch.library.opcheck(call.emended_input.default, (x, bias, form, 1.0, "relative", "nlms"))
    torch.library.opcheck(call.weight_grad.default, (dy, x, torch.ones(rows, device="cuda")))
    torch.library.opcheck(call.weight_grad.default, (dy, x, torch.ones(0, device="cuda")))


def test_autocast() -> None:
    layer, x, dy = layer_and_batch((64, 100, 30), F32, "cuda")
    with torch.autocast("cuda", dtype=BF16):
        y = layer(x)
    assert y.dtype == BF16
    y.backward(dy.to(BF16))
    assert layer.weight.grad.dtype == F32
    assert_close("dw", layer.weight.grad, oracle(x.to(BF16), dy.to(BF16))[0], TOLERANCE[BF16])
