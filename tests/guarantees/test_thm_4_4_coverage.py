"""Thm 4.4 on hard laws: misses are at most as many as stated.

A bound that misses with probability at most `d` misses more than `binom.ppf(1 - 1e-6, N, d)` times
in `N` independent samples with probability below 1e-6.
"""

import numpy as np
import pytest
from scipy.stats import binom

from conjopt.bounds import heldout_certificate

N, D = 600, 0.1
METHODS = ["betting", "kl", "hoeffding", "empirical-bernstein"]
# Draws and their mean.
LAWS = {
    "rare large losses": (lambda rng, n: (rng.random(n) < 0.02).astype(float), 0.02),
    "small and rarely large": (lambda rng, n: np.where(rng.random(n) < 0.03, 1.0, 0.01), 0.0397),
    "coin": (lambda rng, n: (rng.random(n) < 0.5).astype(float), 0.5),
    "beta": (lambda rng, n: rng.beta(0.1, 0.9, n), 0.1),
    "narrow": (lambda rng, n: 0.5 + 0.01 * (rng.random(n) - 0.5), 0.5),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("anytime", [False, True])
@pytest.mark.parametrize("law", LAWS)
def test_misses_are_at_most_as_many_as_stated(method, anytime, law):
    draw, mean = LAWS[law]
    rng = np.random.default_rng(0)
    options = {"max_loss": 1.0, "confidence": 1 - D, "method": method, "anytime": anytime}
    misses = {"upper": 0, "lower": 0}
    for _ in range(N):
        x = draw(rng, 120)
        misses["upper"] += heldout_certificate(x, **options) < mean
        misses["lower"] += heldout_certificate(x, side="lower", **options) > mean
    assert max(misses.values()) <= binom.ppf(1 - 1e-6, N, D)


def test_stopping_when_it_suits_needs_the_anytime_form():
    """One who looks at growing samples, and stops at the first bound below the risk.

    The form for a fixed number of losses then misses more often than stated; the anytime form,
    which keeps the least bound of the past, does not.
    """
    rng = np.random.default_rng(1)
    looks = np.unique(np.geomspace(5, 1000, 30).astype(int))
    options = {"max_loss": 1.0, "confidence": 1 - D, "method": "kl"}
    missed = {"fixed": 0, "anytime": 0}
    for _ in range(1000):
        x = (rng.random(looks[-1]) < 0.3).astype(float)
        missed["fixed"] += any(heldout_certificate(x[:n], **options) < 0.3 for n in looks)
        missed["anytime"] += heldout_certificate(x, anytime=True, **options) < 0.3
    assert missed["anytime"] <= binom.ppf(1 - 1e-6, 1000, D) < missed["fixed"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("law", LAWS)
def test_an_anytime_bound_never_rises(method, law):
    # So what it says in the end missed if it missed at any time.
    x = LAWS[law][0](np.random.default_rng(2), 300)
    options = {"max_loss": 1.0, "method": method, "anytime": True}
    bounds = [heldout_certificate(x[:n], **options) for n in range(1, 301)]
    assert np.diff(bounds).max() <= 1e-12
