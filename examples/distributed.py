# make .venv/.built && .venv/bin/torchrun --standalone --nproc-per-node 2 examples/distributed.py --wrap fsdp2
"""DDP or FSDP2 with accumulation, clipping and a checkpoint from which a second run of the same command goes on.

Gradients stay plain until `step()`, so all of it works as without this package; on refresh steps the input Grams are
summed over the ranks, and that is all that is added. On GPUs, say "nccl" and "cuda" where this says "gloo" and "cpu".
"""

from __future__ import annotations

import argparse
import gc
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import consequentialism as cw

ACCUMULATED = 2  # micro-batches a step


def build(wrap: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)  # the same weights on all ranks
    model: nn.Module = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 4))
    if wrap == "fsdp2":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in [*(m for m in model.children() if isinstance(m, nn.Linear)), model]:
            fully_shard(layer, mesh=mesh)
    else:
        model = DistributedDataParallel(model)
    return model, cw.optim.Emended(torch.optim.AdamW(model.parameters(), lr=0.01), model, refresh_every=5)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> float:
    """One step on this rank's rows of the batch, in micro-batches; the mean loss over the ranks."""
    generator = torch.Generator().manual_seed(1000 * step + dist.get_rank())
    optimizer.zero_grad()
    total = torch.zeros(())
    for i in range(ACCUMULATED):
        x = torch.randn(32, 16, generator=generator)
        last = i == ACCUMULATED - 1
        if isinstance(model, DistributedDataParallel):
            quiet: Any = nullcontext() if last else model.no_sync()
        else:
            model.set_requires_gradient_sync(last)  # type: ignore[operator]
            quiet = nullcontext()
        with quiet:
            loss = F.cross_entropy(model(x), x[:, :4].argmax(1)) / ACCUMULATED
            loss.backward()
        total += loss.detach()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


def train(arguments: argparse.Namespace) -> list[float]:
    """The loss of each step."""
    model, optimizer = build(arguments.wrap)
    begin, losses = 0, []
    if arguments.checkpoint and arguments.checkpoint.exists():
        weights, state = get_state_dict(model, optimizer)
        saved = {"model": weights, "optimizer": state, "step": 0}
        dcp.load(saved, checkpoint_id=arguments.checkpoint)
        set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
        begin = saved["step"]
    for step in range(begin, begin + arguments.steps):
        losses.append(train_step(model, optimizer, step))
        if dist.get_rank() == 0:
            print(f"step {step + 1}: loss {losses[-1]:.6f}", flush=True)
    if arguments.checkpoint:
        weights, state = get_state_dict(model, optimizer)
        writer = dcp.FileSystemWriter(arguments.checkpoint, overwrite=True)
        dcp.save({"model": weights, "optimizer": state, "step": begin + arguments.steps}, storage_writer=writer)
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--wrap", choices=["ddp", "fsdp2"], default="ddp")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--checkpoint", type=Path, help="a folder; with one that a run has written, go on from there")
    arguments = parser.parse_args()
    dist.init_process_group("gloo")
    train(arguments)
    # Once what DDP and FSDP2 keep of the group is gone, cycles too: torch's destructors wait for the other rank else,
    # or abort as Python ends (seen with a plain optimizer too).
    gc.collect()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
