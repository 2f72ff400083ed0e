"""`FusedSGD`: the step of SGD taken inside backward, so that weight gradients never exist in memory.

A gradient that never exists cannot be clipped, accumulated, averaged over ranks, unscaled or given to a hook. What can
be seen of that beforehand is refused; for the rest, a `SpentGradient` stands in ``.grad`` from backward to ``step()``,
takes no memory, and raises when anything reads it.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize

from .. import _torch
from ..autograd.kept import Kept
from ..errors import shown
from ..functional.linear import emended_linear_with
from ..nn.linear import Linear
from ..nn.recorder import Recorder
from ..options import Options
from .checks import check_rate
from .step import update, updated_linear, updated_linear_backward

NAME = "consequentialism.optim.FusedSGD"
REFUSED_KEYS = ("momentum", "dampening", "weight_decay", "nesterov", "maximize", "betas")  # of a parameter group


class SpentGradient(Tensor):
    """Stands in ``.grad`` for the gradient of a weight that was updated in backward; every operation on it raises.

    It has the weight's shape and no memory.
    """

    @staticmethod
    def __new__(cls, parameter: Tensor) -> SpentGradient:
        return _torch.without_memory(cls, parameter)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"SpentGradient({list(self.shape)})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, *_: Any, **__: Any) -> Any:  # type: ignore[override]
        raise RuntimeError(
            f"{NAME}: {func} was called on the gradient of a weight that backward has already updated; it never "
            "existed. Clipping, GradScaler (the update then had the scaled loss: reload the weights), accumulation, a "
            "second optimizer, and looking at gradients need torch.optim.SGD"
        )


def _itself(recorder: Recorder | None) -> Recorder | None:
    return recorder


FULL_GRAPH = (
    f"{NAME} does not support torch.compile in a full graph: backward changes the weights. Compile without "
    "fullgraph=True, or use torch.optim.SGD"
)


class LayerStep:
    """A layer's link to its optimizer: how to step its own weight and bias in backward.

    It is the layer's `Recorder`, above the one that the layer had, which is what a copy gets.
    """

    def __init__(
        self, name: str, weight: Tensor, bias: Tensor | None, optimizer: FusedSGD, below: Recorder | None
    ) -> None:
        self.name = name
        self.weight = weight
        self.bias = bias
        self.optimizer = weakref.ref(optimizer)
        self.uses: list[weakref.ref[Any]] = []  # the nodes of all graphs that are alive
        self.updated: list[Tensor] = []  # since the last step()
        self.lr: float | None = None  # what they were updated with; None for a tensor
        self.below = below
        self.updated_linear = _torch.outside_graphs(LayerStep.recorded_linear, FULL_GRAPH)
        self.backward = _torch.outside_graphs(updated_linear_backward, FULL_GRAPH)

    def __reduce__(self) -> tuple[Any, tuple[Recorder | None]]:
        return _itself, (self.below,)

    @property
    def label(self) -> str:
        """The label of the recorder below."""
        return "" if self.below is None else self.below.label

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, options: Options) -> Tensor:
        """``x W^T + b``, and a step in backward where one may follow."""
        trained = weight.requires_grad or (bias is not None and bias.requires_grad)
        transformed = _torch.transforms_active()
        if not torch.is_grad_enabled() or not (trained or transformed):
            return self.handed_on(x, weight, bias, options)
        if transformed:
            raise RuntimeError(
                f"{NAME} does not support torch.func transforms, which must not change weights; call its release() "
                "first"
            )
        return self.updated_linear(self, x, weight, bias, options)

    def recorded_linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, options: Options) -> Tensor:
        """`linear` where a backward may follow."""
        if not self.alive():
            return self.handed_on(x, weight, bias, options)
        return updated_linear(x, weight, bias, options, self)

    def handed_on(self, x: Tensor, weight: Tensor, bias: Tensor | None, options: Options) -> Tensor:
        """``x W^T + b`` as without an optimizer."""
        linear = emended_linear_with if self.below is None else self.below.linear
        return linear(x, weight, bias, options)

    def parameters(self) -> Iterator[Tensor]:
        """The weight, and the bias where there is one."""
        yield self.weight
        if self.bias is not None:
            yield self.bias

    def alive(self) -> bool:
        """Whether the optimizer is still there."""
        return self.optimizer() is not None

    def check_forward(self, weight: Tensor, bias: Tensor | None, options: Options) -> None:
        """Refuse what can be seen before anything is computed."""
        if weight is not self.weight or bias is not self.bias:
            raise RuntimeError(
                f"{NAME}: the parameters of layer {self.name!r} are not those that the optimizer was made with; make "
                "a new one after replacing, parametrising or replicating parameters"
            )
        reason = distribution() or _group_reason(options) or _hook_reason(self.parameters())
        if reason is not None:
            raise RuntimeError(f"{NAME}: layer {self.name!r}: {reason}")

    def used_by(self, node: Any) -> None:
        """Note a node whose backward would step the layer."""
        self.uses = [use for use in self.uses if use() is not None]
        self.uses.append(weakref.ref(node))

    def begin(self, node: Any) -> tuple[bool, bool]:
        """Whether the backward that is running wants the weight's and the bias's gradients.

        The first layer that a backward reaches checks all layers, so that a refusal changes no weight.
        """
        optimizer = self.optimizer()
        if optimizer is None or self not in optimizer.layer_steps:
            raise RuntimeError(f"{NAME} was released or deleted between forward and backward of layer {self.name!r}")
        if torch.is_grad_enabled():
            raise RuntimeError(f"{NAME}: create_graph=True: an update of the weights has no derivative")
        optimizer.check_backward()
        return self.wanted(node)

    def check_backward(self) -> None:
        """Refuse a backward that uses the layer twice, is the second since ``step()``, or adds to other gradients."""
        nodes = [node for node in (use() for use in self.uses) if node is not None]
        nodes = [node for node in nodes if _torch.will_run(node)]
        wants = [self.wanted(node) for node in nodes]
        if sum(map(any, wants)) > 1:
            raise RuntimeError(
                f"{NAME}: layer {self.name!r} is used more than once in one backward; its gradients would have to be "
                "summed before the step"
            )
        for wants_weight, wants_bias in wants:
            self.check_parameters(wants_weight, wants_bias)

    def check_parameters(self, wants_weight: bool, wants_bias: bool) -> None:
        """Refuse to update what is updated already, or has a gradient or hooks."""
        if not (wants_weight or wants_bias):
            return
        if self.updated:
            raise RuntimeError(
                f"{NAME}: a second backward through layer {self.name!r} before step(); gradients cannot be accumulated"
            )
        if any(parameter.grad is not None for parameter in self.parameters()):
            raise RuntimeError(
                f"{NAME}: layer {self.name!r} has a gradient that its own backward did not make: from before, or from "
                "a use of its parameters outside the layer. Call zero_grad() before backward, or use torch.optim.SGD"
            )
        reason = _hook_reason(self.parameters())
        if reason is not None:
            raise RuntimeError(f"{NAME}: layer {self.name!r}: {reason}")

    def wanted(self, node: Any) -> tuple[bool, bool]:
        """Whether the backward that is running accumulates into the weight's and the bias's ``.grad``."""
        (weight_view, _), (bias_view, _) = node.next_functions[1:3]
        return self._wanted(weight_view), self._wanted(bias_view)

    def _wanted(self, view: Any) -> bool:
        if view is None or not _torch.will_run(view):
            return False
        leaf = view.next_functions[0][0]
        if _torch.is_asked_for(leaf):
            raise RuntimeError(
                f"{NAME}: torch.autograd.grad asks for a gradient of layer {self.name!r}, which is never made; use "
                "torch.optim.SGD"
            )
        return _torch.will_run(leaf)

    def update(self, weight: bool, bias: bool, kept: Kept, x: Tensor | None, dy: Tensor, ratio: Tensor | None) -> None:
        """``W <- W - lr*dw`` and ``b <- b - lr*db``, each where it is wanted. ``x [N, I]``, ``dy [N, O]``.

        ``ratio`` is that of `samples.ratio`, by which the gradients are multiplied.
        """
        optimizer = self.optimizer()
        assert optimizer is not None
        self.check_parameters(weight, bias)
        lr = rate(optimizer.param_groups[0]["lr"], self.weight)
        targets = (self.weight if weight else None, self.bias if bias else None)
        update(*targets, kept, x, dy, lr if ratio is None else lr * ratio)
        self.lr = None if isinstance(lr, Tensor) else lr
        self.updated = [parameter for parameter in targets if parameter is not None]
        for parameter in self.updated:
            parameter.grad = SpentGradient(parameter)
        if torch.is_anomaly_enabled() and not all(parameter.isfinite().all() for parameter in self.updated):
            raise RuntimeError(f"{NAME}: the update of layer {self.name!r} made its parameters NaN or infinite")

    def check_step(self, lr: float | None) -> None:
        """Refuse a step that would differ from the one that backward took."""
        for parameter in self.parameters():
            expected = any(parameter is p for p in self.updated)
            if isinstance(parameter.grad, SpentGradient) != expected:
                raise RuntimeError(
                    f"{NAME}: a gradient of layer {self.name!r} was cleared or replaced between backward and step(), "
                    "but backward has already updated the weights"
                )
            if parameter.grad is not None and not expected:
                raise RuntimeError(
                    f"{NAME}: layer {self.name!r} has a gradient that its own backward did not make: it was reverted, "
                    "or its parameters are used outside the layer. Call release() for plain SGD steps"
                )
        if self.updated and self.lr is not None and self.lr != lr:
            raise RuntimeError(
                f"{NAME}: the learning rate changed from {self.lr} to {lr} between backward and step(), but backward "
                f"has already updated layer {self.name!r}; change it after step() or before backward"
            )

    def finish(self) -> None:
        """After this the layer may be updated again."""
        for parameter in self.updated:
            parameter.grad = None
        self.updated = []


class FusedSGD(torch.optim.Optimizer):
    """SGD that steps emended linear layers inside backward: ``W <- W - lr * dy^T y``, and ``dw`` never exists.

    After one step the weights are those of `torch.optim.SGD` with the same ``lr``, up to rounding. The weights and
    biases of `consequentialism.Linear` layers change while ``loss.backward()`` runs. ``step()`` steps all other
    parameters of the model (embeddings, norms, plain layers) as plain SGD, and must follow every backward. From
    backward to ``step()``, ``.grad`` of an updated parameter is a `SpentGradient`, which raises an error when it is
    used; at other times it is None.

    Refused with an error: a second backward before ``step()``; a layer used twice in one backward; tied weights; hooks
    on parameters; gradient clipping and GradScaler (after the update); ``create_graph=True``; ``torch.autograd.grad``
    for the weights; ``torch.func``; ``torch.compile`` with ``fullgraph=True``; ``process_group=``, DDP and more than
    one process; a learning rate that changes between backward and ``step()``. Hooks on a parameter's AccumulateGrad
    node are not detected. After an error in the middle of a backward, the layers that it has passed are updated.

    Args:
        model: A module with at least one `consequentialism.Linear`. The optimizer takes all its parameters.
        lr: The learning rate of the linear layers, a number or a tensor with one element. A tensor on the model's
            device is read there, so that CUDA graphs can be captured and replayed with another value; a number is
            refused in a capture.
        other_lr: The learning rate of all other parameters; None for ``lr``.

    Attributes:
        param_groups: The group of the linear layers, then that of the other parameters, if there are any. Schedulers
            work on both.

    Raises:
        TypeError: ``model`` is not a module, or a learning rate is not a number.
        ValueError: A learning rate below 0 or not finite, no layer to step, or one that cannot be stepped this way.
    """

    def __init__(self, model: nn.Module, lr: float | Tensor, *, other_lr: float | Tensor | None = None) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {shown(model)}")
        check_rate("lr", lr)
        lr = lr if isinstance(lr, Tensor) else float(lr)  # a numpy scalar too, which no checkpoint should hold
        if other_lr is not None:
            check_rate("other_lr", other_lr)
            other_lr = other_lr if isinstance(other_lr, Tensor) else float(other_lr)
        layers = {name: module for name, module in model.named_modules() if isinstance(module, Linear)}
        for layer in layers.values():  # a backward that steps sees for itself who made a gradient, and bears no hooks
            if layer.watched is not None:
                layer.watched.leave(layer)
        _check_layers(model, layers)
        stepped = [p for layer in layers.values() for p in layer.parameters(recurse=False)]
        known = {id(p) for p in stepped}
        others = [p for p in model.parameters() if id(p) not in known]
        groups: list[dict[str, Any]] = [{"params": stepped, "lr": lr}]
        if others:
            groups.append({"params": others, "lr": lr if other_lr is None else other_lr})
        self.layer_steps: list[LayerStep] = []
        self._layers = list(layers.values())
        self._checked_task = -1
        super().__init__(groups, {"lr": lr})
        for name, layer in layers.items():
            below = layer.recorder.below if isinstance(layer.recorder, LayerStep) else layer.recorder
            layer_step = LayerStep(name, *layer.weight_and_bias(), self, below)
            layer.attach(layer_step)
            self.layer_steps.append(layer_step)

    def check_backward(self) -> None:
        """Check all layers, once in a backward."""
        task = _torch.backward_number()
        if task != self._checked_task:
            for layer_step in self.layer_steps:
                layer_step.check_backward()
            self._checked_task = task

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Finish the step that backward began: step the other parameters, as plain SGD.

        Raises:
            RuntimeError: A ``closure``, or gradients or a learning rate that backward did not see; nothing is then
                changed here.
            ValueError: A parameter group that asks for more than plain SGD.
        """
        if closure is not None:
            raise RuntimeError(f"{NAME} takes no closure: calling it again would step the weights again")
        _check_groups(self.param_groups)
        lr = self.param_groups[0]["lr"]
        number = None if isinstance(lr, Tensor) and lr.device.type != "cpu" else float(lr)
        for layer_step in self.layer_steps:
            layer_step.check_step(number)
        for layer_step in self.layer_steps:
            layer_step.finish()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                lr = rate(group["lr"], parameter)
                if isinstance(lr, Tensor):
                    parameter.sub_(parameter.grad * lr)
                else:
                    parameter.add_(parameter.grad, alpha=-lr)

    def release(self) -> None:
        """Let the layers give gradients again; ``step()`` is then plain SGD on all parameters."""
        for layer_step in self.layer_steps:
            layer_step.finish()
        for layer in self._layers:
            recorder = layer.__dict__.get("recorder")  # which a reverted layer has not
            if isinstance(recorder, LayerStep) and recorder in self.layer_steps:
                layer.attach(recorder.below)
        self.layer_steps = []

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters that are stepped as plain SGD, with an ``lr`` of their own or the default one."""
        _check_groups([param_group] if isinstance(param_group, dict) else [])
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the learning rates, which are all the state there is."""
        _check_groups(state_dict["param_groups"])
        super().load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(f"{NAME} cannot be copied or pickled, it belongs to its model; save its state_dict()")


