"""A batch that two processes hold together: exactly the emended gradient of the global batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from cases import EXACT, assert_close, assert_grads_close, randn
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import consequentialism as cw

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch was built without gloo"
)
WORLD = 2
# Rows of each rank, inputs, outputs: dual and primal, equal and unequal, a rank without rows.
CASES = [((4, 4), 20, 5), ((3, 6), 20, 5), ((30, 10), 7, 5), ((5, 0), 20, 3), ((0, 9), 4, 3)]


def in_processes(work: object, tmp_path: Path, *arguments: object) -> None:
    """Run ``work(rank, *arguments)`` in two processes that form a gloo group."""
    mp.spawn(_enter, (work, str(tmp_path / "rendezvous"), arguments), nprocs=WORLD)


def _enter(rank: int, work, rendezvous: str, arguments: tuple) -> None:  # noqa: ANN001
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=WORLD)
    try:
        work(rank, *arguments)
    finally:
        dist.destroy_process_group()


def _mean_square(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output - target).square().sum() / max(len(target), 1)


def _check_linear(rank: int, wrapper: str, rows: tuple[int, int], inputs: int, outputs: int, bias: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(inputs, outputs, bias=bias, dtype=torch.float64))
    weight, offset = (p.detach().clone() if p is not None else None for p in (model[0].weight, model[0].bias))
    cw.convert(model, process_group=dist.group.WORLD)
    x, target = randn(sum(rows), inputs), randn(sum(rows), outputs, seed=1)
    wrapped = DistributedDataParallel(model) if wrapper == "ddp" else fully_shard(model)
    own = slice(sum(rows[:rank]), sum(rows[: rank + 1]))
    _mean_square(wrapped(x[own]), target[own]).backward()

    # The global loss is the mean over ranks of their losses: that is what DDP and FSDP2 differentiate.
    errors = nn.functional.linear(x, weight, offset) - target
    share = torch.cat([torch.full((count, 1), 2 / (max(count, 1) * WORLD), dtype=torch.float64) for count in rows])
    expected = cw.reference.emended_weight_grad(x, errors * share, bias)
    grads = [p.grad.full_tensor() if wrapper == "fsdp" else p.grad for p in model[0].parameters()]
    assert_grads_close((grads[0], grads[1] if bias else None), expected, EXACT)


def _check_all(rank: int, wrapper: str, bias: bool) -> None:
    for rows, inputs, outputs in CASES:
        _check_linear(rank, wrapper, rows, inputs, outputs, bias)


@pytest.mark.parametrize(("wrapper", "bias"), [("ddp", True), ("ddp", False), ("fsdp", True)])
def test_linear(tmp_path: Path, wrapper: str, bias: bool) -> None:
    in_processes(_check_all, tmp_path, wrapper, bias)


def _check_embedding(rank: int) -> None:
    torch.manual_seed(0)
    layer = cw.Embedding(6, 4, dtype=torch.float64, process_group=dist.group.WORLD)
    indices, target = torch.tensor([1, 2, 1, 5, 1, 0, 2, 2]), randn(8, 4)
    weight = layer.weight.detach().clone()
    own = slice(4 * rank, 4 * rank + 4)
    wrapped = DistributedDataParallel(layer)  # kept: it averages the gradients only while it lives
    _mean_square(wrapped(indices[own]), target[own]).backward()
    dy = 2 * (weight[indices] - target) / 8
    assert_close("dw", layer.weight.grad, cw.reference.emended_embedding_grad(indices, dy, 6), EXACT)


def _check_functional(rank: int) -> None:
    x, dy = randn(8, 20), randn(8, 3, seed=1)
    own = slice(4 * rank, 4 * rank + 4)
    grads = cw.emended_weight_grad(x[own], dy[own] * WORLD, process_group=dist.group.WORLD)
    for gradient in grads:
        dist.all_reduce(gradient)
    expected = cw.reference.emended_weight_grad(x, dy)
    assert_grads_close(tuple(g / WORLD for g in grads), expected, EXACT)


def _check_others(rank: int) -> None:
    _check_embedding(rank)
    _check_functional(rank)


def test_embedding_and_functional(tmp_path: Path) -> None:
    in_processes(_check_others, tmp_path)
