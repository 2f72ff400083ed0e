"""The training benchmarks: who wins a grid search, what the CSV files hold, and what the report makes of them."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench import report, table
from bench.environment import environment
from bench.train import claims, defaults, show, stages, training_report
from bench.train.__main__ import main
from bench.train.methods import METHODS, TRIALS, Method, missing
from bench.train.rows import FILES, CurveRow, GridRow, RunRow, SkipRow, TimeRow
from bench.train.stages import Plan
from bench.train.tasks import PROFILES, Task
from bench.train.text import ALPHABET, python_help
from bench.train.tune import Outcome, final_score, first_reached, jump, search, train
from consequentialism.experiments.data import Samples
from consequentialism.experiments.methods import Loss, Step
from consequentialism.experiments.settings import PREFIX, Trial
from consequentialism.experiments.train import Problem, Run, class_loss

CPU = PROFILES["cpu"]


def samples(count: int = 100) -> Samples:
    """Two classes, told apart by the sign of the first of three inputs."""
    x = torch.randn(count, 3, generator=torch.Generator().manual_seed(0))
    return Samples(x, (x[:, 0] > 0).long(), x, (x[:, 0] > 0).long())


def task(**changes: Any) -> Task:
    problem = Problem(lambda seed: nn.Linear(3, 2))
    made = Task("digits", "title", lambda root: samples(), lambda data: problem, 10, 20, 2, 0.9)
    return dataclasses.replace(made, **changes)


def scripted(scores: dict[float, list[bool]]) -> Method:
    """A method whose trial of learning rate ``lr`` is right at the evaluations where ``scores[lr]`` says so."""

    class Fixed(nn.Module):
        def __init__(self, model: nn.Module, right: list[bool]) -> None:
            super().__init__()
            self.steps, self.right = 0, right

    def prepare(model: nn.Module, trial: Trial, loss: Loss) -> Step:
        right = scores[trial.lr]
        taken = [0]

        def weights(good: bool) -> None:
            with torch.no_grad():
                model.weight.zero_()
                model.bias.zero_()
                model.weight[1, 0], model.weight[0, 0] = (1.0, -1.0) if good else (-1.0, 1.0)

        weights(False)

        def step(x: Tensor, y: Tensor) -> Tensor:
            taken[0] += 1
            weights(right[min((taken[0] - 1) // 2, len(right) - 1)])
            return loss(model(x), y)

        return step

    return Method("scripted", "scripted", prepare, lambda conv: tuple(Trial("scripted", lr) for lr in scores))


def run_of(accuracies: list[float]) -> Run:
    run = Run(Trial("sgd", 1.0), 0)
    run.steps = list(range(0, 2 * len(accuracies), 2))
    run.test_accuracy = accuracies
    run.test_loss = [1 - a for a in accuracies]
    return run


@pytest.mark.parametrize(
    ("accuracies", "steps"),
    [([0.1, 0.95, 0.2, 0.95, 0.96], 6), ([0.1, 0.95, 0.2, 0.95], None), ([0.95, 0.95], 0), ([0.1, 0.9, 0.9], 2)],
)
def test_a_target_is_reached_at_the_first_of_two_evaluations_in_a_row(accuracies: list[float], steps: int) -> None:
    assert first_reached(task(), run_of(accuracies)) == steps
    by_loss = task(by_loss=True, target=0.1 + 1e-9)
    assert first_reached(by_loss, run_of(accuracies)) == steps


def test_final_score_is_the_median_of_five() -> None:
    assert final_score(task(), run_of([0.0, 0.1, 0.2, 0.9, 0.8, 0.7])) == 0.7


def test_the_search_takes_the_fewest_steps_and_stops_who_has_lost() -> None:
    never, late, early = [False], [False] * 4 + [True], [False, True]
    trials = {1.0: never, 2.0: late, 3.0: early, 4.0: never}
    method = scripted(trials)
    best, outcomes = search(task(), method, samples(), method.trials(False))
    assert best.lr == 3.0
    ends = {outcome.run.trial.lr: (outcome.end, outcome.steps) for outcome in outcomes}
    # The middle of the grid first: 2.0 reaches it, 3.0 sooner, so that the two others stop as soon as they are beaten.
    assert ends == {2.0: ("reached", 10), 3.0: ("reached", 4), 1.0: ("beaten", None), 4.0: ("beaten", None)}
    assert max(len(o.losses) for o in outcomes if o.end == "beaten") == 6


def test_where_nobody_reaches_the_target_the_best_score_wins() -> None:
    method = scripted({1.0: [False], 2.0: [False, True, False], 3.0: [False] * 9 + [True]})
    best, outcomes = search(task(), method, samples(), method.trials(False))
    assert best.lr == 3.0
    assert {outcome.end for outcome in outcomes} == {"budget"}


def test_a_loss_that_is_not_finite_ends_a_run() -> None:
    def prepare(model: nn.Module, trial: Trial, loss: Loss) -> Step:
        return lambda x, y: torch.tensor(math.nan if trial.lr > 1 else 1.0)

    method = Method("x", "x", prepare, lambda conv: (Trial("x", 2.0), Trial("x", 1.0)))
    outcome = train(task(), method, samples(), Trial("x", 2.0), 0)
    assert (outcome.end, outcome.steps, len(outcome.losses)) == ("diverged", None, 1)
    assert search(task(), method, samples(), method.trials(False))[0].lr == 1.0


def test_a_run_that_diverged_wins_against_nobody() -> None:
    steady = scripted({1.0: [False]})

    def prepare(model: nn.Module, trial: Trial, loss: Loss) -> Step:
        step = (
            scripted({2.0: [True]}).prepare(model, trial, loss) if trial.lr > 1 else steady.prepare(model, trial, loss)
        )
        taken = [0]

        def diverging(x: Tensor, y: Tensor) -> Tensor:
            taken[0] += 1
            return torch.tensor(math.nan) if trial.lr > 1 and taken[0] == 3 else step(x, y)

        return diverging

    trials = (Trial("x", 2.0), Trial("x", 1.0))
    method = Method("x", "x", prepare, lambda conv: trials)
    for order in (trials, trials[::-1]):
        best, outcomes = search(task(), method, samples(), order)
        assert {o.run.trial.lr: (o.end, o.run.test_accuracy[-1]) for o in outcomes} == {
            1.0: ("budget", 0.0),
            2.0: ("diverged", 1.0),
        }
        assert best.lr == 1.0


def test_a_factor_that_breaks_down_ends_a_run() -> None:
    def prepare(model: nn.Module, trial: Trial, loss: Loss) -> Step:
        return lambda x, y: torch.linalg.inv(torch.zeros(2, 2))

    outcome = train(task(), Method("x", "x", prepare, lambda conv: ()), samples(), Trial("x", 2.0), 0)
    assert outcome.end == "diverged"


def test_weights_that_are_not_finite_end_a_run_of_kfac() -> None:
    method = METHODS["kfac"]
    if missing(method, frozenset()) is not None:
        pytest.skip("asdl is not installed")
    problem = Problem(lambda seed: nn.Sequential(nn.Linear(3, 2)))
    outcome = train(task(problem=lambda data: problem), method, samples(), Trial("kfac", 1e38, 1e-9), 0)
    assert outcome.end == "diverged"


def test_jump_of_a_loss() -> None:
    assert jump([3.0, 2.0, 1.0]) == 0.0
    assert jump([0.0, 1.0, 0.0]) == 1.0
    assert jump([1.0, math.inf]) == math.inf


def test_every_optimizer_has_as_many_trials() -> None:
    for method in METHODS.values():
        for conv in (False, True):
            trials = method.trials(conv)
            assert len(trials) == TRIALS == len(set(trials))
            assert {trial.optimizer for trial in trials} == {method.name}


@pytest.mark.parametrize("name", METHODS)
def test_every_optimizer_trains(name: str) -> None:
    method = METHODS[name]
    reason = missing(method, frozenset())
    if reason is not None:
        pytest.skip(reason)
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)), samples()
    step = method.prepare(model, method.trials(False)[TRIALS // 2], class_loss)
    losses = [step(data.train_x, data.train_y).item() for _ in range(12)]
    assert losses[-1] < losses[0]


def test_a_peer_that_is_missing_or_refuses_is_named_with_the_reason() -> None:
    absent = dataclasses.replace(METHODS["sgd"], module="no_such_package")
    assert "no_such_package" in str(missing(absent, frozenset()))
    assert "Conv1d" in str(missing(METHODS["kfac"], frozenset({"conv1d"})))


@pytest.mark.parametrize("name", [t.name for t in CPU])
def test_a_task_trains_and_stops_at_an_evaluation(name: str, tmp_path: Path) -> None:
    chosen = next(t for t in CPU if t.name == name)
    assert chosen.steps % chosen.eval_every == 0
    data = chosen.data(tmp_path)
    problem = chosen.problem(data)
    model, again = problem.build(1), problem.build(1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    x, y = data.train_x[: chosen.batch_size], data.train_y[: chosen.batch_size]
    step = METHODS["emended-sgd"].prepare(model, Trial("emended-sgd", 0.5, 1.0), problem.loss)
    assert step(x, y) > step(x, y) > 0


def test_text_windows_predict_the_next_character() -> None:
    data = python_help(16, 4000)
    assert data.train_x.shape == data.train_y.shape
    assert data.train_x.shape[1] == 16
    assert torch.equal(data.test_x[0, 1:], data.test_y[0, :-1])
    assert int(data.train_x.max()) < len(ALPHABET)
    assert "".join(ALPHABET[i] for i in data.test_x[0]).isprintable() or "\n" in ALPHABET


def test_the_validation_split_leaves_the_test_samples_out() -> None:
    data = dataclasses.replace(samples(), test_x=torch.zeros(5, 3), test_y=torch.zeros(5))
    split, rest = data.validation_split(0.2), data.without_validation(0.2)
    assert (len(split.train_x), len(split.test_x), len(rest.test_x)) == (80, 20, 5)
    assert torch.equal(split.train_x, rest.train_x)
    assert torch.equal(torch.cat([split.train_x, split.test_x]), data.train_x)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--task", "nope"], "--task"),
        (["--optimizer", "nope"], "--optimizer"),
        (["--seeds", "0"], "--seeds"),
        (["--stage", "run", "--task", "digits"], "grid.csv"),
        (["--task", "mnist", "--root", "no/such/folder"], "no/such/folder"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--out", str(tmp_path)]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("skipped: ")]
    assert len(errors) == 1
    assert words in errors[0]


def test_a_csv_of_another_schema_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "grid.csv").write_text("task,optimizer\ndigits,sgd\n")
    assert main(["--stage", "cost", "--task", "digits", "--out", str(tmp_path)]) == 2
    assert "another schema" in capsys.readouterr().err


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The CSV files of a small benchmark, measured."""
    folder = tmp_path_factory.mktemp("results") / "cpu" / "train"
    some = ["--optimizer", "sgd", "--optimizer", "adam", "--optimizer", "emended-sgd", "--optimizer", "kfac"]
    stages = ["--stage", "tune", "--stage", "run", "--stage", "cost"]
    code = main(["--quick", "--task", "digits", *some, *stages, "--workers", "1", "--out", str(folder)])
    assert code == 0
    return folder


