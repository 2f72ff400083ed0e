# make .venv-ecosystem/.built && .venv-ecosystem/bin/python examples/hf_trainer.py
"""Hugging Face's Trainer and GPT-2, once with emended gradients and once with an optimizer in emended coordinates."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import consequentialism as cw


class Windows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """A file's bytes, cut into windows that are their own labels."""

    def __init__(self, path: str, context: int) -> None:
        codes = torch.tensor(list(Path(path).read_bytes()))
        self.windows = codes[: len(codes) // context * context].view(-1, context)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.windows[index], "labels": self.windows[index]}


def tiny_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


def train(form: str, steps: int, folder: str, **options: Any) -> float:
    """Train from scratch in one of the two forms; the mean training loss."""
    model = tiny_gpt2()
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    if form == "convert":
        cw.convert(model, filter_fn=lambda module, name: name.startswith("transformer.h."))  # Conv1D; the head is tied
    else:
        optimizer = cw.optim.Emended(optimizer, model)
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        lr_scheduler_type="cosine",
        warmup_steps=2,
        max_grad_norm=1.0,
        logging_steps=5,
        save_strategy="no",
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=True,
        **options,
    )
    trainer = Trainer(model, arguments, train_dataset=Windows(argparse.__file__, 32), optimizers=(optimizer, None))
    return float(trainer.train().training_loss)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for form in ("convert", "emended"):
            print(f"{form}: mean training loss {train(form, arguments.steps, folder):.3f}")


if __name__ == "__main__":
    main()
