"""The formulas of linear layers: Gram, damped inverse, emended input and gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from ...options import DampingMode, Form, Ridge, Scale
from ...precision import compute_dtype, emended_dtype, told_dtype
from ...precision import gram_dtype as precise_dtype

RETRIES = 3  # a factor that breaks down is tried again with 10, 100 and 1000 times the ridge


# A relative damping above the first is taken as the second, which in that type leaves nothing of the Gram beside it.
LARGEST_DAMPING = 2.0**80
NOTHING_BESIDE = {torch.float32: 2.0**40, torch.float64: 2.0**80}


def limited_damping(damping: float, damping_mode: DampingMode, dtype: torch.dtype) -> tuple[float, float]:
    """A damping whose ridge stays in the range of a Gram's type, and the factor by which its inverse is then too large.

    ``G + c I`` is ``c I`` to the last bit long before ``c`` overflows.
    """
    if damping_mode == "absolute" or damping <= LARGEST_DAMPING:
        return damping, 1.0
    limit = NOTHING_BESIDE[dtype]
    return limit, limit / damping


def unit_of(x: Tensor, bias: bool, damping_mode: DampingMode) -> Tensor:
    """A power of two, 0-dimensional, near the largest entry of ``x``: in this unit its squares stay in range.

    A bias's column of ones, and an absolute ridge, are in range and large beside a small ``x``: 1 is then the least.
    """
    return unit_near(x.abs().amax() if x.numel() > 0 else x.new_zeros(()), bias, damping_mode)


def unit_near(largest: Tensor, bias: bool, damping_mode: DampingMode) -> Tensor:
    """`unit_of` inputs with these largest entries, of any shape."""
    unit = largest / (2 * torch.frexp(largest).mantissa)  # exact
    least = 1.0 if bias or damping_mode == "absolute" else 0.0
    return torch.where((largest > 0) & largest.isfinite(), unit.clamp(min=least), torch.ones_like(unit))


def out_of_unit(emended: Tensor, unit: Tensor, scale: Scale) -> Tensor:
    """An emended input or gradient of ``x / unit`` as that of ``x``."""
    return emended * unit if scale == "gradient" else emended / unit


def _rows(x: Tensor, bias: bool) -> Tensor:
    x = x.to(compute_dtype(x.dtype))
    return torch.cat([x, x.new_ones(x.shape[0], 1)], dim=1) if bias else x


def input_gram(x: Tensor, bias: bool, form: Form) -> Tensor:
    """``x x^T [N, N]`` (dual) or ``x^T x [I, I]`` (primal)."""
    rows = _rows(x, bias)
    return rows @ rows.T if form == "dual" else rows.T @ rows


def ridge(gram: Tensor, damping: float, damping_mode: DampingMode, rank: int) -> Tensor:
    """The absolute ridge ``c`` of each Gram: ``damping * trace(G) / rank``, or ``damping``; ``[...]``."""
    if damping_mode == "absolute":
        return gram.new_full(gram.shape[:-2], damping)
    return damping * gram.diagonal(dim1=-2, dim2=-1).sum(-1) / rank


def damped_inverse(
    gram: Tensor, damping: float, damping_mode: DampingMode, scale: Scale, rank: int, rows: int
) -> Tensor:
    """``scale * (G + c I)^-1 [..., n, n]``, through a Cholesky factor.

    Args:
        gram: Symmetric ``[..., n, n]``, of which every entry is read.
        rank: ``min(N, I)``, what a relative damping is relative to.
        rows: ``N``, the multiplier of ``scale="nlms"``; a convolution's batch size.

    Zero where the trace is zero and NaN where it is not finite. Where the factor breaks down the ridge
    grows tenfold, at most three times; then the Gram's diagonal stands in for it.
    """
    limited, excess = limited_damping(damping, damping_mode, gram.dtype)
    c = ridge(gram, limited, damping_mode, rank)
    inverse = inverse_with(gram, c, scale, rows)
    return inverse if excess == 1 or scale == "gradient" else inverse * excess


def inverse_with(gram: Tensor, c: Tensor, scale: Scale, rows: int) -> Tensor:
    """`damped_inverse` with the ridges ``c [...]`` as they are."""
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    c = c[..., None, None]
    c = torch.where(trace == 0, torch.ones_like(c), c)
    growth = 10.0 ** torch.arange(RETRIES + 1, dtype=gram.dtype, device=gram.device)
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    attempts = gram[..., None, :, :] + c[..., None] * growth[:, None, None] * eye  # [..., 4, n, n]
    lower, info = torch.linalg.cholesky_ex(attempts)
    works = (info == 0) & lower.diagonal(dim1=-2, dim2=-1).isfinite().all(-1)  # [..., 4]
    any_works = works.any(-1)[..., None, None]
    first = works.to(torch.int64).argmax(-1)[..., None, None, None]
    chosen = torch.take_along_dim(lower, first, -3).squeeze(-3)  # [..., n, n]
    chosen = torch.where(any_works, chosen, eye)
    diagonal = torch.diag_embed(1 / (gram.diagonal(dim1=-2, dim2=-1) + c[..., 0]))
    # On the CPU the more accurate of the two; on a GPU it waits for the device.
    on_cpu = gram.device.type == "cpu"
    solved = torch.cholesky_inverse(chosen) if on_cpu else torch.cholesky_solve(eye.expand_as(chosen), chosen)
    inverse = torch.where(any_works, solved, diagonal)
    if scale == "nlms":
        inverse = inverse * rows
    elif scale == "gradient":
        inverse = inverse * c
    inverse = torch.where(trace == 0, torch.zeros_like(inverse), inverse)
    return torch.where(trace.isfinite(), inverse, torch.full_like(inverse, torch.nan))


def gram_inverse(
    x: Tensor,
    bias: bool,
    form: Form,
    damping: float,
    damping_mode: DampingMode,
    scale: Scale,
    gram_dtype: torch.dtype | None = None,
    narrow_up_to: float = 0.0,
) -> Tensor:
    """``scale * (x x^T + c I)^-1 [N, N]`` (dual) or ``scale * (x^T x + c I)^-1 [I, I]`` (primal).

    Args:
        gram_dtype: The type of the Gram, and of the inverse until it is returned: float64 where float32 would lose its
            digits, as `precision.gram_type` decides; None, the type of sums over ``x``.
        narrow_up_to: For backends that look at the Gram; see `precision.GramType`.
    """
    inverse, _, unit = _wide_inverse(x, bias, form, Ridge(damping, damping_mode, scale), gram_dtype)
    if scale != "gradient":  # there c and the Gram have the same unit
        inverse = inverse / unit / unit
    return inverse.to(compute_dtype(x.dtype))


def _wide_inverse(
    x: Tensor, bias: bool, form: Form, own: Ridge, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`gram_inverse` of ``x / unit``, its rows with the bias's column ``[N, I]``, and the unit, as `unit_of`.

    Args:
        dtype: The type in which all are computed; None, that of sums over ``x``.
    """
    rows, inputs = x.shape[0], x.shape[1] + bias
    rank = max(min(rows, inputs), 1)
    x = x.to(told_dtype(x.dtype, dtype))
    unit = unit_of(x, bias, own.damping_mode)
    scaled = _rows(x, bias) / unit
    gram = input_gram(scaled, False, form)
    if own.damping_mode == "absolute":
        return inverse_with(gram, gram.new_full((), own.damping) / unit / unit, own.scale, rows), scaled, unit
    return damped_inverse(gram, *own, rank, rows), scaled, unit


