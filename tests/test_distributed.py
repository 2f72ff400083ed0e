"""`process_group`: real processes, each with its rows of the global batch."""

from __future__ import annotations

import functools
import importlib.util
import math
from pathlib import Path
from typing import Any

import distributed_workers as workers
import pytest
import torch
import torch.distributed as dist
from cases import (
    BF16,
    EXACT,
    F32,
    F64,
    FACTOR,
    FLOOR,
    TOLERANCE,
    assert_close,
    assert_grads_close,
    error_of,
    join,
    make_input,
    oracle,
    randn,
)
from torch import Tensor, nn

import consequentialism as cw

pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch without gloo")

OUTPUTS = 3


def case(counts: list[int], inputs: int, bias: bool, **options: Any) -> dict[str, Any]:
    name = f"rows {counts}, I {inputs}, bias {bias}, {options}"
    return {"name": name, "counts": counts, "inputs": inputs, "bias": bias, "options": options}


CASES = [
    case(counts, inputs, bias, **options)
    for counts in ([5, 5], [3, 7], [10, 1], [0, 6])
    for inputs in (4, 12)  # the primal form, the dual form
    for bias in (True, False)
    for options in ({"scale": "raw"}, {"scale": "nlms", "damping": 0.1})
] + [
    case([4, 3], inputs, True, scale=scale, damping_mode="absolute", damping=0.7, backend=backend)
    for inputs in (4, 12)
    for scale in ("raw", "nlms", "gradient")
    for backend in ("auto", "reference")
]


DTYPES = (F64, F32)
TRAINING_ROWS = (8, 40)  # the dual form, the primal form
WRAPS = ("ddp", "fsdp") if importlib.util.find_spec("torch.distributed.fsdp") else ("ddp",)
COUNTS = ([6, 6], [2, 10], [0, 12])


