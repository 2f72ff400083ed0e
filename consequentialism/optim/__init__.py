"""Optimizers: `FusedSGD`, whose step is taken inside backward."""

from .fused_sgd import FusedSGD, LayerStep, SpentGradient

__all__ = ["FusedSGD", "LayerStep", "SpentGradient"]
