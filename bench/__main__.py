"""``python -m bench``, or ``python -m consequentialism bench``: the cost of a step, as a table and a CSV."""

from __future__ import annotations

import argparse
import csv
import os
import sys
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # read when torch loads: the profiler's chatter stays off

import torch

from .cases import CPU_SHAPES, PROVIDERS, Shape
from .conv_cases import CONV_PROVIDERS, CONV_SHAPES, ConvShape
from .runner import Result, run

SHAPES: dict[str, tuple[Shape, ...] | tuple[ConvShape, ...]] = {"linear": CPU_SHAPES, "conv2d": CONV_SHAPES}
NAMES = list(dict.fromkeys([*PROVIDERS, *CONV_PROVIDERS]))


def parse_shape(text: str) -> Shape:
    """``N,I,O`` as a shape."""
    try:
        rows, inputs, outputs = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"shape must be N,I,O, three integers, got {text!r}") from None
    if min(rows, inputs, outputs) < 1:
        raise argparse.ArgumentTypeError(f"shape must be N,I,O, each at least 1, got {text!r}")
    return Shape(rows, inputs, outputs)


def positive(text: str) -> float:
    """A number above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be above 0, got {text!r}")
    return value


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; 0 where it ran."""
    parser = argparse.ArgumentParser(prog="consequentialism bench", description=__doc__)
    parser.add_argument("--shape", type=parse_shape, action="append", help="N,I,O of a linear layer; may be repeated")
    parser.add_argument("--op", choices=list(SHAPES), action="append", help="instead of all; may be repeated")
    parser.add_argument("--provider", choices=NAMES, action="append", help="besides plain; may be repeated")
    parser.add_argument("--seconds", type=positive, default=12.0, help="about, for each shape (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of the processor (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="write the CSV here")
    chosen = parser.parse_args(arguments)
    if chosen.threads < 1:
        parser.error(f"argument --threads: must be at least 1, got {chosen.threads}")
    torch.set_num_threads(chosen.threads)
    providers = ["plain", *(p for p in chosen.provider or NAMES if p != "plain")]
    shapes: list[Shape | ConvShape] = [shape for op in chosen.op or SHAPES for shape in SHAPES[op]]
    results, missing = run(chosen.shape or shapes, chosen.seconds, providers)
    print_table(results)
    for line in missing:
        print(f"not measured: {line}", file=sys.stderr)
    if chosen.out is not None:
        write_csv(results, chosen.out)
        print(f"wrote {chosen.out}")
    return 0


def print_table(results: list[Result]) -> None:
    """One line for each shape and provider, as text."""
    from rich.console import Console
    from rich.table import Table

    first = results[0]
    title = f"whole step / torch's own layer, {first.dtype}, {first.threads} threads, {first.device}"
    table = Table(title=title)
    for column in ("shape", "provider"):
        table.add_column(column)
    for column in ("ms", "p20", "p80", "ratio", "flop floor", "target", "peak MB"):
        table.add_column(column, justify="right")
    for result in results:
        table.add_row(
            result.shape,
            result.provider,
            f"{result.median_ms:.3f}",
            f"{result.p20_ms:.3f}",
            f"{result.p80_ms:.3f}",
            f"{result.ratio:.2f}",
            f"{result.flop_floor:.2f}" if result.provider == "consequentialism" else "",
            f"{result.target:.2f}" if result.provider == "consequentialism" and result.target else "",
            f"{result.peak_bytes / 1e6:.1f}",
            end_section=result is results[-1] or result.shape != results[results.index(result) + 1].shape,
        )
    Console().print(table)


def write_csv(results: list[Result], path: Path) -> None:
    """Every field of every result."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(results[0].row()), lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in result.row().items()}
            for result in results
        )


if __name__ == "__main__":
    raise SystemExit(main())
