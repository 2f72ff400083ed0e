"""The tasks that are trained to the end of a schedule: data, settings, rows that are resumed, and their report."""

from __future__ import annotations

import dataclasses
import io
import itertools
import math
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench import table
from bench.environment import environment
from bench.train import draw, grid_report, head_to_head, recipe_report, recipe_stages, recipes, step_cost
from bench.train.__main__ import main
from bench.train.images import ARCHIVE, CLASSES, RECORD, cifar
from bench.train.models import NanoGPT, ViT, cifar_resnet
from bench.train.recipe_stages import RecipeRow, RecipeTimeRow
from bench.train.recipes import KNOBS, LABELS, RECIPES, START, Setting, optimizers, prepare, rate, start, trials
from bench.train.step_cost import StepCostRow
from bench.train.text import shakespeare
from consequentialism.errors import UserError
from consequentialism.experiments.data import Samples
from consequentialism.experiments.train import class_loss
from consequentialism.optim import Emended, Muon


def small(**changes: object) -> recipes.Recipe:
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    data = Samples(x, (x[:, 0] > 0).long(), x, (x[:, 0] > 0).long())
    made = recipes.Recipe(
        "nanogpt",
        "title",
        lambda folder: None,
        lambda folder: (data, 2),
        lambda classes: nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, classes)),
        8,
        20,
        by_loss=True,
    )
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


def test_text_windows_begin_anywhere_and_predict_the_next_character(tmp_path: Path) -> None:
    text = "abcdefghij" * 30
    (tmp_path / "tinyshakespeare.txt").write_text(text)
    data, characters = shakespeare(tmp_path, 8, 5)
    assert characters == 10
    assert data.train_x.shape == data.train_y.shape == (0.9 * len(text) - 8, 8)
    for x, y in ((data.train_x, data.train_y), (data.test_x, data.test_y)):
        assert torch.equal(x[:, 1:], y[:, :-1])
        assert torch.equal((x + 1) % 10, y)
    assert len(data.test_x) == 5
    with pytest.raises(UserError, match="too short"):
        shakespeare(tmp_path, 8, 50)


def binaries(folder: Path, colour: int = 200) -> None:
    """Two images of each class, the second darker by its label."""
    for name in (*(f"data_batch_{k}.bin" for k in range(1, 6)), "test_batch.bin"):
        records = torch.full((10, RECORD), colour, dtype=torch.uint8)
        records[:, 0] = torch.arange(10)
        records[:, 1:] -= torch.arange(10, dtype=torch.uint8)[:, None] * 10
        (folder / name).write_bytes(bytes(records.flatten().tolist()))


def archive(folder: Path) -> None:
    """One image of each class and split, whose brightness falls with the label."""
    image = pytest.importorskip("PIL.Image")
    with tarfile.open(folder / ARCHIVE, "w:xz") as made:
        for split in ("train", "test"):
            for label, name in enumerate(CLASSES):
                content = io.BytesIO()
                image.new("RGB", (32, 32), (200 - 10 * label,) * 3).save(content, "JPEG")
                member = tarfile.TarInfo(f"{split}/{name}/0000.jpg")
                member.size = content.tell()
                content.seek(0)
                made.addfile(member, content)


@pytest.mark.parametrize("write", [binaries, archive])
def test_images_are_the_first_of_each_class(write: object, tmp_path: Path) -> None:
    write(tmp_path)  # type: ignore[operator]
    data = cifar(tmp_path, 10, 10)
    assert data.train_x.shape == data.test_x.shape == (10, 3, 32, 32)
    assert sorted(data.train_y.tolist()) == list(range(10))
    for x, y in ((data.train_x, data.train_y), (data.test_x, data.test_y)):
        assert y[x.mean((1, 2, 3)).argsort(descending=True)].tolist() == list(range(10))
    assert data.train_x.mean().abs() < 1e-5
    with pytest.raises(UserError, match="of the 100 train images"):
        cifar(tmp_path, 100, 10)


