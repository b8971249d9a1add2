"""Step rules for directions along the gradient itself, without held-out slopes.

They go by ``L = hi(GGN_B)``, the greatest curvature of the batch, from a few curvature products.
"""

from __future__ import annotations

import torch
from torch import Tensor

from conjopt.optim import brake
from conjopt.optim.gate import Gate, choose
from conjopt.optim.statistics import Statistics
from conjopt.optim.step_size import StepRule, check_range, polyak_cap, trust_region

__all__ = ["GradientEdge", "PolyakStep", "Smoothness"]

RAMP = 10  # first steps over which the step grows to what the rule says
SETTLED = 20  # steps after which the slow mean of the losses tells something
UNKNOWN = 0.3  # correlation where there are no halves to measure it by
RISEN = 4.0  # most that counts of the running loss, over the least slow mean
REACH = 0.3  # change of outputs that a step may make where no Lipschitz constant bounds the loss


class GradientEdge(StepRule):
    """``a = s r / L``: the step of Thm 3.2 for SGD with momentum, braked where losses do not fall.

    ``L`` is the geometric mean of ``hi(GGN_B)``, of a large batch by some of its samples, over some
    twenty measurements. ``r = 1 / (1 + damping (1/rho - 1))``, with the gradient correlation
    ``rho`` of two parts of the batch (Thm 3.2 has ``r = rho``, for one step without momentum; a
    heavy ball's mean over steps is less noisy). The step is no longer than ``stable r / L`` with
    the upper envelope of L, and than the trust region (Thm 3.6) on the whole displacement ``u`` of
    the heavy ball. A brake (`conjopt.optim.brake`) shortens it where the running loss rises or
    rests.

    Along tuned SGD with momentum 0.9, ``a hi(GGN_B)`` was between 0.02 and 0.7 on eight problems,
    about 1 to 1.5 times ``rho``, and no other ratio told them apart as well.

    Args:
        s: share of ``1 / L`` without noise, in heavy-ball units.
        damping: share of the gradient noise that counts.
        rho_min: least correlation that counts.
        stable: of the limit by the upper envelope of L; a heavy ball is stable to
            ``2 (1 + momentum)`` on a quadratic without noise.
        tau: of the trust region. Where the link has no Lipschitz constant (Poisson), the outputs
            are to change by no more than 0.3 in root mean square, whatever tau: a heavy ball makes
            about ten such steps one after the other.

    Raises:
        ValueError: if a constant is out of range.

    Reference:
        docs/theory.md, Thm 3.2, 3.6 and 2.6.

    Example:
        >>> rule, statistics = GradientEdge(s=0.6), Statistics(0.9)
        >>> statistics.loss, statistics.steps = torch.tensor(4.0), torch.tensor(30.0)
        >>> from conjopt.optim.statistics import Measurement
        >>> one = torch.tensor(1.0)
        >>> statistics.see(Measurement(change=one, top=3 * one, correlation=one), None)
        >>> rule.after_measuring(statistics, False, None)
        >>> rule.step_size(statistics, 1.0, False)  # 0.6 / 3
        tensor(0.2000)
    """

    name = "edge"
    asks = "length"
    sampled = True

    def __init__(
        self,
        s: float = 0.6,
        damping: float = 0.2,
        rho_min: float = 0.05,
        stable: float = 1.5,
        tau: float = 3.0,
    ) -> None:
        check_range("GradientEdge", "s", s, 2)
        check_range("GradientEdge", "damping", damping, zero=True)
        check_range("GradientEdge", "rho_min", rho_min, 1)
        check_range("GradientEdge", "stable", stable, 4)
        check_range("GradientEdge", "tau", tau)
        self.s, self.damping, self.rho_min, self.stable, self.tau = s, damping, rho_min, stable, tau

    def before_step(
        self, statistics: Statistics, loss: Tensor, told: Tensor | None, gate: Gate
    ) -> None:
        """Let the brake see the loss, and the trust region the length of ``u``."""
        assert told is not None
        statistics.length = choose(gate, told.to(statistics.length), statistics.length)
        brake.watch_loss(statistics, loss, gate)

    def after_measuring(self, statistics: Statistics, trust_only: bool, gate: Gate) -> None:
        """Fix edge and brake until the next measurement.

        Args:
            statistics: whose ``edge``, ``cap`` and brake are written to.
            trust_only: never; directions along the gradient are measured in one way.
            gate: () whether the step is taken.
        """
        brake.judge(statistics, gate, SETTLED)
        rho = statistics.mean("correlation").nan_to_num(UNKNOWN).clamp(self.rho_min, 1)
        ramp = ((statistics.steps + 1) / RAMP).clamp(max=1)
        share = ramp * statistics.brake / (1 + self.damping * (1 / rho - 1))
        edge = share * self.s * torch.exp(-statistics.mean("log_top"))
        stable = share * self.stable / statistics.top.clamp_min(torch.finfo(share.dtype).tiny)
        statistics.edge = choose(gate, edge, statistics.edge)
        statistics.cap = choose(gate, stable, statistics.cap)

    def limits(
        self, statistics: Statistics, smoothness: float | None, trust_only: bool
    ) -> dict[str, Tensor]:
        """See `StepRule.limits`."""
        return {
            "edge": statistics.edge,
            "stability": statistics.cap,
            "trust region": _trust(
                statistics, self.tau, smoothness, statistics.gain * statistics.length
            ),
        }


