"""What the tests of `consequentialism.optim.Emended` share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

EXACT = 1e-9


def mlp(dtype: torch.dtype, bias: bool = True) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 9, bias, dtype=dtype), nn.Tanh(), nn.Linear(9, 4, bias, dtype=dtype))


def squares(out: Tensor) -> Tensor:
    return (out - 1).square().mean()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: Any, steps: int) -> list[float]:
    """Some steps on one batch, each loss."""
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = squares(model(x))
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def parameters_of(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]
