"""Builds `consequentialism._C`: for the CPU, or for CPU and CUDA.

CUDA is built where torch was built for it and the CUDA toolkit is found, or where FORCE_CUDA=1 says so;
TORCH_CUDA_ARCH_LIST names the architectures. CONSEQUENTIALISM_NO_EXT=1 builds without compiled kernels;
CONSEQUENTIALISM_WERROR=1 makes nvcc's warnings errors, as this project's own checks do. Where
torch or a compiler is missing the package is installed without them, slower, and says so when it is imported.
torch is imported only to build, never for metadata.
"""

from __future__ import annotations

import atexit
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from setuptools import setup
from setuptools.command.build import build
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
VERSION = re.search(r'__version__ = "(.+?)"', (ROOT / "consequentialism/version.py").read_text())[1]  # type: ignore[index]
REASON_FILE = "_C_missing.txt"  # in the package: why there are no compiled kernels
INTERFACE = runpy.run_path(str(ROOT / "consequentialism/backend/interface.py"))
BUILD_IT = "`pip install --no-build-isolation .` in the source's folder"

CPU_SOURCES = [
    "csrc/ops.cpp",
    "csrc/module.cpp",
    "csrc/autograd.cpp",
    "csrc/linear_forward.cpp",
    "csrc/step_tensors.cpp",
    "csrc/cpu/input_gram.cpp",
    "csrc/cpu/damped_inverse.cpp",
    "csrc/cpu/tile_inverse.cpp",
    "csrc/cpu/emended_input.cpp",
    "csrc/cpu/weight_grad.cpp",
    "csrc/cpu/fused_weight_grad.cpp",
    "csrc/cpu/conv_gram.cpp",
    "csrc/cpu/conv_gram_direct.cpp",
    "csrc/cpu/conv_gram_displaced.cpp",
    "csrc/cpu/dot_products.cpp",
    "csrc/cpu/decayed_gram.cpp",
    "csrc/cpu/inverse_root.cpp",
    "csrc/cpu/symmetric_product.cpp",
    "csrc/cpu/orthogonalised.cpp",
    "csrc/cpu/root_product.cpp",
    "csrc/cpu/coordinate_step.cpp",
    "csrc/cpu/step_loops.cpp",
]
CUDA_SOURCES = [
    "csrc/cuda/damped_inverse_binding.cpp",
    "csrc/cuda/decayed_gram_binding.cpp",
    "csrc/cuda/inverse_root_binding.cpp",
    "csrc/cuda/root_product_binding.cpp",
    "csrc/cuda/decayed_gram_plan.cpp",
    "csrc/cuda/inverse_root_plan.cpp",
    "csrc/cuda/root_product_plan.cpp",
    "csrc/cuda/decayed_gram.cu",
    "csrc/cuda/inverse_root.cu",
    "csrc/cuda/root_product.cu",
    "csrc/cuda/emended_input_binding.cpp",
    "csrc/cuda/fused_weight_grad_binding.cpp",
    "csrc/cuda/input_gram_binding.cpp",
    "csrc/cuda/conv_gram_binding.cpp",
    "csrc/cuda/weight_grad_binding.cpp",
    "csrc/cuda/damped_inverse_plan.cpp",
    "csrc/cuda/input_gram_plan.cpp",
    "csrc/cuda/conv_gram_plan.cpp",
    "csrc/cuda/conv_gram_displaced_plan.cpp",
    "csrc/cuda/emended_input_plan.cpp",
    "csrc/cuda/fused_weight_grad_plan.cpp",
    "csrc/cuda/damped_inverse.cu",
    "csrc/cuda/factored_inverse.cu",
    "csrc/cuda/input_gram.cu",
    "csrc/cuda/conv_gram.cu",
    "csrc/cuda/conv_gram_displaced.cu",
    "csrc/cuda/patch_copy.cu",
    "csrc/cuda/emended_input.cu",
    "csrc/cuda/weight_grad.cu",
    "csrc/cuda/fused_weight_grad.cu",
    "csrc/cuda/launch_counters.cu",
]
WARPGROUP_SOURCE = "csrc/cuda/warpgroup_gram.cu"  # for 9.0a alone, beside whatever else is built for 9.0
CUDA_ARCHITECTURES = ("8.0", "9.0+PTX")  # where TORCH_CUDA_ARCH_LIST names none
NEWER_CUDA_ARCHITECTURES = ("10.0", "12.0")  # where nvcc has them, which else compile whole modules at their first use

BUILD_COMMANDS = {"build", "build_ext", "bdist_wheel", "install", "develop", "editable_wheel"}


