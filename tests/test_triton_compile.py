"""Triton kernels compiled for chips that are not here: no spills on CUDA, tensor cores, shared memory; launch plans."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import os
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
from cases import SHAPES

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET"):
    pytest.skip("TRITON_INTERPRET is set: kernels are interpreted, not compiled", allow_module_level=True)

import triton_aot
from triton_aot import MAIN_TARGETS, SHARED_BYTES, Case, compile_case

from consequentialism.backend.triton import plans

OF_COORDINATES = ("decayed_gram", "inverse_root", "root_product")
PRODUCTS = (*OF_COORDINATES, "gram", "conv", "emend", "fused", "damped_inverse", "multiply")
TENSOR_CORES = {
    "sm_80": ("mma.sync",),
    "sm_90": ("mma.sync", "wgmma.mma_async"),
    "sm_86": ("mma.sync",),
    "sm_100": ("mma.sync", "tcgen05.mma"),
    "sm_120": ("mma.sync",),
    "gfx942": ("v_mfma",),
}
WITHOUT_FLOAT64 = ("sm_86", "sm_100", "sm_120")  # there Triton multiplies float64 without them
MAY_SPILL = ("sm_86", "sm_100", "sm_120", "gfx942")  # nothing was chosen for them; some kernels spill a few bytes
# A warpgroup's instruction needs 64 rows of a product of the chip's narrow types.
WARPGROUPS = (
    "gram-bf16-fp32-dual-64",
    "gram-bf16-fp32-dual-128",
    "gram-fp32-fp32-primal-64",
    "emend-bf16-fp32-dual-64",
    "decayed_gram-bf16-64",
    "inverse_root-fp32-64",
    "root_product-bf16-64",
)


# Of what the tuner may pick beside a plan's own numbers of warps and stages: the rest is in test_triton_candidates.py.
TIMED = ("gram-bf16-fp32-dual-64-4w3s", "gram-fp32-fp32-primal-64-8w4s", "emend-fp32-fp32-dual-64-4w4s")
# Of the kernels of steps in emended coordinates, which are the Gram's and the emended input's with other ends.
COORDINATES = ("decayed_gram-bf16-64", "inverse_root-fp32-64", "root_product-bf16-64")
# For other chips, the largest of each kind; the rest is there too.
ELSEWHERE = (
    "gram-bf16-fp32-dual-128",
    "emend-fp32-fp32-dual-64",
    "conv-bf16-64",
    "fused-fp32-fp32-64",
    "damped_inverse-fp32-64",
    "damped_inverse-fp64-32",
)


def selected() -> Iterator[tuple[Case, str]]:
    """What every run of the suite compiles, seconds each the first time: for sm_90 all but float16's, which are like
    bfloat16's or float32's."""
    for target in MAIN_TARGETS:
        for case in triton_aot.cases(target):
            if target != "sm_90":
                taken = case.name in ELSEWHERE
            else:
                taken = case.name in TIMED if case.first else "fp16" not in case.name
                taken = case.name in COORDINATES if case.name in coordinate_names(target) else taken
            if taken:
                yield case, target


@functools.cache
def coordinate_names(target: str) -> tuple[str, ...]:
    return tuple(case.name for case in triton_aot.coordinate_cases(target))


@functools.cache
def names(target: str) -> tuple[str, ...]:
    return tuple(case.name for case in triton_aot.cases(target))


def each(selection: Iterable[tuple[Case, str]]) -> Any:
    """A mark that gives a test each of these cases."""
    return pytest.mark.parametrize(
        ("case", "target"), [pytest.param(case, target, id=f"{target}-{case.name}") for case, target in selection]
    )


def check_compiled(case: Case, target: str) -> None:
    """No spills, shared memory within the chip's, tensor cores, and candidates that add in the same order."""
    compiled = compile_case(case, target)
    assert compiled.stack == 0 or target in MAY_SPILL, (
        f"{compiled.stack} bytes a thread are spilled, with {compiled.registers} registers"
    )
    assert compiled.shared <= SHARED_BYTES[target]
    uses = any(instruction in compiled.assembly for instruction in TENSOR_CORES[target])
    assert uses == (case.name.startswith(PRODUCTS) and not ("fp64" in case.name and target in WITHOUT_FLOAT64))
    if target == "sm_90" and case.name in WARPGROUPS:
        assert "wgmma.mma_async" in compiled.assembly
    if case.first:
        (first,) = (one for one in triton_aot.cases(target) if one.name == case.first)
        assert compiled.order == compile_case(first, target).order, "the choice of a candidate would change bits"


