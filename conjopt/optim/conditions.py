"""The conditions C1 to C4 of Thm 3.1 as an optimizer knows them."""

from __future__ import annotations

import math

from conjopt.bounds import Condition, ConvergenceLedger
from conjopt.optim.statistics import Statistics

__all__ = ["conditions"]

RECENT = 100  # recorded steps that the conditions speak of: one of long ago is history


def conditions(
    ledger: ConvergenceLedger | None, statistics: Statistics, step_size: float, held_out: bool
) -> tuple[Condition, ...]:
    """C1 to C4, from a ledger's last records, or from the measurements of the steps alone.

    Args:
        ledger: of the run; None for none.
        statistics: of the optimizer.
        step_size: ``a lr``.
        held_out: whether slopes are held out; else the greatest curvature is measured.
    """
    if ledger is not None and ledger.steps:
        return tuple(ledger.conditions(last=min(RECENT, len(ledger.steps))))
    remedy = "; make the optimizer with ledger= to have it recorded"
    loss = float(statistics.loss)
    finite = math.isfinite(loss)
    return (
        _step(statistics, step_size, held_out, remedy),
        Condition(
            "C2", "unknown", math.nan, math.nan, "no sample outside of a batch is seen" + remedy
        ),
        Condition(
            "C3", "unknown", math.nan, math.nan, "no extreme eigenvalues are measured" + remedy
        ),
        Condition(
            "C4",
            "holds" if finite else "unknown",
            loss,
            loss,
            f"the running loss is {loss:.3g} over the data floor" if finite else "no loss was seen",
        ),
    )


def _step(statistics: Statistics, step_size: float, held_out: bool, remedy: str) -> Condition:
    """C1, as far as the curvature of the linearised model tells."""
    if held_out:
        curvature = float(statistics.mean("curvature"))
        slope = float(statistics.mean("raw_slope"))
        number = step_size * curvature / (2 * slope) if slope > 0 else math.nan
        of = "a u^T GGN u / (2 <g,u>)"
    else:
        number = step_size * float(statistics.mean("log_top").exp()) / 2
        of = "a hi(GGN_B) / 2"
    if not math.isfinite(number):
        return Condition("C1", "unknown", math.nan, math.nan, "no curvature is measured" + remedy)
    state = "holds" if number < 1 else "fails"
    text = f"{of} of the running means is {number:.3g} (below 1 allowed, 0.5 best){remedy}"
    return Condition("C1", state, number, 1 - number, text)
