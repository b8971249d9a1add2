"""Thm 4.3 misses at most as often as stated: counts over drawn samples, and exactly.

A bound that fails with probability at most `d` fails more than `binom.ppf(1 - 1e-6, N, d)` times
in `N` independent samples with probability below 1e-6.
"""

import itertools

import numpy as np
import pytest
from scipy.stats import binom

from conjopt.bounds import total_variation_gap, uniform_gap_bound

N = 1500
LAWS = {
    "two cells": np.array([0.5, 0.5]),
    "a rare cell": np.array([0.99, 0.01]),
    "ten cells": np.full(10, 0.1),
    "many cells": np.full(300, 1 / 300),
    "heavy tail": 1 / np.arange(1, 101) ** 2 / (1 / np.arange(1, 101) ** 2).sum(),
}


def bounds(q, cells, form, confidence):
    options = {"max_loss": 1.0, "confidence": confidence, "form": form}
    if form == "population":
        return uniform_gap_bound(q, samples=len(cells), **options)
    return uniform_gap_bound(cells, **options)


@pytest.mark.parametrize("form", ["empirical", "self-bounding", "population"])
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("n", [20, 400])
def test_misses_are_at_most_as_many_as_stated(form, law, n):
    q, d = LAWS[law], 0.2
    rng = np.random.default_rng(0)
    misses = 0
    for counts in rng.multinomial(n, q, size=N):
        cells = np.repeat(np.arange(len(q)), counts)
        # The worst of all heads, Thm 4.2.
        gap = total_variation_gap(q, counts / n, max_loss=1.0)
        misses += gap > bounds(q, cells, form, 1 - d)
    assert misses <= binom.ppf(1 - 1e-6, N, d)


@pytest.mark.parametrize("form", ["empirical", "self-bounding", "population"])
@pytest.mark.parametrize("d", [0.05, 0.3, 0.6, 0.9])
def test_misses_over_every_sample_of_a_small_law(form, d):
    for q, n in ((np.array([0.5, 0.5]), 8), (np.array([0.1, 0.9]), 8), (np.full(3, 1 / 3), 6)):
        missed = 0.0
        for sample in itertools.product(range(len(q)), repeat=n):
            frequencies = np.bincount(sample, minlength=len(q)) / n
            gap = total_variation_gap(q, frequencies, max_loss=1.0)
            if gap > bounds(q, np.array(sample), form, 1 - d) + 1e-12:
                missed += float(np.prod(q[list(sample)]))
        assert missed <= d
