"""Step rules: from what was measured to the size ``a`` of the step ``theta <- theta - a u``.

Every limit of a step names the statement of docs/theory.md that it comes from.
"""

from __future__ import annotations

import abc
import math
from typing import ClassVar

import torch
from torch import Tensor

from conjopt.optim.gate import Gate, choose
from conjopt.optim.statistics import Statistics

__all__ = [
    "Constant",
    "Edge",
    "StepRule",
    "edge_step",
    "polyak_cap",
    "trust_region",
]


SHARE_MIN = 1e-9  # least share of a step that is tried


def edge_step(
    slope: Tensor, raw_slope: Tensor, curvature: Tensor, s: float, floor: float
) -> Tensor:
    """``s max(N, floor S, 0) / q``: the share ``s`` of the way to the minimum along u (Thm 3.2).

    Args:
        slope: () unbiased slope ``N`` of the mean loss along u.
        raw_slope: () slope ``S`` of the batch that u was made from.
        curvature: () ``q = u^T GGN u``.
        s: between 0 and 2, where 1 is best for one step and 2 is the edge of stability.
        floor: the least share of the raw slope that counts.

    Returns:
        () the step; very large, but finite or infinite and never NaN, where the curvature is 0.

    Example:
        >>> edge_step(torch.tensor(2.0), torch.tensor(4.0), torch.tensor(1.0), s=1.5, floor=0.3)
        tensor(3.)
    """
    rise = torch.maximum(slope, floor * raw_slope).clamp_min(0)
    return s * rise / curvature.clamp_min(torch.finfo(curvature.dtype).tiny)


def polyak_cap(loss: Tensor, raw_slope: Tensor) -> Tensor:
    """``max(L, 0) / S``, no limit unless ``S > 0``: the Polyak step over a floor (Thm 3.5).

    Args:
        loss: () mean loss ``L`` over the data floor.
        raw_slope: () ``S = <g, u>``.

    Returns:
        () the cap.

    Example:
        >>> polyak_cap(torch.tensor(2.0), torch.tensor(4.0))
        tensor(0.5000)
        >>> polyak_cap(torch.tensor(2.0), torch.tensor(-1.0))
        tensor(inf)
    """
    positive = raw_slope > 0
    cap = loss.clamp_min(0) / torch.where(positive, raw_slope, 1.0)
    return torch.where(positive, cap, torch.inf)


def trust_region(loss: Tensor, change: Tensor, tau: float, smoothness: float | None) -> Tensor:
    """``tau sqrt(2 max(L, 0) / beta) / V``: the relative-risk trust region (Thm 3.6).

    With ``L`` and ``V`` of the same samples, no such step multiplies the excess risk of a linear
    model by more than ``(1 + tau)^2``.

    Args:
        loss: () mean loss ``L`` over the data floor.
        change: () ``V = rms ||J_i u||``.
        tau: positive.
        smoothness: ``beta`` of the link; None (no finite one) gives no limit.

    Returns:
        () the limit; infinite where nothing changes.

    Example:
        >>> trust_region(torch.tensor(0.25), torch.tensor(2.0), tau=1.0, smoothness=0.5)
        tensor(0.5000)
    """
    if smoothness is None:
        return torch.full_like(loss, torch.inf)
    radius = tau * (2 * loss.clamp_min(0) / smoothness).sqrt()
    moving = change > 0
    return torch.where(moving, radius / torch.where(moving, change, 1.0), torch.inf)


