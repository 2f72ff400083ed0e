"""Compiles the Triton kernels for chips that are not here, and reads what came out."""

from __future__ import annotations

import itertools
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from consequentialism.backend.triton import plans
from consequentialism.backend.triton.conv_gram import conv_gram_kernel
from consequentialism.backend.triton.damped_inverse import damped_inverse_kernel, multiply_kernel
from consequentialism.backend.triton.decayed_gram import decayed_gram_kernel, reduce_decayed_gram_kernel
from consequentialism.backend.triton.emended_input import emended_input_kernel
from consequentialism.backend.triton.fused_weight_grad import fused_weight_grad_kernel
from consequentialism.backend.triton.input_gram import input_gram_kernel, reduce_gram_kernel
from consequentialism.backend.triton.inverse_root import symmetric_product_kernel
from consequentialism.backend.triton.root_product import root_product_kernel
from consequentialism.backend.triton.weight_grad import bias_grad_kernel, poison_kernel

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
MAIN_TARGETS = ("sm_80", "sm_90", "gfx942")  # of the others only the launches that need most are compiled
# That a block may have.
SHARED_BYTES = {
    "sm_80": 166912,
    "sm_90": 232448,
    "sm_86": 101376,
    "sm_100": 232448,
    "sm_120": 101376,
    "gfx942": 65536,
}
BYTES = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}
COUNTERS = ("breakdowns", "broken_before", "broken")


class Case(NamedTuple):
    """One kernel with the types of its pointers and its constants; ``first`` is the name of its first candidate."""

    name: str
    kernel: Any
    pointers: dict[str, str]
    constants: dict[str, Any]
    warps: int
    stages: int
    first: str = ""


class Compiled(NamedTuple):
    """What a case became for a target."""

    assembly: str
    shared: int
    registers: int
    stack: int  # bytes a thread that did not fit into registers
    order: tuple[str, ...]  # in which the kernel adds numbers: its sums and products, and how threads share them


def precision(dtype: str, target: str) -> str:
    """The precision that `launch` asks for."""
    return "ieee" if dtype == "fp64" or target == "gfx942" else "tf32x3"


def order_of_sums(ttgir: str) -> tuple[str, ...]:
    """Each sum across a tile with its layout, then the kinds of products, whose rows and columns are free."""
    layouts = dict(re.findall(r"^(#\w+) = (.*)$", ttgir, re.MULTILINE))

    def resolved(text: str) -> str:
        while (named := re.sub(r"#\w+(?!\.)\b", lambda found: layouts.get(found[0], found[0]), text)) != text:
            text = named
        return text

    sums = re.findall(r'"tt\.reduce"\(.*?\}\) : \((tensor<.*?)\) ->', ttgir, re.DOTALL)
    products = set()
    for name, result in re.findall(r"(tt\.dot|ttng\.warp_group_dot) .*-> (tensor.*)$", ttgir, re.MULTILINE):
        shape = re.findall(r"versionMajor = (\d+).*instrShape = \[([\d, ]+)\]", resolved(result))
        # A warpgroup's shape ends with the depth of an instruction; a warp's has none.
        products.add(f"{name} {[(version, s.split(', ')[2:]) for version, s in shape]}")
    return (*(resolved(one) for one in sums), *sorted(products))


def candidates_of(case: Case, candidates: Sequence[plans.Candidate]) -> Iterator[Case]:
    """``case`` as each of its candidates, of which the first keeps the name."""
    yield case
    for one in candidates[1:]:
        name = f"{case.name}-{one.warps}w{one.stages}s"
        yield case._replace(name=name, warps=one.warps, stages=one.stages, first=case.name)


HUGE = 2**12  # a size at which whatever can be timed is