def index_readme() -> str:
    """README for an index, which has none of the files beside it: without the pictures, links to files as text."""
    text = re.sub(r"^!\[[^]]*\]\([^)]*\)\n+", "", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    return re.sub(r"\[([^]]*)\]\((?!https?://)[^)]*\)", r"\1", text)


def build_tag() -> str:
    """The tag in the wheel's name: its kernels run with this torch and no other."""
    import torch

    return "0torch" + torch.__version__.replace("+", ".")


def has_compiler() -> bool:
    names = [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++", "cl"]
    return any(shutil.which(name) for name in names)


def reason_for_none() -> str | None:
    """Why no extension can be built, or None."""
    if os.environ.get("CONSEQUENTIALISM_NO_EXT") == "1":
        return "built with CONSEQUENTIALISM_NO_EXT=1"
    try:
        import torch  # noqa: F401
    except ImportError:
        return f"built where torch could not be imported; with torch installed, {BUILD_IT} compiles them"
    if not has_compiler():
        return "built without a C++ compiler; install one (g++, clang++ or MSVC), then reinstall"
    return None


def find_cuda_toolkit() -> str | None:
    """The toolkit's folder. torch takes the one above nvcc's, which is wrong where nvcc is a link or a script."""
    from torch.utils import cpp_extension

    home = cpp_extension.CUDA_HOME
    if home is None or Path(home, "include", "cuda_runtime.h").exists() or shutil.which("nvcc") is None:
        return home
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "empty.cu")
        source.touch()
        told = subprocess.run(["nvcc", "-dryrun", "-c", str(source)], capture_output=True, text=True, cwd=folder).stderr
    top = re.search(r"^#\$ TOP=(.+)$", told, re.MULTILINE)
    if top:
        cpp_extension.CUDA_HOME = str(Path(top[1].strip()).resolve())
    return cpp_extension.CUDA_HOME


def wants_cuda() -> bool:
    import torch

    toolkit = find_cuda_toolkit()
    if os.environ.get("FORCE_CUDA") == "1":
        if toolkit is None or torch.version.cuda is None:
            raise SystemExit(
                f"FORCE_CUDA=1, but the CUDA toolkit is at {toolkit} and torch {torch.__version__} was built for "
                f"CUDA {torch.version.cuda}; both are needed"
            )
        return True
    return toolkit is not None and torch.version.cuda is not None


def default_cuda_architectures() -> str:
    """What to compile for where ``TORCH_CUDA_ARCH_LIST`` says nothing, in its form."""
    try:
        listed = subprocess.run(["nvcc", "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
    except OSError:  # torch finds it elsewhere than on the PATH
        listed = []
    newer = [name for name in NEWER_CUDA_ARCHITECTURES if f"compute_{name.replace('.', '')}" in listed]
    return ";".join([*CUDA_ARCHITECTURES, *newer])


def builds_warpgroups(architectures: str) -> bool:
    """Whether a list in the form of ``TORCH_CUDA_ARCH_LIST`` has Hopper's, other than as PTX of an older one's."""
    named = {name.partition("+")[0] for name in re.split("[; ]+", architectures)}
    if architectures in ("", "native"):  # torch then builds for the cards that it sees
        import torch

        cards = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
        named = {f"{major}.{minor}" for major, minor in cards}
    return os.name != "nt" and not named.isdisjoint({"9.0", "9.0a", "Hopper"})


def compile_warpgroups(folder: Path, flags: list[str]) -> str:
    """Compile the one source that is for an architecture of its own, which torch's builder cannot; its object."""
    import torch
    from torch.utils import cpp_extension

    target = folder / Path(WARPGROUP_SOURCE).with_suffix(".o")
    nvcc = os.environ.get("PYTORCH_NVCC") or str(Path(cpp_extension.CUDA_HOME or "", "bin", "nvcc"))
    host = ["-ccbin", os.environ["CC"]] if os.environ.get("CC") else []
    own = ["-DCONSEQUENTIALISM_WARPGROUPS", "-gencode=arch=compute_90a,code=sm_90a", "--compiler-options=-fPIC"]
    command = [*shlex.split(nvcc), *host, *flags, *own, "-c", WARPGROUP_SOURCE, "-o", str(target)]
    # Written once the object is whole: an interrupted one, or one of another toolkit, is made anew.
    done, by = target.with_suffix(".command"), f"{torch.version.cuda}: {shlex.join(command)}\n"
    newest = max(path.stat().st_mtime for path in Path("csrc").rglob("[!.]*.*"))  # none of an editor's
    if target.exists() and target.stat().st_mtime > newest and done.exists() and done.read_text() == by:
        return str(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    done.unlink(missing_ok=True)
    subprocess.run(command, check=True)
    done.write_text(by)
    return str(target)


def compiler_flags() -> tuple[list[str], list[str]]:
    """The flags for compiling and for linking. at::parallel_for is a header: without OpenMP it runs on one thread."""
    if os.name == "nt":
        return ["/O2", "/std:c++20", "/openmp"], []
    # -g0 undoes the -g of Python's own flags, with which autograd.cpp takes two and a half times as long to compile.
    # Nothing here reads errno; while square roots may set it, GCC vectorizes no loop that has one.
    flags = ["-O3", "-g0", "-std=c++20", "-fno-math-errno", "-Wall", "-Wextra", "-Wno-unused-parameter"]
    if sys.platform == "darwin":
        return [*flags, "-Wno-unknown-pragmas"], []
    return [*flags, "-fopenmp"], ["-fopenmp"]


def extension() -> Any:
    import torch
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    defines = [
        ("CONSEQUENTIALISM_VERSION", f'"{VERSION}"'),
        ("CONSEQUENTIALISM_TORCH_VERSION", f'"{torch.__version__}"'),
    ]
    flags, link_flags = compiler_flags()
    if not wants_cuda():
        return CppExtension(
            "consequentialism._C",
            CPU_SOURCES,
            define_macros=defines,
            extra_compile_args=flags,
            extra_link_args=link_flags,
        )
    architectures = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", default_cuda_architectures())
    defines += [
        ("CONSEQUENTIALISM_CUDA_VERSION", f'"{torch.version.cuda}"'),
        ("CONSEQUENTIALISM_CUDA_ARCHITECTURES", f'"{architectures}"'),
    ]
    strict = ["-Werror", "all-warnings"] if os.environ.get("CONSEQUENTIALISM_WERROR") == "1" else []
    if builds_warpgroups(architectures):
        defines.append(("CONSEQUENTIALISM_WARPGROUPS", "1"))
    return CUDAExtension(
        "consequentialism._C",
        CPU_SOURCES + CUDA_SOURCES,
        define_macros=defines,
        extra_compile_args={"cxx": flags, "nvcc": ["-O3", "-std=c++20", "-lineinfo", *strict]},
        extra_link_args=link_flags,
    )


class BuildPython(build_py):
    """Copies the Python files, and writes down why there are no compiled kernels where there are none."""

    def run(self) -> None:
        super().run()
        if MISSING is None:
            return
        atexit.register(print, f"consequentialism: no compiled kernels: {MISSING}", file=sys.stderr)  # the last line
        package = ROOT / "consequentialism" if self.editable_mode else Path(self.build_lib, "consequentialism")
        package.mkdir(parents=True, exist_ok=True)
        (package / REASON_FILE).write_text(MISSING + "\n")


def keep_objects(build_ext: type[Any]) -> type[Any]:
    """torch's own builder, which also writes down for which torch it built, and from which sources.

    An editable build keeps its objects where any other build does: what did not change is not compiled again.
    """

    class BuildExtension(build_ext):  # type: ignore[misc]
        def run(self) -> None:
            if self.editable_mode:
                usual = build(self.distribution)
                usual.ensure_finalized()
                self.build_temp = usual.build_temp
            for one in self.extensions:
                if ("CONSEQUENTIALISM_WARPGROUPS", "1") in one.define_macros:
                    flags = one.extra_compile_args["nvcc"]
                    one.extra_objects.append(compile_warpgroups(Path(self.build_temp), flags))
            super().run()
            import torch

            built = Path(self.get_ext_fullpath("consequentialism._C"))
            for package in {built.parent, ROOT / "consequentialism"} if self.editable_mode else {built.parent}:
                stamp = INTERFACE["stamp_of"](package / built.name)
                stamp.write_text(f"{torch.__version__}\n{INTERFACE['interface_of'](ROOT / 'csrc')}\n")

    return BuildExtension


building = bool(BUILD_COMMANDS & set(sys.argv[1:]))
MISSING = reason_for_none() if building else None
arguments: dict[str, Any] = {}
if building and MISSING is None:
    from torch.utils.cpp_extension import BuildExtension

    (ROOT / "consequentialism" / REASON_FILE).unlink(missing_ok=True)
    commands = {"build_py": BuildPython, "build_ext": keep_objects(BuildExtension)}
    tag = {"bdist_wheel": {"build_number": build_tag()}}
    arguments = {"ext_modules": [extension()], "cmdclass": commands, "options": tag}
elif building:
    arguments = {"cmdclass": {"build_py": BuildPython}}

setup(version=VERSION, long_description=index_readme(), long_description_content_type="text/markdown", **arguments)
