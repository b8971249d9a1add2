"""What an optimizer says of itself."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from conjopt.bounds import Condition
from conjopt.optim.statistics import Statistics

__all__ = ["Status"]


@dataclasses.dataclass(frozen=True)
class Status:
    """A snapshot of a `ConjSGD`, in per-sample units of the Fenchel-Young loss.

    Numbers that were not measured are NaN, or None for whole ones. Printed, it is a table.

    Attributes:
        step: steps taken.
        step_size: ``a lr`` of the first parameter group.
        limited_by: what set it: "edge", "stability", "Polyak cap", "Polyak step", "trust region",
            "1/(2L)", "realised change", "max_step", "lr" (constant rule), or "nothing measured".
        limits: each limit of the step rule by name, before ``lr``.
        loss: running mean of a sample's Fenchel-Young loss over the data floor; for
            `torch.nn.MSELoss` over k outputs that is k/2 times the criterion.
        slope: unbiased slope ``<G, u>`` (Thm 3.2), of directions made from halves.
        raw_slope: slope of the batches that u was made from.
        correlation: ``slope / raw_slope``, or along the gradient its correlation ``rho_m``
            (Thm 3.2).
        curvature: ``u^T GGN u`` (Thm 2.6).
        top_curvature: ``hi(GGN_B)`` of the batches, measured along the gradient.
        output_change: ``V``, rms change of the outputs per unit of step (Thm 3.6).
        gradient_energy: ``E = ||G||^2 + S^2``, the mean squared norm of a sample's gradient.
        noise_scale: ``B_noise`` in samples (Thm 3.3); infinite if no signal was seen.
        brake: factor below 1 where the loss rises or rests; 1 for rules without a brake.
        batch_size: samples in the last step; None if unknown.
        recommended_batch_size: by the batch rule; None without one.
        lo: least eigenvalue of the structure matrices at the ledger's last probe.
        hi: greatest one.
        conditions: C1 to C4 of Thm 3.1.
        guarantee: how Thm 3.6 holds for this step.
        skipped_steps: steps given up for a loss, gradient or measurement that was not finite.

    Example:
        >>> from torch import nn
        >>> from conjopt import ConjSGD
        >>> model = nn.Linear(2, 1)
        >>> status = ConjSGD(model.parameters(), model=model, loss=nn.MSELoss()).status()
        >>> print(str(status).splitlines()[1])
        step size        0 (limited by nothing measured)
        >>> [condition.state for condition in status.conditions]
        ['unknown', 'unknown', 'unknown', 'unknown']
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
    top_curvature: float
    output_change: float
    gradient_energy: float
    noise_scale: float
    brake: float
    batch_size: int | None
    recommended_batch_size: int | None
    lo: float
    hi: float
    conditions: tuple[Condition, ...]
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
        held_out: bool,
        conditions: Sequence[Condition],
        batch_sizes: tuple[int | None, int | None],
        extremes: tuple[float, float],
    ) -> Status:
        """Read a snapshot from the device.

        Args:
            statistics: of the optimizer.
            limits: of its step rule.
            group: its first parameter group.
            measures: whether its rule measures.
            trust_only: whether slopes and curvature could not be measured.
            held_out: whether slopes are held out.
            conditions: C1 to C4.
            batch_sizes: of the last step, and the recommended one.
            extremes: ``lo`` and ``hi``.
        """
        read = {name: float(limit) for name, limit in limits.items()}
        if (reach := float(statistics.reach)) < math.inf:
            read["realised change"] = reach
        measured = bool(statistics.weight > 0)
        mean = {
            name: float(statistics.mean(name))
            for name in ("slope", "raw_slope", "curvature", "log_top", "correlation")
        }
        signal, noise = (float(statistics.mean(name)) for name in ("mean_square", "noise"))
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
        correlation = mean["correlation"]
        if held_out:
            correlation = mean["slope"] / mean["raw_slope"] if mean["raw_slope"] else math.nan
        return cls(
            step=int(statistics.steps),
            step_size=step_size,
            limited_by=limited_by,
            limits=read if measured else {},
            loss=float(statistics.loss),
            slope=mean["slope"],
            raw_slope=mean["raw_slope"],
            correlation=correlation,
            curvature=mean["curvature"] if not trust_only else math.nan,
            top_curvature=math.exp(mean["log_top"]),
            output_change=float(statistics.change) if measured else math.nan,
            gradient_energy=signal + noise,
            noise_scale=signal if math.isnan(signal) else _ratio(noise, signal),
            brake=float(statistics.brake),
            batch_size=batch_sizes[0],
            recommended_batch_size=batch_sizes[1],
            lo=extremes[0],
            hi=extremes[1],
            conditions=tuple(conditions),
            guarantee=guarantee,
            skipped_steps=int(statistics.skipped),
        )

    def __str__(self) -> str:
        limits = ", ".join(f"{name} {value:.3g}" for name, value in self.limits.items())
        braked = f", braked by {self.brake:.3g}" if self.brake < 1 else ""
        wanted = self.recommended_batch_size
        batch = "unknown" if self.batch_size is None else str(self.batch_size)
        rows = [
            ("step", f"{self.step}, {self.skipped_steps} skipped"),
            ("step size", f"{self.step_size:.4g} (limited by {self.limited_by}{braked})"),
            ("limits", limits or "none"),
            ("loss", f"per sample, over the data floor {_number(self.loss)}"),
            ("slope", f"held out {_number(self.slope)}, raw {_number(self.raw_slope)}"),
            ("correlation", _number(self.correlation)),
            (
                "curvature",
                f"along u {_number(self.curvature)}, greatest {_number(self.top_curvature)}",
            ),
            ("output change", f"per unit of step {_number(self.output_change)}"),
            ("gradient energy", _number(self.gradient_energy)),
            ("noise scale", f"in samples {_number(self.noise_scale)}"),
            ("batch size", batch + ("" if wanted is None else f", recommended {wanted}")),
            ("eigenvalues", f"lo {_number(self.lo)}, hi {_number(self.hi)}"),
            *(
                (condition.name, f"{condition.state}: {condition.text}")
                for condition in self.conditions
            ),
            ("Thm 3.6", self.guarantee),
        ]
        return "\n".join(f"{name:<16} {value}" for name, value in rows)


def _ratio(noise: float, signal: float) -> float:
    return noise / signal if signal > 0 else math.inf


def _number(value: float) -> str:
    return "not measured" if math.isnan(value) else f"{value:.4g}"
