"""The tool that counts cycles in machine code, as far as it needs no compiler."""

from __future__ import annotations

import re

import cuda_cycles
import inverse_budget
import pytest
from cuda_cycles import Clock, Count, Instruction

# What nvcc 13.0 makes for sm_90, some operands shortened.
DUMP = """
\t\tFunction : _Z5pieceIfEvPT_Pj
        /*0000*/                   S2UR UR8, SR_CLOCKLO ;                               /* 0x0000000000087919 */
                                                                                        /* 0x000e220000005000 */
        /*0010*/                   LDS.128 R4, [R0+UR4] ;                               /* 0x0000000400047984 */
                                                                                        /* 0x000e620008000c00 */
        /*0020*/                   FFMA R5, R4.reuse, R5, R6 ;                          /* 0x0000000504057223 */
                                                                                        /* 0x042fca0000000006 */
        /*0030*/              @!P0 BRA 0x10 ;                                           /* 0xfffffffc00f08947 */
                                                                                        /* 0x000fea000383ffff */
        /*0040*/                   CS2R.32 R4, SR_CLOCKLO ;                             /* 0x0000000000047805 */
                                                                                        /* 0x000fe20000005000 */
        /*0050*/                   EXIT ;                                               /* 0x000000000000794d */
                                                                                        /* 0x000fea0003800000 */
"""


def test_control_words_are_decoded() -> None:
    ((_, code),) = cuda_cycles.parse(DUMP).items()
    assert code[1] == Instruction(0x10, "LDS.128 R4, [R0+UR4]", stall=1, sets=1, sets_read=None, waits=())
    assert code[2] == Instruction(0x20, "FFMA R5, R4, R5, R6", stall=5, sets=None, sets_read=None, waits=(1,))
    assert (code[3].guard, code[3].name, code[3].target, code[3].stall) == ("@!P0", "BRA", 0x10, 5)


@pytest.mark.parametrize("trips", [1, 2, 7])
def test_a_region_takes_what_its_instructions_wait_for(trips: int) -> None:
    ((_, code),) = cuda_cycles.parse(DUMP).items()
    # The clock's read stalls 1; a pass waits for its load, then stalls 5 for the sum and 5 for the branch.
    assert cuda_cycles.count_region(code, trips) == Count(
        1 + trips * (cuda_cycles.LATENCY["LDS.128"] + 5 + 5), 1 + 3 * trips
    )


def test_the_innermost_loop_and_its_pass() -> None:
    ((_, code),) = cuda_cycles.parse(DUMP).items()
    (loop,) = cuda_cycles.innermost_loops(code)
    assert [one.address for one in loop] == [0x10, 0x20, 0x30]
    assert cuda_cycles.cycles_of_pass(loop) == cuda_cycles.LATENCY["LDS.128"] + 10


def instruction(text: str, address: int = 0, stall: int = 1) -> Instruction:
    return Instruction(address, text, stall, None, None, ())


def test_a_stage_is_what_follows_the_copies_of_the_loop_that_multiplies() -> None:
    loop = ("LDC R1", "LDGSTS R0", "@P0 BRA 0x10", "LDSM R2", "HMMA R4, R2", "@P1 BRA 0x0")
    code = [instruction(text, 16 * i) for i, text in enumerate((*loop, "HMMA R4, R2", "EXIT"))]
    assert [one.name for one in cuda_cycles.stage_of(code)] == ["BRA", "LDSM", "HMMA", "BRA"]
    assert cuda_cycles.stage_of(code[:3]) == []  # no product
    assert cuda_cycles.stage_of([code[0], *code[3:]]) == []  # no copy


def test_a_unit_that_is_busy_delays_the_next() -> None:
    clock = Clock()
    assert [clock.issue(instruction("MUFU.RSQ R0, R1")) for _ in range(3)] == [0, 8, 16]
    assert clock.issue(instruction("FFMA R0, R0, R0, R0")) == 17


def test_a_slow_path_is_passed_by() -> None:
    code = [
        instruction("@!P0 BRA 0x30", 0x00),
        instruction("CALL.REL.NOINC 0x100", 0x10),
        instruction("BRA 0x40", 0x20),
        instruction("FMUL R0, R1, R2", 0x30),
        instruction("@P1 BRA 0x60", 0x40),
        instruction("FADD R0, R0, R0", 0x50),
        instruction("EXIT", 0x60),
    ]
    assert [one.address for one in cuda_cycles.walk(code, 1)] == [0x00, 0x30, 0x40, 0x50, 0x60]


def test_a_function_is_followed_to_its_end() -> None:
    code = [
        instruction("CALL.REL.NOINC 0x20", 0x00),
        instruction("EXIT", 0x10),
        instruction("FADD R0, R0, R0", 0x20),
        instruction("RET.REL.NODEC R4 0x0", 0x30),
    ]
    assert [one.address for one in cuda_cycles.walk(code, 1)] == [0x00, 0x20, 0x30, 0x10]


