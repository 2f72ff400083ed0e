"""What the processes of test_distributed.py run. Rank 0 writes what it found where the test reads it."""

from __future__ import annotations

import copy
import io
import traceback
import warnings
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
PATIENCE = timedelta(seconds=2)  # where the timeout is what is tested
Job = tuple[Callable[..., dict[str, Any]], tuple[Any, ...]]  # work(rank, *arguments)


def launch(jobs: dict[str, Job], folder: Path, ranks: int = RANKS) -> list[dict[str, dict[str, Any]]]:
    """Run every job in every rank of one group, in order; what each rank's jobs returned.

    A job that raises has ``{"error": traceback}`` for a result; the jobs after it do not run.
    """
    context = mp.spawn(_run, args=(jobs, str(folder), ranks), nprocs=ranks, join=False)
    try:
        while not context.join(timeout=120):
            pass
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


def _run(rank: int, jobs: dict[str, Job], folder: str, ranks: int) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("error", "`torch.distributed", FutureWarning)  # a collective that torch deprecates
    patience = timedelta(seconds=60)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", patience, rank=rank, world_size=ranks)
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
            found[f"{scale} {damping_mode}"] = layer.weight.grad.clone()
            layer.sparse, layer.weight.grad = True, None  # outside of DDP: this rank's part of its mean
            layer(own_rows(rank, indices, counts)).backward(own_rows(rank, dy, counts))
            part = layer.weight.grad.to_dense()
            dist.all_reduce(part)
            found[f"{scale} {damping_mode} sparse"] = part / RANKS
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


def functional(rank: int, x: Tensor, dy: Tensor, counts: list[int], options: list[dict[str, Any]]) -> dict[str, Any]:
    """This rank's part of the emended gradient of the global batch; the sum over ranks is that gradient."""
    own_x, own_dy = own_rows(rank, x, counts), own_rows(rank, dy, counts)
    group = dist.group.WORLD
    if x.ndim == 2:
        return {str(one): cw.emended_weight_grad(own_x, own_dy, process_group=group, **one) for one in options}
    return {str(one): cw.emended_conv_weight_grad(own_x, own_dy, 3, process_group=group, **one) for one in options}


def trained(layer: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """The gradients of a layer's parameters."""
    layer.zero_grad()
    layer(x).square().sum().backward()
    return tuple(p.grad.clone() for p in layer.parameters())


def experts() -> nn.ModuleList:
    return cw.convert(nn.ModuleList(nn.Linear(4, 4) for _ in range(2)), process_group=dist.group.WORLD)


def different_layers(rank: int) -> dict[str, Any]:
    """What each rank hears when the ranks run different layers; both go on together after that."""
    group = dist.group.WORLD
    x, tokens = torch.ones(3, 4), torch.tensor([1, 2, 2])
    torch.manual_seed(0)
    named, unnamed, zeros = experts(), [cw.Linear(4, 4, process_group=group) for _ in range(2)], experts()
    for layer in zeros:
        nn.init.zeros_(layer.weight)
    embedding = cw.Embedding(5, 4, process_group=group)
    convolution = cw.Conv1d(4, 4, 1, process_group=group)
    first, second = cw.convert(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), process_group=group)
    damped = cw.Linear(4, 4, damping=0.5 + rank, process_group=group)
    routed = Routed(nn.ModuleList(cw.Linear(4, 4, process_group=group) for _ in range(2)))
    ddp = DistributedDataParallel(routed, find_unused_parameters=True)

    def skipped() -> None:  # rank 1 leaves out the first layer
        y = x if rank == 1 else first(x)
        second(y)

    calls = {
        "named experts": lambda: trained(named[rank], x),
        "experts of zeros": lambda: trained(zeros[rank], x),
        "unnamed experts": lambda: trained(unnamed[rank], x),
        "find_unused_parameters": lambda: ddp(x, rank),
        "a layer skipped": skipped,
        "another kind": lambda: trained(unnamed[0], x) if rank == 0 else trained(convolution, x[:, :, None]),
        "in backward": lambda: trained(embedding, tokens) if rank == 0 else trained(unnamed[0], x),
        "other options": lambda: trained(damped, x),
        "another type": lambda: trained(
            copy.deepcopy(unnamed[0]).to((torch.float32, torch.float64)[rank]),
            x.to((torch.float32, torch.float64)[rank]),
        ),
    }
    heard = {}
    for name, call in calls.items():
        try:
            call()
            heard[name] = ""
        except RuntimeError as error:
            heard[name] = str(error)
    return heard


def left_out(rank: int) -> dict[str, Any]:
    """What rank 0 hears of a layer that rank 1 leaves out, with no other after it."""
    layer = cw.convert(nn.ModuleDict({"last": nn.Linear(4, 4)}), process_group=dist.new_group(timeout=PATIENCE))["last"]
    dist.barrier()
    if rank == 0:
        try:
            layer(torch.ones(3, 4))
        except RuntimeError as error:
            return {"heard": str(error)}
    return {}


class Routed(nn.Module):
    """A mixture that runs one of its layers."""

    def __init__(self, layers: nn.ModuleList) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor, chosen: int) -> Tensor:
        return self.layers[chosen](x)