def test_every_stage_leaves_its_rows(measured: Path) -> None:
    grid = table.read(measured / "grid.csv", GridRow)
    assert len(grid) == 4 * 4
    runs = table.read(measured / "runs.csv", RunRow)
    assert [row.optimizer for row in runs] == ["sgd", "adam", "kfac", "emended-sgd"]
    assert {row.seed for row in runs} == {0}
    curves = table.read(measured / "curves.csv", CurveRow)
    assert {row.optimizer for row in curves} == {row.optimizer for row in runs}
    times = {row.optimizer: row for row in table.read(measured / "times.csv", TimeRow)}
    assert times["sgd"].ratio == 1
    assert all(row.p20_ms <= row.ms <= row.p80_ms for row in times.values())
    (lines,) = show.lines(measured).values()
    for line in lines:
        trials = [row for row in grid if row.optimizer == line.optimizer]
        assert line.grid_steps == sum(row.trained for row in trials)
        time = times[line.optimizer]
        assert time.start_ms is not None
        assert time.start_ms >= 0
        assert line.seconds == pytest.approx((line.steps * time.ms + time.start_ms) / 1e3)


def test_scores_that_overflow_end_a_trial_of_kfac_not_the_optimizer() -> None:
    pytest.importorskip("asdl")
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 10))
    for parameter in model.parameters():
        parameter.data.mul_(1e25)  # finite
    step = METHODS["kfac"].prepare(model, Trial("kfac", 0.1, 0.03), class_loss)
    with pytest.raises(FloatingPointError, match="scores are not finite"):
        step(torch.randn(32, 8), torch.randint(10, (32,)))


