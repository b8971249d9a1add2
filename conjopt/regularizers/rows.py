"""Output vectors and their targets, one to a row, as the regularizers see them."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from conjopt.losses import PotentialOf

__all__ = ["Rows"]


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """Rows of outputs (or features) with their targets and weights.

    Attributes:
        view: How the criterion reads targets.
        rows: `(R, d)`.
        mass: `(R,)` weights of the rows, not normalised; 0 for those that do not count.
        targets: `(R,)` classes, or `(R, k)` points of the domain of `Phi`.
        width: `k`, the number of outputs.
        fresh: How many rows, the first ones, are of this step.
    """

    view: PotentialOf
    rows: Tensor
    mass: Tensor
    targets: Tensor
    width: int
    fresh: int

    @property
    def labels(self) -> Tensor | None:
        """`(R,)` classes, if the targets are classes; 0 where a row does not count."""
        return self.targets if self.targets.ndim == 1 else None

    @property
    def points(self) -> Tensor:
        """`(R, k)` targets as points of the domain of `Phi`."""
        if self.targets.ndim == 2:
            return self.targets
        like = self.rows.new_empty(len(self.rows), self.width)
        return self.view.points(like, self.targets).to(self.rows.dtype)

    @property
    def share(self) -> Tensor:
        """`(R,)` weights that sum to 1, or all are 0."""
        return normalised(self.mass)

    def mean(self, of_rows: Tensor) -> Tensor:
        """The weighted mean of `(R,)` numbers."""
        return self.share @ of_rows

    def masked(self, finite: Tensor) -> Rows:
        """Rows that do not count as 0; if not `finite`, none counts."""
        mass = torch.where(finite, self.mass, 0)
        rows = torch.where((mass > 0).unsqueeze(1), self.rows, 0)
        return dataclasses.replace(self, rows=rows, mass=mass)

    def with_few_classes(self) -> Rows:
        """Class targets renumbered where that leaves fewer classes: no more than rows."""
        if self.width <= len(self.rows):
            return self
        same = self.targets == self.targets.unsqueeze(1)
        first = same.to(torch.uint8).argmax(1)  # a class is called by its first row
        return dataclasses.replace(self, targets=first, width=len(first))

    def with_rows(self, rows: Tensor) -> Rows:
        """The same with other rows in their place."""
        return dataclasses.replace(self, rows=rows)

    def with_targets(self, targets: Tensor) -> Rows:
        """The same with other targets."""
        return dataclasses.replace(self, targets=targets)


def normalised(mass: Tensor) -> Tensor:
    """Weights over their sum, or 0 if that is 0."""
    total = mass.sum()
    return mass / torch.where(total > 0, total, 1)
