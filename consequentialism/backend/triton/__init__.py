"""The ops as Triton kernels, with the functions and signatures of `consequentialism.ops` and `reference`.

Importing this imports Triton; `consequentialism.backend.dispatch` does so where it is asked for. With
``TRITON_INTERPRET=1`` the kernels run in Triton's interpreter, on CPU tensors too. torch.compile sees each op as one
call, as it sees the compiled ones; `launch` says why not through `torch.library.triton_op`.
"""

from __future__ import annotations

import torch

from ..flops import count_ops_of
from ..protocol import Limits
from ..schemas import COORDINATE_OPS, OPS, coordinate_wrappers, define, wrappers
from . import coordinates, launch
from .language import INTERPRETED as INTERPRETED
from .launch import breakdowns as breakdowns
from .plans import MAX_FUSED_ROWS

LIMITS = Limits(fused_rows=MAX_FUSED_ROWS)

_library = torch.library.Library("consequentialism_triton", "DEF")
_keys = ("CUDA", "CPU") if INTERPRETED else ("CUDA",)
define(_library, OPS, launch, _keys)
define(_library, COORDINATE_OPS, coordinates, _keys)
count_ops_of("consequentialism_triton")

_ops = wrappers("consequentialism_triton")
input_gram = _ops.input_gram
damped_inverse = _ops.damped_inverse
gram_inverse = _ops.gram_inverse
emended_input = _ops.emended_input
weight_grad = _ops.weight_grad
fused_weight_grad = _ops.fused_weight_grad
conv_gram = _ops.conv_gram

_coordinate_ops = coordinate_wrappers("consequentialism_triton")
decayed_gram = _coordinate_ops.decayed_gram
inverse_root = _coordinate_ops.inverse_root
root_product = _coordinate_ops.root_product
add_root_product_ = _coordinate_ops.add_root_product_
