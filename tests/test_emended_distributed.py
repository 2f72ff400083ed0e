"""`Emended` and its `Muon` under DDP and FSDP2: two processes train as one on the whole batch, in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import compatibility_workers
import distributed_workers as workers
import emended_workers
import pytest
import torch
from cases import BF16, TOLERANCE, assert_close, assert_identical, randn

import consequentialism as cw
from consequentialism.optim.memory import steps_to_refresh

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")

COUNTS = [[8, 8], [8, 8], [11, 5], [8, 8], [3, 9]]  # of the ranks in each step: uneven ones too
NAMES = ("SGD", "AdamW", "Muon")
WRAPS = ("ddp", "fsdp")
FOUR = [[4, 4, 4, 4], [4, 4, 4, 4], [7, 1, 3, 5]]
CASES: dict[str, tuple[Any, ...]] = {
    "skipped": (),
    "idle": (),
    "accumulated": (),
    "joined": (),
    "widened": (),
    "late": (),
}
SHARDED = [("SGD", "ddp"), ("AdamW", "fsdp"), ("Muon", "fsdp"), ("Adagrad", "ddp")]
X, TARGET = randn(16, 6), torch.arange(16) % 3


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    jobs: dict[str, workers.Job] = {
        f"{name} {wrap}": (emended_workers.job, (name, X, TARGET, COUNTS, wrap)) for wrap in WRAPS for name in NAMES
    }
    jobs["outputs ddp"] = (emended_workers.job, ("outputs", X, TARGET, COUNTS, "ddp"))
    jobs["outputs refused"] = (emended_workers.case, ("outputs_refused", X))
    jobs["tensor parallel"] = (compatibility_workers.tensor_parallel, (X,))
    jobs["spawned"] = (compatibility_workers.spawned, (cw.convert(compatibility_workers.network()), X))
    jobs.update({name: (emended_workers.case, (name, X, *arguments)) for name, arguments in CASES.items()})
    for name, wrap in SHARDED:
        jobs[f"sharded {name} {wrap}"] = (
            emended_workers.sharded,
            (emended_workers.job, name, X, TARGET, COUNTS, wrap),
        )
    for name in CASES:
        jobs[f"sharded {name}"] = (emended_workers.sharded, (emended_workers.case, name, X))
    jobs["resumed"] = (emended_workers.sharded, (emended_workers.resumed, X))
    for reshard in (True, False):
        jobs[f"mixed {reshard}"] = (emended_workers.case, ("mixed", X.float(), reshard))
    return workers.launch(jobs, tmp_path_factory.mktemp("processes"))


@pytest.mark.parametrize("how", ["", "sharded "])
@pytest.mark.parametrize("name", CASES)
def test_ranks_that_do_not_do_the_same(found: list[dict[str, Any]], name: str, how: str) -> None:
    """A layer or all of them without rows on one rank; ``no_sync``, with rank 0 evaluating; batches that end early;
    biases and layers that come later."""
    expected = getattr(emended_workers, name)(X, None, *CASES[name])
    for rank, results in enumerate(found):
        own = results[how + name]
        assert "error" not in own, own["error"]
        for key in ("gram_rows", "input_gram", "root"):
            assert_close(f"{key} of rank {rank}", own[key], expected[key], 1e-11)
        for i, (parameter, one) in enumerate(zip(own["parameters"], expected["parameters"], strict=True)):
            assert_close(f"parameter {i} of rank {rank}", parameter, one, 1e-11)
        if name == "joined":
            assert own["steps"] == expected["steps"] == 5
            assert "use torch.distributed.algorithms.Join([model, optimizer])" in own["refused"]


def test_a_killed_rank_is_an_error_for_the_others(tmp_path: Path) -> None:
    """In the step that would refresh, and in a forward that exchanges Grams; weights and states are as before."""
    context = torch.multiprocessing.get_context("spawn")
    processes = [context.Process(target=emended_workers.bereft, args=(rank, X, str(tmp_path))) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, -9]
    found = torch.load(tmp_path / "0.pt", weights_only=False)
    assert set(found) == {"whole", "sharded", "convert"}
    for name, (error, before, after) in found.items():
        assert "gloo" in error, f"{name}: {error}"
        own, expected = (torch.utils._pytree.tree_leaves(state) for state in (after, before))
        assert len(own) == len(expected) > 1
        for one, other in zip(own, expected, strict=True):
            assert_identical(name, torch.as_tensor(one), torch.as_tensor(other))


@pytest.mark.parametrize("reshard", [True, False])
def test_fsdp_in_bfloat16(found: list[dict[str, Any]], reshard: bool) -> None:
    """Moments, roots and weights are float32, of the rows as they were computed with."""
    expected = emended_workers.mixed(X.float(), None, reshard)
    for rank, results in enumerate(found):
        own = results[f"mixed {reshard}"]
        assert "error" not in own, own["error"]
        rounded = X.bfloat16().double()
        rows = torch.cat([rounded, rounded.new_ones(16, 1)], 1)
        assert_close(f"moment of rank {rank}", own["input_gram"], rows.T @ rows / 16, 1e-6)
        assert_identical("root", own["root"], found[0][f"mixed {reshard}"]["root"])
        for i, (parameter, one) in enumerate(zip(own["parameters"], expected["parameters"], strict=True)):
            assert parameter.dtype == torch.float32
            assert_close(f"parameter {i} of rank {rank}", parameter, one, TOLERANCE[BF16])


def test_four_processes_train_as_one(tmp_path: Path) -> None:
    jobs: dict[str, workers.Job] = {
        f"{name} {wrap}": (emended_workers.job, (name, X, TARGET, FOUR, wrap))
        for name, wrap in (("AdamW", "ddp"), ("Muon", "fsdp"))
    }
    # Of a mesh of 2 x 2 the last dimension divides the state, the other has copies.
    jobs["AdamW hsdp"] = (emended_workers.sharded, (emended_workers.job, "AdamW", X, TARGET, FOUR, "hsdp"))
    results = workers.launch(jobs, tmp_path, ranks=4)
    for key in jobs:
        expected = emended_workers.train(key.split()[0], X, TARGET, FOUR, 0, "one")
        for rank, own in enumerate(results):
            assert "error" not in own[key], own[key]["error"]
            for i, (parameter, one) in enumerate(zip(own[key]["parameters"], expected["parameters"], strict=True)):
                assert_close(f"{key}: parameter {i} of rank {rank}", parameter, one, 1e-11)


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("name", NAMES)
def test_two_processes_train_as_one(found: list[dict[str, Any]], name: str, wrap: str) -> None:
    expected = emended_workers.train(name, X, TARGET, COUNTS, 0, "one")
    for rank, results in enumerate(found):
        own = results[f"{name} {wrap}"]
        assert "error" not in own, own["error"]
        for i, (parameter, one) in enumerate(zip(own["parameters"], expected["parameters"], strict=True)):
            assert_close(f"parameter {i} of rank {rank}", parameter, one, 1e-12)


def test_roots_of_outputs_are_those_of_one_process(found: list[dict[str, Any]]) -> None:
    """Under DDP; refused where a rank has not all outputs, or not all roots."""
    expected = emended_workers.train("outputs", X, TARGET, COUNTS, 0, "one")
    plain = emended_workers.train("AdamW", X, TARGET, COUNTS, 0, "one")
    assert (expected["parameters"][0] - plain["parameters"][0]).abs().max() > 1e-3
    for rank, results in enumerate(found):
        own = results["outputs ddp"]
        assert "error" not in own, own["error"]
        for i, (parameter, one) in enumerate(zip(own["parameters"], expected["parameters"], strict=True)):
            assert_close(f"parameter {i} of rank {rank}", parameter, one, 1e-11)
        refused = results["outputs refused"]
        assert "output_exponent must be 0 where a rank has some outputs alone" in refused["fsdp"]
        assert "output_exponent must be 0 with shard_state=True" in refused["sharded"]


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("name", NAMES)
def test_a_step_communicates_its_grams_on_refresh_steps_alone(
    found: list[dict[str, Any]], name: str, wrap: str
) -> None:
    for results in found:
        own = results[f"{name} {wrap}"]
        refreshes = [steps_to_refresh(step, emended_workers.REFRESH_EVERY) == 0 for step in range(len(COUNTS))]
        assert own["reduced"] == [own["grams"] * due for due in refreshes]  # entries, with a count of rows each


@pytest.mark.parametrize(("name", "wrap"), SHARDED)
def test_a_sharded_state_is_the_same_one(found: list[dict[str, Any]], name: str, wrap: str) -> None:
    """The weights and the checkpoint of one process; each moment and root on one rank."""
    expected = emended_workers.train(name, X, TARGET, COUNTS, 0, "one")
    everything = [results[f"sharded {name} {wrap}"] for results in found]
    for rank, own in enumerate(everything):
        assert "error" not in own, own["error"]
        for i, (parameter, one) in enumerate(zip(own["parameters"], expected["parameters"], strict=True)):
            assert_close(f"parameter {i} of rank {rank}", parameter, one, 1e-12)
        for number, state in expected["saved"].items():
            assert own["saved"][number].keys() == state.keys()
            for key in ("input_gram", "root") if "root" in state else ():
                assert_close(f"{key} of rank {rank}", own["saved"][number][key], state[key], 1e-11)
    kept = [own["kept"] for own in everything]
    assert sum(kept) == expected["kept"]
    assert max(kept) <= expected["kept"] / 2 + expected["largest"] / 2 < expected["kept"]


@pytest.mark.parametrize(("name", "wrap"), SHARDED)
def test_a_sharded_step_sends_each_root_once(found: list[dict[str, Any]], name: str, wrap: str) -> None:
    """Twice where the optimizer inside takes its own step; sums over all ranks are of numbers of rows alone."""
    for results in found:
        own = results[f"sharded {name} {wrap}"]
        layers = 2 if name == "Muon" else 3
        roots = own["grams"] - layers
        assert own["sent"] == [roots * (2 if name == "Adagrad" else 1)] * len(COUNTS)
        refreshes = [steps_to_refresh(step, emended_workers.REFRESH_EVERY) == 0 for step in range(len(COUNTS))]
        assert own["reduced"] == [2 * layers * due for due in refreshes]


def test_a_sharded_state_resumes(found: list[dict[str, Any]]) -> None:
    for rank, results in enumerate(found):
        own = results["resumed"]
        assert "error" not in own, own["error"]
        for i, (first, second) in enumerate(zip(own["first"], own["second"], strict=True)):
            assert_identical(f"parameter {i} of rank {rank}", first, second)
        assert bool(own["errors"]) == (rank == 1)
        for message in own["errors"] + own["stale"]:
            assert "call consolidate_state_dict(to=0) on all ranks before state_dict()" in message
        assert own["stale"]
    assert sum(results["resumed"]["roots"] for results in found) == 3
    model = emended_workers.network()
    optimizer = emended_workers.optimizer_of("AdamW", model)  # one process, that has all
    weights, state = found[0]["resumed"]["checkpoint"]
    model.load_state_dict(weights)
    optimizer.load_state_dict(state)
    for _ in range(3):
        optimizer.zero_grad()
        (model(X).square().sum() / 2).backward()
        optimizer.step()
    for i, (parameter, one) in enumerate(zip(model.parameters(), found[0]["resumed"]["first"], strict=True)):
        assert_close(f"parameter {i}", parameter, one, 1e-11)


def test_where_a_state_cannot_be_sharded(monkeypatch: pytest.MonkeyPatch) -> None:
    model = emended_workers.network()
    inner = torch.optim.AdamW(model.parameters())
    with pytest.raises(TypeError, match="shard_state must be True or False, got 2"):
        cw.optim.Emended(inner, model, shard_state=2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="process_group=None has one"):
        cw.optim.Emended(inner, model, shard_state=True, process_group=None)
    with pytest.raises(ValueError, match="which is not initialised"):
        cw.optim.Muon(model, 0.1, aux={"lr": 0.1}, shard_state=True)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)

    class Positions(torch.optim.SGD):
        pass

    cw.optim.declare(Positions, decay="none", reads="position")
    with pytest.raises(ValueError, match=r"Positions moves the weights in train\(\) and eval\(\)"):
        cw.optim.Emended(Positions(model.parameters()), model, shard_state=True)


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
