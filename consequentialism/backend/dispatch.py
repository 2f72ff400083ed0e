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
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import _torch
from . import compiled as ops
from . import reference

AVAILABLE = "available"
MIN_TRITON = (3, 6)
_triton: ModuleType | None = None  # the Triton backend, once it was asked for and could be loaded


def _compiled(device_type: str) -> str:
    if ops.module is None:
        return f"no compiled extension: {ops.missing_reason}"
    if device_type in ops.device_types:
        return AVAILABLE
    if device_type == "cuda":
        built = ops.module.build_info()["cuda"]
        return "the extension was built for the CPU only" if built is None else "no CUDA kernels in this version"
    return f"the extension has no {device_type} kernels"


def _cuda() -> str:
    compiled = _compiled("cuda")
    if compiled == AVAILABLE and not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return compiled


def _load_triton() -> str:
    """Import Triton and the kernels where they can run.

    Triton decides whether it interprets when kernels are defined, so the variable must be set before the first call.
    """
    global _triton
    if _triton is not None:
        return AVAILABLE
    try:
        version = metadata.version("triton")
        installed = importlib.util.find_spec("triton") is not None
    except (ModuleNotFoundError, metadata.PackageNotFoundError):
        installed = False
    if not installed:
        return "Triton is not installed; `pip install triton` where there is a wheel for the platform"
    if tuple(int(part) for part in version.split(".")[:2]) < MIN_TRITON:
        return f"Triton {version} is too old, {'.'.join(map(str, MIN_TRITON))} is needed"
    interpreted = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
    if not interpreted and not torch.cuda.is_available():
        return "torch sees no CUDA device, and TRITON_INTERPRET=1 is not set"
    if not interpreted and torch.version.cuda and torch.cuda.get_device_capability() < (8, 0):
        return f"{torch.cuda.get_device_name()} has no tensor cores for these types, compute capability 8.0 is needed"
    try:
        if not interpreted and (reason := _launch_error()):
            return f"Triton {version} cannot launch kernels: {reason}"
        _triton = importlib.import_module(f"{__package__}.triton")
    except ImportError as error:
        return f"Triton {version} cannot be loaded: {error}"
    return AVAILABLE


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


def device_of(name: str) -> str:
    """The type of device that a backend serves; with ``TRITON_INTERPRET=1`` Triton serves CPU tensors."""
    if name == "triton" and _triton is not None and _triton.INTERPRETED:
        return "cpu"
    return "cuda" if name in ("cuda", "triton") else "cpu"


def backends() -> dict[str, str]:
    """Every backend's name with ``"available"``, or why it is not.

    Returns:
        A dict with the keys ``"cpu"``, ``"cuda"``, ``"triton"`` and ``"reference"``.
    """
    return {
        "cpu": _compiled("cpu"),
        "cuda": _cuda(),
        "triton": _load_triton(),
        "reference": AVAILABLE,
    }


def select(name: str, x: Tensor) -> Any:
    """The module that serves this call: `ops`, `triton` or `reference`, with the same functions.

    Raises:
        RuntimeError: The backend that was asked for by name is not available, or not for x's device.
    """
    device = x.device.type
    if name == "auto":
        # torch.func's transforms see through plain PyTorch, not through a compiled op.
        if _torch.transforms_active():
            return reference
        if device in ops.device_types:
            return ops
        if device == "cuda" and _load_triton() == AVAILABLE and not _triton.INTERPRETED:  # type: ignore[union-attr]
            return _triton
        return reference
    if name == "reference":
        return reference
    if name == device and device in ops.device_types:
        return ops
    if name == "triton" and _load_triton() == AVAILABLE and device in ("cuda", device_of(name)):
        return _triton
    state = backends()[name]
    if state != AVAILABLE:
        raise RuntimeError(f"backend={name!r} is not available: {state}. Allowed here: 'auto' or {_usable()}")
    raise RuntimeError(f"backend={name!r} serves {device_of(name)} tensors, x is on {x.device}; use backend='auto'")


def for_coordinates(x: Tensor) -> Any:
    """The module whose ops of steps in coordinates serve a tensor, as "auto" takes it."""
    module = select("auto", x)
    has_them = module is ops and x.device.type in ops.coordinate_device_types
    return module if has_them else reference


def _usable() -> str:
    return ", ".join(repr(name) for name, state in backends().items() if state == AVAILABLE)
