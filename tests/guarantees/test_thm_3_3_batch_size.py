"""Thm 3.3 by brute force over all batch sizes, in exact rational arithmetic."""

import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conjopt.optim import (
    batch_size_bound,
    best_batch_size,
    gradient_correlation,
    least_batch_size,
    work_optimum,
)

EPS = torch.finfo(torch.float64).eps

# Smooth numbers and round ones, which make ties.
noise_scales = st.floats(0, 1e6) | st.integers(0, 300).map(float) | st.sampled_from([1e-9, 1e12])
targets = st.floats(1e-6, 1 - 1e-6) | st.sampled_from([0.25, 0.5, 0.75, 0.9])
populations = st.integers(1, 300)
costs = st.floats(1e-9, 1e3) | st.sampled_from([0.0, 1.0, 4.0])


def correlation(B: float, m: int | Fraction, n: int | None) -> Fraction:
    """``||G||^2 / E||g_B||^2`` at ``||G||^2 = 1``, from the first formula of Thm 3.2."""
    left = Fraction(1) if n is None else Fraction(n - m) / max(n - 1, 1)
    return 1 / (1 + Fraction(B) / m * left)


@given(noise_scales, targets, populations)
def test_least_batch_size_is_the_first_that_reaches_the_target(B: float, r: float, n: int):
    reached = [correlation(B, m, n) >= Fraction(r) for m in range(1, n + 1)]
    assert least_batch_size(B, r, n) == reached.index(True) + 1
    assert reached == sorted(reached)  # and from there on all do


@given(st.floats(0, 300), targets.filter(lambda r: r < 0.91))
def test_least_batch_size_among_many_samples(B: float, r: float):
    first = next(m for m in itertools.count(1) if correlation(B, m, None) >= Fraction(r))
    assert least_batch_size(B, r) == first
    assert least_batch_size(B, r, 10**12) <= first


@given(noise_scales, targets, populations)
def test_the_bound_is_where_the_correlation_is_the_target(B: float, r: float, n: int):
    bound = batch_size_bound(B, r, n)
    assert 1 <= bound <= n
    rounding = Fraction(16 * EPS)
    if bound > 1:
        assert correlation(B, min(n, Fraction(bound) * (1 + rounding)), n) >= Fraction(r)
        assert correlation(B, Fraction(bound) * (1 - rounding), n) < Fraction(r)


@given(noise_scales, st.integers(1, 300), populations)
def test_correlation_is_that_of_thm_3_2(B: float, m: int, n: int):
    m = min(m, n)
    assert gradient_correlation(B, m, n) == pytest.approx(float(correlation(B, m, n)), rel=8 * EPS)
    assert gradient_correlation(B, m) == pytest.approx(float(correlation(B, m, None)), rel=8 * EPS)


@st.composite
def problems(draw: st.DrawFn) -> tuple[float, float, float, int]:
    n = draw(populations)
    # Around n - 1, where the optimum leaves the range, as well.
    B = draw(noise_scales | st.sampled_from([n - 1, n - 2, 0.999 * (n - 1)]).map(abs).map(float))
    c0, c1 = draw(costs), draw(costs)
    return B, c0, c1 if c0 or c1 else 1.0, n


@given(problems())
def test_best_batch_size_makes_most_progress_per_second(problem):
    B, c0, c1, n = problem
    progress = [correlation(B, m, n) / (Fraction(c0) + Fraction(c1) * m) for m in range(1, n + 1)]
    best = best_batch_size(B, c0, c1, n)
    assert progress[best - 1] == max(progress)
    assert best in {math.floor(m := work_optimum(B, c0, c1, n)), math.ceil(m)}
    # It rises to the best and falls from there, so nothing beyond the two neighbours can win.
    top = progress.index(max(progress))
    assert progress[: top + 1] == sorted(progress[: top + 1])
    assert progress[top:] == sorted(progress[top:], reverse=True)


@given(st.floats(0, 300), st.floats(1e-3, 10), st.floats(1e-3, 10))
def test_best_batch_size_among_many_samples(B: float, c0: float, c1: float):
    def progress(m: int) -> Fraction:
        return correlation(B, m, None) / (Fraction(c0) + Fraction(c1) * m)

    best = best_batch_size(B, c0, c1)
    assert best <= 1 + math.sqrt(300 * 1e4)
    assert all(progress(best) >= progress(m) for m in range(1, 1800, 1))


@given(problems())
def test_tensors_give_what_numbers_give(problem):
    B, c0, c1, n = problem
    b, k0, k1 = (torch.tensor([v, v], dtype=torch.float64) for v in (B, c0, c1))
    for tensors, number in [
        (work_optimum(b, k0, k1, n), work_optimum(B, c0, c1, n)),
        (batch_size_bound(b, 0.3, n), batch_size_bound(B, 0.3, n)),
        (gradient_correlation(b, 1, n), gradient_correlation(B, 1, n)),
    ]:
        assert tensors.dtype == torch.float64
        assert tensors.tolist() == [number, number]
    single = torch.tensor(7.0)
    assert batch_size_bound(single, 0.5).dtype == torch.float32


def test_ends():
    assert gradient_correlation(math.inf, 3, 3) == 1
    assert gradient_correlation(math.inf, 2, 3) == 0
    assert least_batch_size(math.inf, 0.5) is None
    assert least_batch_size(math.inf, 0.5, 9) == batch_size_bound(math.inf, 0.5, 9) == 9
    assert best_batch_size(math.inf, 1.0, 1.0) is None
    assert best_batch_size(math.inf, 1.0, 1.0, 9) == 9
    assert best_batch_size(5.0, 1.0, 0.0, 9) == 9  # samples cost nothing
    assert best_batch_size(5.0, 0.0, 1.0, 9) == 1  # steps cost nothing
    assert best_batch_size(0.0, 1.0, 0.0, 9) == 1  # without noise one sample shows all
    assert work_optimum(1e300, 1e300, 1e-300) == pytest.approx(math.inf)
    assert work_optimum(1e200, 1e200, 1e200) == pytest.approx(1e100)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: gradient_correlation(-1.0, 2), r"noise_scale=-1.0, expected 0 <= noise_scale"),
        (lambda: gradient_correlation(math.nan, 2), "noise_scale=nan, expected"),
        (lambda: gradient_correlation(1.0, 0), "batch_size=0, expected 1 <= batch_size <= inf"),
        (lambda: gradient_correlation(1.0, 5, 4), "batch_size=5, expected 1 <= batch_size <= 4"),
        (lambda: least_batch_size(1.0, 1.0), "correlation=1.0, expected 0 < correlation < 1"),
        (lambda: least_batch_size(1.0, 0.0), "correlation=0.0, expected 0 < correlation < 1"),
        (lambda: least_batch_size(1.0, 0.5, 0), "population=0, expected the number of samples"),
        (lambda: best_batch_size(1.0, -1.0, 1.0), "fixed=-1.0, expected 0 <= fixed"),
        (lambda: best_batch_size(1.0, 0.0, 0.0), "not both 0; measure the times of steps"),
        (lambda: best_batch_size(1.0, math.inf, 1.0), "expected finite numbers"),
    ],
)
def test_what_is_out_of_range_is_refused(call, says):
    with pytest.raises(ValueError, match=says):
        call()
