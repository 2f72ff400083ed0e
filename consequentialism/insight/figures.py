"""What a step does to the rows of one layer: spectrum, interference, gradients. All in float64.

A step along ``dw`` changes row ``j`` of the outputs by ``sum_k H_jk dy_k``, where ``H = x x^T`` for the plain gradient
and ``H = x (x^T x + c I)^-1 x^T`` for the emended one. ``H_jj dy_j`` is what row ``j`` asked for itself, the rest is
what the other rows' steps do to it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
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
    """Figures of one layer; `diagnose.Layer` says what each is."""

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
        most_rows: The matrices are of at most so many evenly spaced rows; the numbers are of all rows.
    """
    return (
        _of_lookup(seen, options, most_rows) if seen.form.like is nn.Embedding else _of_rows(seen, options, most_rows)
    )


class _Solved:
    """A layer's plain and emended gradients from one pass over its rows, whole in dual form, in pieces in primal form.

    Attributes:
        gram: ``x^T x [groups, I, I]`` in primal form; in dual form nothing.
        c: The ridge of each group, ``[groups]``.
        plain: ``dy^T x [groups, O, I]``.
        emended: The same with emended rows, unscaled.
        direction: The direction of the mean row, ``[groups, I]`` of length 1.
    """

    def __init__(self, seen: Seen, options: Options) -> None:
        self._seen, self.rows = seen, seen.count()
        self.groups, _, self.inputs = next(seen.blocks())[0].shape
        self.rank = max(min(self.rows, self.inputs), 1)
        self.form: Form = "dual" if self.rows <= self.inputs else "primal"
        self._whole = [seen.rows()] if self.form == "dual" else None
        total, self.trace, self.plain = torch.zeros(()), torch.zeros(()), torch.zeros(())
        self.gram = torch.zeros(())
        for x, dy in self.pieces():
            total, self.trace = x.sum(1) + total.to(x), x.square().sum((1, 2)) + self.trace.to(x)
            self.plain = dy.mT @ x + self.plain.to(x)
            self.gram = self.gram if self._whole else x.mT @ x + self.gram.to(x)
        self.c = _ridge(self.trace, options, self.rank)
        if self._whole:
            x, dy = self._whole[0]
            self._y = torch.stack([emended_rows(own, ridge) for own, ridge in zip(x, self.c, strict=True)])
            self.emended = dy.mT @ self._y
        else:
            self._inverse = torch.stack([damped_inverse(own, c) for own, c in zip(self.gram, self.c, strict=True)])
            self.emended = self.plain @ self._inverse
        mean = total / self.rows
        self.direction = mean / mean.norm(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)

    def pieces(self) -> Iterable[tuple[Tensor, Tensor]]:
        """Rows ``x [groups, n, I]`` and their errors ``dy [groups, n, O]``."""
        return self._seen.blocks() if self._whole is None else self._whole

    def emended_rows(self, x: Tensor) -> Tensor:
        """The emended rows of a piece of the rows."""
        return self._y if self._whole else x @ self._inverse

    def smaller_gram(self) -> Tensor:
        """``x x^T`` or ``x^T x`` of all rows, the smaller."""
        return _smaller_gram(self._whole[0][0]) if self._whole else self.gram

    def scaled(self, options: Options) -> Tensor:
        """The emended gradient as an optimizer sees it."""
        scale = {"raw": torch.ones_like(self.c), "gradient": self.c}.get(options.scale)
        return self.emended * (_samples(self._seen, self.rows, options) if scale is None else scale[:, None, None])