class StepRule(abc.ABC):
    """What makes a step size of the statistics.

    Attributes:
        name: as `ConjSGD` takes it.
        measures: whether it needs the loop to be watched.
        products: curvature products of a measurement along the gradient, for ``hi(GGN_B)``.
        sampled: whether they may be of some samples of a large batch.
        asks: what each step is to tell it of its batch: "slope" ``<g, u>``, "length" ``||u||``, or
            nothing.

    Example:
        >>> class TrustAlone(StepRule):
        ...     name = "trust"
        ...
        ...     def after_measuring(self, statistics, trust_only, gate):
        ...         pass
        ...
        ...     def limits(self, statistics, smoothness, trust_only):
        ...         limit = trust_region(statistics.loss, statistics.change, 0.5, smoothness)
        ...         return {"trust region": limit}
        >>> statistics = Statistics(0.9)
        >>> statistics.loss, statistics.change = torch.tensor(0.25), torch.tensor(2.0)
        >>> TrustAlone().step_size(statistics, 0.5, False)
        tensor(0.2500)
    """

    name: ClassVar[str]
    measures: ClassVar[bool] = True
    products: int = 2
    sampled: ClassVar[bool] = False
    asks: ClassVar[str] = ""

    def before_step(  # noqa: B027
        self, statistics: Statistics, loss: Tensor, told: Tensor | None, gate: Gate
    ) -> None:
        """Take in what every step tells; nothing, unless a rule needs it.

        Args:
            statistics: written to.
            loss: () of the batch, over the floor.
            told: () what the rule asks for.
            gate: () whether the step is taken.
        """

    @abc.abstractmethod
    def after_measuring(self, statistics: Statistics, trust_only: bool, gate: Gate) -> None:
        """Fix the limits that stay in force until the next measurement.

        Args:
            statistics: whose ``edge`` and ``cap`` are written to.
            trust_only: whether slopes and curvature could not be measured.
            gate: () whether the step is taken.
        """

    @abc.abstractmethod
    def limits(
        self, statistics: Statistics, smoothness: float | None, trust_only: bool
    ) -> dict[str, Tensor]:
        """The limits of this step by name, each (); their least is the step before ``lr``.

        Args:
            statistics: with the current running loss.
            smoothness: ``beta`` of the link.
            trust_only: whether slopes and curvature could not be measured.
        """

    def radius(
        self, statistics: Statistics, smoothness: float | None, trust_only: bool
    ) -> Tensor | None:
        """() rms change of the outputs that a step may really make; None leaves it untried.

        Args:
            statistics: with the current running loss.
            smoothness: ``beta`` of the link.
            trust_only: whether slopes and curvature could not be measured.
        """
        return None

    def after_trying(
        self, statistics: Statistics, tried: Tensor, change: Tensor, radius: Tensor, gate: Gate
    ) -> None:
        """Fix how far steps may reach until the next measurement, from one that was tried.

        Where the tried step keeps within the radius, there is no limit, unless only a share of it
        was tried: then that is the limit, and a larger share is tried next. Where it does not, the
        step is cut in proportion, which is on the safe side if changes grow faster than steps, and
        a quarter of it is tried next.

        Args:
            statistics: whose ``reach`` and ``share`` are written to.
            tried: () the step, before ``lr``.
            change: () rms change of the outputs that it made.
            radius: () that it may make.
            gate: () whether the step is taken.
        """
        holds = change <= radius
        finite = torch.isfinite(change)
        cut = torch.where(finite, tried * radius / torch.where(finite, change, 1.0), 0.0)
        whole = torch.where(statistics.share >= 1, torch.inf, tried)
        share = torch.where(holds, statistics.share * 2, statistics.share / 4).clamp(SHARE_MIN, 1)
        statistics.reach = choose(gate, torch.where(holds, whole, cut), statistics.reach)
        statistics.share = choose(gate, share, statistics.share)

    def step_size(
        self, statistics: Statistics, smoothness: float | None, trust_only: bool
    ) -> Tensor:
        """() the least limit within reach, 0 if none is finite.

        Args:
            statistics: with the current running loss.
            smoothness: ``beta`` of the link.
            trust_only: whether slopes and curvature could not be measured.
        """
        least = torch.minimum(self.least(statistics, smoothness, trust_only), statistics.reach)
        return torch.where(torch.isfinite(least), least, 0.0)

    def least(self, statistics: Statistics, smoothness: float | None, trust_only: bool) -> Tensor:
        """() the least limit.

        Args:
            statistics: with the current running loss.
            smoothness: ``beta`` of the link.
            trust_only: whether slopes and curvature could not be measured.
        """
        least: Tensor | None = None
        for limit in self.limits(statistics, smoothness, trust_only).values():
            least = limit if least is None else torch.minimum(least, limit)
        assert least is not None
        return least


