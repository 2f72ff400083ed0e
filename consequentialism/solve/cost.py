"""The cost model: which form, which solver, and on which side. The only place that decides.

All ways give the same gradient (floating-point operations beyond plain backward, ``N`` rows, ``I``
inputs with the bias's, ``O`` outputs):

=======  ==========  ==========================  ==============  =====================  ==============
form     applied to  kept for backward           Gram            factor and inverse     application
=======  ==========  ==========================  ==============  =====================  ==============
dual     input       ``y = P x [N, I]``          ``N^2 I``       ``N^3``                ``2 N^2 I``
dual     gradient    ``x``, ``P [N, N]``         ``N^2 I``       ``N^3``                ``2 N^2 O``
primal   input       ``y = x P [N, I]``          ``N I^2``       ``I^3``                ``2 N I^2``
primal   gradient    ``x``, ``P [I, I]``         ``N I^2``       ``I^3``                ``2 O I^2``
=======  ==========  ==========================  ==============  =====================  ==============

Applied to the input, backward is plain backward with ``y`` in the place of ``x``. Conjugate gradients, always primal
and applied to the gradient (see `conjugate`), have no factor and do the application once an iteration: ``2 O I^2``
with the stored Gram, or ``4 O N I`` with ``x`` and ``x^T`` one after the other and no Gram.

On a GPU a small layer is all launches. There `is_fused` replaces a dual plan by one that keeps ``x`` alone and computes
everything in backward, by the one launch of ``fused_weight_grad``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..options import ConvMethod, Form, Options
from ..precision import GramType, compute_dtype, gram_type, keeps_digits
from .conjugate import error_bound

Side = Literal["input", "gradient", "fused"]  # the last: to neither, one launch in backward does all; see `is_fused`

# Measured on two cores, see docs/solvers.md; nobody has on a GPU.
FACTOR_TIME = 2  # of an operation of factor and inverse, in those of a product: 1.7 at I = 1152, 2.2 at I = 2304
FEWEST_OUTPUTS = 64  # with fewer a product waits for memory: 16 take as long as 43 to 107 would

# Up to so many rows, and weights, one launch is taken to be faster than six. Predicted: no GPU has measured it; the
# rows of the op fused_weight_grad in `python -m consequentialism bench` say where it holds.
FUSED_DEVICES = ("cuda",)
FUSED_ROWS = {torch.float64: 64, torch.float32: 128, torch.bfloat16: 128, torch.float16: 128}
FUSED_WEIGHTS = 4 * 2**20


class Plan(NamedTuple):
    """How a call is emended, decided once in a forward.

    Attributes:
        form: The form of the Gram, dual or primal.
        applied_to: The side on which the inverse is applied.
        solver: How the system is solved.
        gram: Whether conjugate gradients store the Gram or multiply by ``x`` and ``x^T``.
        type: The type of the Gram and its inverse.
    """

    form: Form
    applied_to: Side
    solver: Literal["cholesky", "cg"] = "cholesky"
    gram: Literal["stored", "free"] = "stored"
    type: GramType = GramType()

    @property
    def dtype(self) -> torch.dtype:
        """The Gram's type where nobody looks at it first."""
        assert self.type.dtype is not None
        return self.type.dtype


def flops(plan: Plan, rows: int, inputs: int, outputs: int, iterations: int = 0, factor: int = 1) -> int:
    """Operations beyond plain backward; a symmetric product counts half, an operation of the factor ``factor`` times.

    With few outputs conjugate gradients wait for memory, and count as many operations as would take as long.
    """
    n, m = (rows, inputs) if plan.form == "dual" else (inputs, rows)
    if plan.solver == "cg":
        gram, product = (n * n * m, 2 * n * n) if plan.gram == "stored" else (0, 4 * n * m)
        return gram + iterations * (product + 10 * n) * max(outputs, FEWEST_OUTPUTS)
    applied = m if plan.applied_to == "input" else outputs
    return n * n * m + factor * n * n * n + 2 * n * n * applied


def min_flops(rows: int, inputs: int, outputs: int) -> int:
    """The fewest operations beyond plain backward over all plans with a factor."""
    return min(flops(plan, rows, inputs, outputs) for plan in _PLANS)


_PLANS = (Plan("dual", "input"), Plan("primal", "input"), Plan("dual", "gradient"), Plan("primal", "gradient"))
_CG_PLANS = (Plan("primal", "gradient", "cg", "stored"), Plan("primal", "gradient", "cg", "free"))


