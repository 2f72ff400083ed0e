"""What the processes of test_distributed.py run. Rank 0 writes what it found where the test reads it."""

from __future__ import annotations

import copy
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import consequentialism as cw

RANKS = 2
Job = tuple[Callable[..., dict[str, Any]], tuple[Any, ...]]  # work(rank, *arguments)


def launch(jobs: dict[str, Job], folder: Path) -> list[dict[str, dict[str, Any]]]:
    """Run every job in every rank of one group, in order; what each rank's jobs returned.

    A job that raises has ``{"error": traceback}`` for a result; the jobs after it do not run.
    """
    context = mp.spawn(_run, args=(jobs, str(folder)), nprocs=RANKS, join=False)
    try:
        while not context.join(timeout=120):
            pass
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]


def _run(rank: int, jobs: dict[str, Job], folder: str) -> None:
    torch.set_num_threads(1)
    patience = timedelta(seconds=60)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", patience, rank=rank, world_size=RANKS)
    results: dict[str, dict[str, Any]] = {}
    for name, (work, arguments) in jobs.items():
        try:
            results[name] = work(rank, *arguments)
            dist.barrier()
        except Exception:
            results[name] = {"error": traceback.format_exc()}
            break
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def own_rows(rank: int, x: Tensor, counts: list[int]) -> Tensor:
    """This rank's rows of a global batch."""
    begin = sum(counts[:rank])
    return x[begin : begin + counts[rank]]


def whole(parameter: Tensor | None) -> Tensor | None:
    """A parameter's gradient, gathered where it is sharded."""
    gradient = None if parameter is None else parameter.grad
    return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient


def data_parallel(rank: int, x: Tensor, dy: Tensor, cases: list[dict[str, Any]]) -> dict[str, Any]:
    """DDP over one linear layer, for many cases in one group."""
    found: dict[str, Any] = {}
    for case in cases:
        torch.manual_seed(0)
        rows = sum(case["counts"])
        own_x, own_dy = (own_rows(rank, t[:rows], case["counts"]) for t in (x[:, : case["inputs"]], dy))
        layer = cw.Linear(
            case["inputs"], dy.shape[1], case["bias"], process_group=dist.group.WORLD, dtype=x.dtype, **case["options"]
        )
        model = DistributedDataParallel(layer)
        model(own_x).backward(own_dy)
        found[case["name"]] = (layer.weight.grad, None if layer.bias is None else layer.bias.grad)
    return found


def training(rank: int, x: Tensor, target: Tensor, wrap: str) -> dict[str, Any]:
    """Some steps of a model with a mean-reduced loss, whose halves are the global batch."""
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(
        cw.Embedding(11, 6, process_group=dist.group.WORLD, dtype=torch.float64),
        nn.Flatten(),
        cw.Linear(18, 16, process_group=dist.group.WORLD, dtype=torch.float64),
        nn.Tanh(),
        cw.Linear(16, 3, bias=False, process_group=dist.group.WORLD, dtype=torch.float64),
    )
    parameters = list(model.parameters())
    if wrap == "fsdp":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (RANKS,))
        for layer in (model[2], model[4], model):  # type: ignore[index]
            fully_shard(layer, mesh=mesh)
        parameters = list(model.parameters())
        wrapped = model
    else:
        wrapped = DistributedDataParallel(model)
    steps = torch.optim.SGD(parameters, lr=0.5)
    counts = [x.shape[0] // 2, x.shape[0] // 2]
    for _ in range(3):
        steps.zero_grad()
        loss = nn.functional.cross_entropy(wrapped(own_rows(rank, x, counts)), own_rows(rank, target, counts))
        loss.backward()
        gradients = [whole(p) for p in parameters]
        steps.step()
    values = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in parameters]
    return {"gradients": gradients, "parameters": [v.detach().clone() for v in values]}


def embedding(rank: int, indices: Tensor, dy: Tensor, counts: list[int]) -> dict[str, Any]:
    """DDP over an embedding, every scale and damping mode."""
    found: dict[str, Any] = {}
    for scale in ("nlms", "raw", "gradient"):
        for damping_mode in ("relative", "absolute"):
            options = {"scale": scale, "damping_mode": damping_mode, "damping": 0.3}
            torch.manual_seed(0)
            layer = cw.Embedding(11, dy.shape[1], 0, process_group=dist.group.WORLD, dtype=dy.dtype, **options)
            model = DistributedDataParallel(layer)
            model(own_rows(rank, indices, counts)).backward(own_rows(rank, dy, counts))
            found[f"{scale} {damping_mode}"] = layer.weight.grad
    return found


def convolution(rank: int, x: Tensor, dy: Tensor, counts: list[int], wrap: str) -> dict[str, Any]:
    """DDP or FSDP over a convolution with groups, every scale, many rows and few."""
    found: dict[str, Any] = {}
    for scale in ("nlms", "raw", "gradient"):
        for damping_mode in ("relative", "absolute"):
            options = {"scale": scale, "damping_mode": damping_mode, "damping": 0.3}
            torch.manual_seed(0)
            layer = cw.Conv2d(
                x.shape[1], dy.shape[1], 3, groups=2, process_group=dist.group.WORLD, dtype=x.dtype, **options
            )
            if wrap == "fsdp":
                from torch.distributed.device_mesh import init_device_mesh
                from torch.distributed.fsdp import fully_shard

                model = fully_shard(layer, mesh=init_device_mesh("cpu", (RANKS,)))
            else:
                model = DistributedDataParallel(layer)
            model(own_rows(rank, x, counts)).backward(own_rows(rank, dy, counts))
            found[f"{scale} {damping_mode}"] = (whole(layer.weight), whole(layer.bias))
    return found


def frozen_and_no_grad(rank: int, x: Tensor) -> dict[str, Any]:
    """Forwards that need no gradient must not wait for the other rank; a group is an option like any other."""
    layer = cw.Linear(x.shape[1], 3, process_group=dist.group.WORLD, dtype=x.dtype)
    if rank == 0:  # alone: a collective here would hang
        with torch.no_grad():
            layer(x)
        frozen = cw.Linear(x.shape[1], 3, process_group=dist.group.WORLD, dtype=x.dtype).requires_grad_(False)
        frozen(x)
        cw.Conv1d(1, 3, 2, process_group=dist.group.WORLD, dtype=x.dtype).requires_grad_(False)(x[:, None])
    model = cw.convert(nn.Sequential(nn.Linear(x.shape[1], 3, dtype=x.dtype)), process_group=dist.group.WORLD)
    assert model[0].process_group is dist.group.WORLD
    assert not hasattr(cw.revert(model)[0], "process_group")
    return {}


def deep_copy(rank: int, x: Tensor, dy: Tensor) -> dict[str, Any]:
    """A copy of a model, as averaging weights makes one, shares the group and gives the same gradient."""
    layer = cw.Linear(x.shape[1], dy.shape[1], process_group=dist.group.WORLD, dtype=x.dtype)
    copied = copy.deepcopy(layer)
    assert copied.process_group is layer.process_group
    for one in (layer, copied):
        one(x).backward(dy)
    return {"gradients": (layer.weight.grad, copied.weight.grad)}
