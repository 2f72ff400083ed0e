"""What the processes of test_emended_distributed.py run."""

from __future__ import annotations

import contextlib
import copy
import math
import os
import signal
import warnings
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from distributed_workers import own_rows
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import consequentialism as cw

REFRESH_EVERY = 2
OPTIONS: dict[str, Any] = {}  # of every optimizer here, beside its own


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5, bias=False), nn.Tanh(), nn.Linear(5, 3)
    return nn.Sequential(*layers).double()


def optimizer_of(name: str, model: nn.Module) -> torch.optim.Optimizer:
    options: dict[str, Any] = {"memory": 0.5, "refresh_every": REFRESH_EVERY, "damping": 0.1, **OPTIONS}
    if name == "Muon":
        return cw.optim.Muon(model, lr=0.02, aux={"lr": 0.01}, **options)
    if name == "outputs":
        options["output_exponent"] = 0.25
    inner = {
        "SGD": lambda: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        "AdamW": lambda: torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1),
        "outputs": lambda: torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1),
        "Adagrad": lambda: torch.optim.Adagrad(model.parameters(), lr=0.01),
    }[name]()
    return cw.optim.Emended(inner, model, **options)


def full(parameter: Tensor) -> Tensor:
    return (parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter).detach().clone()


def ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def train(name: str, x: Tensor, target: Tensor, counts: list[list[int]], rank: int, wrap: str) -> dict[str, Any]:
    """A step for each split of the batch over the ranks; a rank of None has the whole batch."""
    model = network()
    wrapped: nn.Module = model
    if wrap in ("fsdp", "hsdp"):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        shape, names = ((2, 2), ("copies", "shards")) if wrap == "hsdp" else ((ranks(),), ("shards",))
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        for layer in (model[0], model[2], model[4], model):
            fully_shard(layer, mesh=mesh)
    elif wrap == "ddp":
        wrapped = DistributedDataParallel(model)
    optimizer = optimizer_of(name, model)
    reduced: list[int] = []
    sent: list[int] = []
    for split in counts:
        total = sum(split)
        optimizer.zero_grad()
        mine = (x[:total], target[:total])
        if wrap != "one":
            mine = own_rows(rank, mine[0], split), own_rows(rank, mine[1], split)
        loss = nn.functional.cross_entropy(wrapped(mine[0]), mine[1], reduction="sum") / total
        (loss if wrap == "one" else ranks() * loss).backward()  # the mean over ranks is that of the whole batch
        with counted("all_reduce", reduced), counted("broadcast", sent):
            optimizer.step()
    grams = sum(math.prod(unit.slot.shape) + 1 for unit in optimizer.units)  # type: ignore[attr-defined]
    kept = [state[key].numel() for state in optimizer.state.values() for key in ("input_gram", "root") if key in state]
    return {
        "parameters": [full(p) for p in model.parameters()],
        "reduced": reduced,
        "sent": sent,
        "grams": grams,
        "kept": sum(kept),
        "largest": 2 * max(math.prod(unit.slot.shape) for unit in optimizer.units),  # type: ignore[attr-defined]
        "saved": saved(optimizer),
    }


