"""How far the outputs of a class are spread: an entropy, and its first order.

docs/regularizers.md has what they aim at.
"""

from __future__ import annotations

import abc
import math
from typing import Any

import torch
from torch import Tensor, nn

from conjopt.losses.fenchel_young import _can_look_at
from conjopt.potentials import Logistic, Potential
from conjopt.regularizers.base import Schedule
from conjopt.regularizers.batch import BatchRegularizer
from conjopt.regularizers.logdet import half_logdet
from conjopt.regularizers.products import gram
from conjopt.regularizers.ranks import with_gradient_times
from conjopt.regularizers.rows import Rows

__all__ = ["OutputCodingRate", "WithinClassScatter"]


class _Spread(BatchRegularizer):
    """A spread of rows within the classes of their targets, shares of the rows as weights."""

    def __init__(
        self,
        weight: float | Schedule,
        *,
        potential: Potential | nn.Module | None,
        ignore_index: int,
        queue: int,
        max_rows: int,
        group: Any,
    ) -> None:
        super().__init__(
            weight,
            potential=potential,
            ignore_index=ignore_index,
            queue=queue,
            max_rows=max_rows,
            group=group,
        )
        if not (self.potential.on_simplex or isinstance(self.potential, Logistic)):
            raise ValueError(
                f"potential={self.potential!r}: expected one on the simplex, or Logistic(), as "
                f"{type(self).__name__} is a spread within classes. For real targets use "
                "ConditionalEntropy."
            )

    def _check_features(self, outputs: Tensor, features: Tensor) -> None:
        super()._check_features(outputs, features)
        if not self.potential.on_simplex:
            raise ValueError(
                f"features are given with potential={self.potential!r}, whose targets are a class "
                "for each output: leave them out."
            )

    def _finite(self, rows: Tensor) -> Tensor:
        return torch.linalg.vector_norm(rows, dim=1).square().isfinite()

    def _read(self, outputs: Tensor, targets: Tensor, features: Tensor | None) -> Rows:
        batch = super()._read(outputs, targets, features)
        if features is not None:
            return batch
        return batch.with_rows(self.potential.tangent_projection(batch.rows))

    def _value(self, batch: Rows) -> Tensor:
        if batch.fresh < len(batch.rows):
            # The rows of this step are a sample of all: they carry the gradient of all.
            part = batch.share[: batch.fresh].sum()
            fresh, old = batch.rows.split([batch.fresh, len(batch.rows) - batch.fresh])
            fresh = with_gradient_times(fresh, 1 / part.clamp(min=torch.finfo(part.dtype).eps))
            batch = batch.with_rows(torch.cat([fresh, old]))
        if not self.potential.on_simplex:
            return self._of_answers(*_answers(batch))
        if batch.labels is None:
            return self._of_shares(batch.rows, batch.share.unsqueeze(1) * batch.points)
        return self._of_classes(*_classes(batch))

    @abc.abstractmethod
    def _of_classes(self, rows: Tensor, share: Tensor, labels: Tensor, classes: int) -> Tensor:
        """For a class of each row: deviations from the mean of the class, `(R, d)`."""

    @abc.abstractmethod
    def _of_shares(self, rows: Tensor, shares: Tensor) -> Tensor:
        """For `(R, classes)` shares of rows and classes that sum to 1."""

    @abc.abstractmethod
    def _of_answers(self, share: Tensor, variance: Tensor) -> Tensor:
        """For yes/no answers: share and variance of the outputs with each answer, `(2, k)`."""


