"""Every example runs by its command and learns; those that need more packages run in `make test-ecosystem`."""

from __future__ import annotations

import importlib.util
import re
import runpy
import subprocess
import sys
from pathlib import Path

import distributed_workers as workers
import example_workers
import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"
NEEDS = {
    "accelerate_loop": ("accelerate", "transformers"),
    "hf_trainer": ("accelerate", "transformers"),
    "lightning_module": ("lightning",),
    "peft_lora": ("peft", "transformers"),
    "timm_models": ("timm",),
}
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py"))
COMMAND = re.compile(r"# make (\.venv\S*)/\.built && (\.venv\S*)/bin/(python|torchrun \S+ --nproc-per-node 2) (\S+)")


def run(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What it prints, in this process."""
    for package in NEEDS.get(name, ()):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}: make test-ecosystem")
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    return capsys.readouterr().out


def numbers(pattern: str, text: str) -> list[float]:
    found = [float(value) for value in re.findall(pattern, text)]
    assert found, f"no {pattern!r} in {text!r}"
    return found


@pytest.mark.parametrize("name", NAMES)
def test_first_comment_is_its_command(name: str) -> None:
    lines = (EXAMPLES / f"{name}.py").read_text().splitlines()
    found = COMMAND.match(lines[0])
    assert found, lines[0]
    environment = ".venv-ecosystem" if name in NEEDS else ".venv"
    assert found[1] == found[2] == environment
    assert found[4] == f"examples/{name}.py"
    assert len(lines) <= 120


def test_plain_loop(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    printed = run("plain_loop", monkeypatch, capsys)
    plain, emended = numbers(r"accuracy ([\d.]+)", printed)
    assert emended > 0.6  # a guess: 0.2
    assert plain > 0.6
    assert "Linear(in_features=20" in printed


def test_tour(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    printed = run("tour", monkeypatch, capsys)
    plain, emended = numbers(r"(?:plain|emended) +([-+][\d.]+) and", printed)
    assert emended < -0.99 < -0.1 < plain < 0, "asked for: -1"
    lms, nlms, apa = numbers(r" 100 samples ([\d.e+-]+)", printed)
    assert apa < nlms < lms
    interference = numbers(r"layer \d: ([\d.]+) plain", printed)
    assert all(e < p for p, e in zip(interference, numbers(r"plain, ([\d.]+) emended", printed), strict=True))
    assert numbers(r"SGD [\d.]+, emended ([\d.]+)", printed) < numbers(r"plain SGD ([\d.]+)", printed)
    assert (
        numbers(r"in emended coordinates +([\d.e+-]+)", printed)[0] < 1e-4 < numbers(r"SGD  +([\d.e+-]+)", printed)[0]
    )
    if importlib.util.find_spec("matplotlib") is not None:
        assert {path.name for path in (tmp_path / "out/tour").iterdir()} == {"filters.png", "report.html"}


def test_nanogpt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("the cat sat on the mat and the dog sat on the log. " * 60)
    printed = run("nanogpt", monkeypatch, capsys, str(path), "--steps", "30")
    (loss,) = numbers(r"held-out loss ([\d.]+)", printed)
    assert loss < 2.0  # a guess: 2.9


def test_export(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    printed = run("export_model", monkeypatch, capsys)
    (operators,) = re.findall(r"operators: (.*)", printed)
    assert all(name.startswith("aten.") for name in operators.split(", "))
    assert "computes what the trained model did" in printed


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
def test_distributed_accumulates_and_resumes(tmp_path: Path) -> None:
    """DDP and FSDP2 take the same steps, and a run that goes on from a checkpoint those of one that did not stop."""
    plan = {"whole": ("ddp", 12, None)}
    for wrap in ("ddp", "fsdp2"):
        plan[f"{wrap}, first part"] = (wrap, 6, tmp_path / wrap)
        plan[f"{wrap}, second part"] = (wrap, 6, tmp_path / wrap)
    jobs: dict[str, workers.Job] = {name: (example_workers.distributed, job) for name, job in plan.items()}
    for results in workers.launch(jobs, tmp_path):
        assert not any("error" in result for result in results.values()), results
        losses = {name: result["losses"] for name, result in results.items()}
        whole = losses["whole"]
        assert whole[-1] < 0.6 * whole[0]
        for wrap in ("ddp", "fsdp2"):
            assert losses[f"{wrap}, first part"] == pytest.approx(whole[:6], rel=1e-4)
            assert losses[f"{wrap}, second part"] == pytest.approx(whole[6:], rel=1e-4)


@pytest.mark.ecosystem
@pytest.mark.parametrize("wrap", ["ddp", "fsdp2"])
def test_torchrun(wrap: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(EXAMPLES / "distributed.py"), "--wrap", wrap, "--checkpoint", str(tmp_path / "checkpoint")]
    command += ["--steps", "4"]
    for first in (1, 5):
        done = subprocess.run(command, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr
        assert numbers(r"step (\d+)", done.stdout) == list(range(first, first + 4))


def test_trainer(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    losses = numbers(r"mean training loss ([\d.]+)", run("hf_trainer", monkeypatch, capsys))
    assert max(losses) < 5.0  # a guess: 5.5
    assert len(losses) == 2


def test_accelerate(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    losses = numbers(r"epoch \d: loss ([\d.]+)", run("accelerate_loop", monkeypatch, capsys))
    assert losses[-1] < 0.3  # a guess: 0.69


def test_lightning(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = numbers(r"epochs: loss ([\d.]+)", run("lightning_module", monkeypatch, capsys))
    assert after < before < 1.2


def test_timm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    printed = run("timm_models", monkeypatch, capsys)
    begins, ends = numbers(r"loss ([\d.]+) to", printed), numbers(r" to ([\d.]+)", printed)
    assert len(ends) == 3
    assert all(end < 0.8 * begin for begin, end in zip(begins, ends, strict=True)), printed


def test_lora(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    printed = run("peft_lora", monkeypatch, capsys)
    begins, ends = numbers(r"loss ([\d.]+) to", printed), numbers(r" to ([\d.]+)", printed)
    assert len(ends) == 3
    assert all(end < begin - 0.01 for begin, end in zip(begins, ends, strict=True)), printed
    assert printed.count("merged: GPT2LMHeadModel") == 3
