"""Every formula in plain PyTorch: any dtype, any device. The other backends are held to this.

``N`` rows, ``I`` inputs, ``O`` outputs; ``x [N, I]``, ``dy [N, O]``, ``dw [O, I]``, ``db [O]``. With
``bias`` every formula reads ``x`` with a constant 1 appended, so ``I`` counts it. Half types are computed
in float32, float32 and float64 as they are. Nothing here synchronises the host.

Source: Paeedeh and Ghiasi-Shirazi, arXiv 2003.05164; the derivation is in the README.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..options import DampingMode, Form, Ridge, Scale
from ..precision import MAX_FLOAT32_CONDITION as MAX_FLOAT32_CONDITION
from ..precision import MAX_FLOAT32_CONDITION_HALF as MAX_FLOAT32_CONDITION_HALF
from ..precision import MAX_FLOAT32_CONDITION_TALL as MAX_FLOAT32_CONDITION_TALL
from ..precision import compute_dtype as compute_dtype
from ..precision import emended_dtype as emended_dtype
from ..precision import float32_is_enough as float32_is_enough
from ..precision import gram_dtype as precise_dtype
from ..precision import max_float32_condition as max_float32_condition
from ..precision import told_dtype
from .coordinates import add_root_product_ as add_root_product_
from .coordinates import decayed_gram as decayed_gram
from .coordinates import inverse_root as inverse_root
from .coordinates import root_product as root_product
from .protocol import Limits

LIMITS = Limits(fused_rows=128)  # as the compiled kernels
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
    """What was emended from ``x / unit``, a gradient included, as if from ``x``."""
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
        gram_dtype: Of the Gram and the inverse until it is returned: float64 where float32 would lose its digits, as
            `precision.gram_type` decides; None, the type of sums over ``x``.
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
        dtype: In which all are computed; None, that of sums over ``x``.
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
    """What backpropagation gives: ``dy^T x [O, I]`` and ``sum dy [O]``."""
    return dy.T @ x, dy.sum(0) if bias else None


def predict_change(x: Tensor, dw: Tensor, db: Tensor | None = None) -> Tensor:
    """The consequence of an update: ``x dw^T + db [N, O]``, what ``W <- W - lr*dw`` changes times ``-1/lr``."""
    change = x @ dw.T
    return change if db is None else change + db


def conv_output_size(
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """A convolution's output positions along each spatial dimension."""
    return [
        (s + 2 * p - d * (k - 1) - 1) // t + 1
        for s, k, t, p, d in zip(size, kernel, stride, padding, dilation, strict=True)
    ]


