"""`Emended` and its `Muon` under DDP and FSDP2: two processes train as one on the whole batch, in float64."""

from __future__ import annotations

from typing import Any

import compatibility_workers
import distributed_workers as workers
import emended_workers
import pytest
import torch
from cases import assert_close, randn

import consequentialism as cw

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
    jobs["tensor parallel"] = (compatibility_workers.tensor_parallel, (X,))
    jobs["spawned"] = (compatibility_workers.spawned, (cw.convert(compatibility_workers.network()), X))
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


def test_tensor_parallel(found: list[dict[str, Any]]) -> None:
    """Weights split by outputs are stepped as one process steps them; what is not right is refused."""
    expected = compatibility_workers.step(compatibility_workers.network(), X, ("0",))
    for results in found:
        own = results["tensor parallel"]
        assert "error" not in own, own["error"]
        for i, (parameter, one) in enumerate(zip(own["columns"], expected, strict=True)):
            assert_close(f"parameter {i}", parameter, one, 1e-12)
        assert "layer '2': its weight is sharded as" in own["rows"]
        assert "DTensor, which is not supported" in own["convert"]


def test_a_model_sent_to_a_spawned_process_is_emended_there(found: list[dict[str, Any]]) -> None:
    model = cw.convert(compatibility_workers.network())
    model(X).square().mean().backward()
    plain = cw.revert(compatibility_workers.network())
    plain(X).square().mean().backward()
    for results in found:
        own = results["spawned"]
        assert "error" not in own, own["error"]
        for gradient, expected in zip(own["gradients"], model.parameters(), strict=True):
            assert_close("gradient", gradient, expected.grad, 1e-12)
    assert (model[0].weight.grad - plain[0].weight.grad).abs().max() > 1e-3
