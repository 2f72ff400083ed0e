"""`side_stream`: what a layer computes from its input alone runs on a CUDA stream beside the network's.

Gram, factor and emended input are needed in backward only. In a scope they are enqueued on a stream of their own, which
waits for the input; the layer's backward waits for them; and leaving the scope makes the stream that ran forward wait
for whatever no backward has waited for. So nothing is outstanding after a scope, and a graph that is captured around
one ends joined, whether backward ran or an exception came in between.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from .. import _torch
from ..options import Options

# Beside each one, taken in turn: the factor of a Gram up to order 160 is one block, and occupies one SM; above, where
# the chip has clusters, it is 8 or 16 blocks.
STREAMS = 4
RING = 32  # torch.cuda.Stream() hands out as many of a device, one after the other, and then the first again

Result = TypeVar("Result")
_streams: dict[Any, tuple[Any, ...]] = {}  # by the stream they run beside; no two share one
_drawing = threading.Lock()


class Lane:
    """The streams beside one, in one scope."""

    def __init__(self, main: torch.cuda.Stream) -> None:
        self.main = main
        self.turns = itertools.cycle(_streams_beside(main) or (main,))
        self.used: set[Any] = set()  # the others may not be part of a capture that this one is in
        self.joined = False  # whether `main` has waited for all of them, at the scope's end

    def join(self) -> None:
        """Let the stream wait for all that ran beside it."""
        for side in self.used:
            self.main.wait_stream(side)
        self.joined = True


class Ready:
    """A layer's work on a side stream as backward sees it: an event to wait for, and an input left alone until then."""

    def __init__(self, lane: Lane, event: torch.cuda.Event, x: Tensor) -> None:
        self.lane = lane
        self.event = event
        self.witness = _torch.version_witness(x)
        self.version = None if self.witness is None else self.witness._version
        self.shape = list(x.shape)

    def wait(self, made: Iterable[Tensor | None]) -> None:
        """Let the current stream wait, before it uses the tensors that were made there.

        Raises:
            RuntimeError: The layer's input was changed in place after forward, which torch's own layer refuses too.
        """
        stream = torch.cuda.current_stream(self.lane.main.device)
        # Not again after the scope: an event of a capture that has ended cannot be waited for.
        if not (self.lane.joined and stream == self.lane.main):
            stream.wait_event(self.event)
        for tensor in made:
            if tensor is not None:
                tensor.record_stream(stream)
        if self.witness is not None and self.witness._version != self.version:
            raise RuntimeError(
                f"consequentialism: the input {self.shape} of an emended layer was modified by an inplace operation "
                "before backward, while a side stream may have been reading it; it is at version "
                f"{self.witness._version}, expected {self.version}"
            )


class Scope:
    """One use of `side_stream`."""

    def __init__(self) -> None:
        self.lanes: dict[Any, Lane] = {}
        self.capturing = _torch.is_capturing()

    def run(self, x: Tensor, work: Callable[[], Result]) -> tuple[Result, Ready | None]:
        """Run ``work``, which reads ``x`` and nothing else that is young, on a side stream, if there is one."""
        main = torch.cuda.current_stream(x.device)
        if main not in self.lanes:
            self.lanes[main] = Lane(main)
        lane = self.lanes[main]
        side = next(lane.turns)
        if side == main:
            return work(), None
        side.wait_stream(main)
        lane.used.add(side)
        try:
            with torch.cuda.stream(side):
                result = work()
        finally:
            x.record_stream(side)
        return result, Ready(lane, side.record_event(), x)


class _Open(threading.local):
    scope: Scope | None = None


_open = _Open()


@contextmanager
def side_stream() -> Iterator[None]:
    """A context manager in which emended layers on a GPU compute Gram, factor and emended input on other streams.

    These depend on a layer's input alone. For linear layers and convolutions they are enqueued in forward on side
    streams and waited for in backward, so that a small factor, which leaves most of the GPU idle, runs beside the rest
    of the network::

        with cw.side_stream():
            loss = criterion(model(x), y)
            loss.backward()
        optimizer.step()

    The gradients are the same bits as without it, except for a small layer that would otherwise compute everything in
    one launch in backward (``fused_weight_grad``): inside the scope its parts run one after the other, beside forward.
    A scope applies to forwards of this thread; scopes may be nested, and one may serve several steps. At its end the
    stream waits for whatever is still outstanding, also after an exception and where no backward ran.

    In a CUDA graph, open it inside the capture, and close it before the capture ends. A scope that was opened before
    the capture does nothing in it.

    It does nothing for tensors that are not on a GPU; for layers whose weight is frozen, and under ``no_grad``; for
    layers with ``process_group=``, which wait for the device in forward; under hooks for saved tensors, such as those
    of ``torch.utils.checkpoint`` and ``save_on_cpu``, which may read at once what is kept; in transforms of
    ``torch.func``; in graphs of ``torch.compile``, whose layers compute everything in backward; for `optim.FusedSGD`
    and embeddings, which have nothing to compute in forward; and on a stream for which none is left of the 32 that
    torch has for a device.

    Raises:
        RuntimeError: In backward, where a layer's input was modified in place after its forward.
    """
    if torch.compiler.is_compiling():
        yield
        return
    outer, scope = _open.scope, Scope()
    _open.scope = scope
    try:
        yield
    finally:
        _open.scope = outer
        for lane in scope.lanes.values():
            lane.join()


def is_open() -> bool:
    """Whether this thread is in a `side_stream`."""
    return _open.scope is not None


def scope_of(x: Tensor, options: Options, need_weight: bool) -> Scope | None:
    """The scope by which a forward with the input ``x`` computes beside itself; None, it does not."""
    scope = _open.scope
    if scope is None or not need_weight or not _is_served(x) or options.process_group is not None:
        return None
    if torch.compiler.is_compiling() or _torch.transforms_active() or _torch.saved_tensors_have_hooks():
        return None
    return scope if scope.capturing or not _torch.is_capturing() else None


def run(scope: Scope | None, x: Tensor, work: Callable[[], Result]) -> tuple[Result, Ready | None]:
    """What ``work`` gives, which reads ``x``, and what to wait for before it is used, if it ran elsewhere."""
    return (work(), None) if scope is None else scope.run(x, work)


def _is_served(x: Tensor) -> bool:
    return x.is_cuda and type(x) is Tensor


def _streams_beside(main: torch.cuda.Stream) -> tuple[Any, ...]:
    with _drawing:
        if main not in _streams:
            _streams[main] = _draw(main)
            for other, sides in _streams.items():
                if main in sides:  # drawn before the program made it a main stream
                    _streams[other] = _draw(other, tuple(side for side in sides if side != main))
        return _streams[main]


def _draw(main: torch.cuda.Stream, kept: tuple[Any, ...] = ()) -> tuple[Any, ...]:
    """`STREAMS` for work beside ``main``, those kept among them; fewer where torch has no more that are free.

    None is shared: in the capture of one stream, the other's work beside it would be an error. A lane of
    an open scope keeps the streams that it began with, also where torch meanwhile hands one of them out as another
    thread's main stream.
    """
    taken = {main, *kept, *_streams, *(side for sides in _streams.values() for side in sides)}
    drawn = dict.fromkeys(kept)
    for _ in range(RING):
        if len(drawn) == STREAMS:
            break
        stream = torch.cuda.Stream(main.device)
        if stream not in taken:
            drawn[stream] = None
    return tuple(drawn)


_torch.never_inlined(Ready.wait, "backward of an emended layer waits for a side stream")
