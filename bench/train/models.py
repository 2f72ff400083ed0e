"""The networks that the demo does not have."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from consequentialism.experiments.models import ResidualBlock


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
    """Self-attention and a two-layer network, each behind a layer norm: ``[N, T, width]``, same shape out."""

    def __init__(self, width: int, heads: int, bias: bool = True, causal: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.norm1 = nn.LayerNorm(width, bias=bias)
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.project = nn.Linear(width, width, bias=bias)
        self.norm2 = nn.LayerNorm(width, bias=bias)
        self.up = nn.Linear(width, 4 * width, bias=bias)
        self.down = nn.Linear(4 * width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        n, t, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, t, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)  # [N, heads, T, width / heads]
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


class NanoGPT(nn.Module):
    """A transformer as nanoGPT trains it: no biases, the head's weight that of the embedding, all weights begin with a
    deviation of 0.02, those that end a residual branch with less. ``[N, T]`` int64 to scores ``[N, T, characters]``."""

    def __init__(self, characters: int, context: int, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.characters = nn.Embedding(characters, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads, bias=False) for _ in range(layers)))
        self.norm = nn.LayerNorm(width, bias=False)
        self.head = nn.Linear(width, characters, bias=False)
        self.head.weight = self.characters.weight
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                ends_branch = name.endswith(("project.weight", "down.weight"))
                nn.init.normal_(weight, std=0.02 / (math.sqrt(2 * layers) if ends_branch else 1))

    def forward(self, text: Tensor) -> Tensor:
        places = torch.arange(text.shape[1], device=text.device)
        return self.head(self.norm(self.blocks(self.characters(text) + self.positions(places))))


class ViT(nn.Module):
    """A small vision transformer that averages over patches: ``[N, 3, side, side]`` to scores ``[N, classes]``."""

    def __init__(self, side: int, patch: int, width: int, heads: int, layers: int, classes: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, stride=patch)
        self.positions = nn.Parameter(0.02 * torch.randn((side // patch) ** 2, width))
        self.blocks = nn.Sequential(*(Block(width, heads, causal=False) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).mT + self.positions  # [N, patches, width]
        return self.head(self.norm(self.blocks(x)).mean(1))


def cifar_resnet(channels: int, classes: int) -> nn.Module:
    """A small residual network with batch norm for images of 32 pixels: ``channels``, then twice and four times as
    many, one block each, ``[N, 3, H, W]`` to scores ``[N, classes]``."""
    return nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        ResidualBlock(channels, channels, 1),
        ResidualBlock(channels, 2 * channels, 2),
        ResidualBlock(2 * channels, 4 * channels, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * channels, classes),
    )
