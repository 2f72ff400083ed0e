"""Settings for the whole suite."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from typing import Any

# Before torch starts its threads: waiting threads sleep, or a busy neighbour makes every small call take seconds.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if "PYTEST_XDIST_WORKER" in os.environ:  # two threads run in parallel what can; more would wait for the other workers'
    os.environ.setdefault("OMP_NUM_THREADS", "2")

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, settings

settings.register_profile(
    "suite",
    derandomize=True,
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("suite")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """Memory that nobody has written holds NaN, and integers their largest: in Python and in C++."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def even_refreshes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Roots in emended coordinates that stay from the first step on, for what holds while they do."""
    monkeypatch.setattr("consequentialism.optim.memory.steps_to_refresh", lambda steps, every: -steps % every)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """End a worker whose CUDA context is dead: xdist names the test and starts another worker for the rest."""
    report = yield
    sticky = call.excinfo is not None and "CUDA error" in str(call.excinfo.value)
    if sticky and "PYTEST_XDIST_WORKER" in os.environ and not context_is_alive():
        os._exit(70)
    return report


def context_is_alive() -> bool:
    """Whether the device still computes: an illegal access ends the context, and every later call says the same."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


@pytest.fixture
def one_process() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
