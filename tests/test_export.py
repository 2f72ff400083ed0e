"""Exported and traced models: torch's own layers in the graph, and one warning where it could be trained."""

from __future__ import annotations

import copy
import io
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import assert_identical, randn
from torch import Tensor, nn

import consequentialism as cw
from consequentialism.functional.conv import emended_conv_transpose
from consequentialism.nn.module import EmendedModule


class OwnWeights(nn.Module):
    """The functional forms."""

    def __init__(self, dimensions: int, form: Callable[..., Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(randn(3, 4, *([2] * dimensions)))
        self.form = form

    def forward(self, x: Tensor) -> Tensor:
        return self.form(x, self.weight)


MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "Linear": (lambda: nn.Sequential(cw.Linear(4, 3), nn.Tanh(), cw.Linear(3, 2, bias=False)), randn(5, 4)),
    "Linear, rank 3": (lambda: nn.Sequential(cw.Linear(4, 3)), randn(2, 5, 4)),
    "Linear, reference": (lambda: nn.Sequential(cw.Linear(4, 3, backend="reference")), randn(5, 4)),
    "Embedding": (lambda: nn.Sequential(cw.Embedding(7, 3)), torch.tensor([[1, 2], [6, 2]])),
    "Conv1d": (lambda: nn.Sequential(cw.Conv1d(4, 6, 3, padding=1, padding_mode="circular")), randn(2, 4, 9)),
    "Conv2d": (lambda: nn.Sequential(cw.Conv2d(4, 6, 3, groups=2)), randn(2, 4, 5, 5)),
    "Conv3d": (lambda: nn.Sequential(cw.Conv3d(4, 6, 2)), randn(2, 4, 3, 3, 3)),
    "emended_linear": (lambda: OwnWeights(0, cw.emended_linear), randn(5, 4)),
    "emended_conv": (lambda: OwnWeights(2, cw.emended_conv), randn(2, 4, 5, 5)),
    "emended_conv_transpose": (lambda: OwnWeights(2, emended_conv_transpose), randn(2, 3, 5, 5)),
}
WARNING = "training it uses the plain gradient"


def made(name: str) -> tuple[nn.Module, Tensor]:
    model, x = MODELS[name]
    return model().double(), x


def export(model: nn.Module, x: Tensor, strict: bool) -> Any:
    return torch.export.export(model, (x,), strict=strict)


def targets(graph: torch.fx.Graph) -> set[str]:
    return {str(node.target) for node in graph.nodes if node.op == "call_function"}


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
@pytest.mark.parametrize("name", MODELS)
def test_an_exported_graph_is_aten_and_warns_once(name: str, strict: bool) -> None:
    model, x = made(name)
    with pytest.warns(UserWarning, match=WARNING) as caught:
        program = export(model, x, strict)
    assert sum(WARNING in str(one.message) for one in caught) == 1
    assert all(target.startswith("aten.") for target in targets(program.graph)), targets(program.graph)
    assert_identical("y", program.module()(x), model(x))


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
@pytest.mark.parametrize("inference", ["no_grad", "frozen"])
def test_an_export_for_inference_is_silent(inference: str, strict: bool) -> None:
    model, x = made("Linear")
    model.requires_grad_(inference != "frozen")
    with warnings.catch_warnings(), torch.set_grad_enabled(inference != "no_grad"):
        warnings.filterwarnings("error", message=".*consequentialism")
        export(model, x, strict)


class WeightGradients(nn.Module):
    """The functions that return emended gradients, as ops in the graph."""

    def forward(self, x: Tensor, dy: Tensor) -> tuple[Any, ...]:
        convolved = cw.emended_conv_weight_grad(x.unsqueeze(2), dy.unsqueeze(2), 1)
        return cw.emended_weight_grad(x, dy), convolved


def test_an_exported_program_of_gradients_loads_in_a_new_process(tmp_path: Path) -> None:
    x, dy = randn(6, 4), randn(6, 3)
    program = torch.export.export(WeightGradients(), (x, dy))
    graphs = [module.graph for module in program.graph_module.modules() if isinstance(module, torch.fx.GraphModule)]
    ops = {"consequentialism.emended_weight_grad.default", "consequentialism.emended_conv_weight_grad.default"}
    assert set.union(*map(targets, graphs)) >= ops
    torch.export.save(program, tmp_path / "program.pt2")
    torch.save((x, dy), tmp_path / "arguments.pt")
    code = """
import sys, torch, consequentialism
program = torch.export.load("program.pt2")
x, dy = torch.load("arguments.pt")
assert "consequentialism.autograd.traced" not in sys.modules
torch.save(program.module()(x, dy), "gradients.pt")
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(cw.__file__).parent.parent)}
    command = [sys.executable, "-c", code]
    finished = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr
    found = torch.load(tmp_path / "gradients.pt")
    for own, other in zip(found, WeightGradients()(x, dy), strict=True):
        for name, one, expected in zip(("dw", "db"), own, other, strict=True):
            assert_identical(name, one, expected)


def test_a_second_export_warns_again_and_the_model_is_emended_still() -> None:
    model, x = made("Linear")
    model(x).square().sum().backward()
    expected = model[0].weight.grad.clone()
    for _ in range(2):
        with pytest.warns(UserWarning, match=WARNING):
            export(model, x, False)
    model.zero_grad()
    model(x).square().sum().backward()
    assert_identical("dw", model[0].weight.grad, expected)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_trace_is_aten_and_loads_without_the_package(name: str) -> None:
    model, x = made(name)
    with pytest.warns(UserWarning, match=WARNING) as caught:
        traced = torch.jit.trace(model, x)
    assert sum(WARNING in str(one.message) for one in caught) == 1
    assert "consequentialism::" not in str(traced.inlined_graph)
    assert "PythonOp" not in str(traced.inlined_graph)
    torch.jit.save(traced, io.BytesIO())
    assert_identical("y", traced(x), model(x))


@pytest.mark.parametrize("name", MODELS)
def test_symbolic_trace_keeps_the_emended_gradient(name: str) -> None:
    model, x = made(name)
    traced = torch.fx.symbolic_trace(model)
    assert sum(isinstance(m, EmendedModule) for m in traced.modules()) == sum(
        isinstance(m, EmendedModule) for m in model.modules()
    )
    gradients = []
    for one in (model, traced):
        model.zero_grad()
        one(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for plain, own in zip(*gradients, strict=True):
        assert_identical("dw", own, plain)


@pytest.mark.parametrize("name", [name for name, (make, _) in MODELS.items() if isinstance(make(), nn.Sequential)])
def test_symbolic_trace_of_one_layer_keeps_the_emended_gradient(name: str) -> None:
    model, x = made(name)
    layer = model[0]
    traced = torch.fx.symbolic_trace(layer.eval())
    assert not traced.training
    gradients = []
    for one in (layer, traced):
        layer.zero_grad()
        one(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in layer.parameters()])
    for plain, own in zip(*gradients, strict=True):
        assert_identical("dw", own, plain)


class Doubled(cw.Linear):
    """A subclass with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


@pytest.mark.parametrize("model", [Doubled(4, 3), nn.Sequential(Doubled(4, 3))], ids=["root", "part"])
def test_symbolic_trace_refuses_a_forward_that_would_run_twice(model: nn.Module) -> None:
    with pytest.raises(TypeError, match="the forward of Doubled, a subclass of an emended layer"):
        torch.fx.symbolic_trace(model)


def test_symbolic_trace_of_a_registered_layer() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel = nn.Parameter(randn(3, 4))

        def forward(self, input: Tensor) -> Tensor:
            return nn.functional.linear(input, self.kernel)

    cw.register(Own, like=nn.Linear, weight="kernel")
    layer, x = cw.convert(Own()), randn(5, 4)
    traced = torch.fx.symbolic_trace(layer)
    layer(x).square().sum().backward()
    expected, layer.kernel.grad = layer.kernel.grad, None
    traced(x).square().sum().backward()
    assert_identical("dw", layer.kernel.grad, expected)


def test_rewriters_are_told_the_remedy() -> None:
    model, _ = made("Linear")
    with pytest.raises(TypeError, match=r"consequentialism\.revert\(model\)"):
        torch.jit.script(model)


def under_emended() -> tuple[nn.Module, cw.optim.Emended, Tensor]:
    """In training mode, the next forward recorded."""
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2))
    optimizer = cw.optim.Emended(torch.optim.AdamW(model.parameters()), model)
    assert optimizer.is_recording
    return model, optimizer, torch.randn(4, 2, 3, 3)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("error::torch.jit.TracerWarning")
