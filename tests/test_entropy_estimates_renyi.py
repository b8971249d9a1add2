"""Matrix Renyi entropies against closed forms, their order, limits and bad input."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conjopt.entropy import conditional_renyi_entropy, matrix_renyi_entropy
from conjopt.entropy import renyi as renyi_module

ORDERS = [0.1, 0.5, 0.9, 1.0, 1 + 1e-9, 1.01, 2.0, 3.0, 50.0]


def renyi(p, order):
    """Of a law, in plain Python."""
    p = [v for v in p if v > 0]
    if order == 1:
        return -math.fsum(v * math.log(v) for v in p)
    return math.log(math.fsum(v**order for v in p)) / (1 - order)


def gram_of(values, generator):
    basis = torch.randn(len(values), len(values), generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(basis)[0]
    gram = basis @ torch.diag(values) @ basis.mT
    return (gram + gram.mT) / 2


@given(
    st.lists(st.floats(0.01, 1), min_size=1, max_size=8),
    st.sampled_from(ORDERS),
    st.sampled_from([0.0, 1e-3, 2.0]),
    st.sampled_from([1e-200, 1.0, 1e200]),
    st.integers(0, 2**32),
)
def test_it_is_the_entropy_of_the_eigenvalues(values, order, ridge, scale, seed):
    gram = gram_of(torch.tensor(values, dtype=torch.float64), torch.Generator().manual_seed(seed))
    n, total = len(values), math.fsum(values)
    p = [(v / total + ridge / n) / (1 + ridge) for v in values]
    expected = renyi(p, 1 if abs(order - 1) < 1e-8 else order)
    found = matrix_renyi_entropy(scale * gram, order=order, ridge=ridge)
    assert abs(float(found) - expected) < 1e-10


@given(st.integers(1, 6), st.integers(1, 4), st.integers(0, 2**32))
def test_it_lies_between_rank_one_and_equal_eigenvalues_and_falls_with_the_order(n, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(2, n, rank, generator=generator, dtype=torch.float64)
    values = [matrix_renyi_entropy(rows @ rows.mT, order=a) for a in ORDERS]
    for high, low in itertools.pairwise(values):
        # Near order 1 a difference of logs is divided by 0.01 and less.
        assert (high >= low - 1e-9).all()
    assert (values[0] <= math.log(min(n, rank)) + 1e-12).all()  # rounding adds no rank
    assert (values[-1] >= -1e-12).all()


@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=4),
    st.sampled_from(ORDERS),
)
def test_clusters_far_apart_have_the_entropy_of_their_sizes(sizes, order):
    # A Gram matrix of blocks of ones: eigenvalues are the sizes.
    centres = 1e4 * 10.0 ** torch.arange(len(sizes)).double()
    outputs = centres.repeat_interleave(torch.tensor(sizes))[:, None]
    p = [n / sum(sizes) for n in sizes]
    found = conditional_renyi_entropy(outputs, order=order, ridge=0.0, bandwidth=1e-12)
    assert abs(float(found) - renyi(p, 1 if abs(order - 1) < 1e-8 else order)) < 1e-10


@given(st.integers(1, 20), st.integers(1, 3), st.sampled_from(ORDERS), st.integers(0, 2**32))
def test_given_the_class_it_is_the_mean_over_classes(n, d, order, seed):
    generator = torch.Generator().manual_seed(seed)
    outputs = torch.randn(n, d, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (n,), generator=generator)
    u = outputs - outputs.mean(0)
    u = u / u.square().mean().sqrt() if n > 1 else u
    expected = 0.0
    for c in y.unique():
        rows = u[y == c]
        gram = (-torch.cdist(rows, rows).square() / (2 * d * 0.1)).exp()
        p = torch.linalg.eigvalsh(gram / len(rows)).clamp(min=0)
        ridge = 1e-3 if order < 1 else 0
        p = (p + ridge / len(p)) / (1 + ridge)
        expected += len(rows) / n * renyi(p.tolist(), 1 if abs(order - 1) < 1e-8 else order)
    assert abs(float(conditional_renyi_entropy(outputs, y, order=order)) - expected) < 1e-6


def test_order_two_needs_no_eigenvalues_and_no_whole_matrix(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    outputs, y = torch.randn(60, 3, generator=generator), torch.arange(60) % 2
    near = conditional_renyi_entropy(outputs, y, order=2 + 1e-9)
    monkeypatch.setattr(renyi_module, "BLOCK", 100)
    monkeypatch.setattr(torch.linalg, "eigvalsh", None)
    assert abs(conditional_renyi_entropy(outputs, y) - near) < 1e-7


def test_large_classes_are_thinned_to_a_size_and_reproducibly():
    outputs = torch.randn(300, 2, generator=torch.Generator().manual_seed(0))
    whole, part, again = (
        conditional_renyi_entropy(outputs, order=1.0, largest_class=most)
        for most in (300, 150, 150)
    )
    assert part == again != whole
    assert part == conditional_renyi_entropy(outputs, order=1.0, largest_class=150, seed=0)
    assert abs(part - whole) < 0.2
    assert conditional_renyi_entropy(outputs, order=1.0, largest_class=1) == 0


@pytest.mark.parametrize("order", ORDERS)
def test_limits(order):
    rows = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    options = {"order": order, "ridge": 0.0}
    assert abs(conditional_renyi_entropy(rows[:1], [0], **options)) < 1e-12
    assert abs(conditional_renyi_entropy(rows, range(5), **options)) < 1e-12
    assert abs(conditional_renyi_entropy(torch.zeros(5, 3), **options)) < 1e-12  # dead features
    apart = conditional_renyi_entropy(rows, bandwidth=1e-9, **options)
    assert abs(apart - math.log(5)) < 1e-12


def test_bad_input():
    eye, rows = torch.eye(3), torch.zeros(3, 2)
    for order in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="order="):
            matrix_renyi_entropy(eye, order=order)
        with pytest.raises(ValueError, match="order="):
            conditional_renyi_entropy(rows, order=order)
    for ridge in (-1.0, math.nan):
        with pytest.raises(ValueError, match="ridge="):
            matrix_renyi_entropy(eye, ridge=ridge)
    with pytest.raises(ValueError, match="not finite"):
        matrix_renyi_entropy(torch.full((2, 2), math.nan), order=1.0)
    with pytest.raises(ValueError, match="shape"):
        matrix_renyi_entropy(torch.ones(2, 3))
    with pytest.raises(ValueError, match="positive eigenvalue"):
        matrix_renyi_entropy(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="not symmetric"):
        matrix_renyi_entropy(torch.tensor([[1.0, 0.5], [0.0, 1.0]]))
    with pytest.raises(ValueError, match="none below 0"):
        matrix_renyi_entropy(torch.tensor([[1.0, 2.0], [2.0, 1.0]]), order=1.0)
    with pytest.raises(ValueError, match="trace"):
        matrix_renyi_entropy(-eye)
    with pytest.raises(ValueError, match="bandwidth="):
        conditional_renyi_entropy(rows, bandwidth=0.0)
    with pytest.raises(ValueError, match="largest_class="):
        conditional_renyi_entropy(rows, largest_class=0)
    with pytest.raises(ValueError, match=r"outputs\[0\]"):
        conditional_renyi_entropy([[math.nan]], order=1.0)
    with pytest.raises(TypeError, match="class indices"):
        conditional_renyi_entropy(rows, rows)
