"""A step between its two measurements, and the record that they make."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from conjopt.bounds.records import LedgerStep
from conjopt.bounds.risks import Point, Samples, Sums
from conjopt.bounds.steps import realised_curvature

__all__ = ["LedgerStart", "closed", "joined"]

# Of losses in float64, in units of eps times the size of losses and outputs: in 600 steps of
# networks of three layers, against second derivatives, L was off by a seventeenth of it at most.
_ROUNDING = 16.0


@dataclasses.dataclass(frozen=True, eq=False)
class LedgerStart:
    """A step that `ConvergenceLedger.begin` opened and `end` is to close.

    Attributes:
        batch: Its samples, which are read again at the end.
        rows: Of the probe set, those outside of the batch.
        point: Parameters and buffers.
        gradient: `g_B` by name, float64.
        in_batch: Sums over the batch.
        outside: Sums over the other samples.
    """

    batch: Samples
    rows: Tensor | None
    point: Point
    gradient: dict[str, Tensor]
    in_batch: Sums
    outside: Sums


def closed(
    before: LedgerStart,
    after: Point,
    in_batch: Sums,
    outside: Sums,
    *,
    step_size: float | None,
    step: int,
    consecutive: bool,
) -> LedgerStep:
    """Make the record; see `ConvergenceLedger.end`."""
    d = {name: value - after.trained[name] for name, value in before.point.trained.items()}
    slope, square = _inner(before.gradient, d), _inner(d, d)
    gradient_square = _inner(before.gradient, before.gradient)
    a = _step_size(step_size, slope, square, gradient_square)
    risk, risk_after = before.in_batch.mean, in_batch.mean
    sizes = [abs(risk), abs(risk_after), abs(slope)]
    for sums in (before.in_batch, in_batch):
        sizes.append(sums.outputs / sums.size if sums.size else 0.0)
    error = _ROUNDING * torch.finfo(torch.float64).eps * sum(sizes)
    size = in_batch.size + outside.size
    return LedgerStep(
        step=step,
        batch_size=before.batch.count,
        share=in_batch.size / size if size else 0.0,
        step_size=a,
        batch_risk=risk,
        batch_risk_after=risk_after,
        risk=joined(before.in_batch, before.outside),
        risk_after=joined(in_batch, outside),
        out_change=outside.mean - before.outside.mean,
        gradient_square=gradient_square,
        slope=slope / a if a else 0.0,
        direction_square=square / a**2 if a else 0.0,
        curvature=realised_curvature(risk, risk_after, slope, square),
        curvature_error=2 * error / square if square else 0.0,
        along_gradient=_along(before, d, a),
        consecutive=consecutive,
    )


def _along(before: LedgerStart, d: Mapping[str, Tensor], a: float) -> bool:
    """Whether `d` is `a g` but for what the dtypes of parameters and gradients round off."""
    gap = allowed = rounding = 0.0
    for name, moved in d.items():
        eps = before.point.eps[name]
        step = a * before.gradient[name]
        gap += float((moved - step).square().sum())
        allowed += min(max(1e3 * eps, 1e-8), 0.1) ** 2 * float(step.square().sum())
        rounding += (2 * eps) ** 2 * float(before.point.trained[name].square().sum())
    return math.sqrt(gap) <= math.sqrt(allowed) + math.sqrt(rounding)


def _inner(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    return math.fsum(float((value * b[name]).sum()) for name, value in a.items())


def joined(a: Sums, b: Sums) -> float:
    """Return the mean loss of two sets of samples together."""
    return Sums(a.total + b.total, a.size + b.size, 0.0).mean


def _step_size(given: float | None, slope: float, square: float, gradient_square: float) -> float:
    if given is None:
        if square == 0:
            return 0.0
        return slope / gradient_square if slope and gradient_square else 1.0
    if given == 0 and square:
        raise ValueError(
            "ConvergenceLedger.end: step_size=0, but the parameters moved: pass the step that the "
            "optimizer took, or none"
        )
    return float(given)
