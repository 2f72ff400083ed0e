"""Stand-ins for CUDA's streams and events, on the CPU: what runs is checked for the order that a GPU would need.

`World` watches every operator. Each belongs to the current stream; what it reads must have been written, and what it
writes must have been read and written, on that stream or on one that it has waited for since. Memory goes back to the
stream it was made on, as in torch's caching allocator: a stream that used it must have been recorded or waited for. A
capture takes in the streams that wait for its own, and must end with all of them joined.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from consequentialism import _torch
from consequentialism.autograd import side_stream


class Misordered(AssertionError):
    """What a GPU would have been free to run in the wrong order."""


class Stream:
    """A stream as a vector clock: how far each stream had come when this one last heard of it."""

    device = "fake"

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.clock: dict[Stream, int] = {}
        self.capture: Capture | None = None

    def now(self) -> int:
        return self.clock.get(self, 0)

    def tick(self) -> int:
        self.clock[self] = self.now() + 1
        return self.now()

    def knows(self, stream: Stream, time: int) -> bool:
        return self is stream or self.clock.get(stream, 0) >= time

    def record_event(self) -> Event:
        return Event(dict(self.clock), self.capture)

    def wait_event(self, event: Event) -> None:
        capture = event.capture
        if capture is not None and capture.ended:
            raise Misordered("an event of a capture that has ended was waited for")
        if self.capture is not capture and self.capture is not None:
            raise Misordered("a captured stream waits for work that was not captured")
        if capture is not None:
            self.capture = capture
            capture.streams.add(self)
        for stream, time in event.clock.items():
            self.clock[stream] = max(self.clock.get(stream, 0), time)

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())


@dataclass(eq=False)
class Capture:
    """A graph's capture."""

    streams: set[Stream]
    ended: bool = False


@dataclass(eq=False)
class Event:
    """A point on a stream."""

    clock: dict[Stream, int]
    capture: Capture | None


@dataclass(eq=False)
class Memory:
    """A storage, and who has used it. That of a capture is its graph's for good, once it has ended."""

    home: Stream
    written: tuple[Stream, int]
    read: dict[Stream, int] = field(default_factory=dict)
    recorded: set[Stream] = field(default_factory=set)
    capture: Capture | None = None

    def __post_init__(self) -> None:
        self.capture = self.home.capture

    def uses(self) -> Iterator[tuple[Stream, int]]:
        yield self.written
        yield from self.read.items()


class World(TorchDispatchMode):
    """All streams and all memory; as a mode it watches what runs."""

    def __init__(self) -> None:
        super().__init__()
        self.current = Stream(self, "main")
        self.memory: dict[int, Memory] = {}
        self.sides: list[Stream] = []  # all that were handed out
        self.ring = itertools.cycle(Stream(self, f"side {i}") for i in range(side_stream.RING))
        self.problems: list[str] = []  # of freed memory, found where nothing can be raised
        self.ran: list[tuple[Stream, str]] = []

    def new_stream(self, device: Any = None) -> Stream:
        stream = next(self.ring)
        if stream not in self.sides:
            self.sides.append(stream)
        return stream

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def captured(self) -> Iterator[Stream]:
        """A capture on a stream of its own, and a replay on the current one."""
        origin = Stream(self, "captured")
        origin.wait_stream(self.current)
        origin.capture = capture = Capture({origin})
        with self.on(origin):
            yield origin
        capture.ended = True
        for stream in capture.streams:
            stream.capture = None
            if not origin.knows(stream, stream.now()):
                raise Misordered(f"the capture ended before {stream.name} was joined")
        self.current.wait_stream(origin)

    def beside(self) -> list[str]:
        """What ran on side streams."""
        return [name for stream, name in self.ran if stream in self.sides]

    def check(self) -> None:
        """Raise where memory was freed too early."""
        if self.problems:
            raise Misordered("; ".join(self.problems))

    def record_stream(self, tensor: Tensor, stream: Stream) -> None:
        self._of(tensor).recorded.add(stream)

    def _of(self, tensor: Tensor) -> Memory:
        key = _storage_of(tensor)
        if key not in self.memory:  # one that was there before: it is taken to be done
            self.memory[key] = Memory(self.current, (self.current, 0))
            weakref.finalize(tensor.untyped_storage(), self._freed, key)
        return self.memory[key]

    def _freed(self, key: int) -> None:
        memory = self.memory.pop(key)
        if memory.capture is not None and memory.capture.ended:
            return
        for stream, time in memory.uses():
            if stream not in memory.recorded and not memory.home.knows(stream, time):
                self.problems.append(f"memory of {memory.home.name} was freed while {stream.name} was using it")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        stream = self.current
        time = stream.tick()
        self.ran.append((stream, str(func)))
        written, read = [], []
        for i, argument in enumerate(func._schema.arguments):
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
            if argument.alias_info is None:
                read += tensors
            elif argument.alias_info.is_write:
                written += tensors
        for tensor in (*read, *written):
            self._heard(stream, self._of(tensor).written, func)
        for tensor in written:
            for use in self._of(tensor).read.items():
                self._heard(stream, use, func)
        result = func(*args, **kwargs)
        for tensor in read:
            self._of(tensor).read[stream] = time
        given = {_storage_of(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        written += [tensor for tensor in made if _storage_of(tensor) not in given]
        for tensor in written:
            memory = self._of(tensor)
            memory.written, memory.read = (stream, time), {}
        return result

    @staticmethod
    def _heard(stream: Stream, use: tuple[Stream, int], func: Any) -> None:
        other, time = use
        if not stream.knows(other, time):
            raise Misordered(f"{func} on {stream.name} uses what {other.name} may still be at")


def _storage_of(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """CPU tensors as a GPU's, to `side_stream`, which then asks the stand-ins."""
    made = World()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: made.current)
    monkeypatch.setattr(torch.cuda, "Stream", made.new_stream)
    monkeypatch.setattr(torch.cuda, "stream", made.on)
    monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: made.record_stream(tensor, stream))
    monkeypatch.setattr(_torch, "is_capturing", lambda: made.current.capture is not None)
    monkeypatch.setattr(side_stream, "_is_served", lambda x: type(x) is Tensor)
    monkeypatch.setattr(side_stream, "_streams", {})
    with made:
        yield made
    made.check()
