"""Training benchmarks: steps and seconds to a fixed test accuracy or loss, every optimizer tuned on the same grid; and
tasks that are trained to the end of a schedule, where --data has a folder with tiny shakespeare or CIFAR-10."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from consequentialism.errors import Parser, UserError, need, prepare_folder

from ..environment import slug
from . import defaults, head_to_head, recipe_stages, recipes, step_cost
from .methods import METHODS, NEVER, TRIALS
from .rows import SkipRow
from .show import print_tables
from .stages import STAGES, Plan, skipped
from .tasks import PROFILES, QUICK, TASKS

ASKED = ("grid", "defaults", "step-cost")  # stages that run where they are named only
ALL_STAGES = (*STAGES, *ASKED)


def main(arguments: list[str] | None = None) -> int:
    """Run the stages.

    Returns:
        The exit code: 0, or 2 after one line on stderr about what the user can mend.
    """
    try:
        plan, bench, stages = _plan(arguments)
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
                if stage in STAGES and plan.tasks:
                    STAGES[stage](plan)
                if stage in recipe_stages.STAGES:
                    recipe_stages.STAGES[stage](bench)
            if "grid" in stages:
                head_to_head.measure(bench)
            if "defaults" in stages:
                defaults.measure(plan)
            if "step-cost" in stages:
                step_cost.measure(plan.out, plan.blocks, plan.device)
        finally:
            torch.set_num_threads(threads)
        if "cost" in stages and plan.tasks:
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


def _plan(arguments: list[str] | None) -> tuple[Plan, recipe_stages.Bench, list[str]]:
    parser = Parser(prog="consequentialism bench-train", description=__doc__)
    add = parser.add_argument
    tasks = {name: [task.name for task in profile] for name, profile in PROFILES.items()}
    listing = "; ".join(f"{name}: {', '.join(names)}" for name, names in tasks.items())
    add("--task", action="append", metavar="NAME",
        help=f"repeatable; default: all of the device's ({listing}), and {', '.join(recipes.RECIPES)}")  # fmt: skip
    add("--optimizer", action="append", choices=list(METHODS), metavar="NAME",
        help="repeatable; default: all of " + ", ".join(METHODS))  # fmt: skip
    add("--stage", action="append", choices=ALL_STAGES,
        help=f"repeatable; run and cost read --out (default: all but {', '.join(ASKED)})")  # fmt: skip
    add("--device", choices=list(PROFILES), default="cpu", help="where to train; larger tasks on cuda (default: cpu)")
    add("--root", type=Path, default=Path("data"), help="folder of MNIST's four IDX files (default: data)")
    add("--data", type=Path, help="folder with tinyshakespeare.txt, and CIFAR-10's binaries or cifar10-jpeg.tar.xz")
    add("--steps", type=_whole, help="length of a recipe's schedule (default: each task's own)")
    add("--seeds", type=_whole, help="runs with the best trial (default: 3; 1 with --quick)")
    add("--trials", type=_whole, help=f"trials of a recipe's search (default: {TRIALS}; 4 with --quick)")
    add("--refresh-every", type=_whole,
        help="steps between refreshes in a recipe's search in coordinates (default: the package's)")  # fmt: skip
    add("--block", type=_whole, help="most inputs taken together in such a search (default: the package's)")
    add("--quick", action="store_true", help=f"tasks {' and '.join(QUICK)}, 4 trials an optimizer, one seed")
    add("--workers", type=_whole, help="processes for grid search and runs (default: the cores; 1 for cuda)")
    add("--out", type=Path, help="folder of the CSV files (default: out/bench/train/DEVICE)")
    chosen = parser.parse_args(arguments)
    names = tasks[chosen.device]
    for name in chosen.task or ():
        if name not in TASKS and name not in recipes.RECIPES:
            raise UserError(f"argument --task: {name!r} is none of {', '.join((*TASKS, *recipes.RECIPES))}")
    if chosen.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device")
    default = [name for name in names if name in QUICK] or names[:1] if chosen.quick else [*names, *recipes.RECIPES]
    asked = tuple(dict.fromkeys(chosen.task or default))
    plan = Plan(
        tasks=tuple(name for name in asked if name in TASKS),
        optimizers=tuple(dict.fromkeys(chosen.optimizer or METHODS)),
        device=chosen.device,
        root=chosen.root,
        seeds=chosen.seeds or (1 if chosen.quick else 3),
        grid=4 if chosen.quick else TRIALS,
        blocks=3 if chosen.quick else 8,
        workers=chosen.workers or (1 if chosen.device == "cuda" else torch.get_num_threads()),
        out=chosen.out or Path("out/bench/train") / slug(chosen.device),
    )
    without = recipes.missing((name for name in asked if name in recipes.RECIPES), chosen.data)
    if all(name in without for name in asked):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in without.items())
        raise UserError(f"argument --task: nothing is left to run. {reasons}")
    for name, reason in without.items():
        print(f"skipped: {name}: {reason}", file=sys.stderr)
    bench = recipe_stages.Bench(
        folder=chosen.data or Path(),
        out=plan.out,
        device=plan.device,
        tasks=tuple(name for name in asked if name in recipes.RECIPES and name not in without),
        optimizers=tuple(name for name in recipes.START if name in plan.optimizers),
        steps=chosen.steps,
        seeds=plan.seeds,
        most=chosen.trials or plan.grid,
        blocks=plan.blocks,
        refresh_every=chosen.refresh_every,
        block=chosen.block,
    )
    stages = [stage for stage in ALL_STAGES if (stage in chosen.stage if chosen.stage else stage not in ASKED)]
    return plan, bench, stages


if __name__ == "__main__":
    raise SystemExit(main())