def choose(rows: int, inputs: int, outputs: int, dtype: torch.dtype, options: Options) -> Plan:
    """The cheapest plan that keeps the digits, its Gram's type left open.

    Half-precision types and ill-conditioned Grams with a factor are applied to the input only: there the result is
    rounded once, after the inverse; on the gradient's side the rounding would be amplified by the condition number.
    """
    sizes = (rows, inputs, outputs)
    if options.solver == "cg":
        return _cheapest(_CG_PLANS, sizes, options.iterations)
    well_conditioned = keeps_digits(rows, inputs, dtype, options.damping, options.damping_mode)
    direct = _cheapest(_PLANS if well_conditioned else _PLANS[:2], sizes, 0)
    if not cg_is_accurate(inputs, dtype, options):
        return direct
    cg = _cheapest(_CG_PLANS, sizes, options.iterations)
    return cg if cg_is_cheaper(cg, direct, sizes, options) else direct


def cg_is_accurate(inputs: int, dtype: torch.dtype, options: Options) -> bool:
    """Whether conjugate gradients are sure to be off by less than rounding. The rows, which may vary, do not matter."""
    if options.solver == "cholesky" or options.damping_mode == "absolute" or options.process_group is not None:
        return False
    return inputs <= max_rank_over_damping(options.iterations, torch.finfo(dtype).eps / 2) * options.damping


def cg_is_cheaper(cg: Plan, direct: Plan, sizes: tuple[int, int, int], options: Options) -> bool:
    """Whether ``solver="auto"`` takes conjugate gradients where it may: where they are cheaper."""
    rows, inputs, outputs = sizes
    if rows < inputs:  # the dual form is then smaller, and rounds less where the rows are nearly alike
        return False
    if rows + inputs <= options.iterations * max(outputs, FEWEST_OUTPUTS):  # a factor is then always cheaper
        return False
    return flops(cg, *sizes, options.iterations) < flops(direct, *sizes, factor=FACTOR_TIME)


def _cheapest(plans: Iterable[Plan], sizes: tuple[int, int, int], iterations: int) -> Plan:
    best, *others = plans
    for plan in others:  # not min(key=...), which torch.compile does not trace over symbolic sizes
        if flops(plan, *sizes, iterations) < flops(best, *sizes, iterations):
            best = plan
    return best


def is_fused(plan: Plan, rows: int, inputs: int, outputs: int, dtype: torch.dtype, device_type: str) -> bool:
    """Whether the gradient of ``x [N, I]``, ``I`` without the bias's, is better computed whole in backward."""
    return (
        device_type in FUSED_DEVICES
        and plan.solver == "cholesky"
        and plan.form == "dual"
        and rows <= FUSED_ROWS[dtype]
        and inputs * outputs <= FUSED_WEIGHTS
        and plan.type.dtype == compute_dtype(dtype)
    )


def plan(x: Tensor, bias: bool, outputs: int, options: Options, fused_rows: int = 0) -> Plan:
    """How the gradient of a linear layer with the input ``x [..., I]`` is emended: asked once in a forward.

    Args:
        bias: Whether the layer has a bias, which then stands in the Gram.
        outputs: ``O``.
        fused_rows: Up to how many rows the caller's backward can do everything in one launch.
    """
    rows, inputs = math.prod(x.shape[:-1]), x.shape[-1]
    known = _is_known(rows, inputs, outputs, options)
    return (_known_plan if known else _plan)(rows, inputs, bias, outputs, x.dtype, x.device.type, options, fused_rows)


def _plan(
    rows: int,
    inputs: int,
    bias: bool,
    outputs: int,
    dtype: torch.dtype,
    device_type: str,
    options: Options,
    fused_rows: int,
) -> Plan:
    kind = gram_type(rows, inputs + bias, dtype, options.damping, options.damping_mode, device_type)
    chosen = choose(rows, inputs + bias, outputs, dtype, options)._replace(type=kind)
    if rows <= fused_rows and is_fused(chosen, rows, inputs, outputs, dtype, device_type):
        return chosen._replace(applied_to="fused")
    return chosen


_known_plan = functools.lru_cache(maxsize=4096)(_plan)  # the same few layers, at every step


def _is_known(rows: int, inputs: int, outputs: int, options: Options) -> bool:
    """Whether a plan may be remembered: a tracer's symbols have no hash, and a batch's own count must not be kept."""
    return type(rows) is type(inputs) is type(outputs) is int and options.samples is None


