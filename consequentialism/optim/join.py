"""Ranks that run out of batches before others do: `torch.distributed.algorithms.Join` over DDP and the optimizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .emended import Emended


class JoinHook:
    """The part of a rank without batches while others step: it enters no rows, and refreshes when they do.

    Raises:
        RuntimeError: The optimizer has roots of outputs, for which that rank has no gradients.
    """

    def __init__(self, optimizer: Emended) -> None:
        if optimizer.outputs is not None:
            raise RuntimeError("output_exponent must be 0 under Join: a rank without batches has no gradients")
        self.optimizer = optimizer

    def main_hook(self) -> None:
        """Once for each step of the others."""
        self.optimizer.step_without_rows()

    def post_hook(self, is_last_joiner: bool) -> None:
        """Once all have ended; DDP itself sends the parameters of a rank that ran last."""


def notify(optimizer: Any, wrapper: Any) -> None:
    """Say that this rank steps, where ranks may run out of batches.

    Args:
        wrapper: The `DistributedDataParallel` around the model, or None.

    Raises:
        RuntimeError: `DistributedDataParallel.join` knows DDP alone, so that the Grams would wait for ranks that ended.
    """
    own = getattr(optimizer, "_join_config", None)
    if own is not None and own.enable:
        from torch.distributed.algorithms.join import Join

        Join.notify_join_context(optimizer)
        return
    config = getattr(wrapper, "_join_config", None)
    if config is not None and config.enable and not config.throw_on_early_termination:
        raise RuntimeError(
            "consequentialism.optim.Emended sums Grams over the ranks, of which DistributedDataParallel.join() knows "
            "nothing: use torch.distributed.algorithms.Join([model, optimizer]), or join() with "
            "throw_on_early_termination=True"
        )