def apply_inverse(inverse: Tensor, x: Tensor, bias: bool, form: Form) -> tuple[Tensor, Tensor]:
    """The emended input ``P x`` (dual) or ``x P`` (primal), and its column for the bias, ``[N]``.

    The first is ``[N, I]``, without the bias's column, which is the second.
    """
    rows = _rows(x, bias)
    emended = inverse @ rows if form == "dual" else rows @ inverse
    if bias:
        return emended[:, :-1].contiguous(), emended[:, -1].contiguous()
    return emended, emended.new_zeros(0)


def emended_input(
    x: Tensor,
    bias: bool,
    form: Form,
    damping: float,
    damping_mode: DampingMode,
    scale: Scale,
    gram_dtype: torch.dtype | None = None,
    narrow_up_to: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """``y = scale * (x x^T + c I)^-1 x`` ``[N, I]`` and its column for the bias ``[N]``.

    ``dw = dy^T y`` and ``db = dy^T u`` are then the emended gradients. bfloat16 gives a bfloat16 ``y``,
    float16 a float32 one (its range is too small); ``u`` is always in the type computed in.
    """
    inverse, rows, unit = _wide_inverse(x, bias, form, Ridge(damping, damping_mode, scale), gram_dtype)
    emended = out_of_unit(inverse @ rows if form == "dual" else rows @ inverse, unit, scale)
    column = emended[:, -1] if bias else emended.new_zeros(0)
    emended = emended[:, :-1] if bias else emended
    return emended.to(emended_dtype(x.dtype)).contiguous(), column.to(compute_dtype(x.dtype)).contiguous()


def weight_grad(dy: Tensor, rows: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
    """``dw = dy^T rows [O, I]`` and ``db = dy^T column [O]`` (empty where ``column`` is), in dy's type.

    With emended rows these are the emended gradients; with ``x`` and ones, the plain ones. One infinity or NaN
    in ``dy [N, O]`` makes every entry NaN.
    """
    errors = poisoned(dy)
    dw = errors.to(rows.dtype).T @ rows
    db = errors.to(column.dtype).T @ column if column.shape[0] else errors.new_zeros(0)
    return dw.to(dy.dtype), db.to(dy.dtype)


def fused_weight_grad(
    x: Tensor,
    dy: Tensor,
    bias: bool,
    damping: float,
    damping_mode: DampingMode,
    scale: Scale,
    gram_dtype: torch.dtype | None = None,
    narrow_up_to: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """``dw [O, I]`` and ``db [O]`` (empty without a bias) of ``x [N, I]`` and ``dy [N, O]``: all in one."""
    if x.shape[0] == 0:
        return dy.new_zeros(dy.shape[1], x.shape[1]), dy.new_zeros(dy.shape[1] if bias else 0)
    form: Form = "dual" if x.shape[0] <= x.shape[1] + bias else "primal"
    return weight_grad(dy, *emended_input(x, bias, form, damping, damping_mode, scale, gram_dtype))


def poison_of(tensor: Tensor) -> Tensor:
    """0, or NaN where one entry is not finite; 0-dimensional. What it is added to is then NaN everywhere."""
    return (0 * tensor).sum()


def poisoned(dy: Tensor) -> Tensor:
    """``dy``, or NaN everywhere where one entry is not finite."""
    return dy + poison_of(dy)


def emended_weight_grad(
    x: Tensor,
    dy: Tensor,
    bias: bool = True,
    *,
    form: Form | None = None,
    damping: float = 1.0,
    damping_mode: DampingMode = "relative",
    scale: Scale = "nlms",
) -> tuple[Tensor, Tensor | None]:
    """``dw [O, I] = dy^T (x x^T + c I)^-1 x`` (dual) ``= (dy^T x) (x^T x + c I)^-1`` (primal), and ``db [O]``.

    Args:
        form: ``"dual"``, ``"primal"`` or None, the smaller one. Both are equal for every ``c > 0``.
    """
    if x.shape[0] == 0:
        zeros = dy.new_zeros(dy.shape[1], x.shape[1])
        return zeros, dy.new_zeros(dy.shape[1]) if bias else None
    if form is None:
        form = "dual" if x.shape[0] <= x.shape[1] + bias else "primal"
    dtype = precise_dtype(x.shape[0], x.shape[1] + bias, x.dtype, damping, damping_mode, x.device.type)
    inverse, rows, unit = _wide_inverse(x, bias, form, Ridge(damping, damping_mode, scale), dtype)
    errors = poisoned(dy).to(rows.dtype)
    dw = errors.T @ (inverse @ rows) if form == "dual" else (errors.T @ rows) @ inverse
    dw = out_of_unit(dw, unit, scale).to(dy.dtype)
    return separate(dw) if bias else (dw, None)


def separate(gradients: Tensor) -> tuple[Tensor, Tensor]:
    """``dw [O, I]`` and ``db [O]`` from a matrix that has the second as its last column, each in memory of its own."""
    dw = gradients[:, :-1].clone(memory_format=torch.contiguous_format)
    return dw, gradients[:, -1].clone(memory_format=torch.contiguous_format)


def plain_weight_grad(x: Tensor, dy: Tensor, bias: bool = True) -> tuple[Tensor, Tensor | None]:
    """The plain gradients of backpropagation: ``dy^T x [O, I]`` and ``sum dy [O]``."""
    return dy.T @ x, dy.sum(0) if bias else None


def predict_change(x: Tensor, dw: Tensor, db: Tensor | None = None) -> Tensor:
    """The consequence of an update: ``x dw^T + db [N, O]``, what ``W <- W - lr*dw`` changes times ``-1/lr``."""
    change = x @ dw.T
    return change if db is None else change + db
