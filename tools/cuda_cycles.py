"""Counts the cycles that one warp takes through the kernels' serial pieces, and compares them with a committed table.

    python tools/cuda_cycles.py                     compile, count, compare with csrc/cuda/cycles.txt
    python tools/cuda_cycles.py --update            write the table
    python tools/cuda_cycles.py --loops input_gram  the innermost loops of csrc/cuda/input_gram.cu, and what follows the
                                                    copies in the one that multiplies: cycles of one pass
    python tools/cuda_cycles.py --loops input_gram --kernel 'float,true,64'     of the kernels whose name has this
    python tools/cuda_cycles.py --listing factor_tile_piece<float>      its instructions and when each is issued
    python tools/cuda_cycles.py --run               on a GPU: what its clock says of the same pieces, beside the counts

A count is a model, not a measurement. The pieces are the kernels of `tools/cuda_pieces/pieces.cu`; what is counted lies
between two reads of the clock. The model issues one warp's instructions in order. When the next may issue is in each
instruction's control word, which the hardware obeys: cycles to stall, and which of six scoreboards it sets and waits
for. How long what sets a scoreboard takes, and how often a unit takes an instruction, are assumptions: the tables
below. Left out: other warps, bank conflicts, misses of the instruction cache.

Layout of the control word: Z. Jia, M. Maggioni, B. Staiger, D. Scarpazza, "Dissecting the NVIDIA Volta GPU Architecture
via Microbenchmarking", arXiv 1804.06826, section 2.1; the same on sm_80 and sm_90.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from cuda_resources import CUDA, FLAGS, REPORT, ROOT, demangle, short

PIECES = ROOT / "tools" / "cuda_pieces" / "pieces.cu"
TABLE = CUDA / "cycles.txt"
ARCHITECTURE = "sm_90"
HEADER = "# piece, cycles of one warp on sm_90 as tools/cuda_cycles.py models them, instructions issued"

# Passes of the loops in a piece, which all have one loop or none: 32 lines of a product, by four in float32, by eight
# in float64.
TRIPS = {"float": 8, "double": 4}

# Cycles from issue until the scoreboard of the result is free. From public microbenchmarks of sm_80 and sm_90, rounded;
# global memory is taken to hit in L2.
LATENCY = {
    "MUFU": 22,
    "SHFL": 24,
    "LDS": 29,
    "LDS.64": 31,
    "LDS.128": 33,
    "LDSM": 33,
    "LDC": 30,
    "LDG": 270,
    "LD": 270,
    "ATOM": 300,
    "S2R": 25,
    "S2UR": 25,
    "BAR": 25,
    "I2F": 14,
    "F2I": 14,
    "F2F": 14,
    "I2FP": 14,
    "HMMA": 33,
    "DMMA": 33,
    "DFMA": 16,
    "DMUL": 16,
    "DADD": 16,
    "DSETP": 16,
    "R2UR": 12,
    "POPC": 14,
}
OTHER_LATENCY = 25
# Until the scoreboard of the operands is free: they have been read.
READ_LATENCY = 12

# Cycles that a unit of a quarter of the processor is taken by an instruction of one warp. HMMA: mma.sync at sm_80's
# rate, which sm_90 passes with wgmma only.
INTERVAL = {
    "fma": 1,
    "alu": 2,
    "double": 2,
    "mufu": 8,
    "shared": 2,
    "shared.128": 4,
    "memory": 4,
    "mma": 8,
    "other": 1,
}


class Instruction(NamedTuple):
    address: int
    text: str  # with its guard, without the operands' flags of reuse
    stall: int
    sets: int | None  # the scoreboard that its result frees
    sets_read: int | None  # and the one that the reading of its operands frees
    waits: tuple[int, ...]

    @property
    def guard(self) -> str | None:
        return self.text.split()[0] if self.text.startswith("@") else None

    @property
    def name(self) -> str:
        return self.text.split()[1 if self.guard else 0]

    @property
    def target(self) -> int | None:
        """The address to which a branch goes."""
        found = re.search(r"\b(?:BRA|CALL\S*|JMP)\b.* (0x[0-9a-f]+)", self.text)
        return int(found[1], 16) if found else None

    @property
    def unit(self) -> str:
        stem = self.name.split(".")[0]
        if stem in ("LDS", "STS"):
            return "shared.128" if ".128" in self.name else "shared"
        if stem in ("SHFL", "LDSM"):
            return "shared.128" if stem == "LDSM" else "shared"
        if stem in ("LDG", "STG", "LD", "ST", "ATOM", "ATOMG", "RED", "LDGSTS"):
            return "memory"
        if stem in ("HMMA", "DMMA", "IMMA"):
            return "mma"
        if stem in ("DFMA", "DMUL", "DADD", "DSETP"):
            return "double"
        if stem in ("FFMA", "FMUL", "FADD", "IMAD"):
            return "fma"
        if stem == "MUFU":
            return "mufu"
        if stem in ("BRA", "EXIT", "NOP", "WARPSYNC", "BSYNC", "BSSY", "BAR", "CS2R", "S2R", "S2UR", "MEMBAR"):
            return "other"
        return "alu"

    @property
    def latency(self) -> int:
        stem = self.name.split(".")[0]
        if stem == "LDS":
            wide = next((width for width in (".128", ".64") if width in self.name), "")
            return LATENCY[stem + wide]
        return LATENCY.get(stem, OTHER_LATENCY)


Code = list[Instruction]


def decode(address: int, text: str, high: int) -> Instruction:
    """Decode the upper 64 bits of an instruction's 128."""

    def bits(first: int, count: int) -> int:
        return high >> (first - 64) & ((1 << count) - 1)

    def barrier(first: int) -> int | None:
        index = bits(first, 3)
        return None if index == 7 else index

    text = re.sub(r"\.reuse\b", "", " ".join(text.split()))
    waits = tuple(i for i in range(6) if bits(116, 6) >> i & 1)
    return Instruction(address, text, bits(105, 4), barrier(110), barrier(113), waits)