def test_broken_data_are_an_error_of_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither"):
        cifar(tmp_path, 10, 10)
    (tmp_path / ARCHIVE).write_bytes(b"no archive")
    with pytest.raises(UserError, match="cannot be read"):
        cifar(tmp_path, 10, 10)
    binaries(tmp_path)
    (tmp_path / "test_batch.bin").write_bytes(b"12")
    with pytest.raises(UserError, match="2 bytes"):
        cifar(tmp_path, 10, 10)


@pytest.mark.parametrize(
    ("network", "x", "shape"),
    [
        (lambda: NanoGPT(7, 5, 8, 2, 2), torch.zeros(2, 5, dtype=torch.int64), (2, 5, 7)),
        (lambda: ViT(8, 4, 8, 2, 1, 3), torch.zeros(2, 3, 8, 8), (2, 3)),
        (lambda: cifar_resnet(2, 3), torch.zeros(2, 3, 8, 8), (2, 3)),
    ],
)
def test_networks_give_scores(network: object, x: Tensor, shape: tuple[int, ...]) -> None:
    assert network()(x).shape == shape  # type: ignore[operator]


def test_nanogpt_sees_no_later_character() -> None:
    model = NanoGPT(7, 5, 8, 2, 1)
    text = torch.tensor([[1, 2, 3, 4, 5]])
    other = torch.tensor([[1, 2, 3, 6, 6]])
    assert torch.allclose(model(text)[:, :3], model(other)[:, :3])
    assert model.head.weight is model.characters.weight


def test_every_optimizer_has_eight_different_trials_the_package_defaults_first() -> None:
    for recipe, name in itertools.product(RECIPES.values(), START):
        given = list(trials(start(recipe, name), lambda some: some[-1], 8))
        assert len(given) == 8 == len(set(given))
        assert given[0] == dataclasses.replace(START[name], lr=recipe.rates.get(name, START[name].lr))
        assert {field for knob in KNOBS[name] for factors in knob for field in factors} >= {"lr", "weight_decay"}
        assert len(list(trials(start(recipe, name), lambda some: some[0], 3))) == 3
    assert START.keys() == LABELS.keys()


