"""What torch's own layers take and no emended one: no error where nothing is emended, and named by convert."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from cases import assert_identical
from torch import Tensor, nn

import consequentialism as cw
from consequentialism.nn.module import EmendedModule


def nested(*shape: int) -> Tensor:
    return torch.nested.nested_tensor([torch.randn(3, *shape), torch.randn(2, *shape)], layout=torch.jagged)


CALLS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "complex Linear": (lambda: cw.Linear(4, 3).to(torch.complex64), lambda: torch.randn(5, 4, dtype=torch.complex64)),
    "complex Conv2d": (
        lambda: cw.Conv2d(2, 3, 2).to(torch.complex64),
        lambda: torch.randn(1, 2, 4, 4, dtype=torch.complex64),
    ),
    "complex Embedding": (lambda: cw.Embedding(7, 3).to(torch.complex64), lambda: torch.tensor([1, 2])),
    "nested Linear": (lambda: cw.Linear(4, 3), lambda: nested(4)),
    "nested Embedding": (
        lambda: cw.Embedding(7, 3),
        lambda: torch.nested.nested_tensor([torch.tensor([1, 2]), torch.tensor([3])], layout=torch.jagged),
    ),
}


@pytest.mark.parametrize("how", ["no_grad", "frozen"])
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.filterwarnings("ignore:.*Complex modules:UserWarning")
def test_a_forward_that_emends_nothing_is_torchs_own(name: str, how: str) -> None:
    make, inputs = CALLS[name]
    layer, x = make(), inputs()
    layer.requires_grad_(how != "frozen")
    with torch.set_grad_enabled(how != "no_grad"):
        y = layer(x)
    cw.revert(layer)
    with torch.no_grad():
        expected = layer(x)
    if y.is_nested:
        y, expected = y.values(), expected.values()
    if y.is_complex():
        y, expected = torch.view_as_real(y.detach()), torch.view_as_real(expected)
    assert_identical("y", y.detach(), expected)


@pytest.mark.parametrize("name", ["nested Linear", "nested Embedding"])
def test_a_nested_input_with_gradients_is_refused_with_a_remedy(name: str) -> None:
    make, inputs = CALLS[name]
    with pytest.raises(TypeError, match=r"input must be a dense tensor.*input\.values\(\)"):
        make()(inputs())


def sparse_linear() -> nn.Module:
    layer = nn.Linear(4, 3)
    layer.weight = nn.Parameter(layer.weight.detach().to_sparse_coo())
    return layer


def eighth(layer: nn.Module) -> nn.Module:
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    return layer


def integers() -> nn.Module:
    layer = nn.Linear(4, 3)
    layer.weight = nn.Parameter(torch.ones(3, 4, dtype=torch.int8), requires_grad=False)
    return layer


class Quantised(Tensor):
    """A weight that packs its numbers, as those of quantisation libraries do."""


def packed() -> nn.Module:
    layer = nn.Linear(4, 3)
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Quantised))  # type: ignore[arg-type]
    return layer


UNSERVED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "complex Linear": (lambda: nn.Linear(4, 3, dtype=torch.complex64), "complex64"),
    "complex Conv1d": (lambda: nn.Conv1d(4, 3, 1, dtype=torch.complex64), "complex64"),
    "complex Embedding": (lambda: nn.Embedding(4, 3, dtype=torch.complex64), "complex64"),
    "float8": (lambda: eighth(nn.Linear(4, 3)), "float8_e4m3fn"),
    "float8 Embedding": (lambda: eighth(nn.Embedding(4, 3)), "float8_e4m3fn"),
    "int8": (integers, "int8"),
    "sparse": (sparse_linear, "sparse"),
    "subclass": (packed, "Quantised"),
}


@pytest.mark.parametrize("name", UNSERVED)
@pytest.mark.filterwarnings("ignore:.*Complex modules:UserWarning")
def test_convert_leaves_alone_what_it_cannot_serve(name: str) -> None:
    make, word = UNSERVED[name]
    odd = make()
    kind = type(odd)
    model = nn.ModuleDict({"odd": odd, "fine": nn.Linear(4, 3)})
    with pytest.warns(UserWarning, match=f"odd: its weight is .*{word}"):
        cw.convert(model)
    assert type(odd) is kind
    assert isinstance(model["fine"], EmendedModule)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_what_it_can_serve_is_taken_without_a_word(dtype: torch.dtype) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert isinstance(cw.convert(nn.Linear(4, 3, dtype=dtype)), cw.Linear)
