"""Consequentialism weight updates: gradients that foresee what a step does to the rest of the mini-batch.

A step taken for one sample disturbs the outputs of the others, by the off-diagonal of the layer's input Gram.
The emended gradient ``dw = dy^T (x x^T + c I)^-1 x`` undoes that beforehand. `Linear`, the convolutions and
`Embedding` give it to any torch optimizer; `convert` puts them into an existing model.

Source: Paeedeh and Ghiasi-Shirazi, arXiv 2003.05164.
"""

from typing import TYPE_CHECKING, Any

from .autograd.side_stream import side_stream
from .backend import compiled as ops  # noqa: F401  (`consequentialism.ops`, the name that README gives)
from .backend import reference
from .backend.dispatch import backends
from .functional.conv import emended_conv, emended_conv_transpose, emended_conv_weight_grad
from .functional.linear import emended_linear, emended_weight_grad, predict_change
from .nn.conv import Conv1d, Conv2d, Conv3d
from .nn.conv_transpose import ConvTranspose1d, ConvTranspose2d, ConvTranspose3d
from .nn.convert import convert, param_groups, revert
from .nn.embedding import Embedding
from .nn.linear import Linear
from .nn.module import set_samples
from .nn.registry import register
from .nn.summary import summary
from .options import Options
from .version import __version__

if TYPE_CHECKING:
    from . import optim
    from .insight.diagnose import diagnose
    from .insight.find_damping import find_damping
    from .insight.monitor import Monitor

_LATE = {  # imported when first asked for
    "Monitor": ".insight.monitor",
    "diagnose": ".insight.diagnose",
    "find_damping": ".insight.find_damping",
    "optim": ".optim",
}

__all__ = [
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "Embedding",
    "Linear",
    "Monitor",
    "Options",
    "__version__",
    "backends",
    "convert",
    "diagnose",
    "emended_conv",
    "emended_conv_transpose",
    "emended_conv_weight_grad",
    "emended_linear",
    "emended_weight_grad",
    "find_damping",
    "optim",
    "param_groups",
    "predict_change",
    "reference",
    "register",
    "revert",
    "set_samples",
    "side_stream",
    "summary",
]


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    module = importlib.import_module(_LATE[name], __name__)
    globals()[name] = value = module if name == "optim" else getattr(module, name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATE})
