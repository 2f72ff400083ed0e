"""One batch through a model that is as before afterwards, bit for bit."""

from __future__ import annotations

import contextlib
import inspect
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.utils.data import DataLoader

from .. import _torch
from ..errors import shown

# A loss function whose first argument has one of these names gets the model and the batch.
TAKES_MODEL = ("model", "module", "net", "network", "m")


class NotFinite(ValueError):
    """A loss that is infinite or not a number."""


def loss_of(model: nn.Module, batch: Any, loss_fn: Callable[..., Any]) -> Tensor:
    """The loss of a batch, by the rule that `diagnose` documents.

    Raises:
        TypeError, ValueError: What ``loss_fn`` returned is no tensor with one finite number.
    """
    if takes_model(loss_fn):
        loss = loss_fn(model, batch)
    elif isinstance(batch, (tuple, list)) and len(batch) == 2:
        loss = loss_fn(_outputs(model, batch[0]), batch[1])
    elif isinstance(batch, Mapping):
        loss = loss_fn(model(**batch), batch)
    else:
        loss = loss_fn(_outputs(model, batch))
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss_fn must return a tensor, got {loss!r} ({type(loss).__name__})")
    if loss.numel() != 1 or not loss.is_floating_point():
        raise ValueError(f"loss_fn must return one floating-point number, got {list(loss.shape)} of {loss.dtype}")
    if not bool(loss.isfinite()):
        raise NotFinite(f"loss_fn must return a finite loss, got {loss.item()}")
    return loss.reshape(())


def _outputs(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)


def takes_model(loss_fn: Callable[..., Any]) -> bool:
    """Whether ``loss_fn``'s first argument is called as a model is."""
    try:
        first = next(iter(inspect.signature(loss_fn).parameters), "")
    except (TypeError, ValueError):  # some built-in functions have no signature
        return False
    return first in TAKES_MODEL


def check(model: Any, batch: Any, loss_fn: Any) -> nn.Module:
    """The model that is to be looked at, without DistributedDataParallel around it.

    Raises:
        TypeError, ValueError: What no batch can be run with; nothing has run then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {shown(model)}")
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be callable, got {loss_fn!r} ({type(loss_fn).__name__})")
    if isinstance(model, DistributedDataParallel):
        model = model.module
    parameters = dict(model.named_parameters())
    lazy = [name for name, p in parameters.items() if is_lazy(p)]
    if lazy:
        raise ValueError(f"model has parameters without a shape ({lazy[0]}): run it once first")
    sharded = [name for name, p in parameters.items() if _torch.is_dtensor(p)]
    if sharded:
        raise ValueError(f"model has sharded parameters ({sharded[0]}): look at it before fully_shard")
    devices = sorted({str(p.device) for p in parameters.values()})
    if len(devices) > 1:
        raise ValueError(f"model must be on one device, its parameters are on {', '.join(devices)}")
    if devices == ["meta"]:
        raise ValueError("model must have its weights in memory, they are on the meta device")
    if isinstance(batch, DataLoader):
        raise TypeError("batch must be one batch, got a DataLoader; next(iter(loader)) is its first")
    if any(tensor.ndim > 0 and tensor.shape[0] == 0 for tensor in tensors(batch)):
        raise ValueError("batch must have at least one sample, got an empty tensor")
    return model


def tensors(batch: Any) -> Iterator[Tensor]:
    """The tensors of a batch of tuples, lists and mappings."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from tensors(value)
    elif isinstance(batch, Sequence) and not isinstance(batch, str):
        for value in batch:
            yield from tensors(value)


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Random numbers of torch, Python and numpy, and every module's mode, as before at the end.

    torch.compile's graphs are left aside meanwhile: they would not see a hook.
    """
    modes = [(module, module.training) for module in model.modules()]
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    numpy = sys.modules.get("numpy")
    python_state, numpy_state = random.getstate(), None if numpy is None else numpy.random.get_state()
    try:
        with (
            torch.random.fork_rng(devices=devices),
            torch.inference_mode(False),
            torch.enable_grad(),
            _without_graphs(),
        ):
            yield
    finally:
        random.setstate(python_state)
        if numpy is not None:
            numpy.random.set_state(numpy_state)
        for module, training in modes:
            module.training = training


def _without_graphs() -> contextlib.AbstractContextManager[Any]:
    """Compiled models run eagerly; where none can exist, Dynamo's import is spared."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()


class _Call(nn.Module):
    def __init__(self, model: nn.Module, function: Callable[[], Any]) -> None:
        super().__init__()
        self.model, self.function = model, function

    def forward(self) -> Any:
        return self.function()


def with_stand_ins(model: nn.Module, function: Callable[[], Any]) -> Any:
    """What ``function`` returns, called with other tensors in the place of the model's parameters and buffers.

    The parameters' stand-ins want no gradient, so that no layer prepares one; buffers are copies, and so are the
    weights that their layer's own forward changes.
    """
    renormed = {id(m._parameters["weight"]) for m in model.modules() if getattr(m, "max_norm", None) is not None}
    stand_ins: dict[str, Tensor] = {}
    for name, p in model.named_parameters():
        stand_ins[f"model.{name}"] = p.detach().clone() if id(p) in renormed else p.detach()
    for name, buffer in model.named_buffers():
        stand_ins[f"model.{name}"] = buffer.clone()
    return torch.func.functional_call(_Call(model, function), stand_ins, ())
