"""What the processes of test_examples.py run."""

from __future__ import annotations

import argparse
import runpy
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).parent.parent / "examples"


def distributed(rank: int, wrap: str, steps: int, checkpoint: Path | None) -> dict[str, Any]:
    """`examples/distributed.py` in a group that is there already: the loss of each step."""
    train = runpy.run_path(str(EXAMPLES / "distributed.py"))["train"]
    return {"losses": train(argparse.Namespace(wrap=wrap, steps=steps, checkpoint=checkpoint))}
