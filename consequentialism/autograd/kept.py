"""What forward keeps of a layer's input for backward: one small class for each kind.

For a linear layer each class gives the emended gradients (`weight_grad`), or takes a step along them without storing
them (`step_`). For a convolution, which keeps an `Inverse` or a `Conjugate`, `autograd.conv` makes the plain gradient
and asks for its correction (`corrected`). A Function carries them flat, because a compiler must see every tensor among
its arguments: `flat` gives these arguments, `restored` takes them back.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backend import reference
from ..backend.protocol import Ops
from ..options import Form, Ridge
from ..solve import conjugate

Flat = tuple[str, tuple[Any, ...], Tensor | None, Tensor | None]  # the kind, what is no tensor, two tensors
Gradients = tuple[Tensor | None, Tensor | None]


class EmendedInput(NamedTuple):
    """The emended input itself, in the place of ``x``; each None where nobody wants its gradient."""

    emended: Tensor | None  # [N, I]
    column: Tensor | None  # [N], the emended column of ones: db = dy^T column

    def keeps_x(self) -> bool:
        """Whether backward reads ``x``."""
        return False

    def flat(self) -> Flat:
        """What is kept, as arguments of a Function."""
        return "emended", (), self.emended, self.column

    def weight_grad(self, x: Tensor | None, dy: Tensor, backend: Ops, need_weight: bool, need_bias: bool) -> Gradients:
        """``dw [O, I]`` and ``db [O]`` of ``dy [N, O]``, each None where it is not needed."""
        emended = self.emended if need_weight else None
        column = self.column if need_bias else None
        if dy.shape[0] == 0:  # a rank without rows in a distributed batch; an empty column would mean no bias
            dw = None if emended is None else dy.new_zeros(dy.shape[1], emended.shape[1])
            return dw, None if column is None else dy.new_zeros(dy.shape[1])
        if emended is None:
            assert column is not None
            return None, backend.weight_grad(dy, column[:, None], column)[1]
        nothing = emended.new_empty(0)
        dw, db = backend.weight_grad(dy, emended, nothing if column is None else column)
        return dw, None if column is None else db

    def step_(self, weight: Tensor | None, bias: Tensor | None, x: Tensor | None, errors: Tensor, alpha: float) -> None:
        """``W += alpha * dw`` and ``b += alpha * db`` of ``errors [N, O]``, each where it is not None."""
        if bias is not None:
            assert self.column is not None
            _add_column(bias, errors, self.column, alpha)
        if weight is not None:
            assert self.emended is not None
            _add_product(weight, errors, self.emended, alpha)


class Inverse(NamedTuple):
    """The inverse ``P`` of the damped Gram, with the bias's border, which backward applies to the errors."""

    inverse: Tensor  # [n, n]; of a convolution [groups, n, n]
    form: Form
    unit: Tensor | None = None  # 0-dimensional, or [groups, 1, 1]: the inverse is that of x / unit

    def keeps_x(self) -> bool:
        """Whether backward reads ``x``."""
        return True

    def flat(self) -> Flat:
        """What is kept, as arguments of a Function."""
        return "inverse", (self.form,), self.inverse, self.unit

    def column(self, x: Tensor) -> Tensor:
        """The emended input's column for the bias alone, ``[N]``."""
        if self.form == "dual":
            return self.inverse.sum(1)
        border = self.inverse[-1]
        return x.to(self.inverse.dtype) @ border[:-1] + border[-1]

    def weight_grad(self, x: Tensor | None, dy: Tensor, backend: Ops, need_weight: bool, need_bias: bool) -> Gradients:
        """`EmendedInput`'s, with ``x [N, I]``."""
        assert x is not None
        if not need_weight:
            return EmendedInput(None, self.column(x)).weight_grad(None, dy, backend, False, need_bias)
        inverse = self.inverse
        if self.form == "dual":
            ones = inverse.new_ones(x.shape[0] if need_bias else 0)
            dw, db = backend.weight_grad(inverse @ dy, x, ones)  # P is symmetric: dw = (P dy)^T x
            return self.out_of_unit(dw), db if need_bias else None
        has_bias = inverse.shape[0] > x.shape[1]
        plain, plain_bias = backend.weight_grad(dy, x, inverse.new_ones(x.shape[0] if has_bias else 0))
        if not has_bias:
            return self.out_of_unit(plain @ inverse), None
        border = inverse[-1, :-1]
        dw = torch.addr(plain @ inverse[:-1, :-1], plain_bias, border)
        return dw, plain @ border + plain_bias * inverse[-1, -1] if need_bias else None

    def corrected(self, plain: Tensor, rank: int, rows: int) -> Tensor:
        """The plain gradient's rows ``[groups, O, n]``, which a dual inverse has been applied to before."""
        return plain if self.form == "dual" else plain @ self.inverse

    def out_of_unit(self, dw: Tensor) -> Tensor:
        """``dw`` of ``x`` and the inverse of ``x / unit``, as if both were of ``x``."""
        return dw if self.unit is None else dw / self.unit / self.unit

    def step_(self, weight: Tensor | None, bias: Tensor | None, x: Tensor | None, errors: Tensor, alpha: float) -> None:
        """`EmendedInput`'s, with ``x [N, I]``."""
        assert x is not None
        assert self.unit is None, "a step is never traced"
        inverse = self.inverse
        if bias is not None:
            _add_column(bias, errors, self.column(x), alpha)
        if weight is None:
            return
        if self.form == "dual":
            _add_product(weight, inverse @ errors, x, alpha)  # P is symmetric: dw = (P dy)^T x
            return
        inputs = x.shape[1]
        for rows in _blocks(weight):
            some = errors[:, rows]  # [N, o]
            weight[rows].addmm_(some.t() @ x, inverse[:inputs, :inputs], alpha=alpha)
            if inverse.shape[0] > inputs:
                weight[rows].addr_(some.sum(0), inverse[-1, :-1], alpha=alpha)


