"""What the tests of `FusedSGD` share: models, twins stepped by both optimizers, and that nothing has moved."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import F64, TOLERANCE, Shape, assert_close, assert_identical, randn
from torch import Tensor, nn

import consequentialism as cw
from consequentialism.optim import FusedSGD, SpentGradient
from consequentialism.solve import cost

LR = 0.125
# One shape for each plan of the cost model, without a bias; half-precision types take the first two only.
PLANS: dict[cost.Plan, Shape] = {
    cost.Plan("dual", "input"): (12, 20, 40),
    cost.Plan("primal", "input"): (40, 12, 50),
    cost.Plan("dual", "gradient"): (12, 40, 9),
    cost.Plan("primal", "gradient"): (50, 12, 17),
}


def layers(dtype: torch.dtype = F64, **options: Any) -> nn.Sequential:
    return nn.Sequential(cw.Linear(6, 9, dtype=dtype, **options), nn.Tanh(), cw.Linear(9, 4, dtype=dtype, **options))


def squares(out: Tensor) -> Tensor:
    return out.square().mean()


Backward = Callable[[nn.Module, Tensor], None]


def backward(model: nn.Module, x: Tensor) -> None:
    squares(model(x)).backward()


def assert_steps_as_sgd(
    model: nn.Module,
    x: Tensor,
    bound: float = TOLERANCE[F64],
    steps: int = 3,
    run: Backward = backward,
    lr: float = LR,
) -> None:
    """Twins, one with each optimizer; every parameter's total change must agree. ``model`` ends up stepped."""
    twin = copy.deepcopy(model)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    fused, plain = FusedSGD(model, lr), torch.optim.SGD(twin.parameters(), lr)
    for _ in range(steps):
        for one, optimizer in ((model, fused), (twin, plain)):
            optimizer.zero_grad()
            run(one, x)
            optimizer.step()
    for name, expected in twin.named_parameters():
        own = model.get_parameter(name)
        assert own.grad is None or not isinstance(own.grad, SpentGradient)
        assert own.dtype == expected.dtype
        change, wanted = own.detach() - start[name], expected.detach() - start[name]
        assert_close(name, change, wanted, bound)
        if expected.requires_grad:
            assert wanted.abs().max() > 0, f"{name} was not trained"


class Mixed(nn.Module):
    """Emended and plain layers, an embedding, a norm, and two layers on one input."""

    def __init__(self, sparse: bool = False) -> None:
        super().__init__()
        self.table = cw.Embedding(11, 6, sparse=sparse, dtype=F64)
        self.left = cw.Linear(6, 8, damping=0.3, dtype=F64)
        self.right = cw.Linear(6, 8, bias=False, scale="gradient", dtype=F64)
        self.norm = nn.LayerNorm(8, dtype=F64)
        self.plain = nn.Linear(8, 5, dtype=F64)
        self.last = cw.Linear(5, 3, damping=0.5, damping_mode="absolute", scale="raw", dtype=F64)

    def forward(self, x: Tensor) -> Tensor:
        x = self.table(x)
        return self.last(torch.relu(self.plain(self.norm(self.left(x) * self.right(x)))))


def assert_steps_now(model: nn.Module, optimizer: FusedSGD) -> None:
    before = [p.detach().clone() for p in model.parameters()]
    backward(model, randn(10, 6))
    optimizer.step()
    for old, parameter in zip(before, model.parameters(), strict=True):
        assert not torch.equal(old, parameter)


def assert_unchanged(
    model: nn.Module, run: Callable[[], Any], match: str, error: type[Exception] = RuntimeError
) -> None:
    """``run`` raises, and no parameter has moved."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(error, match=match):
        run()
    for name, parameter in model.named_parameters():
        assert_identical(name, parameter.detach(), before[name])
