"""Thm 4.2: the greatest gap over tables is a total variation, against every extreme table."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conjopt.bounds import total_variation_gap


@st.composite
def pairs_of_laws(draw: st.DrawFn):
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    cells = draw(st.integers(1, 8))
    q = rng.dirichlet(np.full(cells, draw(st.sampled_from([0.1, 1.0, 10.0]))))
    q /= q.sum()
    if draw(st.booleans()):
        n = draw(st.integers(1, 50))
        return q, rng.multinomial(n, q) / n
    other = rng.dirichlet(np.ones(cells))
    return q, other / other.sum()


@given(pairs_of_laws(), st.floats(-5, 5), st.floats(0.01, 10))
def test_the_supremum_over_tables_is_attained(laws, least, width):
    q, qhat = laws
    most = least + width
    bound = total_variation_gap(q, qhat, max_loss=most, min_loss=least)
    gaps = [
        float((q - qhat) @ np.array(table))
        for table in itertools.product((least, most), repeat=len(q))
    ]
    # A linear function on a cube is extreme at its corners.
    rounding = 1e-14 * (abs(least) + abs(most))
    assert bound == pytest.approx(max(gaps), abs=rounding)
    assert bound == pytest.approx(-min(gaps), abs=rounding)


@given(pairs_of_laws(), st.integers(0, 2**32))
def test_no_table_has_a_greater_gap(laws, seed):
    q, qhat = laws
    tables = np.random.default_rng(seed).uniform(1, 3, size=(100, len(q)))
    bound = total_variation_gap(q, qhat, max_loss=3.0, min_loss=1.0)
    assert np.abs(tables @ (q - qhat)).max() <= bound + 1e-14


def test_values():
    assert total_variation_gap([1.0], [1.0], max_loss=7.0) == 0
    assert total_variation_gap([1.0, 0.0], [0.0, 1.0], max_loss=7.0, min_loss=2.0) == 5
