"""Text as windows of characters: the topics of Python's ``help()``, and tiny shakespeare from a folder."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from consequentialism.errors import UserError, need
from consequentialism.experiments.data import Samples

TEST_FRACTION = 0.1
ALPHABET = "\n" + "".join(map(chr, range(32, 127)))  # what else occurs is left out


def python_help(context: int, length: int | None) -> Samples:
    """Windows of the help topics that do not overlap, the test text after the training text.

    Args:
        context: Characters that the network sees, ``T``.
        length: Characters of text in all, None for the whole.

    Returns:
        Inputs ``[N, T]`` and, for each of them, the next character ``[N, T]``; int64, both indices into `ALPHABET`.
        The windows of the training text are shuffled with a fixed seed.
    """
    topics = need("pydoc_data.topics").topics
    place = {character: index for index, character in enumerate(ALPHABET)}
    text = "\n".join(topics[name] for name in sorted(topics))
    codes = torch.tensor([place[character] for character in text if character in place][:length])
    test = round(TEST_FRACTION * len(codes))
    train_x, train_y = _windows(codes[:-test], context)
    test_x, test_y = _windows(codes[-test:], context)
    order = torch.randperm(len(train_x), generator=torch.Generator().manual_seed(0))
    return Samples(train_x[order], train_y[order], test_x, test_y)


SHAKESPEARE = "tinyshakespeare.txt"


def find_shakespeare(folder: Path) -> str | None:
    """What of the data is missing in the folder, or None."""
    return None if (folder / SHAKESPEARE).is_file() else f"no {SHAKESPEARE} in {folder}"


def shakespeare(folder: Path, context: int, windows: int) -> tuple[Samples, int]:
    """The text that nanoGPT's character-level figures are for, its last tenth for validation.

    Args:
        folder: That has ``tinyshakespeare.txt``.
        context: Characters that the network sees, ``T``.
        windows: How many windows of the validation text, evenly spread; those of the training text begin anywhere.

    Returns:
        Inputs ``[N, T]`` and, for each of them, the next character ``[N, T]``; int64. And the number of characters.

    Raises:
        UserError: There is no such file, or it is too short.
    """
    path = folder / SHAKESPEARE
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or 'not a text'}") from None
    place = {character: index for index, character in enumerate(sorted(set(text)))}
    codes = torch.tensor([place[character] for character in text])
    kept = round((1 - TEST_FRACTION) * len(codes))
    test = codes[kept:]
    if len(test) < context + windows:
        raise UserError(f"{path} is too short for {windows} windows of {context} characters: {len(text)} characters")
    begins = torch.linspace(0, len(test) - context - 1, windows).long()
    rows = begins[:, None] + torch.arange(context)
    every = codes[:kept].unfold(0, context, 1)  # a view
    return Samples(every[:-1], every[1:], test[rows], test[rows + 1]), len(place)


def _windows(codes: Tensor, context: int) -> tuple[Tensor, Tensor]:
    count = (len(codes) - 1) // context
    return codes[: count * context].view(count, context), codes[1 : count * context + 1].view(count, context)
