"""Recorded steps of a run, and what the identity of Thm 3.1 implies for them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

__all__ = ["LedgerBound", "LedgerStep", "bound_of"]


@dataclasses.dataclass(frozen=True)
class LedgerStep:
    """One step of a run, recorded by `ConvergenceLedger.end`; all numbers from float64.

    `m` samples of the batch out of `n`, which are those of the whole set or, with a probe set, of
    batch and probe together. Means are as the criterion weighs its samples.

    Attributes:
        step: Its number.
        batch_size: `m`.
        share: `m / n`, by the samples' weights in the mean if the criterion weighs them.
        step_size: `a`.
        batch_risk: `R_B(theta)`.
        batch_risk_after: `R_B(theta+)`.
        risk: `R(theta)`.
        risk_after: `R(theta+)`.
        out_change: `M = R_out(theta+) - R_out(theta)`; 0 if the batch is all there is.
        gradient_square: `||g_B||^2`.
        slope: `<g_B, u>` with `u = (theta - theta+) / a`.
        direction_square: `||u||^2`.
        curvature: Realised curvature `L`.
        curvature_error: How far rounding may have moved `L`.
        along_gradient: Whether `u` is `g_B` but for the rounding of the parameters, so that Thm 3.1
            applies to the letter.
        consecutive: Whether the step started where the recorded one before it ended; true of the
            first.

    Reference:
        docs/theory.md, Thm 3.1.

    Example:
        >>> from conjopt.bounds import LedgerStep
        >>> step = LedgerStep(
        ...     step=0, batch_size=1, share=0.5, step_size=0.5, batch_risk=0.5,
        ...     batch_risk_after=0.125, risk=0.5, risk_after=0.25, out_change=-0.125,
        ...     gradient_square=1.0, slope=1.0, direction_square=1.0, curvature=1.0,
        ...     curvature_error=0.0, along_gradient=True, consecutive=True,
        ... )
        >>> step.left, step.right  # 1/2 1/2 (1 - 1/4); 1/2 - 1/4 - 1/2 1/8
        (0.1875, 0.1875)
    """

    step: int
    batch_size: int
    share: float
    step_size: float
    batch_risk: float
    batch_risk_after: float
    risk: float
    risk_after: float
    out_change: float
    gradient_square: float
    slope: float
    direction_square: float
    curvature: float
    curvature_error: float
    along_gradient: bool
    consecutive: bool

    @property
    def descent(self) -> float:
        """What the gradient alone promised: `a <g,u>`."""
        return self.step_size * self.slope

    @property
    def moved_square(self) -> float:
        """`||theta+ - theta||^2`."""
        return self.step_size**2 * self.direction_square

    @property
    def left(self) -> float:
        """The step's share of the left side: `(m/n) [a <g,u> - a^2 L ||u||^2 / 2]`."""
        return self.share * (self.descent - self.curvature * self.moved_square / 2)

    @property
    def right(self) -> float:
        """The step's share of the right side: `R(theta) - R(theta+) + ((n-m)/n) M`."""
        return self.risk - self.risk_after + self.out_of_batch

    @property
    def out_of_batch(self) -> float:
        """`((n-m)/n) M`."""
        return (1 - self.share) * self.out_change

    @property
    def rests(self) -> bool:
        """Whether it did not move."""
        return self.direction_square == 0 or self.step_size == 0

    @property
    def edge(self) -> float:
        """`a L ||u||^2 / (2 <g,u>)`, which is `a L / 2` for `u = g`; (C1) asks it to be below 1.

        NaN for a step that the gradient does not take downhill.
        """
        return self.curvature * self.moved_square / (2 * self._downhill())

    @property
    def edge_error(self) -> float:
        """How far rounding may have moved `edge`."""
        return self.curvature_error * self.moved_square / (2 * self._downhill())

    def _downhill(self) -> float:
        return self.descent if self.descent > 0 else math.nan

    @property
    def weight(self) -> float:
        """`(m/n) a (1 - edge)`: times the square `||g||^2`, or the slope, it is `left`."""
        return self.left / self.slope if self.slope else math.nan