def line(optimizer: str, steps: float, ms: float) -> show.Line:
    return show.Line("digits", optimizer, 1.0, None, 0.97, steps, steps, steps, 0.98, 0.01, ms, 0.0, ms, 100)


def test_verdicts_say_who_wins_and_why() -> None:
    adam, soap = line("adam", 100, 1.0), line("soap", 20, 10.0)
    for steps, word in ((40, "wins"), (50, "ties"), (80, "loses"), (math.inf, "loses")):
        text = training_report.verdicts({"digits": [adam, soap, line("emended-sgd", steps, 2.0)]})
        assert f"**{word}" in text
    text = training_report.verdicts({"digits": [adam, line("emended-sgd", 40, 2.0)]})
    assert "takes 40 steps and Adam 100; a step costs 2.00 times as much, and the ratio of seconds is 0.80" in text
    assert dataclasses.replace(adam, start_ms=50.0).seconds == pytest.approx(adam.seconds + 0.05)
    assert "0.08 (40)" in training_report.summary({"digits": [adam, line("emended-sgd", 40, 2.0)]})


def test_within_twice_is_a_share_of_an_optimizers_own_settings() -> None:
    here = dataclasses.asdict(environment())
    rows = [
        claims.SweepRow(
            **here, optimizer="sgd", lr=lr, damping=None, batch_size=32, seed=0, steps=1, loss=loss, rises=0.0, jump=0.0
        )
        for lr, loss in ((1.0, 0.1), (2.0, 0.2), (4.0, 0.21), (8.0, math.inf))
    ]
    assert claims.best(rows, "sgd", 32).lr == 1.0
    assert claims.within_twice(rows, "sgd", 32, ("sgd",)) == 0.5
    better = dataclasses.replace(rows[0], optimizer="nag", loss=1e-9)  # counts as what is learnt
    assert claims.within_twice([*rows, better], "sgd", 32, ("nag",)) == 0
    assert claims.within_twice([*rows, better], "nag", 32, ("nag",)) == 1