@each(selected())
def test_compiled(case: Case, target: str) -> None:
    check_compiled(case, target)


def test_what_decides_the_order_of_sums_is_seen() -> None:
    by_name = {case.name: case for case in triton_aot.cases("sm_90")}
    primal, dual, narrow = (by_name[f"gram-bf16-fp32-{name}"] for name in ("primal-64", "dual-64", "dual-32"))
    orders = [compile_case(case, "sm_90").order for case in (primal, dual, narrow)]
    assert len(set(orders)) == 3  # with sums for the bias and without, by warpgroups and by warps
    assert len(orders[0]) == 2
    assert compile_case(primal._replace(warps=primal.warps // 2), "sm_90").order != orders[0]
    assert compile_case(dual._replace(warps=dual.warps // 2), "sm_90").order == orders[1]


def test_names_of_the_cases() -> None:
    assert {*WARPGROUPS, *TIMED, *COORDINATES, *ELSEWHERE} <= set(names("sm_90"))
    for target in SHARED_BYTES:
        assert len(set(names(target))) == len(names(target))


@pytest.mark.parametrize(
    "name", ["gram-bf16-fp32-dual-64", "emend-fp32-fp32-primal-64", "conv-bf16-64", "conv-fp32-32"]
)
def test_nothing_spills_at_any_alignment(name: str) -> None:
    (case,) = (case for case in triton_aot.cases("sm_90") if case.name == name)
    assert compile_case(case, "sm_90", aligned=False).stack == 0


SIZES = sorted({*itertools.chain(*SHAPES), 255, 256, 257, 784, 1024, 1025, 4096, 8192, 11008, 50_000, 10_000_000})


def test_plans_are_candidates_and_cover_the_shape() -> None:
    for outer, inner, size in itertools.product(SIZES, SIZES, (2, 4, 8)):
        plan = plans.plan_gram(outer, inner, size)
        assert plan._replace(splits=1, length=0) in plans.GRAM_CANDIDATES[size]
        assert (plan.splits - 1) * plan.length < inner <= plan.splits * plan.length
        assert plan.length % plan.depth == 0
        assert plans.plan_emend(outer, inner, size) in plans.EMEND_CANDIDATES[size]
        assert plan == plans.plan_gram(outer, inner, size)
        assert plans.gram_candidates(plan, outer, inner, size, False)[0] == plan
        plan = plans.plan_conv_gram(4, outer, inner, size)
        assert plans.conv_gram_candidates(plan, outer, inner, size)[0] == plan
        assert plan._replace(splits=1, length=0) == plans.CONV_GRAM[size]
        assert (plan.splits - 1) * plan.length < inner <= plan.splits * plan.length


def test_plans_of_damped_inverses() -> None:
    for order, size in itertools.product(range(1, plans.MAX_INVERSE_ORDER + 1), (4, 8)):
        assert plans.plan_damped_inverse(order, size) in plans.INVERSE_CANDIDATES[size]
    for rows, size in itertools.product(range(1, plans.MAX_FUSED_ROWS + 1), (4, 8)):
        plan = plans.plan_fused(rows, size)
        assert plan in plans.FUSED_CANDIDATES[size]
        assert plan is not None
        assert rows <= plan.size
    assert plans.plan_fused(plans.MAX_FUSED_ROWS + 1, 4) is None
