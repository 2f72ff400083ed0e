"""docs/scale.md is what its script writes, and the script counts what an optimizer really keeps."""

from __future__ import annotations

import scale
import torch
from torch import nn

import consequentialism as cw


def test_page_is_the_scripts() -> None:
    assert scale.PAGE.read_text() == scale.page()


def test_state_is_as_large_as_counted() -> None:
    """Of a transformer's matrices, blocks among them: bytes of A and S."""
    model = scale.Model("tiny", 2, 320, 1280)
    layers = [nn.Linear(i, o, bias=False) for _ in range(model.layers) for o, i in model.weights()]
    network = nn.ModuleList(layers)
    optimizer = cw.optim.Emended(torch.optim.AdamW(network.parameters()), network, block=scale.BLOCK)
    sum(layer(torch.randn(4, layer.in_features)).square().mean() for layer in layers).backward()
    optimizer.step()
    kept = sum(optimizer.state[layer.weight][key].nbytes for layer in layers for key in ("input_gram", "root"))
    counted = scale.cost(model, 8, 10, "ddp").moments
    assert 0.5 * counted <= kept <= counted  # 320 inputs are cut into equal blocks of 160
