"""Thm 4.3: each step of the proof by enumeration of signs, tables and samples."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from conjopt.bounds import total_variation_gap, uniform_gap_bound
from conjopt.bounds.tables import absolute_sum, deviation

EPS = np.finfo(np.float64).eps


def exact_absolute_sum(j: int) -> Fraction:
    """By counting the ways to have so many positive signs."""
    return Fraction(sum(math.comb(j, up) * abs(2 * up - j) for up in range(j + 1)), 2**j)


def plain_absolute_sum(j: int) -> float:
    """`a(1) = 1`, `a(2i) = a(2i-1)`, `a(2i+1) = a(2i) (2i+1) / (2i)`."""
    return math.prod((i + 1) / i for i in range(2, j, 2))


def laws(sizes=(1, 2, 3), n=4):
    return st.tuples(
        st.integers(0, 2**32),
        st.sampled_from(sizes),
        st.integers(1, n),
        st.sampled_from([0.2, 1.0]),
    ).map(lambda t: (np.random.default_rng(t[0]).dirichlet(np.full(t[1], t[3])), t[2]))


def every_sample(q, n):
    """Counts of the cells in each ordered sample, with its probability."""
    for sample in itertools.product(range(len(q)), repeat=n):
        yield np.bincount(sample, minlength=len(q)), float(np.prod(q[list(sample)]))


def Zs(counts):
    return sum(float(exact_absolute_sum(int(c))) for c in counts if c)


def test_mean_absolute_sums_of_signs():
    for j in range(1, 13):
        sums = [abs(sum(signs)) for signs in itertools.product((-1, 1), repeat=j)]
        assert absolute_sum(np.array([j]))[0] == pytest.approx(np.mean(sums), rel=4 * EPS)


def test_mean_absolute_sums_of_many_signs():
    for j in [*range(1, 300), 999, 1000, 4097, 20_000]:
        i = (j - 1) // 2
        exact = Fraction((2 * i + 1) * math.comb(2 * i, i), 4**i)
        if j < 300:
            assert exact == exact_absolute_sum(j)
            assert float(exact) == pytest.approx(plain_absolute_sum(j), rel=1e-13)
        assert absolute_sum(np.array([j]))[0] == pytest.approx(float(exact), rel=8 * EPS)
    j = 1e15 + 1  # a(j) = sqrt(2 j / pi) (1 + 1 / (4 j) + ...) for odd j
    assert absolute_sum(np.array([j]))[0] == pytest.approx(math.sqrt(2 * j / math.pi), rel=8 * EPS)


@given(st.lists(st.integers(0, 2), min_size=1, max_size=7), st.floats(-2, 2), st.floats(0.1, 3))
def test_the_rademacher_complexity_of_tables(cells, least, width):
    n, most = len(cells), least + width
    _, place, counts = np.unique(cells, return_inverse=True, return_counts=True)
    tables = np.array(list(itertools.product((least, most), repeat=len(counts))))[:, place]
    signs = np.array(list(itertools.product((-1, 1), repeat=n)))
    complexity = (tables @ signs.T / n).max(0).mean()  # a linear function is greatest at a corner
    claimed = width * absolute_sum(counts).sum() / (2 * n)
    assert complexity == pytest.approx(claimed, abs=1e-13)


@settings(max_examples=40)
@given(laws())
def test_the_mean_of_the_greatest_gap_is_at_most_that_of_zs(law):
    q, n = law
    gaps = zs = 0.0
    for counts, probability in every_sample(q, n):
        gaps += probability * total_variation_gap(q, counts / n, max_loss=1.0)
        zs += probability * Zs(counts)
    assert gaps <= zs / n + 1e-13


@settings(max_examples=40)
@given(laws())
def test_mean_deviations_of_frequencies_are_exact(law):
    q, n = law
    mean = sum(p * np.abs(q - counts / n) for counts, p in every_sample(q, n))
    found = deviation(q, n)
    np.testing.assert_allclose(found, mean, atol=1e-13)
    assert (found <= np.sqrt(q * (1 - q) / n) + 1e-15).all()


@pytest.mark.parametrize("n", [1, 7, 100, 2000])
@pytest.mark.parametrize("q", [0.0, 1e-3, 0.1, 1 / 3, 0.5, 0.999, 1.0])
def test_mean_deviations_by_counting(n, q):
    # The mass function of scipy is that of Boost, to a few roundings.
    s = np.arange(n + 1)
    exact = float(binom.pmf(s, n, q) @ np.abs(q - s / n))
    assert deviation(np.array([q]), n)[0] == pytest.approx(exact, rel=1e-9, abs=1e-300)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.data())
def test_one_sample_moves_zs_by_at_most_one(cells, data):
    place = data.draw(st.integers(0, len(cells) - 1))
    changed = [*cells]
    changed[place] = data.draw(st.integers(0, 3))
    before, after = (Zs(np.bincount(c)) for c in (cells, changed))
    assert abs(before - after) <= 1 + 1e-12


@given(st.lists(st.integers(0, 3), min_size=2, max_size=30))
def test_zs_is_self_bounding(cells):
    whole = Zs(np.bincount(cells))
    without = [Zs(np.bincount(cells[:i] + cells[i + 1 :])) for i in range(len(cells))]
    drops = whole - np.array(without)
    assert drops.min() >= -1e-12
    assert drops.max() <= 1 + 1e-12
    assert drops.sum() <= whole + 1e-10


def test_zs_is_rarely_far_below_its_mean():
    # P(Zs <= E Zs - t) <= exp(-t^2 / (2 E Zs)), at every t that matters, over all samples.
    for q, n in ((np.array([0.5, 0.5]), 8), (np.array([0.1, 0.3, 0.6]), 6), (np.full(4, 0.25), 5)):
        every = [(Zs(counts), p) for counts, p in every_sample(q, n)]
        mean = sum(z * p for z, p in every)
        for level in {z for z, _ in every if z < mean}:
            tail = sum(p for z, p in every if z <= level)
            assert tail <= math.exp(-((mean - level) ** 2) / (2 * mean)) + 1e-13


@given(
    st.lists(st.integers(-3, 9), min_size=1, max_size=40),
    st.sampled_from([1, 50, 1000]),  # few samples, and so many that the bounds say something
    st.floats(-2, 2),
    st.floats(0.1, 10),
    st.floats(0.01, 0.99),
)
def test_the_empirical_forms_are_their_formulas(cells, repeat, least, width, confidence):
    cells = cells * repeat
    n, w = len(cells), math.log(2 / (1 - confidence))
    z = math.fsum(plain_absolute_sum(cells.count(c)) for c in set(cells))
    first = z / n + 2 * math.sqrt(w / (2 * n))
    second = z / n + math.sqrt(w / (2 * n)) + (w + math.sqrt(w**2 + 2 * w * z)) / n
    options = {"max_loss": least + width, "min_loss": least, "confidence": confidence}
    for form, share in (("empirical", first), ("self-bounding", second)):
        bound = uniform_gap_bound(cells, form=form, **options)
        assert bound == pytest.approx(width * min(share, 1.0), rel=1e-12)


@given(laws(sizes=(1, 2, 10, 100), n=5000), st.floats(0.01, 0.99))
def test_the_population_form_is_its_formula(law, confidence):
    q, n = law
    d = 1 - confidence
    bound = uniform_gap_bound(
        q, max_loss=3.0, min_loss=1.0, confidence=confidence, form="population", samples=n
    )
    tail = math.sqrt(2 * math.log(1 / d) / n)
    assert bound == pytest.approx(min(2.0, deviation(q, n).sum() + tail), rel=1e-12)
    assert bound <= np.sqrt(q * (1 - q) / n).sum() + tail + 1e-12  # as the theorem states it


def test_order_and_names_of_cells_do_not_count():
    cells = np.random.default_rng(0).integers(20, size=500)
    names = np.random.default_rng(1).permutation(20) - 7
    for form in ("empirical", "self-bounding"):
        bound = uniform_gap_bound(cells, max_loss=1.0, form=form)
        assert uniform_gap_bound(names[cells][::-1], max_loss=1.0, form=form) == pytest.approx(
            bound
        )
