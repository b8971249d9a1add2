"""Laws over cells: sums of random signs and mean deviations in closed form (Thm 4.2 and 4.3)."""

from __future__ import annotations

import numpy as np
import scipy  # whose parts are imported when they are used
from numpy.typing import ArrayLike
from torch import Tensor

from conjopt.bounds.reading import Array
from conjopt.entropy.reading import as_tensor

__all__ = ["absolute_sum", "deviation", "read_cells", "read_law"]

# Of Gamma(x + 1/2) / (sqrt(x) Gamma(x)) in 1/x.
STIRLING = (1, -1 / 8, 1 / 128, 5 / 1024, -21 / 32768, -399 / 262144, 869 / 4194304)


def absolute_sum(j: Array) -> Array:
    """Return `a(j) = E|sum of j random signs|`, for `j >= 1`: 1, 1, 1.5, 1.5, 1.875, ...

    `a(2i+1) = a(2i+2) = (2i+1) C(2i,i) / 4^i = 2 / B(i+1, 1/2)`, to a few roundings for any `j`.
    """
    x = np.floor((np.asarray(j, dtype=np.float64) + 1) / 2)  # i + 1
    # The beta function of large arguments is a difference of large logarithms.
    series = np.sqrt(x) * np.polynomial.polynomial.polyval(1 / x, STIRLING)
    return np.where(
        x < 64, 2 / scipy.special.beta(np.minimum(x, 64), 0.5), 2 / np.sqrt(np.pi) * series
    )


def deviation(q: Array, n: int) -> Array:
    """Return `E|q - qhat|` of the frequency `qhat` of `n` draws, by De Moivre.

    `2 q (1-q) C(n-1, m) q^m (1-q)^(n-1-m)` with `m = floor(n q)`; 0 for `q` of 0 or 1.
    """
    m = np.minimum(np.floor(n * q), n - 1)
    # log C(n-1, m) = -log n - log B(m + 1, n - m)
    log_mass = (
        -np.log(n)
        - scipy.special.betaln(m + 1, n - m)
        + scipy.special.xlogy(m, q)
        + scipy.special.xlog1py(n - 1 - m, -q)
    )
    exact: Array = 2 * q * (1 - q) * np.exp(log_mass)
    return np.minimum(exact, np.sqrt(q * (1 - q) / n))


def read_cells(name: str, cells: Tensor | ArrayLike) -> Array:
    """Return how many samples each occupied cell holds."""
    labels = as_tensor(f"{name}: cells", cells)
    if labels.is_floating_point():
        raise TypeError(
            f"{name}: cells of dtype {labels.dtype}, expected whole numbers, one for each sample: "
            "quantize (conjopt.bounds.LogitGrid), or pass form='population' with probabilities"
        )
    if labels.ndim != 1 or len(labels) == 0:
        raise ValueError(
            f"{name}: cells of shape {tuple(labels.shape)}, expected (n,) with n >= 1, the number "
            "of the cell of each sample"
        )
    return np.unique(labels.numpy(), return_counts=True)[1].astype(np.float64)


def read_law(name: str, law: Tensor | ArrayLike) -> Array:
    """Return probabilities, checked to be some, and scaled to sum to 1 exactly."""
    values: Array = as_tensor(name, law).double().numpy()
    if values.ndim != 1 or not (values >= 0).all() or not abs(values.sum() - 1) <= 1e-5:
        raise ValueError(
            f"{name} of shape {values.shape} with least {np.min(values, initial=np.inf):.6g} and "
            f"sum {values.sum():.6g}, expected (C,), one nonnegative number for each cell, with "
            "sum 1; divide counts by their sum"
        )
    return values / values.sum()
