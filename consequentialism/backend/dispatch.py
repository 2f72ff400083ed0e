"""Picks the backend of a call and explains refusals.

``"auto"`` takes the compiled extension, then Triton, then the reference. A backend that the user names and
that cannot serve the call raises.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from importlib import metadata
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import _torch
from . import compiled, reference
from .protocol import Backend, CoordinateOps

AVAILABLE = "available"
MIN_TRITON = (3, 6)
MIN_CAPABILITY = (8, 0)  # of CUDA's and Triton's kernels: the first with tensor cores for all types
_triton: Any = None  # the Triton backend, once it was asked for and could be loaded


class Entry(Protocol):
    """A backend in `REGISTRY`, which may not be there."""

    def reason_unavailable(self) -> str | None:
        """Why it cannot be used on this machine, or None."""
        ...

    def backend(self) -> Backend:
        """The backend itself, where there is no reason."""
        ...

    def device_types(self) -> tuple[str, ...]:
        """The types of device whose tensors it serves; none, all of them."""
        ...

    def takes(self, device: torch.device) -> bool:
        """Whether ``"auto"`` takes it for tensors of that device, unless an earlier entry does."""
        ...


class Compiled:
    """The extension's kernels for one type of device."""

    def __init__(self, device_type: str) -> None:
        self.device_type = device_type

    def reason_unavailable(self) -> str | None:
        if compiled.module is None:
            return f"no compiled extension: {compiled.missing_reason}"
        if self.device_type not in compiled.device_types:
            if self.device_type != "cuda":
                return f"the extension has no {self.device_type} kernels"
            built = compiled.module.build_info()["cuda"]
            return "the extension was built for the CPU only" if built is None else "no CUDA kernels in this version"
        if self.device_type == "cuda" and not torch.cuda.is_available():
            return "torch sees no CUDA device"
        return reason_too_old(self.device_type)

    def backend(self) -> Backend:
        return compiled

    def device_types(self) -> tuple[str, ...]:
        return (self.device_type,)

    def takes(self, device: torch.device) -> bool:
        kind = device.type
        served = kind == self.device_type and kind in compiled.device_types
        return served and (kind != "cuda" or reason_too_old(kind, device.index) is None)


class Triton:
    """Triton's kernels, on CUDA; with ``TRITON_INTERPRET=1`` in its interpreter, which is for tests, by name."""

    def reason_unavailable(self) -> str | None:
        reason = _load_triton()
        return None if reason == AVAILABLE else reason

    def backend(self) -> Backend:
        backend: Backend = _triton
        return backend

    def device_types(self) -> tuple[str, ...]:
        return ("cpu", "cuda") if _triton is not None and _triton.INTERPRETED else ("cuda",)

    def takes(self, device: torch.device) -> bool:
        served = device.type == "cuda" and self.reason_unavailable() is None and not _triton.INTERPRETED
        return served and reason_too_old(device.type, device.index) is None


class Reference:
    """Plain PyTorch, everywhere."""

    def reason_unavailable(self) -> str | None:
        return None

    def backend(self) -> Backend:
        return reference

    def device_types(self) -> tuple[str, ...]:
        return ()

    def takes(self, device: torch.device) -> bool:
        return True


REGISTRY: dict[str, Entry] = {  # in the order of "auto"
    "cpu": Compiled("cpu"),
    "cuda": Compiled("cuda"),
    "triton": Triton(),
    "reference": Reference(),
}


def reason_too_old(device_type: str, index: int | None = None) -> str | None:
    """Why a GPU, by default the current one, has no kernels compiled for it, or None."""
    if device_type != "cuda" or not torch.version.cuda:
        return None
    return _reason_too_old(torch.cuda.current_device() if index is None else index)


@functools.cache
def _reason_too_old(index: int) -> str | None:
    if not torch.cuda.is_available() or torch.cuda.get_device_capability(index) >= MIN_CAPABILITY:
        return None
    name = torch.cuda.get_device_name(index)
    return f"{name} has no tensor cores for these types, compute capability 8.0 is needed"


