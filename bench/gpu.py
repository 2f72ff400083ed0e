"""``python -m bench.gpu``: layers and ops on a GPU, each replayed in a CUDA graph, as a table and a CSV.

A layer's time is forward and backward with the input's gradient; its ratio is to `torch.nn.Linear` in the same run.
Input sets rotate, so that the cache does not hold them. The shapes and the targets are those of KERNELS.md's table.
"""

from __future__ import annotations

import argparse
import csv
import functools
import itertools
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import consequentialism as cw
from consequentialism import ops

from .cases import Shape

SHAPES = (
    Shape(64, 784, 1600, 1.5),
    Shape(128, 1024, 1024, 1.5),
    Shape(256, 4096, 4096, 1.25),
    Shape(512, 4096, 11008, 1.35),
    Shape(1024, 4096, 4096, 1.6),
    Shape(8192, 1024, 4096, 1.6),
)
ORDERS = (32, 64, 128, 256, 512, 1024, 2048)
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
MLP = (784, 1600, 1600, 1600, 1600, 10)  # ISAAC's network for MNIST
MLP_BATCH = 60
MLP_TARGET = 1.25
EAGER_ROWS, EAGER_SPEEDUP = 128, 5.0  # up to so many rows, so much faster than the reference, eager
ERROR_BOUNDS = {"bfloat16": 1e-2, "float32": 1e-4}  # of dw
REPLAY_US = 400  # a graph's replay takes at least about as long
CACHE_BYTES = 50e6  # of an H100's L2: the input sets together are larger, where memory for that is little


class Row(NamedTuple):
    """One line of the CSV; times in microseconds."""

    op: str
    provider: str
    shape: str
    dtype: str
    median_us: float
    p20_us: float
    p80_us: float
    ratio: float | None
    target: float | None
    error: float | None = None  # of dw, relative to float64


