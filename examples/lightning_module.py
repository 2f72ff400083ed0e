# make .venv-ecosystem/.built && .venv-ecosystem/bin/python examples/lightning_module.py
"""Lightning: the optimizer in emended coordinates is what `configure_optimizers` returns; a checkpoint goes on."""

from __future__ import annotations

import tempfile
from pathlib import Path

import lightning
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import consequentialism as cw


class Classifier(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Conv2d(1, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4)
        )

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self.network(images), labels)
        self.log("loss", loss, prog_bar=False, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return cw.optim.Emended(torch.optim.AdamW(self.parameters(), lr=3e-3), self)


def images(count: int) -> TensorDataset:
    """Noise ``[N, 1, 12, 12]`` with one bright quarter, which is the class."""
    pictures, labels = torch.randn(count, 1, 12, 12), torch.arange(count) % 4
    for picture, label in zip(pictures, labels.tolist(), strict=True):
        picture[0, label // 2 * 6 :, label % 2 * 6 :][:6, :6] += 1
    return TensorDataset(pictures, labels)


def trainer(folder: str, epochs: int) -> lightning.Trainer:
    return lightning.Trainer(
        max_epochs=epochs,
        accelerator="auto",
        default_root_dir=folder,
        gradient_clip_val=1.0,
        accumulate_grad_batches=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def main() -> None:
    lightning.seed_everything(0)
    loader = DataLoader(images(512), batch_size=32, shuffle=True)
    with tempfile.TemporaryDirectory() as folder:
        first = trainer(folder, 2)
        first.fit(Classifier(), loader)
        print(f"2 epochs: loss {first.callback_metrics['loss']:.3f}")
        path = Path(folder, "two-epochs.ckpt")
        first.save_checkpoint(path)
        second = trainer(folder, 4)
        second.fit(Classifier(), loader, ckpt_path=path)
        print(f"4 epochs: loss {second.callback_metrics['loss']:.3f}")


if __name__ == "__main__":
    main()