def cases(target: str) -> Iterator[Case]:
    """Every kernel in every configuration that a plan can pick, in every type."""
    f64 = "fp64"
    for x, wide in (("bf16", "fp32"), ("fp16", "fp32"), ("fp32", "fp32"), ("fp64", f64)):
        for plan, primal in itertools.product(plans.GRAM_CANDIDATES[BYTES[x]], (False, True)):
            constants = {
                "BIAS": True, "PRIMAL": primal, "MIRRORED": True, "TILE": plan.tile, "DEPTH": plan.depth,
                "PRECISION": precision(x, target),
            }  # fmt: skip
            name = f"gram-{x}-{wide}-{'primal' if primal else 'dual'}-{plan.tile}"
            case = Case(name, input_gram_kernel, {"x": x, "gram": wide}, constants, plan.warps, plan.stages)
            yield from candidates_of(case, plans.gram_candidates(plan, HUGE, HUGE, BYTES[x], primal))
        multiplied = x if x == "bf16" else wide
        counts = (3, 2) if x == "bf16" else (3,)
        for plan, primal, terms in itertools.product(plans.EMEND_CANDIDATES[BYTES[multiplied]], (False, True), counts):
            constants = {
                "BIAS": True, "PRIMAL": primal, "TILE_N": plan.rows, "TILE_I": plan.inputs, "DEPTH": plan.depth,
                "PRECISION": precision(wide, target), "TERMS": terms,
            }  # fmt: skip
            pointers = {"inverse": wide, "x": x, "emended": "fp32" if x == "fp16" else x, "column": wide}
            name = f"emend-{x}-{wide}-{'primal' if primal else 'dual'}-{plan.rows}{'-two' if terms == 2 else ''}"
            case = Case(name, emended_input_kernel, pointers, constants, plan.warps, plan.stages)
            yield from candidates_of(case, plans.emend_candidates(plan, HUGE, HUGE, HUGE, BYTES[multiplied]))
        plan = plans.CONV_GRAM[BYTES[x]]
        constants = {
            "BIAS": True, "MIRRORED": True, "K0": 1, "K1": 3, "K2": 3, "TILE": plan.tile, "DEPTH": plan.depth,
            "PRECISION": precision(x, target),
        }  # fmt: skip
        name = f"conv-{x}-{plan.tile}"
        case = Case(name, conv_gram_kernel, {"x": x, "gram": wide}, constants, plan.warps, plan.stages)
        yield from candidates_of(case, plans.conv_gram_candidates(plan, HUGE, HUGE, BYTES[x]))
        for plan in plans.FUSED_CANDIDATES[BYTES[wide]]:
            constants = {
                "BIAS": True, "RELATIVE": True, "BY_RIDGE": False, "RETRIES": 3,
                "SIZE": plan.size, "TILE_I": plan.inputs, "TILE_O": plan.outputs, "DEPTH": plan.depth,
                "TILE": 32, "WIDE": 32, "PRECISION": precision(wide, target),
            }  # fmt: skip
            pointers = {"x": x, "dy": x, "dw": x, "db": x, "room": wide}
            yield Case(f"fused-{x}-{wide}-{plan.size}", fused_weight_grad_kernel, pointers, constants, plan.warps, 1)
    for wide in ("fp32", "fp64"):
        pointers = {"gram": wide, "upper": wide, "inverse": wide, "state": wide, "result": wide}
        exact = precision(wide, target)
        for plan in plans.INVERSE_CANDIDATES[BYTES[wide]]:
            constants = {
                "RELATIVE": True, "BY_RIDGE": False, "RETRY": False, "RETRIES": 3, "TILE": plan.tile,
                "WIDE": plan.wide, "PRECISION": exact,
            }  # fmt: skip
            yield Case(f"damped_inverse-{wide}-{plan.wide}", damped_inverse_kernel, pointers, constants, plan.warps, 1)
        constants = {"TILE": plans.MULTIPLY_TILE, "DEPTH": 32, "PRECISION": exact}
        yield Case(f"multiply-{wide}", multiply_kernel, pointers, constants, 4, 2)
        yield Case(f"reduce-{wide}", reduce_gram_kernel, {"partial": wide, "gram": wide}, {"TILE": 32}, 4, 3)
    yield from coordinate_cases(target)
    for dy, wide in (("bf16", "fp32"), ("fp16", "fp32"), ("fp32", "fp32"), ("fp64", f64)):
        sums = tl.float64 if wide == f64 else tl.float32
        constants = {"HAS_COLUMN": True, "SUM": sums, "TILE_N": 32, "TILE_O": 64}
        pointers = {"dy": dy, "column": wide, "db": dy, "dw": dy, "broken": "i32"}
        yield Case(f"bias_grad-{dy}", bias_grad_kernel, pointers, constants, 4, 3)
        constants = {"HAS_COLUMN": True, "FLAGS": 128, "LINE": 1024}
        yield Case(f"poison-{dy}", poison_kernel, pointers, constants, 4, 3)


