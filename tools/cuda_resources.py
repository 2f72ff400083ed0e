"""Compiles every CUDA kernel and compares its registers, spills and shared memory with a committed table.

    python tools/cuda_resources.py                  compile, print, compare with csrc/cuda/resources.txt
    python tools/cuda_resources.py --update         write the table
    python tools/cuda_resources.py --built FOLDER   the same of a build's objects, which compiles nothing
    PYTORCH_NVCC="python tools/cuda_resources.py --nvcc"    nvcc for that build: reports are kept beside the objects

Each `.cu` is compiled by nvcc, with warnings as errors, for sm_80, sm_90 and as PTX, the kernels of warpgroups for
sm_90a alone. A kernel that is missing from the
table or new to it, that takes more registers or that spills more than the table says, fails.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
CUDA = ROOT / "csrc" / "cuda"
TABLE = CUDA / "resources.txt"
CACHE = ROOT / "build" / "cuda_resources"
ARCHITECTURES = ("sm_80", "sm_90")
WARPGROUPS, WARPGROUP_ARCHITECTURE = "warpgroup_gram", "sm_90a"  # the source that is for this alone
SERIALIZED = "wgmma.mma_async instructions are serialized"  # says ptxas where it could not leave them asynchronous
REPORT = ["-Xptxas", "-v"]
FLAGS = ["-std=c++20", "-O3", f"-I{CUDA}", "-Werror", "all-warnings", *REPORT]
SUFFIX = ".ptxas"  # of a report beside its object
HEADER = "# kernel, architecture, registers, bytes of: stack, spill stores, spill loads, static shared memory"


class Resources(NamedTuple):
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int = 0  # static, of a block; what a launch asks for comes on top


Table = dict[tuple[str, str], Resources]


def demangle(names: list[str]) -> list[str]:
    tool = shutil.which("c++filt")
    if tool is None:
        return names
    return subprocess.run(
        [tool], input="\n".join(names), capture_output=True, text=True, check=True
    ).stdout.splitlines()


def short(name: str) -> str:
    """``damped_inverse_block_kernel<float>`` of the whole demangled signature."""
    name = re.sub(r"\(anonymous namespace\)::", "", name)
    name = re.sub(r"\b(?:\w+::)+", "", name.removeprefix("void "))
    depth = 0
    for position, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            return name[:position].replace(" ", "")
    return name.replace(" ", "")


def parse(report: str) -> Table:
    """What ptxas -v says of one source."""
    if SERIALIZED in report:
        raise SystemExit(f"ptxas: {SERIALIZED}; something touches their sums while they are in flight")
    found: list[tuple[str, str, Resources]] = []
    name = architecture = ""
    frame = (0, 0, 0)
    for line in report.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)' for '(\w+)'", line):
            name, architecture = match.groups()
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            stack, stores, loads = map(int, match.groups())
            frame = (stack, stores, loads)
        elif name and (match := re.search(r"Used (\d+) registers", line)):
            shared = re.search(r"(\d+) bytes smem", line)
            found.append((name, architecture, Resources(int(match[1]), *frame, int(shared[1]) if shared else 0)))
            name = ""
    names = demangle([name for name, _, _ in found])
    table: Table = {}
    for name, (_, arch, value) in zip(names, found, strict=True):
        if (short(name), arch) in table:
            raise SystemExit(f"two kernels are called {short(name)}: the table could not tell them apart")
        table[short(name), arch] = value
    return table


def included(source: Path) -> list[Path]:
    """The source and every file of ours that it includes, itself or through others."""
    found = [source]
    for path in found:
        names = re.findall(r'^\s*#\s*include\s+"([^"]+)"', path.read_text(), re.MULTILINE)
        places = [(path.parent / name).resolve() for name in names]
        found += [place for place in dict.fromkeys(places) if place.exists() and place not in found]
    return found


def targets_of(source: Path) -> list[str]:
    if source.stem == WARPGROUPS:
        virtual = WARPGROUP_ARCHITECTURE.replace("sm", "compute")
        return ["-DCONSEQUENTIALISM_WARPGROUPS", f"-gencode=arch={virtual},code={WARPGROUP_ARCHITECTURE}"]
    targets = [f"-gencode=arch={name.replace('sm', 'compute')},code={name}" for name in ARCHITECTURES]
    return [*targets, "-gencode=arch=compute_90,code=compute_90"]


def compile_source(source: Path, nvcc: str) -> Table:
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    for path in included(source):
        digest.update(path.name.encode() + path.read_bytes())
    cached = CACHE / f"{source.stem}-{digest.hexdigest()[:16]}.txt"
    if not cached.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        command = [nvcc, *FLAGS, *targets_of(source), "-c", str(source), "-o", str(CACHE / f"{source.stem}.o")]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"{source.relative_to(ROOT)} does not compile:\n{done.stderr}{done.stdout}")
        cached.write_text(done.stderr + done.stdout)
    return parse(cached.read_text())


def compile_sources(nvcc: str) -> list[Table]:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda source: compile_source(source, nvcc), sorted(CUDA.glob("*.cu"))))


def compile_and_keep(nvcc: str, arguments: list[str]) -> int:
    """nvcc itself; what ptxas says goes to a file beside the object."""
    done = subprocess.run([nvcc, *arguments, *REPORT], stderr=subprocess.PIPE, text=True)
    target = arguments[arguments.index("-o") + 1]
    Path(target + SUFFIX).write_text(done.stderr)
    for line in done.stderr.splitlines():
        if not line.startswith(("ptxas info", "    ")):
            print(line, file=sys.stderr)
    return done.returncode


def built(folder: Path) -> list[Table]:
    """What was kept, of the architectures in the table."""
    tables = []
    for source in sorted(CUDA.glob("*.cu")):
        reports = list(folder.glob(f"**/{source.stem}.o{SUFFIX}"))
        if source.stem == WARPGROUPS and not reports:  # built for other chips
            continue
        if len(reports) != 1:
            raise SystemExit(f"{folder} has {len(reports)} reports of {source.name}: build it anew")
        table = parse(reports[0].read_text())
        tables.append(
            {key: value for key, value in table.items() if key[1] in (*ARCHITECTURES, WARPGROUP_ARCHITECTURE)}
        )
    return tables


def read_table(text: str) -> Table:
    table: Table = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            kernel, architecture, *numbers = line.split()
            table[kernel, architecture] = Resources(*map(int, numbers))
    return table


def write_table(table: Table) -> str:
    width = max(len(kernel) for kernel, _ in table)
    lines = [
        f"{kernel:{width}} {arch:6} {' '.join(f'{n:4}' for n in table[kernel, arch])}" for kernel, arch in sorted(table)
    ]
    return "\n".join([HEADER, *lines]) + "\n"


def compare(own: Table, allowed: Table) -> list[str]:
    """Everything that is worse than the table."""
    misses = [f"{kernel} {arch}: not in the table" for kernel, arch in own.keys() - allowed.keys()]
    misses += [f"{kernel} {arch}: in the table, but not compiled" for kernel, arch in allowed.keys() - own.keys()]
    for key in own.keys() & allowed.keys():
        for field, value, limit in zip(Resources._fields, own[key], allowed[key], strict=True):
            if value > limit:
                misses.append(f"{key[0]} {key[1]}: {field} {value}, the table allows {limit}")
    return sorted(misses)


def main() -> int:
    nvcc = shutil.which("nvcc")
    if nvcc and sys.argv[1:2] == ["--nvcc"]:
        return compile_and_keep(nvcc, sys.argv[2:])
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--update", action="store_true", help="write the table instead of comparing with it")
    parser.add_argument("--built", metavar="FOLDER", type=Path, help="of a build with --nvcc, instead of compiling")
    arguments = parser.parse_args()
    if nvcc is None:
        print("cuda_resources: skipped, there is no nvcc on the PATH")
        return 0
    own: Table = {}
    for compiled in built(arguments.built) if arguments.built else compile_sources(nvcc):
        if twice := own.keys() & compiled.keys():
            raise SystemExit(f"two sources have a kernel of the same name: {min(twice)[0]}")
        own |= compiled
    text = write_table(own)
    print(text, end="")
    if arguments.update:
        TABLE.write_text(text)
        return 0
    architectures = {architecture for _, architecture in own}
    allowed = read_table(TABLE.read_text())
    if arguments.built:  # which may be for some of the architectures only
        allowed = {key: value for key, value in allowed.items() if key[1] in architectures}
    misses = compare(own, allowed)
    for miss in misses:
        print(f"cuda_resources: {miss}", file=sys.stderr)
    made = ", ".join(sorted(architectures)) or "none of the architectures in the table"
    print(f"cuda_resources: {len(own)} kernels for {made}, {len(misses)} worse than {TABLE.relative_to(ROOT)}")
    return 1 if misses or not own else 0


if __name__ == "__main__":
    sys.exit(main())
