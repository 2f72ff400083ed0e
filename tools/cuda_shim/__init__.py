"""Compiles CUDA kernels for the host against shim.h, and calls them on guarded copies of tensors.

    library = cuda_shim.load([ROOT / "csrc/cuda/input_gram.cu", Path(__file__).with_name("matrix_calls.cu")])
    x = library.guarded(torch.randn(5, 7), "x")
    gram = library.empty(5, 5, name="gram")
    library.run("call_gram", x, gram, 5, 7)  # extern "C" int call_gram(const float*, float*, int64_t, int64_t)
    gram.tensor()

A launcher's `extern "C"` function takes pointers, `int64_t`, `double` and `bool`, and returns a `cudaError_t`.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
INCLUDES = (ROOT / "csrc" / "cuda", HERE)
BUILD = ROOT / "build" / "cuda_shim"
SHIM = [HERE / f"{part}.cpp" for part in ("scheduler", "errors", "instructions", "warpgroup", "python_calls")]
SEEDS = (0, 1, 2)

FLAGS = (
    # Lines and names of functions are all that messages need of -g; -O2 takes longer to compile than it saves.
    *("-std=c++20", "-O1", "-g1", "-fPIC", "-shared", "-DCONSEQUENTIALISM_HOST_SHIM"),
    *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
    # Kernels read the same bytes as several types, and the shim jumps out of fibers.
    *("-fno-strict-aliasing", "-U_FORTIFY_SOURCE"),
    # Several libraries live in one process, each with its own state.
    *("-fno-gnu-unique", "-Wl,-Bsymbolic"),
    # What the chip faults on, and what is wrong on both: trapped, and reported as an error of the launch.
    "-fsanitize=alignment,bounds,shift,signed-integer-overflow,integer-divide-by-zero",
    "-fsanitize-undefined-trap-on-error",
)


class ShimError(AssertionError):
    """A launch that the chip would refuse, or that it would spoil something with."""


def _closure(sources: Iterable[Path]) -> list[Path]:
    """The sources and every file of ours that they include."""
    found: list[Path] = []
    pending = [source.resolve() for source in sources]
    while pending:
        path = pending.pop(0)
        if path in found:
            continue
        found.append(path)
        for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', path.read_text(), re.MULTILINE):
            places = [folder / name for folder in (path.parent, *INCLUDES)]
            pending += [place.resolve() for place in places if place.exists()][:1]
    return found


def build(sources: Sequence[Path], options: Sequence[str] = ()) -> Path:
    """The shared library of the sources and the shim; skips the test where nothing can compile it."""
    if not sys.platform.startswith("linux"):
        pytest.skip("CUDA shim: Linux only")
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("CUDA shim: no g++")
    sources = [*sources, *SHIM]
    command = [compiler, *FLAGS, *options, *(f"-I{folder}" for folder in INCLUDES)]
    digest = hashlib.sha256(repr((command, os.stat(compiler).st_mtime, os.uname().machine)).encode())
    for path in _closure(sources):
        digest.update(f"{path}\0".encode() + path.read_bytes() + b"\0")
    target = BUILD / f"{digest.hexdigest()[:24]}.so"
    if target.exists():
        return target
    BUILD.mkdir(parents=True, exist_ok=True)
    with target.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process that wants the same waits for it
        if not target.exists():
            partial = target.with_suffix(f".{os.getpid()}")
            done = subprocess.run(
                [*command, "-x", "c++", *map(str, sources), "-o", str(partial)], capture_output=True, text=True
            )
            if done.returncode != 0:
                raise ShimError(f"{' '.join(map(str, sources))} do not compile:\n{done.stderr}")
            partial.replace(target)
    return target


@functools.cache
def _load(path: Path) -> Library:
    return Library(path)


def load(sources: Sequence[Path], options: Sequence[str] = ()) -> Library:
    return _load(build(sources, options))


class Guarded:
    """A copy of a tensor between pages that fault. Its start is aligned to `alignment` and to no more, where the size
    allows that; by default as much as torch's allocations can be relied on for vector loads."""

    def __init__(self, library: Library, tensor: Tensor, name: str, alignment: int) -> None:
        self._library = library
        self._value = tensor.detach().cpu().contiguous()
        self._name = name
        self._alignment = alignment
        self.pointer = 0
        self.place()

    @property
    def nbytes(self) -> int:
        return self._value.numel() * self._value.element_size()

    def place(self, at_start: bool = False) -> None:
        """A fresh copy of the tensor, up against the page behind it or the page before it."""
        self.free()
        call = self._library.call
        self.pointer = call.shim_allocate(self._name.encode(), self.nbytes, self._alignment, at_start)
        call.shim_write(self.pointer, self._value.data_ptr(), self.nbytes)

    def tensor(self) -> Tensor:
        result = torch.empty_like(self._value)
        self._library.call.shim_read(result.data_ptr(), self.pointer, self.nbytes)
        return result

    def free(self) -> None:
        if self.pointer:
            self._library.call.shim_free(self.pointer)
        self.pointer = 0

    def __del__(self) -> None:
        self.free()


