"""Coding rates: how far classes of real features spread, in nats (docs/theory.md, section 5).

Bounds on `H(Z|Y)` that need covariances only. They hold for every law, and are sharp for Gaussian
features and coarse noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from conjopt.entropy.reading import Sample, read_labels, read_rows

# Of a uniform law in a cube: what its entropy lacks to that of a Gaussian, nats per coordinate.
CUBE = math.log(2 * math.pi * math.e / 12) / 2


def coding_rate(
    outputs: Tensor | ArrayLike,
    targets: Tensor | ArrayLike | None = None,
    *,
    eps2: float = 0.5,
) -> Tensor:
    """Return the class-conditional coding rate `sum_c (n_c/n) 1/2 logdet(I + Cov_c / eps2)`.

    It bounds what features tell beyond the class when noise blurs them: for every law,
    `I(Z; Z + N | Y) <= 1/2 E_Y logdet(I + Cov(Z|Y) / eps2)` with `N` Gaussian of variance `eps2`
    per coordinate, with equality for Gaussian classes. This is exact for the given data as a law of
    their own. As an estimate of a population it is low with few samples per class: a class of
    `n_c` samples has a covariance of rank `n_c - 1` at most. Take 10 times as many as dimensions.

    Args:
        outputs: Logits or features, floating and finite, `(n, ...)`, flattened to `(n, d)`.
        targets: Class indices `(n,)`; None takes all samples as one class. A class of one sample
            has rate 0.
        eps2: Variance of the noise, in squared units of the outputs.

    Returns:
        Shape `()`, float64 on the CPU, in nats, `>= 0`.

    Raises:
        TypeError: For outputs that are not floating, or targets that are not class indices.
        ValueError: For shapes that do not belong together, empty data, values that are not finite
            or too large to be squared, and an `eps2` that is not positive.

    Reference:
        docs/theory.md, section 5; docs/entropy_estimates.md.

    Example:
        >>> from conjopt.entropy import coding_rate
        >>> outputs = [[3.0], [1.0], [7.0], [9.0]]  # variance 1 in each class, 10 in all
        >>> coding_rate(outputs, [0, 0, 1, 1], eps2=1.0)
        tensor(0.3466, dtype=torch.float64)
        >>> coding_rate(outputs, eps2=1.0)
        tensor(1.1989, dtype=torch.float64)
    """
    rows, groups = _read(outputs, targets, "eps2", eps2)
    return _rate(rows, groups, eps2)


def quantizer_entropy_bound(
    outputs: Tensor | ArrayLike,
    targets: Tensor | ArrayLike | None = None,
    *,
    quantum: float,
) -> Tensor:
    """Bound the entropy `H(Q(Z)|Y)` of features rounded to multiples of a quantum.

    With `Q` the rounded features of dimension `d`, whatever their law,
    `H(Q|Y) <= E_Y 1/2 logdet(I + 12 Cov(Q|Y) / quantum^2) + d/2 log(2 pi e / 12)`: noise that is
    uniform in a cell makes of `Q` a density of entropy `H(Q) + d log(quantum)`, at most that of a
    Gaussian of its covariance. The covariance is that of the **rounded** features. With that of `Z`
    itself the bound fails (two values next to a border), but holds on average over rounding with
    a random offset.

    Args:
        outputs: Logits or features, floating and finite, `(n, ...)`, flattened to `(n, d)`.
        targets: Class indices `(n,)`; None takes all samples as one class.
        quantum: Side of the cells, in units of the outputs.

    Returns:
        Shape `()`, float64 on the CPU, in nats.

    Raises:
        TypeError: As `coding_rate`.
        ValueError: As `coding_rate`.

    Reference:
        docs/theory.md, section 5; docs/entropy_estimates.md.

    Example:
        >>> from conjopt.entropy import quantizer_entropy_bound
        >>> quantizer_entropy_bound([[0.1], [0.2], [1.1], [1.2]], quantum=1.0)  # H is log 2
        tensor(0.8696, dtype=torch.float64)
    """
    rows, groups = _read(outputs, targets, "quantum", quantum)

    def cells(index: slice | Tensor) -> Tensor:
        return (rows(index) / quantum).round()

    return _rate(cells, groups, 1 / 12) + rows(slice(0, 1)).shape[1] * CUBE


Rows = Callable[[slice | Tensor], Tensor]


def _read(
    outputs: Tensor | ArrayLike, targets: Tensor | ArrayLike | None, name: str, scale: float
) -> tuple[Rows, list[Tensor]]:
    """Check the arguments; return the rows in float64 when called, and those of each class."""
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"{name}={scale}: expected a positive number.")
    if targets is None:
        sample = Sample(None, targets=outputs, outputs=outputs)
        label = torch.zeros(len(sample.rows), dtype=torch.int64)
    else:
        sample = Sample(None, targets=targets, outputs=outputs)
        label = read_labels(sample)
    values = read_rows(sample)
    return lambda index: values[index].double(), list(classes(label))


def classes(label: Tensor) -> Iterator[Tensor]:
    """The rows of each class that occurs, in the order of the classes."""
    counts = torch.unique(label, return_counts=True)[1]
    return iter(torch.argsort(label, stable=True).split(counts.tolist()))


def _rate(rows: Rows, groups: list[Tensor], eps2: float) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for members in groups:
        total += len(members) * _class_rate(rows(members), eps2)
    total /= sum(map(len, groups))
    if not bool(torch.isfinite(total)):
        raise ValueError(
            "outputs are so large that their squares overflow: divide them, and the quantum with "
            "them (eps2 by the square)."
        )
    return total


def _class_rate(z: Tensor, eps2: float) -> Tensor:
    """Return `1/2 logdet(I + Cov / eps2)` of one class, `(n, d) -> ()`."""
    n, d = z.shape
    z = z - z.mean(0)
    z = z / math.sqrt(n * eps2)
    gram = z.mT @ z if d <= n else z @ z.mT  # the same determinant
    factor, failed = torch.linalg.cholesky_ex(torch.eye(len(gram), dtype=z.dtype) + gram)
    rate = factor.diagonal().log().sum()
    return torch.where(failed == 0, rate, torch.nan)