def _of_rows(seen: Seen, options: Options, most_rows: int) -> Figures:
    """Figures of a linear layer or convolution, in a second pass over its rows."""
    layer = _Solved(seen, options)
    rows, rank, device = layer.rows, layer.rank, layer.c.device
    interference = Interference(), Interference()
    shown, spectrum_rows = evenly_spaced(rows, most_rows, device), evenly_spaced(rows, MOST_SPECTRUM, device)
    picked: list[list[Tensor]] = []
    of_spectrum: list[Tensor] = []
    in_mean, begin = 0.0, 0
    for x, dy in layer.pieces():
        end = begin + x.shape[1]
        y = layer.emended_rows(x)
        interference[0].add(x @ layer.plain.mT, x.square().sum(2), dy)
        interference[1].add(x @ layer.emended.mT, (x * y).sum(2), dy)
        in_mean += float((x @ layer.direction[:, :, None]).square().sum())
        own = shown[(shown >= begin) & (shown < end)] - begin
        picked.append([x[:, own], y[:, own], dy[:, own]])
        if rank > MOST_SPECTRUM:
            of_spectrum.append(x[:, spectrum_rows[(spectrum_rows >= begin) & (spectrum_rows < end)] - begin])
        begin = end
    x, y, dy = (torch.cat(parts, 1) for parts in zip(*picked, strict=True))
    eigenvalues = _eigenvalues(_smaller_gram(torch.cat(of_spectrum, 1)) if of_spectrum else layer.smaller_gram())
    of_rows = len(spectrum_rows) if of_spectrum else rows
    size, c = float(layer.trace.sum()), float(layer.c.mean())
    return Figures(
        rows=rows,
        inputs=layer.inputs,
        outputs=layer.groups * dy.shape[2],
        groups=layer.groups,
        form=layer.form,
        damping_c=c,
        mean_share=in_mean / size if size else 0.0,
        spectrum=eigenvalues,
        spectrum_rows=of_rows,
        **_of_spectrum(eigenvalues, c, rows / of_rows, rank),
        **interference[0].numbers(""),
        **interference[1].numbers("_emended"),
        matrix=coupling(x, x, dy),
        matrix_emended=coupling(x, y, dy),
        **_compared(layer.plain, layer.scaled(options)),
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
        **Interference().add(plain[indices][None] * present[:, None], present[None], dy[None]).numbers(""),
        **Interference().add(emended[indices][None] * present[:, None], own[None], dy[None]).numbers("_emended"),
        matrix=_relative(same * products, same.diagonal() * products.diagonal()),
        matrix_emended=_relative(same * inverse[indices[shown]] * products, own[shown] * products.diagonal()),
        **_compared(plain, emended * factor),
    )


def emended_rows(x: Tensor, c: Tensor) -> Tensor:
    """``(x x^T + c I)^-1 x [N, I]``, through a Cholesky factor; zero where ``x`` is."""
    return damped_inverse(x @ x.T, c, x)


def damped_inverse(gram: Tensor, c: Tensor, by: Tensor | None = None) -> Tensor:
    """``(G + c I)^-1`` times ``by`` or the identity, through a Cholesky factor; zero where the Gram is."""
    eye = torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
    by = eye if by is None else by
    if not bool(gram.any()):
        return torch.zeros_like(by)
    return torch.cholesky_solve(by, torch.linalg.cholesky(gram + c * eye))


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


class Interference:
    """What the other rows' steps do to a row, added up over rows."""

    def __init__(self) -> None:
        self.others = self.wanted = self.gain = self.against = 0.0

    def add(self, change: Tensor, diagonal: Tensor, dy: Tensor) -> Interference:
        """Add some rows: the changes of their outputs and errors ``[groups, N, O]``, and ``H_jj [groups, N]``."""
        wanted = diagonal[:, :, None] * dy
        others = change - wanted
        self.others += float(others.square().sum())
        self.wanted += float(wanted.square().sum())
        self.gain += float((wanted * dy).sum())
        self.against += float(-(others * dy).sum((0, 2)).clamp(max=0).sum())
        return self

    def numbers(self, suffix: str) -> dict[str, float]:
        """Two of `Figures`."""
        return {
            f"interference{suffix}": math.sqrt(self.others / self.wanted) if self.wanted else 0.0,
            f"undone{suffix}": self.against / self.gain if self.gain else 0.0,
        }


def _compared(plain: Tensor, emended: Tensor) -> dict[str, float]:
    one, other = float(plain.norm()), float(emended.norm())
    if one == 0 or other == 0:
        return {"cosine": 0.0, "norm_ratio": 0.0}
    return {"cosine": float((plain * emended).sum()) / (one * other), "norm_ratio": other / one}


def _smaller_gram(x: Tensor) -> Tensor:
    """``x x^T`` or ``x^T x`` of rows ``[groups, N, I]``."""
    return x @ x.mT if x.shape[1] <= x.shape[2] else x.mT @ x


def _eigenvalues(gram: Tensor) -> Tensor:
    """The eigenvalues of the groups' Grams, largest first."""
    return torch.linalg.eigvalsh(gram).clamp(min=0).flatten().sort(descending=True).values


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
    """The number that ``scale="nlms"`` multiplies by."""
    if options.samples is not None:
        return float(count(options.samples, torch.device("cpu")))
    spatial = seen.form.dimensions() - 2
    return rows if spatial == 0 else sum(x.shape[0] if x.ndim == spatial + 2 else 1 for x in seen.inputs)


def evenly_spaced(rows: int, most: int, device: torch.device) -> Tensor:
    """Row numbers, at most so many."""
    if rows <= most:
        return torch.arange(rows, device=device)
    return torch.linspace(0, rows - 1, most, device=device, dtype=torch.float64).round().long()