def test_a_region_ends_with_the_second_read_of_the_clock() -> None:
    ((_, code),) = cuda_cycles.parse(DUMP).items()
    with pytest.raises(ValueError, match="1 reads of the clock, 2 expected"):
        list(cuda_cycles.region(code[:-2], 1))


def test_what_is_slower_than_the_table_is_named() -> None:
    allowed = {"a": Count(10, 5), "b": Count(10, 5)}
    assert cuda_cycles.compare({"a": Count(11, 5), "b": Count(9, 7)}, allowed) == ["a: 11 cycles, the table says 10"]
    assert cuda_cycles.compare({"a": Count(10, 5)}, allowed) == ["b: in the table, but not compiled"]
    assert cuda_cycles.compare({**allowed, "c": Count(1, 1)}, allowed) == ["c: not in the table"]


def test_the_committed_table_has_every_piece() -> None:
    table, release = cuda_cycles.read_table(cuda_cycles.TABLE.read_text())
    assert cuda_cycles.read_table(cuda_cycles.write_table(table, release)) == (table, release)
    kernels = re.findall(r"void __launch_bounds__\(32\) (\w+)\(", cuda_cycles.PIECES.read_text())
    assert {piece.split("<")[0] for piece in table} == set(kernels)
    assert {piece.split("<")[1] for piece in table} == {"float>", "double>"}


PIECES = (
    "factor_tile",
    "scale_factor",
    "substitute_forward",
    "substitute_backward",
    "product_of_rows",
    "product_of_columns",
    "quarter_product",
    "solve_strip",
    "product_of_group",
    "product_of_square",
)


def test_the_budget_of_a_block() -> None:
    costs = {f"{piece}_piece<float>": Count(4 * 10**i, 0) for i, piece in enumerate(PIECES)}
    # One tile: factored, scaled, its triangle inverted, that one squared.
    assert inverse_budget.block(32, costs) == (4, 40 + 4000, 400000)
    # Two tiles, and four warps: the second is solved beside the first one's factor, then the last takes its share.
    assert inverse_budget.block(33, costs) == (400 + 4000000 + 4, 40 + 2 * 4000 + 400000, 2 * 400000)
    # Where the factor takes longer, the substitution ends a quarter of it later.
    costs["factor_tile_piece<float>"] = Count(1000, 0)
    assert inverse_budget.block(33, costs).factor == 1000 + 400 / 4 + 4000000 + 1000


def test_shared_memory_bounds_the_budget() -> None:
    costs = {f"{piece}_piece<float>": Count(4, 0) for piece in PIECES}
    products = sum((8 - j) * (j + 1) for j in range(8))
    assert inverse_budget.block(256, costs).square == products * inverse_budget.SHARED


def test_a_cluster_pays_for_its_barriers() -> None:
    costs = {f"{piece}_piece<float>": Count(4, 0) for piece in PIECES}
    for blocks in (8, 16):
        made = inverse_budget.cluster(512, blocks, costs)
        assert made.factor > 16 * inverse_budget.CLUSTER_BARRIER
        assert made.microseconds < inverse_budget.cluster(544, blocks, costs).microseconds


def test_the_page_says_what_the_table_does() -> None:
    table, _ = cuda_cycles.read_table(cuda_cycles.TABLE.read_text())
    page = (cuda_cycles.ROOT / "docs" / "gpu.md").read_text()
    for title, piece in (
        ("factored, now", "factor_tile"),
        ("substituted forward", "substitute_forward"),
        ("substituted backward", "substitute_backward"),
        ("product of two tiles", "product_of_rows"),
    ):
        float32, float64 = (table[f"{piece}_piece<{kind}>"].cycles for kind in ("float", "double"))
        assert f"| {title} | {float32} | {float64} |" in page
    assert f"| a quarter of it, for a tile of the diagonal | {table['quarter_product_piece<float>'].cycles} | |" in page
    for order in (64, 128, 256):
        microseconds = inverse_budget.block(order, table).microseconds
        assert re.search(rf"^\| {order} \| .* \| {microseconds:.0f} us \|$", page, re.MULTILINE)
    for order in (160, 192, 224, 256, 288):
        ways = inverse_budget.block(order, table), inverse_budget.cluster(order, 8, table)
        one, eight = (made.microseconds for made in ways)
        assert f"| {order} | {one:.0f} us | {eight:.0f} us |" in page
    for order in (320, 384, 512, 1024, 1025):
        eight, sixteen = (inverse_budget.cluster(order, blocks, table).microseconds for blocks in (8, 16))
        assert re.search(rf"^\| {order} \| .* \| {eight:.0f} us \| {sixteen:.0f} us \|$", page, re.MULTILINE)
