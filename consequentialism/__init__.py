"""Consequentialism weight updates: gradients that foresee what a step does to the rest of the mini-batch.

A step taken for one sample disturbs the outputs of the others, by the off-diagonal of the layer's input Gram.
The emended gradient ``dw = dy^T (x x^T + c I)^-1 x`` undoes that beforehand. `Linear`, the convolutions and
`Embedding` give it to any torch optimizer; `convert` puts them into an existing model.

Source: Paeedeh and Ghiasi-Shirazi, arXiv 2003.05164.
"""

from . import optim, reference
from .conv import Conv1d, Conv2d, Conv3d
from .conv_functional import emended_conv, emended_conv_transpose, emended_conv_weight_grad
from .conv_transpose import ConvTranspose1d, ConvTranspose2d, ConvTranspose3d
from .convert import convert, param_groups, revert
from .dispatch import backends
from .embedding import Embedding
from .functional import emended_linear, emended_weight_grad, predict_change
from .linear import Linear, set_samples
from .options import Options
from .registry import register
from .summary import summary
from .version import __version__

__all__ = [
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "Embedding",
    "Linear",
    "Options",
    "__version__",
    "backends",
    "convert",
    "emended_conv",
    "emended_conv_transpose",
    "emended_conv_weight_grad",
    "emended_linear",
    "emended_weight_grad",
    "optim",
    "param_groups",
    "predict_change",
    "reference",
    "register",
    "revert",
    "set_samples",
    "summary",
]
