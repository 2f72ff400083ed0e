"""`Watch`: after the first gradients, whether each layer of a `convert` made its own.

A module that computes ``F.linear(x, self.qkv.weight)`` never calls ``self.qkv``, and gives its weight the plain
gradient whatever the layer's class. When the first layer of a `convert` runs, a hook is therefore put on the weight of
every other layer, and taken off as soon as that layer runs. A weight that gets a gradient while it still has its hook
belongs to a layer that did not run. In later steps only layers that never ran have a hook. The first run also checks
whether the model has new layers since its `convert`, such as adapters, which are plain.

Layers that torch.compile traces are not watched, because compiled code may serve layers that it never saw.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from .. import _torch

if TYPE_CHECKING:
    from .module import EmendedModule


class Watch:
    """What the layers of one `convert` share until each has run. A copy, and what is unpickled, is a new one."""

    def __init__(self, added: Callable[[], list[str]] | None = None) -> None:
        """``added`` names the layers that could be emended and were not there when the model was converted."""
        self._added = added
        self._waiting: list[Watched] = []
        self._bypassed: list[str] = []  # in the backward that is running
        self.compiled = False

    def __reduce__(self) -> tuple[type[Watch], tuple[()]]:
        return Watch, ()

    def add(self, layer: EmendedModule) -> None:
        """Watch a layer until it runs."""
        watched = layer.__dict__["watched"] = Watched(self)
        watched.bind(layer)

    def wait(self, watched: Watched) -> None:
        """Have its weight looked at when the next layer runs."""
        self._waiting.append(watched)

    def look(self) -> None:
        """Called when a layer has run for the first time: hooks on the weights of those that have not."""
        added, self._added = self._added, None
        names = [] if added is None else added()
        if names:
            warnings.warn(
                f"consequentialism: {listed(names)} came into the model after convert and get the plain gradient. Call "
                "convert on the model again, with a filter_fn that leaves out what is to stay plain",
                UserWarning,
                stacklevel=2,
            )
        waiting, self._waiting = self._waiting, []
        self._waiting = [watched for watched in waiting if not (watched.ran or watched.hook())]

    def expect_no_more(self) -> None:
        """Called by a further `convert`: what it leaves plain is meant to be."""
        self._added = None

    def bypassed(self, name: str) -> None:
        """Called in backward: a weight has a gradient that its layer did not make. One warning names all of them."""
        if self.compiled:
            return
        if not self._bypassed:
            torch.autograd.Variable._execution_engine.queue_callback(self._announce)  # type: ignore[attr-defined]
        self._bypassed.append(name)

    def _announce(self) -> None:
        names, self._bypassed = self._bypassed, []
        warnings.warn(
            f"consequentialism: the weights of {listed(names)} got a gradient although the layers' own forward was not "
            "run: the module around each uses its weight directly, and the gradient is the plain one. Call the layer "
            "there, or consequentialism.emended_linear with its weight",
            UserWarning,
            stacklevel=2,
        )


class Watched:
    """A layer's part in a `Watch`. Replicas of the layer share it."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch
        self.ran = False
        self.bypassed = False  # its weight got a gradient first
        self._layer: weakref.ref[EmendedModule] | None = None
        self._handle: Any = None

    def __reduce__(self) -> tuple[type[Watched], tuple[Watch]]:
        return Watched, (self.watch,)

    def bind(self, layer: EmendedModule) -> None:
        """Say whose part it is; a copy does not know."""
        self._layer = weakref.ref(layer)
        self.watch.wait(self)

    def bound(self) -> bool:
        """Whether it is known whose part it is."""
        return self._layer is not None

    def run_by(self, layer: EmendedModule) -> None:
        """Called by the forward of the layer or its replica: nothing is to be watched any more."""
        self.leave(layer)
        if not _torch.transforms_active():
            self.watch.look()

    def leave(self, layer: EmendedModule) -> None:
        """Stop watching."""
        self.ran = True
        layer.__dict__.pop("watched", None)
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def hook(self) -> bool:
        """Have the weight's first gradient looked at; False where it is frozen so far."""
        layer = None if self._layer is None else self._layer()
        weight = None if layer is None else layer._parameters.get(layer.weight_name)
        if weight is None:
            return True
        if not (weight.requires_grad and weight.is_leaf):
            return False
        self._handle = weight.register_post_accumulate_grad_hook(self._got_gradient)
        return True

    def _got_gradient(self, _: object) -> None:
        layer = None if self._layer is None else self._layer()
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        if layer is not None and not self.ran:
            self.bypassed = not self.watch.compiled
            self.watch.bypassed(layer.qualified_name or type(layer).__name__)


def note_compiled(layer: EmendedModule) -> None:
    """Called by a forward that torch.compile traces; leaves nothing in the graph, and no guards."""
    from torch._dynamo.comptime import comptime

    comptime(_compiled)


def _compiled(context: Any) -> None:
    layer = context.get_local("layer")._i_will_not_complain_if_bc_breaks_VariableTracker()
    watched = getattr(getattr(layer, "value", None), "watched", None)
    if watched is not None:
        watched.watch.compiled = True


def listed(names: list[str], limit: int = 10) -> str:
    """The names, of many the first."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
