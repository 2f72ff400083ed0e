"""What the processes of test_emended_distributed.py run."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from distributed_workers import RANKS, own_rows
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import consequentialism as cw

REFRESH_EVERY = 2


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5, bias=False), nn.Tanh(), nn.Linear(5, 3)
    return nn.Sequential(*layers).double()


def optimizer_of(name: str, model: nn.Module) -> torch.optim.Optimizer:
    options: dict[str, Any] = {"memory": 0.5, "refresh_every": REFRESH_EVERY, "damping": 0.1}
    if name == "Muon":
        return cw.optim.Muon(model, lr=0.02, aux={"lr": 0.01}, **options)
    inner = {
        "SGD": lambda: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        "AdamW": lambda: torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1),
    }[name]()
    return cw.optim.Emended(inner, model, **options)


def full(parameter: Tensor) -> Tensor:
    return (parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter).detach().clone()


def train(name: str, x: Tensor, target: Tensor, counts: list[list[int]], rank: int, wrap: str) -> dict[str, Any]:
    """A step for each split of the batch over the ranks; a rank of None has the whole batch."""
    model = network()
    wrapped: nn.Module = model
    if wrap == "fsdp":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (RANKS,))
        for layer in (model[0], model[2], model[4], model):
            fully_shard(layer, mesh=mesh)
    elif wrap == "ddp":
        wrapped = DistributedDataParallel(model)
    optimizer = optimizer_of(name, model)
    reduced: list[int] = []
    own = dist.all_reduce

    def counted(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
        reduced[-1] += 1
        return own(tensor, *arguments, **options)

    dist.all_reduce = counted
    try:
        for split in counts:
            total = sum(split)
            optimizer.zero_grad()
            mine = (x[:total], target[:total])
            if wrap != "one":
                mine = own_rows(rank, mine[0], split), own_rows(rank, mine[1], split)
            loss = nn.functional.cross_entropy(wrapped(mine[0]), mine[1], reduction="sum") / total
            (loss if wrap == "one" else RANKS * loss).backward()  # the mean over ranks is that of the whole batch
            reduced.append(0)
            optimizer.step()
    finally:
        dist.all_reduce = own
    return {"parameters": [full(p) for p in model.parameters()], "reduced": reduced}


def job(rank: int, name: str, x: Tensor, target: Tensor, counts: list[list[int]], wrap: str) -> dict[str, Any]:
    return train(name, x, target, counts, rank, wrap)
