"""The demo: one network on real handwritten digits, plain against emended optimizers."""

from .main import main

__all__ = ["main"]
