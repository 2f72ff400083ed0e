"""What the runner measures, and what it finds: a case's providers, and a row for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from .roofline import Minimum
from .timing import Run

OK = "ok"
ALL_MODES = "all"
NOTHING = Minimum(0, 0)


class Unavailable(Exception):
    """A provider that cannot be measured here, and need not be: a peer that is not installed, a kernel of another
    device. The message says why."""


class Work(NamedTuple):
    """What a provider runs; how far off it is, the largest relative error against float64, None if unknown; and what
    frees the results of the last call."""

    run: Run
    error: Callable[[], float] | None = None
    free: Callable[[], None] = lambda: None


class Target(NamedTuple):
    """The median of ``own`` is to be at most ``most`` times that of ``other``, each a provider and a mode."""

    own: tuple[str, str]
    other: tuple[str, str]
    most: float


@dataclass
class Case:
    """One comparison: an op at a shape and type."""

    op: str
    shape: str
    dtype: str
    providers: dict[str, Callable[[], Work]]  # each builds its work
    baseline: str
    bound: float  # of the error
    modes: tuple[str, ...]
    least: Minimum = NOTHING  # of the baseline's call
    emended: Minimum | None = None  # of every other provider's; None: the same
    targets: tuple[Target, ...] = ()

    @property
    def key(self) -> tuple[str, str, str]:
        return self.op, self.shape, self.dtype

    def target(self, provider: str, mode: str) -> float | None:
        """The most that the ratio to the baseline in the same mode is to be, if there is a target."""
        ends = ((provider, mode), (self.baseline, mode))
        return next((aim.most for aim in self.targets if (aim.own, aim.other) == ends), None)

    def least_of(self, provider: str) -> Minimum:
        return self.least if provider == self.baseline or self.emended is None else self.emended


@dataclass
class Row:
    """One line of the CSV; times in milliseconds, of one call. Empty: not known, or not applicable."""

    op: str
    provider: str
    mode: str  # "eager", "graph", or "all" where nothing was timed
    shape: str
    dtype: str
    state: str = OK  # or why there are no times
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    calls: int = 0  # timed
    baseline: str = ""  # a provider of the same op, shape, type and mode
    ratio: float | None = None  # to the baseline: the median over rounds, in which providers take turns
    target: float | None = None  # the ratio that is aimed at
    error: float | None = None  # the largest relative error against float64
    peak_bytes: int | None = None  # of memory that a call holds beyond what was there
    least_bytes: float | None = None  # that a call must move
    least_flops: float | None = None  # that it must compute
    floor_ms: float | None = None  # of both, by the device's own bandwidth and rate
    floor_fraction: float | None = None  # the floor by the median
    floor_ratio: float | None = None  # the floor by the baseline's: no ratio is expected below it
    bandwidth_gb_s: float | None = None  # of a copy on this device
    matrix_tflop_s: float | None = None  # of a square product in this type on this device
    device: str = ""
    threads: int = 0
    torch: str = ""
    cuda: str = ""
    python: str = ""
    version: str = ""
    commit: str = ""

    @property
    def key(self) -> tuple[str, str, str, str, str]:
        return self.op, self.provider, self.mode, self.shape, self.dtype
