"""Bad arguments: the error's type, and that it names the argument, the value and what is allowed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import BF16, F32, F64, HAS_KERNELS, TOLERANCE, assert_grads_close, assert_identical, oracle, randn
from torch import nn

import consequentialism as cw
from consequentialism.options import OPTION_NAMES, Options, OptionsDict

BAD_OPTIONS = [
    ({"damping": 0}, ValueError, ("damping", "0")),
    ({"damping": -1.0}, ValueError, ("damping", "-1.0", "above 0")),
    ({"damping": float("nan")}, ValueError, ("damping", "nan")),
    ({"damping": float("inf")}, ValueError, ("damping", "inf", "finite")),
    ({"damping": 10**400}, ValueError, ("damping", "finite")),
    ({"damping": "1"}, TypeError, ("damping", "'1'", "str", "number")),
    ({"damping": True}, TypeError, ("damping", "True", "bool")),
    ({"damping": None}, TypeError, ("damping", "None")),
    ({"damping": 1j}, TypeError, ("damping", "1j", "complex")),
    ({"damping_mode": "rel"}, ValueError, ("damping_mode", "'rel'", "'relative'", "'absolute'")),
    ({"damping_mode": 1}, TypeError, ("damping_mode", "1", "'relative'", "'absolute'")),
    ({"scale": "NLMS"}, ValueError, ("scale", "'NLMS'", "'nlms'", "'raw'", "'gradient'")),
    ({"scale": None}, TypeError, ("scale", "None", "'nlms'")),
    ({"backend": "gpu"}, ValueError, ("backend", "'gpu'", "'auto'", "'cpu'", "'cuda'", "'triton'", "'reference'")),
    ({"backend": torch}, TypeError, ("backend", "module")),
    ({"patch_bytes": 0}, ValueError, ("patch_bytes", "0", "above 0")),
    ({"patch_bytes": 1e6}, TypeError, ("patch_bytes", "1000000.0", "float", "whole number")),
    ({"solver": "lu"}, ValueError, ("solver", "'lu'", "'auto'", "'cholesky'", "'cg'")),
    ({"solver": None}, TypeError, ("solver", "None", "'cg'")),
    ({"iterations": 0}, ValueError, ("iterations", "0", "above 0")),
    ({"iterations": 2.0}, TypeError, ("iterations", "2.0", "float", "integer")),
    ({"iterations": True}, TypeError, ("iterations", "True", "bool")),
    ({"solver": "cg", "process_group": "a group"}, ValueError, ("solver", "'cg'", "'cholesky'", "process_group")),
    ({"dampening": 1.0}, TypeError, ("dampening",)),
]
TAKERS: dict[str, Callable[..., Any]] = {
    "Options": cw.Options,
    "Linear": lambda **options: cw.Linear(5, 3, **options),
    "Embedding": lambda **options: cw.Embedding(5, 3, **options),
    "Conv2d": lambda **options: cw.Conv2d(5, 3, 2, **options),
    "emended_conv_weight_grad": lambda **options: cw.emended_conv_weight_grad(
        randn(2, 5, 4), randn(2, 3, 3), 2, **options
    ),
    "convert": lambda **options: cw.convert(nn.Linear(5, 3), **options),
    "emended_linear": lambda **options: cw.emended_linear(randn(4, 5), randn(3, 5), **options),
    "emended_weight_grad": lambda **options: cw.emended_weight_grad(randn(4, 5), randn(4, 3), **options),
}


def assert_raises(error: type[Exception], words: tuple[str, ...], call: Callable[[], Any]) -> None:
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"


@pytest.mark.parametrize(("options", "error", "words"), BAD_OPTIONS, ids=lambda value: str(value))
@pytest.mark.parametrize("taker", TAKERS)
def test_bad_options(taker: str, options: dict, error: type[Exception], words: tuple[str, ...]) -> None:
    unused = {"Linear": ("patch_bytes",), "Embedding": ("patch_bytes", "solver", "iterations")}
    for name in unused.get(taker, ()):
        if name in options:
            error, words = TypeError, (name,)
    assert_raises(error, words, lambda: TAKERS[taker](**options))


@pytest.mark.parametrize("taker", ["convert", "emended_linear", "emended_weight_grad", "emended_conv_weight_grad"])
def test_a_misspelt_option_is_told_from_those_that_there_are(taker: str) -> None:
    words = ("'dampening'", "did you mean 'damping'", *OPTION_NAMES)
    assert_raises(TypeError, words, lambda: TAKERS[taker](dampening=1.0))


def test_the_typed_keywords_are_the_options() -> None:
    declared = Options.__annotations__
    assert {name: declared[name] for name in OPTION_NAMES} == {
        name: getattr(annotation, "__forward_arg__", annotation)
        for name, annotation in OptionsDict.__annotations__.items()
    }


@pytest.mark.parametrize("damping", [1, 0.5, 10**6])
def test_any_real_number_is_a_damping(damping: Any) -> None:
    numpy = pytest.importorskip("numpy")
    x, dy = randn(4, 5), randn(4, 3)
    expected = oracle(x, dy, damping=float(damping))
    for value in (damping, numpy.float32(damping), numpy.float64(damping)):
        assert_grads_close(cw.emended_weight_grad(x, dy, damping=value), expected, TOLERANCE[F64])


def test_numbers_of_numpy() -> None:
    numpy = pytest.importorskip("numpy")
    given = {"damping": numpy.float32(0.5), "patch_bytes": numpy.int64(4096), "iterations": numpy.int32(3)}
    options = cw.Options(**given)
    assert options == cw.Options(damping=0.5, patch_bytes=4096, iterations=3)
    assert [type(getattr(options, name)) for name in given] == [float, int, int]
    with pytest.raises(ValueError, match=r"damping must be finite.*inf"):
        cw.Options(damping=numpy.float32("inf"))
    with pytest.raises(TypeError, match="iterations must be an integer"):
        cw.Options(iterations=numpy.float32(3))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", ["Linear", "Embedding", "Conv1d"])
def test_a_damping_of_numpy_warns_at_no_forward(kind: str) -> None:
    numpy = pytest.importorskip("numpy")
    x = {"Linear": randn(4, 5, dtype=F32), "Embedding": torch.arange(4), "Conv1d": randn(2, 5, 4, dtype=F32)}[kind]
    found = []
    for damping in (numpy.float32(0.5), 0.5):
        torch.manual_seed(0)
        layer = getattr(cw, kind)(5, 3, *((2,) if kind == "Conv1d" else ()))
        layer.damping = damping  # as a schedule does
        layer(x).square().sum().backward()
        found.append(layer.weight.grad)
    assert_identical("dw", *found)


def test_a_geometry_of_numpy() -> None:
    numpy = pytest.importorskip("numpy")
    two, one, x = numpy.int64(2), numpy.int32(1), randn(2, 4, 7, 7)
    plain = nn.Conv2d(4, 4, 3, two, one, one, two, dtype=F64)
    expected = cw.Conv2d(4, 4, 3, 2, 1, 1, 2, dtype=F64)
    expected.load_state_dict(plain.state_dict())
    converted = cw.convert(plain)
    for layer in (converted, expected):
        layer(x).square().sum().backward()
    assert_identical("dw", converted.weight.grad, expected.weight.grad)
    dw, _ = cw.emended_conv_weight_grad(x, randn(2, 4, 4, 4), numpy.int64(3), stride=two, padding=one, groups=two)
    assert_identical("dw", dw, cw.emended_conv_weight_grad(x, randn(2, 4, 4, 4), 3, stride=2, padding=1, groups=2)[0])


@pytest.mark.parametrize("name", ["kernel_size", "stride", "padding", "dilation"])
@pytest.mark.parametrize("kind", ["Conv1d", "Conv2d", "Conv3d"])
def test_a_fractional_geometry_names_the_argument(kind: str, name: str) -> None:
    spatial = int(kind[4])
    for value in (3.0, (3.0,) * spatial, True):
        words = (name, repr(value), "whole number")
        assert_raises(TypeError, words, lambda v=value: getattr(cw, kind)(4, 4, **{"kernel_size": 1, name: v}))
    x, dy = randn(2, 4, *(5,) * spatial), randn(2, 4, *(5,) * spatial)
    call = {"kernel_size": 1, name: 3.0}
    assert_raises(TypeError, (name, "3.0", "whole number"), lambda: cw.emended_conv_weight_grad(x, dy, **call))


def test_a_learning_rate_of_numpy() -> None:
    numpy = pytest.importorskip("numpy")
    rate = numpy.float32(0.5)
    model = cw.convert(nn.Sequential(nn.Linear(5, 3), nn.LayerNorm(3)))
    (emended, _) = cw.param_groups(model, lr=rate, other={"lr": 0.1})
    fused = cw.optim.FusedSGD(model, lr=rate, other_lr=numpy.float64(0.25))
    muon = cw.optim.Muon(nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 4), nn.Linear(4, 3)), rate, aux={"lr": 0.1})
    rates = [emended["lr"], *(group["lr"] for group in fused.param_groups), muon.param_groups[0]["lr"]]
    assert rates == [0.5, 0.5, 0.25, 0.5]
    assert {type(lr) for lr in rates} == {float}
    with pytest.raises(ValueError, match="lr must be finite"):
        cw.optim.FusedSGD(cw.Linear(5, 3), lr=numpy.float32("inf"))


def test_an_embedding_refuses_what_it_does_not_use() -> None:
    for name, value in {"solver": "cg", "iterations": 3, "patch_bytes": 4096}.items():
        words = ("Embedding", name, "the options are damping, damping_mode, scale, process_group")
        assert_raises(TypeError, words, lambda n=name, v=value: cw.Embedding(5, 3, **{n: v}))
    assert_raises(TypeError, ("did you mean 'damping'",), lambda: cw.Embedding(5, 3, dampening=1.0))
    assert_raises(ValueError, ("backend", "'auto', 'reference'", "'cpu'"), lambda: cw.Embedding(5, 3, backend="cpu"))
    layer = cw.Embedding(5, 3, backend="reference")
    assert layer.backend == "reference"
    layer.backend = "auto"
    assert_raises(ValueError, ("backend", "'auto', 'reference'", "'cpu'"), lambda: setattr(layer, "backend", "cpu"))
    assert layer.backend == "auto"
    assert_raises(TypeError, ("Embedding", "'solver'"), lambda: setattr(layer, "solver", "cg"))


def test_convert_passes_on_what_each_layer_uses() -> None:
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2), nn.Conv1d(4, 2, 1))
    cw.convert(model, damping=0.5, backend="reference", solver="cg", iterations=3, patch_bytes=4096)
    shown = [[name for name in OPTION_NAMES if f"{name}=" in repr(layer)] for layer in model]
    assert shown == [
        ["damping"],
        ["damping", "backend", "solver", "iterations"],
        ["damping", "backend", "patch_bytes", "solver", "iterations"],
    ]
    model(torch.tensor([[0, 1, 2, 2]])).sum().backward()
    cw.revert(model)
    assert not any(hasattr(layer, name) for layer in model for name in OPTION_NAMES)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: cw.Linear(5, 3)(randn(4, 6, dtype=F32)), ValueError, ("[4, 6]", "[3, 5]", "x", "weight")),
        (lambda: cw.Linear(5, 3)(torch.tensor(1.0)), ValueError, ("x", "[]", "[3, 5]")),
        (lambda: cw.Linear(5, 3)(randn(4, 5, dtype=BF16)), TypeError, ("x", "weight", "bfloat16", "float32")),
        (lambda: cw.Linear(5, 3)(torch.ones(4, 5, dtype=torch.int64)), TypeError, ("x", "int64", "float32")),
        (lambda: cw.Linear(5, 3)([1.0, 2.0]), TypeError, ("x", "list", "Tensor")),
        (lambda: cw.Linear(5, 3)(randn(4, 5, dtype=F32).to_sparse()), TypeError, ("x", "sparse", "dense")),
        (lambda: cw.Linear(5, 3)(randn(4, 5, dtype=F32).to("meta")), ValueError, ("x", "weight", "meta", "cpu")),
        (lambda: cw.emended_linear(randn(4, 5), randn(5)), ValueError, ("weight", "[O, I]", "[5]")),
        (lambda: cw.emended_linear(randn(4, 5), None), TypeError, ("weight", "None")),
        (lambda: cw.emended_linear(randn(4, 5), randn(3, 5), randn(4)), ValueError, ("bias", "[4]", "[3, 5]")),
        (lambda: cw.emended_linear(randn(4, 5), randn(3, 5), randn(3, dtype=F32)), TypeError, ("bias", "float32")),
        (lambda: cw.emended_weight_grad(randn(4, 5), randn(3, 3)), ValueError, ("x", "dy", "[4, 5]", "[3, 3]")),
        (lambda: cw.emended_weight_grad(randn(2, 2, 5), randn(4, 3)), ValueError, ("[2, 2, 5]", "[4, 3]")),
        (lambda: cw.emended_weight_grad(randn(4, 5), randn(4, 3, dtype=F32)), TypeError, ("x", "dy", "float32")),
        (lambda: cw.emended_weight_grad(randn(4, 5), 1.0), TypeError, ("dy", "1.0", "float")),
        (lambda: cw.emended_weight_grad(randn(4, 5), randn(4, 3), bias=1), TypeError, ("bias", "1", "int")),
        (lambda: cw.emended_weight_grad(randn(4, 5), randn(4, 3), bias=randn(3)), TypeError, ("bias", "Tensor")),
        (lambda: cw.predict_change(randn(4, 5), randn(3, 6)), ValueError, ("x", "dw", "[4, 5]", "[3, 6]")),
        (lambda: cw.predict_change(randn(4, 5), randn(3, 5), randn(5)), ValueError, ("db", "dw", "[5]", "[3, 5]")),
        (lambda: cw.predict_change(randn(4, 5), "dw"), TypeError, ("dw", "str")),
    ],
)
def test_bad_tensors(call: Callable[[], Any], error: type[Exception], words: tuple[str, ...]) -> None:
    assert_raises(error, words, call)


@pytest.mark.parametrize("call", [lambda: cw.Linear(5, 3, True, 0.1), lambda: cw.emended_weight_grad(randn(4, 5))])
def test_keywords_are_keywords(call: Callable[[], Any]) -> None:
    with pytest.raises(TypeError):
        call()


def test_same_checks_without_a_gradient() -> None:
    with torch.no_grad():
        assert_raises(ValueError, ("[4, 6]", "[3, 5]"), lambda: cw.Linear(5, 3)(randn(4, 6, dtype=F32)))


def test_backends_say_why() -> None:
    states = cw.backends()
    assert list(states) == ["cpu", "cuda", "triton", "reference"]
    assert states["reference"] == "available"
    assert all(isinstance(state, str) and state for state in states.values())


@pytest.mark.parametrize("name", ["cpu", "cuda", "triton"])
def test_a_backend_that_is_not_there_raises_and_says_why(name: str) -> None:
    state = cw.backends()[name]
    if state == "available":
        pytest.skip(f"backend {name} is available here")
    layer = cw.Linear(5, 3, backend=name)
    assert_raises(RuntimeError, (repr(name), state, "'reference'"), lambda: layer(randn(4, 5, dtype=F32)))


@pytest.mark.skipif(not HAS_KERNELS, reason="no compiled kernels")
def test_auto_takes_the_compiled_kernels() -> None:
    x, dy = randn(33, 20, dtype=F32), randn(33, 4, seed=1, dtype=F32)
    own, named = cw.emended_weight_grad(x, dy), cw.emended_weight_grad(x, dy, backend="cpu")
    assert torch.equal(own[0], named[0])
