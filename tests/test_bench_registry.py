"""What is measured: the registry, a choice from it, and every provider held to float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from bench import providers, registry, show, verify
from bench.case import ALL_MODES, OK, Case, Row, Unavailable
from bench.registry import OPS, Choice, plan
from bench.shapes import ConvShape, LinearShape
from bench.step_cases import conv_case, linear_case
from bench.timing import Cuda, Device, Host, Rehearsal
from consequentialism.errors import UserError

DEVICES: dict[str, Device] = {"cpu": Host(), "cuda": Cuda(), "rehearsal": Rehearsal()}


@pytest.mark.parametrize("occasion", list(DEVICES))
def test_every_op_has_cases_with_floors_whose_baseline_is_a_provider(occasion: str) -> None:
    cases = plan(Choice(occasion), DEVICES[occasion])
    assert {case.op for case in cases} == set(OPS)
    assert len({case.key for case in cases}) == len(cases)
    for case in cases:
        assert case.baseline in case.providers
        assert case.least.bytes > 0
        assert case.least.flops > 0
        assert case.emended is None or case.emended.flops > case.least.flops
        assert set(case.modes) <= set(DEVICES[occasion].modes)
    quick = plan(Choice(occasion, quick=True), DEVICES[occasion])
    assert {case.key for case in quick} <= {case.key for case in cases}
    assert not any("compiled" in case.providers for case in quick)


def test_aims_are_of_providers_that_are_measured() -> None:
    for occasion, count in (("cpu", 9), ("cuda", 6 * 2 + 2 * 2 + 2 + 1)):
        targets = [(case, aim) for case in plan(Choice(occasion), DEVICES[occasion]) for aim in case.targets]
        assert len(targets) == count
        for case, aim in targets:
            for provider, mode in (aim.own, aim.other):
                assert provider in case.providers
                assert mode in case.modes


def test_a_choice() -> None:
    host = DEVICES["cpu"]
    (case,) = plan(Choice("cpu", shapes=((16, 20, 12),)), host)
    assert case.key == ("linear", "16x20x12", "float32")
    conv, linear = plan(Choice("cpu", shapes=((2, 4, 6, 3, 1, 1, 8), (3, 4, 5)), dtypes=("float64",)), host)
    assert (conv.key, linear.key) == (("conv2d", "2x4x8^2 3^2 6", "float64"), ("linear", "3x4x5", "float64"))
    cases = plan(Choice("cpu", ops=("linear", "mlp"), shapes=((5, 6, 7, 8),)), host)
    assert [case.shape for case in cases if case.op == "mlp"] == ["5x6-7-8"]
    assert len([case for case in cases if case.op == "linear"]) == len(registry.LAYERS_CPU)
    (known,) = plan(Choice("cpu", ops=("linear",), shapes=((64, 784, 1600),)), host)
    assert known.targets, "a shape of the registry keeps its target"
    cases = plan(Choice("cpu", providers=("displaced", "naive")), host)
    assert {case.op for case in cases} == {"linear", "conv2d"}
    for case in cases:
        assert "plain" in case.providers
        assert set(case.providers) <= {"plain", "naive", "displaced"}
    (case,) = plan(Choice("cpu", ops=("linear",), shapes=((3, 4, 5),), providers=("compiled",), quick=True), host)
    assert set(case.providers) == {"plain", "compiled"}


@pytest.mark.parametrize("occasion", list(DEVICES))
def test_a_convolutions_gram_is_measured_both_ways(occasion: str) -> None:
    cases = plan(Choice(occasion, ops=("conv2d",)), DEVICES[occasion])
    assert all("direct" in case.providers for case in cases)
    assert any("displaced" in case.providers for case in cases)
    for method in ("direct", "displaced"):
        build: Any = providers.conv_layers(DEVICES[occasion])[method]
        assert build.keywords == {"backend": DEVICES[occasion].backend()}


def test_factors_are_left_out_of_half_types() -> None:
    ops = {case.op for case in plan(Choice("cpu", dtypes=("bfloat16",)), DEVICES["cpu"])}
    assert ops == set(OPS) - {"damped_inverse", "damped_inverses", "inverse_root"}


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        (Choice("cpu", providers=("fast",)), "argument --provider: no chosen op has 'fast'; there are plain, "),
        (Choice("cpu", ops=("linear",), providers=("displaced",)), "no chosen op has 'displaced'; there are plain"),
        (Choice("cpu", shapes=((1, 2, 3, 4, 5, 6, 7), (3, 4))), "argument --shape: no op takes '3,4': linear takes "),
        (
            Choice("cpu", ops=("damped_inverse",), dtypes=("float16",)),
            "argument --dtype: no half-precision types of damped_inverse, got float16",
        ),
        (Choice("cpu", ops=("conv2d",), shapes=((3, 4, 5),)), "'3,4,5': conv2d takes B,C,O,KERNEL,STRIDE,GROUPS,SIDE"),
    ],
    ids=str,
)
def test_what_cannot_be_chosen(choice: Choice, said: str) -> None:
    with pytest.raises(UserError) as error:
        plan(choice, DEVICES["cpu"])
    assert said in str(error.value)
    assert "\n" not in str(error.value)


CHECKED = [
    *(linear_case("linear", LinearShape(*shape), dtype, Host())
      for shape in ((9, 20, 12), (40, 12, 7)) for dtype in ("float32", "float64")),
    *(conv_case("conv2d", shape, "float32", Host())
      for shape in (ConvShape(3, 4, 6, 3, 1, 2, 8), ConvShape(9, 4, 6, 3, 2, 1, 7), ConvShape(1, 9, 4, 5, 1, 1, 3))),
]  # fmt: skip


@pytest.mark.parametrize("case", CHECKED, ids=lambda case: " ".join(case.key))
def test_every_layer_is_right_and_a_little_off_is_seen(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for name, build in case.providers.items():
        if name == "compiled":  # takes long; the rehearsal on a GPU's machine, and `make bench`, have it
            continue
        try:
            work = build()
        except Unavailable:
            assert name == "triton"
            continue
        assert work.error is not None
        found[name] = work.error()
        assert found[name] <= case.bound, name
    assert {"plain", "consequentialism", "reference", "naive"} <= found.keys()

    class Off(nn.Linear if case.op == "linear" else nn.Conv2d):  # type: ignore[misc]
        """The plain layer, passed off as an emended one."""

    kinds: dict[str, Callable[..., Any]] = {"plain": Off, "consequentialism": Off}
    made = linear_case if case.op == "linear" else conv_case
    monkeypatch.setattr(f"bench.step_cases.{made.__name__.split('_')[0]}_layers", lambda device: kinds)
    shape: Any = LinearShape(9, 20, 12) if case.op == "linear" else ConvShape(3, 4, 6, 3, 1, 2, 8)
    wrong = made(case.op, shape, case.dtype, Host()).providers["consequentialism"]().error
    assert wrong is not None
    assert wrong() > 0.1


def test_relative_error_sees_a_nan() -> None:
    good, bad = torch.ones(2), torch.tensor([1.0, float("nan")])
    assert verify.relative_error([good, good], [good, 2 * good]) == pytest.approx(0.5)
    assert not verify.relative_error([good, bad, good], [good] * 3) <= 1e9


def test_peers_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "isaac", None)
    with pytest.raises(Unavailable, match="isaac is not installed: pip install isaac"):
        providers.isaac_linear(3, 4)
    from torch._inductor import cpp_builder, exc

    def none() -> str:
        raise exc.InvalidCxxCompiler()

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    with pytest.raises(Unavailable, match=r"torch\.compile needs a C\+\+ compiler, and there is none"):
        providers.linear_layers(Host())["compiled"](3, 4)
    if not torch.cuda.is_available():
        with pytest.raises(Unavailable, match="torch sees no CUDA device"):
            providers.conv_layers(Host())["triton"](3, 4, 3)


def timed(provider: str, mode: str, median: float, ratio: float | None = None, dtype: str = "float32") -> Row:
    return Row("linear", provider, mode, "64x784x1600", dtype, OK, median, median, median, 10, "plain", ratio)


def test_verdicts() -> None:
    choice = Choice("cuda", ops=("linear",), shapes=())
    cases = [case for case in plan(choice, DEVICES["cuda"]) if case.shape in ("64x784x1600", "128x1024x1024")]
    rows = [
        timed("plain", "graph", 10, 1),
        timed("consequentialism", "graph", 14, 1.41),
        timed("stock", "eager", 69),
        timed("plain", "graph", 10, 1, "bfloat16"),
        Row("linear", "consequentialism", ALL_MODES, "64x784x1600", "bfloat16", "refused: relative error 1"),
    ]
    lines = show.verdicts(cases, rows)
    assert len(lines) == 2 * 4
    assert "met      linear 64x784x1600 float32: consequentialism, graph / plain, graph = 1.41, at most 1.50" in lines
    (missed,) = (line for line in lines if line.startswith("MISSED"))
    assert "consequentialism, graph / stock, eager = 0.20, at most 0.20" in missed  # 14 / 69 is above 1 / 5
    refused = [line for line in lines if "64x784x1600 bfloat16" in line]
    assert all("no time" in line and "consequentialism: refused: relative error 1" in line for line in refused)
    assert sum("not run" in line for line in lines) == 5
    assert show.verdicts(plan(Choice("cuda", providers=("naive",)), DEVICES["cuda"]), rows) == []


def test_the_table_is_text_where_rich_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "rich", None)
    show.table([timed("plain", "eager", 10, 1), timed("consequentialism", "eager", 14, 1.41)])
    head, plain, own = capsys.readouterr().out.splitlines()
    assert head.split()[:6] == ["op", "shape", "dtype", "provider", "mode", "ms"]
    assert own.split() == ["linear", "64x784x1600", "float32", "consequentialism", "eager", *["14.00"] * 3, "1.41"]
    assert plain.index("10.00") == own.index("14.00")