@pytest.mark.parametrize("name", [name for name in START if START[name].placing is not None])
def test_a_search_in_coordinates_begins_with_the_package_defaults(name: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    if name == "coordinates-muon":
        optimizer: Emended = Muon(model, 0.01, aux={"lr": 0.01})
    else:
        inner = torch.optim.SGD if name == "coordinates-nag" else torch.optim.AdamW
        optimizer = Emended(inner(model.parameters(), lr=0.01), model)
    fields = ("damping", "exponent", "refresh_every", "memory", "block")
    assert [getattr(START[name], field) for field in fields] == [getattr(optimizer, field) for field in fields]


@pytest.mark.parametrize(("name", "root"), [("coordinates-adamw", "auto"), ("cholesky-adamw", "cholesky")])
def test_an_optimizers_name_says_its_root(name: str, root: str) -> None:
    model = nn.Linear(3, 4)
    (around,) = recipes.optimizers(model, START[name])
    (before,) = recipes.optimizers(model, dataclasses.replace(START[name], placing="before"))
    assert (around.root, before.keeper.root) == (root, "symmetric")
    assert type(around.optimizer) is torch.optim.AdamW


def test_an_optimizers_name_says_whether_outputs_have_roots() -> None:
    model = nn.Linear(3, 4)
    (own,) = recipes.optimizers(model, START["outputs-adamw"])
    (without,) = recipes.optimizers(model, START["coordinates-adamw"])
    assert (own.output_exponent, own.root, without.outputs) == (1 / 3, "cholesky", None)


def test_other_refreshes_and_blocks_are_for_those_in_coordinates_alone() -> None:
    assert start(RECIPES["vit"], "coordinates-adamw", 25, 128).kind == ("coordinates-adamw", 25, 128)
    assert start(RECIPES["vit"], "coordinates-muon", block=64).kind == ("coordinates-muon", 25, 64)
    assert start(RECIPES["vit"], "muon", 25, 128) == dataclasses.replace(START["muon"], lr=0.004)


def test_a_knob_is_turned_from_the_best_so_far() -> None:
    first = start(RECIPES["nanogpt"], "muon")
    given = list(trials(first, lambda some: min(some, key=lambda s: abs(s.lr - 0.016)), 8))
    assert [s.lr for s in given] == [0.008, 0.004, 0.016, 0.016, 0.016, 0.016, 0.016, 0.0112]
    assert [s.aux_lr for s in given[3:5]] == [0.001, 0.004]


def test_the_rate_warms_up_and_falls_to_a_tenth() -> None:
    rates = [rate(step, 2000) for step in range(2000)]
    assert rates[0] == 0.01
    assert rates[99] == rates[100] == 1
    assert rates[-1] == pytest.approx(0.1, abs=1e-4)
    assert all(a >= b for a, b in itertools.pairwise(rates[100:]))
    assert rate(19, 100) == 1 > rate(18, 100)


@pytest.mark.parametrize("name", START)
def test_every_setting_trains(name: str) -> None:
    if name == "soap":
        pytest.importorskip("pytorch_optimizer")
    recipe = small()
    data, classes = recipe.data(Path())
    model = recipe.problem(classes).build(0)
    step = prepare(model, dataclasses.replace(START[name], lr=0.05), class_loss, recipe, 20, 0)
    losses = [step(data.train_x, data.train_y).item() for _ in range(20)]
    assert losses[-1] < losses[0]


@pytest.mark.usefixtures("even_refreshes")
def test_an_inverse_before_sgd_is_its_root_around_it() -> None:
    """Linear optimizers know no placing between two refreshes: ``g S S`` either way."""
    weights = []
    for placing, exponent in (("around", 0.5), ("before", 1.0)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
        setting = Setting("coordinates-nag", 0.05, None, 0.0, 0.1, exponent, placing, 9, 0.5, 64)  # type: ignore[arg-type]
        (optimizer,) = optimizers(model, setting)
        if placing == "around":
            optimizer.scale = "gradient"
        for _ in range(5):
            optimizer.zero_grad()
            model(torch.randn(12, 5).double()).square().mean().backward()
            optimizer.step()
        weights.append([p.detach().clone() for p in model.parameters()])
    for one, other in zip(*weights, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_before_leaves_the_parameters_beside_muon_alone() -> None:
    (optimizer,) = optimizers(
        nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 4), nn.Linear(4, 3)),
        dataclasses.replace(START["coordinates-muon"], placing="before"),
    )
    assert [unit.name for unit in optimizer.keeper.units] == ["0", "1"]


def test_images_are_mirrored_at_random() -> None:
    images = torch.arange(64.0).view(16, 1, 2, 2)
    found = recipes.mirrored(images, torch.Generator().manual_seed(0))
    kept = (found == images).flatten(1).all(1)
    assert 0 < kept.sum() < 16
    assert torch.equal(found[~kept], images[~kept].flip(-1))


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> recipe_stages.Bench:
    monkeypatch.setitem(RECIPES, "nanogpt", small())
    names = ("adamw", "coordinates-adamw")
    return recipe_stages.Bench(tmp_path, tmp_path, "cpu", ("nanogpt",), names, None, 1, 2, 1)


def test_stages_leave_rows_that_are_not_made_again(bench: recipe_stages.Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe_stages.tune(bench)
    recipe_stages.run(bench)
    recipe_stages.cost(bench)
    rows = table.read(bench.out / recipe_stages.FILE, RecipeRow)
    assert [(row.optimizer, row.seed) for row in rows] == [
        *[(name, recipe_stages.SEARCH_SEED) for name in bench.optimizers for _ in range(2)],
        *[(name, 0) for name in bench.optimizers],
    ]
    assert [len(row.curve()) for row in rows] == [2] * 4 + [21] * 2  # of a search's trials only the end counts
    assert all(row.curve()[-1][0] == row.steps == 20 for row in rows)
    assert {row.ratio for row in table.read(bench.out / recipe_stages.TIMES, RecipeTimeRow) if row.optimizer == "adamw"}

    def no(*_: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(recipe_stages, "_train", no)
    recipe_stages.tune(bench)
    recipe_stages.run(bench)
    text = "\n".join(recipe_report.text(bench.out, "pictures"))
    assert "| AdamW in coordinates | 10, 256 | " in text


def test_each_refresh_and_block_is_searched_run_and_timed_apart(bench: recipe_stages.Bench) -> None:
    for some in (bench, dataclasses.replace(bench, refresh_every=5, block=2)):
        recipe_stages.tune(some)
    kinds = [("adamw", None, None), ("coordinates-adamw", 10, 256), ("coordinates-adamw", 5, 2)]
    assert [setting.kind for setting in recipe_stages.searched(bench, "nanogpt")] == kinds
    recipe_stages.run(bench)
    recipe_stages.cost(bench)
    rows = table.read(bench.out / recipe_stages.FILE, RecipeRow)
    assert sorted(row.setting.kind for row in rows if row.seed == 0) == sorted(kinds)
    assert [row.kind for row in table.read(bench.out / recipe_stages.TIMES, RecipeTimeRow)] == kinds
    text = "\n".join(recipe_report.text(bench.out, "pictures"))
    assert "| AdamW in coordinates | 10, 256 | " in text
    assert "| AdamW in coordinates | 5, 2 | " in text


def test_a_run_that_diverges_is_worst(bench: recipe_stages.Bench) -> None:
    row = recipe_stages.row_of(bench, "nanogpt", dataclasses.replace(START["nag"], lr=1e30), 0)
    assert row.score == math.inf
    assert table.read(bench.out / recipe_stages.FILE, RecipeRow) == [row]


def row(name: str, scores: list[float], seed: int = 0, steps: int = 20, **changes: object) -> RecipeRow:
    setting = dataclasses.asdict(dataclasses.replace(START[name], **changes))  # type: ignore[arg-type]
    text = " ".join(f"{score:g}" for score in scores)
    here = dataclasses.asdict(environment())
    return RecipeRow(
        **here, task="nanogpt", **setting, seed=seed, steps=steps, score=scores[-1], train_loss=1.0, scores=text
    )


def test_readme_says_how_soon_each_optimizer_in_coordinates_is_where_the_same_one_ends(tmp_path: Path) -> None:
    assert recipe_report.overview(tmp_path) == ""
    plain, faster = [2 - k / 20 for k in range(21)], [2 - k / 10 for k in range(21)]
    ends = {"adamw": plain, "coordinates-adamw": faster, "muon": faster, "coordinates-muon": faster}
    ends["cholesky-adamw"] = ends["outputs-adamw"] = [2 - k / 5 for k in range(21)]
    rows = [row(name, scores, seed) for name, scores in ends.items() for seed in (recipe_stages.SEARCH_SEED, 0, 1)]
    rows += [row(name, scores, 0, steps=40) for name, scores in ends.items()]  # of a longer schedule one seed alone
    table.write(rows, RecipeRow, tmp_path / recipe_stages.FILE)
    assert recipe_report.overview(tmp_path) == ""  # nobody has timed it
    here = dataclasses.asdict(environment())
    times = [
        RecipeTimeRow(
            **here,
            task="nanogpt",
            **dict(zip(("optimizer", "refresh_every", "block"), START[name].kind, strict=True)),
            ms=1.0,
            ratio=2.0 if "-" in name else 1.0,
            blocks=1,
        )
        for name in ends
    ]
    table.write(times, RecipeTimeRow, tmp_path / recipe_stages.TIMES)
    text = recipe_report.overview(tmp_path)
    assert ", 20 steps | 1.000 / 0.000 | 0.50 (1.00) | 0.000 / 0.000 | 1.00 (2.00) |" in text
    assert ', 20 steps, `root="cholesky"` | 1.000 / -2.000 | 0.25 (0.50) |  |  |' in text
    assert ', 20 steps, `root="cholesky"`, `output_exponent=1/3` | 1.000 / -2.000 | 0.25 (0.50) |  |  |' in text


def test_a_share_is_where_the_line_between_evaluations_is_as_good_as_the_others_end() -> None:
    falling = [2 - k / 20 for k in range(21)]
    slow, fast = row("adamw", falling), row("muon", [2 - k / 10 for k in range(21)])
    recipe = RECIPES["nanogpt"]
    assert recipe_report.share(recipe, [fast], [slow]) == 0.5
    assert recipe_report.share(recipe, [slow], [slow]) == 1
    assert recipe_report.share(recipe, [slow], [fast]) == math.inf
    assert recipe_report.share(recipe, [slow], [row("muon", [9.0, 1.3625])]) == pytest.approx(
        0.6375
    )  # between two of twenty
    assert recipe_report.share(recipe, [row("muon", [1.0] * 21)], [slow]) == 0  # from the start
    assert recipe_report.share(
        RECIPES["vit"], [row("muon", [k / 20 for k in range(21)])], [row("adamw", [0.0, 0.275])]
    ) == (pytest.approx(0.275))
    assert math.isnan(recipe_report.share(recipe, [slow], [row("muon", falling, seed=1)]))


def test_a_best_value_at_the_border_of_the_search_is_told() -> None:
    rows = [
        row("muon", [2.0, score], recipe_stages.SEARCH_SEED, lr=lr, aux_lr=aux)
        for score, lr, aux in ((1.5, 0.004, 0.002), (1.2, 0.008, 0.002), (1.1, 0.008, 0.004), (1.3, 0.016, 0.002))
    ]
    assert recipe_report.borders(rows, START["muon"].kind) == ["auxiliary lr 0.004"]
    assert recipe_report.borders(rows[:2], START["muon"].kind) == ["lr 0.008"]
    assert recipe_report.borders(rows[:1], START["muon"].kind) == []


def test_the_grid_holds_every_point_once() -> None:
    settings = list(head_to_head.settings())
    head = 2 * len(head_to_head.EXPONENTS) * len(head_to_head.DAMPINGS) * len(recipes.PLACINGS)
    rest = 2 * sum(len(values) - 1 for values in (head_to_head.REFRESHES, head_to_head.MEMORIES, head_to_head.BLOCKS))
    assert len(settings) == len(set(settings)) == 2 + head + rest
    assert set(START.values()) >= {s for s in settings if s.placing is None}
    assert all(base in settings for base in head_to_head.BASE.values())
    for name, base in head_to_head.BASE.items():  # the default, but for how it is refreshed and cut
        assert dataclasses.replace(START[name], refresh_every=10, block=256) == base


@pytest.mark.parametrize(("lowest", "found"), [(-3.0, 0.0625), (0.2, 0.5), (-0.4, 0.5), (1.9, 2.0), (3.0, 4.0)])
def test_the_walk_ends_in_the_valley(lowest: float, found: float) -> None:
    tried: dict[float, float] = {}

    def score(lr: float) -> float:
        tried[lr] = abs(math.log2(lr / 0.5) - lowest)
        return tried[lr]

    assert head_to_head.walk(0.5, score) == found
    assert {found / 2, found, found * 2, 0.25, 0.5, 1.0, 2.0} <= set(tried)


def test_the_walk_looks_behind_a_small_hill() -> None:
    scores = {0.25: 2.0, 0.5: 1.0, 1.0: 1.1, 2.0: 0.9, 4.0: 1.5}
    assert head_to_head.walk(0.5, lambda lr: scores[lr]) == 2.0


def test_the_grid_is_measured_at_its_rates_and_goes_on_where_it_stood(
    bench: recipe_stages.Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_to_head, "EXPONENTS", (0.5,))
    monkeypatch.setattr(head_to_head, "DAMPINGS", (0.03,))
    for name in ("REFRESHES", "MEMORIES", "BLOCKS"):
        monkeypatch.setattr(head_to_head, name, ())
    head_to_head.measure(bench)
    rows = table.read(bench.out / head_to_head.FILE, RecipeRow)
    runs = [row for row in rows if row.seed == 0]
    assert [(row.optimizer, row.placing) for row in runs] == [
        ("adamw", None),
        *(("coordinates-adamw", placing) for placing in recipes.PLACINGS),
    ]
    for run in runs:
        walked = {row.lr: row.score for row in rows if _same_walk(row, run)}
        assert min(walked, key=lambda lr: walked[lr]) == run.lr
        assert {run.lr / 2, run.lr, run.lr * 2} <= set(walked)
    monkeypatch.setattr(recipe_stages, "_train", None)
    head_to_head.measure(bench)
    assert table.read(bench.out / head_to_head.FILE, RecipeRow) == rows


def _same_walk(row: RecipeRow, run: RecipeRow) -> bool:
    mine, its = ((one.steps, one.optimizer, one.placing) for one in (row, run))
    return row.seed == recipe_stages.SEARCH_SEED and mine == its


def test_of_the_grid_those_runs_count_that_have_the_best_rate_of_the_longest_walk(tmp_path: Path) -> None:
    rows = [*walk_rows(0.002), *walk_rows(0.008, steps=10)]
    rows += [*walk_rows(0.001, exponent=0.25)[:-1], *walk_rows(0.004, steps=10, exponent=0.25)]  # the first was cut
    rows += [grid_row(1.0, 0, lr=0.004), grid_row(1.1, 0, lr=0.002), grid_row(1.2, 0, lr=0.004, exponent=0.25)]
    rows += [grid_row(1.3, 0, lr=0.001, exponent=0.25), grid_row(1.4, 0, exponent=1.0)]  # of the last nobody walked
    table.write([*rows, grid_row(0.1, 0, steps=10, lr=0.002)], RecipeRow, tmp_path / head_to_head.FILE)
    found = grid_report.rows(tmp_path)
    assert [(run.score, run.lr) for run in found] == [(1.1, 0.002), (1.2, 0.004)]
    assert head_to_head.runs(found, "coordinates-adamw") == found[:1]
    assert head_to_head.runs(found, "coordinates-adamw", damping=0.1) == []
    text = "\n".join(grid_report.text(tmp_path, "pictures"))
    assert "| around, 0.5 | 0.002 |  | 1.100 |" in text
    assert "| around, 0.25 | 0.004 (10 steps) |  | 1.200 |" in text


def walk_rows(best: float, name: str = "coordinates-adamw", **changes: Any) -> list[RecipeRow]:
    """The walk of an optimizer's grid that ends at a rate."""
    changes = ({"damping": head_to_head.TUNED_DAMPING} if name in head_to_head.BASE else {}) | changes
    tried: list[RecipeRow] = []

    def score(lr: float) -> float:
        tried.append(grid_row(1 + abs(math.log2(lr / best)), recipe_stages.SEARCH_SEED, name, lr=lr, **changes))
        return tried[-1].score

    head_to_head.walk(START[name].lr, score)
    return tried


def grid_row(score: float, seed: int, name: str = "coordinates-adamw", **changes: object) -> RecipeRow:
    base = head_to_head.BASE.get(name, START[name])
    return row(name, [2.0, score], seed, **({"refresh_every": base.refresh_every, "block": base.block} | changes))


def test_the_report_of_the_grid_gives_means_over_seeds_that_are_complete_and_divergence(tmp_path: Path) -> None:
    point = grid_row
    walks = [run for name in (*head_to_head.BASE, "adamw", "muon") for run in walk_rows(START[name].lr, name)]
    walks += [*walk_rows(0.004, placing="before"), *walk_rows(0.008, exponent=1.0)]
    rows = [point(1.4, seed, name) for name in ("adamw", "muon") for seed in (0, 1)]
    rows += [point(1.0 + 0.5 * seed, seed, placing="before") for seed in (0, 1)]
    rows += [point(1.6, seed) for seed in (0, 1)] + [point(1.3 + seed, seed, damping=1.0) for seed in (0, 1)]
    rows += [point(math.inf if seed else 1.0, seed, exponent=1.0, lr=0.008) for seed in (0, 1)]
    rows += [point(1.2, seed, "coordinates-muon") for seed in (0, 1)]
    table.write(walks + rows, RecipeRow, tmp_path / head_to_head.FILE)
    text = "\n".join(grid_report.text(tmp_path, "pictures"))
    assert "mean of 2 seeds" in text
    assert "| before, 0.5 | 0.004 |  | 1.250 |  |  |  |" in text
    assert "| around, 0.5 | 0.004 |  | 1.600 |  |  | 1.800 |" in text
    assert "| around, 1 | 0.008 |  | diverged |" in text
    assert "AdamW alone: 1.400. Best: before, exponent 0.5, damping 0.03, 1.250, within the grid." in text
    assert "damping 0.03: 1.600; 1 of the other points are better." in text
    table.write(walks + rows[:-1], RecipeRow, tmp_path / head_to_head.FILE)  # a seed that is not complete waits
    text = "\n".join(grid_report.text(tmp_path, "pictures"))
    assert "one seed" in text
    assert "| around, 0.5 | 0.004 |  | 1.600 |  |  | 1.300 |" in text
    assert len(draw.grid(grid_report.rows(tmp_path)).axes) == 4
    begun = [run for run in walks + rows if run.optimizer in ("muon", "coordinates-muon")]
    table.write(begun, RecipeRow, tmp_path / head_to_head.FILE)
    assert "AdamW in coordinates: placing" not in "\n".join(grid_report.text(tmp_path, "pictures"))
    assert len(draw.grid(grid_report.rows(tmp_path)).axes) == 2


def test_the_cost_of_a_step_counts_dear_steps_as_often_as_they_come(tmp_path: Path) -> None:
    pytest.importorskip("pytorch_optimizer")
    assert recipe_report.step_costs(tmp_path) == ""
    step_cost.measure(tmp_path, 1, "cpu", ((64, 16),))
    rows = table.read(tmp_path / step_cost.FILE, StepCostRow)
    assert [found.optimizer for found in rows] == list(step_cost.LABELS)
    for found in rows:
        share = 1 / {"adamw": 3, "muon": 3, "coordinates-muon": 25}.get(found.optimizer, 10)
        assert found.ms == pytest.approx((1 - share) * found.ordinary_ms + share * found.dear_ms, rel=1e-3)
    assert {found.ratio for found in rows if found.optimizer in ("adamw", "muon")} == {1.0}
    assert "N = 64, width 16" in "\n".join(recipe_report.text(tmp_path, ""))
    of = {row.optimizer: f"{row.ratio:.2f}" for row in rows}
    adamw, muon = of["coordinates-adamw"], of["coordinates-muon"]
    assert f" costs {adamw} times AdamW's and {muon} times Muon's at 64 rows and width 16." in recipe_report.step_costs(
        tmp_path
    )
    step_cost.measure(tmp_path, 1, "cpu", ((64, 16), (64, 8)))
    assert table.read(tmp_path / step_cost.FILE, StepCostRow)[: len(rows)] == rows  # measured once


def test_the_cost_of_a_step_counts_refreshes_by_the_defaults() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4))
    adamw, muon = (
        Emended(torch.optim.AdamW(model.parameters()), model),
        Muon(model, 0.01, aux={"lr": 0.01}),
    )
    found = {"coordinates-adamw": adamw.refresh_every, "coordinates-muon": muon.refresh_every}
    assert found == {name: period for name, period in step_cost.PERIODS.items() if name in found}


def test_tasks_without_data_are_skipped_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for extra, words in (([], "no --data folder"), (["--data", str(tmp_path)], "no tinyshakespeare.txt")):
        # Of digits no grid is there to run, which comes after the tasks are looked at.
        assert main(["--task", "nanogpt", "--task", "digits", "--stage", "run", *extra, "--out", str(tmp_path)]) == 2
        said = capsys.readouterr().err
        assert f"skipped: nanogpt: {words}" in said
        assert "grid.csv: cannot be read" in said
    assert not (tmp_path / recipe_stages.FILE).exists()
