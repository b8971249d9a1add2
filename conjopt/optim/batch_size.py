"""Batch sizes of Thm 3.3: the least for a gradient correlation, and the best per second."""

from __future__ import annotations

import functools
import math
from fractions import Fraction
from typing import Any, overload

import torch
from torch import Tensor

__all__ = [
    "batch_size_bound",
    "best_batch_size",
    "gradient_correlation",
    "least_batch_size",
    "work_optimum",
]

Number = float | Tensor


@overload
def gradient_correlation(
    noise_scale: float, batch_size: float, population: float | None = None
) -> float: ...
@overload
def gradient_correlation(
    noise_scale: Tensor, batch_size: Number, population: float | None = None
) -> Tensor: ...
@overload
def gradient_correlation(
    noise_scale: Number, batch_size: Tensor, population: float | None = None
) -> Tensor: ...


def gradient_correlation(
    noise_scale: Number, batch_size: Number, population: float | None = None
) -> Number:
    """``rho_m``: the share of a batch gradient's mean square that is signal (Thm 3.2).

    Args:
        noise_scale: ``B_noise = S^2 / ||G||^2`` in samples, at least 0; infinite for no signal.
        batch_size: m, in 1 ... n.
        population: n, samples in all; None or infinite for many more than m.

    Returns:
        ``1 / (1 + B_noise (n-m) / (m (n-1)))``; a number if only numbers were given.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> gradient_correlation(100.0, 100)
        0.5
        >>> gradient_correlation(100.0, 100, population=100)
        1.0
    """
    n = _population(population)
    B = _checked("noise_scale", noise_scale, 0)
    m = _checked("batch_size", batch_size, 1, n)
    # What of the noise of one sample the other n - m leave; the whole data set has none.
    left = torch.ones_like(m) if math.isinf(n) else (n - m) / max(n - 1, 1)
    noise = torch.where(left > 0, B * (left / m), 0.0)
    return _given_back(1 / (1 + noise), noise_scale, batch_size)


@overload
def batch_size_bound(
    noise_scale: float, correlation: float, population: float | None = None
) -> float: ...
@overload
def batch_size_bound(
    noise_scale: Tensor, correlation: Number, population: float | None = None
) -> Tensor: ...
@overload
def batch_size_bound(
    noise_scale: Number, correlation: Tensor, population: float | None = None
) -> Tensor: ...


def batch_size_bound(
    noise_scale: Number, correlation: Number, population: float | None = None
) -> Number:
    """The real m from which on ``rho_m`` is at least ``correlation`` (Thm 3.3).

    Args:
        noise_scale: ``B_noise`` in samples, at least 0; infinite for no signal.
        correlation: r, between 0 and 1, both excluded.
        population: n, samples in all; None or infinite for many more than m.

    Returns:
        ``c n / (n - 1 + c)`` with ``c = B_noise r / (1-r)``, clipped to [1, n]; a number if only
        numbers were given.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> batch_size_bound(100.0, 0.5)
        100.0
        >>> batch_size_bound(100.0, 0.5, population=101)
        50.5
    """
    n = _population(population)
    B = _checked("noise_scale", noise_scale, 0)
    r = _checked("correlation", correlation, 0, 1, open_ends=True)
    c = B * (r / (1 - r))
    # n / (1 + (n-1) / c) is the same, and right at infinite c.
    bound = c if math.isinf(n) or n == 1 else n / (1 + (n - 1) / c)
    return _given_back(bound.clamp(1, n), noise_scale, correlation)


@overload
def work_optimum(
    noise_scale: float, fixed: float, per_sample: float, population: float | None = None
) -> float: ...
@overload
def work_optimum(
    noise_scale: Tensor, fixed: Number, per_sample: Number, population: float | None = None
) -> Tensor: ...


