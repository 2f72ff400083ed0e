"""`Emended` and its `Muon` under DDP and FSDP2: two processes train as one on the whole batch, in float64."""

from __future__ import annotations

from typing import Any

import distributed_workers as workers
import emended_workers
import pytest
import torch
from cases import assert_close, randn

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")

COUNTS = [[8, 8], [8, 8], [11, 5], [8, 8], [3, 9]]  # of the ranks in each step: uneven ones too
NAMES = ("SGD", "AdamW", "Muon")
WRAPS = ("ddp", "fsdp")
X, TARGET = randn(16, 6), torch.arange(16) % 3


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    jobs: dict[str, workers.Job] = {
        f"{name} {wrap}": (emended_workers.job, (name, X, TARGET, COUNTS, wrap)) for wrap in WRAPS for name in NAMES
    }
    return workers.launch(jobs, tmp_path_factory.mktemp("processes"))


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("name", NAMES)
def test_two_processes_train_as_one(found: list[dict[str, Any]], name: str, wrap: str) -> None:
    expected = emended_workers.train(name, X, TARGET, COUNTS, 0, "one")
    for rank, results in enumerate(found):
        own = results[f"{name} {wrap}"]
        assert "error" not in own, own["error"]
        for i, (parameter, one) in enumerate(zip(own["parameters"], expected["parameters"], strict=True)):
            assert_close(f"parameter {i} of rank {rank}", parameter, one, 1e-12)


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("name", NAMES)
def test_a_step_communicates_its_grams_on_refresh_steps_alone(
    found: list[dict[str, Any]], name: str, wrap: str
) -> None:
    for results in found:
        reduced = results[f"{name} {wrap}"]["reduced"]
        refreshes = [step % emended_workers.REFRESH_EVERY == 0 for step in range(len(COUNTS))]
        assert [count > 0 for count in reduced] == refreshes, reduced
