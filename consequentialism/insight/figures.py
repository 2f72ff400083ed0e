"""What a step does to the rows of one layer: spectrum, interference, gradients. All in float64.

A step along ``dw`` changes row ``j`` of the outputs by ``sum_k H_jk dy_k``, where ``H = x x^T`` for the plain gradient
and ``H = x (x^T x + c I)^-1 x^T`` for the emended one. ``H_jj dy_j`` is what row ``j`` asked for itself, the rest is
what the other rows' steps do to it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..backend import reference
from ..options import Form, Options
from ..samples import count
from .layers import Seen

TOP = 16  # leading directions whose share of the trace is given
MOST_SPECTRUM = 2048  # a larger Gram's spectrum is that of so many evenly spaced rows


@dataclass
class Figures:
    """Of one layer; `diagnose.Layer` says what each is."""

    rows: int
    inputs: int
    outputs: int
    groups: int
    form: str
    damping_c: float
    effective_rank: float
    mean_share: float
    top_share: float
    condition: float
    spectrum_rows: int
    spectrum: Tensor
    interference: float
    interference_emended: float
    undone: float
    undone_emended: float
    matrix: Tensor
    matrix_emended: Tensor
    cosine: float
    norm_ratio: float


def figures(seen: Seen, options: Options, most_rows: int) -> Figures:
    """The figures of a layer whose rows are damped as ``options`` say.

    Args:
        most_rows: Of so many evenly spaced rows the matrices are given; the numbers are of all rows.
    """
    return (
        _of_lookup(seen, options, most_rows) if seen.form.like is nn.Embedding else _of_rows(seen, options, most_rows)
    )


def _of_rows(seen: Seen, options: Options, most_rows: int) -> Figures:
    x, dy = seen.rows()  # [groups, N, I], [groups, N, O]
    groups, rows, inputs = x.shape
    rank = max(min(rows, inputs), 1)
    form: Form = "dual" if rows <= inputs else "primal"
    c = _ridge(x.square().sum((1, 2)), options, rank)  # [groups]
    y = torch.stack([emended_rows(own, ridge, form) for own, ridge in zip(x, c, strict=True)])
    plain, emended = dy.mT @ x, dy.mT @ y  # [groups, O, I]
    scale = {"raw": torch.ones_like(c), "gradient": c}.get(options.scale)
    samples = _samples(seen, rows, options)
    emended_scaled = emended * (samples if scale is None else scale[:, None, None])
    shown = evenly_spaced(rows, most_rows, x.device)
    eigenvalues, of_rows = _spectrum(x)
    mean = x.mean(1)
    direction = mean / mean.norm(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    trace = float(x.square().sum())
    in_mean = float((x @ direction[:, :, None]).square().sum())
    return Figures(
        rows=rows,
        inputs=inputs,
        outputs=groups * dy.shape[2],
        groups=groups,
        form=form,
        damping_c=float(c.mean()),
        mean_share=in_mean / trace if trace else 0.0,
        spectrum=eigenvalues,
        spectrum_rows=of_rows,
        **_of_spectrum(eigenvalues, float(c.mean()), rows / of_rows, rank),
        **_interference(x @ plain.mT, x.square().sum(2), x @ emended.mT, (x * y).sum(2), dy),
        matrix=coupling(x[:, shown], x[:, shown], dy[:, shown]),
        matrix_emended=coupling(x[:, shown], y[:, shown], dy[:, shown]),
        **_compared(plain, emended_scaled),
    )


def _of_lookup(seen: Seen, options: Options, most_rows: int) -> Figures:
    """Rows are one-hot: ``H_jk`` is 0 or, where both have the same index, ``1 / (count + c)``."""
    indices, dy, vocabulary, padding = seen.indices()
    rows = indices.shape[0]
    rank = max(min(rows, vocabulary), 1)
    counts = reference.embedding_counts(indices, vocabulary, padding)
    present = torch.ones_like(indices, dtype=torch.float64) if padding is None else (indices != padding).double()
    c = _ridge(counts.sum()[None], options, rank)[0]
    inverse = torch.where(counts > 0, 1 / (counts + c), 0.0)  # [V]
    plain = dy.new_zeros(vocabulary, dy.shape[1]).index_add(0, indices, dy * present[:, None])
    emended = plain * inverse[:, None]
    own = present * inverse[indices]
    shown = evenly_spaced(rows, most_rows, indices.device)
    same = (indices[shown][:, None] == indices[shown][None]).double() * present[shown]
    products = dy[shown] @ dy[shown].T
    eigenvalues = counts[counts > 0].sort(descending=True).values
    total = float(counts.sum())
    factor = {"raw": 1.0, "gradient": float(c)}.get(options.scale, float(_samples(seen, rows, options)))
    return Figures(
        rows=rows,
        inputs=vocabulary,
        outputs=dy.shape[1],
        groups=1,
        form="diagonal",
        damping_c=float(c),
        mean_share=float(counts.pow(3).sum() / counts.square().sum()) / total if total else 0.0,
        spectrum=eigenvalues,
        spectrum_rows=rows,
        **_of_spectrum(eigenvalues, float(c), 1.0, rank),
        **_interference(
            plain[indices][None] * present[:, None],
            present[None],
            emended[indices][None] * present[:, None],
            own[None],
            dy[None],
        ),
        matrix=_relative(same * products, same.diagonal() * products.diagonal()),
        matrix_emended=_relative(same * inverse[indices[shown]] * products, own[shown] * products.diagonal()),
        **_compared(plain, emended * factor),
    )


def emended_rows(x: Tensor, c: Tensor, form: Form) -> Tensor:
    """``(x x^T + c I)^-1 x [N, I]``, through a Cholesky factor in either form; zero where ``x`` is."""
    gram = x @ x.T if form == "dual" else x.T @ x
    if not bool(gram.any()):
        return torch.zeros_like(x)
    damped = gram + c * torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
    lower = torch.linalg.cholesky(damped)
    return torch.cholesky_solve(x, lower) if form == "dual" else torch.cholesky_solve(x.T, lower).T


def coupling(x: Tensor, y: Tensor, dy: Tensor) -> Tensor:
    """``M_jk``: what row ``k``'s step does for row ``j``, in units of what its own does; ``[N, N]``, 1 on the diagonal.

    ``M_jk = H_jk <dy_j, dy_k> / (H_jj <dy_j, dy_j>)`` with ``H = x y^T``: negative where ``k`` undoes what ``j`` wants.

    Args:
        x, y: ``[groups, N, I]``, plain both, or the second emended.
        dy: ``[groups, N, O]``.
    """
    done = ((x @ y.mT) * (dy @ dy.mT)).sum(0)
    return _relative(done, done.diagonal())


def _relative(done: Tensor, own: Tensor) -> Tensor:
    return torch.where(own[:, None] > 0, done / own[:, None], 0.0)


def _interference(plain: Tensor, own: Tensor, emended: Tensor, own_emended: Tensor, dy: Tensor) -> dict[str, float]:
    """Of all rows: changes ``[groups, N, O]``, and ``H_jj [groups, N]``."""
    result = {}
    for suffix, change, diagonal in (("", plain, own), ("_emended", emended, own_emended)):
        wanted = diagonal[:, :, None] * dy
        others = change - wanted
        size = float(wanted.norm())
        gain = float((wanted * dy).sum())
        against = -(others * dy).sum((0, 2)).clamp(max=0)
        result[f"interference{suffix}"] = float(others.norm()) / size if size else 0.0
        result[f"undone{suffix}"] = float(against.sum()) / gain if gain else 0.0
    return result


def _compared(plain: Tensor, emended: Tensor) -> dict[str, float]:
    one, other = float(plain.norm()), float(emended.norm())
    if one == 0 or other == 0:
        return {"cosine": 0.0, "norm_ratio": 0.0}
    return {"cosine": float((plain * emended).sum()) / (one * other), "norm_ratio": other / one}


def _spectrum(x: Tensor) -> tuple[Tensor, int]:
    """Eigenvalues of the groups' Grams, largest first, and of how many rows they are."""
    rows = x.shape[1]
    if min(x.shape[1:]) > MOST_SPECTRUM:
        x = x[:, evenly_spaced(rows, MOST_SPECTRUM, x.device)]
    gram = x @ x.mT if x.shape[1] <= x.shape[2] else x.mT @ x
    values = torch.linalg.eigvalsh(gram).clamp(min=0).flatten()
    return values.sort(descending=True).values, x.shape[1]


