"""`FactorBatch`: the factors of many layers at once; see ``batch_factors`` of `convert`.

Nothing needs a layer's inverse before backward. In forward a layer of a `FactorBatch` therefore only keeps its input,
as `torch.nn.Linear` does. The first layer that a backward reaches prepares, in one call of an op of its backend, itself
and every other layer that this backward will reach, so that small matrices are factored beside one another: by one
kernel launch on a GPU, on several cores of a CPU. The gradients are bit for bit those of layers on their own.

What is put off belongs to the node of the autograd graph that waits for it and dies with it; a `FactorBatch` holds weak
references only, and nothing between steps.
"""

from __future__ import annotations

import itertools
import math
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _torch
from ..autograd import linear as autograd
from ..autograd.kept import Inverse, Kept, keep_emended, keep_inverse
from ..autograd.linear import full_precision, once_differentiable, plain_linear
from ..backend import reference
from ..backend.protocol import Backend
from ..functional.linear import emended_linear_with
from ..options import Options
from ..solve import cost
from ..solve.cost import Plan
from .recorder import Recorder


class Deferred:
    """`autograd.prepare` of one layer in one forward, put off until backward.

    Attributes:
        x: ``[N, I]``, detached; None once nothing needs it any more.
        stream: The device and the stream of x, on which backward will run too.
        number: The place in forward's order.
        node: The node of the autograd graph that waits.
    """

    def __init__(
        self,
        x: Tensor,
        bias: bool,
        outputs: int,
        options: Options,
        backend: Backend,
        need_weight: bool,
        need_bias: bool,
        plan: Plan,
        batch: FactorBatch,
    ) -> None:
        self.x: Tensor | None = x
        self.bias = bias
        self.outputs = outputs
        self.options = options
        self.backend = backend
        self.need_weight = need_weight
        self.need_bias = need_bias
        self.plan = plan
        self.batch = batch
        self.version = None if x.is_inference() else x._version
        self.stream = (x.device, torch.cuda.current_stream(x.device) if x.is_cuda else None)
        self.number = -1
        self.node: weakref.ref[Any] | None = None
        self.prepared: Kept | None = None

    def ready_with(self, other: Deferred) -> bool:
        """Whether this waits, and the backward that is running at ``other`` will come to it on the same stream."""
        node = None if self.node is None else self.node()
        if self.prepared is not None or node is None or self.stream != other.stream:
            return False
        if not (_torch.backward_is_running() and _torch.will_run(node)):
            return False
        if self.x is None or self.was_modified():  # its own backward will say so, if it comes
            return False
        return any(_torch.needed_gradients(node, 3)[1:])

    def was_modified(self) -> bool:
        """Whether ``x`` has been changed in place since forward."""
        return self.version is not None and self.x is not None and self.x._version != self.version

    def input(self) -> Tensor:
        """``x [N, I]`` as forward saw it."""
        x = self.x
        assert x is not None
        if self.was_modified():
            raise RuntimeError(
                f"the input {list(x.shape)} of a layer with batch_factors=True has been modified by an inplace "
                f"operation: it is at version {x._version}, forward saw version {self.version}"
            )
        return x

    def weight_grad(
        self, dy: Tensor, need_weight: bool, need_bias: bool, keep: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """``dw [O, I]`` and ``db [O]``, each None where it is not needed; ``keep`` for another backward.

        Args:
            dy: ``[N, O]``.
        """
        prepared = self.batch.prepared(self)
        x = None if self.x is None else self.input()
        dw, db = prepared.weight_grad(x, dy, self.backend, need_weight, need_bias)
        if not keep:
            self.x = self.prepared = None
        return dw, db


class FactorBatch:
    """What the layers of a model share, so that their matrices are factored together.

    It is the `Recorder` of each. Threads may use it at once. A copy, and what is unpickled, is a new one, which the
    copies of the layers share.
    """

    label = "batch_factors=True"

    def __init__(self) -> None:
        self._waiting: weakref.WeakValueDictionary[int, Deferred] = weakref.WeakValueDictionary()  # by number
        self._numbers = itertools.count()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[FactorBatch], tuple[()]]:
        return FactorBatch, ()

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, options: Options) -> Tensor:
        """``x W^T + b``, what depends on ``x`` alone put off to backward."""
        return emended_linear_with(x, weight, bias, options, self)

    def over(self, below: Recorder | None) -> Recorder | None:
        """The other: a layer belongs to one batch."""
        return below

    def deferred(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        options: Options,
        need_weight: bool,
        need_bias: bool,
        backend: Backend,
        plan: Plan,
    ) -> Tensor:
        """``x W^T + b`` of checked arguments; `can_defer` has been asked."""
        flat_x = x.detach().reshape(math.prod(x.shape[:-1]), x.shape[-1])
        put_off = self.defer(flat_x, bias is not None, weight.shape[0], options, backend, need_weight, need_bias, plan)
        return DeferredLinear.apply(x, weight, bias, put_off)

    def __len__(self) -> int:
        """How many layers of living graphs wait."""
        return len(self._waiting)

    @staticmethod
    def can_defer(options: Options) -> bool:
        """Whether a layer may wait: not where forward is traced, where ranks meet in forward, or under hooks on saved
        tensors, such as checkpointing's, which want to have the input themselves."""
        return not (torch.compiler.is_compiling() or options.process_group is not None or _torch.saves_through_hooks())

    def defer(
        self,
        x: Tensor,
        bias: bool,
        outputs: int,
        options: Options,
        backend: Backend,
        need_weight: bool,
        need_bias: bool,
        plan: Plan,
    ) -> Deferred:
        """Put off `autograd.prepare` with these arguments."""
        deferred = Deferred(x, bias, outputs, options, backend, need_weight, need_bias, plan, self)
        with self._lock:
            deferred.number = next(self._numbers)
            self._waiting[deferred.number] = deferred
        return deferred

    def prepared(self, deferred: Deferred) -> Kept:
        """What `autograd.prepare` would have returned. Called in backward, by the node that waits."""
        with self._lock:
            if deferred.prepared is None:
                due = [one for one in list(self._waiting.values()) if one is not deferred and one.ready_with(deferred)]
                prepare_together([*due, deferred])
                for one in (*due, deferred):
                    self._waiting.pop(one.number, None)
            assert deferred.prepared is not None
            return deferred.prepared


