"""Discrete laws of targets in groups, worked on a block of rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from conjopt.potentials import Potential

CHUNK = 2**16  # elements that are worked on at a time: they stay in the cache


class Law:
    """A discrete law of targets in groups, whose rows are made a block at a time.

    Args:
        potential: The potential `Phi`.
        k: Number of coordinates.
        rows: Returns a range of targets, `(r, k)`.
        group: Group of each row, `(m,)`: ascending, no number left out.
        weight: Positive weights of the rows, `(m,)`.
    """

    def __init__(
        self,
        potential: Potential,
        k: int,
        rows: Callable[[int, int], Tensor],
        group: Tensor,
        weight: Tensor,
    ) -> None:
        self.potential, self.k, self.rows = potential, k, rows
        self.group, self.weight = group, weight
        counts = torch.bincount(group)
        self.ends = [0, *counts.cumsum(0).tolist()]
        self.total = torch.zeros(len(counts), dtype=torch.float64).index_add_(0, group, weight)
        self.share = weight / self.total[group]

    def means(self, a: int, b: int) -> Tensor:
        """Return the mean targets of the groups `a` to `b`, `(b - a, k)`."""
        mean = torch.zeros(b - a, self.k, dtype=torch.float64)
        least, most = torch.full_like(mean, torch.inf), torch.full_like(mean, -torch.inf)
        for _ in range(2):  # the second time adds what rounding left out of the first
            step = torch.zeros_like(mean)
            for lo, hi in blocks(self.ends[a], self.ends[b], self.k):
                rows, local = self.rows(lo, hi), self.group[lo:hi] - a
                step.index_add_(0, local, self.share[lo:hi, None] * (rows - mean[local]))
                index = local[:, None].expand_as(rows)
                least.scatter_reduce_(0, index, rows, "amin")
                most.scatter_reduce_(0, index, rows, "amax")
            mean += step
        # The mean of equal numbers is that number, and that of others is strictly between them:
        # on the boundary of the domain the divergence would be infinite.
        return mean.clamp_(torch.nextafter(least, most), torch.nextafter(most, least))

    def entropy(self) -> Tensor:
        """Return the sum over rows of weight times divergence from the mean of the group, `()`."""
        total = torch.zeros((), dtype=torch.float64)
        for a, b in blocks(0, len(self.total), self.k):
            mean = self.means(a, b)
            for lo, hi in blocks(self.ends[a], self.ends[b], self.k):
                of_row = mean[self.group[lo:hi] - a]
                divergence = self.potential.divergence(self.rows(lo, hi), of_row)
                total += divergence.clamp(min=0) @ self.weight[lo:hi]
        return total


class ClassLaw(Law):
    """A law of smoothed classes, each class at most once in a group."""

    def __init__(self, targets: Targets, label: Tensor, group: Tensor, weight: Tensor) -> None:
        self.smooth, self.label = targets.smooth, label
        super().__init__(targets.potential, targets.k, self.one_hot, group, weight)

    def one_hot(self, lo: int, hi: int) -> Tensor:
        """Return a range of the smoothed classes, `(hi - lo, k)`."""
        rows = torch.zeros(hi - lo, self.k, dtype=torch.float64)
        return self.smooth(rows.scatter_(1, self.label[lo:hi, None], 1.0))

    def means(self, a: int, b: int) -> Tensor:
        """Return the mean targets of the groups `a` to `b`, `(b - a, k)`."""
        lo, hi = self.ends[a], self.ends[b]
        mean = torch.zeros(b - a, self.k, dtype=torch.float64)
        mean[self.group[lo:hi] - a, self.label[lo:hi]] = self.share[lo:hi]
        return self.smooth(mean)


@dataclass(frozen=True)
class Targets:
    """Checked targets, classes `(n,)` or points `(n, k)` of any dtype, and their weights `(n,)`."""

    potential: Potential
    values: Tensor
    weight: Tensor
    k: int
    smoothing: float

    def smooth(self, y: Tensor) -> Tensor:
        """Mix in the uniform distribution, `(..., k) -> (..., k)`."""
        return (1 - self.smoothing) * y + self.smoothing / self.k if self.smoothing else y

    def points(self) -> Tensor:
        """Return the targets as points of the domain of `Phi`, `(n, k)`."""
        if self.values.ndim == 1:
            return self.smooth(torch.nn.functional.one_hot(self.values, self.k).double())
        return self.smooth(self.proper(self.values.double()))

    def proper(self, y: Tensor) -> Tensor:
        """Take points back to the domain, which rounding may leave them just outside of."""
        return y.clamp(min=0) if self.potential.on_simplex else y

    def select(self, keep: Tensor) -> Targets:
        """Return the targets of some rows."""
        return replace(self, values=self.values[keep], weight=self.weight[keep])

    def mixed(self, group: Tensor) -> Tensor:
        """Return which rows are in groups that can have any entropy, booleans `(n,)`."""
        counts = torch.bincount(group)
        if self.values.ndim == 2:
            return (counts > 1)[group]
        least = torch.full_like(counts, self.k).scatter_reduce_(0, group, self.values, "amin")
        found = torch.zeros(len(counts), dtype=torch.bool)
        found[group[self.values != least[group]]] = True
        return found[group]

    def law(self, group: Tensor) -> Law:
        """Return their law in groups, `(n,)`."""
        if self.values.ndim == 1:
            pair, inverse = torch.unique(group * self.k + self.values, return_inverse=True)
            weight = torch.zeros(len(pair), dtype=torch.float64).index_add_(0, inverse, self.weight)
            return ClassLaw(self, pair % self.k, pair // self.k, weight)
        order = torch.argsort(group, stable=True)

        def rows(lo: int, hi: int) -> Tensor:
            return self.smooth(self.proper(self.values[order[lo:hi]].double()))

        return Law(self.potential, self.k, rows, group[order], self.weight[order])

    def entropy(self, group: Tensor) -> Tensor:
        """Return `Ent(Y|group)`, `()`."""
        keep = self.mixed(group)
        if not bool(keep.any()):
            return torch.zeros((), dtype=torch.float64)
        return self.select(keep).law(renumber(group[keep])).entropy() / self.weight.sum()


def renumber(group: Tensor) -> Tensor:
    """Number the groups that occur from 0, in their order."""
    used = torch.zeros(int(group.max()) + 1, dtype=torch.int64)
    used[group] = 1
    return (used.cumsum(0) - 1)[group]


def blocks(start: int, end: int, width: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows of some width, of at most `CHUNK` elements where a row is not longer."""
    step = max(CHUNK // max(width, 1), 1)
    return ((lo, min(lo + step, end)) for lo in range(start, end, step))
