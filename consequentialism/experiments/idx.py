"""Reader of MNIST's IDX files, raw or gzipped.

torchvision reads them too, and is used here to download them. Files that are already on disk should not need a package
of its size, each release of which fits only one release of torch.
"""

from __future__ import annotations

import gzip
import importlib.util
import struct
import zlib
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UserError

IMAGE_MAGIC = 2051
LABEL_MAGIC = 2049
PARTS = {
    "train images": ("train-images", IMAGE_MAGIC),
    "train labels": ("train-labels", LABEL_MAGIC),
    "test images": ("t10k-images", IMAGE_MAGIC),
    "test labels": ("t10k-labels", LABEL_MAGIC),
}


def read_idx(path: Path, magic: int) -> Tensor:
    """One IDX file of bytes.

    Args:
        path: The file; a name that ends in ``.gz`` is unpacked.
        magic: 2051 for images, 2049 for labels.

    Returns:
        uint8, images ``[N, H, W]`` or labels ``[N]``.

    Raises:
        UserError: No such file, a broken gzip, a wrong magic number, or not the length its header says.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except EOFError:
        raise UserError(f"{path} is truncated: the gzip stream ends early") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path} is not a valid gzip file: {error}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    dimensions = 3 if magic == IMAGE_MAGIC else 1
    header = 4 * (1 + dimensions)
    if len(content) < 4:
        raise UserError(f"{path} is truncated: {len(content)} bytes, its header alone has {header}")
    found = struct.unpack_from(">I", content)[0]
    if found != magic:
        raise UserError(f"{path} has the wrong magic number: {found}, not {magic}")
    if len(content) < header:
        raise UserError(f"{path} is truncated: {len(content)} bytes, its header alone has {header}")
    shape = struct.unpack_from(f">{dimensions}I", content, 4)
    expected = header + prod(shape)
    if len(content) != expected:
        wrong = "truncated" if len(content) < expected else "too long"
        raise UserError(f"{path} is {wrong}: {len(content)} bytes, its header promises {expected}")
    if prod(shape) == 0:
        raise UserError(f"{path} is empty: its header says {' x '.join(map(str, shape))}")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=header).reshape(shape)


def read_mnist(root: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four files in ``root`` or ``root/MNIST/raw``; downloaded by torchvision where there are none of them.

    Returns:
        uint8 train images ``[N, H, W]``, train labels ``[N]``, test images ``[M, H, W]``, test labels ``[M]``.

    Raises:
        UserError: A file is missing or broken, or images and labels do not belong together.
    """
    paths = {part: _find(root, stem) for part, (stem, _) in PARTS.items()}
    if not any(paths.values()):
        _download(root)
        paths = {part: _find(root, stem) for part, (stem, _) in PARTS.items()}
    read: list[Tensor] = []
    for part, (stem, magic) in PARTS.items():
        path = paths[part]
        if path is None:
            raise UserError(f"missing file: {root / _names(stem)[0]} (or .gz), the {part}")
        read.append(read_idx(path, magic))
    for split, images, labels in (("train", read[0], read[1]), ("test", read[2], read[3])):
        if len(images) != len(labels):
            raise UserError(f"{root}: {len(images)} {split} images but {len(labels)} {split} labels")
        if labels.max() > 9:
            raise UserError(f"{root}: a {split} label is {labels.max()}, digits end at 9")
    if read[0].shape[1:] != read[2].shape[1:]:
        raise UserError(f"{root}: train images are {_size(read[0])} but test images {_size(read[2])}")
    return read[0], read[1], read[2], read[3]


def _names(stem: str) -> tuple[str, str]:
    kind = "idx3" if stem.endswith("images") else "idx1"
    return f"{stem}-{kind}-ubyte", f"{stem}.{kind}-ubyte"


def _find(root: Path, stem: str) -> Path | None:
    folders = (root, root / "MNIST" / "raw")
    candidates = (folder / (name + end) for folder in folders for name in _names(stem) for end in ("", ".gz"))
    return next((path for path in candidates if path.is_file()), None)


def _size(images: Tensor) -> str:
    return f"{images.shape[1]} x {images.shape[2]}"


def _download(root: Path) -> None:
    """Fetch MNIST with torchvision, which puts it into ``root/MNIST/raw``."""
    if importlib.util.find_spec("torchvision") is None:
        raise UserError(
            f"no MNIST files in {root}: put the four IDX files ({_names('train-images')[0]}, ...) there, "
            "or pip install torchvision to download them"
        )
    try:
        from torchvision.datasets import MNIST

        MNIST(str(root), download=True)
    except (OSError, RuntimeError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"no MNIST files in {root}, and torchvision could not download them: {first}") from None
