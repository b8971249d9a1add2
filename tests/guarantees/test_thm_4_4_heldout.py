"""Thm 4.4: each method against its formula, written out with loops and bisection in float64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.stats import beta as beta_law

from conjopt.bounds import heldout_certificate

METHODS = ["betting", "kl", "hoeffding", "empirical-bernstein"]


def bisected(increasing) -> float:
    """Where an increasing function on (0,1) changes its sign; 1 if nowhere."""
    low, high = 0.0, 1.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (low, middle) if increasing(middle) > 0 else (middle, high)
    return high


def wealth(x, d, m, fixed):
    """The greatest wealth so far after each of the numbers, as a logarithm."""
    n, total, squares, log_K, greatest = len(x), 0.5, 0.25, 0.0, -math.inf
    for i, value in enumerate(x, start=1):
        variance = squares / i
        scale = 2 * math.log(1 / d) / (n if fixed else i * math.log(1 + i))
        lam = min(math.sqrt(scale / variance), 0.9 if fixed else 0.5)
        log_K += math.log(1 + lam * (m - value))
        greatest = max(greatest, log_K)
        total += value
        squares += (value - total / (i + 1)) ** 2
    return greatest


def two_coins(p, q):
    if q == 1 and p < 1:  # where bisection ends at 1
        return math.inf
    return sum(a * math.log(a / b) for a, b in ((p, q), (1 - p, 1 - q)) if a > 0)


def log_mixture(S, t, m):
    if m == 1 and t > S:
        return math.inf
    mass = math.lgamma(S + 0.5) + math.lgamma(t - S + 0.5) - math.lgamma(t + 1) - math.log(math.pi)
    return mass - S * math.log(m) - (t - S) * math.log(1 - m)


def plain_fixed(x, d, method):
    n, mean = len(x), math.fsum(x) / len(x)
    if method == "betting":
        return bisected(lambda m: wealth(x, d, m, True) - math.log(1 / d))
    if method == "kl":
        return bisected(lambda q: -1.0 if q <= mean else n * two_coins(mean, q) - math.log(1 / d))
    if method == "hoeffding":
        return mean + math.sqrt(math.log(1 / d) / (2 * n))
    if n == 1:
        return 1.0
    variance = math.fsum((value - mean) ** 2 for value in x) / (n - 1)
    w = math.log(2 / d)
    return mean + math.sqrt(2 * variance * w / n) + 7 * w / (3 * (n - 1))


def plain_anytime(x, d, method):
    if method == "betting":
        return bisected(lambda m: wealth(x, d, m, False) - math.log(1 / d))
    if method == "kl":

        def excess(m):
            ruled = [-1.0]
            for t in range(1, len(x) + 1):
                S = math.fsum(x[:t])
                if m > S / t:
                    ruled.append(log_mixture(S, t, m) - math.log(1 / d))
            return max(ruled)

        return bisected(excess)
    bounds, lam_sum, mean_sum, cost, total, squares = [], 0.0, 0.0, 0.0, 0.5, 0.25
    for i, value in enumerate(x, start=1):
        fading = math.log(1 / d) / (i * math.log(1 + i))
        if method == "hoeffding":
            lam = min(math.sqrt(8 * fading), 1)
            cost += lam**2 / 8
        else:
            lam = min(math.sqrt(2 * fading / (squares / i)), 0.5)
            cost += (value - total / i) ** 2 * (-math.log(1 - lam) - lam)
        lam_sum, mean_sum = lam_sum + lam, mean_sum + lam * value
        total += value
        squares += (value - total / (i + 1)) ** 2
        bounds.append((mean_sum + math.log(1 / d) + cost) / lam_sum)
    return min(bounds)


def draw_losses(kind, n, rng):
    if kind == "0/1":
        return (rng.random(n) < 0.2).astype(float)
    if kind == "rare":
        return (rng.random(n) < 1 / n).astype(float)
    if kind == "small":
        return rng.random(n) * 1e-6
    if kind == "constant":
        return np.full(n, rng.choice([0.0, 0.3, 1.0]))
    return rng.beta(0.2, 1.0, n)


samples = st.tuples(
    st.sampled_from(["0/1", "rare", "small", "constant", "beta"]),
    st.sampled_from([1, 2, 3, 10, 60]),
    st.integers(0, 2**32),
).map(lambda t: draw_losses(t[0], t[1], np.random.default_rng(t[2])))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("anytime", [False, True])
@settings(max_examples=60)
@example(np.array([0.92940687]), 0.05)  # less than a rounding below 1
@given(samples, st.sampled_from([0.5, 0.05, 1e-6]))
def test_the_bound_is_that_of_the_plain_reference(method, anytime, x, d):
    found = heldout_certificate(x, max_loss=1.0, confidence=1 - d, method=method, anytime=anytime)
    plain = (plain_anytime if anytime else plain_fixed)([*x.tolist()], 1 - (1 - d), method)
    assert found == pytest.approx(min(plain, 1.0), rel=1e-10, abs=1e-13)


@settings(max_examples=40)
@given(samples, st.sampled_from([0.5, 0.05]))
def test_betting_by_the_finest_of_grids(x, d):
    # Every m on a grid of 1e-4 that the wealth rules out is above the bound, every other below.
    bound = heldout_certificate(x, max_loss=1.0, confidence=1 - d)
    for m in np.linspace(0, 1, 201):
        ruled_out = wealth([*x.tolist()], d, m, True) >= math.log(1 / d)
        assert ruled_out == (m >= bound) or abs(m - bound) < 1e-12


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("anytime", [False, True])
@given(samples, st.floats(-3, 3), st.floats(0.1, 50))
def test_units_and_sides(method, anytime, x, least, width):
    options = {"method": method, "anytime": anytime}
    upper = heldout_certificate(x, max_loss=1.0, **options)
    scaled = np.clip(least + width * x, least, least + width)
    limits = {"min_loss": least, "max_loss": least + width, **options}
    # Scaling rounds losses by eps (|least| + width) / width of the range.
    rounding = 1e-12 * (abs(least) + width)
    assert heldout_certificate(scaled, **limits) == pytest.approx(
        least + width * upper, abs=rounding * 1e3
    )
    lower = heldout_certificate(x, max_loss=1.0, side="lower", **options)
    assert lower == pytest.approx(1 - heldout_certificate(1 - x, max_loss=1.0, **options), abs=1e-9)
    both = heldout_certificate(x, max_loss=1.0, side="two-sided", **options)
    halved = {"max_loss": 1.0, "confidence": 0.975, **options}
    assert both.upper == heldout_certificate(x, **halved)
    assert both.lower == heldout_certificate(x, side="lower", **halved)
    assert 0 <= both.lower <= 1
    assert 0 <= both.upper <= 1


@given(samples)
def test_the_order_of_methods(x):
    # Pinsker: kl is never above Hoeffding. An exact interval for coins is never above kl.
    kl = heldout_certificate(x, max_loss=1.0, method="kl")
    assert kl <= heldout_certificate(x, max_loss=1.0, method="hoeffding") + 1e-12
    if set(x) <= {0.0, 1.0}:
        n, s = len(x), int(x.sum())
        clopper_pearson = 1.0 if s == n else beta_law.ppf(0.95, s + 1, n - s)
        assert clopper_pearson <= kl + 1e-12
    for method in METHODS:
        upper = heldout_certificate(x, max_loss=1.0, method=method)
        surer = heldout_certificate(x, max_loss=1.0, method=method, confidence=0.99)
        if method != "betting":  # the past of its wealth, too, is ruled out
            assert x.mean() <= upper <= surer


def test_what_is_certain():
    # Nothing was lost: (1 - q)^n = d for kl.
    zeros = np.zeros(100)
    kl = heldout_certificate(zeros, max_loss=1.0, method="kl")
    assert kl == pytest.approx(1 - 0.05 ** (1 / 100), rel=1e-13)
    for method in METHODS:
        for anytime in (False, True):
            options = {"max_loss": 2.0, "method": method, "anytime": anytime}
            # Everything was lost: nothing is certified.
            assert heldout_certificate(np.full(50, 2.0), **options) == 2.0
            assert heldout_certificate(zeros, side="lower", **options) == 0.0


@pytest.mark.parametrize("method", METHODS)
def test_a_million_losses(method):
    x = np.random.default_rng(0).beta(0.1, 0.9, 10**6)
    for anytime in (False, True):
        low, high = heldout_certificate(
            x, max_loss=1.0, method=method, side="two-sided", anytime=anytime
        )
        assert 0.095 < low < 0.1 < high < 0.105
    rare = np.zeros(10**6)
    rare[::100_000] = 1e-3
    assert 1e-8 < heldout_certificate(rare, max_loss=1.0, method=method) < 3e-3


def test_what_losses_may_be():
    x = [0.0, 1.0, 1.0, 0.0, 0.0]
    expected = heldout_certificate(x, max_loss=1.0)
    for losses in (
        np.array(x),
        np.array(x, dtype=np.float32)[::-1][::-1],
        torch.tensor(x, requires_grad=True),
        torch.tensor(x, dtype=torch.bfloat16),
        torch.tensor(x).bool(),
        torch.tensor(x).long(),
        [bool(value) for value in x],
    ):
        assert heldout_certificate(losses, max_loss=1.0) == expected
    # A float32 loss that was clipped at 0.1 is above 0.1 in float64.
    clipped = torch.full((5,), 7.0).clamp(max=0.1)
    assert clipped.double()[0] > 0.1
    assert heldout_certificate(clipped, max_loss=0.1) == 0.1
