"""Upper bounds on a mean that hold at every sample size at once (Thm 4.4, anytime-valid).

Each maps numbers `x` in [0,1], in the order in which they came, and `d` to a number. With
probability at least `1 - d`, the number is at or above the expectation after the first, after the
second, and after every later one of them, so it does not matter when one stops. By Ville's
inequality, a nonnegative supermartingale that starts at 1 ever reaches `1/d` with probability at
most `d`; a mean at which it has done so is ruled out, for good: hence the minimum over the past.
"""

from __future__ import annotations

import math

import numpy as np
import scipy  # whose parts are imported when they are used

from conjopt.bounds.mean_bounds import BELOW_ONE, bets, increasing_root, past_mean, wealth_root
from conjopt.bounds.reading import Array

__all__ = ["betting", "empirical_bernstein", "hoeffding", "kl"]

# The first bets have no past to go by, and what they lose counts at every later number.
MOST_FADING_BET = 0.5


def betting(x: Array, d: float) -> float:
    """Root of the greatest wealth so far, with bets that do not know how many are to come.

    Waudby-Smith and Ramdas (2024), predictable plug-in, one-sided.
    """
    lam = bets(x, _fading(x, 2 * math.log(1 / d)), MOST_FADING_BET)
    return wealth_root(x, lam, d)


def hoeffding(x: Array, d: float) -> float:
    """`min_t [sum lam x + log(1/d) + sum lam^2 / 8] / sum lam`, sums over `i <= t`.

    Waudby-Smith and Ramdas (2024), Theorem 1.
    """
    lam = np.minimum(np.sqrt(_fading(x, 8 * math.log(1 / d))), 1)
    return _least(x, lam, np.square(lam) / 8, d)


def empirical_bernstein(x: Array, d: float) -> float:
    """`min_t [sum lam x + log(1/d) + sum (x - mu)^2 (-log(1-lam) - lam)] / sum lam`.

    Waudby-Smith and Ramdas (2024), Theorem 2.
    """
    lam = bets(x, _fading(x, 2 * math.log(1 / d)), MOST_FADING_BET)
    cost = np.square(x - past_mean(x)) * (-np.log1p(-lam) - lam)
    return _least(x, lam, cost, d)


def kl(x: Array, d: float) -> float:
    """The root `m` of `max_t K_t(m) = 1/d`, `K_t` the mixture of likelihood ratios of coins.

    `K_t(m) = int p^S (1-p)^(t-S) dBeta(1/2,1/2)(p) / (m^S (1-m)^(t-S))`, `S` the sum of the first
    `t`. For numbers in [0,1] it is a supermartingale at their mean, because `x -> a^x b^(1-x)` is
    convex (Robbins 1970; Howard et al. 2021).
    """
    S, t = np.cumsum(x), np.arange(1, len(x) + 1)
    S = np.minimum(S, t)  # not above by rounding
    mixture = scipy.special.betaln(S + 0.5, t - S + 0.5) - math.log(math.pi)

    def excess(m: float) -> float:
        wealth = mixture - S * math.log(m) - (t - S) * math.log1p(-m)
        # Only a mean above what was seen is ruled out: at and below it the wealth says nothing.
        return max(0.0, float(np.where(t * m > S, wealth, 0.0).max())) + math.log(d)

    return increasing_root(excess, float(np.finfo(float).tiny), BELOW_ONE)


def _fading(x: Array, scale: float) -> Array:
    """`scale / (t log(1 + t))`: squares of bets that shrink as fast as they may."""
    t = np.arange(1, len(x) + 1)
    return scale / (t * np.log1p(t))


def _least(x: Array, lam: Array, cost: Array, d: float) -> float:
    total = np.cumsum(lam * x) + np.cumsum(cost) + math.log(1 / d)
    return float((total / np.cumsum(lam)).min())
