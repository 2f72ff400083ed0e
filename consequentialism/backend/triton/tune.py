"""Which candidate of a plan is the fastest on this chip.

Candidates of a launch give the same bits (see `plans`), so a choice by timing changes no result, on no machine. The
first launch of a kind, that is, of a kernel, its types, constants and sizes rounded up to powers of two, times them
with Triton's own autotuner, which waits for the device and keeps its timings on disk beside the compiled kernels; the
choice is kept for the process. Nothing is timed where a plan has one candidate, in a CUDA graph's capture, which may
not wait (the first candidate serves there, and a later launch outside chooses), in the interpreter, and on AMD.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, TypeVar

import torch
import triton
from torch import Tensor
from triton.testing import do_bench

from .language import INTERPRETED
from .plans import Candidate

AnyCandidate = TypeVar("AnyCandidate", bound=Candidate)
_chosen: dict[tuple[Any, ...], Candidate] = {}
_benchmark = partial(do_bench, warmup=5, rep=20)  # milliseconds a candidate


def fastest(
    kernel: Any,
    grid: tuple[int, ...],
    candidates: Sequence[AnyCandidate],
    sizes: tuple[int, ...],
    arguments: tuple[Any, ...],
    constants: dict[str, Any],
) -> AnyCandidate:
    """The candidate for a launch of ``kernel`` on ``arguments``, which it may be run on many times.

    Args:
        sizes: What the time depends on.
    """
    first = candidates[0]
    if len(candidates) == 1 or INTERPRETED or torch.version.hip:
        return first
    tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
    rounded = tuple((size - 1).bit_length() for size in sizes)
    key = (kernel.__name__, tensors[0].device, *(t.dtype for t in tensors), *rounded, *constants.values(), *candidates)
    chosen = _chosen.get(key)
    if chosen is None:
        if torch.cuda.is_current_stream_capturing():
            return first
        chosen = _chosen[key] = _timed(kernel, grid, candidates, arguments, constants)
    return chosen  # type: ignore[return-value]


def _timed(
    kernel: Any,
    grid: tuple[int, ...],
    candidates: Sequence[AnyCandidate],
    arguments: tuple[Any, ...],
    constants: dict[str, Any],
) -> AnyCandidate:
    configs = [triton.Config({}, num_warps=one.warps, num_stages=one.stages) for one in candidates]
    integers = [name for name, value in zip(kernel.arg_names, arguments, strict=False) if isinstance(value, int)]
    tuner = triton.autotune(configs, key=[*integers, *constants], do_bench=_benchmark, cache_results=True)(kernel)
    try:
        tuner[grid](*arguments, **constants)
    except torch.OutOfMemoryError:  # timing clears the cache with memory of its own
        return candidates[0]
    best = tuner.best_config
    return next(one for one in candidates if (one.warps, one.stages) == (best.num_warps, best.num_stages))
