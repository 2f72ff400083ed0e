"""Every row of docs/compatibility.md names tests that are there; tests of the rows that no other file has."""

from __future__ import annotations

import ast
import io
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from cases import EXACT, F32, F64, assert_close, assert_grads_close, assert_identical, oracle, randn
from emended_helpers import mlp, squares, train
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn

import consequentialism as cw

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "compatibility.md"
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE.read_text().splitlines()
    if line.startswith("| ") and not line.startswith(("| feature", "| ---"))
]


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_row_names_tests_that_are_there(row: list[str]) -> None:
    feature, convert, emended, tests = row
    for cell in (convert, emended):
        assert re.match(r"(works|refused|plain|not tried)\b", cell), f"{feature}: {cell}"
        assert cell == "works" or ":" in cell, f"{feature}: {cell} needs a reason"
    named = re.findall(r"`(test_\w+)::(test_\w+)`", tests)
    untried = all(cell.startswith("not tried") for cell in (convert, emended))
    assert named or untried, feature
    for file, test in named:
        tree = ast.parse((TESTS / f"{file}.py").read_text())
        assert any(isinstance(node, ast.FunctionDef) and node.name == test for node in ast.walk(tree)), (file, test)


def test_the_table_is_whole() -> None:
    assert len(ROWS) >= 40
    assert len({row[0] for row in ROWS}) == len(ROWS)


def dw_of(model: nn.Module, x: Tensor) -> Tensor:
    model.zero_grad()
    squares(model(x)).backward()
    first = next(model.parameters()).grad
    assert first is not None
    return first.clone()


def test_data_parallel_without_gpus_changes_nothing() -> None:
    x = randn(10, 6)
    model = cw.convert(mlp(F64))
    assert_identical("dw", dw_of(nn.DataParallel(model), x), dw_of(model, x))
    models = [mlp(F64) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    wrapped = [nn.DataParallel(models[0]), models[1]]
    for one in wrapped:
        train(one, cw.optim.Emended(torch.optim.AdamW(one.parameters(), 0.1), one), x, 3)
    assert_identical("weight", models[0][0].weight.detach(), models[1][0].weight.detach())


def replica_of(module: nn.Module) -> nn.Module:
    """What ``torch.nn.parallel.replicate`` makes on a further device: attributes in the place of parameters."""
    replica = module._replicate_for_data_parallel()  # type: ignore[operator]
    for name, child in module._modules.items():
        replica._modules[name] = None if child is None else replica_of(child)
    for name, parameter in module._parameters.items():
        setattr(replica, name, None if parameter is None else parameter * 1)
    return replica


@pytest.mark.parametrize(
    ("make", "x"),
    [
        (lambda: mlp(F64), randn(10, 6)),
        (lambda: nn.Sequential(nn.Conv1d(2, 3, 2, dtype=F64)), randn(10, 2, 5)),
        (lambda: nn.Sequential(nn.ConvTranspose1d(2, 3, 2, bias=False, dtype=F64)), randn(10, 2, 5)),
        (lambda: nn.Sequential(nn.Embedding(4, 3, dtype=F64)), torch.arange(10) % 4),
    ],
)
def test_replicas_of_data_parallel_are_emended(make: Any, x: Tensor) -> None:
    """Each by its own rows, as DDP's ranks are without a process group."""
    model = cw.convert(make())
    first, second = x[:6], x[6:]
    expected = dw_of(model, first) + dw_of(model, second)
    model.zero_grad()
    for part in (first, second):
        squares(replica_of(model)(part)).backward()
    assert_close("dw", next(model.parameters()).grad, expected, EXACT)
    with torch.no_grad():
        assert_identical("y", replica_of(model)(x), model(x))


def test_replicas_of_data_parallel_are_refused_in_coordinates() -> None:
    model = mlp(F64)
    optimizer = cw.optim.Emended(torch.optim.SGD(model.parameters(), 0.1), model)
    assert optimizer.is_recording
    with pytest.raises(RuntimeError, match="DataParallel's replicas on several devices"):
        replica_of(model)(randn(10, 6))


@pytest.mark.parametrize("make", [lambda: nn.LSTM(4, 4), lambda: nn.GRU(4, 4), lambda: nn.MultiheadAttention(4, 2)])
def test_modules_without_an_emended_form_are_named(make: Any) -> None:
    model = nn.ModuleDict({"inner": make(), "head": nn.Linear(4, 2)})
    with pytest.warns(UserWarning, match=rf"left alone inner: {type(model['inner']).__name__}"):
        cw.convert(model)
    assert [name for name, m in model.named_modules() if type(m).__module__.startswith("consequentialism")] == ["head"]
    assert type(model["inner"]).__name__ in str(cw.summary(model))


def test_lazy_layers() -> None:
    model = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.Linear(8, 4))
    with pytest.warns(UserWarning, match="left alone 0: LazyLinear has no shape yet; convert after its first forward"):
        cw.convert(model)
    model(torch.randn(5, 6))
    assert type(cw.convert(model)[0]) is cw.Linear


