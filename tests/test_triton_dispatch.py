"""When the Triton backend is chosen, and what is said where it cannot be; Triton itself is not needed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from types import SimpleNamespace

import pytest
import torch
from cases import randn

from consequentialism import reference
from consequentialism.backend import compiled as ops
from consequentialism.backend import dispatch


class OnCuda:
    """What `dispatch.select` looks at of a tensor on a GPU."""

    device = torch.device("cuda:0")


@pytest.fixture(autouse=True)
def _not_loaded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(dispatch, "_triton", None)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for cached in (dispatch._reason_too_old, dispatch._installed_triton):
        cached.cache_clear()
    yield
    for cached in (dispatch._reason_too_old, dispatch._installed_triton):
        cached.cache_clear()


def test_order_of_auto_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "device_types", ("cpu",))
    monkeypatch.setattr(dispatch, "_triton", SimpleNamespace(INTERPRETED=True))
    assert dispatch.select("auto", OnCuda()) is reference  # the interpreter is for tests, by name
    own = SimpleNamespace(INTERPRETED=False)
    monkeypatch.setattr(dispatch, "_triton", own)
    assert dispatch.select("auto", OnCuda()) is own
    assert dispatch.select("triton", OnCuda()) is own
    monkeypatch.setattr(ops, "device_types", ("cpu", "cuda"))
    assert dispatch.select("auto", OnCuda()) is ops


def test_compiled_kernels_refuse_cpu_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_triton", SimpleNamespace(INTERPRETED=False))
    with pytest.raises(RuntimeError, match=r"'triton' serves cuda tensors, x is on cpu; use backend='auto'"):
        dispatch.select("triton", randn(2, 3))
    monkeypatch.setattr(dispatch, "_triton", SimpleNamespace(INTERPRETED=True))
    assert dispatch.select("triton", randn(2, 3)).INTERPRETED
    with pytest.raises(RuntimeError, match="x is on meta"):
        dispatch.select("triton", torch.empty(2, 3, device="meta"))


def test_too_old_or_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(dispatch.metadata, "version", lambda name: "3.5.1")
    assert dispatch.backends()["triton"] == "Triton 3.5.1 is too old, 3.6 is needed"

    asked = []

    def missing(name: str) -> str:
        asked.append(name)
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(dispatch.metadata, "version", missing)
    dispatch._installed_triton.cache_clear()
    for _ in range(3):
        assert "not installed" in dispatch.backends()["triton"]
    assert asked == ["triton"]  # the path is searched once


def test_chips_without_the_tensor_cores_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(dispatch.metadata, "version", lambda name: "3.7.1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Some T4")
    monkeypatch.setattr(ops, "device_types", ("cpu", "cuda"))
    for name in ("triton", "cuda") if ops.module is not None else ("triton",):
        state = dispatch.backends()[name]
        assert "Some T4" in state
        assert "8.0" in state
        with pytest.raises(RuntimeError, match=rf"backend='{name}' is not available: Some T4 .* 8\.0 is needed"):
            dispatch.select(name, OnCuda())
    assert dispatch.select("auto", OnCuda()) is reference
    dispatch._reason_too_old.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 0))
    assert dispatch.select("auto", OnCuda()) is ops


def test_a_machine_that_cannot_launch_is_told_why(monkeypatch: pytest.MonkeyPatch) -> None:
    # Triton's own message where it finds no C compiler for its launcher.
    message = "Failed to find C compiler."

    class NoCompiler:
        @property
        def active(self) -> object:
            raise RuntimeError(message)

    asked = []

    def load(name: str) -> object:
        asked.append(name)
        return SimpleNamespace(driver=NoCompiler())

    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(dispatch.metadata, "version", lambda name: "3.7.1")
    monkeypatch.setattr(dispatch.importlib, "import_module", load)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(ops, "device_types", ("cpu",))
    dispatch._launch_error.cache_clear()
    try:
        assert dispatch.select("auto", OnCuda()) is reference
        with pytest.raises(RuntimeError, match=rf"cannot launch kernels: RuntimeError: {message}"):
            dispatch.select("triton", OnCuda())
    finally:
        dispatch._launch_error.cache_clear()
    assert asked == ["triton.runtime"]  # once, not at every call


def test_triton_is_imported_only_where_it_can_run() -> None:
    code = "import sys, consequentialism as cw; cw.backends(); print('triton' in sys.modules)"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == str(torch.cuda.is_available() and dispatch.backends()["triton"] == "available")


def test_first_use_under_compile() -> None:
    code = (
        "import torch, consequentialism as cw\n"
        "layer = cw.Linear(5, 3, backend='triton')\n"
        "compiled = torch.compile(layer, fullgraph=True, backend='aot_eager')\n"
        "compiled(torch.randn(8, 5)).sum().backward()\n"
        "print('done', layer.weight.grad.shape)"
    )
    pytest.importorskip("triton", reason="Triton is not installed")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-3000:]
    assert "done" in found.stdout
