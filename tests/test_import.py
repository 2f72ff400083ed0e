"""Importing the package: with and without compiled kernels, and without anything optional."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch
from cases import F32, SAME_WAY, assert_close, needs_kernels, oracle, randn

import consequentialism as cw
from consequentialism.backend.compiled import FUNCTIONS
from consequentialism.backend.interface import interface_of, stamp_of

PACKAGE = Path(cw.__file__).parent
OPTIONAL = ("triton", "matplotlib", "numpy", "rich", "sklearn", "tqdm", "mlxtend", "isaac", "padasip", "hypothesis")
# A training step, its gradient printed; the same numbers come from the test's own process.
STEP = """
import json, sys, torch, consequentialism as cw
x = torch.arange(40, dtype=torch.float32).reshape(8, 5).sin()
dy = torch.arange(24, dtype=torch.float32).reshape(8, 3).cos()
layer = cw.Linear(5, 3)
layer(x).backward(dy)
print(json.dumps({"dw": layer.weight.grad.tolist(), "db": layer.bias.grad.tolist(), "backends": cw.backends(),
                  "file": cw.__file__, "breakdowns": cw.ops.breakdowns()}))
"""
BLOCKER = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError("blocked: " + name, name=name)
sys.meta_path.insert(0, Blocker())
"""


# An editable install would find the checkout's extension for a copy of the package that has none.
NOT_EDITABLE = """
import sys
sys.meta_path[:] = [f for f in sys.meta_path if "Editable" not in getattr(f, "__name__", type(f).__name__)]
"""


