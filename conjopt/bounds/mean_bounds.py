"""Upper bounds on a mean from numbers in [0,1], for a sample size fixed beforehand (Thm 4.4).

Each maps numbers `x`, `(n,)`, and `d` to a number that is below their expectation with probability
at most `d`. It may exceed 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import scipy  # whose parts are imported when they are used

from conjopt.bounds.reading import Array

__all__ = [
    "BELOW_ONE",
    "MOST_BET",
    "bets",
    "betting",
    "empirical_bernstein",
    "hoeffding",
    "increasing_root",
    "kl",
    "past_mean",
    "wealth_root",
]

MOST_BET = 0.9  # below 1, so that the wealth stays positive
BELOW_ONE = float(np.nextafter(1, 0))
_XTOL = 1e-15


def hoeffding(x: Array, d: float) -> float:
    """`mean + sqrt(log(1/d) / (2 n))`."""
    return float(x.mean()) + math.sqrt(math.log(1 / d) / (2 * len(x)))


def empirical_bernstein(x: Array, d: float) -> float:
    """`mean + sqrt(2 V log(2/d) / n) + 7 log(2/d) / (3 (n-1))`, `V` the sample variance.

    Maurer and Pontil (2009), Theorem 4.
    """
    n, w = len(x), math.log(2 / d)
    if n == 1:
        return 1.0
    return float(x.mean()) + math.sqrt(2 * float(x.var(ddof=1)) * w / n) + 7 * w / (3 * (n - 1))


def kl(x: Array, d: float) -> float:
    """Greatest `q` with `n KL(mean, q) <= log(1/d)`, for the relative entropy of two coins."""
    n, p = len(x), float(x.mean())
    if p == 0:
        return -math.expm1(math.log(d) / n)  # (1 - q)^n = d

    def excess(q: float) -> float:
        return n * float(
            scipy.special.rel_entr(p, q) + scipy.special.rel_entr(1 - p, 1 - q)
        ) + math.log(d)

    # By Pinsker's inequality the bound is never above Hoeffding's; some room for rounding.
    high = p + 1.01 * (hoeffding(x, d) - p)
    return increasing_root(excess, p, min(high, BELOW_ONE)) if p < BELOW_ONE else 1.0


def betting(x: Array, d: float) -> float:
    """Root of the wealth of bets that know how many numbers there are.

    Waudby-Smith and Ramdas (2024), predictable plug-in, one-sided.
    """
    return wealth_root(x, bets(x, 2 * math.log(1 / d) / len(x)), d)


def wealth_root(x: Array, lam: Array, d: float) -> float:
    """Root `m` of `max_t K_t(m) = 1/d`, `K_t(m) = prod_{i<=t} (1 + lam_i (m - x_i))`.

    The greatest wealth on the way reaches `1/d` as rarely as the last (Ville's inequality), and
    rules out more.
    """
    lost = lam * x

    def excess(m: float) -> float:
        return float(np.cumsum(np.log1p(lam * m - lost)).max()) + math.log(d)

    return increasing_root(excess, 0.0, 1.0)


def bets(x: Array, scale: float | Array, most: float = MOST_BET) -> Array:
    """`lam_i = min(sqrt(scale / s2_{i-1}), most)`: each from the numbers before it alone."""
    return np.minimum(np.sqrt(scale / past_variance(x)), most)


def past_mean(x: Array) -> Array:
    """`mu_{i-1} = (1/2 + sum_{j<i} x_j) / i`."""
    return _before(x, 0.5)


def past_variance(x: Array) -> Array:
    """`s2_{i-1} = (1/4 + sum_{j<i} (x_j - mu_j)^2) / i`, with `mu_j` over `x_1..x_j`."""
    mu = (0.5 + np.cumsum(x)) / np.arange(2, len(x) + 2)
    return _before(np.square(x - mu), 0.25)


def _before(x: Array, start: float) -> Array:
    total = np.empty(len(x))
    total[0] = start
    np.cumsum(x[:-1], out=total[1:])
    total[1:] += start
    return total / np.arange(1, len(x) + 1)


def increasing_root(function: Callable[[float], float], low: float, high: float) -> float:
    """Return where an increasing function, not positive at `low`, is 0, rounded upwards.

    1 if it is not positive at `high` either: then nothing is ruled out.
    """
    if function(high) <= 0:
        return 1.0
    root = scipy.optimize.brentq(function, low, high, xtol=_XTOL)
    return min(float(root) + 2 * _XTOL, high)
