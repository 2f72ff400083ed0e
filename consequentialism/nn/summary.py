"""`summary`: which layers of a model are emended or stepped in coordinates, and why the others are not."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn
from torch.nn.parameter import is_lazy

from .convert import IN_COORDINATES, survey


class Row(NamedTuple):
    """Layers of one class that share a reason."""

    kind: str
    state: str
    layers: int
    parameters: int
    first: str


class Summary:
    """What `summary` returns; its ``str`` and ``repr`` are the table."""

    def __init__(self, rows: list[Row], total: int) -> None:
        self.rows = rows
        self.parameters = total

    @property
    def emended_layers(self) -> int:
        """How many layers are emended."""
        return sum(row.layers for row in self.rows if row.state == EMENDED)

    @property
    def emended_parameters(self) -> int:
        """How many parameters the emended layers have."""
        return sum(row.parameters for row in self.rows if row.state == EMENDED)

    @property
    def layers_in_coordinates(self) -> int:
        """How many layers an optimizer steps in coordinates."""
        return sum(row.layers for row in self.rows if _in_coordinates(row))

    @property
    def parameters_in_coordinates(self) -> int:
        """How many parameters those layers have."""
        return sum(row.parameters for row in self.rows if _in_coordinates(row))

    def __repr__(self) -> str:
        head = ("kind", "layers", "parameters", "state", "first")
        cells = [(row.kind, f"{row.layers:,}", f"{row.parameters:,}", row.state, row.first) for row in self.rows]
        widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
        lines = [
            f"{kind:<{widths[0]}}  {layers:>{widths[1]}}  {count:>{widths[2]}}  {state:<{widths[3]}}  {first}".rstrip()
            for kind, layers, count, state, first in (head, *cells)
        ]
        if self.layers_in_coordinates:
            count = self.parameters_in_coordinates
            lines.append(f"layers in coordinates: {self.layers_in_coordinates:,} || params in coordinates: {count:,}")
        percent = 100 * self.emended_parameters / self.parameters if self.parameters else 0.0
        lines.append(
            f"emended layers: {self.emended_layers:,} || emended params: {self.emended_parameters:,} || "
            f"all params: {self.parameters:,} || emended%: {percent:.4f}"
        )
        return "\n".join(lines)


EMENDED = "emended"


def _in_coordinates(row: Row) -> bool:
    return row.state.startswith(IN_COORDINATES)


def summary(model: nn.Module) -> Summary:
    """Tell which layers of ``model`` are emended, which are stepped in coordinates and by what, and why others are not.

    The result prints as a table with one line for each kind of layer. A layer is a module with a matrix of its own. The
    last line counts all parameters; a parameter that two modules share counts once, for the first of them, and one
    that has no shape yet does not count. The summary looks at classes and weights, not at what forward does: a parent
    that computes with a layer's weight without calling the layer gives it the plain gradient.

        print(cw.summary(model))

    Returns:
        The table as its ``str``; ``rows``, each with ``kind``, ``state`` (``"emended"``, what steps it in
        coordinates, or why neither), ``layers``, ``parameters`` and the ``first`` layer's name; ``emended_layers``,
        ``emended_parameters``, ``layers_in_coordinates``, ``parameters_in_coordinates``, ``parameters``.

    Raises:
        TypeError: ``model`` is not a module.
    """
    counted: set[int] = set()
    found: dict[tuple[str, str], Row] = {}
    # A tied weight that is emended or stepped in coordinates counts there.
    by_state = sorted(survey(model), key=lambda layer: layer[2] != EMENDED and not layer[2].startswith(IN_COORDINATES))
    for name, module, state, parameters in by_state:
        kind = type(module).__name__
        new = {id(p): p.numel() for p in parameters if id(p) not in counted and not is_lazy(p)}
        counted.update(new)
        row = found.get((kind, state), Row(kind, state, 0, 0, name or type(module).__name__))
        found[kind, state] = row._replace(layers=row.layers + 1, parameters=row.parameters + sum(new.values()))
    rows = sorted(found.values(), key=lambda row: (row.state != EMENDED, not _in_coordinates(row), -row.parameters))
    return Summary(rows, sum(p.numel() for p in model.parameters() if not is_lazy(p)))
