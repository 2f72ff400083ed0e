"""Every formula in plain PyTorch: any dtype, any device. The other backends are held to this.

``N`` rows, ``I`` inputs, ``O`` outputs; ``x [N, I]``, ``dy [N, O]``, ``dw [O, I]``, ``db [O]``. With
``bias`` every formula reads ``x`` with a constant 1 appended, so ``I`` counts it. Half types are computed
in float32, float32 and float64 as they are. Nothing here synchronises the host.

Source: Paeedeh and Ghiasi-Shirazi, arXiv 2003.05164; the derivation is in the README.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .options import DampingMode, Form, Scale

RETRIES = 3  # a factor that breaks down is tried again with 10, 100 and 1000 times the ridge


# The largest condition number up to which Gram and factor are float32 (kMaxFloat32Condition in csrc/cpu/factor.h).
MAX_FLOAT32_CONDITION = 2e3


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which Gram, factor and sums are computed: float32 for half types."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def float32_is_enough(rank: int, damping: float, damping_mode: DampingMode) -> bool:
    """Whether a float32 Gram keeps the digits that its inverse needs.

    ``rank / damping`` bounds the condition number of a relatively damped Gram; nothing bounds an absolutely damped one
    before it is there.
    """
    return damping_mode == "relative" and rank <= MAX_FLOAT32_CONDITION * damping


def _rows(x: Tensor, bias: bool) -> Tensor:
    x = x.to(compute_dtype(x.dtype))
    return torch.cat([x, x.new_ones(x.shape[0], 1)], dim=1) if bias else x


def input_gram(x: Tensor, bias: bool, form: Form) -> Tensor:
    """``x x^T [N, N]`` (dual) or ``x^T x [I, I]`` (primal)."""
    rows = _rows(x, bias)
    return rows @ rows.T if form == "dual" else rows.T @ rows


def ridge(gram: Tensor, damping: float, damping_mode: DampingMode, rank: int) -> Tensor:
    """The absolute ridge ``c``: ``damping * trace(G) / rank``, or ``damping``; 0-dimensional."""
    if damping_mode == "absolute":
        return gram.new_full((), damping)
    return damping * gram.diagonal().sum() / rank


def factor(gram: Tensor, damping: float, damping_mode: DampingMode, scale: Scale, rank: int, rows: int) -> Tensor:
    """``scale * (G + c I)^-1 [n, n]``, through a Cholesky factor.

    Args:
        gram: Symmetric ``[n, n]``, of which every entry is read.
        rank: ``min(N, I)``, what a relative damping is relative to.
        rows: ``N``, the multiplier of ``scale="nlms"``.

    Zero where the trace is zero and NaN where it is not finite. Where the factor breaks down the ridge
    grows tenfold, at most three times; then the Gram's diagonal stands in for it.
    """
    trace = gram.diagonal().sum()
    c = ridge(gram, damping, damping_mode, rank)
    c = torch.where(trace == 0, torch.ones_like(c), c)
    growth = 10.0 ** torch.arange(RETRIES + 1, dtype=gram.dtype, device=gram.device)
    eye = torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
    attempts = gram + (c * growth)[:, None, None] * eye  # [4, n, n]
    lower, info = torch.linalg.cholesky_ex(attempts)
    works = (info == 0) & lower.diagonal(dim1=-2, dim2=-1).isfinite().all(-1)  # [4]
    first = works.to(torch.int64).argmax().reshape(1)
    chosen = torch.where(works.any(), lower.index_select(0, first)[0], eye)  # [n, n]
    diagonal = torch.diag_embed(1 / (gram.diagonal() + c))
    # On the CPU the more accurate of the two; on a GPU it waits for the device.
    solved = torch.cholesky_inverse(chosen) if gram.device.type == "cpu" else torch.cholesky_solve(eye, chosen)
    inverse = torch.where(works.any(), solved, diagonal)
    if scale == "nlms":
        inverse = inverse * rows
    elif scale == "gradient":
        inverse = inverse * c
    inverse = torch.where(trace == 0, torch.zeros_like(inverse), inverse)
    return torch.where(trace.isfinite(), inverse, torch.full_like(inverse, torch.nan))


def input_inverse(x: Tensor, bias: bool, form: Form, damping: float, damping_mode: DampingMode, scale: Scale) -> Tensor:
    """``scale * (x x^T + c I)^-1 [N, N]`` (dual) or ``scale * (x^T x + c I)^-1 [I, I]`` (primal)."""
    narrow = compute_dtype(x.dtype)
    return _wide_inverse(x, bias, form, damping, damping_mode, scale).to(narrow)


def _wide_inverse(x: Tensor, bias: bool, form: Form, damping: float, damping_mode: DampingMode, scale: Scale) -> Tensor:
    """`input_inverse` in the type that Gram and factor need: float64 where float32 would lose the inverse's digits."""
    rows, inputs = x.shape[0], x.shape[1] + bias
    rank = max(min(rows, inputs), 1)
    if not float32_is_enough(rank, damping, damping_mode) and x.device.type != "mps":
        x = x.double()
    return factor(input_gram(x, bias, form), damping, damping_mode, scale, rank, rows)


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
    x: Tensor, bias: bool, form: Form, damping: float, damping_mode: DampingMode, scale: Scale
) -> tuple[Tensor, Tensor]:
    """``y = scale * (x x^T + c I)^-1 x`` ``[N, I]`` and its column for the bias ``[N]``.

    ``dw = dy^T y`` and ``db = dy^T u`` are then the emended gradients. bfloat16 gives a bfloat16 ``y``,
    float16 a float32 one (its range is too small); ``u`` is always in the type computed in.
    """
    inverse = _wide_inverse(x, bias, form, damping, damping_mode, scale)
    emended, column = apply_inverse(inverse, x.to(inverse.dtype), bias, form)
    return emended.to(emended_dtype(x.dtype)), column.to(compute_dtype(x.dtype))


