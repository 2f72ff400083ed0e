# make .venv-ecosystem/.built && .venv-ecosystem/bin/python examples/accelerate_loop.py
"""accelerate's loop and BERT: accumulation, clipping, a scheduler, and a state that is saved and loaded."""

from __future__ import annotations

import tempfile

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset
from transformers import BertConfig, BertForSequenceClassification

import consequentialism as cw


def tiny_bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return BertForSequenceClassification(BertConfig(vocab_size=50, max_position_embeddings=16, num_labels=2, **sizes))


def sentences(count: int) -> TensorDataset:
    """Words ``[N, 12]``; the class says whether word 7 is among them."""
    words = torch.randint(8, 50, (count, 12))
    labels = torch.arange(count) % 2
    words[labels == 1, torch.randint(12, (count // 2,))] = 7
    return TensorDataset(words, labels)


def main() -> None:
    accelerator = Accelerator(gradient_accumulation_steps=2, cpu=not torch.cuda.is_available())
    model = tiny_bert()
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    optimizer = cw.optim.Emended(optimizer, model)  # before prepare, which wraps both
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.2, 1.0, total_iters=5)
    loader = DataLoader(sentences(512), batch_size=16, shuffle=True)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    losses: list[float] = []
    for epoch in range(4):
        for words, labels in loader:
            with accelerator.accumulate(model):
                loss = model(input_ids=words, labels=labels).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            losses.append(loss.item())
        print(f"epoch {epoch + 1}: loss {sum(losses[-10:]) / 10:.3f}")
    with tempfile.TemporaryDirectory() as folder:
        accelerator.save_state(folder)  # the coordinates are part of the optimizer's state
        accelerator.load_state(folder)
    print("saved and loaded")


if __name__ == "__main__":
    main()
