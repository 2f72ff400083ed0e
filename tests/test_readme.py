"""The code of README and of the pages of docs does what they say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import SAME_WAY, assert_close, randn

import consequentialism as cw
from consequentialism.backend.schemas import COORDINATE_OPS, OPS
from consequentialism.optim.rules import _DECLARED
from consequentialism.options import OPTION_NAMES

ROOT = Path(__file__).parent.parent
README, STATUS = (ROOT / "README.md").read_text(), (ROOT / "docs" / "hardware.md").read_text()
FORMULA, EXAMPLE = (
    next(block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if mark in block)
    for mark in ("gram.trace()", "cw.convert(model)")
)


def test_formula_in_stock_pytorch() -> None:
    x, dy, damping = randn(20, 30), randn(20, 5), 0.5
    names = {"torch": torch, "x": x.double(), "dy": dy.double(), "damping": damping, "N": 20, "I": 30}
    exec(FORMULA.replace("torch.eye(N)", "torch.eye(N, dtype=torch.float64)"), names)
    dw, _ = cw.emended_weight_grad(x, dy, bias=False, damping=damping)
    assert_close("dw", dw, names["dw"], SAME_WAY)


def test_the_table_of_what_has_run_on_hardware_leaves_nothing_out() -> None:
    rows = [line.split("|") for line in STATUS.splitlines() if line.startswith("| ")]
    table = [row for row in rows if "nothing yet" in row[-2]]
    named = set(re.findall(r"`(?:optim\.)?(\w+)`", "".join(row[1] for row in table)))
    compiled = (path.stem.removesuffix("_binding") for path in (ROOT / "csrc" / "cuda").glob("*_binding.cpp"))
    assert named >= {*OPS, *COORDINATE_OPS, *compiled}
    assert named >= {*OPTION_NAMES, "side_stream", "FusedSGD", "Emended", "Muon", "shard_state"}


def test_example_learns() -> None:
    x, labels = torch.randn(64, 784), torch.randint(10, (64,))
    names = {"batches": [(x, labels)] * 8}
    exec(EXAMPLE, names)
    model = names["model"]
    assert type(model[0]) is cw.Linear
    assert torch.nn.functional.cross_entropy(model(x), labels) < 0.5  # 2.3 where nothing is learnt


BLOCKS = {
    page.stem: blocks
    for page in sorted((ROOT / "docs").glob("*.md"))
    if (blocks := re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
}


class MyOptimizer(torch.optim.SGD):
    """What a page leaves to its reader."""


class Writer:
    """So is a summary writer."""

    def add_scalar(self, *_: Any) -> None: ...


def fresh_names() -> dict[str, Any]:
    images, labels = torch.randn(32, 12), torch.randint(4, (32,))
    model = torch.nn.Sequential(torch.nn.Linear(12, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
    return {
        "torch": torch,
        "cw": cw,
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), 0.1),
        "images": images,
        "labels": labels,
        "loader": [(images, labels)] * 2,
        "summary_writer": Writer(),
        "MyOptimizer": MyOptimizer,
    }


@pytest.mark.parametrize("page", BLOCKS)
def test_a_page_runs_from_top_to_bottom(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a model for each block that goes on with none, as a reader has who copies one."""
    monkeypatch.chdir(tmp_path)
    names = fresh_names()
    try:
        for block in BLOCKS[page]:
            if "Emended(" in block:  # which refuses the layers of the block before
                names = fresh_names()
            exec(block, names)
            model = names["model"]
            x = torch.randn(32, model[0].in_features)
            for _ in range(2):
                names["optimizer"].zero_grad()
                torch.nn.functional.cross_entropy(model(x), torch.randint(4, (32,))).backward()
                names["optimizer"].step()
            assert all(parameter.isfinite().all() for parameter in model.parameters())
    finally:
        _DECLARED.pop(MyOptimizer, None)