@dataclasses.dataclass(frozen=True)
class LedgerBound:
    """What the identity implies for the gradients of a run, made by `ConvergenceLedger.bound`.

    `q_t` is `||g_t||^2` where all steps are along the gradient, else the slope `<g_t, u_t>`, and
    `w_t = (m_t/n) a_t (1 - a_t L_t / 2) > 0` its weight in the identity.

    Attributes:
        steps: `T`, of the recorded steps that moved.
        of: What `q` is: "gradient square" or "slope".
        weighted_mean: `sum w q / sum w`, which is no less than the least `q`.
        weighted_bound: `[R_0 - R_* + sum ((n-m)/n) M] / sum w`, at least the weighted mean.
        mean: Mean of `q`.
        mean_bound: `[R_0 - R_* + sum ((n-m)/n) M] / (T min w)`, at least the mean.
        noise: The part of `weighted_bound` that is from the out-of-batch changes. Further steps
            like these make the other part vanish, not this one.
        constant_bound: `8/3 L [n (R_0 - R_*) / (m T) + (n-m) M / m]` with `L = 1 / (2a)` and `M`
            the mean out-of-batch change, at least the mean; NaN unless all steps are along the
            gradient with one `a`, one share and `a L_t <= 1/2`, but for the error of `L_t`.
        decrease: `R_0 - R_*`; the sum of the recorded decreases of the risk where they do not
            follow on one another or are those of a probe set, so that a floor says nothing.

    Reference:
        docs/theory.md, Thm 3.1.

    Example:
        >>> from conjopt.bounds import LedgerBound
        >>> bound = LedgerBound(
        ...     steps=2, of="gradient square", weighted_mean=0.5, weighted_bound=0.7, mean=0.5,
        ...     mean_bound=0.8, noise=0.1, constant_bound=float("nan"), decrease=0.6,
        ... )
        >>> bound.applies
        True
    """

    steps: int
    of: str
    weighted_mean: float
    weighted_bound: float
    mean: float
    mean_bound: float
    noise: float
    constant_bound: float
    decrease: float

    @property
    def applies(self) -> bool:
        """Whether it bounds anything: if not, (C1) failed at some step."""
        return math.isfinite(self.weighted_bound)


def bound_of(steps: Sequence[LedgerStep], floor: float, *, whole: bool) -> LedgerBound:
    """Derive the bounds from recorded steps; `ValueError` if none of them moved."""
    moving = [step for step in steps if not step.rests]
    if not moving:
        raise ValueError(
            "ConvergenceLedger: no step that moved the parameters is recorded, so there is nothing "
            "to bound: call begin before and end after an optimizer step"
        )
    along = all(step.along_gradient for step in moving)
    values = [step.gradient_square if along else step.slope for step in moving]
    if along:  # the displacement is rounded, and so is the slope along it
        weights = [step.left / q if q else math.nan for step, q in zip(moving, values, strict=True)]
    else:
        weights = [step.weight for step in moving]
    telescopes = whole and all(step.consecutive for step in steps[1:])
    if telescopes:
        decrease = steps[0].risk - floor
    else:
        decrease = math.fsum(step.risk - step.risk_after for step in steps)
    noise = math.fsum(step.out_of_batch for step in steps)
    count, mean = len(moving), math.fsum(values) / len(moving)
    if not all(weight > 0 for weight in weights):
        inf, nan = math.inf, math.nan
        of = "gradient square" if along else "slope"
        return LedgerBound(count, of, nan, inf, mean, inf, nan, nan, decrease)
    mass = math.fsum(weights)
    return LedgerBound(
        steps=count,
        of="gradient square" if along else "slope",
        weighted_mean=math.fsum(w * q for w, q in zip(weights, values, strict=True)) / mass,
        weighted_bound=(decrease + noise) / mass,
        mean=mean,
        mean_bound=(decrease + noise) / (count * min(weights)) if min(values) >= 0 else math.inf,
        noise=noise / mass,
        constant_bound=_constant(moving, decrease, noise) if along else math.nan,
        decrease=decrease,
    )


def _constant(steps: Sequence[LedgerStep], decrease: float, noise: float) -> float:
    a, share, count = min(step.step_size for step in steps), steps[0].share, len(steps)
    same = all(
        math.isclose(step.step_size, a, rel_tol=1e-6)
        and math.isclose(step.share, share, rel_tol=1e-9)
        for step in steps
    )
    edge = max(step.step_size * (step.curvature - step.curvature_error) / 2 for step in steps)
    if not (same and a > 0 and edge <= 0.25 * (1 + 1e-6)):  # a is rounded, too
        return math.nan
    return (decrease + noise) / (a * (1 - max(edge, 0.25)) * share * count)
