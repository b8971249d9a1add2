"""Numbers against steps, thinned as they come, so that a million of them can be drawn."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["POINTS", "Series", "thinned"]

POINTS = 2000  # of a series, at most
MARKS = 200  # places of a series that are no finite numbers

Numbers = NDArray[np.float64]


class Series:
    """One quantity of one run, in memory that does not grow with the run.

    The records are cut into stretches of equal length. Of each stretch the least, the greatest and
    the last number are kept, so that a spike of one record stays to be seen.

    Args:
        points: to keep, at most.

    Attributes:
        count: numbers that came, finite or not.
        bad: kind ("nan", "inf", "-inf") to how often it came.
        last: place and value of the last number that came, finite or not; None before any.

    Example:
        >>> series = Series(points=30)
        >>> for start in range(0, 10_000, 100):
        ...     x = np.arange(start, start + 100.0)
        ...     series.add(x, np.where(x == 4567, 9.0, 0.5))
        >>> len(series.x) <= 30, series.x[series.y == 9.0].tolist()
        (True, [4567.0])
        >>> series.add(np.array([10_000.0]), np.array([np.nan]))
        >>> series.bad, series.bad_places("nan").tolist()
        ({'nan': 1}, [10000.0])
    """

    def __init__(self, points: int = POINTS) -> None:
        self.points = max(points, 3)
        self.count = 0
        self.bad: dict[str, int] = {}
        self.last: tuple[float, float] | None = None
        self._bad_x: dict[str, Numbers] = {}
        # (4, n) of each: number of the record in the series, x, y and a code that goes with it.
        self._kept: list[Numbers] = []
        self._held = 0

    def add(self, x: Numbers, y: Numbers, code: Numbers | None = None) -> None:
        """Take in numbers.

        Args:
            x: (n,) finite places.
            y: (n,).
            code: (n,) what goes with each, such as which limit set it.
        """
        index = np.arange(self.count, self.count + len(y), dtype=float)
        self.count += len(y)
        if len(y):
            self.last = float(x[-1]), float(y[-1])
        rows = np.stack([index, x, y, np.full(len(y), -1.0) if code is None else code])
        finite = np.isfinite(y)
        if not finite.all():
            for kind, mask in (
                ("nan", np.isnan(y)),
                ("inf", y == np.inf),
                ("-inf", y == -np.inf),
            ):
                if mask.any():
                    self._add_bad(kind, x[mask])
            rows = rows[:, finite]
        self._kept.append(rows)
        self._held += rows.shape[1]
        if self._held > 4 * self.points:  # not at every call, as sorting takes its time
            self._thin()

    def _add_bad(self, kind: str, x: Numbers) -> None:
        self.bad[kind] = self.bad.get(kind, 0) + len(x)
        places = np.concatenate([self._bad_x.get(kind, x[:0]), x])
        while len(places) > MARKS:  # the first and the last stay
            places = np.concatenate([places[:-1:2], places[-1:]])
        self._bad_x[kind] = places

    def _thin(self) -> None:
        rows = np.concatenate(self._kept, axis=1)
        if rows.shape[1] > self.points:
            rows = rows[:, thinned(rows[0], rows[2], self.points)]
        self._kept, self._held = [rows], rows.shape[1]

    def _row(self, number: int) -> Numbers:
        if not self._kept:
            return np.empty(0)
        if len(self._kept) > 1 or self._held > self.points:
            self._thin()
        row: Numbers = self._kept[0][number]
        return row

    @property
    def x(self) -> Numbers:
        """(p,) places of the finite numbers that were kept, in order of their records."""
        return self._row(1)

    @property
    def y(self) -> Numbers:
        """(p,) these numbers."""
        return self._row(2)

    @property
    def code(self) -> Numbers:
        """(p,) what goes with each; -1 for nothing."""
        return self._row(3)

    def bad_places(self, kind: str) -> Numbers:
        """Some of the places where no finite number was, the first and the last among them.

        Args:
            kind: "nan", "inf" or "-inf".
        """
        return self._bad_x.get(kind, np.empty(0))

    def gaps(self, x: Numbers) -> NDArray[np.intp]:
        """Where a line through some places has a gap, as no finite number is between.

        Args:
            x: (p,) places, a part of `x`.

        Returns:
            the index of the place after each gap.

        Example:
            >>> series = Series()
            >>> series.add(np.arange(4.0), np.array([1.0, 2.0, np.nan, 4.0]))
            >>> series.gaps(series.x)
            array([2])
        """
        holes = np.sort(np.concatenate([np.empty(0), *self._bad_x.values()]))
        between = np.searchsorted(holes, x[1:]) > np.searchsorted(holes, x[:-1])
        return np.flatnonzero(between) + 1

    def alone(self, x: Numbers) -> NDArray[np.intp]:
        """Which places have a gap, or nothing, on both sides, so that no line goes through them.

        Args:
            x: (p,) places, a part of `x`.

        Returns:
            their indices, ascending.

        Example:
            >>> series = Series()
            >>> series.add(np.arange(4.0), np.array([1.0, 2.0, np.nan, 4.0]))
            >>> series.alone(series.x)
            array([2])
        """
        starts = np.zeros(x.size + 1, dtype=bool)
        starts[[0, x.size]] = True
        starts[self.gaps(x)] = True
        return np.flatnonzero(starts[:-1] & starts[1:])


def thinned(index: Numbers, y: Numbers, points: int) -> NDArray[np.intp]:
    """Which of many numbers to keep: of each stretch the least, the greatest and the last.

    The length of stretches is a power of two, so that what was thinned before loses nothing when it
    is thinned again, until the stretches double.

    Args:
        index: (n,) increasing, from 0 on; stretches are of equal length in it.
        y: (n,) finite.
        points: to keep at most, and more than 2.

    Returns:
        increasing numbers of those to keep.

    Example:
        >>> thinned(np.arange(8.0), np.array([5.0, 1, 2, 9, 3, 4, 0, 6]), 6)
        array([1, 3, 6, 7])
    """
    length = 1
    while index[-1] >= length * (points // 3):
        length *= 2
    of = (index // length).astype(np.intp)
    starts = np.flatnonzero(np.diff(of, prepend=-1))
    order = np.lexsort((y, of))  # within each stretch by value
    ends = np.append(starts[1:], len(y)) - 1
    return np.unique(np.concatenate([order[starts], order[ends], ends]))
