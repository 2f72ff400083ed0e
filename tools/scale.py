"""Memory, arithmetic and communication of steps in coordinates at scale: `python tools/scale.py` writes docs/scale.md.

Counts, not measurements. For each weight ``[O, I]`` that is stepped in coordinates, with blocks of ``b`` inputs, ``A``
and ``S`` have ``I b`` numbers each in float32; a Gram of ``N`` rows costs ``N I b`` multiplications and additions,
symmetry used, a root ``2 R b^2 I``, and a step two products, ``4 O I b`` in all. Gram and root are divided by
``refresh_every``. The ranks sum their Grams then: a ring sends ``2 (W - 1) / W`` of them. With ``shard_state=True`` a
rank keeps its share, or the largest moment, receives every root in every step, and its Grams are summed once.
"""

from __future__ import annotations

import csv
import textwrap
from pathlib import Path
from typing import NamedTuple

PAGE = Path(__file__).parent.parent / "docs" / "scale.md"
GLOO = (
    Path(__file__).parent.parent / "bench" / "results" / "cpu-2-threads" / "gloo.csv"
)  # tools/scale_gloo.py writes it
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
    """What one rank computes, sends and keeps a step, on average over ``refresh_every`` steps.

    Attributes:
        moments: Bytes of all ``A`` and ``S``.
        share: Those of a rank with ``shard_state=True``.
        parameters: How many parameters are stepped in coordinates.
        gram, root, apply: Multiplications and additions.
        step: Those of forward and backward.
        sent: Bytes.
    """

    moments: int
    share: float
    parameters: int
    gram: float
    root: float
    apply: float
    step: float
    sent: float


