"""The command line: ``python -m consequentialism demo | info | bench | bench-train | check``."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType

import torch

from .backend import compiled as ops
from .backend.dispatch import backends
from .options import BACKENDS
from .version import __version__

COMMANDS = {
    "demo": "train the same network with plain and with emended optimizers and compare them",
    "info": "versions, backends and why not, and what was built",
    "bench": "the cost of a training step, as a table and a CSV",
    "bench-train": "steps and seconds to a test accuracy or loss, against other optimizers",
    "check": "a numeric self-test of every available backend; exit 1 on a miss",
}


STOPPED = 130  # as shells say it of SIGINT


def main(arguments: list[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit code: 0, 1 where a check failed, 2 for bad arguments, `STOPPED` after Ctrl-C.
    """
    parser = argparse.ArgumentParser(
        prog="consequentialism",
        description="Consequentialism weight updates for PyTorch.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="commands:\n" + "\n".join(f"  {name:11} {text}" for name, text in COMMANDS.items()),
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("command", choices=list(COMMANDS))
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="the command's own; COMMAND --help lists them")
    chosen = parser.parse_args(arguments)
    command = {"demo": _demo, "info": _info, "bench": _bench, "bench-train": _bench_train, "check": _check}[
        chosen.command
    ]
    try:
        code = command(chosen.arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output has closed it, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
        return 0
    except KeyboardInterrupt:
        print(f"\nconsequentialism {chosen.command}: stopped", file=sys.stderr)
        return STOPPED
    return code


def _demo(arguments: list[str]) -> int:
    from . import demo

    return demo.main(arguments)


def _bench(arguments: list[str]) -> int:
    return _bench_module("__main__").main(arguments)


def _bench_train(arguments: list[str]) -> int:
    return _bench_module("train.__main__").main(arguments)


def _bench_module(name: str) -> ModuleType:
    """One of the benchmarks: a subpackage once installed; in a checkout that is not, the folder beside the package."""
    package = f"{__package__}.bench"
    if importlib.util.find_spec(package) is None:
        folder = Path(__file__).resolve().parent.parent / "bench"
        beside = importlib.util.spec_from_file_location(package, folder / "__init__.py")
        if beside is None or beside.loader is None or not (folder / "__init__.py").is_file():
            raise SystemExit(f"consequentialism: the benchmarks are neither installed nor in {folder}")
        sys.modules[package] = importlib.util.module_from_spec(beside)
        beside.loader.exec_module(sys.modules[package])
    return importlib.import_module(f"{package}.{name}")


def _info(arguments: list[str]) -> int:
    argparse.ArgumentParser(prog="consequentialism info", description=COMMANDS["info"]).parse_args(arguments)
    lines = {
        "consequentialism": __version__,
        "python": f"{platform.python_version()} on {platform.platform()}",
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}, {torch.get_num_threads()} threads",
        "triton": _version("triton"),
    }
    for name, state in backends().items():
        lines[f"backend {name}"] = state
    if ops.module is None:
        lines["build"] = f"no compiled kernels: {ops.missing_reason}"
    else:
        for name, value in ops.module.build_info().items():
            lines[f"build {name}"] = str(value) if value else "none"
    lines["breakdowns"] = f"{ops.breakdowns()} in this process"
    for name, value in lines.items():
        print(f"{name:20} {value}")
    return 0


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _check(arguments: list[str]) -> int:
    from .check import check

    parser = argparse.ArgumentParser(prog="consequentialism check", description=COMMANDS["check"])
    parser.add_argument(
        "--backend",
        action="append",
        choices=list(BACKENDS[1:]),
        help="a backend to test (default: all); fails where it is not available; may be repeated",
    )
    code = 0
    for result in check(parser.parse_args(arguments).backend):
        print(result.line(), flush=True)  # as it comes: one that hangs or kills the process leaves what others said
        code |= not result.passed
    return code


if __name__ == "__main__":
    sys.exit(main())