def work_optimum(
    noise_scale: Number, fixed: Number, per_sample: Number, population: float | None = None
) -> Number:
    """The real m of most progress per second where a step takes ``c0 + c1 m`` (Thm 3.3).

    Args:
        noise_scale: ``B_noise`` in samples, at least 0; infinite for no signal.
        fixed: c0, at least 0.
        per_sample: c1, at least 0, and positive unless c0 is.
        population: n, samples in all; None or infinite for many more than m.

    Returns:
        ``m*``, clipped to [1, n]; a number if only numbers were given.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> work_optimum(100.0, fixed=4.0, per_sample=1.0)
        20.0
        >>> work_optimum(100.0, fixed=4.0, per_sample=1.0, population=50)
        50.0
    """
    n = _population(population)
    B = _checked("noise_scale", noise_scale, 0)
    c0, c1 = _checked("fixed", fixed, 0), _checked("per_sample", per_sample, 0)
    if bool(((c0 == 0) & (c1 == 0)).any()) or not bool((c0.isfinite() & c1.isfinite()).all()):
        raise ValueError(
            f"batch size: a step of fixed={fixed} + m per_sample={per_sample} seconds, expected "
            "finite numbers that are not both 0; measure the times of steps of two sizes"
        )
    if math.isinf(n):
        within = B
    else:
        room = n - 1 - B
        within = torch.where(room > 0, B * (n / torch.where(room > 0, room, 1.0)), torch.inf)
    # Roots apart, as the products of the theorem may leave the range of numbers. No noise at all
    # asks for one sample, whatever a step costs.
    best = torch.where(within > 0, within.sqrt() * (c0.sqrt() / c1.sqrt()), 0.0)
    best = torch.where(torch.isinf(within), torch.inf, best)
    return _given_back(best.clamp(1, n), noise_scale, fixed, per_sample)


def least_batch_size(
    noise_scale: float, correlation: float, population: int | None = None
) -> int | None:
    """The least whole m with ``rho_m >= correlation`` (Thm 3.3), exactly for the given numbers.

    Args:
        noise_scale: ``B_noise`` in samples, at least 0; infinite for no signal.
        correlation: r, between 0 and 1, both excluded.
        population: n, samples in all; None for many more than m.

    Returns:
        m; None where no finite batch reaches it.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> least_batch_size(100.0, 0.5), least_batch_size(100.0, 0.5, population=101)
        (100, 51)
    """
    batch_size_bound(noise_scale, correlation, population)  # checks
    if math.isinf(noise_scale):
        return population
    r = Fraction(correlation)
    c = Fraction(noise_scale) * r / (1 - r)
    if population is not None and c > 0:
        c = c * population / (population - 1 + c)
    return max(1, math.ceil(c))


def best_batch_size(
    noise_scale: float, fixed: float, per_sample: float, population: int | None = None
) -> int | None:
    """The whole m of most progress per second where a step takes ``c0 + c1 m`` (Thm 3.3).

    Seconds per progress ``(c0 + c1 m) / rho_m`` first fall and then rise in m, so it is one of the
    two whole numbers around `work_optimum`.

    Args:
        noise_scale: ``B_noise`` in samples, at least 0; infinite for no signal.
        fixed: c0, at least 0.
        per_sample: c1, at least 0, and positive unless c0 is.
        population: n, samples in all; None for many more than m.

    Returns:
        m, the smaller of two equally good ones; None where more is always better.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> best_batch_size(100.0, fixed=4.0, per_sample=1.0)
        20
    """
    around = work_optimum(noise_scale, fixed, per_sample, population)
    if math.isinf(around):
        return None
    low, high = math.floor(around), math.ceil(around)
    if low == high or math.isinf(noise_scale):
        return low

    def seconds(m: int) -> Fraction:
        left = 1 if population is None else Fraction(population - m, population - 1)
        noise = 1 + Fraction(noise_scale) * left / m
        return (Fraction(fixed) + Fraction(per_sample) * m) * noise

    return low if seconds(low) <= seconds(high) else high


def _population(given: float | None) -> float:
    n = math.inf if given is None else float(given)
    if math.isnan(n) or n < 1:
        raise ValueError(
            f"batch size: population={given}, expected the number of samples, at least 1, or None "
            "where it is unknown"
        )
    return n


def _checked(
    name: str, given: Any, least: float, most: float = math.inf, *, open_ends: bool = False
) -> Tensor:
    value = given if isinstance(given, Tensor) else torch.tensor(given, dtype=torch.float64)
    if not value.is_floating_point():
        value = value.double()
    inside = (value > least) & (value < most) if open_ends else (value >= least) & (value <= most)
    if not bool(inside.all()):
        ends = f"{least:g} < {name} < {most:g}" if open_ends else f"{least:g} <= {name} <= {most:g}"
        raise ValueError(f"batch size: {name}={given}, expected {ends}")
    return value


def _given_back(value: Tensor, *given: Any) -> Number:
    """As a number, or in the precision of the tensors that were given."""
    tensors = [g for g in given if isinstance(g, Tensor)]
    if not tensors:
        return float(value)
    floating = [g.dtype for g in tensors if g.is_floating_point()]
    return value.to(functools.reduce(torch.promote_types, floating)) if floating else value