def cost(model: Model, ranks: int, refresh: int, wrap: str) -> Cost:
    """Under ``"ddp"``, ``"fsdp2"`` (rows of W over all ranks) or ``"tp"`` (outputs over 8, data over the rest)."""
    parts = {"ddp": 1, "fsdp2": ranks, "tp": min(ranks, 8)}[wrap]
    moments = parameters = largest = 0
    gram = root = apply = 0.0
    for outputs, inputs in model.weights():
        block = min(BLOCK, inputs)
        moments += 2 * BYTES * inputs * block
        largest = max(largest, 2 * BYTES * inputs * block)
        parameters += outputs * inputs
        gram += 2 * ROWS_A_RANK * inputs * block / 2 / refresh
        root += 2 * ROOT_PRODUCTS * block**2 * inputs / refresh
        apply += 2 * 2 * outputs * inputs * block / parts
    layers = model.layers
    summed = moments * layers / 2
    ring = {"ddp": ranks, "fsdp2": ranks, "tp": ranks // parts}[wrap]
    return Cost(
        moments * layers,
        max(moments * layers / (parts if wrap == "tp" else ranks), largest),  # of a mesh over its last dimension
        parameters * layers,
        gram * layers,
        root * layers,
        apply * layers,
        6 * ROWS_A_RANK * parameters * layers / (parts if wrap == "tp" else 1),
        summed * 2 * (ring - 1) / ring / refresh,
    )


def table() -> list[str]:
    lines = [
        "| model | ranks | wrap | A and S a rank, MB | sharded, MB | AdamW's state a rank, MB | Gram, % | roots, % | "
        "products, % | Grams sent a step, MB |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for model in MODELS:
        for ranks in RANKS:
            for wrap in ("ddp", "fsdp2", "tp"):
                often, seldom = (cost(model, ranks, refresh, wrap) for refresh in REFRESH)
                shards = {"ddp": 1, "fsdp2": ranks, "tp": min(ranks, 8)}[wrap]
                adam = 2 * BYTES * often.parameters / shards
                cells = [model.name, f"{ranks:,}", wrap]
                cells += [f"{size / 1e6:,.0f}" for size in (often.moments, often.share, adam)]
                cells += [
                    f"{100 * often.gram / often.step:.2f} / {100 * seldom.gram / seldom.step:.2f}",
                    f"{100 * often.root / often.step:.2f} / {100 * seldom.root / seldom.step:.2f}",
                    f"{100 * often.apply / often.step:.2f}",
                    f"{often.sent / 1e6:.1f} / {seldom.sent / 1e6:.1f}",
                ]
                lines.append("| " + " | ".join(cells) + " |")
    return lines


def least_rows(model: Model, refresh: int, most: float) -> int:
    """The tokens of a rank at which Gram, roots and products are that share of the step's arithmetic, under DDP."""
    own = cost(model, 8, refresh, "ddp")
    fixed, gram = own.root + own.apply, own.gram / own.step  # the Gram's share does not depend on the rows
    return round(fixed / (most - gram) / (own.step / ROWS_A_RANK))


def measured() -> list[str]:
    """The table of what `tools/scale_gloo.py` has measured; of each kind the rank that took longest."""
    with GLOO.open() as file:
        rows = list(csv.DictReader(file))
    lines = [
        "| processes | state | a refresh step | a step between | Grams, forward and backward | sent in a refresh step, "
        "MB | in a step between, MB | A and S a rank, MB |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for ranks, sharded in dict.fromkeys((row["ranks"], row["sharded"]) for row in rows):
        own = [row for row in rows if (row["ranks"], row["sharded"]) == (ranks, sharded)]
        most = {
            name: max(float(row[name]) for row in own) for name in own[0] if name not in ("ranks", "sharded", "rank")
        }
        cells = [ranks, "sharded" if sharded == "True" else "on every rank"]
        cells += [f"{most[name]:.2f}" for name in ("refresh_step", "step", "grams")]
        cells += [f"{most[name] / 1e6:.1f}" for name in ("refresh_bytes", "step_bytes", "state_bytes")]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def page() -> str:
    seven, small = cost(MODELS[-1], 1024, 10, "fsdp2"), cost(MODELS[0], 8, 10, "ddp")
    state, own = 2 * BYTES * small.parameters / 1e6, 2 * BYTES * seven.parameters / 1024 / 1e6
    share = 100 * (small.gram + small.root + small.apply) / small.step
    roots, passed = seven.moments / 2, 3 * BYTES * seven.parameters
    least = "; ".join(
        f"{model.name}: " + " and ".join(f"{least_rows(model, refresh, 0.1):,}" for refresh in REFRESH)
        for model in MODELS
    )
    said = [
        "This page says what `optim.Emended` adds to a training step of a transformer. All figures are predictions, "
        "except in the last table. They are counted by `tools/scale.py`, which writes this page, for blocks of "
        f"{BLOCK} inputs, {ROWS_A_RANK:,} tokens a rank and float32 moments. Shares are of the arithmetic of forward "
        "and backward on that rank, 6 operations a token and parameter. A Gram is counted once for each weight, "
        f"although layers with the same input share it. A root is counted as {ROOT_PRODUCTS} products of its order, "
        "which is assumed, and meant to be too many.",
        "Tensor parallelism is over 8 ranks, by outputs. Weights that are split by inputs are refused today; here they "
        f"are counted as if they were served. Two numbers in a cell are for a refresh every {REFRESH[0]} and "
        f"{REFRESH[1]} steps. *Sharded* is A and S a rank with `shard_state=True`.",
        f"Data parallel, GPT-2 124M on 8 ranks: A and S are {small.moments / 1e6:.0f} MB, beside {state:.0f} MB of "
        f"AdamW's own state. Grams, roots and products together are {share:.1f} % of the step's arithmetic.",
        f"FSDP2, 7B on 1,024 ranks: on every rank A and S are {seven.moments / 1e9:.1f} GB, where AdamW's own sharded "
        f"state is {own:.0f} MB. With `shard_state=True` a rank keeps {seven.share / 1e6:.0f} MB. It then receives all "
        f"roots in every step, {roots / 1e9:.2f} GB, which is {100 * roots / passed:.1f} % of the "
        f"{passed / 1e9:.0f} GB that FSDP2 itself moves (float32 weights, twice, and gradients). On refresh steps the "
        f"Grams, {roots / 1e9:.2f} GB, are still on every rank from forward to the step; `filter_fn` or a smaller "
        "`block` bounds them.",
        "Without `shard_state=True` every rank makes every root. The share of roots then falls with the tokens of a "
        "rank and with `refresh_every`, but not with the number of ranks. With `shard_state=True` a rank makes only "
        "its own.",
        "It stops paying at few tokens a rank, because roots and products do not shrink with them. Under DDP all three "
        "together are a tenth of the step's arithmetic at these numbers of tokens a rank, with `refresh_every` "
        f"{REFRESH[0]} and {REFRESH[1]}: {least}.",
    ]
    gloo = (
        "Measured with gloo (`tools/scale_gloo.py`): DDP with AdamW over 4 times the four weights of a transformer 256 "
        "wide, float32, 1,024 rows a rank, one thread a process. Times are processor time of the rank that took "
        "longest, so waiting is not in them, as a multiple of its own forward and backward without Grams. Bytes are "
        "those handed to collectives."
    )
    last = (
        "These counts leave out how far from its peak a kernel runs, the latency of collectives, stragglers, and how "
        "much of the sending hides behind arithmetic. Only several machines can show that."
    )
    paragraphs = [textwrap.fill(text, 119) for text in (*said, gloo, last)]
    tables = ["\n".join(table()), "\n".join(measured())]
    return (
        "\n\n".join(["# Scale, on paper", *paragraphs[:2], tables[0], *paragraphs[2:-1], tables[1], paragraphs[-1]])
        + "\n"
    )


if __name__ == "__main__":
    PAGE.write_text(page())
