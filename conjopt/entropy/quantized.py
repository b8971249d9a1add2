"""Entropies of features rounded to cells, with corrections of their bias.

An entropy of counts `n_c` out of `n` is low on average. Two corrections are offered: that of
Miller and Madow, the first term of an expansion in `1/n`, and the jackknife, which leaves out each
sample in turn. Both take one pass over the counts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from conjopt.entropy.grouping import group_rows
from conjopt.entropy.laws import Targets, blocks, renumber
from conjopt.entropy.reading import Sample, read_labels, read_rows, read_targets
from conjopt.potentials import Potential, Softmax

CORRECTIONS = ("none", "miller-madow", "jackknife")


@dataclass(frozen=True)
class FeatureEntropies:
    """Entropies of rounded features given the class, made by `quantized_feature_entropies`.

    Attributes:
        classes: Class indices that occur, `(C,)`, ascending.
        counts: Their samples `n_y`, `(C,)`.
        shannon: `H(Q|Y=y)`, `(C,)`, in nats.
        half: Renyi's entropy of order 1/2, `H_half(Q|Y=y) = 2 log sum_q sqrt(p(q|y))`, `(C,)`.
        cells: Number of pairs of a cell and a class that occur.

    Reference:
        docs/theory.md, section 5; docs/entropy_estimates.md.

    Example:
        >>> from conjopt.entropy import quantized_feature_entropies
        >>> found = quantized_feature_entropies(
        ...     [[0.1], [0.2], [5.0], [9.0]], [0, 0, 1, 1], quantum=1.0, correction="none"
        ... )
        >>> found.shannon, found.conditional
        (tensor([0.0000, 0.6931], dtype=torch.float64), tensor(0.3466, dtype=torch.float64))
        >>> found.root_sum  # 1/sqrt(2) + 2/sqrt(4), as three cells have 1/2, 1/4 and 1/4
        tensor(1.7071, dtype=torch.float64)
    """

    classes: Tensor
    counts: Tensor
    shannon: Tensor
    half: Tensor
    cells: int

    @property
    def conditional(self) -> Tensor:
        """`H(Q|Y) = sum_y (n_y/n) H(Q|Y=y)`, `()`."""
        return (self._share * self.shannon).sum()

    @property
    def root_sum(self) -> Tensor:
        """`sum_y sqrt(n_y/n) exp(H_half(Q|Y=y) / 2)`, the `sum_c sqrt(q_c)` of a gap bound, `()`.

        The cells `c` are pairs of a cell of features and a class. Over `sqrt(n)` it should be well
        below 1 for a bound on the gap of all heads to say anything.
        """
        return (self._share.sqrt() * (self.half / 2).exp()).sum()

    @property
    def _share(self) -> Tensor:
        return self.counts.double() / self.counts.sum()


def quantized_feature_entropies(
    outputs: Tensor | ArrayLike,
    targets: Tensor | ArrayLike | None = None,
    *,
    quantum: float | None,
    correction: str = "jackknife",
) -> FeatureEntropies:
    """Estimate the entropies of rounded features given the class, of order 1 and 1/2.

    Args:
        outputs: Logits or features, floating and finite, `(n, ...)`.
        targets: Class indices `(n,)`; None takes all samples as one class.
        quantum: Features are rounded to its multiples; None for no rounding, for discrete features.
        correction: `"none"`, for the entropies of the given data as a law of their own, which are
            too low as estimates of a population; `"miller-madow"`; or `"jackknife"`. Corrected
            values can be above the log of the number of cells. No correction helps where most
            cells hold one sample.

    Returns:
        Float64 on the CPU, in nats.

    Raises:
        TypeError: For outputs that are not floating, or targets that are not class indices.
        ValueError: For shapes that do not belong together, empty data, values that are not finite,
            a quantum that is not positive or so small that rounding overflows, and an unknown
            correction.

    Reference:
        docs/theory.md, section 5; docs/entropy_estimates.md.

    Example:
        >>> from conjopt.entropy import quantized_feature_entropies
        >>> outputs = [[0.0], [0.1], [0.9], [5.0]]
        >>> for correction in ("none", "miller-madow", "jackknife"):
        ...     found = quantized_feature_entropies(outputs, quantum=1.0, correction=correction)
        ...     print(f"{correction:12} {float(found.conditional):.4f} {float(found.half[0]):.4f}")
        none         1.0397 1.0696
        miller-madow 1.2897 1.2072
        jackknife    1.5562 1.6343
    """
    _check(quantum, correction)
    sample = Sample(None, targets=outputs if targets is None else targets, outputs=outputs)
    label = torch.zeros(len(sample.rows), dtype=torch.int64)
    label = label if targets is None else read_labels(sample)
    classes, label = torch.unique(label, return_inverse=True)
    cell = _cells(sample, quantum)
    pair, count = torch.unique(label * (int(cell.max()) + 1) + cell, return_counts=True)
    of_class = pair.div(int(cell.max()) + 1, rounding_mode="floor")
    total = torch.bincount(label)
    return FeatureEntropies(
        classes=classes,
        counts=total,
        shannon=_shannon(count.double(), of_class, total.double(), correction),
        half=_half(count.double(), of_class, total.double(), correction),
        cells=len(pair),
    )


def quantized_conditional_entropy(
    outputs: Tensor | ArrayLike,
    targets: Tensor | ArrayLike,
    potential: Potential,
    *,
    quantum: float | None,
    correction: str = "jackknife",
) -> Tensor:
    """Estimate `Ent(Y|Q)` of targets given features that are rounded to a quantum.

    Rounding loses information, so `Ent(Y|Q) >= Ent(Y|Z)` (Thm 1.4). Without correction it is exact
    for the given data, and as an estimate of a population low on average, down to 0 where each
    sample has a cell of its own; no correction helps there. The jackknife is at least as large as
    the value without correction, and without bias for `Squared` but for cells of a single sample.

    Args:
        outputs: Outputs or features, floating and finite, `(n, ...)`.
        targets: Class indices `(n,)` or points `(n, k)`, see `generalized_entropy`.
        potential: The potential `Phi`.
        quantum: Features are rounded to its multiples; None for no rounding, for discrete features.
        correction: `"none"`, `"miller-madow"` (class indices under `Softmax`) or `"jackknife"`.

    Returns:
        Shape `()`, float64 on the CPU, in units of the mean Fenchel-Young loss.

    Raises:
        TypeError: As `generalized_entropy`, and for outputs that are not floating.
        ValueError: As `generalized_entropy` and `quantized_feature_entropies`, and for a correction
            that the targets or the potential do not have.

    Reference:
        docs/theory.md, Def 1.2 and Thm 1.4; docs/entropy_estimates.md.

    Example:
        >>> from conjopt.entropy import quantized_conditional_entropy
        >>> from conjopt.potentials import Softmax
        >>> outputs, targets = [[0.0], [0.1], [0.9], [1.2]], [0, 1, 1, 1]
        >>> for correction in ("none", "miller-madow", "jackknife"):
        ...     print(quantized_conditional_entropy(
        ...         outputs, targets, Softmax(), quantum=1.0, correction=correction
        ...     ))
        tensor(0.3466, dtype=torch.float64)
        tensor(0.4716, dtype=torch.float64)
        tensor(0.6931, dtype=torch.float64)
    """
    _check(quantum, correction)
    sample = Sample(None, targets=targets, outputs=outputs)
    points = read_targets(sample, potential)
    if correction == "miller-madow" and (points.values.ndim != 1 or potential != Softmax()):
        raise ValueError(
            "correction='miller-madow' is for class indices under Softmax: use 'jackknife', which "
            "fits every potential and every target."
        )
    cell = _cells(sample, quantum)
    if correction == "jackknife":
        return points.entropy(cell) + _left_out(points, cell)
    entropy = points.entropy(cell)
    if correction == "miller-madow":
        pairs = len(torch.unique(cell * points.k + points.values))
        entropy += (pairs - int(cell.max()) - 1) / (2 * len(cell))
    return entropy


def _check(quantum: float | None, correction: str) -> None:
    if quantum is not None and not (math.isfinite(quantum) and quantum > 0):
        raise ValueError(f"quantum={quantum}: expected a positive number, or None.")
    if correction not in CORRECTIONS:
        raise ValueError(f"correction={correction!r}: expected one of {CORRECTIONS}.")


def _cells(sample: Sample, quantum: float | None) -> Tensor:
    """Number the cells of the features from 0, `(n,)`."""
    sample.arrays["outputs"] = read_rows(sample)
    return renumber(group_rows(sample, "outputs", quantum)[0])


def _sums(values: Tensor, of_class: Tensor, like: Tensor) -> Tensor:
    return torch.zeros_like(like).index_add_(0, of_class, values)


def _shannon(count: Tensor, of_class: Tensor, total: Tensor, correction: str) -> Tensor:
    """Return the entropy of each class, `(pairs,), (pairs,), (C,) -> (C,)`."""
    if correction == "jackknife":
        # n H - (n-1) mean of the leave-one-out values: with g(x) = x log x, H is
        # (g(n) - sum g(n_c)) / n, and all but differences of g cancels.
        return _slope(total) - _sums(count * _slope(count), of_class, total) / total
    share = count / total[of_class]
    entropy = _sums(torch.special.entr(share), of_class, total)
    if correction == "miller-madow":
        entropy += (_sums(torch.ones_like(count), of_class, total) - 1) / (2 * total)
    return entropy


def _slope(x: Tensor) -> Tensor:
    """Return `x log x - (x - 1) log(x - 1)` for counts `x >= 1`, without cancellation."""
    less = x - 1
    return x.log() + torch.where(less > 0, less * (1 / less.clamp(min=1)).log1p(), 0)


def _half(count: Tensor, of_class: Tensor, total: Tensor, correction: str) -> Tensor:
    """Return the entropy of order 1/2 of each class, `2 log sum_c sqrt(n_c / n)`."""
    roots = _sums(count.sqrt(), of_class, total)
    entropy = 2 * (roots.log() - total.log() / 2)
    if correction == "miller-madow":
        # E 2 log F for F = sum sqrt(p_c), to first order in 1/n (delta method).
        cells = _sums(torch.ones_like(count), of_class, total)
        share = count / total[of_class]
        factor = roots / total.sqrt()
        mean = _sums((1 - share) / share.sqrt(), of_class, total) / (8 * total)
        variance = (cells - factor.square()).clamp(min=0) / (4 * total)
        entropy += 2 * mean / factor + variance / factor.square()
    if correction == "jackknife":
        less = roots[of_class] - count.sqrt() + (count - 1).sqrt()
        n = total[of_class]
        single = n < 2
        less = 2 * less.where(~single, 1).log() - (n - 1).where(~single, 1).log()
        mean = _sums(count * less, of_class, total) / total
        entropy = torch.where(total < 2, entropy, total * entropy - (total - 1) * mean)
    return entropy


def _left_out(points: Targets, cell: Tensor) -> Tensor:
    """Return what the jackknife adds: `(1/n) sum_i (n_c - 1) D(ybar_-i, ybar)`.

    `n Ent - (n - 1) mean_i Ent_-i` is `(1/n) sum_i B_c - B_c^-i` for `B_c = n_c Ent_c`, and as
    `ybar` mixes `ybar_-i` and `y_i`, `B_c - B_c^-i = D(y_i, ybar) + (n_c - 1) D(ybar_-i, ybar)`.
    """
    keep = points.mixed(cell)
    if not bool(keep.any()):
        return torch.zeros((), dtype=torch.float64)
    some = points.select(keep)
    law = some.law(renumber(cell[keep]))
    values = points.values.double()
    hard = values.ndim == 1
    least, most = values.new_tensor([0.0, 1.0]) if hard else torch.aminmax(values, dim=0)
    total = torch.zeros((), dtype=torch.float64)
    for a, b in blocks(0, len(law.total), law.k):
        means = law.means(a, b)
        for lo, hi in blocks(law.ends[a], law.ends[b], law.k):
            group = law.group[lo:hi]
            mean, others = means[group - a], law.total[group] - 1
            left = mean + (mean - law.rows(lo, hi)) / others[:, None]
            divergence = points.potential.divergence(left.clamp(least, most), mean).clamp(min=0)
            total += (others * divergence) @ law.weight[lo:hi]
    return total / len(cell)