def test_no_gram_is_in_a_graph_of_a_model_under_emended() -> None:
    model, _optimizer, x = under_emended()
    program = torch.export.export(model, (x,))
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert called == ["aten.conv2d.default", "aten.relu.default", "aten.flatten.using_ints", "aten.linear.default"]
    traced = torch.jit.trace(model, x)
    kinds = {node.kind() for node in traced.inlined_graph.nodes()}
    assert {kind for kind in kinds if kind.startswith("aten::")} == {
        "aten::_convolution",
        "aten::relu",
        "aten::flatten",
        "aten::linear",
    }


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripting_a_model_under_emended_names_the_way() -> None:
    model, optimizer, x = under_emended()
    with pytest.raises(AttributeError, match=r"script consequentialism\.revert\(copy\.deepcopy\(model\)\), or delete"):
        torch.jit.script(model)
    copied = cw.revert(copy.deepcopy(model))
    assert_identical("output", torch.jit.script(copied)(x), model(x))
    assert not any(module._forward_hooks or module._forward_hooks_with_kwargs for module in copied.modules())
    cw.revert(model)
    model(x).sum().backward()
    optimizer.step()
    assert float(optimizer.state[model[3].weight]["gram_rows"]) > 0, "it is still seen"
    del optimizer
    torch.jit.script(model)


def test_a_pickled_model_under_emended_asks_for_no_package() -> None:
    model, _optimizer, x = under_emended()
    saved = io.BytesIO()
    torch.save(model, saved)
    assert b"consequentialism" not in saved.getvalue()
    saved.seek(0)
    loaded = torch.load(saved, weights_only=False)
    assert_identical("output", loaded(x), model(x))
    for twin in (loaded, copy.deepcopy(model)):
        assert_identical("output", torch.compile(twin, fullgraph=True, backend="eager")(x), model(x))
