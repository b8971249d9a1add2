"""What the theory says of runs, and what ConjSGD promises beyond torch, as statements."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch

from conjopt.bounds import ConvergenceLedger
from conjopt.bounds.records import LedgerBound
from conjopt.optim import ConjSGD
from conjopt.testing.optimizer_contract import AFTER, Sides, alike, both, holds, regrouped
from conjopt.testing.optimizer_runs import MakeOptimizer, Run, Setting, numbers
from conjopt.testing.searching import Apart

__all__ = ["Theory", "largest_tau"]

SLACK = 1e-7  # relative, of sums of losses in float64


class Theory:
    """Statements of docs/theory.md and of ConjSGD on one optimizer, each from a setting.

    Args:
        make_optimizer: of a model and a loss.
        tau: of Thm 3.6.
    """

    def __init__(self, make_optimizer: MakeOptimizer, tau: float) -> None:
        self.make, self.tau = make_optimizer, tau

    def on_runs(self) -> dict[str, Callable[[Setting], Sides]]:
        """By name, what speaks of every model."""
        return {
            "Thm 3.1: both sides of the ledger are equal": self.identity,
            "Thm 3.1: the gradients are within its bound": self.bound,
            "C1 of Thm 3.1: a L / 2 is below 1": self.below_the_edge,
            "a gradient that is not finite leaves the parameters": self.not_finite,
            "a step that was given up leaves no trace": self.no_trace,
            "a loaded state is not written to": self.loaded_copies,
            "groups of equal options are one group": self.equal_groups,
            "gradients of zero move nothing": self.zero_gradients,
        }

    def on_linear_models(self) -> dict[str, Callable[[Setting], Sides]]:
        """By name, what is exact where the model is linear."""
        return {
            "Thm 3.6: no more than (1 + tau)^2 times the excess risk": self.trust_region,
            "Thm 3.6: the reported trust region is tau sqrt(2 L / beta) / V": self.reported,
        }

    # Thm 3.1.

    def identity(self, setting: Setting) -> Sides:
        """The ledger's two sides are equal, also with the first and last risk of the run itself."""
        run, ledger = self._kept(setting)
        first, last = Run(setting, self.make).risk(), run.risk()
        noise = math.fsum(step.out_of_batch for step in ledger.steps)
        sizes = [abs(step.descent) + step.risk + step.risk_after for step in ledger.steps]
        size = torch.full((2,), 1e-12 * math.fsum([1.0, *sizes]), dtype=torch.float64)
        left = torch.full_like(size, ledger.left())
        right = torch.tensor([ledger.right(), float(first - last) + noise], dtype=torch.float64)
        return left, right, size, "="

    def bound(self, setting: Setting) -> Sides:
        """Where C1 holds, mean squares (or slopes) of the run's gradients are within the bounds.

        The floor is the last risk, for which the bound of the weighted mean is an equation.
        """
        run, ledger = self._kept(setting)
        found = [(step, q) for step, q in zip(ledger.steps, run.found, strict=True)]
        moved = [pair for pair in found if not pair[0].rests]
        nothing = torch.zeros(1)
        if not moved:
            return nothing, nothing, nothing, "<="
        # The last risk is a floor of the run, over which the bound is an equation.
        ledger.floor = float(run.risk())
        bound = ledger.bound()
        if bound.of == "gradient square":
            values = [square for _, (square, _) in moved]
        else:
            values = [slope / step.step_size for step, (_, slope) in moved]
        return _within(bound, values, [step.left for step, _ in moved], ledger)

    def below_the_edge(self, setting: Setting) -> Sides:
        """C1 holds at every step that moves; one that the gradient takes uphill fails it."""
        _, ledger = self._kept(setting)
        edges = [step.edge - step.edge_error for step in ledger.steps if not step.rests]
        left = torch.tensor([0.0, *edges], dtype=torch.float64)
        left = left.nan_to_num(math.inf)  # of a step that the gradient does not take downhill
        return left, torch.ones_like(left), torch.full_like(left, -1e-12), "<="

    def _kept(self, setting: Setting) -> tuple[Any, ConvergenceLedger]:
        """A run that a ledger keeps account of, with its own squares and slopes."""
        run: Any = Run(setting, self.make)
        ledger = ConvergenceLedger(run.model, run.loss, *setting.data(), whole=True)
        run.found = []
        for step in range(setting.taken + 1):
            before, gradient = run.flat(), run.gradient(step)
            if run.needs_closure:
                start = ledger.begin(*setting.batch(step))
                run.step(step)
            else:
                run.backward(step)
                start = ledger.begin(*setting.batch(step))
                run.optimizer.step()
            ledger.end(start)
            run.found.append((float(gradient @ gradient), float(gradient @ (before - run.flat()))))
        return run, ledger

    # Thm 3.6, of which all is known at the first step of a linear model without weight decay: the
    # odd and the even samples of a batch are alike, and running means are of it alone.

    def trust_region(self, setting: Setting) -> Sides:
        """``R(theta+) <= (1 + tau)^2 R(theta)`` for the first step, over a floor of 0."""
        run = Run(setting, self.make, decays=False)
        before, size = run.risk(), run.outputs().square().max()
        run.step(0)
        size = 1e-13 * (1 + size + run.outputs().square().max())
        return run.risk()[None], ((1 + self.tau) ** 2 * before)[None], size[None], "<="

    def reported(self, setting: Setting) -> Sides:
        """The limit in `ConjSGD.status` is the theorem's, of the run's own risk and outputs."""
        run = Run(setting, self.make, decays=False)
        optimizer, potential = run.optimizer, setting.potential
        assert isinstance(optimizer, ConjSGD)
        assert potential.smoothness is not None
        f, (_, y) = run.outputs(), setting.data()
        points = torch.eye(f.shape[1], dtype=f.dtype)[y] if y.ndim == 1 else y
        loss = potential.loss(points, f).mean()
        run.step(0)
        change = potential.tangent_projection(run.outputs() - f).square().sum(1).mean().sqrt()
        steps = [float(group["step_size"]) for group in optimizer.param_groups]
        found = optimizer.status().limits["trust region"]
        if max(steps) == 0 or not change > 1e-9 * f.norm() or not math.isfinite(found):
            nothing = torch.zeros(1)
            return nothing, nothing, nothing, "="  # no change, and no limit to compare
        radius = self._rule_tau(optimizer) * (2 * loss / potential.smoothness).sqrt()
        expected = (radius * max(steps) / change)[None]
        return torch.tensor([found], dtype=f.dtype), expected, 1e-6 * expected, "="

    def _rule_tau(self, optimizer: ConjSGD) -> float:
        tau = largest_tau(optimizer)
        return self.tau if tau is None else tau

    # What ConjSGD promises beyond torch.

    def not_finite(self, setting: Setting) -> Sides:
        """NaN or infinity in one entry of one gradient, and all parameters stay."""
        all_sides = []
        for value in (math.nan, math.inf, -math.inf):
            run = Run(setting, self.make).steps(0, setting.taken)
            before = run.flat()
            run.step(setting.taken, _poison(value))
            all_sides.append(alike(run.flat(), before))
        return both(*all_sides)

    def no_trace(self, setting: Setting) -> Sides:
        """After such a step the run goes on as if it had not been tried, bit for bit."""
        last = setting.taken + AFTER
        twin = Run(setting, self.make).steps(0, last)
        all_sides = []
        for value in (math.nan, math.inf):
            run = Run(setting, self.make).steps(0, setting.taken)
            run.step(setting.taken, _poison(value))
            all_sides.append(alike(run.steps(setting.taken, last).flat(), twin.flat()))
        return both(*all_sides)

    def loaded_copies(self, setting: Setting) -> Sides:
        """Steps after `load_state_dict` do not write to what was given to it."""
        saved = Run(setting, self.make).steps(0, setting.taken + 1).saved()
        run = Run(setting, self.make)
        state = run.load(saved)[1]["state"]
        before = copy.deepcopy(state)
        run.steps(setting.taken + 1, setting.taken + AFTER)
        for key, entry in before.items():
            parts = entry if isinstance(entry, dict) else {}
            names = [n for n in parts if not _same(state[key].get(n), parts[n])]
            if names or not _same(state[key], entry):
                what = f"{names[0]!r} of " if names else ""
                raise Apart(f"a step writes to {what}state {key} of the file", "a copy of it")
        return holds()

    def equal_groups(self, setting: Setting) -> Sides:
        """A parameter in a group of its own with the same options takes the same steps."""
        one, two = Run(setting, self.make), Run(setting, self.make)
        regrouped(two)
        last = setting.taken + AFTER
        return alike(two.steps(0, last).flat(), one.steps(0, last).flat())

    def zero_gradients(self, setting: Setting) -> Sides:
        """The first step along gradients of zero moves nothing, without weight decay."""
        run = Run(setting, self.make, decays=False)
        before = run.flat()
        run.step(0, lambda of: [p.grad.zero_() for p in of.given if p.grad is not None])
        return alike(run.flat(), before)