class Conjugate(NamedTuple):
    """A system that backward solves by conjugate gradients."""

    system: conjugate.System
    gram: Tensor | None  # [n, n], where it is stored; of a convolution [groups, n, n], always
    unit: Tensor | None = None  # of a convolution, as that of `Inverse`

    @property
    def form(self) -> Form:
        """The Gram's form: the dual system has no bound on its error, see `conjugate`."""
        return "primal"

    def keeps_x(self) -> bool:
        """Whether backward reads ``x``."""
        return True

    def flat(self) -> Flat:
        """What is kept, as arguments of a Function."""
        return "conjugate", (self.system,), self.gram, self.unit

    def corrected(self, plain: Tensor, rank: int, rows: int) -> Tensor:
        """The plain gradient's rows, corrected; ``rank`` and ``rows`` as `conjugate.solve_gram` takes them."""
        assert self.gram is not None
        ridge, iterations = self.system.ridge, self.system.iterations
        return conjugate.solve_gram(self.gram, plain, ridge, rank, rows, iterations, self.unit)

    def weight_grad(self, x: Tensor | None, dy: Tensor, backend: Ops, need_weight: bool, need_bias: bool) -> Gradients:
        """`EmendedInput`'s, with ``x [N, I]``."""
        assert x is not None
        dw, db = conjugate.weight_grad(self.system, self.gram, x, dy, backend)
        return dw if need_weight else None, db if need_bias else None

    def step_(self, weight: Tensor | None, bias: Tensor | None, x: Tensor | None, errors: Tensor, alpha: float) -> None:
        """`EmendedInput`'s, with ``x [N, I]``."""
        assert x is not None
        for part in _blocks(errors.t()):
            dw, db = conjugate.weight_grad(self.system, self.gram, x, errors[:, part], reference)
            if weight is not None:
                weight[part].add_(dw, alpha=alpha)
            if bias is not None and db is not None:
                bias[part].add_(db, alpha=alpha)


class FusedCall(NamedTuple):
    """Nothing is kept but ``x``: one op makes both gradients in backward."""

    bias: bool
    ridge: Ridge

    def keeps_x(self) -> bool:
        """Whether backward reads ``x``."""
        return True

    def flat(self) -> Flat:
        """What is kept, as arguments of a Function."""
        return "fused", tuple(self), None, None

    def weight_grad(self, x: Tensor | None, dy: Tensor, backend: Ops, need_weight: bool, need_bias: bool) -> Gradients:
        """`EmendedInput`'s, with ``x [N, I]``."""
        assert x is not None
        dw, db = backend.fused_weight_grad(x, dy, self.bias, *self.ridge)
        return dw if need_weight else None, db if need_bias else None

    def step_(self, *_: Any) -> None:
        """Never asked for: no step plans one."""
        raise AssertionError("a step has no dw to compute")


Kept = EmendedInput | Inverse | Conjugate | FusedCall


def restored(kind: str, static: tuple[Any, ...], first: Tensor | None, second: Tensor | None) -> Kept:
    """The object that `flat` took apart."""
    if kind == "emended":
        return EmendedInput(first, second)
    if kind == "inverse":
        assert first is not None
        (form,) = static
        return Inverse(first, form, second)
    if kind == "conjugate":
        (system,) = static
        return Conjugate(system, first, second)
    return FusedCall(*static)


def keep_emended(emended: Tensor, column: Tensor, need_weight: bool, need_bias: bool) -> EmendedInput:
    """The parts that are needed of an emended input ``[N, I]`` and its column ``[N]``."""
    return EmendedInput(emended if need_weight else None, column if need_bias else None)


def keep_inverse(inverse: Inverse, x: Tensor, need_weight: bool) -> EmendedInput | Inverse:
    """An inverse, or, where the weight needs none, its part for the bias alone."""
    return inverse if need_weight else EmendedInput(None, inverse.column(x))


def _add_column(bias: Tensor, errors: Tensor, column: Tensor, alpha: float) -> None:
    """``bias [O] += alpha * errors^T column``, of ``errors [N, O]`` and ``column [N]``."""
    bias.add_(errors.to(column.dtype).t() @ column, alpha=alpha)


def _add_product(weight: Tensor, errors: Tensor, rows: Tensor, alpha: float) -> None:
    """``weight [O, I] += alpha * errors^T rows``, of ``errors [N, O]`` and ``rows [N, I]``."""
    if weight.dtype == rows.dtype == errors.dtype:
        weight.addmm_(errors.t(), rows, alpha=alpha)
        return
    errors = errors.to(rows.dtype)
    for some in _blocks(weight):
        weight[some].add_(errors[:, some].t() @ rows, alpha=alpha)


def _blocks(weight: Tensor) -> Iterator[slice]:
    """The rows of ``weight [O, ...]`` in at most eight parts."""
    outputs = weight.shape[0]
    size = max(1, math.ceil(outputs / 8))
    return (slice(begin, begin + size) for begin in range(0, outputs, size))
