"""The conditions under which Thm 3.1 is of use, with what was measured of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from conjopt.bounds.records import LedgerStep, bound_of

__all__ = ["Condition", "bounded_spectrum", "finite_decrease", "noise_below_target", "step_sizes"]


@dataclasses.dataclass(frozen=True)
class Condition:
    """One condition of Thm 3.1 and what was measured of it.

    Attributes:
        name: "C1" to "C4".
        state: "holds", "fails", or "unknown".
        number: What was measured; NaN if nothing was.
        margin: How much is left before it fails, in the number's units, negative if it fails; NaN
            where that is unknown.
        text: All of this in words.

    Reference:
        docs/theory.md, Thm 3.1.

    Example:
        >>> from conjopt.bounds import Condition
        >>> print(Condition("C1", "holds", 0.25, 0.75, "the largest a L / 2 is 0.25, below 1"))
        C1 holds: the largest a L / 2 is 0.25, below 1
    """

    name: str
    state: str
    number: float
    margin: float
    text: str

    def __str__(self) -> str:
        return f"{self.name} {self.state}: {self.text}"


def step_sizes(steps: Sequence[LedgerStep]) -> Condition:
    """(C1) `0 < a_t < 2 / L_t`: the largest `a L / 2`, best at 1/2, is below 1."""
    moving = [step for step in steps if not step.rests]
    if not moving:
        return Condition("C1", "unknown", math.nan, math.nan, "no recorded step moved")
    uphill = [step for step in moving if not step.descent > 0]
    if uphill:
        text = f"{len(uphill)} of {len(moving)} steps are not downhill along their batch's gradient"
        return Condition("C1", "fails", math.inf, -math.inf, text)
    number = max(step.edge for step in moving)
    # A comparison with NaN fails, and so does the condition then.
    surely = [step for step in moving if step.edge + step.edge_error < 1]
    broken = [step for step in moving if not step.edge - step.edge_error < 1]
    of = "a L / 2" if all(step.along_gradient for step in moving) else "a L ||u||^2 / (2 <g,u>)"
    text = f"the largest {of} of {len(moving)} steps is {number:.3g} (below 1 allowed, 0.5 best)"
    if broken:
        text += f"; {len(broken)} steps are beyond: shorten the step"
        return Condition("C1", "fails", number, 1 - number, text)
    if len(surely) < len(moving):
        text += "; rounding leaves L too uncertain at the smallest steps to tell"
        return Condition("C1", "unknown", number, math.nan, text)
    return Condition("C1", "holds", number, 1 - number, text)


def noise_below_target(
    steps: Sequence[LedgerStep], floor: float, energy_target: float | None, *, whole: bool
) -> Condition:
    """(C2): the out-of-batch part of the bound is below the energy aimed at."""
    if all(step.rests for step in steps):
        return Condition("C2", "unknown", math.nan, math.nan, "no recorded step moved")
    bound = bound_of(steps, floor, whole=whole)
    risk = math.fsum(step.out_of_batch / step.share for step in steps if step.share) / len(steps)
    number = bound.noise
    if math.isnan(number):
        text = "there is no bound to compare with, because C1 fails"
        return Condition("C2", "unknown", number, math.nan, text)
    text = (
        f"the samples outside of the batch add {number:.3g} to the bound of the {bound.of} "
        f"(mean (n-m)M/m: {risk:.3g})"
    )
    if energy_target is None:
        return Condition("C2", "unknown", number, math.nan, text + "; no energy_target was given")
    margin = energy_target - number
    if margin > 0:
        return Condition("C2", "holds", number, margin, text + f", below {energy_target:.3g}")
    text += f", not below {energy_target:.3g}: take larger batches or shorter steps"
    return Condition("C2", "fails", number, margin, text)


def bounded_spectrum(
    lo: Sequence[float], hi: Sequence[float], lo_min: float, hi_max: float
) -> Condition:
    """(C3): `lo`, the number, above `lo_min` and `hi` below `hi_max` wherever measured."""
    if not lo or not hi:
        text = "no eigenvalues: pass lo= and hi=, or call probe_eigenvalues() along the run"
        return Condition("C3", "unknown", math.nan, math.nan, text)
    if any(math.isnan(value) for value in (*lo, *hi)):
        return Condition("C3", "unknown", math.nan, math.nan, "some eigenvalues are NaN")
    least, greatest = min(lo), max(hi)
    text = f"lo is at least {least:.3g} and hi at most {greatest:.3g} over {len(lo)} probes"
    if not least > lo_min:
        return Condition("C3", "fails", least, least - lo_min, text + f"; lo not above {lo_min:g}")
    if not (greatest < hi_max and math.isfinite(greatest)):
        return Condition("C3", "fails", least, hi_max - greatest, text + f"; hi above {hi_max:g}")
    return Condition("C3", "holds", least, least - lo_min, text)


def finite_decrease(steps: Sequence[LedgerStep], floor: float) -> Condition:
    """(C4): `R_0 - R_*` is finite, and `R_*` a floor of what was seen."""
    if not steps:
        return Condition("C4", "unknown", math.nan, math.nan, "no step is recorded")
    number = steps[0].risk - floor
    risks = [risk for step in steps for risk in (step.risk, step.risk_after)]
    if not all(math.isfinite(risk) for risk in (*risks, number)):
        text = f"R_0 - R_* is {number:g}, and not all recorded risks are finite"
        return Condition("C4", "fails", number, -math.inf, text)
    margin = min(risks) - floor
    text = f"R_0 - R_* is {number:.4g}, over a floor of {floor:.4g}"
    if margin < -1e-9 * (1 + abs(floor)):
        text += f", which the risk {min(risks):.4g} went below: it is no floor"
        return Condition("C4", "fails", number, margin, text)
    return Condition("C4", "holds", number, margin, text)