def rate(lr: float | Tensor, parameter: Tensor) -> float | Tensor:
    """``lr`` as a 0-dimensional tensor where the host need not read it, else as a number."""
    if isinstance(lr, Tensor) and lr.device.type != "cpu":
        if lr.device != parameter.device:
            raise RuntimeError(f"{NAME}: the learning rate is on {lr.device}, a parameter on {parameter.device}")
        return lr.detach().reshape(())
    if parameter.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{NAME}: a CUDA graph would keep lr={lr} for ever; give it as a tensor on {parameter.device}"
        )
    return float(lr)


def distribution() -> str | None:
    """Why the gradient would have to be averaged over processes first, or None."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return "torch.distributed runs more than one process, whose replicas would diverge"
    if getattr(DistributedDataParallel, "_active_ddp_module", None) is not None:
        return "DistributedDataParallel waits for gradients that never exist"
    return None


def _check_layers(model: nn.Module, layers: dict[str, Linear]) -> None:
    """Raise unless every layer can be stepped in backward."""
    if not layers:
        raise ValueError(f"{NAME}: the model has no consequentialism.Linear layer; call consequentialism.convert first")
    parallel = any(isinstance(module, DistributedDataParallel) for module in model.modules())
    reason = "DistributedDataParallel waits for gradients that never exist" if parallel else distribution()
    if reason is not None:
        raise ValueError(f"{NAME}: {reason}")
    holders = Counter(_identity(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    reasons = {name: _obstacle(layer, holders) for name, layer in layers.items()}
    refused = [f"{name or '(the model itself)'}: {reason}" for name, reason in reasons.items() if reason is not None]
    if refused:
        raise ValueError(f"{NAME} cannot step " + "; ".join(refused))


def _identity(parameter: Tensor) -> tuple[str, int]:
    """Equal for parameters that are one, or begin at the same place in memory."""
    has_memory = type(parameter) is nn.Parameter and parameter.device.type != "meta" and parameter.numel() > 0
    return ("memory", parameter.data_ptr()) if has_memory else ("object", id(parameter))


def _obstacle(layer: Linear, holders: Counter[tuple[str, int]]) -> str | None:
    """Why the layer cannot be stepped in backward, or None."""
    if parametrize.is_parametrized(layer) or not isinstance(layer._parameters.get("weight"), nn.Parameter):
        return "its weight is computed, not a parameter"
    if isinstance(layer.recorder, LayerStep) and layer.recorder.alive():
        return "another FusedSGD steps it; call that one's release() first"
    parameters = list(layer.parameters(recurse=False))
    if any(_torch.is_dtensor(p.data) for p in parameters):
        return "its parameters are DTensors"
    if any(holders[_identity(p)] > 1 for p in parameters):
        return "its parameters are tied to another module's, whose gradient would have to be added first"
    return _group_reason(layer.options_now()) or _hook_reason(parameters)


def _group_reason(options: Options) -> str | None:
    if options.process_group is None:
        return None
    return "process_group is set, and the gradient would have to be averaged over the ranks first"


def _hook_reason(parameters: Any) -> str | None:
    for parameter in parameters:
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
            return "a parameter has hooks, which wait for a gradient that never exists"
    return None


def _check_groups(groups: list[dict[str, Any]]) -> None:
    """Raise where a group asks for more than plain SGD, such as momentum."""
    for group in groups:
        extra = [f"{key}={group[key]!r}" for key in REFUSED_KEYS if group.get(key)]
        if extra:
            raise ValueError(f"{NAME} is plain SGD; a parameter group asks for {', '.join(extra)}")
