"""What an optimizer says of itself."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from conjopt.optim.statistics import Statistics

__all__ = ["Status"]


@dataclasses.dataclass(frozen=True)
class Status:
    """A snapshot of a `ConjSGD`, in per-sample units of the Fenchel-Young loss.

    Numbers that were not measured are NaN. Printed, it is a table.

    Attributes:
        step: steps taken.
        step_size: ``a lr`` of the first parameter group.
        limited_by: what set it: "edge", "Polyak cap", "trust region", "realised change",
            "max_step", "lr" (constant rule), or "nothing measured".
        limits: each limit of the step rule by name, before ``lr``.
        loss: running mean of a sample's Fenchel-Young loss over the data floor; for
            `torch.nn.MSELoss` over k outputs that is k/2 times the criterion.
        slope: unbiased slope ``<G, u>`` (Thm 3.2).
        raw_slope: slope of the batches that u was made from.
        correlation: ``slope / raw_slope``; for u = g the gradient correlation of Thm 3.2.
        curvature: ``u^T GGN u`` (Thm 2.6).
        output_change: ``V``, rms change of the outputs per unit of step (Thm 3.6).
        noise_scale: ``B_noise`` in samples (Thm 3.3); infinite if no signal was seen.
        guarantee: how Thm 3.6 holds for this step.
        skipped_steps: steps given up for a loss, gradient or measurement that was not finite.

    Example:
        >>> status = Status(
        ...     step=3, step_size=0.1, limited_by="edge", limits={"edge": 0.1}, loss=1.5, slope=2.0,
        ...     raw_slope=4.0, correlation=0.5, curvature=8.0, output_change=3.0, noise_scale=64.0,
        ...     guarantee="a calibrated heuristic", skipped_steps=0,
        ... )
        >>> print(str(status).splitlines()[1])
        step size        0.1 (limited by edge)
    """

    step: int
    step_size: float
    limited_by: str
    limits: dict[str, float]
    loss: float
    slope: float
    raw_slope: float
    correlation: float
    curvature: float
    output_change: float
    noise_scale: float
    guarantee: str
    skipped_steps: int

    @classmethod
    def of(
        cls,
        statistics: Statistics,
        limits: Mapping[str, Tensor],
        group: Mapping[str, Any],
        *,
        measures: bool,
        trust_only: bool,
    ) -> Status:
        """Read a snapshot from the device.

        Args:
            statistics: of the optimizer.
            limits: of its step rule.
            group: its first parameter group.
            measures: whether its rule measures.
            trust_only: whether slopes and curvature could not be measured.
        """
        read = {name: float(limit) for name, limit in limits.items()}
        if (reach := float(statistics.reach)) < math.inf:
            read["realised change"] = reach
        measured = bool(statistics.weight > 0)
        slope, raw = (float(statistics.mean(name)) for name in ("slope", "raw_slope"))
        signal, noise = (float(statistics.mean(name)) for name in ("mean_square", "noise"))
        has_halves = measured and not trust_only and noise != 0
        step_size = float(group["step_size"])
        most = group["max_step"]
        capped = most is not None and step_size >= most * (1 - 1e-6)  # it was rounded, perhaps
        if measures and not measured:
            limited_by = "nothing measured"
        elif capped:
            limited_by = "max_step"
        elif not measures:
            limited_by = "lr"
        else:
            limited_by = min(read, key=read.__getitem__)
        if not measures:
            guarantee = "does not speak of a constant step"
        elif measured:
            guarantee = "a calibrated heuristic: L is a running mean and V up to a period old"
        else:
            guarantee = "nothing measured"
        return cls(
            step=int(statistics.steps),
            step_size=step_size,
            limited_by=limited_by,
            limits=read if measured else {},
            loss=float(statistics.loss),
            slope=slope if has_halves else math.nan,
            raw_slope=raw if measured else math.nan,
            correlation=slope / raw if has_halves and raw else math.nan,
            curvature=float(statistics.mean("curvature")) if not trust_only else math.nan,
            output_change=float(statistics.change) if measured else math.nan,
            noise_scale=(noise / signal if signal > 0 else math.inf) if has_halves else math.nan,
            guarantee=guarantee,
            skipped_steps=int(statistics.skipped),
        )

    def __str__(self) -> str:
        limits = ", ".join(f"{name} {value:.3g}" for name, value in self.limits.items())
        rows = [
            ("step", f"{self.step}, {self.skipped_steps} skipped"),
            ("step size", f"{self.step_size:.4g} (limited by {self.limited_by})"),
            ("limits", limits or "none"),
            ("loss", f"per sample, over the data floor {_number(self.loss)}"),
            ("slope", f"held out {_number(self.slope)}, raw {_number(self.raw_slope)}"),
            ("correlation", _number(self.correlation)),
            ("curvature", _number(self.curvature)),
            ("output change", f"per unit of step {_number(self.output_change)}"),
            ("noise scale", f"in samples {_number(self.noise_scale)}"),
            ("Thm 3.6", self.guarantee),
        ]
        return "\n".join(f"{name:<16} {value}" for name, value in rows)


def _number(value: float) -> str:
    return "not measured" if math.isnan(value) else f"{value:.4g}"
