"""What is compared on a GPU: shapes, providers, and how each is checked against float64."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import consequentialism as cw
from consequentialism import dispatch

from ..cases import Shape
from .device import Device
from .run import Case, Work

LAYERS = (
    Shape(64, 784, 1600, 1.5),
    Shape(128, 1024, 1024, 1.5),
    Shape(256, 4096, 4096, 1.25),
    Shape(512, 4096, 11008, 1.35),
    Shape(1024, 4096, 4096, 1.6),
    Shape(8192, 1024, 4096, 1.6),
)
# Around the thresholds between one launch and the separate kernels.
WHOLE = (
    Shape(32, 784, 1600),
    Shape(60, 1600, 10),
    Shape(64, 784, 1600),
    Shape(128, 256, 256),
    Shape(128, 1024, 1024),
    Shape(128, 4096, 1024),
    Shape(128, 1024, 4096),
)
STEP = Shape(256, 4096, 4096, 0.8)
ORDERS = (32, 64, 128, 256, 512, 1024)
MATRICES = 8  # of a batch
MLP, MLP_ROWS = (784, 1600, 1600, 1600, 1600, 10), 60  # ISAAC's network for MNIST
DEEP, DEEP_ROWS = (256,) * 17, 128
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
BOUNDS = {"bfloat16": 1e-2, "float32": 1e-4}  # of a layer's gradients
NETWORK_BOUNDS = {"bfloat16": 0.1, "float32": 1e-3}  # after several layers, each of which rounds what it hands on


F64 = torch.float64
RATE = 1e-6  # of training steps that are timed: the weights hardly move


class StockFunction(torch.autograd.Function):
    """torch's own operations, none of which waits for the device, all in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        x, weight = ctx.saved_tensors
        n, inputs = x.shape[0], x.shape[1] + 1
        rows = torch.cat([x, x.new_ones(n, 1)], 1).float()
        dual = n <= inputs
        gram = rows @ rows.T if dual else rows.T @ rows
        c = gram.diagonal().sum() / min(n, inputs)
        gram.diagonal().add_(c)
        lower, _ = torch.linalg.cholesky_ex(gram)
        if dual:
            dw = n * dy.T @ torch.cholesky_solve(rows, lower).to(dy.dtype)
        else:
            dw = (n * torch.cholesky_solve((rows.T @ dy.float()), lower).T).to(dy.dtype)
        return dy @ weight, dw[:, :-1], dw[:, -1]


class StockLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return StockFunction.apply(input, self.weight, self.bias)


def isaac_linear(inputs: int, outputs: int, **make: Any) -> nn.Module:
    import isaac

    if make["dtype"] != torch.float32:
        raise ImportError("isaac knows no half types")
    return isaac.Linear(inputs, outputs, la=1.0).to(**make)


def triton_linear(inputs: int, outputs: int, **make: Any) -> nn.Module:
    state = cw.backends()["triton"]
    if state != dispatch.AVAILABLE:
        raise ImportError(f"backend triton: {state}")
    return cw.Linear(inputs, outputs, backend="triton", **make)


def sgd(model: nn.Module, device: Device) -> torch.optim.Optimizer:
    """torch's fused SGD. The one for the CPU is wrong in bfloat16 (torch 2.13)."""
    return torch.optim.SGD(model.parameters(), lr=RATE, fused=device.type == "cuda")


def layer_kinds(backend: str) -> dict[str, Callable[..., nn.Module]]:
    """The layers by name; another way to compute a layer is one line here."""
    return {
        "plain": nn.Linear,
        "cuda": functools.partial(cw.Linear, backend=backend),
        "triton": triton_linear,
        "stock": StockLinear,
        "reference": functools.partial(cw.Linear, backend="reference"),
        "isaac": isaac_linear,
    }


def relative_error(own: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    """The largest ``||own - expected|| / ||expected||``; NaN where one is."""
    errors = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(own, expected, strict=True)]
    return max(errors, key=lambda e: (e != e, e))


