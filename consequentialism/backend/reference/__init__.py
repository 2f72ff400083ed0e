"""Every formula in plain PyTorch: any dtype, any device. Every other backend is tested against this.

``N`` rows, ``I`` inputs, ``O`` outputs; ``x [N, I]``, ``dy [N, O]``, ``dw [O, I]``, ``db [O]``. With
``bias`` every formula reads ``x`` with a constant 1 appended, so ``I`` counts it. Half-precision types are computed
in float32, float32 and float64 as they are. Nothing here synchronises the host.

Source: Paeedeh and Ghiasi-Shirazi, arXiv 2003.05164; the derivation is in docs/method.md.
"""

from __future__ import annotations

from ...precision import MAX_FLOAT32_CONDITION as MAX_FLOAT32_CONDITION
from ...precision import MAX_FLOAT32_CONDITION_HALF as MAX_FLOAT32_CONDITION_HALF
from ...precision import MAX_FLOAT32_CONDITION_TALL as MAX_FLOAT32_CONDITION_TALL
from ...precision import compute_dtype as compute_dtype
from ...precision import emended_dtype as emended_dtype
from ...precision import float32_is_enough as float32_is_enough
from ...precision import max_float32_condition as max_float32_condition
from ..protocol import Limits
from .convolution import ConvBlock as ConvBlock
from .convolution import check_conv as check_conv
from .convolution import conv_blocks as conv_blocks
from .convolution import conv_errors as conv_errors
from .convolution import conv_gram as conv_gram
from .convolution import conv_output_size as conv_output_size
from .convolution import conv_patches as conv_patches
from .convolution import conv_transpose_patches as conv_transpose_patches
from .convolution import emended_conv_transpose_weight_grad as emended_conv_transpose_weight_grad
from .convolution import emended_conv_weight_grad as emended_conv_weight_grad
from .coordinates import add_root_product_ as add_root_product_
from .coordinates import block_order as block_order
from .coordinates import block_spans as block_spans
from .coordinates import decayed_gram as decayed_gram
from .coordinates import inverse_root as inverse_root
from .coordinates import root_product as root_product
from .coordinates import steps_of as steps_of
from .embedding import embedding_counts as embedding_counts
from .embedding import embedding_occurrences as embedding_occurrences
from .embedding import emended_embedding_grad as emended_embedding_grad
from .embedding import emended_embedding_rows as emended_embedding_rows
from .linear import LARGEST_DAMPING as LARGEST_DAMPING
from .linear import NOTHING_BESIDE as NOTHING_BESIDE
from .linear import RETRIES as RETRIES
from .linear import apply_inverse as apply_inverse
from .linear import damped_inverse as damped_inverse
from .linear import emended_input as emended_input
from .linear import emended_weight_grad as emended_weight_grad
from .linear import fused_weight_grad as fused_weight_grad
from .linear import gram_inverse as gram_inverse
from .linear import input_gram as input_gram
from .linear import inverse_with as inverse_with
from .linear import limited_damping as limited_damping
from .linear import out_of_unit as out_of_unit
from .linear import plain_weight_grad as plain_weight_grad
from .linear import poison_of as poison_of
from .linear import poisoned as poisoned
from .linear import predict_change as predict_change
from .linear import ridge as ridge
from .linear import separate as separate
from .linear import unit_near as unit_near
from .linear import unit_of as unit_of
from .linear import weight_grad as weight_grad

LIMITS = Limits(fused_rows=128)  # as the compiled kernels
