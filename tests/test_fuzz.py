"""Some hundred of the configurations of tools/fuzz.py; `python tools/fuzz.py --count 10000` runs more."""

from __future__ import annotations

from dataclasses import replace

import fuzz
import pytest
import torch

pytestmark = pytest.mark.filterwarnings("ignore")  # configurations of every kind, unwise ones too
PART = 60


@pytest.mark.parametrize("first", range(0, 300, PART))
def test_random_configurations(first: int) -> None:
    counts, misses = fuzz.run(0, range(first, first + PART))
    assert not misses, "\n".join(misses)
    assert len(counts) == len(set(fuzz.KINDS))


def test_a_configuration_is_repeated_alone() -> None:
    assert fuzz.configuration(3, 17) == fuzz.configuration(3, 17) != fuzz.configuration(4, 17)


def test_a_wrong_gradient_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layer has another damping than the oracle is asked for."""
    config = next(c for c in (fuzz.configuration(0, i) for i in range(200)) if c.kind == "linear" and c.wanted[1])
    shape = {"leading": (20,), "inputs": 12, "outputs": 5, "bias": True}
    config = replace(config, shape=shape, way="backward", dtype=torch.float32, options={"damping": 1.0})
    assert not fuzz.misses_of(config)
    own = fuzz.cw.Linear
    monkeypatch.setattr(fuzz.cw, "Linear", lambda *args, damping, **options: own(*args, damping=1.01, **options))
    assert any("dw: relative error" in miss for miss in fuzz.misses_of(config))
