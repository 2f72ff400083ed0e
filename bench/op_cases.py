"""Cases of single ops, as the layers call them: by torch's own operations and by each backend."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from consequentialism import reference
from consequentialism.backend import dispatch
from consequentialism.options import DampingMode, Form, Scale

from .case import Case, Unavailable, Work
from .roofline import DTYPES, Minimum
from .shapes import MATRICES, Batch, LinearShape, Order
from .timing import Device
from .verify import BOUNDS, relative_error, weight_grads

BACKENDS = {"consequentialism": "auto", "triton": "triton", "reference": "reference"}
SCALING: tuple[float, DampingMode, Scale] = (1.0, "relative", "nlms")
RAW: tuple[float, DampingMode, Scale] = (1.0, "relative", "raw")
Expected = Callable[[], list[Tensor]]
Tensors = Callable[[], tuple[Tensor, Tensor]]


def kernels(provider: str, x: Tensor) -> Any:
    """The module with a provider's ops."""
    backend = BACKENDS[provider]
    if backend == "auto" and x.device.type == "cuda":
        backend = "cuda"  # and nothing in its place
    if backend == "triton":
        state = dispatch.backends()["triton"]
        if state != dispatch.AVAILABLE:
            raise Unavailable(state)
    return dispatch.select(backend, x)


def _tensors(shape: LinearShape, dtype_name: str, device: Device) -> tuple[Tensor, Tensor]:
    """``x [N, I]`` and ``dy [N, O]``."""
    torch.manual_seed(0)
    make: dict[str, Any] = {"device": device.type, "dtype": DTYPES[dtype_name]}
    return torch.randn(shape.rows, shape.inputs, **make), torch.randn(shape.rows, shape.outputs, **make)


def _form(shape: LinearShape) -> Form:
    return "dual" if shape.rows <= shape.inputs + 1 else "primal"


def _augmented(x: Tensor) -> Tensor:
    """``x`` with the bias's column of ones, in the type of Gram and factor."""
    return torch.cat([x, x.new_ones(x.shape[0], 1)], 1).to(torch.promote_types(x.dtype, torch.float32))


def single_op_case(
    op: str,
    shape: LinearShape | Order | Batch,
    dtype_name: str,
    device: Device,
    stock: tuple[str, Callable[..., Any]],
    own: Callable[..., Any],
    tensors: Callable[[], tuple[Tensor, ...]],
    expected: Callable[..., list[Tensor]],
    least: Minimum,
) -> Case:
    """``stock`` and ``own`` make a provider's run, of tensors and of a backend's module and tensors."""

    def build(name: str) -> Work:
        given = tensors()
        run = stock[1](*given) if name == stock[0] else own(kernels(name, given[0]), *given)
        return Work(run, lambda: relative_error(_list(run()), expected(*given)))

    return Case(
        op,
        shape.name,
        dtype_name,
        {name: functools.partial(build, name) for name in (stock[0], *BACKENDS)},
        stock[0],
        BOUNDS[dtype_name],
        device.modes[:1],
        least,
    )


