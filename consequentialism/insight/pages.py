"""Reports as pages: HTML with its pictures inside."""

from __future__ import annotations

import base64
import html
import io
from typing import TYPE_CHECKING, Any

from ..errors import need

if TYPE_CHECKING:
    from .diagnose import Layer, Report
    from .find_damping import Found

MOST_PICTURES = 12  # of layers, those in which a plain step interferes most
PLAIN, EMENDED = "#d62728", "#1f77b4"
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 1180px; margin: 2em auto;
  padding: 0 1em }
table { border-collapse: collapse; font-size: 13px; display: block; overflow-x: auto }
th, td { padding: 3px 9px; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap }
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) { text-align: left }
img { max-width: 100%; height: auto }
p.legend { color: #555; font-size: 13px }
"""


def report_page(report: Report) -> str:
    """A whole page."""
    return page("What the next step does to every layer", report_body(report))


def page(title: str, body: str) -> str:
    """One file that needs no other."""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style></head><body><h1>{html.escape(title)}</h1>{body}</body></html>"
    )


def report_body(report: Report) -> str:
    """The table and the pictures of a `Report`."""
    from .diagnose import COLUMNS, LEGEND

    cells = [[show(row) for _, show in COLUMNS] for row in report.layers]
    parts = [f"<p>{len(report.layers)} layers, loss {report.loss:.4g}.</p>", table([h for h, _ in COLUMNS], cells)]
    parts.append(f'<p class="legend">{html.escape(LEGEND)}.</p>')
    if report.left_out:
        named = "; ".join(f"{name or '(itself)'}: {why}" for name, why in report.left_out.items())
        parts.append(f'<p class="legend">Left out: {html.escape(named)}.</p>')
    parts.append(picture(overview(report.layers), "Interference of a plain and of an emended step, by layer"))
    shown = sorted(report.layers, key=lambda layer: -layer.interference)[:MOST_PICTURES]
    if len(shown) < len(report.layers):
        parts.append(f"<p>Pictures of the {len(shown)} layers in which a plain step interferes most.</p>")
    for layer in [layer for layer in report.layers if layer in shown]:
        parts.append(f"<h2>{html.escape(layer.name or layer.kind)}</h2>")
        parts.append(picture(matrices(layer), f"Interference and spectrum of {layer.name}"))
    return "\n".join(parts)


def table(head: list[str], rows: list[list[str]]) -> str:
    """An HTML table."""
    lines = ["".join(f"<th>{html.escape(cell)}</th>" for cell in head)]
    lines += ["".join(f"<td>{html.escape(cell).replace('-&gt;', '&rarr;')}</td>" for cell in row) for row in rows]
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def picture(figure: Any, description: str) -> str:
    """A figure within the page."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    content = base64.b64encode(buffer.getvalue()).decode()
    return f'<p><img alt="{html.escape(description)}" src="data:image/png;base64,{content}"></p>'


def new_figure(width: float, height: float) -> Any:
    """A figure that no window system knows of.

    Raises:
        UserError: matplotlib is not installed.
    """
    return need("matplotlib.figure").Figure(figsize=(width, height))


def overview(layers: list[Layer]) -> Any:
    """Interference of both steps, a pair of bars a layer."""
    figure = new_figure(11, 1.2 + 0.32 * len(layers))
    axes = figure.subplots()
    top, bottom = 0.35 / figure.get_figheight(), 0.5 / figure.get_figheight()
    figure.subplots_adjust(left=0.16, right=0.99, top=1 - top, bottom=bottom)
    for place, layer in enumerate(reversed(layers)):
        axes.barh(place + 0.2, layer.interference, 0.38, color=PLAIN, label="plain step" if place == 0 else None)
        axes.barh(
            place - 0.2, layer.interference_emended, 0.38, color=EMENDED, label="emended step" if place == 0 else None
        )
    axes.set_yticks(range(len(layers)), [layer.name or layer.kind for layer in reversed(layers)], fontsize=8)
    axes.set_xlabel("what the other rows' steps do to a row's outputs, in units of its own step (root mean square)")
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="upper right", ncols=2, frameon=False, borderaxespad=0.1)
    return figure


