"""What the processes of test_emended_distributed.py run beside training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import consequentialism as cw


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()


def step(model: nn.Module, x: Tensor, layers: tuple[str, ...]) -> list[Tensor]:
    """The parameters after a step, the named layers' in coordinates."""
    inner = torch.optim.AdamW(model.parameters(), 0.1)
    optimizer = cw.optim.Emended(inner, model, filter_fn=lambda module, name: name in layers)
    (model(x) - 1).square().mean().backward()
    optimizer.step()
    return [getattr(p, "full_tensor", lambda p=p: p)().detach().clone() for p in model.parameters()]


def tensor_parallel(rank: int, x: Tensor) -> dict[str, Any]:
    """A model whose first layer is split by outputs and whose second by inputs: what steps, and what is refused."""
    mesh = init_device_mesh("cpu", (2,))

    def parallel(model: nn.Module) -> nn.Module:
        return parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})

    found: dict[str, Any] = {"columns": step(parallel(network()), x, ("0",))}
    for name, refused in (
        ("rows", lambda: step(parallel(network()), x, ("0", "2"))),
        ("convert", lambda: parallel(cw.convert(network()))(x)),
    ):
        try:
            refused()
        except (TypeError, ValueError) as error:
            found[name] = str(error)
    return found


def spawned(rank: int, model: nn.Module, x: Tensor) -> dict[str, Any]:
    """The gradients of a model that another process made and sent."""
    model(x).square().mean().backward()
    return {"gradients": [p.grad for p in model.parameters()]}
