"""Memory, arithmetic and communication of steps in coordinates at scale: `python tools/scale.py` writes docs/scale.md.

Counts, not measurements. For each weight ``[O, I]`` that is stepped in coordinates, with blocks of ``b`` inputs, ``A``
and ``S`` have ``I b`` numbers each in float32; a Gram of ``N`` rows costs ``N I b`` multiplications and additions,
symmetry used, a root ``2 R b^2 I``, and a step two products, ``4 O I b`` in all. Gram and root are divided by
``refresh_every``. The ranks sum their Grams then: a ring sends ``2 (W - 1) / W`` of them.
"""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import NamedTuple

PAGE = Path(__file__).parent.parent / "docs" / "scale.md"
BLOCK = 256
ROOT_PRODUCTS = 40  # products of order b that a root takes: assumed, meant to be too many
BYTES = 4  # of a float32
RANKS = (8, 64, 1024)
REFRESH = (10, 50)
ROWS_A_RANK = 16_384  # tokens


class Model(NamedTuple):
    name: str
    layers: int
    width: int
    hidden: int  # of the feed-forward part

    def weights(self) -> list[tuple[int, int]]:
        """``(O, I)`` of a layer's linear weights: queries, keys and values in one, output, up, down."""
        d, h = self.width, self.hidden
        return [(3 * d, d), (d, d), (h, d), (d, h)]


MODELS = (
    Model("GPT-2, 124M", 12, 768, 3072),
    Model("GPT-2 medium, 350M", 24, 1024, 4096),
    Model("GPT-2 XL, 1.6B", 48, 1600, 6400),
    Model("7B", 32, 4096, 16_384),
)


class Cost(NamedTuple):
    """Of one rank and step, on average over ``refresh_every`` steps.

    Attributes:
        moments: Bytes of all ``A`` and ``S``.
        parameters: In coordinates.
        gram, root, apply: Multiplications and additions.
        step: Those of forward and backward.
        sent: Bytes.
    """

    moments: int
    parameters: int
    gram: float
    root: float
    apply: float
    step: float
    sent: float


def cost(model: Model, ranks: int, refresh: int, wrap: str) -> Cost:
    """Under ``"ddp"``, ``"fsdp2"`` (rows of W over all ranks) or ``"tp"`` (outputs over 8, data over the rest)."""
    parts = {"ddp": 1, "fsdp2": ranks, "tp": min(ranks, 8)}[wrap]
    moments = parameters = 0
    gram = root = apply = 0.0
    for outputs, inputs in model.weights():
        block = min(BLOCK, inputs)
        moments += 2 * BYTES * inputs * block
        parameters += outputs * inputs
        gram += 2 * ROWS_A_RANK * inputs * block / 2 / refresh
        root += 2 * ROOT_PRODUCTS * block**2 * inputs / refresh
        apply += 2 * 2 * outputs * inputs * block / parts
    layers = model.layers
    summed = moments * layers / 2
    ring = {"ddp": ranks, "fsdp2": ranks, "tp": ranks // parts}[wrap]
    return Cost(
        moments * layers,
        parameters * layers,
        gram * layers,
        root * layers,
        apply * layers,
        6 * ROWS_A_RANK * parameters * layers / (parts if wrap == "tp" else 1),
        summed * 2 * (ring - 1) / ring / refresh,
    )


def table() -> list[str]:
    lines = [
        "| model | ranks | wrap | refresh | A and S a rank, MB | AdamW's state a rank, MB | Gram, % | roots, % | "
        "products, % | Grams sent a step, MB |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for model in MODELS:
        for ranks in RANKS:
            for wrap in ("ddp", "fsdp2", "tp"):
                for refresh in REFRESH:
                    own = cost(model, ranks, refresh, wrap)
                    shards = {"ddp": 1, "fsdp2": ranks, "tp": min(ranks, 8)}[wrap]
                    adam = 2 * BYTES * own.parameters / shards
                    shares = [f"{100 * part / own.step:.2f}" for part in (own.gram, own.root, own.apply)]
                    cells = [
                        model.name,
                        str(ranks),
                        wrap,
                        str(refresh),
                        f"{own.moments / 1e6:.0f}",
                        f"{adam / 1e6:.0f}",
                    ]
                    lines.append("| " + " | ".join([*cells, *shares, f"{own.sent / 1e6:.1f}"]) + " |")
    return lines


def page() -> str:
    seven, small = cost(MODELS[-1], 1024, 10, "fsdp2"), cost(MODELS[0], 8, 10, "ddp")
    state, own = 2 * BYTES * small.parameters / 1e6, 2 * BYTES * seven.parameters / 1024 / 1e6
    share = 100 * (small.gram + small.root + small.apply) / small.step
    said = [
        f"Predictions, not measurements: what `optim.Emended` adds to a training step of a transformer, counted by "
        f"`tools/scale.py` (which writes this page) for blocks of {BLOCK} inputs, {ROWS_A_RANK:,} tokens a rank and "
        f"float32 moments. Shares are of the arithmetic of forward and backward on that rank, 6 a token and parameter. "
        f"A Gram is counted once a weight, though layers of one input share it; a root as {ROOT_PRODUCTS} products of "
        f"its order, which is assumed, and meant to be too many. Tensor parallelism is over 8 ranks, by outputs; "
        f"weights split by inputs are refused today, and are counted as if they were served.",
        f"Data parallel, GPT-2 124M on 8 ranks: A and S are {small.moments / 1e6:.0f} MB beside {state:.0f} MB of "
        f"AdamW's own state; Grams, roots and products together are {share:.1f} % of the step's arithmetic.",
        f"FSDP2, 7B on 1,024 ranks: A and S are on every rank, {seven.moments / 1e9:.1f} GB, where AdamW's own sharded "
        f"state is {own:.0f} MB. Here the state has to be sharded: each rank makes and keeps the roots of some "
        f"weights, as Shampoo distributes them, and the others fetch a root when they need it. Nothing of that is "
        f"written yet; until then `filter_fn`, or a smaller `block`, bounds it.",
        "Every rank makes every root: their share falls with the tokens of a rank and with `refresh_every`, not with "
        "the number of ranks.",
        "Not in the counts: how far from its peak a kernel runs, the latency of collectives, stragglers. Those only "
        "several machines can show; none was there, and no curve over gloo was measured.",
    ]
    paragraphs = [textwrap.fill(text, 119) for text in said]
    return "\n\n".join(["# Scale, on paper", paragraphs[0], "\n".join(table()), *paragraphs[1:]]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