def coordinate_cases(target: str) -> Iterator[Case]:
    """The kernels of steps in emended coordinates."""
    for x, wide in (("bf16", "fp32"), ("fp16", "fp32"), ("fp32", "fp32"), ("fp64", "fp64")):
        for plan in (plans.GRAM_SMALL[BYTES[x]], plans.GRAM_LARGE[BYTES[x]]):
            constants = {
                "BIAS": True, "DECAYS": True, "WHOLE": True, "TILE": plan.tile, "DEPTH": plan.depth,
                "PRECISION": precision(x, target),
            }  # fmt: skip
            pointers = {"x": x, "before": wide, "gram": wide}
            name = f"decayed_gram-{x}-{plan.tile}"
            yield Case(name, decayed_gram_kernel, pointers, constants, plan.warps, plan.stages)
        multiplied = x if x == "bf16" else wide
        for tiles in plans.EMEND_CANDIDATES[BYTES[multiplied]]:
            constants = {
                "ADDS": True, "TILE_N": tiles.rows, "TILE_I": tiles.inputs, "DEPTH": tiles.depth,
                "PRECISION": precision(wide, target),
            }  # fmt: skip
            pointers = {"rows": x, "root": wide, "out": x}
            name = f"root_product-{x}-{tiles.rows}"
            yield Case(name, root_product_kernel, pointers, constants, tiles.warps, tiles.stages)
    for wide in ("fp32", "fp64"):
        for plan in (plans.GRAM_SMALL[BYTES[wide]], plans.GRAM_LARGE[BYTES[wide]]):
            constants = {"ADDS": True, "TILE": plan.tile, "DEPTH": plan.depth, "PRECISION": precision(wide, target)}
            pointers = {"a": wide, "b": wide, "c": wide, "out": wide}
            name = f"inverse_root-{wide}-{plan.tile}"
            yield Case(name, symmetric_product_kernel, pointers, constants, plan.warps, plan.stages)
        pointers = {"partial": wide, "before": wide, "gram": wide}
        yield Case(f"reduce_decayed-{wide}", reduce_decayed_gram_kernel, pointers, {"DECAYS": True, "TILE": 32}, 4, 3)


def compile_case(case: Case, target: str, aligned: bool = True) -> Compiled:
    """Compile without a device, for contiguous rows; ``aligned``: every size and pointer is a multiple of 16."""
    signature, constants, attributes = {}, dict(case.constants), {}
    primal = case.constants.get("PRIMAL", False)
    for index, parameter in enumerate(case.kernel.params):
        name = parameter.name
        if name in case.constants:
            signature[name] = "constexpr"
        elif name in COUNTERS:
            signature[name] = "*i32"
        elif name in case.pointers:
            signature[name] = "*" + case.pointers[name]
        elif parameter.annotation_type:
            signature[name] = parameter.annotation_type
        elif name in ("x4", "stride_column", "x_column", "dy_column", "stride_outer" if primal else "stride_inner"):
            signature[name] = "constexpr"
            constants[name] = 1
        else:
            signature[name] = "i32"
        if signature[name].startswith("*") or (
            signature[name] == "i32" and not parameter.do_not_specialize and (aligned or name in ("depth", "size"))
        ):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(case.kernel, signature, constants, attributes)
    options = {"num_warps": case.warps, "num_stages": case.stages}
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    order = order_of_sums(compiled.asm["ttgir"])
    if target == "gfx942":
        assembly = compiled.asm["amdgcn"]
        spills = [int(n) for n in re.findall(r"\.(?:vgpr|sgpr)_spill_count:\s+(\d+)", assembly)]
        registers = int(re.findall(r"\.vgpr_count:\s+(\d+)", assembly)[0])
        return Compiled(assembly, compiled.metadata.shared, registers, sum(spills), order)
    registers, stack = resources(compiled.asm["cubin"])
    return Compiled(compiled.asm["ptx"], compiled.metadata.shared, registers, stack, order)


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes a thread, as the tool that comes with Triton prints them."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True)
    (found,) = re.findall(r"REG:(\d+) STACK:(\d+)", text.stdout)
    return int(found[0]), int(found[1])
