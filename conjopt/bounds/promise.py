"""What Thm 3.1 says of steps to come, under envelopes that are assumed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from conjopt.bounds.records import LedgerStep
from conjopt.bounds.steps import convergence_bound

__all__ = ["Promise", "promised"]


@dataclasses.dataclass(frozen=True)
class Promise:
    """A bound for steps to come, under assumed envelopes; made by `ConvergenceLedger.promise`.

    Attributes:
        bound: On the mean of `||g_t||^2` over the next steps; infinite unless `a < 2 / L`.
        limit: What it tends to with more and more steps, the out-of-batch part.
        steps: `T`.
        step_size: `a`, held.
        share: `m / n`, held.
        curvature: `L`, assumed to be no less than that of any step.
        out_change: `M`, assumed to be no less than that of any step.

    Reference:
        docs/theory.md, Thm 3.1.

    Example:
        >>> from conjopt.bounds import Promise
        >>> Promise(0.3, 0.1, 100, 0.5, 0.25, 1.0, 0.01).limit
        0.1
    """

    bound: float
    limit: float
    steps: int
    step_size: float
    share: float
    curvature: float
    out_change: float


def promised(
    recent: Sequence[LedgerStep],
    floor: float,
    steps: int,
    *,
    step_size: float | None,
    share: float | None,
    curvature: float | None,
    out_change: float | None,
) -> Promise:
    """Bound steps to come; see `ConvergenceLedger.promise`."""
    a = recent[-1].step_size if step_size is None else step_size
    p = recent[-1].share if share is None else share
    L = (
        max(step.curvature + step.curvature_error for step in recent)
        if curvature is None
        else curvature
    )
    M = max(0.0, *(step.out_change for step in recent)) if out_change is None else out_change

    def over(decrease: float) -> float:
        return convergence_bound(
            decrease, steps, batch_size=p, samples=1.0, curvature=L, out_change=M, step_size=a
        )

    return Promise(over(recent[-1].risk_after - floor), over(0.0), steps, a, p, L, M)
