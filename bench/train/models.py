"""The networks that the demo does not have."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def five_layers(inputs: int, hidden: int, classes: int) -> nn.Module:
    """ISAAC Newton's benchmark: five linear layers with ReLU, ``[N, ...]`` to scores ``[N, classes]``."""
    layers: list[nn.Module] = [nn.Flatten(), nn.Linear(inputs, hidden), nn.ReLU()]
    for _ in range(3):
        layers += [nn.Linear(hidden, hidden), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(hidden, classes))


def autoencoder(inputs: int, hidden: int, code: int) -> nn.Module:
    """``[N, inputs]`` through two layers down to ``code`` values, and through two back up to ``[N, inputs]``."""
    return nn.Sequential(
        nn.Linear(inputs, hidden),
        nn.ReLU(),
        nn.Linear(hidden, code),
        nn.ReLU(),
        nn.Linear(code, hidden),
        nn.ReLU(),
        nn.Linear(hidden, inputs),
    )


class Block(nn.Module):
    """Causal self-attention and a two-layer network, each behind a layer norm: ``[N, T, width]``, same shape out."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, t, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # [N, heads, T, width / heads]
        x = x + self.project(attended.transpose(1, 2).reshape(n, t, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """A small transformer that predicts the next character: ``[N, T]`` int64 to scores ``[N, T, characters]``."""

    def __init__(self, characters: int, context: int, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.characters = nn.Embedding(characters, width)
        self.positions = nn.Parameter(0.02 * torch.randn(context, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, characters)
        nn.init.normal_(self.characters.weight, std=0.02)

    def forward(self, text: Tensor) -> Tensor:
        x = self.characters(text) + self.positions[: text.shape[1]]
        return self.head(self.norm(self.blocks(x)))