def parse(dump: str) -> dict[str, Code]:
    """Every kernel of ``cuobjdump -sass``, by its short name."""
    kernels: dict[str, Code] = {}
    names: list[str] = []
    code: Code = []
    first: tuple[int, str] | None = None
    for line in dump.splitlines():
        if match := re.match(r"\s*Function : (\S+)", line):
            names.append(match[1])
            code = kernels[match[1]] = []
        elif match := re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;\s*/\* 0x[0-9a-f]{16} \*/", line):
            first = int(match[1], 16), match[2]
        elif first and (match := re.match(r"\s*/\* (0x[0-9a-f]{16}) \*/", line)):
            code.append(decode(*first, int(match[1], 16)))
            first = None
    return {short(name): kernels[mangled] for mangled, name in zip(names, demangle(names), strict=True)}


class Clock:
    """When one warp issues its instructions, one after the other."""

    def __init__(self) -> None:
        self.now = 0  # the first cycle at which the next one may issue
        self._scoreboards = [0] * 6
        self._units: Counter[str] = Counter()

    def issue(self, one: Instruction) -> int:
        unit = one.unit.split(".")[0]
        issued = max(self.now, self._units[unit], *(self._scoreboards[i] for i in one.waits), 0)
        self._units[unit] = issued + INTERVAL[one.unit]
        if one.sets is not None:
            self._scoreboards[one.sets] = max(self._scoreboards[one.sets], issued + one.latency)
        if one.sets_read is not None:
            self._scoreboards[one.sets_read] = max(self._scoreboards[one.sets_read], issued + READ_LATENCY)
        self.now = issued + max(one.stall, 1)
        return issued


def walk(code: Code, trips: int) -> Iterator[Instruction]:
    """The instructions in the order in which a warp meets them: a loop `trips` times, functions where they are called,
    but not where a branch leads around the call: that is a slow path."""
    places = {one.address: i for i, one in enumerate(code)}
    calls = [one.address for one in code if one.name.startswith("CALL")]
    left: dict[int, int] = {}
    returns: list[int] = []
    i = 0
    while i < len(code):
        one = code[i]
        yield one
        i += 1
        if one.name.startswith("CALL") and one.target is not None:
            returns.append(i)
            i = places[one.target]
        elif one.name.startswith("RET"):
            i = returns.pop()
        elif one.name == "EXIT" and one.guard is None:
            return
        if not one.name.startswith("BRA") or one.target is None:
            continue
        if one.target > one.address:
            skips_call = any(one.address < call < one.target for call in calls)
            if one.guard is None or skips_call:
                i = places[one.target]
        else:
            left[one.address] = left.get(one.address, trips) - 1
            if left[one.address] > 0:
                i = places[one.target]
            else:
                del left[one.address]