@pytest.mark.parametrize("how", ["parametrised", "pruned"])
def test_computed_weights(how: str) -> None:
    """Before: left alone. After `convert`: the emended gradient goes through it. After `Emended`: an error."""

    def change(layer: nn.Module) -> None:
        if how == "pruned":
            prune.l1_unstructured(layer, "weight", 0.5)
        else:
            parametrizations.weight_norm(layer)

    x, model = randn(10, 6), mlp(F64)
    change(model[0])
    with pytest.warns(UserWarning, match="left alone 0: its (weight is computed|parameters are parametrised)"):
        cw.convert(model)
    cw.revert(model)
    left = cw.optim.Emended(torch.optim.SGD(model.parameters(), 0.1), model).left_alone
    assert left == {"0": "its weight is computed, not a parameter"}

    model = cw.convert(mlp(F64))
    change(model[0])
    squares(model(x)).backward()
    if how == "pruned":
        gradient = model[0].weight_orig.grad
        assert (gradient == 0).sum() == (model[0].weight_mask == 0).sum() > 0
        assert gradient.abs().max() > 0
    else:
        assert all(p.original0.grad is not None for p in [model[0].parametrizations.weight])

    model = mlp(F64)
    cw.optim.Emended(torch.optim.SGD(model.parameters(), 0.1), model)
    kept = cw.optim.Emended(torch.optim.SGD(model.parameters(), 0.1), model)
    change(model[0])
    with pytest.raises(ValueError, match=r"weight of a \w*Linear that .*Emended steps is no parameter any more"):
        model(x)
    del kept


def test_averaged_models() -> None:
    """An average's copy belongs to no optimizer, and is emended where the model is."""
    x, model = torch.randn(10, 6), cw.convert(mlp(F32))
    average = AveragedModel(model)
    average.update_parameters(model)
    assert type(average.module[0]) is cw.Linear
    assert_identical("dw", dw_of(average, x), dw_of(model, x))
    model = mlp(F32)
    optimizer = cw.optim.Emended(torch.optim.AdamW(model.parameters(), 0.1), model, refresh_every=1)
    average, schedule = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9)), SWALR(optimizer, 0.05)
    train(model, optimizer, x, 2)
    average.update_parameters(model)
    schedule.step()
    squares(average(x)).backward()
    assert all(unit.slot.changes() == 0 for unit in optimizer.units)
    assert optimizer.param_groups[0]["lr"] < 0.1


def test_safetensors_and_pickle(tmp_path: Path) -> None:
    x, model = torch.randn(10, 6), cw.convert(mlp(F32), damping=0.3)
    again = pickle.loads(pickle.dumps(model))
    assert again[0].damping == 0.3
    assert_identical("dw", dw_of(again, x), dw_of(model, x))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert_identical("dw", dw_of(torch.load(buffer, weights_only=False), x), dw_of(model, x))
    safetensors = pytest.importorskip("safetensors.torch", reason="needs safetensors: make test-ecosystem")
    safetensors.save_model(model, tmp_path / "model.safetensors")
    plain = mlp(F32)
    safetensors.load_model(plain, tmp_path / "model.safetensors")
    assert_identical("y", plain(x).detach(), model(x).detach())


def gradient_in_a_process(model: nn.Module, x: Tensor, queue: Any) -> None:
    queue.put(dw_of(model, x).tolist())


@pytest.mark.skipif("fork" not in mp.get_all_start_methods(), reason="no fork on this system")
def test_forked_process() -> None:
    """On one thread a fork may come after a backward: a forked process has none of OpenMP's threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        x, model = randn(10, 6), cw.convert(mlp(F64))
        expected = dw_of(model, x)
        context = mp.get_context("fork")
        queue = context.SimpleQueue()
        process = context.Process(target=gradient_in_a_process, args=(model, x, queue))
        process.start()
        own = torch.tensor(queue.get(), dtype=F64)
        process.join(60)
    finally:
        torch.set_num_threads(threads)
    assert process.exitcode == 0
    assert_close("dw", own, expected, EXACT)


@pytest.mark.filterwarnings("ignore")  # torch's own: a deprecated module, for which it names no stable one
def test_quantisation_after_revert() -> None:
    x, model = torch.randn(10, 6), cw.convert(mlp(F32)).eval()
    with pytest.warns(UserWarning, match=r"consequentialism\.revert\(model\)"):
        quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    assert type(quantised[0]) is cw.Linear  # named, and left as it is
    cw.revert(model)
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    assert "quantized" in type(quantised[0]).__module__
    assert (quantised(x) - model(x)).abs().max() < 0.1


def test_quantisers_that_change_layers_are_refused() -> None:
    from torch.ao.quantization.quantize_fx import prepare_fx

    qat = cw.convert(mlp(F32))
    qat.qconfig = torch.ao.quantization.get_default_qat_qconfig("x86")
    with pytest.raises(TypeError, match=r"consequentialism\.revert\(model\)"):
        torch.ao.quantization.prepare_qat(qat.train())
    mapping = torch.ao.quantization.get_default_qconfig_mapping("x86")
    with pytest.raises(TypeError, match=r"consequentialism\.revert\(model\)"):
        prepare_fx(cw.convert(mlp(F32)).eval(), mapping, (torch.randn(2, 6),))


def test_experts_in_one_tensor() -> None:
    """A stack of weights ``[E, O, I]``: the functional form, one expert's rows at a time."""
    weight, counts = nn.Parameter(randn(3, 4, 6)), (7, 0, 12)
    rows = [randn(count, 6, seed=i) for i, count in enumerate(counts)]
    outputs = [cw.emended_linear(x, weight[e], damping=0.1, scale="raw") for e, x in enumerate(rows)]
    sum(y.square().sum() for y in outputs).backward()
    assert weight.grad is not None
    for e, (x, y) in enumerate(zip(rows, outputs, strict=True)):
        expected = oracle(x, 2 * y.detach(), bias=False, damping=0.1, scale="raw")
        assert_grads_close((weight.grad[e], None), expected, EXACT)
