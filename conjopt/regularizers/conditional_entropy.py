"""The entropy of the targets given the outputs, by a kernel (docs/regularizers.md)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from conjopt.losses.fenchel_young import _can_look_at
from conjopt.potentials import Entmax, Logistic, Poisson, Potential, Softmax, Squared
from conjopt.regularizers.base import Schedule
from conjopt.regularizers.batch import BatchRegularizer
from conjopt.regularizers.products import inner_products
from conjopt.regularizers.rows import Rows, normalised

__all__ = ["ConditionalEntropy"]


class ConditionalEntropy(BatchRegularizer):
    """The leave-one-out kernel estimate of `Ent(Y|f)`, which the theory's bounds contain.

    With `u` the outputs, centred over the batch and divided by one root mean square,
    `w_i = softmax_{j != i}(-||u_i - u_j||^2 / (2 k bandwidth))` and `ybar_i = sum_j w_ij y_j` it is
    `mean_i (sum_j w_ij Phi(y_j) - Phi(ybar_i)) >= 0`; for hard targets `Phi(y_j)` is 0. It is small
    where the neighbours of an output, in the batch, have one class (or, under `Squared`, near
    targets). A wrong label does not have to be learned for that: its output may join those of other
    samples like it. This is what makes the term one for noisy labels.

    It wants four or more samples of a class in the batch, or a `queue`. A sample that shares no
    class with another one has nothing to be compared with, and does not count. The term does not
    change if the outputs are shifted by one vector, or scaled by a factor.

    Args:
        weight: See `Regularizer`.
        bandwidth: Squared distance that counts as near, relative to the mean square of the outputs;
            positive.
        potential: `Softmax()` by default, or any other, or a criterion. See `Regularizer`.
        ignore_index: See `Regularizer`.
        queue: See `BatchRegularizer`.
        max_rows: See `BatchRegularizer`.
        group: See `BatchRegularizer`.

    Raises:
        TypeError: See `BatchRegularizer`.
        ValueError: See `BatchRegularizer`; for a bandwidth that is not positive.

    Reference:
        docs/theory.md, Def 1.2; docs/regularizers.md.

    Example:
        >>> import torch
        >>> from conjopt.regularizers import ConditionalEntropy
        >>> entropy = ConditionalEntropy(weight=0.3)
        >>> outputs = torch.tensor([[2.0, 0.0], [2.0, 0.0], [2.0, 0.0], [0.0, 2.0], [0.0, 2.0]])
        >>> entropy.estimate(outputs, torch.tensor([0, 0, 0, 1, 1])) < 1e-6  # neighbours agree
        tensor(True)
        >>> print(f"{entropy.estimate(outputs, torch.tensor([0, 0, 1, 1, 1])):.3f}")
        0.277
        >>> print(f"{entropy.upper_estimate(outputs, torch.tensor([0, 0, 1, 1, 1])):.3f}")
        4.444
    """

    def __init__(
        self,
        weight: float | Schedule = 0.3,
        bandwidth: float = 0.1,
        *,
        potential: Potential | nn.Module | None = None,
        ignore_index: int = -100,
        queue: int = 0,
        max_rows: int = 1024,
        group: Any = None,
    ) -> None:
        super().__init__(
            weight,
            potential=potential,
            ignore_index=ignore_index,
            queue=queue,
            max_rows=max_rows,
            group=group,
        )
        if not isinstance(bandwidth, int | float) or not 0 < bandwidth < math.inf:
            raise ValueError(f"bandwidth={bandwidth!r}: expected a positive number.")
        self.bandwidth = float(bandwidth)

    def upper_estimate(
        self, outputs: Tensor, targets: Tensor, *, features: Tensor | None = None
    ) -> Tensor:
        """Return `mean_i l(y_i, f)` for the `f` whose link is `ybar_i`; changes nothing.

        Its expectation over independent samples is at least `Ent(Y|f)`, as `ybar_i` does not depend
        on `y_i` (Thm 1.3). It is for reports. As a term of the loss it makes a network fit wrong
        labels.

        Args:
            outputs: As for a call.
            targets: As for a call.
            features: As for a call.

        Returns:
            Shape `()`, in float32 or wider.
        """
        return self._estimate(outputs, targets, features, self._upper_value)

    def _upper_value(self, batch: Rows) -> Tensor:
        mean = self._mean_targets(self._neighbours(batch), batch)
        points, mass = batch.points[: batch.fresh], batch.mass[: batch.fresh]
        return normalised(mass) @ self.potential.divergence(points, mean)

    def _value(self, batch: Rows) -> Tensor:
        if self.potential == Squared():  # shifts of the targets change nothing: less to cancel
            batch = batch.with_targets(batch.points - batch.share @ batch.points)
        mass = batch.mass[: batch.fresh]
        if self.potential.on_simplex:
            mass = torch.where(_has_company(batch, self.criterion), mass, 0)
        few = _few(mass)
        if few is not None:
            mass = mass[few]
        if self._hard(batch) and isinstance(self.potential, Softmax | Entmax):
            batch = batch.with_few_classes()  # Phi is 0 at labels, and blind to absent classes
            weights = self._neighbours(batch, few)
            entropy = -self.potential.value(self._mean_targets(weights, batch))
        else:
            weights = self._neighbours(batch, few)
            entropy = weights @ self.potential.value(batch.points)
            entropy = entropy - self.potential.value(self._mean_targets(weights, batch))
        return normalised(mass) @ entropy

    def _mean_targets(self, weights: Tensor, batch: Rows) -> Tensor:
        """`ybar` of the rows that the weights are for, `(fresh, k)`."""
        if not self._hard(batch):
            mean = weights @ batch.points
        else:  # a sum for each class costs less than a product with one-hot targets
            sums = weights.new_zeros(batch.width, len(weights))
            mean = sums.index_add(0, batch.targets, weights.T).T
        return _inside(self.potential, mean)

    def _hard(self, batch: Rows) -> bool:
        """Whether targets are classes, and their points the vertices of the simplex."""
        smoothed = bool(getattr(self.criterion, "label_smoothing", 0.0))
        return batch.labels is not None and not smoothed

    def _neighbours(self, batch: Rows, few: Tensor | None = None) -> Tensor:
        """`w`: the weights of all rows for those of this step, `(fresh, R)`; they sum to 1.

        Args:
            batch: all rows.
            few: numbers of those that the weights are asked for; None for all of this step.
        """
        tiny, eps = torch.finfo(batch.rows.dtype).tiny, torch.finfo(batch.rows.dtype).eps
        rows = batch.rows / batch.rows.detach().abs().amax().clamp(min=tiny)  # squares in range
        rows = rows - batch.share @ rows
        if few is None:
            products, squares = inner_products(rows, batch.fresh)
        else:
            products, squares = rows[few] @ rows.T, rows.square().sum(1)
        # Rows that differ by rounding only, relative to the largest entry, are taken as equal.
        scale = batch.mean(squares).clamp(min=rows.shape[1] * (64 * eps) ** 2)  # k times mean u^2
        counts = batch.mass > 0
        every = torch.arange(len(rows), device=rows.device)
        asked = every[: batch.fresh] if few is None else few
        others = counts & (every != asked.unsqueeze(1))
        # -||u_i - u_j||^2 / (2 k bandwidth) up to a term of u_i alone, which a softmax cannot see.
        scores = (products - squares / 2) / (scale * self.bandwidth)
        scores = scores + torch.where(counts, batch.mass, 1).log()
        # Finite, so that a row without others gives no NaN.
        return scores.masked_fill(~others, torch.finfo(scores.dtype).min).softmax(1)

    def extra_repr(self) -> str:
        """Return the arguments, for `repr`."""
        return f"{super().extra_repr()}, bandwidth={self.bandwidth}"


def _few(mass: Tensor) -> Tensor | None:
    """The rows that count, if they are so few that the others are better left out.

    With many classes most rows have no other of theirs. A device is not asked.
    """
    if not _can_look_at(mass):
        return None
    few = mass.nonzero().squeeze(1)
    return few if 0 < 2 * len(few) < len(mass) else None


def _has_company(batch: Rows, criterion: nn.Module | None) -> Tensor:
    """Whether a row of this step shares a class with another row, `(fresh,)` booleans."""
    counts = (batch.mass > 0).to(batch.rows.dtype)
    if batch.labels is not None:
        sizes = counts.new_zeros(batch.width).index_add(0, batch.labels, counts)
        return sizes[batch.labels[: batch.fresh]] > 1
    every = _before_smoothing(batch.points, criterion)
    points = every[: batch.fresh]
    shared = points @ (counts @ every) - points.square().sum(1)
    return shared > torch.finfo(shared.dtype).eps ** 0.5


def _before_smoothing(points: Tensor, criterion: nn.Module | None) -> Tensor:
    """What targets were before the criterion smoothed and weighed them: smoothed, all share."""
    smoothing = float(getattr(criterion, "label_smoothing", 0.0))
    if not 0 < smoothing < 1:
        return points
    each, total = smoothing / points.shape[1], 1.0
    weight = getattr(criterion, "weight", None)
    if weight is not None:  # a class without weight is taken to have had no share
        weight = weight.to(points)
        points = points / torch.where(weight > 0, weight, 1)
        total = 1 - each * (weight == 0).sum()
    points = points * (
        total / points.sum(1, keepdim=True).clamp(min=torch.finfo(points.dtype).tiny)
    )
    return ((points - each) / (1 - smoothing)).clamp(min=0)


def _inside(potential: Potential, mean: Tensor) -> Tensor:
    """Keep mean targets where the slope of `Phi` is finite; off the boundary by rounding."""
    limits = torch.finfo(mean.dtype)
    if isinstance(potential, Logistic):
        return mean.clamp(limits.tiny, 1 - limits.eps)
    positive = potential.on_simplex or isinstance(potential, Poisson)
    return mean.clamp(min=limits.tiny) if positive else mean