def region(code: Code, trips: int) -> Iterator[Instruction]:
    """The instructions from the first read of the clock to the second."""
    reads = 0
    for one in walk(code, trips):
        reads += "SR_CLOCKLO" in one.text
        if reads:
            yield one
        if reads == 2:
            return
    raise ValueError(f"{reads} reads of the clock, 2 expected")


class Count(NamedTuple):
    cycles: int
    instructions: int


def count_region(code: Code, trips: int) -> Count:
    clock = Clock()
    issued = [clock.issue(one) for one in region(code, trips)]
    return Count(issued[-1] - issued[0], len(issued) - 1)


def trips_of(piece: str) -> int:
    return next(trips for kind, trips in TRIPS.items() if kind in piece)


def loops_of(code: Code) -> list[tuple[int, int]]:
    jumps = [(one.target, one.address) for one in code if one.name == "BRA" and one.target is not None]
    return [(begin, end) for begin, end in jumps if begin < end]


def innermost_loops(code: Code) -> list[Code]:
    loops = loops_of(code)
    return [
        [one for one in code if begin <= one.address <= end]
        for begin, end in loops
        if not any(begin <= other < end for _, other in loops)
    ]


def stage_of(code: Code) -> Code:
    """What multiplies a stage: of the smallest loop with the most products, what follows its copies to shared memory.

    Empty where there is none, or where it is the innermost loop as it stands.
    """

    def products(loop: tuple[int, int]) -> tuple[int, int]:
        begin, end = loop
        return sum(begin <= one.address <= end for one in code if one.unit == "mma"), begin - end

    loops = loops_of(code)
    if not loops or products(best := max(loops, key=products))[0] == 0:
        return []
    loop = [one for one in code if best[0] <= one.address <= best[1]]
    copies = [i for i, one in enumerate(loop) if one.name.startswith(("LDGSTS", "LDGDEPBAR"))]
    return loop[copies[-1] + 1 :] if copies else []


def cycles_of_pass(loop: Code) -> int:
    """The cycles of one pass among many: the third, with the first two under way."""
    clock = Clock()
    ends = []
    for _ in range(3):
        for one in loop:
            clock.issue(one)
        ends.append(clock.now)
    return ends[2] - ends[1]


def tool(name: str) -> str | None:
    """The path of a tool, on the PATH or among those that Triton brings."""
    if found := shutil.which(name):
        return found
    spec = importlib.util.find_spec("triton")
    folders = spec.submodule_search_locations if spec else None
    path = Path(folders[0]) / "backends/nvidia/bin" / name if folders else None
    return str(path) if path and path.exists() else None


def compile_kernels(source: Path, nvcc: str, cuobjdump: str) -> dict[str, Code]:
    flags = [flag for flag in FLAGS if flag not in REPORT]
    with tempfile.TemporaryDirectory() as folder:
        cubin = str(Path(folder) / "kernels.cubin")
        if subprocess.run([nvcc, *flags, f"-arch={ARCHITECTURE}", "-cubin", str(source), "-o", cubin]).returncode != 0:
            raise SystemExit(f"{source.relative_to(ROOT)} does not compile")
        dump = subprocess.run([cuobjdump, "-sass", cubin], capture_output=True, text=True, check=True).stdout
    return parse(dump)


def release(nvcc: str) -> str:
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release (\d+\.\d+)", text)
    return found[1] if found else "unknown"


def write_table(counts: dict[str, Count], nvcc_release: str) -> str:
    lines = [f"{piece:36} {count.cycles:6} {count.instructions:6}" for piece, count in sorted(counts.items())]
    return "\n".join([HEADER, f"# nvcc {nvcc_release}", *lines]) + "\n"


