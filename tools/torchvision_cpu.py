"""Lets the index's torchvision, built for CUDA, be imported beside a torch without it: timm needs its Python part.

`make .venv-ecosystem/.built` has Python import this when it starts. Just before torchvision is imported, the
operators are declared that torchvision describes whether its compiled part loads or not.
"""

from __future__ import annotations

import importlib.util
import sys
from typing import Any


class _Finder:
    """Declares the operators at torchvision's import, and finds nothing itself."""

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> None:
        if name != "torchvision":
            return
        sys.meta_path.remove(cls)  # type: ignore[arg-type]
        import torch

        package = importlib.util.find_spec(name)
        if torch.version.cuda is None and package is not None:
            for operator in ("nms", "qnms"):
                schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                torch.library.define(f"torchvision::{operator}", schema)


sys.meta_path.insert(0, _Finder)  # type: ignore[arg-type]
