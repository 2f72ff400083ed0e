"""``make report``: docs/benchmarks.md, its pictures and README's figures, from the CSV files in bench/results alone.

Nothing is typed in by hand: every figure is a row's, or worked out from rows. ``--check`` writes nothing and says
whether the texts are what the CSV files give.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from consequentialism.errors import Parser, UserError

from . import table
from .case import OK, Row
from .markdown import document, markdown, where
from .train import draw, recipe_report, show, starts, training_report
from .train.rows import RunRow

ROOT = Path(__file__).resolve().parent.parent
BEGIN = "<!-- figures: written by make report -->"
END = "<!-- end of figures -->"
SHOWN = "consequentialism"  # the provider whose ratios README shows


def step_costs(rows: Sequence[Row], ops: Sequence[str] | None = None) -> str:
    """Ratios to the baseline of every op, shape and provider that was timed."""
    parts = []
    timed = [row for row in rows if row.state == OK and (ops is None or row.op in ops)]
    for op in dict.fromkeys(row.op for row in timed):
        own = [row for row in timed if row.op == op]
        providers = [name for name in dict.fromkeys(row.provider for row in own) if name != own[0].baseline]
        lines = []
        for shape, dtype, mode in dict.fromkeys((row.shape, row.dtype, row.mode) for row in own):
            here = {row.provider: row for row in own if (row.shape, row.dtype, row.mode) == (shape, dtype, mode)}
            base = here.get(own[0].baseline)
            floor = next((row.floor_ratio for row in here.values() if row.floor_ratio and row is not base), None)
            target = next((row.target for row in here.values() if row.target), None)
            ratios = [here[name].ratio if name in here else None for name in providers]
            mine = here.get(SHOWN)
            lines.append(
                (
                    f"{shape}, {dtype}" + ("" if mode == "eager" else f", {mode}"),
                    "" if base is None or base.median_ms is None else f"{base.median_ms:.3f}",
                    "" if floor is None else f"{floor:.2f}",
                    *("" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
                    "" if target is None else f"{target:.2f}",
                    _megabytes(base),
                    _megabytes(mine),
                )
            )
        headings = (
            f"`{op}`", f"{own[0].baseline}, ms", "floor", *(f"`{name}`" for name in providers), "target",
            f"peak MB, {own[0].baseline}", "peak MB, this package",
        )  # fmt: skip
        parts.append(markdown(headings, lines))
    return "\n\n".join(parts)


def _megabytes(row: Row | None) -> str:
    return "" if row is None or row.peak_bytes is None else f"{row.peak_bytes / 1e6:.1f}"


def folders(results: Path) -> list[Path]:
    """The devices' folders."""
    found = sorted(path for path in results.iterdir() if path.is_dir()) if results.is_dir() else []
    if not found:
        raise UserError(f"{results} holds no results: make bench and make bench-train write them")
    return found


def report(results: Path) -> str:
    """The text of docs/benchmarks.md."""
    parts = [
        "# Benchmarks",
        "Written by `make report` from the CSV files in `bench/results`; nothing here is typed in by hand.",
    ]
    for folder in folders(results):
        parts.append(f"Measured in `bench/results/{folder.name}`:")
        if (folder / "step_cost.csv").exists():
            rows = table.read(folder / "step_cost.csv", Row)
            parts += [
                "## The cost of a step",
                f"Measured by `make bench`; {where(rows)}.",
                "Figures are ratios to the baseline (the column in ms) in one run, in which the providers take turns. "
                "The floor is the lowest ratio that bytes and operations allow at the speeds that the device reached: "
                f"{_speeds(rows)}.",
                step_costs(rows),
            ]
        if (folder / "train").is_dir():
            parts += training_report.text(folder / "train", f"benchmarks/{folder.name}")
    return document(parts) + "\n"


def _speeds(rows: Sequence[Row]) -> str:
    speeds = {row.dtype: row for row in rows if row.bandwidth_gb_s and row.matrix_tflop_s}
    return "; ".join(
        f"{dtype}: a copy {row.bandwidth_gb_s:.3g} GB/s, a product {1e3 * (row.matrix_tflop_s or 0):.3g} GFLOP/s"
        for dtype, row in speeds.items()
    )


def step_range(rows: Sequence[Row]) -> str:
    """What a whole step of the measured layers costs, as a sentence for README."""
    parts = []
    for op, what in (("linear", "linear layers"), ("conv2d", "convolutions")):
        ratios = [r.ratio for r in rows if r.op == op and r.provider == SHOWN and r.state == OK and r.ratio is not None]
        if ratios:
            parts.append(f"{min(ratios):.2f} to {max(ratios):.2f} times as long for the {what}")
    return (
        f"The whole training step of a layer takes, compared with torch's own, {', '.join(parts)} that were measured."
    )


def readme_figures(results: Path) -> str:
    """What README quotes."""
    parts = []
    for folder in folders(results):
        train = folder / "train"
        if train.is_dir():
            runs = table.read(train / "runs.csv", RunRow)
            parts += [training_report.overview(show.lines(train)), f"({where(runs)})"]
            parts += filter(None, (recipe_report.overview(train), recipe_report.step_costs(train)))
        if (folder / "step_cost.csv").exists():
            rows = table.read(folder / "step_cost.csv", Row)
            parts += [f"{step_range(rows)} ({where(rows)})"]
    return document(parts)


def with_figures(readme: str, figures: str) -> str:
    """README's text with the figures between its two marks.

    Raises:
        UserError: The marks are not there.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UserError(f"README.md: the marks {BEGIN} and {END} are not there")
    return f"{before}{BEGIN}\n\n{figures}\n\n{END}{after}"


def main(arguments: list[str] | None = None) -> int:
    """Write the report, or check it.

    Returns:
        The exit code: 0; 1 where ``--check`` finds a difference; 2 after one line about what the user can mend.
    """
    parser = Parser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results", help="folder of the CSV files")
    parser.add_argument("--root", type=Path, default=ROOT, help="folder of README.md and docs")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where a text differs")
    try:
        chosen = parser.parse_args(arguments)
        readme = chosen.root / "README.md"
        texts = {
            chosen.root / "docs" / "benchmarks.md": report(chosen.results),
            chosen.root / "docs" / "rates.md": starts.text(chosen.results),
            readme: with_figures(readme.read_text(), readme_figures(chosen.results)),
        }
        if chosen.check:
            stale = [path for path, text in texts.items() if not path.exists() or path.read_text() != text]
            for path in stale:
                print(f"{path.name} is not what the CSV files give: make report", file=sys.stderr)
            return 1 if stale else 0
        for path, text in texts.items():
            path.write_text(text)
        for folder in folders(chosen.results):
            if (folder / "train").is_dir():
                draw.draw(folder / "train", chosen.root / "docs" / "benchmarks" / folder.name)
    except UserError as error:
        print(f"consequentialism report: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
