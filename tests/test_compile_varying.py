"""torch.compile of what varies between steps: one graph for every damping, size and number of rows."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from cases import BF16, F32, F64, TOLERANCE, TRANSFORM, assert_close, randn
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import consequentialism as cw


@pytest.fixture(autouse=True)
def _fresh(fresh_compiler: Iterator[None]) -> None:
    """A compiler without graphs for every test."""


BOUND = {BF16: TOLERANCE[BF16], **TRANSFORM}
Make = Callable[[int], Tensor]


LAYERS: dict[str, tuple[Callable[..., nn.Module], Make]] = {
    "Linear": (lambda **options: cw.Linear(6, 3, **options), lambda n: randn(n, 6)),
    "Conv1d": (lambda **options: cw.Conv1d(4, 2, 3, padding="same", **options), lambda n: randn(n, 4, 5)),
    "Conv2d": (lambda **options: cw.Conv2d(2, 4, 2, groups=2, **options), lambda n: randn(n, 2, 4, 3)),
    "Conv3d": (lambda **options: cw.Conv3d(1, 2, 2, bias=False, **options), lambda n: randn(n, 1, 3, 3, 2)),
    "Embedding": (lambda **options: cw.Embedding(9, 3, **options), lambda n: torch.arange(2 * n) % 7),
    "ConvTranspose2d": (lambda **o: cw.ConvTranspose2d(4, 2, 3, 2, 1, 1, 2, **o), lambda n: randn(n, 4, 3, 3)),
}


def parameter_grads(model: nn.Module, run: Any, x: Tensor) -> dict[str, Tensor]:
    """All parameters' gradients of one step, dense."""
    model.zero_grad()
    run(x).square().sum().backward()
    return {name: p.grad.to_dense().clone() for name, p in model.named_parameters() if p.grad is not None}