def emended_inputs(
    xs: Sequence[Tensor],
    biases: Sequence[bool],
    forms: Sequence[Form],
    applied: Sequence[bool],
    damping: float,
    damping_mode: DampingMode,
    scale: Scale,
) -> tuple[list[Tensor], list[Tensor]]:
    """Of each ``x [N, I]``, where ``applied`` its `emended_input`, else its `input_inverse` and nothing."""
    pairs = []
    for x, bias, form, is_applied in zip(xs, biases, forms, applied, strict=True):
        if is_applied:
            pairs.append(emended_input(x, bias, form, damping, damping_mode, scale))
        else:
            inverse = input_inverse(x, bias, form, damping, damping_mode, scale)
            pairs.append((inverse, inverse.new_zeros(0)))
    return [kept for kept, _ in pairs], [column for _, column in pairs]


def emended_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which an emended input of ``dtype`` is kept."""
    return torch.float32 if dtype == torch.float16 else dtype


def weight_grad(dy: Tensor, rows: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
    """``dw = dy^T rows [O, I]`` and ``db = dy^T column [O]`` (empty where ``column`` is), in dy's type.

    With emended rows these are the emended gradients; with ``x`` and ones, the plain ones. One infinity or NaN
    in ``dy [N, O]`` makes every entry NaN.
    """
    errors = _nan_unless_finite(dy)
    dw = errors.to(rows.dtype).T @ rows
    db = errors.to(column.dtype).T @ column if column.shape[0] else errors.new_zeros(0)
    return dw.to(dy.dtype), db.to(dy.dtype)


def fused_weight_grad(
    x: Tensor, dy: Tensor, bias: bool, damping: float, damping_mode: DampingMode, scale: Scale
) -> tuple[Tensor, Tensor]:
    """``dw [O, I]`` and ``db [O]`` (empty without a bias) of ``x [N, I]`` and ``dy [N, O]``: all in one."""
    if x.shape[0] == 0:
        return dy.new_zeros(dy.shape[1], x.shape[1]), dy.new_zeros(dy.shape[1] if bias else 0)
    form: Form = "dual" if x.shape[0] <= x.shape[1] + bias else "primal"
    return weight_grad(dy, *emended_input(x, bias, form, damping, damping_mode, scale))


def _nan_unless_finite(dy: Tensor) -> Tensor:
    """``dy``, or NaN everywhere where one entry is not finite."""
    return dy + (0 * dy).sum()


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
    inverse = _wide_inverse(x, bias, form, damping, damping_mode, scale)
    rows = _rows(x.to(inverse.dtype), bias)
    errors = _nan_unless_finite(dy).to(rows.dtype)
    dw = errors.T @ (inverse @ rows) if form == "dual" else (errors.T @ rows) @ inverse
    if not bias:
        return dw.to(dy.dtype), None
    return dw[:, :-1].to(dy.dtype), dw[:, -1].to(dy.dtype)


def plain_weight_grad(x: Tensor, dy: Tensor, bias: bool = True) -> tuple[Tensor, Tensor | None]:
    """What backpropagation gives: ``dy^T x [O, I]`` and ``sum dy [O]``."""
    return dy.T @ x, dy.sum(0) if bias else None


def predict_change(x: Tensor, dw: Tensor, db: Tensor | None = None) -> Tensor:
    """The consequence of an update: ``x dw^T + db [N, O]``, what ``W <- W - lr*dw`` changes times ``-1/lr``."""
    change = x @ dw.T
    return change if db is None else change + db


def embedding_counts(indices: Tensor, num_embeddings: int, padding_idx: int | None) -> tuple[Tensor, Tensor]:
    """How often each index stands in ``indices [N]`` (``[V]``, 0 for ``padding_idx``), and ``N`` (0-dimensional)."""
    counted = torch.ones(indices.shape, device=indices.device, dtype=torch.float64)
    if padding_idx is not None:
        counted = (indices != padding_idx).to(counted.dtype)
    counts = counted.new_zeros(num_embeddings).index_add(0, indices, counted)
    return counts, counts.new_full((), indices.shape[0])


def emended_embedding_rows(
    indices: Tensor,
    dy: Tensor,
    counts: Tensor,
    rows: Tensor,
    padding_idx: int | None = None,
    *,
    damping: float = 1.0,
    damping_mode: DampingMode = "relative",
    scale: Scale = "nlms",
) -> Tensor:
    """``dy`` with each row divided by ``count + c``: summed over occurrences, the emended gradient.

    The rows of an embedding's input are one-hot, so ``x^T x`` is the diagonal of the counts, and
    ``dw[v] = sum of dy over occurrences / (count_v + c)``. A row at ``padding_idx`` is a row of zeros.

    Args:
        indices: ``[N]``, integers.
        dy: ``[N, E]``.
        counts: ``[V]``, as `embedding_counts` gives them.
        rows: ``N``, 0-dimensional, likewise.

    Returns:
        ``[N, E]`` in float32 or float64.
    """
    rank = rows.clamp(min=1, max=counts.shape[0])
    c = damping * counts.sum() / rank if damping_mode == "relative" else counts.new_full((), damping)
    weight = 1 / (counts[indices] + c)  # [N]
    if scale == "nlms":
        weight = weight * rows
    elif scale == "gradient":
        weight = weight * c
    if padding_idx is not None:
        weight = torch.where(indices == padding_idx, torch.zeros_like(weight), weight)
    errors = dy.to(compute_dtype(dy.dtype))
    return (errors + 0 * errors) * weight.to(errors.dtype)[:, None]


def emended_embedding_grad(
    indices: Tensor,
    dy: Tensor,
    num_embeddings: int,
    padding_idx: int | None = None,
    *,
    damping: float = 1.0,
    damping_mode: DampingMode = "relative",
    scale: Scale = "nlms",
) -> Tensor:
    """``dw [V, E]`` of an embedding: `emended_embedding_rows` summed into their places."""
    counts, rows = embedding_counts(indices, num_embeddings, padding_idx)
    options = {"damping": damping, "damping_mode": damping_mode, "scale": scale}
    emended = emended_embedding_rows(indices, dy, counts, rows, padding_idx, **options)  # type: ignore[arg-type]
    return emended.new_zeros(num_embeddings, dy.shape[1]).index_add(0, indices, emended).to(dy.dtype)
