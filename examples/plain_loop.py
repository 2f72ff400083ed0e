# make .venv/.built && .venv/bin/python examples/plain_loop.py
"""A plain training loop: the one line that emends the gradients, an evaluation, and the way back to torch's layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import consequentialism as cw


def make_data(samples: int) -> tuple[Tensor, Tensor]:
    """Points ``[N, 20]`` and their classes, which a random network gives them."""
    teacher = nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 5))
    inputs = torch.randn(samples, 20) * torch.logspace(0, 1, 20)  # inputs of unlike size, as real ones are
    with torch.no_grad():
        return inputs, (teacher(inputs) * 10).argmax(1)


@torch.no_grad()
def accuracy(model: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    model.eval()
    return (model(inputs).argmax(1) == labels).float().mean().item()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Tensor, labels: Tensor) -> None:
    model.train()
    for _ in range(3):
        for rows in torch.randperm(len(inputs)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs[rows]), labels[rows]).backward()
            optimizer.step()


def main() -> None:
    torch.manual_seed(0)
    inputs, labels = make_data(3000)
    for emended in (False, True):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(20, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 5))
        if emended:
            cw.convert(model)  # the one changed line; lr is then NLMS's dimensionless step size, 1 a good start
            print(cw.summary(model))
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0 if emended else 0.03)
        train(model, optimizer, inputs[:2000], labels[:2000])
        print(f"{'emended' if emended else 'plain'}: test accuracy {accuracy(model, inputs[2000:], labels[2000:]):.3f}")
    cw.revert(model)  # torch's own classes again, to ship the model without this package
    print(f"the trained model: {model}")


if __name__ == "__main__":
    main()
