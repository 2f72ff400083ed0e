"""Property tests: any shape, type, layout and option against the float64 oracle."""

from __future__ import annotations

import math
from typing import Any

import torch
from cases import (
    DTYPES,
    EXACT,
    F64,
    LIMIT,
    TOLERANCE,
    assert_close,
    assert_grads_close,
    assert_identical,
    oracle,
    randn,
    relative_ridge,
    solved,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import consequentialism as cw

AVAILABLE = [name for name, state in cw.backends().items() if state == "available" and name in ("cpu", "reference")]

sizes = st.one_of(st.integers(1, 12), st.sampled_from((31, 32, 33, 63, 64, 65, 127, 128, 129)))
# Well conditioned, so that one table of tolerances serves every draw; bad conditions have tests of their own.
dampings = st.sampled_from((0.5, 1.0, 3.0, 1e3))
options = st.fixed_dictionaries(
    {
        "damping": dampings,
        "scale": st.sampled_from(("nlms", "raw", "gradient")),
        "damping_mode": st.just("relative"),
        "backend": st.sampled_from(("auto", *AVAILABLE)),
    }
)
LAYOUTS = ("contiguous", "transposed", "sliced", "strided", "expanded", "permuted")


def laid_out(values: Tensor, layout: str) -> Tensor:
    """The same numbers in another layout (``expanded``: its first row, repeated)."""
    if layout == "transposed":
        return values.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "sliced":
        wide = torch.full((*values.shape[:-1], values.shape[-1] + 5), math.nan, dtype=values.dtype)
        wide[..., 2 : 2 + values.shape[-1]] = values
        return wide[..., 2 : 2 + values.shape[-1]]
    if layout == "strided":
        wide = torch.full((*values.shape[:-1], 2 * values.shape[-1]), math.nan, dtype=values.dtype)
        wide[..., ::2] = values
        return wide[..., ::2]
    if layout == "expanded":
        return values[:1].expand(values.shape)
    if layout == "permuted" and values.ndim > 2:
        return values.transpose(0, 1).contiguous().transpose(0, 1)
    return values


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """``x [..., I]`` and ``dy [..., O]``, of 1 to 4 dimensions."""
    leading = draw(st.sampled_from(("none", "one", "two", "three")))
    rows = draw(sizes)
    shape = {"none": (), "one": (rows,), "two": (2, rows), "three": (3, 1, rows)}[leading]
    dtype = draw(st.sampled_from(DTYPES))
    seed = draw(st.integers(0, 1000))
    x = randn(*shape, draw(sizes), seed=seed, dtype=dtype)
    dy = randn(*shape, draw(sizes), seed=seed + 1, dtype=dtype)
    layout = draw(st.sampled_from(LAYOUTS))
    # An expanded x has rank 1: nearly all of the inverse is 1/c, which only a larger damping leaves well conditioned.
    layout = "contiguous" if layout == "expanded" and x.shape[:-1].numel() > 12 else layout
    return laid_out(x, layout), laid_out(dy, draw(st.sampled_from(LAYOUTS)))


def flat(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


@given(problem=problems(), bias=st.booleans(), option=options)
def test_gradient_is_the_oracles(problem: tuple[Tensor, Tensor], bias: bool, option: dict[str, Any]) -> None:
    x, dy = problem
    own = cw.emended_weight_grad(x, dy, bias=bias, **option)
    assert own[0].shape == (dy.shape[-1], x.shape[-1])
    assert own[0].dtype == x.dtype
    assert_grads_close(own, oracle(flat(x), flat(dy), bias, **option), TOLERANCE[x.dtype])


@given(problem=problems(), bias=st.booleans(), option=options, frozen=st.sampled_from(("", "weight", "bias", "x")))
def test_layer_is_the_function(problem: tuple[Tensor, Tensor], bias: bool, option: dict[str, Any], frozen: str) -> None:
    x, dy = problem
    weight = randn(dy.shape[-1], x.shape[-1], seed=2, dtype=x.dtype).requires_grad_(frozen != "weight")
    offset = randn(dy.shape[-1], seed=3, dtype=x.dtype).requires_grad_(frozen != "bias") if bias else None
    x = x.detach().requires_grad_(frozen != "x")
    out = cw.emended_linear(x, weight, offset, **option)
    assert_identical("y", out, torch.nn.functional.linear(x, weight, offset))
    if not out.requires_grad:
        return
    out.backward(dy)
    dw, db = oracle(flat(x.detach()), flat(dy), bias, **option)
    assert_close("dw", weight.grad, dw if frozen != "weight" else None, TOLERANCE[x.dtype])
    if offset is not None:
        assert_close("db", offset.grad, db if frozen != "bias" else None, TOLERANCE[x.dtype])
    if frozen != "x":
        assert_close("dx", x.grad, dy.double() @ weight.detach().double(), TOLERANCE[x.dtype])


@given(
    rows=sizes,
    inputs=sizes,
    outputs=sizes,
    bias=st.booleans(),
    damping=st.floats(1e-3, 1e6),
    damping_mode=st.sampled_from(("relative", "absolute")),
    form=st.sampled_from((None, "dual", "primal")),
    backend=st.sampled_from(AVAILABLE),
)
def test_float64_is_the_formula(
    rows: int,
    inputs: int,
    outputs: int,
    bias: bool,
    damping: float,
    damping_mode: str,
    form: str | None,
    backend: str,
) -> None:
    x, dy = randn(rows, inputs), randn(rows, outputs, seed=1)
    c = relative_ridge(x, bias, damping) if damping_mode == "relative" else damping
    expected = solved(x, dy, bias, c)
    named = {"damping": damping, "damping_mode": damping_mode, "scale": "raw"}
    assert_grads_close(cw.reference.emended_weight_grad(x, dy, bias, form=form, **named), expected, EXACT)
    assert_grads_close(cw.emended_weight_grad(x, dy, bias=bias, backend=backend, **named), expected, EXACT)


@given(problem=problems(), factor=st.integers(-6, 6), option=options)
def test_linear_in_dy(problem: tuple[Tensor, Tensor], factor: int, option: dict[str, Any]) -> None:
    x, dy = (tensor.double() for tensor in problem)
    other = randn(*dy.shape, seed=5)
    own = cw.emended_weight_grad(x, dy, bias=False, **option)[0]
    sum_of_both = cw.emended_weight_grad(x, factor * dy + other, bias=False, **option)[0]
    expected = factor * own + cw.emended_weight_grad(x, other, bias=False, **option)[0]
    assert_close("dw", sum_of_both, expected, EXACT)


@given(problem=problems(), exponent=st.integers(-20, 20), option=options)
def test_unit_of_the_input(problem: tuple[Tensor, Tensor], exponent: int, option: dict[str, Any]) -> None:
    # With relative damping and scale="nlms" or "raw", x in another unit divides dw by it.
    x, dy = (tensor.double() for tensor in problem)
    unit = 2.0**exponent
    own = cw.emended_weight_grad(x, dy, bias=False, **option)[0]
    other = cw.emended_weight_grad(unit * x, dy, bias=False, **option)[0]
    assert_close("dw", other, own * unit if option["scale"] == "gradient" else own / unit, EXACT)


@given(problem=problems(), option=options)
def test_consequence_is_never_more_than_intended(problem: tuple[Tensor, Tensor], option: dict[str, Any]) -> None:
    # The change is G (G + c I)^-1 dy: every direction of dy is shrunk, none overshoots.
    x, dy = (flat(tensor.double()) for tensor in problem)
    raw = {**option, "scale": "raw"}
    dw, db = cw.emended_weight_grad(x, dy, **raw)
    change = cw.predict_change(x, dw, db)
    assert change.norm() <= dy.norm() * (1 + LIMIT)
    assert (change * dy).sum() >= 0
    assert change.dtype == F64