def steps_like_eager(model: nn.Module, inputs: Iterable[Tensor], change: Callable[[int], None], **how: Any) -> int:
    """Take steps in a full graph, each compared with eager mode; how many graphs that took."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter, **how)
    for step, x in enumerate(inputs):
        change(step)
        expected = parameter_grads(model, model, x)
        own = parameter_grads(model, compiled, x)
        assert own.keys() == expected.keys()
        for name, tensor in own.items():
            assert tensor.dtype == expected[name].dtype
            assert_close(f"{name}, step {step}", tensor, expected[name], BOUND[tensor.dtype])
    return counter.frame_count


# One function traces convolutions of one, two and three dimensions: one stands for all where no dimension matters.
DISTINCT = ("Linear", "Conv2d", "Embedding", "ConvTranspose2d")


@pytest.mark.parametrize(("damping_mode", "dynamic"), [("relative", None), ("absolute", True)], ids=str)
@pytest.mark.parametrize("layer", DISTINCT)
def test_a_damping_schedule(layer: str, damping_mode: str, dynamic: bool | None) -> None:
    make, input_of = LAYERS[layer]
    model = make(damping_mode=damping_mode, dtype=F64)

    def change(step: int) -> None:
        model.damping = (1.0, 0.3, 1e-3, 2.0, 5e4, 1e-6)[step]

    # Unless all is dynamic, the first graph takes a constant.
    assert steps_like_eager(model, [input_of(4)] * 6, change, dynamic=dynamic) == (1 if dynamic else 2)


def test_options_that_change_in_a_function() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(cw.emended_weight_grad, fullgraph=True, backend=counter)
    x, dy = randn(5, 4), randn(5, 3, seed=1)
    for step in range(5):
        options: dict[str, Any] = {"damping": 0.1 * (1 + step), "solver": "cg"}
        for own, expected in zip(compiled(x, dy, **options), cw.emended_weight_grad(x, dy, **options), strict=True):
            assert_close("gradient", own, expected, TRANSFORM[F64])
    assert counter.frame_count == 2


VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"dtype": BF16},
    {"damping": 1e-4},
    {"damping_mode": "absolute"},
    {"backend": "reference"},
    {"solver": "cg"},
    {"scale": "gradient"},
)


@pytest.mark.parametrize(
    ("layer", "options"),
    [*itertools.product(["Linear", "Conv2d"], VARIANTS), ("Conv1d", {}), ("Conv3d", {})],
    ids=str,
)
def test_sizes_that_vary(layer: str, options: dict[str, Any]) -> None:
    make, input_of = LAYERS[layer]
    # Fewer rows than inputs, and more: the plan differs. Of the spatial dimensions the first varies too.
    inputs = []
    for n, size in ((2, 4), (3, 5), (4, 6), (30, 7), (7, 4), (40, 9)):
        x = input_of(n).to(options.get("dtype", F32))
        inputs.append(x if x.ndim < 3 else x[:, :, :1].expand(-1, -1, size, *x.shape[3:]) + randn(size).to(x.dtype)[0])
    graphs = steps_like_eager(make(**options), inputs, lambda _: None)
    assert graphs <= 2 + (layer != "Linear")  # torch's own convolution takes another graph above 15 samples


def test_varied_rows_through_many_widths() -> None:
    widths = (3, 5, 8, 13, 21, 34)
    model = nn.Sequential(*(cw.Linear(i, o, dtype=F64) for i, o in itertools.pairwise(widths)))
    inputs = [randn(rows, widths[0]) for rows in (2, 4, 6, 10, 16, 27, 50, 1, 0)]
    assert steps_like_eager(model, inputs, lambda _: None) <= 4  # with one more for 1 row, and for none


def test_autocast_of_a_convolution_of_many_sizes() -> None:
    model = cw.Conv2d(2, 3, 2)

    class Autocast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=BF16):
                return self.inner(x).float()

    inputs = [randn(n, 2, size, size, dtype=F32) for n, size in ((2, 4), (3, 5), (4, 6), (5, 4), (6, 8))]
    assert steps_like_eager(Autocast(), inputs, lambda _: None) == 2


@pytest.mark.parametrize("layer", DISTINCT)
@pytest.mark.parametrize("frozen", ["weight", "bias", "x"])
def test_one_is_frozen(layer: str, frozen: str) -> None:
    make, input_of = LAYERS[layer]
    model, x = make(dtype=F64), input_of(4)
    if getattr(model, frozen, None) is not None:
        getattr(model, frozen).requires_grad_(False)
    elif frozen == "x" and x.is_floating_point():
        x.requires_grad_()
    if not any(parameter.requires_grad for parameter in model.parameters()):
        return
    assert steps_like_eager(model, [x], lambda _: None) == 1
    if x.requires_grad:
        (expected,) = torch.autograd.grad(model(x).square().sum(), x)
        own = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
        assert_close("dx", torch.autograd.grad(own.square().sum(), x)[0], expected, TRANSFORM[F64])


@pytest.mark.parametrize("layer", LAYERS)
def test_no_warning(layer: str) -> None:
    make, input_of = LAYERS[layer]
    model, x = make(dtype=F64), input_of(4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*Function.*should not be instantiated")  # Dynamo's own
        steps_like_eager(model, [x], lambda _: None)


def test_an_output_changed_in_place() -> None:
    for make, input_of in LAYERS.values():
        layer = make(dtype=F64)
        x = input_of(4)
        x = x.expand(2, *x.shape) if isinstance(layer, cw.Linear) else x
        assert steps_like_eager(nn.Sequential(layer, nn.ReLU(inplace=True)), [x], lambda _: None) == 1


def test_an_unbatched_image() -> None:
    assert steps_like_eager(cw.Conv2d(2, 3, 2, dtype=F64), [randn(2, 4, 4)], lambda _: None) == 1


def test_fused_sgd_is_refused_in_a_full_graph() -> None:
    model = cw.Linear(6, 3)
    cw.optim.FusedSGD(model, 0.1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match=r"FusedSGD does not support torch.compile in a full graph"):
        compiled(randn(4, 6, dtype=F32))


def test_errors_of_a_forward_are_errors_of_a_traced_forward() -> None:
    for layer, x, words in (
        (cw.Linear(6, 3), randn(4, 5, dtype=F32), "must have the same I"),
        (cw.Linear(6, 3, backend="cuda"), randn(4, 6, dtype=F32), "cuda"),
        (cw.Conv2d(2, 3, 2, backend="cuda"), randn(1, 2, 4, 4, dtype=F32), "cuda"),
        (cw.Conv2d(2, 3, 2), randn(1, 3, 4, 4, dtype=F32), "channels"),
        (cw.Conv2d(2, 3, 2), randn(1, 2, 1, 4, dtype=F32), "ernel size"),
    ):
        if getattr(layer, "backend", None) == "cuda" and torch.cuda.is_available():
            continue
        torch._dynamo.reset()
        with pytest.raises(Exception, match=words):
            torch.compile(layer, fullgraph=True, backend="aot_eager")(x)


def test_the_ops_have_no_derivative() -> None:
    x, dy = randn(4, 5).requires_grad_(), randn(4, 3)
    op = torch.ops.consequentialism.emended_weight_grad
    dw, _ = op(x, dy, True, True, True, 1.0, "relative", "nlms", "auto", "auto", 16, None)
    with pytest.raises(RuntimeError, match=r"once_differentiable.*consequentialism.revert"):
        dw.sum().backward()


SETTINGS = (0.5, "relative", "nlms", "auto", "auto", 16)
ONE = torch.ones((), dtype=F64)


@pytest.mark.parametrize(
    ("rows", "need", "varying"),
    [
        (0, (True, True), None),
        (3, (True, True), None),
        (3, (False, True), None),
        (9, (True, False), None),
        (3, (True, True), 0.3 * ONE),
        (9, (True, True), 0.3 * ONE),
    ],
    ids=str,
)
def test_opcheck_linear(rows: int, need: tuple[bool, bool], varying: Tensor | None) -> None:
    arguments = (randn(rows, 5), randn(rows, 3), True, *need, *SETTINGS, varying)
    torch.library.opcheck(torch.ops.consequentialism.emended_weight_grad.default, arguments)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("batch", [0, 1, 5])
def test_opcheck_convolution(batch: int, bias: bool) -> None:
    geometry = ((2, 2), (1, 1), (0, 0), (1, 1), 2, False, (0, 0), bias, 2**20)
    arguments = (randn(batch, 4, 3, 3), randn(batch, 6, 2, 2), *geometry, *SETTINGS, None)
    torch.library.opcheck(torch.ops.consequentialism.emended_conv_weight_grad.default, arguments)
