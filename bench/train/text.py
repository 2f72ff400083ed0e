"""Text that comes with Python: the topics of its ``help()``, as windows of characters."""

from __future__ import annotations

import torch
from torch import Tensor

from consequentialism.errors import need
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


def _windows(codes: Tensor, context: int) -> tuple[Tensor, Tensor]:
    count = (len(codes) - 1) // context
    return codes[: count * context].view(count, context), codes[1 : count * context + 1].view(count, context)