def _load_triton() -> str:
    """Import Triton and the kernels where they can run.

    Triton decides whether it interprets when kernels are defined, so the variable must be set before the first call.
    """
    global _triton
    if _triton is not None:
        return AVAILABLE
    version = _installed_triton()
    if version is None:
        return "Triton is not installed; `pip install triton` where there is a wheel for the platform"
    if tuple(int(part) for part in version.split(".")[:2]) < MIN_TRITON:
        return f"Triton {version} is too old, {'.'.join(map(str, MIN_TRITON))} is needed"
    interpreted = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
    if not interpreted and not torch.cuda.is_available():
        return "torch sees no CUDA device, and TRITON_INTERPRET=1 is not set"
    if not interpreted and (reason := reason_too_old("cuda")):
        return reason
    try:
        if not interpreted and (reason := _launch_error()):
            return f"Triton {version} cannot launch kernels: {reason}"
        _triton = importlib.import_module(f"{__package__}.triton")
    except ImportError as error:
        return f"Triton {version} cannot be loaded: {error}"
    return AVAILABLE


@functools.cache  # a search of the path; `select` may ask at every call
def _installed_triton() -> str | None:
    """Triton's version; None, it is not installed. One that is installed later is seen by the next process."""
    try:
        version = metadata.version("triton")
        return None if importlib.util.find_spec("triton") is None else version
    except (ModuleNotFoundError, metadata.PackageNotFoundError):
        return None


@functools.cache
def _launch_error() -> str:
    """Why Triton cannot start a kernel on this machine, or nothing.

    It compiles its launcher with the machine's C compiler, which wants Python's headers.
    """
    driver = importlib.import_module("triton.runtime").driver
    try:
        driver.active.get_current_target()
    except Exception as error:  # a missing compiler, a failing one, a driver that is not found: each raises its own
        return f"{type(error).__name__}: {error}"
    return ""


# A first call may come while the compiler traces.
_torch.constant_while_tracing(_load_triton)
_torch.constant_while_tracing(reason_too_old)


def device_of(name: str) -> str:
    """A type of device that a backend serves, ``"auto"`` included."""
    served = REGISTRY[name].device_types() if name in REGISTRY else ()
    return (*served, "cpu")[0]


def backends() -> dict[str, str]:
    """Every backend's name with ``"available"``, or why it is not.

    Returns:
        A dict with the keys ``"cpu"``, ``"cuda"``, ``"triton"`` and ``"reference"``.
    """
    return {name: entry.reason_unavailable() or AVAILABLE for name, entry in REGISTRY.items()}


def select(name: str, x: Tensor) -> Backend:
    """The backend that serves this call.

    Raises:
        RuntimeError: The backend that was asked for by name is not available, or not for x's device.
    """
    device = x.device
    if name == "auto":
        # torch.func's transforms see through plain PyTorch, not through a compiled op.
        if _torch.transforms_active():
            return reference
        for entry in REGISTRY.values():  # the last one takes everything
            if entry.takes(device):
                return entry.backend()
    entry = REGISTRY[name]
    if entry.takes(device):
        return entry.backend()
    reason = entry.reason_unavailable() or reason_too_old(device.type, device.index)
    if reason is not None:
        raise RuntimeError(f"backend={name!r} is not available: {reason}. Allowed here: 'auto' or {_usable()}")
    if device.type not in entry.device_types():
        raise RuntimeError(f"backend={name!r} serves {device_of(name)} tensors, x is on {device}; use backend='auto'")
    return entry.backend()


def for_coordinates(x: Tensor) -> CoordinateOps:
    """The backend that ``"auto"`` takes for steps in coordinates: of the compiled ops, only where there are kernels."""
    chosen: Any = select("auto", x)
    without = chosen is compiled and x.device.type not in compiled.coordinate_device_types
    own: CoordinateOps = reference if without else chosen
    return own


def _usable() -> str:
    return ", ".join(repr(name) for name, state in backends().items() if state == AVAILABLE)
