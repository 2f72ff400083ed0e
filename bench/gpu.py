"""``python -m bench.gpu``: layers and ops on a GPU, each replayed in a CUDA graph, as a table and a CSV.

A layer's time is forward and backward with the input's gradient; its ratio is to `torch.nn.Linear` in the same run.
Input sets rotate, so that the cache does not hold them. The shapes and the targets are those of KERNELS.md's table.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

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


def input_sets(bytes_each: float) -> int:
    """How many copies of the inputs are rotated: more than the cache holds, 2 to 8."""
    return int(min(8, max(2, 1 + CACHE_BYTES // max(bytes_each, 1))))


def quantiles(times: list[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile."""
    cuts = statistics.quantiles(times, n=10)
    return statistics.median(times), cuts[1], cuts[7]


def captured(work: Callable[[int], Any], sets: int) -> torch.cuda.CUDAGraph:
    """A graph of ``work(0) ... work(sets - 1)``."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for i in range(sets):
            work(i)
            work(i)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(sets):
            work(i)
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
        "reference": cw.Linear(inputs, outputs, backend="reference", **make),
    }
    graphs = {name: captured(step(layer), sets) for name, layer in layers.items()}
    works: dict[str, tuple[Callable[[], Any], int]] = {name: (graph.replay, sets) for name, graph in graphs.items()}
    for name, layer in layers.items():
        works[f"{name}, eager"] = (eager(step(layer), sets), sets)
    times = {name: quantiles(found) for name, found in measure(works, rounds).items()}
    plain = {"": times["plain"][0], ", eager": times["plain, eager"][0]}
    return [
        Row(
            "linear", name, shape.name, dtype_name, *found,
            found[0] / plain[", eager" if name.endswith("eager") else ""],
            target if name == "cuda" else None,
        )
        for name, found in times.items()
    ]  # fmt: skip


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
    lines = [f"{'op':14}{'provider':18}{'shape':16}{'dtype':10}{'us':>9}{'p20':>9}{'p80':>9}{'ratio':>7}{'target':>8}"]
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        target = "" if row.target is None else f"{row.target:.2f}"
        numbers = f"{row.median_us:9.1f}{row.p20_us:9.1f}{row.p80_us:9.1f}{ratio:>7}{target:>8}"
        lines.append(f"{row.op:14}{row.provider:18}{row.shape:16}{row.dtype:10}{numbers}")
    return "\n".join(lines)


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
    rows: list[Row] = []
    for n in ORDERS[:4] if chosen.quick else ORDERS:
        rows += bench_factor(n, rounds)
    for shape in SHAPES[:4] if chosen.quick else SHAPES:
        for dtype_name in DTYPES:
            rows += bench_ops(shape, dtype_name, rounds)
            rows += bench_layer(shape, dtype_name, rounds)
    if chosen.out is not None:
        write(rows, chosen.out)
    print(table(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
