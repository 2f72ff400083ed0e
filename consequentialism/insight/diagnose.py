"""`diagnose`: what the next step does to every layer, plain and emended."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from ..options import Options, OptionsDict, as_count, options_from
from .batch import check, undisturbed
from .cost import cost_of
from .figures import Figures, figures
from .layers import Seen, look


@dataclass
class Layer(Figures):
    """What `diagnose` found of one layer.

    Attributes:
        name: The layer's name in the model.
        kind: The name of its class.
        rows: ``N``: all leading dimensions, or batch times positions; over all calls of the layer.
        inputs: ``I`` of a group, the bias's among them.
        outputs: ``O``.
        groups: A convolution's groups; each has a Gram of its own, and figures are taken over all of them.
        form: ``"dual"`` (the Gram is ``[N, N]``), ``"primal"`` (``[I, I]``) or ``"diagonal"`` (an embedding's).
        damping: The option's value.
        damping_c: The ridge ``c``, the mean of the groups'.
        effective_rank: The exponential of the entropy of the Gram's spectrum (Roy and Vetterli, EUSIPCO 2007).
        mean_share: Share of the trace that lies in the direction of the mean row.
        top_share: Share of the 16 leading directions.
        condition: The condition number of ``G + c I``.
        spectrum_rows: How many rows the spectrum is taken from; all, unless ``min(N, I)`` is above 2,048.
        spectrum: Eigenvalues, largest first.
        interference: In a plain step, the change that the other rows' steps make to a row's outputs, in units of the
            change that its own makes; root mean square over rows. 0 where no row disturbs another.
        interference_emended: The same of an emended step.
        undone: In a plain step, the share of what the rows' own steps do against the loss, to first order, that the
            others' steps undo.
        undone_emended: The same of an emended step.
        matrix: ``M_jk [n, n]`` of a plain step: what row ``k``'s step does for row ``j``, in units of its own; negative
            where it undoes. Of evenly spaced rows where there are more than ``most_rows``.
        matrix_emended: The same of an emended step.
        cosine: The cosine between the plain and the emended gradient of weight and bias.
        norm_ratio: The emended gradient's norm, with the layer's ``scale``, in units of the plain one's: by about so
            much a learning rate for SGD is to be divided.
        predicted_cost: Operations of forward and backward in those of the plain layer; None for an embedding.
        measured_cost: Seconds of forward and backward in those of the plain layer.
        plain_ms: Milliseconds of the plain layer's forward and backward.
        retries: Factors that broke down and were tried again with more damping.
    """

    name: str
    kind: str
    damping: float
    predicted_cost: float | None
    measured_cost: float
    plain_ms: float
    retries: int

    def to_dict(self) -> dict[str, Any]:
        """Numbers of six digits, strings and nested lists, for JSON; None stands for what is not finite."""
        return {f.name: _plain_value(getattr(self, f.name)) for f in fields(self)}


COLUMNS: tuple[tuple[str, Callable[[Layer], str]], ...] = (
    ("layer", lambda row: row.name or "(itself)"),
    ("kind", lambda row: row.kind),
    ("rows", lambda row: f"{row.rows:,}"),
    ("in", lambda row: f"{row.inputs:,}"),
    ("out", lambda row: f"{row.outputs:,}"),
    ("form", lambda row: row.form),
    ("c", lambda row: f"{row.damping_c:.2g}"),
    ("rank", lambda row: f"{row.effective_rank:.1f}"),
    ("mean", lambda row: f"{row.mean_share:.0%}"),
    ("top 16", lambda row: f"{row.top_share:.0%}"),
    ("cond", lambda row: f"{row.condition:.2g}"),
    ("interference", lambda row: f"{row.interference:.2g} -> {row.interference_emended:.2g}"),
    ("undone", lambda row: f"{row.undone:.0%} -> {row.undone_emended:.0%}"),
    ("cosine", lambda row: f"{row.cosine:.2f}"),
    ("norm", lambda row: f"{row.norm_ratio:.3g}"),
    ("cost", lambda row: "" if row.predicted_cost is None else f"{row.predicted_cost:.2f}"),
    ("measured", lambda row: f"{row.measured_cost:.2f}"),
    ("retries", lambda row: f"{row.retries}"),
)
LEGEND = (
    "interference: what the other rows' steps do to a row's outputs, in units of its own step, plain -> emended; "
    "undone: the share of the rows' own gain that the others' steps take back; rank, mean, top 16: effective rank of "
    "the input Gram, shares of the mean direction and of the 16 leading ones; cosine, norm: emended gradient beside "
    "plain; cost: predicted, of forward and backward, in those of the plain layer"
)


class Report:
    """What `diagnose` returns; its ``str`` is a table, and notebooks show the page.

    Attributes:
        layers: A `Layer` each, in the model's order.
        loss: The loss of the batch.
        left_out: Why the other layers with a weight are not there, by name.
    """

    def __init__(self, layers: list[Layer], loss: float, left_out: dict[str, str]) -> None:
        self.layers = layers
        self.loss = loss
        self.left_out = left_out

    def __getitem__(self, name: str) -> Layer:
        """The layer of that name.

        Raises:
            KeyError: There is none.
        """
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(f"no layer {name!r}; there are {', '.join(repr(layer.name) for layer in self.layers)}")

    def __str__(self) -> str:
        cells = [[head for head, _ in COLUMNS], *([show(row) for _, show in COLUMNS] for row in self.layers)]
        legend = textwrap.wrap(f"loss {self.loss:.4g}. {LEGEND}.", 118)
        return "\n".join([*aligned(cells, left=2), *legend, *self._left_out_lines()])

    def __repr__(self) -> str:
        return f"<consequentialism report of {len(self.layers)} layers, loss {self.loss:.4g}; print it for the table>"

    def _left_out_lines(self) -> list[str]:
        if not self.left_out:
            return []
        return ["left out: " + "; ".join(f"{name or '(itself)'}: {why}" for name, why in self.left_out.items())]

    def to_dict(self) -> dict[str, Any]:
        """Numbers, strings and nested lists."""
        return {
            "loss": self.loss,
            "layers": [layer.to_dict() for layer in self.layers],
            "left_out": dict(self.left_out),
        }

    def to_json(self, path: str | Path | None = None) -> str:
        """`to_dict` as JSON, also written to ``path`` where there is one."""
        return _written(json.dumps(self.to_dict(), allow_nan=False), path)

    def to_html(self, path: str | Path | None = None) -> str:
        """One page with pictures that needs no other file and no network, also written to ``path`` where there is one.

        Raises:
            UserError: matplotlib is not installed.
        """
        from .pages import report_page

        return _written(report_page(self), path)

    def _repr_html_(self) -> str:
        from .pages import report_body

        return report_body(self)


def diagnose(
    model: nn.Module,
    batch: Any,
    loss_fn: Callable[..., Any],
    *,
    most_rows: int = 128,
    **options: Unpack[OptionsDict],
) -> Report:
    """Show what the next step on ``batch`` does to every layer: how much samples disturb each other, and what it costs.

    Every layer that can be emended is examined, converted or not: linear layers, convolutions, transposed ones,
    embeddings, ``Conv1D`` and those of `register`. An emended layer is examined with its own options, the others with
    the options that are given. The model runs once, in its present mode; forward and backward of each layer are then
    timed on the inputs that it saw. Other tensors stand in for parameters and buffers meanwhile, so that parameters,
    gradients, buffers, random number generators, modes and hooks are afterwards the same bits as before, also after an
    error.

        print(cw.diagnose(model, (images, labels), torch.nn.functional.cross_entropy))

    Memory: a copy of all layers' inputs, and the rows of one layer at a time in float64 (for convolutions, unfolded
    patches): all of them where there are no more rows than inputs, else pieces of 64 MiB and a Gram of the inputs.

    Args:
        model: A model on one device, without sharded weights.
        batch: A batch as ``loss_fn`` takes it.
        loss_fn: With a batch ``(inputs, targets)`` it is called as ``loss_fn(model(inputs), targets)``; with a mapping
            as ``loss_fn(model(**batch), batch)``; with a tensor as ``loss_fn(model(batch))``. One whose first argument
            is named ``model``, ``module``, ``net``, ``network`` or ``m`` is called as ``loss_fn(model, batch)``,
            whatever the batch is.
        most_rows: The most rows that the matrices of interference have.
        **options: The fields of `consequentialism.Options`, for layers that are not emended yet.

    Returns:
        A `Report`: print it, or use ``to_html()``, ``to_json()`` and ``layers``.

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: A model without layers that can be emended, with sharded weights or on two devices, an empty batch,
            a loss that is not one finite number, or an option out of its range.
    """
    settings = options_from(options)
    most_rows = as_count("most_rows", most_rows, "an integer above 0")
    model = check(model, batch, loss_fn)
    with undisturbed(model):
        loss, seen, left_out = look(model, batch, loss_fn)
        layers = [_layer(one, settings, most_rows) for one in seen]
    return Report(layers, loss, left_out)


def _layer(seen: Seen, default: Options, most_rows: int) -> Layer:
    options = seen.options(default)
    with torch.no_grad():
        found = figures(seen, options, most_rows)
    spent = cost_of(seen, found, options)
    values = {f.name: _on_host(getattr(found, f.name)) for f in fields(found)}
    return Layer(
        name=seen.name,
        kind=type(seen.module).__name__,
        damping=options.damping,
        predicted_cost=spent.predicted,
        measured_cost=spent.measured,
        plain_ms=spent.plain_ms,
        retries=spent.retries,
        **values,
    )


def aligned(cells: list[list[str]], left: int) -> list[str]:
    """Rows as lines; the first ``left`` columns begin, the others end at one place."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(
            f"{cell:<{width}}" if place < left else f"{cell:>{width}}"
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]


def _on_host(value: Any) -> Any:
    return value.detach().cpu() if isinstance(value, Tensor) else value


def _plain_value(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _plain_value(value.tolist())
    if isinstance(value, (list, tuple)):
        return [_plain_value(one) for one in value]
    if isinstance(value, Mapping):
        return {key: _plain_value(one) for key, one in value.items()}
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def _written(text: str, path: str | Path | None) -> str:
    if path is not None:
        Path(path).write_text(text, encoding="utf-8")
    return text
