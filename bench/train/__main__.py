"""Training benchmarks: steps and seconds to a fixed test accuracy or loss, every optimizer tuned on the same grid."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from consequentialism.demo.report import prepare_folder
from consequentialism.errors import Parser, UserError, need

from ..environment import slug
from .methods import METHODS, NEVER, TRIALS
from .rows import SkipRow
from .show import print_tables
from .tasks import PROFILES, QUICK, TASKS
from .work import STAGES, Plan, skipped


def main(arguments: list[str] | None = None) -> int:
    """Run the stages.

    Returns:
        The exit code: 0, or 2 after one line on stderr about what the user can mend.
    """
    try:
        plan, stages = _plan(arguments)
        for module in ("rich", "tqdm"):
            need(module)
        prepare_folder(plan.out)
        for name in plan.tasks:  # what is missing is said before any work
            plan.data(plan.task(name))
        _announce(skipped(plan))
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            for stage in stages:
                STAGES[stage](plan)
        finally:
            torch.set_num_threads(threads)
        if "cost" in stages:
            print_tables(plan.out)
    except UserError as error:
        print(f"consequentialism bench-train: error: {error}", file=sys.stderr)
        return 2
    return 0


def _announce(skips: list[SkipRow]) -> None:
    for skip in skips:
        print(f"skipped: {skip.optimizer} on {skip.task}: {skip.reason}", file=sys.stderr)
    for name, reason in NEVER.items():
        print(f"skipped: {name}: {reason}", file=sys.stderr)


def _whole(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, got {text!r}")
    return int(text)


def _plan(arguments: list[str] | None) -> tuple[Plan, list[str]]:
    parser = Parser(prog="consequentialism bench-train", description=__doc__)
    add = parser.add_argument
    tasks = {name: [task.name for task in profile] for name, profile in PROFILES.items()}
    listing = "; ".join(f"{name}: {', '.join(names)}" for name, names in tasks.items())
    add("--task", action="append", metavar="NAME", help=f"repeatable; default: all of the device's ({listing})")
    add("--optimizer", action="append", choices=list(METHODS), metavar="NAME",
        help="repeatable; default: all of " + ", ".join(METHODS))  # fmt: skip
    add("--stage", action="append", choices=list(STAGES), help="repeatable; run and cost read --out (default: all)")
    add("--device", choices=list(PROFILES), default="cpu", help="its tasks are larger on cuda (default: cpu)")
    add("--root", type=Path, default=Path("data"), help="folder of MNIST's four IDX files (default: data)")
    add("--seeds", type=_whole, help="runs with the best trial (default: 3; 1 with --quick)")
    add("--quick", action="store_true", help=f"tasks {' and '.join(QUICK)}, 4 trials an optimizer, one seed")
    add("--workers", type=_whole, help="processes for grid search and runs (default: the cores; 1 for cuda)")
    add("--out", type=Path, help="folder of the CSV files (default: out/bench/train/DEVICE)")
    chosen = parser.parse_args(arguments)
    names = tasks[chosen.device]
    for name in chosen.task or ():
        if name not in TASKS:
            raise UserError(f"argument --task: {name!r} is none of {', '.join(TASKS)}")
    if chosen.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device")
    default = [name for name in names if name in QUICK] or names[:1] if chosen.quick else names
    plan = Plan(
        tasks=tuple(dict.fromkeys(chosen.task or default)),
        optimizers=tuple(dict.fromkeys(chosen.optimizer or METHODS)),
        device=chosen.device,
        root=chosen.root,
        seeds=chosen.seeds or (1 if chosen.quick else 3),
        grid=4 if chosen.quick else TRIALS,
        blocks=3 if chosen.quick else 8,
        workers=chosen.workers or (1 if chosen.device == "cuda" else torch.get_num_threads()),
        out=chosen.out or Path("out/bench/train") / slug(chosen.device),
    )
    stages = [stage for stage in STAGES if not chosen.stage or stage in chosen.stage]
    return plan, stages


if __name__ == "__main__":
    raise SystemExit(main())
