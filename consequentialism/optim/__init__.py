"""Optimizers: `Emended` steps any other in coordinates, `Muon` is one, `FusedSGD` steps inside backward."""

from .emended import Emended
from .fused_sgd import FusedSGD, LayerStep, SpentGradient
from .muon import Muon
from .rules import declare

__all__ = ["Emended", "FusedSGD", "LayerStep", "Muon", "SpentGradient", "declare"]
