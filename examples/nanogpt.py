# make .venv/.built && .venv/bin/python examples/nanogpt.py [TEXT-FILE]
"""A small character GPT trained by Muon in emended coordinates, as nanoGPT trains one: cosine schedule and clipping."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import consequentialism as cw


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.c_attn(self.norm1(x)).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.c_proj(mixed)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    def __init__(self, symbols: int, context: int, width: int = 64, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(symbols, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, symbols, bias=False)
        for table in (self.tokens, self.places):
            nn.init.normal_(table.weight, std=0.02)
        self.head.weight = self.tokens.weight  # tied, as GPT-2's

    def forward(self, indices: Tensor) -> Tensor:
        places = torch.arange(indices.shape[1], device=indices.device)
        return self.head(self.norm(self.blocks(self.tokens(indices) + self.places(places))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", nargs="?", default=argparse.__file__, help="a text file; default: a module's source")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--lr", type=float, default=0.02)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    text, context, batch = Path(arguments.text).read_text(), 64, 12
    symbols = sorted(set(text))
    codes = torch.tensor([symbols.index(character) for character in text])
    training, held_out = codes[: len(codes) * 9 // 10], codes[len(codes) * 9 // 10 :]

    def windows(source: Tensor) -> Tensor:
        return torch.stack([source[i : i + context + 1] for i in torch.randint(len(source) - context, (batch,))])

    model = GPT(len(symbols), context)
    # Hidden matrices by Muon, embeddings, head and norms by AdamW; q, k and v are orthogonalised one by one.
    optimizer = cw.optim.Muon(model, lr=arguments.lr, aux={"lr": 2e-3}, qkv=("c_attn",))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.1 + 0.45 * (1 + math.cos(math.pi * step / arguments.steps))
    )
    for step in range(arguments.steps):
        optimizer.zero_grad()
        rows = windows(training)
        loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 19:
            print(f"step {step + 1}: training loss {loss.item():.3f}")
    model.eval()
    with torch.no_grad():
        rows = windows(held_out)
        print(f"held-out loss {F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten()).item():.3f}")


if __name__ == "__main__":
    main()