class Library:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.call = ctypes.CDLL(str(path))
        self.call.shim_allocate.argtypes = [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int]
        self.call.shim_allocate.restype = ctypes.c_void_p
        self.call.shim_free.argtypes = [ctypes.c_void_p]
        self.call.shim_write.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
        self.call.shim_read.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
        self.call.shim_set_seed.argtypes = [ctypes.c_uint64]
        self.call.shim_set_seconds.argtypes = [ctypes.c_double]
        self.call.shim_message.restype = ctypes.c_char_p
        self.call.shim_set_resident_blocks.argtypes = [ctypes.c_uint64]
        for count in ("launches", "shared_bytes", "switches", "attributes_set", "kernels_asked"):
            getattr(self.call, f"shim_{count}").restype = ctypes.c_uint64

    def guarded(self, tensor: Tensor, name: str = "a buffer", alignment: int = 16) -> Guarded:
        return Guarded(self, tensor, name, alignment)

    def empty(
        self, *shape: int, dtype: torch.dtype = torch.float32, name: str = "a buffer", alignment: int = 16
    ) -> Guarded:
        """Full of 0xFF bytes: NaN in every floating type, -1 in every integer."""
        size = int(torch.Size(shape).numel()) * torch.empty((), dtype=dtype).element_size()
        fresh = torch.full((size,), 0xFF, dtype=torch.uint8)
        return self.guarded(fresh.view(dtype).view(shape), name, alignment)

    def run(self, function: str, *arguments: Any, seeds: Sequence[int] = SEEDS) -> list[Tensor]:
        """Call the function once a seed, on fresh copies, and return what the guarded arguments then hold.

        ShimError where a launch is refused or goes wrong, AssertionError where results differ between seeds.
        """
        guarded = list({id(one): one for one in arguments if isinstance(one, Guarded)}.values())
        first: list[Tensor] = []
        for seed in seeds:
            self.call.shim_set_seed(seed)
            for one in guarded:
                one.place(at_start=seed % 2 == 1)
            error = getattr(self.call, function)(*map(_argument, arguments))
            results = [one.tensor() for one in guarded]
            if error != 0:
                raise ShimError(f"{function}, seed {seed}: error {error}, {self.message()}")
            if seed == seeds[0]:
                first = results
            for one, expected, result in zip(guarded, first, results, strict=True):
                differs = expected.flatten().view(torch.uint8) != result.flatten().view(torch.uint8)
                if bool(differs.any()):
                    index = int(differs.nonzero()[0]) // max(result.element_size(), 1)
                    raise AssertionError(
                        f"{function}: {one._name!r} differs between seeds {seeds[0]} and {seed}, first at element "
                        f"{index}: {expected.flatten()[index]} and {result.flatten()[index]}; a barrier is missing"
                    )
        return first

    def message(self) -> str:
        """The last error, with names of kernels and lines of source where addr2line can tell them."""
        text = self.call.shim_message().decode()

        def named(match: re.Match[str]) -> str:
            name, line = self._locate(match[2])
            return f"kernel {name}" if match[1] == "kernel" else f"at {line}"

        return re.sub(r"\b(kernel|at) (\+0x[0-9a-f]+)", named, text)

    def _locate(self, offset: str) -> tuple[str, str]:
        tool = shutil.which("addr2line")
        if tool is None:
            return offset, offset
        command = [tool, "-C", "-f", "-s", "-e", str(self.path), offset.lstrip("+")]
        lines = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
        if len(lines) < 2 or lines[0] == "??":
            return offset, offset
        name = re.sub(r"\b\w+::", "", lines[0].replace("(anonymous namespace)::", ""))
        return name.split("(")[0].removeprefix("void "), re.sub(r" \(discriminator \d+\)", "", lines[1])

    @property
    def launches(self) -> int:
        return int(self.call.shim_launches())

    @property
    def shared_bytes(self) -> int:
        """The most that a launch has asked for."""
        return int(self.call.shim_shared_bytes())

    @property
    def switches(self) -> int:
        return int(self.call.shim_switches())

    @property
    def attributes_set(self) -> int:
        """How often a kernel's limit of shared memory was set."""
        return int(self.call.shim_attributes_set())

    @property
    def kernels_asked(self) -> int:
        """Of how many kernels attributes were asked for, which loads the modules that they are in."""
        return int(self.call.shim_kernels_asked())

    def reset_counts(self) -> None:
        self.call.shim_reset_counts()


def _argument(value: Any) -> Any:
    if isinstance(value, Guarded):
        return ctypes.c_void_p(value.pointer)
    if isinstance(value, bool):
        return ctypes.c_bool(value)
    if isinstance(value, int):
        return ctypes.c_int64(value)
    if isinstance(value, float):
        return ctypes.c_double(value)
    return value
