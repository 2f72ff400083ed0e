"""The cost model: which form, and on which side the inverse is applied. The only place that decides.

All four ways give the same gradient (floating-point operations beyond plain backward, ``N`` rows, ``I``
inputs with the bias's, ``O`` outputs):

=======  ==========  ==========================  ==============  =====================  ==============
form     applied to  kept for backward           Gram            factor and inverse     application
=======  ==========  ==========================  ==============  =====================  ==============
dual     input       ``y = P x [N, I]``          ``N^2 I``       ``N^3``                ``2 N^2 I``
dual     gradient    ``x``, ``P [N, N]``         ``N^2 I``       ``N^3``                ``2 N^2 O``
primal   input       ``y = x P [N, I]``          ``N I^2``       ``I^3``                ``2 N I^2``
primal   gradient    ``x``, ``P [I, I]``         ``N I^2``       ``I^3``                ``2 O I^2``
=======  ==========  ==========================  ==============  =====================  ==============

Applied to the input, backward is plain backward with ``y`` in the place of ``x``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch

from .options import ConvMethod, Form, Options
from .reference import float32_is_enough


class Plan(NamedTuple):
    """``form`` of the Gram and the side that the inverse is ``applied_to``."""

    form: Form
    applied_to: Literal["input", "gradient"]


def flops(plan: Plan, rows: int, inputs: int, outputs: int) -> int:
    """Operations beyond plain backward; a symmetric product counts half."""
    n, m = (rows, inputs) if plan.form == "dual" else (inputs, rows)
    applied = m if plan.applied_to == "input" else outputs
    return n * n * m + n * n * n + 2 * n * n * applied


def floor(rows: int, inputs: int, outputs: int) -> int:
    """The fewest operations beyond plain backward over all plans."""
    return min(flops(plan, rows, inputs, outputs) for plan in _PLANS)


_PLANS = (Plan("dual", "input"), Plan("primal", "input"), Plan("dual", "gradient"), Plan("primal", "gradient"))


def choose(rows: int, inputs: int, outputs: int, dtype: torch.dtype, options: Options) -> Plan:
    """The cheapest plan that keeps the digits.

    Half types and ill-conditioned Grams are applied to the input only: there the result is rounded once,
    after the inverse; on the gradient's side the rounding would be amplified by the condition number.
    """
    enough = float32_is_enough(min(rows, inputs), options.damping, options.damping_mode)
    well_conditioned = dtype == torch.float64 or (dtype == torch.float32 and enough)
    plans = _PLANS if well_conditioned else _PLANS[:2]
    best = plans[0]
    for plan in plans[1:]:  # not min(key=...), which torch.compile does not trace over symbolic sizes
        if flops(plan, rows, inputs, outputs) < flops(best, rows, inputs, outputs):
            best = plan
    return best


def conv_form(rows: int, inputs: int) -> Form:
    """The form of a convolution's Gram; the inverse is always applied to the gradient, in the type that allows it."""
    return "dual" if rows < inputs else "primal"


# Channels from which on BLAS multiplies blocks [C, C] as fast as whole Grams; below, in proportion (two cores).
_FULL_SPEED_CHANNELS = 32


def conv_method(channels: int, kernel: Sequence[int], stride: Sequence[int], positions: Sequence[int]) -> ConvMethod:
    """How the CPU sums up a convolution's Gram: from unfolded patches, or from ``x`` times itself displaced.

    Args:
        channels: ``C`` of one group.
        positions: Output positions along each dimension.
    """
    if any(s != 1 for s in stride) or math.prod(kernel) == 1:
        return "direct"
    displaced = displaced_flops(channels, kernel, positions) * max(1.0, _FULL_SPEED_CHANNELS / channels)
    return "displaced" if displaced < direct_flops(channels, kernel, positions) else "direct"


def direct_flops(channels: int, kernel: Sequence[int], positions: Sequence[int]) -> float:
    """Operations of one sample and group for ``x^T x`` of its patches; a symmetric product counts half."""
    return math.prod(positions) * float(channels * math.prod(kernel)) ** 2


def displaced_flops(channels: int, kernel: Sequence[int], positions: Sequence[int]) -> float:
    """The same where taps with the same displacement share a product, but for two strips at the border each."""
    taps = math.prod(kernel)
    unique = (math.prod([2 * k - 1 for k in kernel]) + 1) // 2
    padded = math.prod([p + k - 1 for p, k in zip(positions, kernel, strict=True)])
    strips = (taps * (taps + 1) // 2 - unique) * 2 * math.prod(positions) / min(positions)
    return 2.0 * channels**2 * (unique * padded + strips)
