"""Coding rates against closed forms, with their limits and bad input."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conjopt.entropy import coding_rate, quantizer_entropy_bound


def gaussian_sample(n, covariance, generator):
    """Rows whose empirical covariance is exactly the given one."""
    rows = torch.randn(n, len(covariance), generator=generator, dtype=torch.float64)
    rows = torch.linalg.qr(rows - rows.mean(0))[0] * math.sqrt(n)
    return rows @ torch.linalg.cholesky(covariance).mT + torch.randn(1, generator=generator)


def covariances(count, d, generator):
    roots = torch.randn(count, d, d, generator=generator, dtype=torch.float64)
    return roots @ roots.mT + 0.1 * torch.eye(d)


@given(
    st.integers(1, 5),
    st.lists(st.integers(8, 30), min_size=1, max_size=4),
    st.sampled_from([0.01, 0.5, 10.0]),
    st.integers(0, 2**32),
)
def test_gaussian_classes_have_the_closed_form(d, sizes, eps2, seed):
    generator = torch.Generator().manual_seed(seed)
    spreads = covariances(len(sizes), d, generator)
    rows = torch.cat([gaussian_sample(n, c, generator) for n, c in zip(sizes, spreads)])
    targets = 2 * torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    order = torch.randperm(len(rows), generator=generator)
    expected = sum(
        n / sum(sizes) * torch.linalg.eigvalsh(c / eps2).log1p().sum() / 2
        for n, c in zip(sizes, spreads)
    )
    found = coding_rate(rows[order], targets[order], eps2=eps2)
    assert abs(found - expected) < 1e-10 * (1 + expected)


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**32))
def test_few_samples_and_many_dimensions(n, d, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, d, generator=generator, dtype=torch.float64)
    spread = np.cov(rows.T.numpy(), bias=True).reshape(d, d)
    expected = np.linalg.slogdet(np.eye(d) + spread / 0.5)[1] / 2
    assert abs(float(coding_rate(rows)) - expected) < 1e-11 * (1 + expected)


@given(st.integers(2, 20), st.integers(1, 4), st.integers(0, 2**32))
def test_motions_do_not_matter_and_scale_goes_with_the_noise(n, d, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, d, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (n,), generator=generator)
    turn = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))[0]
    expected = coding_rate(rows, y)
    assert (coding_rate(rows @ turn + 5, y) - expected).abs() < 1e-11
    assert (coding_rate(3 * rows, y, eps2=4.5) - expected).abs() < 1e-11


def test_knowing_the_class_lowers_the_rate():
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(60) % 3
    rows = torch.randn(60, 4, generator=generator) + 3 * torch.eye(4)[y]
    assert coding_rate(rows, y) < coding_rate(rows)


def test_limits():
    rows = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    assert coding_rate(rows[:1]) == 0
    assert coding_rate(rows, range(5)) == 0  # a class for each sample
    assert coding_rate(torch.ones(5, 3)) == 0
    assert coding_rate(rows, [7] * 5) == coding_rate(rows)
    assert coding_rate(1e-200 * rows.double()) == 0
    assert coding_rate(1e100 * rows.double()) > 3 * math.log(1e100) - 10
    assert coding_rate(rows.half()) > 0


@pytest.mark.parametrize(
    "rate", [coding_rate, lambda *a, eps2=1.0: quantizer_entropy_bound(*a, quantum=eps2)]
)
def test_bad_input(rate):
    rows = torch.zeros(3, 2)
    for scale in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="expected a positive number"):
            rate(rows, eps2=scale)
    with pytest.raises(ValueError, match="lengths"):
        rate(rows, [0, 1])
    with pytest.raises(ValueError, match="empty"):
        rate(rows[:0])
    with pytest.raises(ValueError, match=r"outputs\[0\]"):
        rate([[math.inf]])
    with pytest.raises(TypeError, match="floating"):
        rate(rows.long())
    with pytest.raises(TypeError, match=r"take argmax\(1\)"):
        rate(rows, torch.eye(3))
    with pytest.raises(ValueError, match="divide them"):
        rate([[1e200], [-1e200]])