class OutputCodingRate(_Spread):
    """The coding rate of the outputs of a class, `sum_c (m_c / m) 1/2 logdet(I + Cov_c / eps2)`.

    It is an estimate of the entropy of the outputs given the labels, at the resolution
    `sqrt(eps2)`, in nats; the outputs are taken less their mean over the classes, which the loss
    does not see. As the loss is `sqrt(2)`-Lipschitz in the outputs, the resolution has a fixed
    meaning, and a network cannot make the outputs small without paying in loss. Features can be
    made small for nothing.

    Under probabilities a row counts for each class with its probability; that takes memory for
    classes x rows x outputs. Under `Logistic` every output has two classes of its own, and the
    rates are added. Classes with a single row in the batch have rate 0. Rows of the `queue` count
    as if they were of this batch, which carries the gradient of all.

    Args:
        weight: See `Regularizer`.
        eps2: Square of the resolution, in squared units of the outputs; positive.
        potential: One on the simplex, `Softmax()` by default, or `Logistic()`, or their criterion.
        ignore_index: See `Regularizer`.
        queue: See `BatchRegularizer`.
        max_rows: See `BatchRegularizer`.
        group: See `BatchRegularizer`.

    Raises:
        TypeError: See `BatchRegularizer`.
        ValueError: See `BatchRegularizer`; for a potential without classes, an `eps2` that is not
            positive, and features under `Logistic`.

    Reference:
        docs/regularizers.md.

    Example:
        >>> import torch
        >>> from conjopt.regularizers import OutputCodingRate
        >>> rate = OutputCodingRate(weight=0.03, eps2=0.5)
        >>> outputs = torch.tensor([[2.0, 0.0], [4.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
        >>> rate.estimate(outputs, torch.tensor([0, 0, 1, 1]))  # a quarter of log 2
        tensor(0.1733)
    """

    def __init__(
        self,
        weight: float | Schedule = 0.03,
        eps2: float = 0.5,
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
        if not isinstance(eps2, int | float) or not 0 < eps2 < math.inf:
            raise ValueError(f"eps2={eps2!r}: expected a positive number.")
        self.eps2 = float(eps2)

    def _of_classes(self, rows: Tensor, share: Tensor, labels: Tensor, classes: int) -> Tensor:
        size = share.new_zeros(classes).index_add(0, labels, share)
        if _can_look_at(share):
            # A class of a single row has rate 0; with many classes most are such.
            members = share.new_zeros(classes).index_add(0, labels, (share > 0).to(share))
            several = ((share > 0) & (members[labels] > 1)).nonzero().squeeze(1)
            if 0 < 2 * len(several) < len(share):
                rows, share, labels = rows[several], share[several], labels[several]
        own = (share / torch.where(share > 0, size[labels], 1) / self.eps2).sqrt()
        rows = rows * own.unsqueeze(1)  # the covariance of a class, over eps2, is the sum of x x^T
        trace = share.new_zeros(classes).index_add(0, labels, rows.detach().square().sum(1))
        count, width = rows.shape
        if width**2 * (count + classes * width / 3) < count**2 * (width + count / 3):
            products = rows.unsqueeze(2) * rows.unsqueeze(1)
            sums = rows.new_zeros(classes, width, width).index_add(0, labels, products)
            return half_logdet(sums, _wide(size, width), _wide(trace, width))
        # det(I + X^T X) = det(I + X X^T): one factorisation of blocks, a block for each class.
        blocks = gram(rows).masked_fill(labels != labels.unsqueeze(1), 0)
        weights = torch.where(share > 0, size[labels], 0)
        return half_logdet(blocks, weights, trace[labels])

    def _of_shares(self, rows: Tensor, shares: Tensor) -> Tensor:
        size = shares.sum(0)
        inner = (shares / torch.where(size > 0, size, 1)).T  # (classes, R), weights in a class
        rows = rows - (inner @ rows).unsqueeze(1)  # (classes, R, d)
        rows = rows * (inner / self.eps2).sqrt().unsqueeze(2)
        trace = rows.detach().square().sum((1, 2))
        small = rows.mT @ rows if rows.shape[2] <= rows.shape[1] else rows @ rows.mT
        width = small.shape[1]
        return half_logdet(small, _wide(size, width), _wide(trace, width))

    def _of_answers(self, share: Tensor, variance: Tensor) -> Tensor:
        return (share * (variance / self.eps2).log1p()).sum() / 2

    def extra_repr(self) -> str:
        """Return the arguments, for `repr`."""
        return f"{super().extra_repr()}, eps2={self.eps2}"


class WithinClassScatter(_Spread):
    """The mean squared distance of the outputs from the mean of their class.

    It is the first order of `OutputCodingRate`, which is at most this over `2 eps2`, and cheaper.
    It grows with the square of the outputs where the rate grows with their logarithm, so large
    weights do more harm. Targets, centring and queue are those of the rate.

    Args:
        weight: See `Regularizer`.
        potential: One on the simplex, `Softmax()` by default, or `Logistic()`, or their criterion.
        ignore_index: See `Regularizer`.
        queue: See `BatchRegularizer`.
        max_rows: See `BatchRegularizer`.
        group: See `BatchRegularizer`.

    Raises:
        TypeError: See `BatchRegularizer`.
        ValueError: See `BatchRegularizer`; for a potential without classes, and features under
            `Logistic`.

    Reference:
        docs/regularizers.md.

    Example:
        >>> import torch
        >>> from conjopt.regularizers import WithinClassScatter
        >>> outputs = torch.tensor([[2.0, 0.0], [4.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
        >>> WithinClassScatter().estimate(outputs, torch.tensor([0, 0, 1, 1]))
        tensor(0.2500)
    """

    def __init__(
        self,
        weight: float | Schedule = 0.01,
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

    def _of_classes(self, rows: Tensor, share: Tensor, labels: Tensor, classes: int) -> Tensor:
        return share @ rows.square().sum(1)

    def _of_shares(self, rows: Tensor, shares: Tensor) -> Tensor:
        size, share = shares.sum(0), shares.sum(1)
        rows = rows - share @ rows  # less to cancel
        means = (shares / torch.where(size > 0, size, 1)).T @ rows
        return share @ rows.square().sum(1) - size @ means.square().sum(1)

    def _of_answers(self, share: Tensor, variance: Tensor) -> Tensor:
        return (share * variance).sum()


def _classes(batch: Rows) -> tuple[Tensor, Tensor, Tensor, int]:
    """Deviations from the means of the classes, shares, labels, and a bound on the labels."""
    batch = batch.with_few_classes()
    labels, classes, share = batch.targets, batch.width, batch.share
    size = share.new_zeros(classes).index_add(0, labels, share)
    inner = share / torch.where(share > 0, size[labels], 1)
    sums = batch.rows.new_zeros(classes, batch.rows.shape[1])
    means = sums.index_add(0, labels, batch.rows * inner.unsqueeze(1))
    # index_select: the backward pass of indexing is several times slower
    return batch.rows - means.index_select(0, labels), share, labels, classes


def _answers(batch: Rows) -> tuple[Tensor, Tensor]:
    """Shares and variances of every output given its own answer, `(2, k)` each."""
    yes = batch.points
    shares = batch.share.unsqueeze(1) * torch.stack([yes, 1 - yes])  # (2, R, k)
    size = shares.sum(1)
    inner = shares / torch.where(size > 0, size, 1).unsqueeze(1)
    means = (inner * batch.rows).sum(1, keepdim=True)
    return size, (inner * (batch.rows - means).square()).sum(1)


def _wide(of_class: Tensor, width: int) -> Tensor:
    """A number of each class for all rows of its matrix, `(classes, width)`."""
    return of_class.unsqueeze(1).expand(-1, width)