def batch(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return randn(12, 12, dtype=dtype), randn(12, OUTPUTS, seed=1, dtype=dtype)


def tokens(rows: int) -> tuple[Tensor, Tensor]:
    return torch.arange(3 * rows).reshape(rows, 3) * 7 % 11, torch.arange(rows) % 3


SAMPLES = [4, 1]
INDICES = torch.arange(12) * 5 % 7


# Samples of each rank, and the image's side: more rows than inputs, fewer.
CONVOLUTIONS = [(counts, size) for counts in ([2, 2], [1, 3], [0, 2]) for size in (8, 4)]


def images(counts: list[int], size: int) -> tuple[Tensor, Tensor]:
    return randn(sum(counts), 4, size, size), randn(sum(counts), 6, size - 2, size - 2, seed=1)


# Grams whose inverse float32 cannot hold: of linear layers in both forms, of a convolution.
ACCURACY_COUNTS = [20, 28]
ACCURACY_SIZES = {"primal": (9,), "dual": (60,), "convolution": (2, 6, 6)}
ACCURACY_KINDS = ("correlated", "near_duplicates", "badly_scaled", "decaying")
ACCURACY_OPTIONS: list[dict[str, Any]] = [
    {"damping": 1e-2},
    {"damping": 1e-4},
    {"damping": 1e-6},
    {"damping": 1e-4, "damping_mode": "absolute"},
]
ACCURACY_CASES = [(name, kind, dtype) for name in ACCURACY_SIZES for kind in ACCURACY_KINDS for dtype in (F32, BF16)]


def accuracy_batch(name: str, kind: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    size, rows = ACCURACY_SIZES[name], sum(ACCURACY_COUNTS)
    x = make_input(kind, rows, math.prod(size)).reshape(rows, *size).to(dtype)
    positions = [one - 2 for one in size[1:]]
    return x, randn(rows, OUTPUTS, *positions, seed=1, dtype=dtype)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """All jobs in one start of the processes: what each rank's jobs returned, by name."""
    jobs: dict[str, workers.Job] = {"no gradient": (workers.frozen_and_no_grad, (randn(4, 5),))}
    for dtype in DTYPES:
        jobs[f"linear {dtype}"] = (workers.data_parallel, (*batch(dtype), CASES))
    for wrap in WRAPS:
        for rows in TRAINING_ROWS:
            jobs[f"{wrap} {rows}"] = (workers.training, (*tokens(rows), wrap))
    for counts in COUNTS:
        jobs[f"embedding {counts}"] = (workers.embedding, (INDICES, randn(12, OUTPUTS), counts))
    for wrap in WRAPS:
        for counts, size in CONVOLUTIONS:
            jobs[f"convolution {wrap} {counts} {size}"] = (workers.convolution, (*images(counts, size), counts, wrap))
    for one in ACCURACY_CASES:
        jobs[f"accuracy {one}"] = (workers.functional, (*accuracy_batch(*one), ACCURACY_COUNTS, ACCURACY_OPTIONS))
    jobs["different layers"] = (workers.different_layers, ())
    jobs["left out"] = (workers.left_out, ())
    jobs["no false alarm"] = (workers.no_false_alarm, ())
    jobs["evaluation"] = (workers.evaluation, ())
    jobs["uneven inputs"] = (workers.uneven_inputs, ())
    jobs["saved"] = (workers.saved, ())
    jobs["compiled"] = (workers.compiled, ())
    jobs["samples"] = (workers.samples, (SAMPLES,))
    jobs["deep copy"] = (workers.deep_copy, (randn(4, 5), randn(4, 3)))
    return workers.launch(jobs, tmp_path_factory.mktemp("processes"))


def results_of(found: list[dict[str, Any]], job: str) -> list[dict[str, Any]]:
    """What each rank's job returned; its traceback where it raised."""
    for rank, results in enumerate(found):
        assert job in results, f"rank {rank} did not come to this job: {list(results.values())[-1]}"
        assert "error" not in results[job], f"rank {rank}: {results[job]['error']}"
    return [results[job] for results in found]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_data_parallel_gives_the_gradient_of_the_global_batch(found: list[dict[str, Any]], dtype: torch.dtype) -> None:
    x, dy = batch(dtype)
    for rank, result in enumerate(results_of(found, f"linear {dtype}")):
        for one in CASES:
            rows, options = sum(one["counts"]), dict(one["options"])
            # DDP takes the mean over ranks, so the global dy is the local one divided by their number.
            expected = oracle(x[:rows, : one["inputs"]], dy[:rows] / workers.RANKS, one["bias"], **options)
            assert_grads_close_in(f"{one['name']}, rank {rank}", result[one["name"]], expected, TOLERANCE[dtype])


def assert_grads_close_in(name: str, own: tuple, expected: tuple, bound: float) -> None:
    try:
        assert_grads_close(own, expected, bound)
    except AssertionError as error:
        raise AssertionError(f"{name}: {error}") from None


def on_one_process(x: Tensor, target: Tensor) -> dict[str, Any]:
    """The same training as `workers.training`, on the global batch."""
    torch.manual_seed(0)
    model = nn.Sequential(
        cw.Embedding(11, 6, dtype=F64),
        nn.Flatten(),
        cw.Linear(18, 16, dtype=F64),
        nn.Tanh(),
        cw.Linear(16, 3, bias=False, dtype=F64),
    )
    steps = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(3):
        steps.zero_grad()
        nn.functional.cross_entropy(model(x), target).backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        steps.step()
    return {"gradients": gradients, "parameters": [p.detach() for p in model.parameters()]}


@pytest.mark.parametrize("rows", TRAINING_ROWS)
@pytest.mark.parametrize("wrap", WRAPS)
def test_training_is_that_of_one_process(found: list[dict[str, Any]], wrap: str, rows: int) -> None:
    expected = on_one_process(*tokens(rows))
    for result in results_of(found, f"{wrap} {rows}"):
        for kind in ("gradients", "parameters"):
            for k, (own, want) in enumerate(zip(result[kind], expected[kind], strict=True)):
                assert_close(f"{kind} {k}", own, want, EXACT)


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_embedding(found: list[dict[str, Any]], counts: list[int]) -> None:
    for result in results_of(found, f"embedding {counts}"):
        for name, own in result.items():
            scale, damping_mode, *_ = name.split()
            options = {"scale": scale, "damping_mode": damping_mode, "damping": 0.3}
            dy = randn(12, OUTPUTS) / workers.RANKS
            expected = cw.reference.emended_embedding_grad(INDICES, dy, 11, 0, **options)
            assert_close(name, own, expected, TOLERANCE[F64])


@pytest.mark.parametrize(("counts", "size"), CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("wrap", WRAPS)
def test_convolution(found: list[dict[str, Any]], wrap: str, counts: list[int], size: int) -> None:
    x, dy = images(counts, size)
    ones, nothing = (1, 1), (0, 0)
    for result in results_of(found, f"convolution {wrap} {counts} {size}"):
        for name, own in result.items():
            scale, damping_mode = name.split()
            options = {"scale": scale, "damping_mode": damping_mode, "damping": 0.3}
            expected = cw.reference.emended_conv_weight_grad(
                x, dy / workers.RANKS, (3, 3), ones, nothing, ones, 2, **options
            )
            assert_grads_close_in(name, own, expected, TOLERANCE[F64])


def test_no_gradient_no_collective(found: list[dict[str, Any]]) -> None:
    results_of(found, "no gradient")


def test_deep_copy_shares_the_group(found: list[dict[str, Any]]) -> None:
    for result in results_of(found, "deep copy"):
        own, copied = result["gradients"]
        assert_close("dw of the copy", copied, own, TOLERANCE[F64])


@pytest.mark.parametrize("one", ACCURACY_CASES, ids=str)
def test_digits_are_those_of_one_process(found: list[dict[str, Any]], one: tuple[str, str, torch.dtype]) -> None:
    x, dy = accuracy_batch(*one)
    ranks = results_of(found, f"accuracy {one}")
    gradient = cw.emended_weight_grad
    if x.ndim > 2:
        gradient = functools.partial(cw.emended_conv_weight_grad, kernel_size=3)  # type: ignore[assignment]
    for options in ACCURACY_OPTIONS:
        own = sum(join(*(g.flatten(1) if g.ndim > 1 else g for g in rank[str(options)])) for rank in ranks)
        expected, alone = (
            join(*(g.flatten(1) if g.ndim > 1 else g for g in gradient(a, b, **options)))
            for a, b in ((x.double(), dy.double()), (x, dy))
        )
        bound = FACTOR * error_of(alone, expected) + FLOOR[one[2]]
        assert_close(f"{one}, {options}", own, expected, bound)


def test_different_layers_are_an_error_on_every_rank(found: list[dict[str, Any]]) -> None:
    names = {
        "named experts": ("'0'", "'1'"),
        "experts of zeros": ("'0'", "'1'"),
        "find_unused_parameters": ("'module.layers.0'", "'module.layers.1'"),
        "unnamed experts": ("different layers", "'', linear, I=4, O=4"),
        "a layer skipped": ("'0'", "'1'"),
        "another kind": ("linear", "convolution"),
        "in backward": ("embedding", "linear"),
        "other options": ("damping=0.5", "damping=1.5"),
        "another type": ("torch.float32", "torch.float64"),
    }
    for result in results_of(found, "different layers"):
        for name, message in result.items():
            for part in ("process_group", "rank 0 runs", "rank 1 runs", *names[name]):
                assert part in message, f"{name}: {message!r}"


def test_a_layer_that_a_rank_leaves_out_is_named_after_the_timeout(found: list[dict[str, Any]]) -> None:
    message = results_of(found, "left out")[0]["heard"]
    for part in ("process_group", "'last', linear, I=4, O=4", "left it out"):
        assert part in message


def test_equal_layers_are_no_error(found: list[dict[str, Any]]) -> None:
    for result in results_of(found, "no false alarm"):
        (warning,) = result["warnings"]
        assert "the weights of '', linear, I=4, O=3" in warning


def test_eval_mode_is_silent(found: list[dict[str, Any]]) -> None:
    alone = results_of(found, "evaluation")[0]
    assert list(alone) == ["Linear", "Conv1d", "Embedding"]
    for name, (own, expected) in alone.items():
        for k, (a, b) in enumerate(zip(own, expected, strict=True)):
            assert_close(f"{name}, {k}", a, b, 0)


def test_uneven_inputs_can_end_training_on_all_ranks(found: list[dict[str, Any]]) -> None:
    for result in results_of(found, "uneven inputs"):
        assert result["steps"] == 1
        assert "exhausted" in result["error heard"]


def test_a_saved_model(found: list[dict[str, Any]]) -> None:
    for result in results_of(found, "saved"):
        assert result["default"] == ("default", [], True)
        assert result["none"] == (None, [], True)
        group, (warning,), shared = result["another"]
        assert group is None
        assert shared
        assert "process_group" in warning


def test_saved_without_a_group_to_load_into(tmp_path: Path) -> None:
    layer = cw.Linear(4, 3, process_group=object())
    torch.save(layer, tmp_path / "layer.pt")
    with pytest.warns(UserWarning, match="process_group"):
        loaded = torch.load(tmp_path / "layer.pt", weights_only=False)
    assert loaded.process_group is None
    assert loaded.options == cw.Options()


def test_compile(found: list[dict[str, Any]]) -> None:
    for result in results_of(found, "compiled"):
        for name, (own, expected, message) in result.items():
            for k, (a, b) in enumerate(zip(own, expected, strict=True)):
                assert_close(f"{name}, {k}", a, b, TOLERANCE[F32])
            assert "process_group= does not support torch.compile in a full graph" in message, name


def test_samples_are_summed_over_ranks(found: list[dict[str, Any]]) -> None:
    for result in results_of(found, "samples"):
        for name, (number, mask, expected) in result.items():
            for k, want in enumerate(expected):
                assert_close(f"{name}, {k}", number[k], want, TOLERANCE[F32])
                assert_close(f"{name}, {k}, mask", mask[k], want, TOLERANCE[F32])
