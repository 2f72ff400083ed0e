"""Picks the backend of a call and explains refusals.

``"auto"`` takes the compiled extension, then Triton, then the reference. A backend that the user names and
that cannot serve the call raises.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import ops, reference

AVAILABLE = "available"


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


def backends() -> dict[str, str]:
    """Every backend's name with ``"available"``, or why it is not.

    Returns:
        A dict with the keys ``"cpu"``, ``"cuda"``, ``"triton"`` and ``"reference"``.
    """
    return {
        "cpu": _compiled("cpu"),
        "cuda": _cuda(),
        "triton": "no Triton kernels in this version",
        "reference": AVAILABLE,
    }


def select(name: str, x: Tensor) -> Any:
    """The module that serves this call: `ops` or `reference`, with the same functions.

    Raises:
        RuntimeError: The backend that was asked for by name is not available, or not for x's device.
    """
    device = x.device.type
    if name == "auto":
        # torch.func's transforms see through plain PyTorch, not through a compiled op.
        transformed = torch._C._are_functorch_transforms_active()
        return ops if device in ops.device_types and not transformed else reference
    if name == "reference":
        return reference
    if name == device and device in ops.device_types:
        return ops
    state = backends()[name]
    if state != AVAILABLE:
        raise RuntimeError(f"backend={name!r} is not available: {state}. Allowed here: 'auto' or {_usable()}")
    raise RuntimeError(f"backend={name!r} serves {name} tensors, x is on {x.device}; use backend='auto'")


def _usable() -> str:
    return ", ".join(repr(name) for name, state in backends().items() if state == AVAILABLE)