class Edge(StepRule):
    """The least of edge step, Polyak cap and trust region (Thm 3.2, 3.5, 3.6), for held-out slopes.

    Args:
        s: share of the way to the minimum along u; 2 is the edge of stability.
        rho_min: least share of the raw slope that counts as slope, against annealing too early.
        tau: of the trust region: no step multiplies the excess risk by more than (1 + tau)^2.
        tau_alone: of the trust region where it is the only limit.
        realised: measuring steps try the step on their samples; where the outputs really change by
            more than this multiple of the trust region's radius, it is cut. None for the limits of
            the linearised model alone.

    Raises:
        ValueError: if a constant is out of range.

    Example:
        >>> rule, statistics = Edge(), Statistics(0.9)
        >>> statistics.loss = torch.tensor(0.04)
        >>> from conjopt.optim.statistics import Measurement
        >>> one = torch.tensor(1.0)
        >>> found = Measurement(change=one, slope=one, raw_slope=2 * one, curvature=one)
        >>> statistics.see(found, None)
        >>> rule.after_measuring(statistics, False, None)
        >>> rule.limits(statistics, 0.5, False)
        {'edge': tensor(1.5000), 'Polyak cap': tensor(0.0200), 'trust region': tensor(0.4000)}
        >>> rule.step_size(statistics, 0.5, False)
        tensor(0.0200)
    """

    name = "edge"

    def __init__(
        self,
        s: float = 1.5,
        rho_min: float = 0.3,
        tau: float = 1.0,
        tau_alone: float = 0.5,
        realised: float | None = 2.0,
    ) -> None:
        check_range("Edge", "s", s, 2)
        check_range("Edge", "rho_min", rho_min, 1, zero=True)
        check_range("Edge", "tau", tau)
        check_range("Edge", "tau_alone", tau_alone)
        if realised is not None:
            check_range("Edge", "realised", realised)
        self.s, self.rho_min, self.tau, self.tau_alone = s, rho_min, tau, tau_alone
        self.realised = realised

    def after_measuring(self, statistics: Statistics, trust_only: bool, gate: Gate) -> None:
        """Fix edge step and Polyak cap until the next measurement.

        Args:
            statistics: whose ``edge`` and ``cap`` are written to.
            trust_only: whether slopes and curvature could not be measured.
            gate: () whether the step is taken.
        """
        if trust_only:
            return
        raw = statistics.mean("raw_slope")
        edge = edge_step(
            statistics.mean("slope"), raw, statistics.mean("curvature"), self.s, self.rho_min
        )
        statistics.edge = choose(gate, edge, statistics.edge)
        statistics.cap = choose(gate, polyak_cap(statistics.loss, raw), statistics.cap)

    def limits(
        self, statistics: Statistics, smoothness: float | None, trust_only: bool
    ) -> dict[str, Tensor]:
        """See `StepRule.limits`."""
        tau = self.tau_alone if trust_only else self.tau
        trust = trust_region(statistics.loss, statistics.change, tau, smoothness)
        if trust_only:
            return {"trust region": trust}
        return {"edge": statistics.edge, "Polyak cap": statistics.cap, "trust region": trust}

    def radius(
        self, statistics: Statistics, smoothness: float | None, trust_only: bool
    ) -> Tensor | None:
        """See `StepRule.radius`."""
        if self.realised is None or smoothness is None:
            return None
        tau = self.realised * (self.tau_alone if trust_only else self.tau)
        return tau * (2 * statistics.loss.clamp_min(0) / smoothness).sqrt()


class Constant(StepRule):
    """The step is ``lr`` itself, as in torch; nothing is measured.

    Example:
        >>> Constant().limits(Statistics(0.9), 0.5, False)
        {}
    """

    name = "constant"
    measures = False

    def after_measuring(self, statistics: Statistics, trust_only: bool, gate: Gate) -> None:
        """Nothing is measured."""

    def limits(
        self, statistics: Statistics, smoothness: float | None, trust_only: bool
    ) -> dict[str, Tensor]:
        """There are none."""
        return {}


def check_range(
    owner: str, name: str, value: float, most: float = math.inf, *, zero: bool = False
) -> None:
    ok = math.isfinite(value) and (value > 0 or (zero and value == 0)) and value <= most
    if not ok:
        low = "0 <=" if zero else "0 <"
        high = f" <= {most:g}" if math.isfinite(most) else ", finite"
        raise ValueError(f"{owner}: {name}={value}, expected {low} {name}{high}")