def _list(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def _gram64(x: Tensor, form: Form) -> Tensor:
    return reference.input_gram(x.double(), True, form)


def input_gram_case(op: str, shape: LinearShape, dtype_name: str, device: Device) -> Case:
    """``x x^T [N, N]`` or ``x^T x [I, I]``, the smaller, in float32 at least; on CUDA by each variant of the kernels
    that serves it too, ``consequentialism`` as planned."""
    form, size = _form(shape), DTYPES[dtype_name].itemsize
    n, m = sorted((shape.rows, shape.inputs + 1))

    def stock(x: Tensor, dy: Tensor) -> Callable[[], Tensor]:
        def run() -> Tensor:
            rows = _augmented(x)
            return rows @ rows.T if form == "dual" else rows.T @ rows

        return run

    case = single_op_case(
        op,
        shape,
        dtype_name,
        device,
        ("torch", stock),
        lambda module, x, dy: lambda: module.input_gram(x, True, form),
        lambda: _tensors(shape, dtype_name, device),
        lambda x, dy: [_gram64(x, form)],
        Minimum(size * shape.rows * shape.inputs + max(size, 4) * n * n, 1.0 * n * n * m),
    )

    def build(variant: str) -> Work:
        x, _ = _tensors(shape, dtype_name, device)
        by = torch.ops.consequentialism.input_gram.by
        return Work(
            lambda: by(x, True, form, variant),
            lambda: relative_error(by(x, True, form, variant), [_gram64(x, form)]),
        )

    if device.type == "cuda" and size == 2:
        for variant in ("warps", "warpgroups"):
            case.providers[variant] = functools.partial(build, variant)
    return case


def emended_input_case(op: str, shape: LinearShape, dtype_name: str, device: Device) -> Case:
    """``y [N, I]`` and its bias's column, from ``x``: Gram, factor and application."""
    form, size = _form(shape), DTYPES[dtype_name].itemsize
    n, m = sorted((shape.rows, shape.inputs + 1))

    def stock(x: Tensor, dy: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
        def run() -> tuple[Tensor, Tensor]:
            rows = _augmented(x)
            gram = rows @ rows.T if form == "dual" else rows.T @ rows
            gram.diagonal().add_(gram.diagonal().sum() / len(gram))
            lower, _ = torch.linalg.cholesky_ex(gram)
            solved = torch.cholesky_solve(rows if form == "dual" else rows.T, lower)
            y = shape.rows * (solved if form == "dual" else solved.T)
            return y[:, :-1].to(x.dtype), y[:, -1]

        return run

    return single_op_case(
        op,
        shape,
        dtype_name,
        device,
        ("torch", stock),
        lambda module, x, dy: lambda: module.emended_input(x, True, form, *SCALING),
        lambda: _tensors(shape, dtype_name, device),
        lambda x, dy: list(reference.emended_input(x.double(), True, form, *SCALING)),
        Minimum(2.0 * size * shape.rows * shape.inputs, 1.0 * n * n * m + n**3 + 2.0 * n * n * m),
    )


def weight_grad_case(op: str, shape: LinearShape, dtype_name: str, device: Device) -> Case:
    """``dw [O, I]`` and ``db [O]`` from the emended input and ``dy``, against the plain gradient."""

    def plain(x: Tensor, dy: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
        return lambda: (dy.T @ x, dy.sum(0))

    def own(module: Any, x: Tensor, dy: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
        prepared = module.emended_input(x, True, _form(shape), *SCALING)
        return lambda: module.weight_grad(dy, *prepared)

    case = single_op_case(
        op,
        shape,
        dtype_name,
        device,
        ("plain", plain),
        own,
        lambda: _tensors(shape, dtype_name, device),
        lambda x, dy: list(weight_grads("emended", x, dy)),
        _weight_grad_least(shape, dtype_name),
    )

    def build() -> Work:
        x, dy = _tensors(shape, dtype_name, device)
        run = plain(x, dy)
        return Work(run, lambda: relative_error(run(), weight_grads("plain", x, dy)))

    case.providers["plain"] = build
    return case


def _weight_grad_least(shape: LinearShape, dtype_name: str) -> Minimum:
    n, i, o = shape[:3]
    return Minimum(DTYPES[dtype_name].itemsize * (n * i + n * o + i * o), 2.0 * n * i * o)


def fused_weight_grad_case(op: str, shape: LinearShape, dtype_name: str, device: Device) -> Case:
    """``dw [O, I]`` and ``db [O]`` from ``x`` and ``dy``: by the separate kernels, and by the op that may do it in one
    launch; on CUDA by each of its variants too, ``consequentialism`` as planned."""
    plain, emended = _weight_grad_least(shape, dtype_name), shape.emended(1).flops - shape.plain(1).flops

    def separate(x: Tensor, dy: Tensor) -> Callable[[], Any]:
        module, form = kernels("consequentialism", x), _form(shape)
        return lambda: module.weight_grad(dy, *module.emended_input(x, True, form, *SCALING))

    case = single_op_case(
        op,
        shape,
        dtype_name,
        device,
        ("separate", separate),
        lambda module, x, dy: lambda: module.fused_weight_grad(x, dy, True, *SCALING),
        lambda: _tensors(shape, dtype_name, device),
        lambda x, dy: list(weight_grads("emended", x, dy)),
        plain._replace(flops=plain.flops + emended),
    )

    def build(variant: str) -> Work:
        x, dy = _tensors(shape, dtype_name, device)
        by = torch.ops.consequentialism.fused_weight_grad.by
        return Work(
            lambda: by(x, dy, True, *SCALING, variant),
            lambda: relative_error(by(x, dy, True, *SCALING, variant), weight_grads("emended", x, dy)),
        )

    if device.type == "cuda":
        for variant in ("recompute", "cooperative"):
            case.providers[variant] = functools.partial(build, variant)
    return case


def _inverse64(gram: Tensor) -> Tensor:
    """``(G + c I)^-1 [..., n, n]`` in float64, of the default damping."""
    gram = gram.double()
    n = gram.shape[-1]
    c = gram.diagonal(dim1=-2, dim2=-1).sum(-1) / n
    return torch.linalg.inv(gram + c[..., None, None] * torch.eye(n, device=gram.device, dtype=gram.dtype))


def _stock_inverse(gram: Tensor, eye: Tensor) -> Tensor:
    c = gram.diagonal(dim1=-2, dim2=-1).sum(-1) / gram.shape[-1]
    return torch.cholesky_solve(eye.expand_as(gram), torch.linalg.cholesky_ex(gram + c[..., None, None] * eye)[0])


def damped_inverse_case(op: str, shape: Order, dtype_name: str, device: Device) -> Case:
    """Factor and inverse of one Gram ``[n, n]``, as forward does it, by torch's ``cholesky_ex`` and its solve; on
    Hopper by one block and by a cluster too, where they have room for it, ``consequentialism`` as planned.

    ``cholesky_ex`` alone is torch's factor without an inverse.
    """
    n = shape.order

    def gram() -> tuple[Tensor]:
        torch.manual_seed(0)
        x = torch.randn(n, 2 * n, dtype=DTYPES[dtype_name])
        return ((x @ x.T).to(device.type),)

    def stock(gram: Tensor) -> Callable[[], Tensor]:
        eye = torch.eye(n, device=gram.device, dtype=gram.dtype)
        return lambda: _stock_inverse(gram, eye)

    case = single_op_case(
        op,
        shape,
        dtype_name,
        device,
        ("torch", stock),
        lambda module, gram: lambda: module.damped_inverse(gram, *RAW, n, n),
        gram,
        lambda gram: [_inverse64(gram)],
        Minimum(2.0 * DTYPES[dtype_name].itemsize * n * n, 1.0 * n**3),
    )

    def alone() -> Work:
        (given,) = gram()
        damped = given + torch.eye(n, device=device.type, dtype=given.dtype) * given.diagonal().sum() / n

        def run() -> Tensor:
            return torch.linalg.cholesky_ex(damped)[0]

        def error() -> float:
            lower = run().double()
            return relative_error([lower @ lower.T], [damped.double()])

        return Work(run, error)

    def build(variant: str) -> Work:
        if torch.cuda.get_device_capability() != (9, 0):
            raise Unavailable("for chips of compute capability 9.0")
        (given,) = gram()
        by = torch.ops.consequentialism.damped_inverse.by
        return Work(
            lambda: by(given, *RAW, n, n, variant),
            lambda: relative_error([by(given, *RAW, n, n, variant)], [_inverse64(given)]),
        )

    case.providers["cholesky_ex"] = alone
    if device.type == "cuda":
        for variant, most in (("block", 192 if dtype_name == "float64" else 288), ("cluster", 1056)):
            if n <= most:
                case.providers[variant] = functools.partial(build, variant)
    return case


def damped_inverses_case(op: str, shape: Batch, dtype_name: str, device: Device) -> Case:
    """Grams and inverses of `MATRICES` inputs ``[n, 2n]``: one by one, and by torch's batches."""
    n = shape.order

    def inputs() -> tuple[Tensor]:
        torch.manual_seed(0)
        return (torch.randn(MATRICES, n, 2 * n, device=device.type, dtype=DTYPES[dtype_name]),)

    def stock(xs: Tensor) -> Callable[[], list[Tensor]]:
        eye = torch.eye(n, device=xs.device, dtype=xs.dtype)
        return lambda: list(_stock_inverse(xs @ xs.mT, eye))

    def expected(xs: Tensor) -> list[Tensor]:
        wide = xs.double()
        return list(_inverse64(wide @ wide.mT))

    return single_op_case(
        op,
        shape,
        dtype_name,
        device,
        ("torch", stock),
        lambda module, xs: lambda: [module.gram_inverse(x, False, "dual", *RAW) for x in xs],
        inputs,
        expected,
        Minimum(MATRICES * 3.0 * DTYPES[dtype_name].itemsize * n * n, MATRICES * 3.0 * n**3),
    )
