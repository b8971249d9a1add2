"""What a loop takes for granted of every torch optimizer, as statements on small runs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from conjopt.testing.optimizer_runs import MakeOptimizer, Run, Setting, state_of
from conjopt.testing.searching import Apart

__all__ = ["AFTER", "Contract", "Sides", "alike", "both", "comparable", "holds", "regrouped"]

Sides = tuple[Tensor, Tensor, Tensor, str]
AFTER = 3  # steps after what is looked at


def alike(a: Tensor, b: Tensor) -> Sides:
    """That two vectors are equal bit for bit; NaN is equal to nothing."""
    if a.shape != b.shape:
        raise Apart(f"{a.numel()} numbers", f"{b.numel()} numbers")
    comparable(a, b)
    return a, b, torch.zeros_like(b), "="


def comparable(a: Tensor, b: Tensor) -> None:
    """Raise where the expected side is NaN or infinite, to which nothing is equal."""
    bad = ~b.isfinite()
    if bad.any():
        pair = f"{float(a[bad][0])} against {float(b[bad][0])}"
        raise Apart(pair, "finite numbers to compare")


def both(*all_sides: Sides) -> Sides:
    """Several statements of the same relation as one."""
    left, right, tolerance, relations = zip(*all_sides, strict=True)
    return torch.cat(left), torch.cat(right), torch.cat(tolerance), relations[0]


def holds() -> Sides:
    """What has been looked at, and is so."""
    nothing = torch.zeros(1)
    return nothing, nothing, nothing, "="


class Contract:
    """The statements on one optimizer, each from a setting.

    Args:
        make_optimizer: of a model and a loss.
    """

    def __init__(self, make_optimizer: MakeOptimizer) -> None:
        self.make = make_optimizer

    def all(self) -> dict[str, Callable[[Setting], Sides]]:
        """By name, what every optimizer is to keep."""
        return {
            "equal runs are equal": self.deterministic,
            "parameters and state stay finite": self.finite,
            "the first step is downhill": self.downhill,
            "exact resume from a file": self.resumed,
            "a copy goes on as the original": self.copied,
            "two optimizers share no state": self.separate,
            "parameters without a gradient stay": self.without_gradient,
            "a step without gradients changes nothing": self.nothing_to_do,
            "gradients are as they were after a step": self.gradients_kept,
            "zero_grad forgets the gradients": self.zero_grad,
            "a closure is called and is the same loop": self.closure,
            "an error in the closure leaves no trace": self.closure_error,
            "a group at rate 0 stands still": self.rate_zero,
            "half the rate is half the first step, by a scheduler": self.scheduled,
            "a group that is added takes part": self.added_group,
            "maximize is the step of the negative gradient": self.maximize,
        }

    def run(self, setting: Setting, **options: Any) -> Run:
        """A run from its start."""
        return Run(setting, self.make, **options)

    def deterministic(self, setting: Setting) -> Sides:
        """Two runs with other random numbers around them end at the same parameters."""
        runs = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            runs.append(self.run(setting).steps(0, setting.taken + AFTER))
        return alike(runs[0].flat(), runs[1].flat())

    def finite(self, setting: Setting) -> Sides:
        """After some steps no parameter and no tensor of the state is NaN or infinite."""
        run = self.run(setting).steps(0, setting.taken + AFTER)
        state = [
            (f"state[{name!r}]", value)
            for p in run.given
            for name, value in run.optimizer.state.get(p, {}).items()
            if isinstance(value, Tensor)
        ]
        for what, value in [("a parameter", run.flat()), *state]:
            bad = value.detach().flatten()
            bad = bad[~bad.isfinite()]
            if len(bad):
                raise Apart(f"{what} has {float(bad[0])}", "finite numbers")
        return holds()

    def downhill(self, setting: Setting) -> Sides:
        """``<g, theta - theta+> >= 0`` for the first step, without weight decay."""
        run = self.run(setting, decays=False)
        before, gradient = run.flat(), run.gradient(0)
        run.step(0)
        moved = before - run.flat()
        if run.optimizer.param_groups[0].get("maximize"):
            moved = -moved
        size = 1e-12 * (gradient.norm() * (moved.norm() + before.norm()))
        return (gradient @ moved)[None], torch.zeros(1), size[None], ">="

    def resumed(self, setting: Setting) -> Sides:
        """A run that goes on from a file, in an optimizer that was used, is the unbroken one.

        Bit for bit, through `torch.save` and ``torch.load(weights_only=True)``.
        """
        whole = self.run(setting).steps(0, setting.taken)
        saved = whole.saved()
        whole.steps(setting.taken, setting.taken + AFTER)
        again = self.run(setting).steps(7, 9)  # what is there before is to be forgotten
        again.load(saved)
        again.steps(setting.taken, setting.taken + AFTER)
        return both(
            alike(again.flat(), whole.flat()),
            alike(state_of(again.optimizer), state_of(whole.optimizer)),
        )

    def copied(self, setting: Setting) -> Sides:
        """A deep copy takes the same steps, and its steps do not write to the original's state."""
        run = self.run(setting).steps(0, setting.taken)
        twin = run.copied()
        kept = state_of(run.optimizer)
        twin.steps(setting.taken, setting.taken + AFTER)
        untouched = alike(state_of(run.optimizer), kept)
        run.steps(setting.taken, setting.taken + AFTER)
        return both(alike(twin.flat(), run.flat()), untouched)

    def separate(self, setting: Setting) -> Sides:
        """A run is the same where another optimizer takes steps in between."""
        last = setting.taken + AFTER
        alone = self.run(setting).steps(0, last)
        one, other = self.run(setting), self.run(setting)
        for step in range(last):
            other.step(step + 1)
            one.step(step)
        return alike(one.flat(), alone.flat())

    def without_gradient(self, setting: Setting) -> Sides:
        """What has no gradient, or is in no group, is as it was after some steps."""
        run = self.run(setting).steps(0, setting.taken)
        left_out = run.given[0]
        before = left_out.detach().clone().flatten()

        def drop(of: Run) -> None:
            of.given[0].grad = None

        for step in range(setting.taken, setting.taken + AFTER):
            run.step(step, drop)
        outside = {id(p) for p in run.given}
        start = dict(setting.network().named_parameters())
        others = [
            alike(p.detach().flatten(), start[name].detach().flatten())
            for name, p in run.model.named_parameters()
            if id(p) not in outside
        ]
        return both(alike(left_out.detach().flatten(), before), *others)

    def nothing_to_do(self, setting: Setting) -> Sides:
        """Without any gradient a step leaves the parameters."""
        run = self.run(setting).steps(0, setting.taken)
        before = run.flat()
        run.optimizer.zero_grad()
        run.optimizer.step()
        return alike(run.flat(), before)

    def gradients_kept(self, setting: Setting) -> Sides:
        """A step does not write to ``.grad``."""
        run = self.run(setting).steps(0, setting.taken)
        run.backward(setting.taken)
        before = torch.cat([p.grad.flatten() for p in run.parameters if p.grad is not None])
        run.optimizer.step()
        after = torch.cat([p.grad.flatten() for p in run.parameters if p.grad is not None])
        return alike(after, before)

    def zero_grad(self, setting: Setting) -> Sides:
        """It leaves gradients of zero, or none, and the runs with both are one."""
        run, twin = self.run(setting), self.run(setting)
        twin.set_to_none = False
        run.steps(0, setting.taken)
        same = alike(twin.steps(0, setting.taken).flat(), run.flat())
        run.backward(setting.taken)
        run.optimizer.zero_grad(set_to_none=False)
        sizes = [p.grad.abs().sum() for p in run.given if p.grad is not None]
        left = torch.stack([torch.zeros(()).double(), *sizes])
        run.optimizer.zero_grad()
        still = sum(p.grad is not None for p in run.given)
        if still:
            raise Apart(f"{still} gradients are left", "None after zero_grad()")
        return both(alike(left, torch.zeros_like(left)), same)

    def closure(self, setting: Setting) -> Sides:
        """``step(closure)`` calls it once, with gradients, returns its loss, and is the loop.

        Optimizers whose step needs one may call it more often.
        """
        run, twin = self.run(setting), self.run(setting)
        step, losses = 0, []

        def closure() -> Any:
            if not torch.is_grad_enabled():
                raise Apart("the closure is called under no_grad", "gradients enabled in it")
            losses.append(run.backward(step).detach())
            return losses[-1]

        for step in range(setting.taken + 1):
            first = len(losses)
            returned = run.optimizer.step(closure)
            called = len(losses) - first
            if called == 0 or (called > 1 and not run.needs_closure):
                raise Apart(f"a step calls it {called} times", "once")
            if not (isinstance(returned, Tensor) and bool(returned == losses[first])):
                raise Apart(f"a step returns {returned!r}", f"the loss {losses[first]!r}")
            twin.step(step)
        return alike(run.flat(), twin.flat())

    def closure_error(self, setting: Setting) -> Sides:
        """Where a closure raises, the run goes on as if that step had not been tried."""
        run, twin = self.run(setting), self.run(setting)
        for one in (run, twin):
            one.steps(0, setting.taken)

        def closure() -> Any:
            run.backward(setting.taken)
            raise ZeroDivisionError

        try:
            run.optimizer.step(closure)
        except ZeroDivisionError:
            pass
        else:
            raise Apart("a step without an error", "the error that the closure raises")
        for one in (run, twin):
            one.steps(setting.taken, setting.taken + AFTER)
        return alike(run.flat(), twin.flat())

    def rate_zero(self, setting: Setting) -> Sides:
        """With ``lr`` of all groups, or of one of several, set to 0 their parameters stay."""
        run, other = self.run(setting), self.run(setting)
        before = run.flat()
        for group in run.optimizer.param_groups:
            group["lr"] = group["lr"] * 0.0
        run.steps(0, AFTER)
        if run.needs_closure:  # those of torch have one group
            return alike(run.flat(), before)
        alone = regrouped(other)
        kept = alone.detach().clone().flatten()
        group = other.optimizer.param_groups[-1]
        group["lr"] = group["lr"] * 0.0
        other.steps(0, AFTER)
        return both(alike(run.flat(), before), alike(alone.detach().flatten(), kept))

    def scheduled(self, setting: Setting) -> Sides:
        """A `LambdaLR` of a half halves the first step, without weight decay."""
        full, half = self.run(setting, decays=False), self.run(setting, decays=False)
        torch.optim.lr_scheduler.LambdaLR(half.optimizer, lambda _: 0.5)
        before = full.flat()
        moved = [run.steps(0, 1).flat() - before for run in (full, half)]
        size = 1e-6 * (moved[0].abs() + moved[0].abs().max()) + 1e-13 * before.abs().max()
        return 2 * moved[1], moved[0], size, "="

    def added_group(self, setting: Setting) -> Sides:
        """A parameter that `add_param_group` brings, and that has a gradient, moves."""
        run = self.run(setting)
        added = regrouped(run)
        before = added.detach().clone()
        run.step(0)
        moving = added.grad is not None and bool(added.grad.abs().sum() > 0)
        if moving and torch.equal(added, before):
            raise Apart("a parameter of it stays as it was", "a step, as it has a gradient")
        return holds()

    def maximize(self, setting: Setting) -> Sides:
        """With ``maximize`` the steps are those along negated gradients, bit for bit."""
        run, twin = self.run(setting), self.run(setting)
        for group in run.optimizer.param_groups:
            group["maximize"] = not group["maximize"]

        def negate(of: Run) -> None:
            for p in of.given:
                if p.grad is not None:
                    p.grad.neg_()

        for step in range(setting.taken + 1):
            run.step(step)
            twin.step(step, negate)
        return alike(run.flat(), twin.flat())


def regrouped(run: Run) -> Tensor:
    """Take the last parameter out of its group and add it as one of its own, alike."""
    group = run.optimizer.param_groups[-1]
    options = {k: copy.copy(v) for k, v in group.items() if k not in ("params", "param_names")}
    last: Tensor = group["params"].pop()
    named: Any = (group["param_names"].pop(), last) if "param_names" in group else last
    run.optimizer.add_param_group({"params": [named], **options})
    return last
