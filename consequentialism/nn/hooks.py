"""This package's forward hooks on a user's layers: which optimizer they serve, and what is left of them in a copy."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from torch import nn

SCRIPTED = (
    "torch.jit.script compiles a module's hooks, and those of consequentialism.optim.Emended are none for it: script "
    "consequentialism.revert(copy.deepcopy(model)), or delete the optimizer first"
)


def spent() -> Callable[..., None]:
    """A hook that does nothing, of the standard library, so that a pickled model asks for no package."""
    return contextlib.nullcontext().__exit__


def is_spent(hook: Any) -> bool:
    return getattr(hook, "__func__", None) is contextlib.nullcontext.__exit__


def drop_spent(module: nn.Module) -> None:
    """Take the hooks off a module that do nothing, which `copy.deepcopy` and pickling leave in a copy."""
    for key in [key for key, hook in module._forward_hooks.items() if is_spent(hook)]:
        del module._forward_hooks[key]
        module._forward_hooks_with_kwargs.pop(key, None)


def stepped_by(module: nn.Module) -> str | None:
    """The optimizer that steps a layer in coordinates, if one does; its hooks say so."""
    names = (getattr(hook, "steps_in_coordinates", None) for hook in module._forward_hooks.values())
    return next((name for name in names if name is not None), None)
