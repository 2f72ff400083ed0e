# make .venv/.built && .venv/bin/python examples/export_model.py
"""A trained model shipped without this package: reverted, exported, saved, loaded and compared."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import consequentialism as cw


class Digits(nn.Module):
    """A convolutional network for images ``[B, 1, 12, 12]``."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU())
        self.head = nn.Linear(16 * 3 * 3, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(images).flatten(1))


def main() -> None:
    torch.manual_seed(0)
    model = cw.convert(Digits())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
    for _ in range(30):
        labels = torch.randint(4, (32,))
        images = torch.randn(32, 1, 12, 12)
        for image, label in zip(images, labels.tolist(), strict=True):  # a bright quarter
            image[0, label // 2 * 6 :, label % 2 * 6 :][:6, :6] += 2
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
    print(f"loss {loss.item():.3f}")

    model.eval()
    expected = model(images).detach()
    cw.revert(model)  # torch's own layers: whoever loads it needs no consequentialism
    batch = torch.export.Dim("batch", min=2, max=1024)
    program = torch.export.export(model, (images,), dynamic_shapes={"images": {0: batch}})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "digits.pt2")
        torch.export.save(program, path)
        loaded = torch.export.load(path).module()
    operators = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    print(f"operators: {', '.join(sorted(operators))}")
    torch.testing.assert_close(loaded(images), expected)
    torch.testing.assert_close(loaded(images[:5]), expected[:5])
    print("the loaded program computes what the trained model did")


if __name__ == "__main__":
    main()