def read_table(text: str) -> tuple[dict[str, Count], str]:
    """The counts, and the release of nvcc that they are of."""
    found = re.search(r"^# nvcc (\S+)$", text, re.MULTILINE)
    rows = [line.split() for line in text.splitlines() if line and not line.startswith("#")]
    return {piece: Count(int(cycles), int(issued)) for piece, cycles, issued in rows}, found[1] if found else ""


def compare(own: dict[str, Count], allowed: dict[str, Count]) -> list[str]:
    misses = [f"{piece}: not in the table" for piece in own.keys() - allowed.keys()]
    misses += [f"{piece}: in the table, but not compiled" for piece in allowed.keys() - own.keys()]
    for piece in own.keys() & allowed.keys():
        if own[piece].cycles > allowed[piece].cycles:
            misses.append(f"{piece}: {own[piece].cycles} cycles, the table says {allowed[piece].cycles}")
    return sorted(misses)


def run_on_gpu(nvcc: str, counts: dict[str, Count]) -> int:
    with tempfile.TemporaryDirectory() as folder:
        program = str(Path(folder) / "pieces")
        subprocess.run([nvcc, "-std=c++20", "-O3", f"-I{CUDA}", "-arch=native", str(PIECES), "-o", program], check=True)
        done = subprocess.run([program], stdout=subprocess.PIPE, text=True)
    for line in done.stdout.splitlines():
        piece, cycles = line.split(maxsplit=1)
        print(f"{piece:36} measured {cycles:>6}, counted {counts[piece].cycles:6}")
    return done.returncode


def print_loops(kernels: dict[str, Code], part: str) -> None:
    for name, code in sorted(kernels.items()):
        if part not in name:
            continue
        print(name)
        for loop in filter(None, [*innermost_loops(code), stage_of(code)]):
            kinds = Counter(one.unit for one in loop)
            parts = ", ".join(f"{number} {kind}" for kind, number in sorted(kinds.items()))
            print(
                f"  {loop[0].address:#07x}: {cycles_of_pass(loop):6} cycles a pass, {len(loop)} instructions: {parts}"
            )


def print_listing(code: Code, trips: int) -> None:
    clock = Clock()
    last = 0
    for one in region(code, trips):
        issued = clock.issue(one)
        waits = "".join(map(str, one.waits))
        print(f"{issued:6} {issued - last:+4} {one.address:#07x} {f'waits {waits}' if waits else '':10} {one.text}")
        last = issued


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--update", action="store_true", help="write the table instead of comparing with it")
    parser.add_argument("--loops", metavar="SOURCE", help="the innermost loops of csrc/cuda/SOURCE.cu")
    parser.add_argument("--kernel", default="", help="with --loops: kernels whose name has this in it")
    parser.add_argument("--listing", metavar="PIECE", help="the instructions of a piece, and when each is issued")
    parser.add_argument("--run", action="store_true", help="run the pieces on this machine's GPU")
    options = parser.parse_args(arguments)
    nvcc, cuobjdump = shutil.which("nvcc"), tool("cuobjdump")
    if nvcc is None or cuobjdump is None:
        print("cuda_cycles: skipped, there is no nvcc on the PATH, or no cuobjdump there or with Triton")
        return 0
    if options.loops:
        print_loops(compile_kernels(CUDA / f"{options.loops}.cu", nvcc, cuobjdump), options.kernel)
        return 0
    pieces = compile_kernels(PIECES, nvcc, cuobjdump)
    if options.listing:
        print_listing(pieces[options.listing], trips_of(options.listing))
        return 0
    own = {piece: count_region(code, trips_of(piece)) for piece, code in pieces.items()}
    own_release = release(nvcc)
    text = write_table(own, own_release)
    print(text, end="")
    if options.run:
        return run_on_gpu(nvcc, own)
    if options.update:
        TABLE.write_text(text)
        return 0
    allowed, table_release = read_table(TABLE.read_text())
    if own_release != table_release:
        print(f"cuda_cycles: the table is of nvcc {table_release}, this is {own_release}: not compared")
        return 0
    misses = compare(own, allowed)
    for miss in misses:
        print(f"cuda_cycles: {miss}", file=sys.stderr)
    print(f"cuda_cycles: {len(own)} pieces, {len(misses)} worse than {TABLE.relative_to(ROOT)}")
    return 1 if misses else 0


if __name__ == "__main__":
    sys.exit(main())