def emended(x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """``dw`` and ``db`` in float64."""
    dw, db = cw.reference.emended_weight_grad(x.detach().double(), dy.double(), True)
    assert db is not None
    return dw, db


def layer_case(shape: Shape, dtype_name: str, device: Device) -> Case:
    """Forward and backward of one layer, with the input's gradient."""
    rows, inputs, outputs, _ = shape
    make: dict[str, Any] = {"device": device.type, "dtype": DTYPES[dtype_name]}

    def build(name: str, kind: Callable[..., nn.Module]) -> Work:
        torch.manual_seed(0)
        x = torch.randn(rows, inputs, **make).requires_grad_()
        dy = torch.randn(rows, outputs, **make)
        layer = kind(inputs, outputs, **make)
        weight: Any = layer.weight

        def run() -> None:
            x.grad = None
            for parameter in layer.parameters():
                parameter.grad = None
            layer(x).backward(dy)

        def error() -> float:
            run()
            wide_x, wide_dy = x.detach().double(), dy.double()
            dw, db = (wide_dy.T @ wide_x, wide_dy.sum(0)) if name == "plain" else emended(x, dy)
            own = [x.grad, *(parameter.grad for parameter in layer.parameters())]
            return relative_error([g for g in own if g is not None], [wide_dy @ weight.detach().double(), dw, db])

        return Work(run, None if name == "isaac" else error)

    size = DTYPES[dtype_name].itemsize
    return Case(
        "linear",
        shape.name,
        dtype_name,
        {name: functools.partial(build, name, kind) for name, kind in layer_kinds(device.backend).items()},
        "plain",
        BOUNDS[dtype_name],
        least_bytes=2.0 * size * (rows * inputs + rows * outputs + inputs * outputs),
        least_flops=6.0 * rows * inputs * outputs,
    )


def step_case(shape: Shape, dtype_name: str, device: Device) -> Case:
    """A whole step of SGD on one layer: forward, backward with the input's gradient, update."""
    rows, inputs, outputs, _ = shape
    make: dict[str, Any] = {"device": device.type, "dtype": DTYPES[dtype_name]}

    def build(name: str, kind: Callable[..., nn.Module]) -> Work:
        torch.manual_seed(0)
        x = torch.randn(rows, inputs, **make).requires_grad_()
        dy = torch.randn(rows, outputs, **make)
        layer = kind(inputs, outputs, **make)
        optimizer: Any
        if name == "fused":
            optimizer = cw.optim.FusedSGD(layer, torch.tensor(RATE, device=device.type))
        else:
            optimizer = sgd(layer, device)

        def run() -> None:
            x.grad = None
            optimizer.zero_grad()
            layer(x).backward(dy)
            optimizer.step()

        def error() -> float:
            # From zero, with a rate of 1, the weights after a step are the gradient itself.
            with torch.no_grad():
                for parameter in layer.parameters():
                    parameter.zero_()
            set_rate(1.0)
            run()
            set_rate(RATE)
            plain = dy.double().T @ x.detach().double(), dy.double().sum(0)
            return relative_error(
                [-p.detach() for p in layer.parameters()], plain if name == "plain" else emended(x, dy)
            )

        def set_rate(value: float) -> None:
            for group in optimizer.param_groups:
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(value)
                else:
                    group["lr"] = value

        return Work(run, error)

    kinds = layer_kinds(device.backend)
    chosen = {"plain": kinds["plain"], "cuda": kinds["cuda"], "fused": kinds["cuda"]}
    size = DTYPES[dtype_name].itemsize
    return Case(
        "step",
        shape.name,
        dtype_name,
        {name: functools.partial(build, name, kind) for name, kind in chosen.items()},
        "plain",
        BOUNDS[dtype_name],
        least_bytes=size * (2.0 * rows * (inputs + outputs) + 4.0 * inputs * outputs),
        least_flops=6.0 * rows * inputs * outputs,
    )


def network_case(op: str, widths: Sequence[int], rows: int, dtype_name: str, device: Device) -> Case:
    """A training step of a multi-layer perceptron with cross-entropy and torch's fused SGD."""
    make: dict[str, Any] = {"device": device.type, "dtype": DTYPES[dtype_name]}

    def build(name: str, kind: Callable[..., nn.Module]) -> Work:
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(widths):
            layers += [kind(inputs, outputs, **make), nn.ReLU()]
        model = nn.Sequential(*layers[:-1])
        if name == "batched":
            cw.convert(model, batch_factors=True, backend=device.backend)
        x = torch.randn(rows, widths[0], **make)
        labels = torch.randint(widths[-1], (rows,), device=device.type)
        optimizer = sgd(model, device)

        def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
            loss = F.cross_entropy(model(x).to(torch.promote_types(x.dtype, torch.float32)), labels)
            return list(torch.autograd.grad(loss, list(model.parameters())))

        def run() -> None:
            optimizer.zero_grad()
            F.cross_entropy(model(x).to(torch.promote_types(x.dtype, torch.float32)), labels).backward()
            optimizer.step()

        def error() -> float:
            wide = cw.revert(copy.deepcopy(model)).double()
            if name != "plain":
                cw.convert(wide, backend="reference")
            own, expected = ([g.flatten() for g in gradients(m, x.to(t))] for m, t in ((model, x.dtype), (wide, F64)))
            return relative_error([torch.cat(own)], [torch.cat(expected)])

        return Work(run, None if name in ("isaac", "stock") else error)

    kinds = layer_kinds(device.backend)
    kinds["batched"] = kinds["cuda"]
    return Case(
        op,
        f"{rows}x{'-'.join(map(str, widths)) if len(widths) < 8 else f'{len(widths) - 1}*{widths[0]}'}",
        dtype_name,
        {name: functools.partial(build, name, kind) for name, kind in kinds.items() if name != "reference"},
        "plain",
        NETWORK_BOUNDS[dtype_name],
        least_flops=sum(6.0 * rows * i * o for i, o in itertools.pairwise(widths)) - 2.0 * rows * widths[0] * widths[1],
    )


def factor_case(n: int, device: Device) -> Case:
    """Factor and inverse of one matrix, float32, against cuSOLVER through torch."""
    torch.manual_seed(0)
    x = torch.randn(n, 2 * n)
    gram = (x @ x.T).to(device.type)
    c = gram.diagonal().sum() / n
    kernels = dispatch.select("auto", gram)

    def check(invert: Callable[[], Tensor]) -> Work:
        expected = torch.linalg.inv(gram.double() + c.double() * torch.eye(n, device=gram.device))
        return Work(invert, lambda: relative_error([invert()], [expected]))

    def own() -> Work:
        return check(lambda: kernels.factor(gram, 1.0, "relative", "raw", n, n))

    eye = torch.eye(n, device=gram.device)

    def stock() -> Work:
        return check(lambda: torch.cholesky_solve(eye, torch.linalg.cholesky_ex(gram + c * eye)[0]))

    def alone() -> Work:
        return Work(lambda: torch.linalg.cholesky_ex(gram + c * eye))

    return Case(
        "factor",
        f"{n}",
        "float32",
        {"torch": stock, "cuda": own, "cholesky_ex": alone},
        "torch",
        1e-4,
        modes=("graph",),
        least_bytes=8.0 * n * n,
        least_flops=1.0 * n**3,
    )


def factors_case(n: int, device: Device) -> Case:
    """Grams and inverses of `MATRICES` inputs ``[n, 2n]``, float32: batched, one by one, and by torch's batches."""
    torch.manual_seed(0)
    xs = torch.randn(MATRICES, n, 2 * n, device=device.type)
    kernels = dispatch.select("auto", xs[0])
    rest = (1.0, "relative", "raw")

    def check(invert: Callable[[], Any]) -> Work:
        wide = xs.double()
        grams = wide @ wide.mT
        c = grams.diagonal(dim1=-2, dim2=-1).sum(-1) / n
        expected = torch.linalg.inv(grams + c[:, None, None] * torch.eye(n, device=xs.device, dtype=F64))
        return Work(invert, lambda: relative_error(invert(), expected))

    def batched() -> Work:
        lists = [False] * MATRICES, ["dual"] * MATRICES, [False] * MATRICES
        return check(lambda: kernels.emended_inputs(list(xs), *lists, *rest)[0])

    def alone() -> Work:
        return check(lambda: [kernels.input_inverse(x, False, "dual", *rest) for x in xs])

    eye = torch.eye(n, device=xs.device)

    def stock() -> Work:
        def invert() -> Tensor:
            grams = xs @ xs.mT
            c = grams.diagonal(dim1=-2, dim2=-1).sum(-1) / n
            lower, _ = torch.linalg.cholesky_ex(grams + c[:, None, None] * eye)
            return torch.cholesky_solve(eye.expand(MATRICES, n, n), lower)

        return check(invert)

    return Case(
        "factors",
        f"{MATRICES}*{n}",
        "float32",
        {"torch": stock, "cuda": alone, "batched": batched},
        "torch",
        1e-4,
        modes=("graph",),
        least_bytes=MATRICES * 12.0 * n * n,
        least_flops=MATRICES * 3.0 * n**3,
    )


def parts_case(shape: Shape, dtype_name: str, device: Device) -> Case:
    """The parts of a step alone, against the plain weight gradient."""
    rows, inputs, outputs, _ = shape
    make: dict[str, Any] = {"device": device.type, "dtype": DTYPES[dtype_name]}
    torch.manual_seed(0)
    x, dy = torch.randn(rows, inputs, **make), torch.randn(rows, outputs, **make)
    kernels = dispatch.select("auto", x)
    form = "dual" if rows <= inputs else "primal"
    options = (True, form, 1.0, "relative", "nlms")

    def weight_grad() -> Work:
        prepared = kernels.emended_input(x, *options)

        def run() -> Any:
            return kernels.weight_grad(dy, *prepared)

        return Work(run, lambda: relative_error(run(), emended(x, dy)))

    return Case(
        "parts",
        shape.name,
        dtype_name,
        {
            "plain_dw": lambda: Work(lambda: dy.T @ x),
            "input_gram": lambda: Work(lambda: kernels.input_gram(x, True, form)),
            "input_inverse": lambda: Work(lambda: kernels.input_inverse(x, *options)),
            "emended_input": lambda: Work(lambda: kernels.emended_input(x, *options)),
            "weight_grad": weight_grad,
        },
        "plain_dw",
        BOUNDS[dtype_name],
        modes=("graph",),
    )


def whole_case(shape: Shape, dtype_name: str, device: Device) -> Case:
    """A weight gradient from x and dy: by the separate kernels, and by one launch, by each variant and as planned."""
    rows, inputs, outputs, _ = shape
    make: dict[str, Any] = {"device": device.type, "dtype": DTYPES[dtype_name]}
    options = (1.0, "relative", "nlms")

    def build(provider: str) -> Work:
        torch.manual_seed(0)
        x, dy = torch.randn(rows, inputs, **make), torch.randn(rows, outputs, **make)
        kernels = dispatch.select("auto", x)
        if provider == "separate":

            def run() -> Any:
                return kernels.weight_grad(dy, *kernels.emended_input(x, True, "dual", *options))

        else:
            fused = getattr(torch.ops.consequentialism, "fused_weight_grad", None)
            if fused is None:
                raise ImportError("this version has no fused_weight_grad")
            if device.type != "cuda" and provider != "planned":
                raise ImportError("a variant of the CUDA kernel")
            variant = () if provider == "planned" else (provider,)

            def run() -> Any:
                return (fused.by if variant else fused.default)(x, dy, True, *options, *variant)

        return Work(run, lambda: relative_error(run(), emended(x, dy)))

    return Case(
        "whole",
        shape.name,
        dtype_name,
        {name: functools.partial(build, name) for name in ("separate", "planned", "recompute", "cooperative")},
        "separate",
        BOUNDS[dtype_name],
        modes=("graph",),
    )


def cases(device: Device, quick: bool) -> list[Callable[[], Case]]:
    """All cases, the targets' first; what is left out where it must be quick stands last in each list.

    Each is made when it is its turn, for it holds memory of the device.
    """
    if device.type == "cpu":
        return rehearsal(device)
    layers, orders = (LAYERS[:4], ORDERS[:4]) if quick else (LAYERS, ORDERS)
    made: list[Callable[[], Case]] = []
    for shape, dtype_name in itertools.product(layers, DTYPES):
        made.append(functools.partial(layer_case, shape, dtype_name, device))
    made += [functools.partial(step_case, STEP, dtype_name, device) for dtype_name in DTYPES]
    made.append(functools.partial(network_case, "mlp", MLP, MLP_ROWS, "float32", device))
    made += [functools.partial(network_case, "deep", DEEP, DEEP_ROWS, dtype_name, device) for dtype_name in DTYPES]
    whole = WHOLE[1:5] if quick else WHOLE
    made += [functools.partial(whole_case, shape, d, device) for shape, d in itertools.product(whole, DTYPES)]
    made += [functools.partial(factor_case, n, device) for n in orders]
    made += [functools.partial(factors_case, n, device) for n in orders]
    made += [functools.partial(parts_case, shape, d, device) for shape, d in itertools.product(layers, DTYPES)]
    return made


def rehearsal(device: Device) -> list[Callable[[], Case]]:
    """The same cases, small enough for a processor."""
    made: list[Callable[[], Case]] = []
    for shape, dtype_name in itertools.product((Shape(9, 20, 12), Shape(40, 12, 7)), DTYPES):
        made.append(functools.partial(layer_case, shape, dtype_name, device))
        made.append(functools.partial(step_case, shape, dtype_name, device))
        made.append(functools.partial(parts_case, shape, dtype_name, device))
        made.append(functools.partial(whole_case, shape, dtype_name, device))
    made.append(functools.partial(network_case, "mlp", (20, 30, 30, 10), 12, "float32", device))
    made += [functools.partial(network_case, "deep", (16,) * 9, 8, dtype_name, device) for dtype_name in DTYPES]
    made += [functools.partial(make, n, device) for make in (factor_case, factors_case) for n in (5, 33)]
    return made