@contextlib.contextmanager
def counted(name: str, totals: list[int]) -> Iterator[None]:
    """Note how many entries a collective operation gets within the block."""
    own = getattr(dist, name)
    totals.append(0)

    def counting(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
        totals[-1] += tensor.numel()
        return own(tensor, *arguments, **options)

    setattr(dist, name, counting)
    try:
        yield
    finally:
        setattr(dist, name, own)


def saved(optimizer: Any) -> dict[int, dict[str, Any]]:
    """What a checkpoint holds."""
    optimizer.consolidate_state_dict(to=None)
    states = optimizer.state_dict()["state"]
    return {
        number: {name: full(value) if isinstance(value, Tensor) else value for name, value in state.items()}
        for number, state in states.items()
    }


def job(rank: int, name: str, x: Tensor, target: Tensor, counts: list[list[int]], wrap: str) -> dict[str, Any]:
    return train(name, x, target, counts, rank, wrap)


class Skipping(nn.Module):
    """Its second layer runs only where it is told to."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 5).double(), nn.Linear(6, 5).double()

    def forward(self, x: Tensor, whole: bool) -> Tensor:
        return self.first(x) + self.second(x) if whole else self.first(x)


def skipped(x: Tensor, rank: int | None) -> dict[str, Any]:
    """Rank 0 has the first rows and both layers, rank 1 the others and one layer; None, one process has all."""
    model = Skipping()
    wrapped: nn.Module = model if rank is None else DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = optimizer_of("AdamW", model)
    for _ in range(3):
        optimizer.zero_grad()
        for part, rows in enumerate((x[:7], x[7:])):
            if rank in (None, part):
                loss = wrapped(rows, part == 0).square().sum()
                (loss if rank is None else ranks() * loss).backward()
        optimizer.step()
    return {"parameters": [full(p) for p in model.parameters()], **rows_of(optimizer, model.second)}


def idle(x: Tensor, rank: int | None) -> dict[str, Any]:
    """On rank 1 no layer runs at all: gradients are set by hand."""
    model = Skipping()
    optimizer = optimizer_of("AdamW", model)
    warnings.filterwarnings("error", "consequentialism.optim.Emended has seen no input")
    for _ in range(3):
        optimizer.zero_grad()
        if rank != 1:
            model(x, True).square().sum().backward()
        for parameter in model.parameters() if rank is not None else ():
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            dist.all_reduce(parameter.grad)
        optimizer.step()
    return {"parameters": [full(p) for p in model.parameters()], **rows_of(optimizer, model.second)}


def widened(x: Tensor, rank: int | None) -> dict[str, Any]:
    """The optimizer has the weights first, from step 3 on the biases too: a column more in the coordinates."""
    model = network()
    wrapped: nn.Module = model if rank is None else DistributedDataParallel(model)
    biases = [model[0].bias, model[4].bias]
    inner = torch.optim.AdamW([p for p in model.parameters() if p.ndim == 2], lr=0.02)
    optimizer = cw.optim.Emended(inner, model, memory=0.5, refresh_every=REFRESH_EVERY, damping=0.1, **OPTIONS)
    for step in range(6):
        if step == 3:
            optimizer.add_param_group({"params": biases})
        model.zero_grad()
        own = x if rank is None else own_rows(rank, x, [9, 7])
        (ranks() * wrapped(own).square().sum()).backward()
        optimizer.step()
    return {"parameters": [full(p) for p in model.parameters()], **rows_of(optimizer, model[0])}


def late(x: Tensor, rank: int | None) -> dict[str, Any]:
    """A layer is unfrozen between two refreshes, and one comes with a group of its own; ranks sum by hand."""
    model = Skipping()
    model.add_module("third", nn.Linear(5, 4).double())
    model.second.requires_grad_(False)
    first = [*model.first.parameters(), *model.second.parameters()]
    options: dict[str, Any] = {"memory": 0.5, "refresh_every": REFRESH_EVERY, "damping": 0.1, **OPTIONS}
    optimizer = cw.optim.Emended(torch.optim.AdamW(first, lr=0.02), model, **options)
    for step in range(8):
        if step == 3:
            model.second.requires_grad_(True)
        if step == 5:
            optimizer.add_param_group({"params": list(model.third.parameters())})
        model.zero_grad()
        own = x if rank is None else own_rows(rank, x, [9, 7])
        model.third(model(own, True)).square().sum().backward()
        for parameter in model.parameters() if rank is not None else ():
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
        optimizer.step()
    return {"parameters": [full(p) for p in model.parameters()], **rows_of(optimizer, model.second)}


def rows_of(optimizer: Any, layer: nn.Linear) -> dict[str, Any]:
    optimizer.consolidate_state_dict(to=None)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    number = next(i for i, p in enumerate(parameters) if p is layer.weight)
    state = optimizer.state_dict()["state"][number]
    return {name: state[name].clone() for name in ("gram_rows", "input_gram", "root")}


def accumulated(x: Tensor, rank: int | None) -> dict[str, Any]:
    """Two micro-batches a rank, the first under ``no_sync``; rank 0 evaluates in between, alone."""
    model = network()
    wrapped: Any = model if rank is None else DistributedDataParallel(model)
    optimizer = optimizer_of("AdamW", model)
    parts = [x] if rank is None else own_rows(rank, x, [9, 7]).split([4, 5 if rank == 0 else 3])
    for step in range(4):
        optimizer.zero_grad()
        for part in parts[:-1]:
            with wrapped.no_sync():
                (ranks() * wrapped(part).square().sum()).backward()
        if rank == 0 and step != 1:
            model.eval()
            model(x * 5).square().sum()
            with torch.no_grad():
                model.train()(x * 5)
        (ranks() * wrapped(parts[-1]).square().sum()).backward()
        optimizer.step()
    return {"parameters": [full(p) for p in model.parameters()], **rows_of(optimizer, model[0])}


def joined(x: Tensor, rank: int | None) -> dict[str, Any]:
    """Rank 1 has two batches more than rank 0."""
    model = network()
    wrapped: nn.Module = model if rank is None else DistributedDataParallel(model)
    optimizer = optimizer_of("SGD", model)
    refused = None

    def step(rows: Tensor) -> None:
        optimizer.zero_grad()
        (ranks() * wrapped(rows).square().sum() / 16).backward()
        optimizer.step()

    if rank is None:
        for batch in range(5):
            step(x if batch < 3 else x[8:])
    else:
        from torch.distributed.algorithms.join import Join

        with Join([wrapped, optimizer]):  # type: ignore[list-item]
            for _ in range(3 if rank == 0 else 5):
                step(own_rows(rank, x, [8, 8]))
        inner = network()
        alone, unknown = DistributedDataParallel(inner), optimizer_of("SGD", inner)
        try:
            with alone.join():
                alone(x).square().sum().backward()
                unknown.step()
        except RuntimeError as error:
            refused = str(error)
    found = {"parameters": [full(p) for p in model.parameters()], **rows_of(optimizer, model[0])}
    return {**found, "steps": int(optimizer.state[model[0].weight]["emended_steps"]), "refused": refused}


def mixed(x: Tensor, rank: int | None, reshard: bool) -> dict[str, Any]:
    """FSDP2 that computes in bfloat16; one process with weights and rows rounded by hand is its reference."""
    model = network().float()
    if rank is not None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        mesh = init_device_mesh("cpu", (ranks(),))
        for layer in (model[0], model[2], model[4], model):
            fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    optimizer = optimizer_of("AdamW", model)
    own = x if rank is None else own_rows(rank, x, [8, 8])
    for _ in range(3):
        optimizer.zero_grad()
        out = model(own) if rank is not None else _in_bfloat16(model, own)
        (ranks() * out.float().square().mean() * len(own) / 16).backward()
        optimizer.step()
    return {"parameters": [full(p) for p in model.parameters()], **rows_of(optimizer, model[0])}


def _in_bfloat16(model: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return model(x)


def sharded(rank: int, work: Any, *arguments: Any) -> dict[str, Any]:
    """Some other work here with every state divided among the ranks."""
    OPTIONS["shard_state"] = True
    try:
        return work(rank, *arguments)
    finally:
        OPTIONS.clear()


def resumed(rank: int, x: Tensor) -> dict[str, Any]:
    """A run that goes on, and one that begins from its checkpoint, which only rank 0 has written."""
    runs: list[Any] = []
    errors = []
    for _ in range(2):
        model = network()
        wrapped = DistributedDataParallel(model)
        runs.append((model, wrapped, optimizer_of("AdamW", model)))

    def step(model: nn.Module, wrapped: nn.Module, optimizer: Any) -> None:
        optimizer.zero_grad()
        wrapped(own_rows(rank, x, [8, 8])).square().sum().backward()
        optimizer.step()

    (model, _, optimizer), (other, _, fresh) = runs
    for _ in range(3):
        step(*runs[0])
    optimizer.consolidate_state_dict(to=0)
    box: list[Any] = [None]
    try:
        box = [copy.deepcopy((model.state_dict(), optimizer.state_dict()))]
    except RuntimeError as error:
        errors.append(str(error))
    dist.broadcast_object_list(box, src=0)
    other.load_state_dict(box[0][0])
    fresh.load_state_dict(copy.deepcopy(box[0][1]))  # torch's own takes the tensors as they are
    for run in runs:
        for _ in range(3):
            step(*run)
    errors_after = []
    try:
        optimizer.state_dict()
    except RuntimeError as error:
        errors_after.append(str(error))
    roots = sum("root" in state for state in fresh.state.values())
    return {
        "first": [full(p) for p in model.parameters()],
        "second": [full(p) for p in other.parameters()],
        "errors": errors,
        "stale": errors_after,
        "roots": roots,
        "checkpoint": box[0],
    }


def bereft(rank: int, x: Tensor, folder: str) -> None:
    """Rank 1 is killed before a step that refreshes; rank 0 writes what it then sees, and what it still has."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", timedelta(seconds=20), rank=rank, world_size=2)
    runs: dict[str, tuple[nn.Module, Any]] = {}
    for name in ("whole", "sharded"):
        OPTIONS["shard_state"] = name == "sharded"
        model = network()
        runs[name] = model, optimizer_of("AdamW", model)
    layer = cw.Linear(6, 4, process_group=dist.group.WORLD, dtype=x.dtype)
    layer(x)
    for step in range(5):
        for model, optimizer in runs.values():
            optimizer.zero_grad()
            model(x).square().sum().backward()
            if step < 4:
                optimizer.step()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    found: dict[str, Any] = {}
    for name, (model, optimizer) in runs.items():
        before = copy.deepcopy((model.state_dict(), list(optimizer.state.values())))
        found[name] = error_of_a_call(optimizer.step), before, (model.state_dict(), list(optimizer.state.values()))
    weights = copy.deepcopy(layer.state_dict())
    found["convert"] = error_of_a_call(lambda: layer(x)), weights, layer.state_dict()
    torch.save(found, f"{folder}/0.pt")


def error_of_a_call(call: Any) -> str:
    """What it raises."""
    try:
        call()
    except (RuntimeError, ValueError) as error:
        return str(error)
    return "nothing"


def outputs_refused(x: Tensor, rank: int) -> dict[str, Any]:
    """Roots of outputs where a rank has some outputs alone, and where roots are divided."""
    from torch.distributed.fsdp import fully_shard

    model, shards = network(), fully_shard(network())
    own = {"output_exponent": 0.25}
    return {
        "fsdp": error_of_a_call(lambda: cw.optim.Emended(torch.optim.SGD(shards.parameters()), shards, **own)),
        "sharded": error_of_a_call(
            lambda: cw.optim.Emended(torch.optim.SGD(model.parameters()), model, shard_state=True, **own)
        ),
    }


def case(rank: int, name: str, x: Tensor, *arguments: Any) -> dict[str, Any]:
    return globals()[name](x, rank, *arguments)