def conv_patches(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """A convolution's rows ``[groups, N, I]``: its unfolded patches, ``N = B * positions``.

    Args:
        x: ``[B, C, *spatial]`` of any number of spatial dimensions; ``I = C/groups * prod(kernel)``.
        kernel, stride, padding, dilation: One integer for each of them.
    """
    spatial = len(kernel)
    patches = F.pad(x, _both_sides(padding)) if any(padding) else x
    for i in range(spatial):
        patches = patches.unfold(2 + i, dilation[i] * (kernel[i] - 1) + 1, stride[i])[..., :: dilation[i]]
    patches = patches.unflatten(1, (groups, -1)).movedim(0, 1)  # [groups, B, C/groups, *out, *kernel]
    patches = patches.movedim(2, 2 + spatial)  # the channel before the kernel: one copy is enough
    return patches.reshape(groups, -1, x.shape[1] // groups * math.prod(kernel))


def conv_transpose_patches(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    output_padding: Sequence[int],
    groups: int,
) -> Tensor:
    """A transposed convolution's rows ``[groups, N, I]``, a row for each output position: ``N = B * positions``.

    It is the convolution, by a stride of 1, of ``x`` with ``stride - 1`` zeros between the entries, padded by
    ``dilation * (kernel - 1) - padding``, at the end by ``output_padding`` more, with its kernel reversed. The rows
    are that convolution's patches, reversed likewise: in the order of the weight ``[C, O/groups, *kernel]``.

    Args:
        x: ``[B, C, *spatial]`` of any number of spatial dimensions; ``I = C/groups * prod(kernel)``.
        kernel, stride, padding, dilation, output_padding: One integer for each of them.
    """
    spatial = len(kernel)
    sizes = [(s - 1) * t + 1 for s, t in zip(x.shape[2:], stride, strict=True)]
    stuffed = x.new_zeros(*x.shape[:2], *sizes)
    places: Any = (..., *(slice(None, None, t) for t in stride))
    stuffed[places] = x
    before = [d * (k - 1) - p for d, k, p in zip(dilation, kernel, padding, strict=True)]
    sides = [side for b, more in zip(reversed(before), reversed(output_padding), strict=True) for side in (b, b + more)]
    ones, nothing = [1] * spatial, [0] * spatial
    patches = conv_patches(F.pad(stuffed, sides), kernel, ones, nothing, dilation, groups)
    return patches.unflatten(2, (-1, *kernel)).flip(list(range(-spatial, 0))).flatten(2)


def _both_sides(padding: Sequence[int]) -> list[int]:
    """What `torch.nn.functional.pad` wants: the last dimension first."""
    return [p for p in reversed(padding) for _ in range(2)]


class ConvBlock(NamedTuple):
    """A piece of a convolution's input, and where its positions are in the output."""

    x: Tensor  # [b, C, *spatial], to be read without further padding
    sample: int  # the first
    line: int  # the first position along the first spatial dimension
    lines: int

    def of(self, y: Tensor) -> Tensor:
        """The part of ``y [B, ..., *positions]`` that belongs to it.

        Not by indices: torch.autograd.grad(is_grads_batched=True) knows no rule for them.
        """
        return y.narrow(0, self.sample, self.x.shape[0]).narrow(2, self.line, self.lines)


def conv_blocks(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    patch_bytes: int,
    dtype: torch.dtype,
) -> Iterator[ConvBlock]:
    """``x`` in pieces in ``dtype`` whose patches take at most ``patch_bytes``.

    Pieces are samples, or rows of positions of one sample where its patches take more; one row is the least.
    """
    size, batch = x.shape[2:], x.shape[0]
    rows = conv_output_size(size, kernel, stride, padding, dilation)
    padded = math.prod([s + 2 * p for s, p in zip(size, padding, strict=True)])
    sample_bytes = (math.prod(rows) * math.prod(kernel) + padded) * x.shape[1] * dtype.itemsize
    samples = max(1, patch_bytes // max(sample_bytes, 1))
    step = max(1, rows[0] * patch_bytes // sample_bytes) if sample_bytes > patch_bytes else rows[0]
    for first in range(0, batch, samples):
        piece = x[first : first + samples].to(dtype)
        piece = F.pad(piece, _both_sides(padding)) if any(padding) else piece
        for begin in range(0, rows[0], step):
            end = min(begin + step, rows[0])
            length = (end - begin - 1) * stride[0] + dilation[0] * (kernel[0] - 1) + 1
            block = piece.narrow(2, begin * stride[0], length)
            yield ConvBlock(block, first, begin, end - begin)


def conv_gram(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    bias: bool,
    patch_bytes: int,
    dtype: torch.dtype,
) -> Tensor:
    """``x^T x [groups, I, I]`` of a convolution's patches, streamed: never more than ``patch_bytes`` of them.

    Args:
        x: ``[B, C, *spatial]``.
        dtype: In which it is computed and returned, float32 or float64.
    """
    inputs = x.shape[1] // groups * math.prod(kernel)
    gram = x.new_zeros(groups, inputs, inputs, dtype=dtype)
    sums = x.new_zeros(groups, inputs, 1, dtype=dtype)
    nothing = [0] * len(kernel)
    for block in conv_blocks(x, kernel, stride, padding, dilation, patch_bytes, dtype):
        patches = conv_patches(block.x, kernel, stride, nothing, dilation, groups)
        gram, sums = gram + patches.mT @ patches, sums + patches.sum(1)[:, :, None]
    if not bias:
        return gram
    rows = x.shape[0] * math.prod(conv_output_size(x.shape[2:], kernel, stride, padding, dilation))
    corner = sums.new_full((groups, 1, 1), rows)
    return torch.cat([torch.cat([gram, sums.mT], 1), torch.cat([sums, corner], 1)], 2)


def conv_errors(dy: Tensor, groups: int) -> Tensor:
    """``dy [B, O, *positions]`` as rows ``[groups, N, O/groups]``."""
    batch, outputs = dy.shape[:2]
    positions = math.prod(dy.shape[2:])
    split = dy.reshape(batch, groups, outputs // groups, positions)
    return split.permute(1, 0, 3, 2).reshape(groups, batch * positions, outputs // groups)


def emended_conv_weight_grad(
    x: Tensor,
    dy: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
    bias: bool = True,
    *,
    form: Form | None = None,
    damping: float = 1.0,
    damping_mode: DampingMode = "relative",
    scale: Scale = "nlms",
) -> tuple[Tensor, Tensor | None]:
    """The linear formula on a convolution's unfolded patches, each group with its own Gram.

    ``scale="nlms"`` multiplies by the batch size: the number of samples that a mean-reduced loss divides by. This
    is the definition, and unfolds everything at once; the layers stream.

    Args:
        x: ``[B, C, *spatial]``, padding included but for zeros.
        dy: ``[B, O, *positions]``.

    Returns:
        ``dw [O, C/groups, *kernel]`` and ``db [O]`` or None.
    """
    rows = conv_patches(x, kernel, stride, padding, dilation, groups)
    options: dict[str, Any] = {"form": form, "damping": damping, "damping_mode": damping_mode, "scale": scale}
    dw, db = _grads_of_patches(rows, x.shape[0], dy, groups, bias, **options)
    return dw.reshape(dy.shape[1], -1, *kernel), db


def _grads_of_patches(
    rows: Tensor, batch: int, dy: Tensor, groups: int, bias: bool, *, scale: Scale = "nlms", **options: Any
) -> tuple[Tensor, Tensor | None]:
    """``dw [O, I]`` and ``db [O]`` of a convolution's rows ``[groups, N, I]``."""
    multiplier = batch if scale == "nlms" else 1
    options["scale"] = "raw" if scale == "nlms" else scale
    errors = conv_errors(dy.to(compute_dtype(dy.dtype)), groups)
    grads = [emended_weight_grad(own_x, own_dy, bias, **options) for own_x, own_dy in zip(rows, errors, strict=True)]
    dw = multiplier * torch.cat([dw for dw, _ in grads])
    db = multiplier * torch.cat([db for _, db in grads if db is not None]) if bias else None
    return dw.to(dy.dtype), None if db is None else db.to(dy.dtype)


def emended_conv_transpose_weight_grad(
    x: Tensor,
    dy: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    output_padding: Sequence[int],
    groups: int = 1,
    bias: bool = True,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """The linear formula on the rows of `conv_transpose_patches`; otherwise as `emended_conv_weight_grad`.

    Returns:
        ``dw [C, O/groups, *kernel]`` and ``db [O]`` or None.
    """
    rows = conv_transpose_patches(x, kernel, stride, padding, dilation, output_padding, groups)
    dw, db = _grads_of_patches(rows, x.shape[0], dy, groups, bias, **options)
    dw = dw.unflatten(1, (-1, *kernel)).unflatten(0, (groups, -1))  # [groups, O/groups, C/groups, *kernel]
    return dw.transpose(1, 2).flatten(0, 1), db


def embedding_counts(indices: Tensor, num_embeddings: int, padding_idx: int | None) -> Tensor:
    """How often each index stands in ``indices [N]``: ``[V]`` in float64, 0 for ``padding_idx``."""
    counted = _counted(indices, padding_idx)
    return counted.new_zeros(num_embeddings).index_add(0, indices, counted)


def embedding_occurrences(indices: Tensor, everyone: Tensor, padding_idx: int | None) -> tuple[Tensor, Tensor]:
    """`embedding_counts` of ``everyone [M]`` at ``indices [N]`` alone, and its sum; nothing has the vocabulary's size.

    The counts at ``padding_idx``, which nobody reads, are not 0.
    """
    ordered, indices = everyone.sort().values, indices.to(everyone.dtype)
    after = torch.searchsorted(ordered, indices, right=True)
    counts = after - torch.searchsorted(ordered, indices)
    return counts.to(torch.float64), _counted(everyone, padding_idx).sum()


def _counted(indices: Tensor, padding_idx: int | None) -> Tensor:
    """1 for each row in float64, 0 at ``padding_idx``."""
    if padding_idx is None:
        return torch.ones(indices.shape, device=indices.device, dtype=torch.float64)
    return (indices != padding_idx).to(torch.float64)


def emended_embedding_rows(
    indices: Tensor,
    dy: Tensor,
    counts: Tensor,
    total: Tensor,
    rows: Tensor,
    num_embeddings: int,
    padding_idx: int | None = None,
    *,
    damping: float = 1.0,
    damping_mode: DampingMode = "relative",
    scale: Scale = "nlms",
    samples: float | Tensor | None = None,
) -> Tensor:
    """``dy`` with each row divided by ``count + c``: summed over occurrences, the emended gradient.

    The rows of an embedding's input are one-hot, so ``x^T x`` is the diagonal of the counts, and
    ``dw[v] = sum of dy over occurrences / (count_v + c)``. A row at ``padding_idx`` is a row of zeros.

    Args:
        indices: ``[N]``, integers.
        dy: ``[N, E]``.
        counts: ``[N]``, how often each row's index occurs.
        total: The sum of the counts of all the vocabulary, 0-dimensional: ``trace(x^T x)``.
        rows: ``N``, 0-dimensional.
        num_embeddings: ``V``.
        samples: What ``scale="nlms"`` multiplies by; None for ``rows``.

    Returns:
        ``[N, E]`` in float32 or float64.
    """
    rank = rows.clamp(min=1, max=num_embeddings)
    # A product: torch.compile makes no constant of a damping that it multiplies by.
    c = damping * total / rank if damping_mode == "relative" else damping * torch.ones_like(total)
    weight = 1 / (counts + c)  # [N]
    if scale == "nlms":
        weight = weight * (rows if samples is None else samples)
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
    counts = embedding_counts(indices, num_embeddings, padding_idx)
    statistics = (counts[indices], counts.sum(), counts.new_full((), indices.shape[0]), num_embeddings)
    options: dict[str, Any] = {"damping": damping, "damping_mode": damping_mode, "scale": scale}
    emended = emended_embedding_rows(indices, dy, *statistics, padding_idx, **options)
    return emended.new_zeros(num_embeddings, dy.shape[1]).index_add(0, indices, emended).to(dy.dtype)