def run(code: str, path: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Python with ``path`` in front of everything else."""
    environment = {**os.environ, "PYTHONPATH": str(path)}
    command = [sys.executable, *flags, "-c", NOT_EDITABLE + code]
    return subprocess.run(command, env=environment, cwd=path, capture_output=True, text=True, timeout=120)


def result(finished: subprocess.CompletedProcess[str]) -> dict:
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout.splitlines()[-1])


def assert_right(found: dict) -> None:
    x = torch.arange(40, dtype=F32).reshape(8, 5).sin()
    dy = torch.arange(24, dtype=F32).reshape(8, 3).cos()
    dw, db = oracle(x, dy)
    assert_close("dw", torch.tensor(found["dw"]), dw, SAME_WAY)
    assert_close("db", torch.tensor(found["db"]), db, SAME_WAY)


@pytest.fixture
def pure(tmp_path: Path) -> Path:
    """A copy of the package without its compiled kernels."""
    ignore = shutil.ignore_patterns("_C.*", "_C_*.txt", "__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "consequentialism", ignore=ignore)
    return tmp_path


def assert_falls_back(finished: subprocess.CompletedProcess[str], folder: Path, reason: str) -> None:
    found = result(finished)
    assert Path(found["file"]).is_relative_to(folder)
    assert finished.stderr.count("RuntimeWarning") == 1, finished.stderr
    assert "without its compiled kernels" in finished.stderr
    assert reason in finished.stderr
    assert reason in found["backends"]["cpu"]
    assert found["backends"]["reference"] == "available"
    assert found["breakdowns"] == 0
    assert_right(found)


def test_without_compiled_kernels(pure: Path) -> None:
    assert_falls_back(run(STEP, pure), pure, "not built")


def test_with_the_builds_own_reason(pure: Path) -> None:
    (pure / "consequentialism/_C_missing.txt").write_text("built without a C++ compiler\n")
    assert_falls_back(run(STEP, pure), pure, "built without a C++ compiler")


def test_with_kernels_that_cannot_be_loaded(pure: Path) -> None:
    import sysconfig

    (pure / f"consequentialism/_C{sysconfig.get_config_var('EXT_SUFFIX')}").write_bytes(b"not a library")
    assert_falls_back(run(STEP, pure), pure, "cannot be loaded")


def test_with_kernels_of_older_sources(pure: Path) -> None:
    (pure / "consequentialism/_C.py").write_text("def build_info(): ...\ndef breakdowns(): ...\n")
    assert_falls_back(run(STEP, pure), pure, "built from older sources, without linear_forward, set_planner")


def test_with_kernels_that_lack_an_op(pure: Path) -> None:
    (pure / "consequentialism/_C.py").write_text("".join(f"def {name}(*_): ...\n" for name in FUNCTIONS))
    assert_falls_back(run(STEP, pure), pure, "built from older sources, without input_gram, ")


@needs_kernels
def test_with_kernels_of_another_state_of_the_checkout(pure: Path) -> None:
    """They have every name, and could fail in forward: what C++ asks of Python is not what Python has."""
    (extension,) = PACKAGE.glob("_C.*.so")
    (pure / "consequentialism" / extension.name).symlink_to(extension)
    (pure / "csrc").mkdir()
    source, stamp = pure / "csrc/linear_forward.cpp", stamp_of(pure / "consequentialism" / extension.name)
    source.write_text("// as it was built\n")
    assert_falls_back(run(STEP, pure), pure, f"built from other sources than those in {pure / 'csrc'}")  # no stamp yet
    stamp.write_text(f"{torch.__version__}\n{interface_of(pure / 'csrc')}\n")
    of_another = stamp_of(pure / "consequentialism/_C.cpython-399-x86_64-linux-gnu.so")
    of_another.write_text("2.1.0\n0123456789abcdef\n")  # and another Python's extension concerns nobody here
    assert result(run(STEP, pure, "-W", "error"))["backends"]["cpu"] == "available"
    source.write_text("// changed since\n")
    assert_falls_back(run(STEP, pure), pure, f"built from other sources than those in {pure / 'csrc'}")
    assert "--no-deps -e .`" in run(STEP, pure).stderr, "another install would leave these where they are"


def test_an_editors_lock_among_the_sources_is_none_of_them(tmp_path: Path) -> None:
    (tmp_path / "ops.cpp").write_text("// a source\n")
    before = interface_of(tmp_path)
    (tmp_path / ".#ops.cpp").symlink_to("somebody@somewhere.123:456")
    assert interface_of(tmp_path) == before


@needs_kernels
def test_the_build_writes_down_its_torch_and_its_sources() -> None:
    (extension,) = PACKAGE.glob(f"_C{EXTENSION_SUFFIXES[0]}")
    assert stamp_of(extension).read_text().split() == [torch.__version__, interface_of(PACKAGE.parent / "csrc")]


@pytest.mark.parametrize("built_for", ["2.9.1", torch.__version__ + ".post1"])
def test_with_kernels_for_another_torch(pure: Path, built_for: str) -> None:
    extension = pure / f"consequentialism/_C{EXTENSION_SUFFIXES[0]}"
    extension.write_bytes(b"not a library")
    stamp_of(extension).write_text(built_for + "\n")
    finished = run(STEP, pure)
    reason = f"built for torch {built_for}, but torch {torch.__version__} is here; `pip install --no-build-isolation"
    assert_falls_back(finished, pure, reason)
    assert "invalid ELF" not in finished.stderr + finished.stdout, "the loader's own words help nobody"


def test_with_kernels_whose_stamp_is_empty(pure: Path) -> None:
    """As a full disk leaves it."""
    extension = pure / f"consequentialism/_C{EXTENSION_SUFFIXES[0]}"
    extension.write_bytes(b"not a library")
    stamp_of(extension).touch()
    assert_falls_back(run(STEP, pure), pure, f"{stamp_of(extension)} is empty and does not say for which torch; `pip")


def test_naming_the_missing_backend_says_why(pure: Path) -> None:
    code = "import torch, consequentialism as cw; cw.Linear(5, 3, backend='cpu')(torch.ones(2, 5))"
    finished = run(code, pure)
    assert finished.returncode != 0
    assert "backend='cpu' is not available: no compiled extension: not built" in finished.stderr


@needs_kernels
def test_with_compiled_kernels_there_is_no_warning() -> None:
    found = result(run(STEP, PACKAGE.parent, "-W", "error"))
    assert found["backends"]["cpu"] == "available"
    assert_right(found)


def test_without_anything_optional() -> None:
    code = BLOCKER.format(blocked=OPTIONAL) + STEP
    finished = run(code, PACKAGE.parent, "-W", "ignore::UserWarning")
    assert_right(result(finished))


def test_blocker_blocks() -> None:
    finished = run(BLOCKER.format(blocked=("json",)) + STEP, PACKAGE.parent)
    assert finished.returncode != 0
    assert "blocked: json" in finished.stderr


def test_public_names() -> None:
    for name in cw.__all__:
        assert hasattr(cw, name), name
    for name in (
        "Linear",
        "Embedding",
        "convert",
        "revert",
        "param_groups",
        "emended_linear",
        "emended_weight_grad",
        "predict_change",
        "reference",
        "backends",
    ):
        assert name in cw.__all__
    assert (PACKAGE / "py.typed").exists()


def test_import_touches_nothing_of_torch() -> None:
    code = """
import torch
before = torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(), torch.initial_seed()
state = torch.get_rng_state()
import consequentialism
after = torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(), torch.initial_seed()
assert before == after, (before, after)
assert torch.equal(state, torch.get_rng_state())
import sys
late = ("consequentialism.insight", "consequentialism.optim", "matplotlib")
late = [name for name in sys.modules if name.startswith(late)]
assert not late, late
assert {"diagnose", "optim"} <= set(dir(consequentialism))
assert consequentialism.optim.Emended.__module__ == "consequentialism.optim.emended"
"""
    finished = run(code, PACKAGE.parent)
    assert finished.returncode == 0, finished.stderr


def test_random_inputs_are_the_same_everywhere() -> None:
    # The suite's own foundation: inputs do not depend on device, type or the order of the tests.
    assert torch.equal(randn(3, 2), randn(3, 2))
    assert torch.equal(randn(3, 2, dtype=F32), randn(3, 2).float())


def test_what_only_a_compiler_needs_is_not_loaded_before_one_runs() -> None:
    code = """
import sys, torch
before = set(sys.modules)
import consequentialism as cw
cw.Linear(5, 3)(torch.randn(4, 5)).sum().backward()
print(sorted(set(sys.modules) - before))
"""
    finished = run(code, PACKAGE.parent)
    assert finished.returncode == 0, finished.stderr
    for name in ("consequentialism.autograd.traced", "torch._dynamo.symbolic_convert", "consequentialism.optim"):
        assert repr(name) not in finished.stdout
