# make .venv-ecosystem/.built && .venv-ecosystem/bin/python examples/timm_models.py
"""timm: a ResNet with emended gradients, a ViT and a ConvNeXt with optimizers in emended coordinates."""

from __future__ import annotations

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import consequentialism as cw

SMALL = {  # the architectures as they are, but narrow, for a CPU's minute; leave the options out for the full ones
    "resnet18": {"channels": (8, 16, 32, 64), "stem_width": 8},
    "vit_tiny_patch16_224": {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3},
    "convnext_atto": {"dims": (8, 16, 32, 64), "depths": (1, 1, 1, 1), "patch_size": 2},
}


def batch(samples: int) -> tuple[Tensor, Tensor]:
    """Noise ``[N, 3, 32, 32]`` with one brighter channel, which is the class."""
    images, labels = torch.randn(samples, 3, 32, 32), torch.randint(3, (samples,))
    images[torch.arange(samples), labels] += 1
    return images, labels


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    """The loss of each step."""
    losses = []
    for _ in range(steps):
        images, labels = batch(16)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    for name, sizes in SMALL.items():
        torch.manual_seed(0)
        model = timm.create_model(name, pretrained=False, num_classes=3, **sizes)
        if name.startswith("resnet"):
            cw.convert(model)
            groups = cw.param_groups(model, lr=0.1, other={"lr": 0.1})
            optimizer: torch.optim.Optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
        else:
            optimizer = cw.optim.Emended(torch.optim.AdamW(model.parameters(), lr=3e-3), model)
        losses = train(model, optimizer, 20)
        print(f"{name}: loss {losses[0]:.3f} to {losses[-1]:.3f}")


if __name__ == "__main__":
    main()