def plan_of_ranks(rows: int, inputs: int, dtype: torch.dtype, device_type: str, options: Options) -> Plan:
    """How the gradient of a linear layer is emended whose ``N`` rows lie on several ranks.

    The dual form needs all ranks' rows everywhere, the primal one their summed Gram.
    """
    kind = gram_type(rows, inputs, dtype, options.damping, options.damping_mode, device_type)
    return Plan("dual" if rows <= inputs else "primal", "input", type=kind)


@functools.lru_cache(maxsize=64)
def max_rank_over_damping(iterations: int, allowed: float) -> float:
    """A ``rank / damping`` up to which conjugate gradients are sure to be off by no more than ``allowed``; or 0.

    Off in the gradient's own norm, relative to the gradient, which costs the root of the condition number.
    """
    largest, ratio = 0.0, 1.0
    while math.sqrt(1 + ratio) * error_bound(ratio, iterations) <= allowed:
        largest, ratio = ratio, 1.25 * ratio
    return largest


def conv_plan(rows: int, inputs: int, outputs: int, dtype: torch.dtype, device_type: str, options: Options) -> Plan:
    """How the gradient of a convolution is emended, ``outputs`` of one group: by a stored Gram, on the gradient's side.

    The rows of all ranks count, which the primal form does not need to see.
    """
    kind = gram_type(rows, inputs, dtype, options.damping, options.damping_mode, device_type)
    smaller: Form = "dual" if rows < inputs and options.process_group is None else "primal"
    direct, sizes = Plan(smaller, "gradient", type=kind), (rows, inputs, outputs)
    if options.solver == "cg" or (
        cg_is_accurate(inputs, dtype, options) and cg_is_cheaper(_CG_PLANS[0], direct, sizes, options)
    ):
        return _CG_PLANS[0]._replace(type=kind)
    return direct


# To a multiple of which the kernel for displaced products multiplies; what is too much costs less than in proportion.
_TILE_CHANNELS = 4
_TILE_COST = 1.5  # exponent of its ratio to the channels, fitted to timings on one processor with AVX-512


# On a GPU displaced products are made in tiles of 128 x 128, of which fewer channels fill too little. Both ways then
# reach the same rate, but the displaced one has a launch more. Predicted: no GPU has measured it.
CUDA_CHANNELS = 48
CUDA_GAIN = 1.4  # of operations, from which on it is taken


def conv_method(
    device_type: str,
    channels: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    positions: Sequence[int],
) -> ConvMethod:
    """How a convolution's Gram is summed up: from its patches, or from ``x`` times itself displaced.

    Args:
        device_type: The type of device; the answer is ``"direct"`` for one that has neither kernel. A kernel that
            finds no room for displaced products takes patches.
        channels: ``C`` of one group.
        positions: Output positions along each dimension.
    """
    if any(s != 1 for s in stride) or math.prod(kernel) == 1:
        return "direct"
    if device_type == "cpu":
        multiplied = -(-channels // _TILE_CHANNELS) * _TILE_CHANNELS
        displaced = displaced_flops(channels, kernel, positions) * multiplied**_TILE_COST
        direct = (
            direct_flops(channels, kernel, positions) * channels**_TILE_COST
        )  # no quotient: there may be no channels
        return "displaced" if displaced < direct else "direct"
    if device_type != "cuda" or channels < CUDA_CHANNELS:
        return "direct"
    # All taps' windows of positions must share some.
    if any(k > 1 and (d > 1 or p < k) for k, d, p in zip(kernel, dilation, positions, strict=True)):
        return "direct"
    gain = math.prod(kernel) ** 2 / (2 * displacements(kernel))
    return "displaced" if gain >= CUDA_GAIN else "direct"


def displacements(kernel: Sequence[int]) -> int:
    """How many displacements pairs of kernel offsets have, one and its opposite counted once."""
    return (math.prod([2 * k - 1 for k in kernel]) + 1) // 2


def direct_flops(channels: int, kernel: Sequence[int], positions: Sequence[int]) -> float:
    """Operations of one sample and group for ``x^T x`` of its patches; a symmetric product counts half."""
    return math.prod(positions) * float(channels * math.prod(kernel)) ** 2


def displaced_flops(channels: int, kernel: Sequence[int], positions: Sequence[int]) -> float:
    """Operations where kernel offsets at the same distance share a product, but for a strip at the border each.

    There are two, of which one lies in the padding where that keeps the size.
    """
    taps = math.prod(kernel)
    unique = displacements(kernel)
    lines = math.prod(positions[:-1]) * (positions[-1] + kernel[-1] - 1)
    strips = (taps * (taps + 1) // 2 - unique) * math.prod(positions) / min(positions)
    return 2.0 * channels**2 * (unique * lines + strips)
