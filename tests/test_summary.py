"""`summary`: what is emended and what is not, and why."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import consequentialism as cw


def model() -> nn.Module:
    return nn.ModuleDict(
        {
            "a": nn.Linear(5, 3),
            "b": nn.Linear(3, 2, bias=False),
            "conv": nn.Conv2d(2, 3, 2),
            "norm": nn.LayerNorm(7),
            "odd": nn.Bilinear(2, 3, 4),
            "later": nn.LazyLinear(3),
        }
    )


def rows(of: nn.Module) -> dict[tuple[str, str], tuple[int, int, str]]:
    return {(row.kind, row.state): (row.layers, row.parameters, row.first) for row in cw.summary(of).rows}


@pytest.mark.filterwarnings("ignore:.*left alone")
def test_layers_are_counted_by_class_and_reason() -> None:
    made = model()
    fresh = {
        ("Linear", "not converted"): (2, 24, "a"),
        ("Conv2d", "not converted"): (1, 27, "conv"),
        ("Bilinear", "Bilinear has no emended form"): (1, 28, "odd"),
        ("LazyLinear", "LazyLinear has no shape yet; convert after its first forward"): (1, 0, "later"),
    }
    assert rows(made) == fresh
    table = cw.summary(cw.convert(made, filter_fn=lambda module, name: name != "b"))
    assert {(row.kind, row.state): (row.layers, row.parameters) for row in table.rows} == {
        ("Linear", "emended"): (1, 18),
        ("Conv2d", "emended"): (1, 27),
        ("Linear", "not converted"): (1, 6),
        ("Bilinear", "Bilinear has no emended form"): (1, 28),
        ("LazyLinear", "LazyLinear has no shape yet; convert after its first forward"): (1, 0),
    }
    assert (table.emended_layers, table.emended_parameters, table.parameters) == (2, 45, 93)
    assert "emended layers: 2 || emended params: 45 || all params: 93 || emended%: 48.3871" in str(table)
    assert len(str(table).splitlines()) == 7
    assert rows(cw.revert(made)) == fresh


def test_a_layer_made_plain_after_convert_is_seen() -> None:
    made = cw.convert(nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 2)))
    made[1] = nn.Linear(3, 4)
    assert rows(made) == {("Linear", "emended"): (1, 18, "0"), ("Linear", "not converted"): (1, 16, "1")}


@pytest.mark.filterwarnings("ignore:.*left alone")
def test_a_tied_parameter_counts_once() -> None:
    made = nn.Sequential(nn.Embedding(7, 3), nn.Linear(3, 7, bias=False))
    made[1].weight = made[0].weight
    table = cw.summary(made)
    assert [row.parameters for row in table.rows] == [21, 0]
    assert table.parameters == 21


@pytest.mark.filterwarnings("ignore:.*left alone")
def test_layers_that_an_optimizer_steps_in_coordinates() -> None:
    made = model()
    cw.convert(made, filter_fn=lambda module, name: name == "conv")
    made["lstm"] = nn.LSTM(2, 1)
    plain, adamw = rows(made), torch.optim.AdamW([p for name, p in made.named_parameters() if name[:5] != "later"])
    optimizer = cw.optim.Emended(adamw, made, filter_fn=lambda module, name: name in ("a", "lstm"))
    by = "stepped in coordinates by Emended(AdamW)"
    partly = f"{by}, without LSTM's recurrent weights and upper layers: their inputs arise inside"
    assert rows(made) == {
        ("Conv2d", "emended"): (1, 27, "conv"),
        ("Linear", by): (1, 18, "a"),
        ("LSTM", partly): (1, 20, "lstm"),
        ("Linear", "not converted"): (1, 6, "b"),
        ("Bilinear", "Bilinear has no emended form"): (1, 28, "odd"),
        ("LazyLinear", "LazyLinear has no shape yet; convert after its first forward"): (1, 0, "later"),
    }
    table = cw.summary(made)
    assert (table.layers_in_coordinates, table.parameters_in_coordinates, table.emended_layers) == (2, 38, 1)
    assert "layers in coordinates: 2 || params in coordinates: 38\nemended layers: 1 ||" in str(table)
    assert rows(copy.deepcopy(made)) == plain, "a copy belongs to no optimizer"
    del optimizer, adamw
    assert rows(made) == plain
    three = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 3), nn.Linear(3, 2))
    muon = cw.optim.Muon(three, 0.1, aux={"lr": 0.1})
    assert set(rows(three)) == {("Linear", "stepped in coordinates by Muon"), ("Linear", "not converted")}
    del muon


@pytest.mark.filterwarnings("ignore:.*left alone")
def test_a_tied_weight_counts_where_it_is_stepped_in_coordinates() -> None:
    made = nn.Sequential(nn.Embedding(7, 3), nn.Linear(3, 7, bias=False))
    made[1].weight = made[0].weight
    optimizer = cw.optim.Emended(torch.optim.SGD(made.parameters(), 0.1), made)
    table = cw.summary(made)
    assert [(row.kind, row.parameters) for row in table.rows] == [("Linear", 21), ("Embedding", 0)]
    assert (table.layers_in_coordinates, table.parameters_in_coordinates) == (1, 21)
    del optimizer


def test_a_model_without_layers_and_what_is_no_model() -> None:
    assert "all params: 0 || emended%: 0.0000" in str(cw.summary(nn.ReLU()))
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
        cw.summary([nn.Linear(2, 2)])  # type: ignore[arg-type]