def _of_spectrum(values: Tensor, c: float, rows: float, rank: int) -> dict[str, float]:
    """Effective rank (the exponential of the entropy), share of the top, and the condition with ``c``.

    Args:
        values: Eigenvalues; those that are missing up to ``rank`` are 0.
        rows: How many times as many rows the whole Gram has.
    """
    total = float(values.sum())
    if total == 0:
        return {"effective_rank": 0.0, "top_share": 0.0, "condition": 1.0}
    shares = values / total
    entropy = -float((shares * shares.clamp(min=torch.finfo(shares.dtype).tiny).log()).sum())
    least = float(values[-1]) * rows if values.numel() >= rank else 0.0
    return {
        "effective_rank": math.exp(entropy),
        "top_share": float(shares[:TOP].sum()),
        "condition": (float(values[0]) * rows + c) / (least + c),
    }


def _ridge(trace: Tensor, options: Options, rank: int) -> Tensor:
    return (
        options.damping * trace / rank
        if options.damping_mode == "relative"
        else torch.full_like(trace, options.damping)
    )


def _samples(seen: Seen, rows: int, options: Options) -> float:
    """What ``scale="nlms"`` multiplies by."""
    if options.samples is not None:
        return float(count(options.samples, torch.device("cpu")))
    spatial = seen.form.dimensions() - 2
    return rows if spatial == 0 else sum(x.shape[0] if x.ndim == spatial + 2 else 1 for x in seen.inputs)


def evenly_spaced(rows: int, most: int, device: torch.device) -> Tensor:
    """Row numbers, at most so many."""
    if rows <= most:
        return torch.arange(rows, device=device)
    return torch.linspace(0, rows - 1, most, device=device, dtype=torch.float64).round().long()
