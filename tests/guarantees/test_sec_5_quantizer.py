"""Section 5: the entropy of rounded features is at most that of a Gaussian of their covariance.

Exact entropies of finite laws; tolerances are of rounding size.
"""

from collections import Counter
from fractions import Fraction
from itertools import pairwise
from math import fsum, log

import torch
from hypothesis import given
from hypothesis import strategies as st

from conjopt.entropy import coding_rate, quantizer_entropy_bound
from conjopt.entropy.coding_rate import CUBE

TINY = 1e-12


def entropy(rows):
    n = len(rows)
    return fsum(c / n * log(n / c) for c in Counter(rows).values())


@given(
    st.integers(1, 30),
    st.integers(1, 5),
    st.sampled_from([1e-3, 0.3, 1.0, 10.0]),
    st.sampled_from([0.01, 0.5, 1.0, 100.0]),
    st.integers(0, 2**32),
)
def test_rounded_features_have_no_more_entropy_than_the_bound(n, d, spread, quantum, seed):
    generator = torch.Generator().manual_seed(seed)
    outputs = spread * torch.randn(n, d, generator=generator, dtype=torch.float64)
    targets = torch.randint(3, (n,), generator=generator)
    cells = (outputs / quantum).round().long()
    bound = float(quantizer_entropy_bound(outputs, targets, quantum=quantum))
    exact = fsum(
        len(rows) / n * entropy(list(map(tuple, rows.tolist())))
        for rows in (cells[targets == c] for c in targets.unique())
    )
    assert exact <= bound + TINY


@given(st.integers(1, 200), st.integers(1, 20))
def test_equal_cells_in_a_row_come_within_a_constant(values, copies):
    # A uniform law on k cells: log k against 1/2 log(k^2) + log(2 pi e / 12) / 2.
    outputs = torch.arange(values).repeat(copies)[:, None].double()
    bound = float(quantizer_entropy_bound(outputs, quantum=1.0))
    assert log(values) <= bound + TINY
    assert abs(bound - log(values) - CUBE) < 1e-9


def test_the_covariance_of_the_features_themselves_bounds_nothing():
    outputs = torch.tensor([[0.499], [0.501]], dtype=torch.float64)  # on both sides of a border
    wrong = float(coding_rate(outputs, eps2=1 / 12)) + CUBE
    assert wrong < log(2) <= float(quantizer_entropy_bound(outputs, quantum=1.0)) + TINY


@given(st.lists(st.integers(-40, 40), min_size=1, max_size=12))
def test_with_a_random_offset_it_holds_on_average(tenths):
    # The cells change where the offset takes an atom over a border: exact between those.
    atoms = [Fraction(v, 10) for v in tenths]
    half = Fraction(1, 2)
    borders = sorted({Fraction(0), Fraction(1), *((half - a) % 1 for a in atoms)})
    mean = 0.0
    for lo, hi in pairwise(borders):
        offset = (lo + hi) / 2
        mean += float(hi - lo) * entropy([int((a + offset + half) // 1) for a in atoms])
    outputs = torch.tensor([[float(a)] for a in atoms], dtype=torch.float64)
    assert mean <= float(coding_rate(outputs, eps2=1 / 12)) + CUBE + TINY