class Smoothness(StepRule):
    """``a = 1 / (2 L)``, the step of Thm 3.1 to the letter; with ``momentum=0``.

    ``L`` is ``safety`` times the upper envelope of ``hi(GGN_B)``, by 6 curvature products from the
    gradient. The theorem asks for ``L >= L_t``, the realised curvature of each step, which has a
    part beyond the Gauss-Newton matrix: `conjopt.bounds.ConvergenceLedger` says whether it held.

    Args:
        safety: factor on the measured curvature.

    Raises:
        ValueError: if it is not positive.

    Reference:
        docs/theory.md, Thm 3.1 and 2.6.

    Example:
        >>> rule, statistics = Smoothness(safety=1.0), Statistics(0.9)
        >>> from conjopt.optim.statistics import Measurement
        >>> one = torch.tensor(1.0)
        >>> statistics.see(Measurement(change=one, top=4 * one), None)
        >>> rule.after_measuring(statistics, False, None)
        >>> rule.step_size(statistics, 1.0, False)
        tensor(0.1250)
    """

    name = "smoothness"
    products = 6

    def __init__(self, safety: float = 1.5) -> None:
        check_range("Smoothness", "safety", safety)
        self.safety = safety

    def after_measuring(self, statistics: Statistics, trust_only: bool, gate: Gate) -> None:
        """Fix the step until the next measurement.

        Args:
            statistics: whose ``edge`` is written to.
            trust_only: never.
            gate: () whether the step is taken.
        """
        tiny = torch.finfo(statistics.top.dtype).tiny
        edge = 1 / (2 * self.safety * statistics.top).clamp_min(tiny)
        statistics.edge = choose(gate, edge, statistics.edge)

    def limits(
        self, statistics: Statistics, smoothness: float | None, trust_only: bool
    ) -> dict[str, Tensor]:
        """See `StepRule.limits`."""
        return {"1/(2L)": statistics.edge}


class PolyakStep(StepRule):
    """``a = s L_B / <g, u>`` over the data floor (Thm 3.5), inside the trust region (Thm 3.6).

    The loss and the slope are those of the step's own batch. Give the floor by ``data_floor``; one
    that is too low makes steps too long, and where gradients vanish above it only the trust region
    holds them.

    Args:
        s: share of the Polyak step, below 2.
        tau: of the trust region.

    Raises:
        ValueError: if a constant is out of range.

    Reference:
        docs/theory.md, Thm 3.5 and 3.6.

    Example:
        >>> rule, statistics = PolyakStep(), Statistics(0.9)
        >>> statistics.loss = torch.tensor(3.0)
        >>> rule.before_step(statistics, torch.tensor(2.0), torch.tensor(4.0), None)
        >>> rule.limits(statistics, 0.5, False)["Polyak step"]
        tensor(0.5000)
    """

    name = "polyak"
    products = 0
    asks = "slope"

    def __init__(self, s: float = 1.0, tau: float = 1.0) -> None:
        check_range("PolyakStep", "s", s, 2)
        check_range("PolyakStep", "tau", tau)
        self.s, self.tau = s, tau

    def before_step(
        self, statistics: Statistics, loss: Tensor, told: Tensor | None, gate: Gate
    ) -> None:
        """Take the Polyak step of the batch."""
        assert told is not None
        statistics.cap = choose(gate, self.s * polyak_cap(loss, told), statistics.cap)

    def after_measuring(self, statistics: Statistics, trust_only: bool, gate: Gate) -> None:
        """Nothing: the trust region follows the measurements."""

    def limits(
        self, statistics: Statistics, smoothness: float | None, trust_only: bool
    ) -> dict[str, Tensor]:
        """See `StepRule.limits`."""
        return {
            "Polyak step": statistics.cap,
            "trust region": _trust(statistics, self.tau, smoothness, statistics.change),
        }


def _trust(statistics: Statistics, tau: float, smoothness: float | None, change: Tensor) -> Tensor:
    """The trust region, for no more risk than some times the least so far.

    A loss that has risen is no licence for longer steps. Without a Lipschitz constant the outputs
    are to change by no more than ``REACH`` in root mean square, or by ``sqrt(2 L)`` if less.
    """
    most = torch.where(statistics.lowest.isnan(), torch.inf, RISEN * statistics.lowest)
    loss = torch.minimum(statistics.loss, most)
    if smoothness is not None:
        return trust_region(loss, change, tau, smoothness)
    radius = (2 * loss.clamp_min(0)).sqrt().clamp(max=REACH)
    moving = change > 0
    return torch.where(moving, radius / torch.where(moving, change, 1.0), torch.inf)