def test_unevenness_is_that_of_the_logarithm() -> None:
    assert claims.unevenness([1.0, 0.1, 0.01]) == pytest.approx(0)
    assert claims.unevenness([1.0, 0.1, 0.1]) == pytest.approx(0.5)
    assert claims.unevenness([1e-9, 0.0]) == 0


def test_the_sweep_follows_the_training_loss() -> None:
    row = claims.sweep_row(Trial(PREFIX + "sgd", 1.0, 0.5), 128)
    assert row.steps == claims.STEPS
    assert row.loss < 0.1
    assert 0 <= row.rises < 0.5
    assert claims.sweep_row(Trial("sgd", 1e4), 128).loss > 1
    assert len(set(claims.points())) == len(claims.points())


def test_readme_figures_stand_between_the_marks() -> None:
    text = report.with_figures(f"a\n{report.BEGIN}\nold\n{report.END}\nb\n", "new")
    assert text == f"a\n{report.BEGIN}\n\nnew\n\n{report.END}\nb\n"
    assert report.with_figures(text, "new") == text
    with pytest.raises(report.UserError, match="marks"):
        report.with_figures("no marks", "new")


def test_the_default_damping_is_searched_once_and_told_beside_the_grid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes = {"emended-sgd": [(0.5, None), (1.0, 30)], "emended-nag": [(0.1, None)]}
    asked = []

    def found(of: Task, method: Method, data: Samples, trials: list[Trial]) -> tuple[Trial, list[Outcome]]:
        asked.append(method.name)
        assert {trial.damping for trial in trials} == {defaults.DAMPING} == {1.0}
        assert len(trials) == 4
        return trials[0], [
            Outcome(
                Run(Trial(method.name, lr, 1.0), 0, test_accuracy=[0.5]), [1.0], steps, "reached" if steps else "budget"
            )
            for lr, steps in outcomes[method.name]
        ]

    monkeypatch.setattr(defaults, "search", found)
    plan = Plan(("digits",), ("sgd", *outcomes), "cpu", tmp_path, 1, 8, 1, 1, tmp_path)
    for _ in range(2):
        defaults.measure(plan)
    assert asked == list(outcomes)
    row = table.read(tmp_path / defaults.FILE, GridRow)[0]
    won = [dataclasses.replace(row, optimizer=name, damping=0.3, steps=40, end="reached") for name in outcomes]
    table.write(won, GridRow, tmp_path / "grid.csv")
    text = "\n".join(defaults.text(tmp_path))
    assert "| emended SGD | 30 (40, 0.3) |" in text
    assert "| emended NAG | not reached (40, 0.3) |" in text
    assert "In 1 of 2 cases the default takes no more steps, and in 1 it misses" in text


def test_readme_and_report_are_what_the_csv_files_give() -> None:
    assert report.main(["--check"]) == 0


def test_a_report_without_results_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "README.md").write_text(f"{report.BEGIN}\n{report.END}")
    assert report.main(["--results", str(tmp_path / "none"), "--root", str(tmp_path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_files_have_a_schema_each() -> None:
    assert FILES["skipped.csv"] is SkipRow
    assert len(set(FILES.values())) == len(FILES)


def _fails(plan: Plan, task: str, optimizer: str) -> list[GridRow]:
    raise ValueError("a peer's bug\nwith details")


def test_an_optimizer_that_raises_is_skipped_with_its_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stages, "_tune", _fails)
    arguments = ["--stage", "tune", "--task", "digits", "--optimizer", "sgd", "--workers", "1", "--out", str(tmp_path)]
    assert main(arguments) == 0
    (row,) = table.read(tmp_path / "skipped.csv", SkipRow)
    assert (row.optimizer, row.reason) == ("sgd", "failed: ValueError: a peer's bug")
    assert row.reason in capsys.readouterr().err
