"""CIFAR-10 from a folder: the usual binaries, or an archive of JPEGs by class."""

from __future__ import annotations

import functools
import io
import tarfile
from pathlib import Path

import torch
from torch import Tensor

from consequentialism.errors import UserError, need
from consequentialism.experiments.data import Samples

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
ARCHIVE = "cifar10-jpeg.tar.xz"
BINARIES = "cifar-10-batches-bin"
SIDE = 32
RECORD = 1 + 3 * SIDE * SIDE  # bytes of a binary's record: the label, then red, green and blue


def find_cifar(folder: Path) -> str | None:
    """What of the data is missing in the folder, or None."""
    if any((place / "data_batch_1.bin").is_file() for place in (folder, folder / BINARIES)):
        return None
    if (folder / ARCHIVE).is_file():
        return None
    return f"neither {BINARIES} nor {ARCHIVE} is in {folder}"


@functools.cache
def cifar(folder: Path, train: int, test: int) -> Samples:
    """The first images of each class, the same number of all.

    Args:
        folder: That has the binaries, their folder, or the archive.
        train: Training images in all, a multiple of 10.
        test: Test images in all, a multiple of 10.

    Returns:
        Images ``[N, 3, 32, 32]`` and labels ``[N]``, standardised with the mean and the deviation that each channel has
        in the training images; both shuffled with a fixed seed.

    Raises:
        UserError: There are no data, or too few.
    """
    missing = find_cifar(folder)
    if missing is not None:
        raise UserError(missing)
    binaries = next((p for p in (folder, folder / BINARIES) if (p / "data_batch_1.bin").is_file()), None)
    counts = {"train": train // len(CLASSES), "test": test // len(CLASSES)}
    read = _archive(folder / ARCHIVE, counts) if binaries is None else _binaries(binaries, counts)
    pixels, labels = read["train"]
    deviation, mean = torch.std_mean(pixels, dim=(0, 2, 3), keepdim=True)
    found = []
    for seed, (images, classes) in enumerate(((pixels, labels), read["test"])):
        order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(seed))
        found += [((images - mean) / deviation)[order], classes[order]]
    return Samples(*found)


def _archive(path: Path, counts: dict[str, int]) -> dict[str, tuple[Tensor, Tensor]]:
    """Images as numbers from 0 to 255 and their labels, of ``SPLIT/CLASS/NUMBER.jpg``."""
    image, numpy = need("PIL.Image"), need("numpy")
    wanted = {
        f"{split}/{name}/{number:04}.jpg": (split, label)
        for split, count in counts.items()
        for label, name in enumerate(CLASSES)
        for number in range(count)
    }
    images: dict[str, list[Tensor]] = {split: [] for split in counts}
    labels: dict[str, list[int]] = {split: [] for split in counts}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                if member.name not in wanted:
                    continue
                split, label = wanted[member.name]
                stored = archive.extractfile(member)
                assert stored is not None
                pixels = numpy.array(image.open(io.BytesIO(stored.read())).convert("RGB"))  # [32, 32, 3]
                images[split].append(torch.from_numpy(pixels).permute(2, 0, 1))
                labels[split].append(label)
    except (OSError, tarfile.TarError, EOFError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    for split, count in counts.items():
        if len(labels[split]) < count * len(CLASSES):
            raise UserError(f"{path} has {len(labels[split])} of the {count * len(CLASSES)} {split} images")
    return {split: (torch.stack(images[split]).float(), torch.tensor(labels[split])) for split in counts}


def _binaries(folder: Path, counts: dict[str, int]) -> dict[str, tuple[Tensor, Tensor]]:
    files = {"train": [f"data_batch_{k}.bin" for k in range(1, 6)], "test": ["test_batch.bin"]}
    found = {}
    for split, count in counts.items():
        try:
            content = b"".join((folder / name).read_bytes() for name in files[split])
        except OSError as error:
            raise UserError(f"{folder} cannot be read: {error}") from None
        if not content or len(content) % RECORD:
            raise UserError(f"{folder}: the {split} files have {len(content)} bytes, no multiple of {RECORD}")
        records = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(-1, RECORD)
        rows = torch.cat([(records[:, 0] == label).nonzero().flatten()[:count] for label in range(len(CLASSES))])
        if len(rows) < count * len(CLASSES):
            raise UserError(f"{folder} has {len(rows)} of the {count * len(CLASSES)} {split} images")
        found[split] = records[rows, 1:].view(-1, 3, SIDE, SIDE).float(), records[rows, 0].long()
    return found
