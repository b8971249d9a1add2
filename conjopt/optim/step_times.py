"""What a step of m samples takes: ``c0 + c1 m`` seconds, from the steps of the run."""

from __future__ import annotations

import collections
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

__all__ = ["Cost", "StepTimes"]

WINDOW = 50  # steps of each size that are remembered
SIZES = 32  # sizes that are remembered
ENOUGH = 3  # steps of a size until it counts


class Cost(NamedTuple):
    """Seconds of a step: ``fixed + per_sample m``.

    Attributes:
        fixed: c0, at least 0.
        per_sample: c1, at least 0.

    Example:
        >>> Cost(0.1, 0.01).fixed
        0.1
    """

    fixed: float
    per_sample: float


class StepTimes:
    """Seconds that steps of each size took, on the clock of the host.

    A time is that from the end of one step to the end of the next, so it holds loading, forward and
    backward: what counts is what passes per second. Nothing is synchronised for it. On a device
    that runs behind the host, such times are right once its queue is full, or if the loop reads
    something of every step; else they are those of launching.

    The median of the last `WINDOW` steps of a size stands for it, so that an evaluation in between
    does not matter. Sizes with fewer than `ENOUGH` steps are left out.

    Example:
        >>> times = StepTimes()
        >>> for _ in range(3):
        ...     times.record(10, 2.0)
        ...     times.record(20, 3.0)
        >>> times.sizes
        [10, 20]
        >>> cost = times.fit()
        >>> round(cost.fixed, 9), round(cost.per_sample, 9)
        (1.0, 0.1)
    """

    def __init__(self) -> None:
        # By size, the one that was last seen at the end.
        self._seconds: dict[int, collections.deque[float]] = {}

    def record(self, samples: int, seconds: float) -> None:
        """Take note of a step.

        Args:
            samples: m.
            seconds: what it took, positive.
        """
        known = self._seconds.pop(samples, None)
        kept = collections.deque(maxlen=WINDOW) if known is None else known
        kept.append(seconds)
        self._seconds[samples] = kept
        if len(self._seconds) > SIZES:
            del self._seconds[next(iter(self._seconds))]

    @property
    def sizes(self) -> list[int]:
        """Sizes with enough steps, in rising order."""
        return sorted(m for m, seconds in self._seconds.items() if len(seconds) >= ENOUGH)

    def fit(self) -> Cost | None:
        """``c0`` and ``c1`` by least squares through the medians, each weighted by its steps.

        Returns:
            the best of those with both at least 0; None with fewer than two sizes, from which they
            cannot be told apart.
        """
        sizes = self.sizes
        if len(sizes) < 2:
            return None
        medians = [statistics.median(self._seconds[m]) for m in sizes]
        return _fit(sizes, medians, [len(self._seconds[m]) for m in sizes])

    def state_dict(self) -> dict[int, list[float]]:
        """The times by size, for a resume."""
        return {m: list(seconds) for m, seconds in self._seconds.items()}

    def load_state_dict(self, state: Mapping[Any, Sequence[float]]) -> None:
        """Take up what `state_dict` gave.

        Args:
            state: times by size.
        """
        self._seconds = {
            int(m): collections.deque(seconds, maxlen=WINDOW) for m, seconds in state.items()
        }


def _fit(sizes: Sequence[int], seconds: Sequence[float], weights: Sequence[float]) -> Cost:
    """The non-negative least squares of two unknowns: inside, or the better of the two ends."""
    total = sum(weights)

    def mean(values: Sequence[float]) -> float:
        return sum(w * v for w, v in zip(weights, values, strict=True)) / total

    m, t = mean(sizes), mean(seconds)
    spread = mean([(size - m) ** 2 for size in sizes])
    slope = mean([(a - m) * (b - t) for a, b in zip(sizes, seconds, strict=True)]) / spread
    if slope >= 0 and t - slope * m >= 0:
        return Cost(t - slope * m, slope)
    products = mean([a * b for a, b in zip(sizes, seconds, strict=True)])
    ends = [Cost(t, 0.0), Cost(0.0, products / mean([size**2 for size in sizes]))]

    def misfit(cost: Cost) -> float:
        return mean(
            [
                (cost.fixed + cost.per_sample * a - b) ** 2
                for a, b in zip(sizes, seconds, strict=True)
            ]
        )

    return min(ends, key=misfit)