def largest_tau(optimizer: Any) -> float | None:
    """``tau`` of a ConjSGD's trust region, None without one."""
    if not isinstance(optimizer, ConjSGD):
        return None
    tau = getattr(optimizer._rule, "tau", None)
    return None if tau is None else float(tau)


def _poison(value: float) -> Callable[[Run], None]:
    """What puts a number into a gradient."""

    def change(run: Run) -> None:
        last = [p for p in run.given if p.grad is not None][-1]
        assert last.grad is not None
        last.grad.view(-1)[0] = value

    return change


def _same(a: Any, b: Any) -> bool:
    """Whether all numbers are equal."""
    one, other = (torch.cat([torch.zeros(0).double(), *numbers(part)]) for part in (a, b))
    return torch.equal(one, other)


def _within(
    bound: LedgerBound, values: list[float], shares: list[float], ledger: ConvergenceLedger
) -> Sides:
    """That squares or slopes are within a bound that is an equation for their weighted mean.

    Args:
        bound: of a ledger whose floor is the last risk.
        values: squares or slopes, by the run itself.
        shares: of the left side of the identity, of each step.
        ledger: that the bound is of.
    """
    nothing = torch.zeros(1)
    if not bound.applies or min(shares) <= 0 or min(values) <= 0:
        return nothing, nothing, nothing, "<="
    count, mean = len(values), math.fsum(values) / len(values)
    mass = math.fsum(s / q for s, q in zip(shares, values, strict=True))
    weighted = math.fsum(shares) / mass
    risk = max(max(step.risk, step.risk_after) for step in ledger.steps)
    unsure = SLACK + 1e-12 * (1 + risk) * count / min(shares)  # of what the rounding of risks is
    pairs = [
        (weighted, bound.weighted_bound),
        (bound.weighted_bound, weighted),
        (mean, bound.mean_bound),
    ]
    if not math.isnan(bound.constant_bound):
        pairs.append((mean, bound.constant_bound))
    left, right = torch.tensor(pairs, dtype=torch.float64).T
    return left, right, unsure * right.abs(), "<="