def prepare_together(layers: Sequence[Deferred]) -> None:
    """`autograd.prepare` for all layers, of those with equal options and backend in one call of an op."""
    groups: dict[tuple[Options, Backend], list[Deferred]] = {}
    alone: list[Deferred] = []
    for layer in layers:
        if layer.backend is not reference and cost.has_factor(layer.plan):
            groups.setdefault((layer.options, layer.backend), []).append(layer)
        else:
            alone.append(layer)
    for (options, backend), group in groups.items():
        if len(group) == 1:
            alone.append(group[0])
        else:
            _prepare_group(options, backend, group)
    for layer in alone:
        _prepare_alone(layer)
    for layer in layers:
        prepared = layer.prepared
        if prepared is not None and not prepared.keeps_x():
            layer.x = None


def _prepare_alone(layer: Deferred) -> None:
    layer.prepared = autograd.prepare(
        layer.input(),
        layer.bias,
        layer.outputs,
        layer.options,
        layer.backend,
        layer.need_weight,
        layer.need_bias,
        layer.plan,
    )


def _prepare_group(options: Options, backend: Backend, layers: Sequence[Deferred]) -> None:
    plans = [layer.plan for layer in layers]
    xs = [layer.input() for layer in layers]
    kept, columns = backend.emended_inputs(
        xs,
        [layer.bias for layer in layers],
        [plan.form for plan in plans],
        [plan.applied_to == "input" for plan in plans],
        *options.ridge,
    )
    for layer, x, plan, tensor, column in zip(layers, xs, plans, kept, columns, strict=True):
        if plan.applied_to == "input":
            layer.prepared = keep_emended(tensor, column, layer.need_weight, layer.need_bias)
        elif autograd.in_range(tensor):
            layer.prepared = keep_inverse(Inverse(tensor, plan.form), x, layer.need_weight)
        else:
            _prepare_alone(layer)


class DeferredLinear(torch.autograd.Function):
    """`autograd.EmendedLinear` of a layer whose preparation is put off."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, deferred: Deferred) -> Tensor:
        ctx.save_for_backward(weight if ctx.needs_input_grad[0] else None)
        ctx.deferred = deferred
        deferred.node = weakref.ref(ctx)
        return plain_linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors  # raises where the graph has been freed
        needs_x, needs_weight, needs_bias = _torch.needed_gradients(ctx, 3)
        dw = db = None
        with full_precision(dy.device.type):
            dx = dy @ weight if needs_x else None
            if needs_weight or needs_bias:
                flat_dy = dy.reshape(math.prod(dy.shape[:-1]), dy.shape[-1])
                weight_grad = Deferred.weight_grad
                if torch.compiler.is_compiling():  # by compiled autograd, which cannot trace what the layers share
                    weight_grad = _torch.outside_graphs(weight_grad, "batch_factors=True does not support full graphs")
                dw, db = weight_grad(ctx.deferred, flat_dy, needs_weight, needs_bias, _torch.keeps_graph())
        return dx, dw, db, None