def no_false_alarm(rank: int) -> dict[str, Any]:
    """Ranks whose weights differ by rounding, are NaN or are given to a function, and autocast, are no error.

    Nor are weights that nothing has made equal, or more layers on one rank; the former is said in a warning.
    """
    group = dist.group.WORLD
    warnings.filterwarnings("error", "consequentialism")
    if rank == 0:
        cw.Linear(4, 3)
    torch.manual_seed(0)
    layer = cw.Linear(4, 3, process_group=group)
    x = torch.randn(5, 4)
    with torch.no_grad():
        layer.weight.mul_(1 + 1e-3 * rank)
    trained(layer, x)
    with torch.autocast("cpu", torch.bfloat16):
        trained(layer, x)
    nn.init.constant_(layer.weight, float("nan"))
    trained(layer, x)
    weight = torch.full((3, 4), rank - 0.5, requires_grad=True)
    cw.emended_linear(x, weight, process_group=group).sum().backward()
    cw.emended_conv(x[None], torch.full((3, 5, 2), rank - 0.5, requires_grad=True), process_group=group)
    torch.manual_seed(rank)
    layer = cw.Linear(4, 3, process_group=group)
    layer._emended_serial = 1  # rank 0 has made more layers
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trained(layer, x)
    warnings.filterwarnings("default", "consequentialism")
    return {"warnings": [str(one.message) for one in caught]}


def layers_of_all_kinds(**options: Any) -> list[tuple[nn.Module, Tensor]]:
    torch.manual_seed(0)
    return [
        (cw.Linear(4, 3, **options), torch.randn(5, 4)),
        (cw.Conv1d(4, 3, 2, **options), torch.randn(5, 4, 6)),
        (cw.Embedding(5, 3, **options), torch.arange(4)),
    ]


def evaluation(rank: int) -> dict[str, Any]:
    """In eval mode a rank is alone, gradients recorded or not; under `DistributedDataParallel.join` too."""
    found: dict[str, Any] = {}
    if rank == 0:  # alone: a collective here would hang
        pairs = zip(layers_of_all_kinds(process_group=dist.group.WORLD), layers_of_all_kinds(), strict=True)
        for (layer, x), (alone, _) in pairs:
            found[type(layer).__name__] = trained(layer.eval(), x), trained(alone, x)
    model = DistributedDataParallel(cw.Linear(4, 3, process_group=dist.group.WORLD).eval())
    with model.join():
        for _ in range(1 + 2 * rank):
            model(torch.ones(2, 4)).sum().backward()
    return found


def uneven_inputs(rank: int) -> dict[str, Any]:
    """In training mode ``join(throw_on_early_termination=True)`` ends all ranks with torch's error."""
    model = DistributedDataParallel(cw.Linear(4, 3, process_group=dist.group.WORLD))
    steps = 0
    try:
        with model.join(throw_on_early_termination=True):
            for _ in range(1 + rank):
                model(torch.ones(2, 4)).sum().backward()
                steps += 1
    except RuntimeError as error:
        return {"error heard": str(error), "steps": steps}
    return {"error heard": "", "steps": steps}


def saved(rank: int) -> dict[str, Any]:
    """A whole model in a file: the default group is the default group again, another one is named in a warning."""
    found: dict[str, Any] = {}
    for name, group in (("default", dist.group.WORLD), ("another", dist.new_group([0, 1])), ("none", None)):
        model = nn.Sequential(cw.Linear(4, 3, process_group=group), cw.Conv1d(3, 2, 1))
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loaded = torch.load(file, weights_only=False)
        kept = "default" if loaded[0].process_group is dist.group.WORLD else loaded[0].process_group
        found[name] = kept, [str(w.message) for w in caught], copy.copy(model[0]).process_group is group
    return found


def compiled(rank: int) -> dict[str, Any]:
    """Each kind of layer under torch.compile: its gradients and eager's, and the error in a full graph."""
    found: dict[str, Any] = {}
    for layer, x in layers_of_all_kinds(process_group=dist.group.WORLD):
        torch._dynamo.reset()
        expected = trained(layer, x)
        own = trained(torch.compile(layer, backend="eager"), x)
        message = ""
        torch._dynamo.reset()
        try:
            trained(torch.compile(layer, backend="eager", fullgraph=True), x)
        except Exception as error:
            message = str(error)
        found[type(layer).__name__] = own, expected, message
    return found


def samples(rank: int, counted: list[int]) -> dict[str, Any]:
    """Gradients with the samples of each rank said, as a number and as a mask, and by default, with their ratio."""
    found: dict[str, Any] = {}
    for layer, x in layers_of_all_kinds(process_group=dist.group.WORLD):
        default = trained(layer, x)
        cw.set_samples(layer, counted[rank])
        number = trained(layer, x)
        cw.set_samples(layer, torch.arange(5) < counted[rank])
        total = dist.get_world_size() * x.shape[0]
        found[type(layer).__name__] = number, trained(layer, x), tuple(g * sum(counted) / total for g in default)
    return found
