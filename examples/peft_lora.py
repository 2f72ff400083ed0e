# make .venv-ecosystem/.built && .venv-ecosystem/bin/python examples/peft_lora.py
"""PEFT's LoRA in both orders: adapters over converted layers, and conversion of a model that has adapters already."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import consequentialism as cw


def tiny_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


def with_adapters(model: nn.Module) -> nn.Module:
    return get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["c_attn"], fan_in_fan_out=True))


def is_adapter(module: nn.Module, name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name


def build(order: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model with adapters, and the optimizer that steps them alone."""
    model: nn.Module = tiny_gpt2()
    if order == "convert, then adapters":
        cw.convert(model, filter_fn=lambda module, name: name.startswith("transformer.h."))
    model = with_adapters(model)  # freezes all but the adapters
    if order != "emended coordinates":
        cw.convert(model, filter_fn=is_adapter)  # adapters are layers too: their own inputs, their own Grams
    adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if order == "emended coordinates":
        return model, cw.optim.Emended(torch.optim.AdamW(adapters, lr=1e-2), model, filter_fn=is_adapter)
    return model, torch.optim.SGD(adapters, lr=1.0)


def main() -> None:
    codes = torch.tensor(list(Path(argparse.__file__).read_bytes()))
    for order in ("convert, then adapters", "adapters, then convert", "emended coordinates"):
        model, optimizer = build(order)
        losses = []
        for _ in range(10):
            rows = torch.stack([codes[i : i + 32] for i in torch.randint(len(codes) - 32, (8,))])
            optimizer.zero_grad()
            loss = model(input_ids=rows, labels=rows).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        cw.revert(model)
        merged = model.merge_and_unload()  # type: ignore[operator]
        print(f"{order}: loss {losses[0]:.3f} to {losses[-1]:.3f}; merged: {type(merged).__name__}")


if __name__ == "__main__":
    main()
