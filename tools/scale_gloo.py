"""What steps in coordinates cost over 1, 2 and 4 processes with gloo: `python tools/scale_gloo.py`, some minutes.

It writes ``bench/results/cpu-2-threads/gloo.csv``, from which `tools/scale.py` makes a table of docs/scale.md. DDP over
a stack of a transformer's linear weights, with the same rows a rank; the state on all ranks and divided among them,
step by step in turn. Seconds are those of a rank's processor, so that waiting for others and for their cores is not in
them, and stand as multiples of the same rank's forward and backward; bytes are what is handed to a collective.
"""

from __future__ import annotations

import contextlib
import csv
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parent))
from scale import GLOO, Model

import consequentialism as cw

MODEL = Model("stack", 4, 256, 1024)
ROWS = 1024  # a rank
RANKS = (1, 2, 4)
STEPS = 24
COLLECTIVES = ("all_reduce", "reduce", "broadcast", "all_gather")


def network() -> nn.Sequential:
    """The weights of `MODEL` one after the other, those of queries, keys and values cut to the width."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(MODEL.layers):
        for outputs, inputs in MODEL.weights():
            layers += [nn.Linear(inputs, outputs, bias=False), nn.Tanh(), *([First()] if outputs == 3 * inputs else [])]
    return nn.Sequential(*layers)


class First(nn.Module):
    """The first `MODEL.width` entries of the last dimension."""

    def forward(self, x: Tensor) -> Tensor:
        return x[..., : MODEL.width]


@contextlib.contextmanager
def counted(found: dict[str, int]) -> Iterator[None]:
    """Note how many bytes collectives get in the block."""
    own = {name: getattr(dist, name) for name in COLLECTIVES}

    def counting(name: str) -> Any:
        def collective(*arguments: Any, **options: Any) -> Any:
            found["bytes"] += next(a for a in arguments if isinstance(a, Tensor)).nbytes
            return own[name](*arguments, **options)

        return collective

    try:
        for name in COLLECTIVES:
            setattr(dist, name, counting(name))
        yield
    finally:
        for name in COLLECTIVES:
            setattr(dist, name, own[name])


def work(rank: int, ranks: int, folder: str) -> None:
    """One rank: all its rows to a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous{ranks}", rank=rank, world_size=ranks)
    runs: dict[bool, Any] = {}
    for sharded in (False, True):
        model = DistributedDataParallel(network())
        inner = torch.optim.AdamW(model.parameters(), lr=1e-3)
        runs[sharded] = model, cw.optim.Emended(inner, model, refresh_every=2, shard_state=sharded)
    seconds: dict[tuple[bool, str], list[float]] = {}
    sent: dict[tuple[bool, str], int] = {}
    torch.manual_seed(rank)
    for step in range(STEPS):
        for sharded in (False, True) if step % 2 else (True, False):
            model, optimizer = runs[sharded]
            x, kind = torch.randn(ROWS, MODEL.width), "refresh" if optimizer.is_recording else "between"
            optimizer.zero_grad()
            begin = time.process_time()
            model(x).square().mean().backward()
            middle = time.process_time()
            found = {"bytes": 0}
            with counted(found):
                optimizer.step()
            seconds.setdefault((sharded, kind), []).append(time.process_time() - middle)
            seconds.setdefault((sharded, "pass, " + kind), []).append(middle - begin)
            sent[sharded, kind] = found["bytes"]
    rows = []
    for sharded, (_, optimizer) in runs.items():
        kept = [
            state[key].nbytes for state in optimizer.state.values() for key in ("input_gram", "root") if key in state
        ]
        plain = statistics.median(seconds[sharded, "pass, between"])
        own = {kind: statistics.median(seconds[sharded, kind]) / plain for kind in ("refresh", "between")}
        recording = statistics.median(seconds[sharded, "pass, refresh"]) / plain - 1
        counts = [sent[sharded, "refresh"], sent[sharded, "between"]]
        rows.append([ranks, sharded, rank, own["refresh"], own["between"], recording, *counts, sum(kept)])
    torch.save(rows, Path(folder) / f"{ranks}-{rank}.pt")
    dist.destroy_process_group()


HEADER = [
    "ranks",
    "sharded",
    "rank",
    "refresh_step",
    "step",
    "grams",
    "refresh_bytes",
    "step_bytes",
    "state_bytes",
]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, GLOO.open("w", newline="") as file:
        write = csv.writer(file, lineterminator="\n")
        write.writerow(HEADER)
        for ranks in RANKS:
            mp.spawn(work, (ranks, folder), nprocs=ranks)
            for rank in range(ranks):
                for row in torch.load(Path(folder) / f"{ranks}-{rank}.pt"):
                    write.writerow([f"{value:.4g}" if isinstance(value, float) else value for value in row])


if __name__ == "__main__":
    main()
