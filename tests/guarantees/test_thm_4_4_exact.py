"""Thm 4.4 over every sample of small laws: the probability of a miss is summed, not estimated."""

import itertools
import math

import numpy as np
import pytest
from scipy.stats import binom

from conjopt.bounds import heldout_certificate
from conjopt.bounds.mean_bounds import bets

METHODS = ["betting", "kl", "hoeffding", "empirical-bernstein"]
# Values in [0,1] and their probabilities.
LAWS = {
    "fair coin": ([0.0, 1.0], [0.5, 0.5]),
    "rare large loss": ([0.0, 1.0], [0.9, 0.1]),
    "rare small loss": ([0.0, 1.0], [0.1, 0.9]),
    "narrow": ([0.4, 0.5], [0.7, 0.3]),
    "small or large": ([0.02, 1.0], [0.85, 0.15]),
}


def every_sample(law, n):
    """Rows of samples in order, and their probabilities."""
    values, probabilities = map(np.array, law)
    index = np.array(list(itertools.product(range(len(values)), repeat=n)))
    return values[index], probabilities[index].prod(1)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("anytime", [False, True])
@pytest.mark.parametrize("law", LAWS)
def test_misses_have_at_most_the_stated_probability(method, anytime, law):
    samples, probabilities = every_sample(LAWS[law], 8)
    mean = float(np.dot(*LAWS[law]))
    for d in (0.05, 0.5):
        options = {"max_loss": 1.0, "confidence": 1 - d, "method": method, "anytime": anytime}
        sides = [
            [heldout_certificate(x, side=side, **options) for x in samples]
            for side in ("upper", "lower")
        ]
        above = probabilities[np.array(sides[0]) < mean - 1e-12].sum()
        below = probabilities[np.array(sides[1]) > mean + 1e-12].sum()
        assert above <= d
        assert below <= d
        both = [heldout_certificate(x, side="two-sided", **options) for x in samples]
        missed = [not low - 1e-12 <= mean <= high + 1e-12 for low, high in both]
        assert probabilities[missed].sum() <= d


@pytest.mark.parametrize("law", LAWS)
def test_the_wealth_is_a_martingale_at_the_mean(law):
    mean = float(np.dot(*LAWS[law]))
    samples, probabilities = every_sample(LAWS[law], 9)
    for scale in (0.1, 1.0, 2 * math.log(20)):
        factors = [1 + bets(x, scale) * (mean - x) for x in samples]
        expected = probabilities @ np.cumprod(factors, axis=1)
        np.testing.assert_allclose(expected, 1.0, rtol=1e-12)


@pytest.mark.parametrize("n", [1, 5, 50, 1000])
@pytest.mark.parametrize("mean", [1e-3, 0.02, 0.3, 0.5, 0.9])
def test_misses_of_kl_for_coins(n, mean):
    # It depends on the number of heads alone.
    step = max(1, n // 200)
    for d in (0.05, 0.5):
        heads = 0
        while heads < n:  # the greatest number whose bound misses; bounds increase in it
            x = np.zeros(n)
            x[: heads + 1] = 1
            options = {"max_loss": 1.0, "confidence": 1 - d, "method": "kl"}
            if heldout_certificate(x, **options) >= mean:
                break
            heads += step
        missing = heads if heads else (heldout_certificate(np.zeros(n), **options) < mean) - 1
        assert binom.cdf(missing, n, mean) <= d