def repeats_for(sets: int, flops: float) -> int:
    """How often a graph goes through its input sets: often enough that a launch's own time does not show."""
    microseconds = 5 + flops / 5e7  # of a call, at 50 TFLOP/s
    return int(min(8, max(1, -(-REPLAY_US // (sets * microseconds)))))


def input_sets(bytes_each: float) -> int:
    """How many copies of the inputs are rotated: more than the cache holds, 2 to 8."""
    return int(min(8, max(2, 1 + CACHE_BYTES // max(bytes_each, 1))))


def quantiles(times: list[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile."""
    cuts = statistics.quantiles(times, n=10)
    return statistics.median(times), cuts[1], cuts[7]


def captured(work: Callable[[int], Any], sets: int, repeats: int = 1) -> torch.cuda.CUDAGraph:
    """A graph of ``work(0) ... work(sets - 1)``, so often."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for i in range(sets):
            work(i)
            work(i)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(sets * repeats):
            work(i % sets)
    return graph


def eager(work: Callable[[int], Any], sets: int) -> Callable[[], None]:
    """``work(0) ... work(sets - 1)`` without a graph."""

    def run() -> None:
        for i in range(sets):
            work(i)

    return run


def measure(works: dict[str, tuple[Callable[[], Any], int]], rounds: int) -> dict[str, list[float]]:
    """Microseconds a call, one round after the other, so that drift meets all alike. Each work does so many calls."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for round_ in range(rounds + 3):
        for name, (work, calls) in works.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            work()
            stop.record()
            stop.synchronize()
            if round_ >= 3:
                times[name].append(1000 * start.elapsed_time(stop) / calls)
    return times


def bench_layer(shape: Shape, dtype_name: str, rounds: int) -> list[Row]:
    """Forward and backward of one layer, by each provider."""
    dtype = DTYPES[dtype_name]
    rows, inputs, outputs, target = shape
    size = torch.empty((), dtype=dtype).element_size()
    sets = input_sets(size * (rows * (inputs + outputs) + inputs * outputs))
    batches = [
        (
            torch.randn(rows, inputs, device="cuda", dtype=dtype, requires_grad=True),
            torch.randn(rows, outputs, device="cuda", dtype=dtype),
        )
        for _ in range(sets)
    ]

    def step(layer: nn.Module) -> Callable[[int], None]:
        def work(i: int) -> None:
            x, dy = batches[i]
            x.grad = None
            for parameter in layer.parameters():
                parameter.grad = None
            layer(x).backward(dy)

        return work

    make: dict[str, Any] = {"device": "cuda", "dtype": dtype}
    layers: dict[str, nn.Module] = {
        "plain": nn.Linear(inputs, outputs, **make),
        "cuda": cw.Linear(inputs, outputs, backend="cuda", **make),
        "triton": cw.Linear(inputs, outputs, backend="triton", **make),
        "reference": cw.Linear(inputs, outputs, backend="reference", **make),
    }
    errors = {name: error_of(layer, step(layer), *batches[0]) for name, layer in layers.items() if name != "plain"}
    repeats = repeats_for(sets, 6 * rows * inputs * outputs)
    graphs = {name: captured(step(layer), sets, repeats) for name, layer in layers.items()}
    works: dict[str, tuple[Callable[[], Any], int]] = {}
    for name, layer in layers.items():
        works[name] = (graphs[name].replay, sets * repeats)
        works[f"{name}, eager"] = (eager(step(layer), sets), sets)
    times = {name: quantiles(found) for name, found in measure(works, rounds).items()}
    plain = {"": times["plain"][0], ", eager": times["plain, eager"][0]}
    return [
        Row(
            "linear", name, shape.name, dtype_name, *found,
            found[0] / plain[", eager" if name.endswith("eager") else ""],
            target if name == "cuda" else None, errors.get(name),
        )
        for name, found in times.items()
    ]  # fmt: skip


def error_of(layer: nn.Module, work: Callable[[int], None], x: Tensor, dy: Tensor) -> float:
    """The relative error of dw after ``work(0)``, which ran on ``x`` and ``dy``: no speed is told of a wrong result."""
    work(0)
    expected, _ = cw.reference.emended_weight_grad(x.detach().double(), dy.double(), True)
    own: Any = layer.weight.grad
    return ((own.double() - expected).norm() / expected.norm()).item()


def bench_mlp(rounds: int) -> list[Row]:
    """A training step of ISAAC's network with plain SGD, float32: ratio to the same network of `torch.nn.Linear`."""
    sets = 8
    xs = [torch.randn(MLP_BATCH, MLP[0], device="cuda") for _ in range(sets)]
    labels = [torch.randint(MLP[-1], (MLP_BATCH,), device="cuda") for _ in range(sets)]

    def step(model: nn.Module) -> Callable[[int], None]:
        parameters: list[Tensor] = list(model.parameters())

        def work(i: int) -> None:
            loss = nn.functional.cross_entropy(model(xs[i]), labels[i])
            gradients = torch.autograd.grad(loss, parameters)
            with torch.no_grad():
                torch._foreach_add_(parameters, list(gradients), alpha=-1e-4)

        return work

    def network(linear: Callable[..., nn.Module]) -> nn.Module:
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(MLP):
            layers += [linear(inputs, outputs, device="cuda"), nn.ReLU()]
        return nn.Sequential(*layers[:-1])

    models = {
        "plain": network(nn.Linear),
        "cuda": network(functools.partial(cw.Linear, backend="cuda")),
        "reference": network(functools.partial(cw.Linear, backend="reference")),
    }
    works: dict[str, tuple[Callable[[], Any], int]] = {}
    for name, model in models.items():
        works[name] = (captured(step(model), sets).replay, sets)
    times = {name: quantiles(found) for name, found in measure(works, rounds).items()}
    shape = f"{MLP_BATCH}x{len(MLP) - 1}x{MLP[1]}"
    return [
        Row("mlp", name, shape, "float32", *found, found[0] / times["plain"][0], MLP_TARGET if name == "cuda" else None)
        for name, found in times.items()
    ]


def bench_factor(n: int, rounds: int) -> list[Row]:
    """Factor and inverse of one matrix of order ``n``, float32: the kernel against cuSOLVER through torch."""
    grams = []
    for _ in range(8):
        x = torch.randn(n, 2 * n, device="cuda")
        grams.append(x @ x.T)
    eye = torch.eye(n, device="cuda")

    def stock(i: int) -> None:
        torch.cholesky_solve(eye, torch.linalg.cholesky_ex(grams[i] + eye)[0])

    works: dict[str, tuple[Callable[[], Any], int]] = {
        "cuda": (captured(lambda i: ops.factor(grams[i], 1.0, "relative", "raw", n, n), 8).replay, 8),
        "torch": (captured(stock, 8).replay, 8),
    }
    times = {name: quantiles(found) for name, found in measure(works, rounds).items()}
    return [
        Row("factor", name, f"{n}", "float32", *found, found[0] / times["torch"][0], None)
        for name, found in times.items()
    ]


def bench_ops(shape: Shape, dtype_name: str, rounds: int) -> list[Row]:
    """The parts of a step alone."""
    dtype = DTYPES[dtype_name]
    xs = [torch.randn(shape.rows, shape.inputs, device="cuda", dtype=dtype) for _ in range(8)]
    dys = [torch.randn(shape.rows, shape.outputs, device="cuda", dtype=dtype) for _ in range(8)]
    form: Any = "dual" if shape.rows <= shape.inputs else "primal"
    emended = [ops.emended_input(x, True, form, 1.0, "relative", "nlms") for x in xs]
    parts: dict[str, Callable[[int], Any]] = {
        "input_gram": lambda i: ops.input_gram(xs[i], True, form),
        "input_inverse": lambda i: ops.input_inverse(xs[i], True, form, 1.0, "relative", "nlms"),
        "emended_input": lambda i: ops.emended_input(xs[i], True, form, 1.0, "relative", "nlms"),
        "weight_grad": lambda i: ops.weight_grad(dys[i], *emended[i]),
        "plain dw": lambda i: dys[i].T @ xs[i],
    }
    times = measure({name: (captured(part, 8).replay, 8) for name, part in parts.items()}, rounds)
    return [Row(name, "cuda", shape.name, dtype_name, *quantiles(found), None, None) for name, found in times.items()]


def write(rows: list[Row], path: Path) -> None:
    """The CSV, with what is the same for all lines in each of them."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    same = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "version": cw.__version__,
        "commit": commit,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=[*Row._fields, *same], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            values = {k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row._asdict().items()}
            writer.writerow({**values, **same})


def table(rows: list[Row]) -> str:
    """One short line for each row."""
    lines = [
        f"{'op':14}{'provider':18}{'shape':16}{'dtype':10}{'us':>9}{'p20':>9}{'p80':>9}{'ratio':>7}{'target':>8}{'error':>9}"
    ]
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        target = "" if row.target is None else f"{row.target:.2f}"
        error = "" if row.error is None else f"{row.error:.1e}"
        numbers = f"{row.median_us:9.1f}{row.p20_us:9.1f}{row.p80_us:9.1f}{ratio:>7}{target:>8}{error:>9}"
        lines.append(f"{row.op:14}{row.provider:18}{row.shape:16}{row.dtype:10}{numbers}".rstrip())
    return "\n".join(lines)


def verdicts(rows: list[Row]) -> list[str]:
    """A line for each target, met or missed, and one for each result that is wrong."""
    lines = []
    medians = {(row.op, row.shape, row.dtype, row.provider): row.median_us for row in rows}
    for row in rows:
        name = f"{row.op} {row.shape} {row.dtype}"
        if row.error is not None and not row.error <= ERROR_BOUNDS[row.dtype]:
            lines.append(f"WRONG   {name}, {row.provider}: relative error of dw {row.error:.2g}")
        if row.target is not None and row.ratio is not None:
            met = "met   " if row.ratio <= row.target else "missed"
            lines.append(f"{met}  {name}: {row.ratio:.2f} of plain, target {row.target:.2f}")
        eager = medians.get((row.op, row.shape, row.dtype, "reference, eager"))
        if row.provider == "cuda" and eager is not None and int(row.shape.split("x")[0]) <= EAGER_ROWS:
            faster = eager / row.median_us
            met = "met   " if faster >= EAGER_SPEEDUP else "missed"
            lines.append(f"{met}  {name}: {faster:.1f} times faster than the reference, eager, target {EAGER_SPEEDUP}")
    return lines


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the CSV here")
    parser.add_argument("--quick", action="store_true", help="the four smallest shapes, fewer rounds")
    chosen = parser.parse_args(arguments)
    state = cw.backends()["cuda"]
    if state != "available":
        print(f"bench.gpu: backend cuda: {state}", file=sys.stderr)
        return 2
    rounds = 30 if chosen.quick else 100
    works: dict[str, Callable[[], list[Row]]] = {}
    for shape in SHAPES[:4] if chosen.quick else SHAPES:
        for dtype_name in DTYPES:
            works[f"linear {shape.name} {dtype_name}"] = functools.partial(bench_layer, shape, dtype_name, rounds)
            works[f"ops {shape.name} {dtype_name}"] = functools.partial(bench_ops, shape, dtype_name, rounds)
    works["mlp"] = functools.partial(bench_mlp, rounds)
    for n in ORDERS[:4] if chosen.quick else ORDERS:
        works[f"factor {n}"] = functools.partial(bench_factor, n, rounds)
    rows: list[Row] = []
    broken = []
    for name, work in works.items():
        try:
            rows += work()
        except RuntimeError as error:
            broken.append(f"BROKEN  {name}: {str(error).splitlines()[0]}")
        if chosen.out is not None and rows:
            write(rows, chosen.out)  # what is there stays, should time run out
    print(table(rows))
    lines = verdicts(rows) + broken
    print("\n".join(lines))
    return 1 if any(line.startswith(("WRONG", "BROKEN")) for line in lines) else 0


if __name__ == "__main__":
    raise SystemExit(main())
