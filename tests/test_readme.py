"""README's code does what README says."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from cases import SAME_WAY, assert_close, randn

import consequentialism as cw
from consequentialism.backend.schemas import COORDINATE_OPS, OPS
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
