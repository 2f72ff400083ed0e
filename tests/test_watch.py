"""The warning about layers that did not make their own gradient."""

from __future__ import annotations

import copy
import pickle
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import F32, randn
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import consequentialism as cw

BYPASSED = "got a gradient although the layers' own forward was not run"


class Attention(nn.Module):
    """What timm's BEiT does: the weight of a layer that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(6, 6, bias=False)
        self.out = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(F.linear(x, self.qkv.weight)))


class Own(nn.Module):
    """The same network, which calls its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(6, 6)
        self.out = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.qkv(x)))


def step(model: nn.Module, call: Callable[[Tensor], Tensor] | None = None) -> None:
    x = randn(4, 6, dtype=F32)
    (model if call is None else call)(x).square().sum().backward()


def warned(run: Callable[[], Any], match: str = BYPASSED) -> list[str]:
    """The texts of the package's warnings about gradients."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(warning.message) for warning in caught if match in str(warning.message)]


def hooks(model: nn.Module) -> int:
    return sum(bool(p._post_accumulate_grad_hooks) for p in model.parameters())


def converted(*blocks: nn.Module) -> nn.Module:
    return cw.convert(nn.Sequential(*blocks))


def test_one_warning_names_all_that_did_not_run_and_only_those() -> None:
    model = converted(Attention(), Own(), Attention())
    found = warned(lambda: step(model))
    assert len(found) == 1
    for name in ("0.qkv", "2.qkv"):
        assert name in found[0]
    for name in ("1.qkv", "0.out"):
        assert name not in found[0]
    assert warned(lambda: step(model)) == []
    assert hooks(model) == 0


def test_a_model_whose_layers_run_has_no_warning_and_nothing_left() -> None:
    model = converted(Own(), Own())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(model)
    assert hooks(model) == 0
    assert all("watched" not in module.__dict__ for module in model.modules())


def test_a_layer_that_is_not_used_is_no_fault() -> None:
    model = converted(Own(), Own())
    for _ in range(2):
        assert warned(lambda: step(model, model[0])) == []
    assert warned(lambda: step(model)) == []  # and may be used later
    assert hooks(model) == 0


def test_accumulation_and_evaluation_before() -> None:
    model = converted(Attention(), Own())
    with torch.no_grad():
        model(randn(4, 6, dtype=F32))
    found = warned(lambda: [step(model) for _ in range(3)])
    assert len(found) == 1


ADDED = "came into the model after convert"


class Adapted(nn.Module):
    """What PEFT makes of a layer."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.ModuleDict({"default": nn.Linear(6, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, 6, bias=False)})

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


def test_layers_added_after_convert_are_named_once() -> None:
    model = converted(Own(), Own())
    model[0].qkv = Adapted(model[0].qkv)
    model[1].out = nn.Linear(6, 6)  # as resize_token_embeddings puts a plain layer in the place of an emended one
    found = warned(lambda: (step(model), step(model)), ADDED)
    assert len(found) == 1
    for name in ("0.qkv.lora_A.default", "0.qkv.lora_B.default", "1.out"):
        assert name in found[0]
    for name in ("base_layer", "0.out", "1.qkv"):
        assert name not in found[0]


def test_what_a_second_convert_takes_or_leaves_out_is_not_named() -> None:
    model = converted(Own())
    model.append(nn.Linear(6, 6))
    cw.convert(model, filter_fn=lambda module, name: name != "1")
    assert warned(lambda: step(model), ADDED) == []
    model = converted(Own())
    model.append(cw.convert(nn.Linear(6, 6)))
    model.append(nn.Linear(6, 6).requires_grad_(False))
    model.append(nn.PReLU())
    assert warned(lambda: step(model), ADDED) == []


def test_a_frozen_layer_is_looked_at_when_it_is_trained() -> None:
    model = converted(Attention(), Own())
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model[1].out.requires_grad_(True)
    assert warned(lambda: step(model)) == []
    model.requires_grad_(True)
    assert len(warned(lambda: (step(model), step(model)))) == 1


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant: bool) -> None:
    def run(model: nn.Module) -> Callable[[Tensor], Tensor]:
        def call(x: Tensor) -> Tensor:
            for block in model:
                x = checkpoint(block, x.requires_grad_() if x.is_leaf else x, use_reentrant=reentrant)
            return x

        return call

    model = converted(Own(), Own())
    assert warned(lambda: step(model, run(model))) == []
    assert hooks(model) == 0
    model = converted(Own(), Attention(), Own())
    found = warned(lambda: step(model, run(model)))
    assert len(found) == 1
    assert "1.qkv" in found[0]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_watched_on_their_own(copied: Callable[[nn.Module], nn.Module]) -> None:
    model = converted(Attention(), Own())
    other = copied(model)
    assert len(warned(lambda: step(other))) == 1
    assert len(warned(lambda: step(model))) == 1
    assert warned(lambda: step(copied(other))) == []  # what its model has told already
    assert warned(lambda: step(copied(converted(Own())))) == []


def test_functional_call_and_transforms() -> None:
    model = converted(Attention(), Own())
    x = randn(4, 6, dtype=F32)
    parameters = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    found = warned(lambda: torch.func.functional_call(model, parameters, (x,)).square().sum().backward())
    assert len(found) <= 1
    model = converted(Own())
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    loss = torch.func.grad(lambda p: torch.func.functional_call(model, p, (x,)).square().sum())
    assert warned(lambda: loss(parameters)) == []
    assert hooks(model) == 0


@pytest.mark.usefixtures("fresh_compiler")
def test_what_is_compiled_is_not_watched_and_raises_no_alarm() -> None:
    model = converted(Own(), Own(), Own())
    compiled = [torch.compile(model[0], backend="aot_eager"), torch.compile(model[1], backend="aot_eager"), model[2]]

    def call(x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()  # as the output of a block, or the code of the first would serve no other
        for block in compiled:
            x = block(x)
        return x

    with torch._dynamo.config.patch(error_on_recompile=True):  # and the code of one block serves the other
        assert warned(lambda: [step(model, call) for _ in range(2)]) == []
    model = converted(Own())
    whole = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert warned(lambda: [step(model, whole) for _ in range(2)]) == []


def test_fused_sgd_refuses_no_hook_of_ours() -> None:
    model = converted(Own(), Own())
    step(model, model[0])
    assert hooks(model) == 2
    model.zero_grad(set_to_none=True)
    optimizer = cw.optim.FusedSGD(model, lr=0.1)
    step(model)
    optimizer.step()


def test_a_replicas_run_is_the_layers() -> None:
    model = converted(Own())
    step(
        model, nn.parallel.replicate(model, [torch.device("cpu")])[0] if torch.cuda.is_available() else _replica(model)
    )
    assert hooks(model) == 0


def _replica(model: nn.Module) -> nn.Module:
    """What torch.nn.parallel.replicate makes; it wants GPUs."""
    replicas = {id(module): module._replicate_for_data_parallel() for module in model.modules()}
    for module in model.modules():
        replica = replicas[id(module)]
        replica._modules.update({name: replicas[id(child)] for name, child in module._modules.items()})
        for name, parameter in module._parameters.items():
            setattr(replica, name, None if parameter is None else parameter.clone())
    return replicas[id(model)]


def test_threads() -> None:
    model = converted(*(Own() for _ in range(4)))
    threads = [threading.Thread(target=step, args=(model, block)) for block in model for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    step(model)
    assert hooks(model) == 0