def matrices(layer: Layer) -> Any:
    """Who disturbs whom, plain and emended, and the spectrum of the input Gram beside the ridge."""
    figure = new_figure(13, 4.1)
    left, middle, bar, right = figure.subplots(1, 4, width_ratios=(1, 1, 0.04, 1.05))
    figure.subplots_adjust(left=0.05, right=0.99, bottom=0.12, top=0.92, wspace=0.28)
    pairs = (
        (left, layer.matrix, "plain", layer.interference),
        (middle, layer.matrix_emended, "emended", layer.interference_emended),
    )
    for axes, matrix, title, number in pairs:
        image = axes.imshow(matrix.clamp(-1, 1).numpy(), cmap="RdBu", vmin=-1, vmax=1, interpolation="nearest")
        axes.set_title(f"{title} step: interference {number:.2g}", fontsize=10)
        axes.set_xlabel("step taken for row")
        axes.set_ylabel("effect on row")
    figure.colorbar(image, cax=bar, ticks=[-1, 0, 1])
    bar.set_yticklabels(["undoes", "0", "helps"], fontsize=9)
    bar.yaxis.set_ticks_position("left")
    values = layer.spectrum[layer.spectrum > layer.spectrum.max() * 1e-12] if layer.spectrum.numel() else layer.spectrum
    right.plot(range(1, values.numel() + 1), values.numpy(), color="#333333", linewidth=1.6)
    if layer.damping_c > 0:
        label = f"ridge c (damping {layer.damping:g})"
        right.axhline(layer.damping_c, color=EMENDED, linestyle=(0, (4, 2)), label=label)
        right.legend(frameon=False, fontsize=9)
    right.set_yscale("log")
    right.minorticks_off()
    right.set_xlabel("direction")
    right.set_title(f"spectrum of the input Gram, effective rank {layer.effective_rank:.1f}", fontsize=10)
    right.grid(alpha=0.3)
    return figure


def found_body(found: Found) -> str:
    """The heat map of a `Found`, and its table as text."""
    best = f"damping {found.damping:g}, learning rate {found.lr:g}, loss {found.best.loss:.4g} from {found.start:.4g}"
    text = f"<pre>{html.escape(str(found))}</pre>"
    return (
        f"<p>Best after {found.steps} steps: {best}.</p>" + picture(heat_map(found), "Loss by damping and rate") + text
    )


def heat_map(found: Found) -> Any:
    """The loss over damping and learning rate; the plain layers are the lowest row."""
    rates = sorted({one.lr for one in found.tries})
    dampings = sorted({one.damping for one in found.tries}, key=lambda damping: (damping is not None, damping or 0))
    loss = {(one.damping, one.lr): one.loss for one in found.tries}
    values = [[min(loss[damping, rate], found.start) for rate in rates] for damping in dampings]
    figure = new_figure(1.8 + 1.05 * len(rates), 1.2 + 0.5 * len(dampings))
    axes = figure.subplots()
    figure.subplots_adjust(left=0.14, right=0.99, top=0.9, bottom=0.62 / figure.get_figheight())
    positive = min(min(row) for row in values) > 0
    shown = axes.imshow(values, cmap="viridis_r", aspect="auto", origin="lower", norm="log" if positive else "linear")
    for row, damping in enumerate(dampings):
        for column, rate in enumerate(rates):
            value, best = loss[damping, rate], (damping, rate) == (found.damping, found.lr)
            text = f"{value:.3g}" if value < float("inf") else "diverged"
            dark = shown.norm(values[row][column]) > 0.5
            weight = "bold" if best else "normal"
            text = f"[{text}]" if best else text
            axes.text(
                column,
                row,
                text,
                ha="center",
                va="center",
                fontsize=9,
                weight=weight,
                color="white" if dark else "black",
            )
    axes.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates])
    axes.set_yticks(range(len(dampings)), ["plain" if d is None else f"{d:g}" for d in dampings])
    axes.set_xlabel("learning rate")
    axes.set_ylabel("damping")
    axes.set_title(f"loss after {found.steps} steps", fontsize=10)
    return figure
