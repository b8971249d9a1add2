"""What an optimizer keeps: torch's contract, Thm 3.1 and 3.6, and what ConjSGD promises."""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch.optim import Optimizer

from conjopt.optim import ConjSGD
from conjopt.testing.optimizer_calls import stepped
from conjopt.testing.optimizer_contract import Contract, Sides
from conjopt.testing.optimizer_runs import (
    NAMES,
    MakeOptimizer,
    Setting,
    needs_closure,
    settings,
)
from conjopt.testing.optimizer_theory import Theory, largest_tau
from conjopt.testing.report import Report, Statement, Violation, ViolationError
from conjopt.testing.searching import at_least, smallest

__all__ = ["OptimizerReport", "check_optimizer"]

C1 = "C1 of Thm 3.1: a L / 2 is below 1"
REPORTED = "Thm 3.6: the reported trust region is tau sqrt(2 L / beta) / V"
TRUST = "Thm 3.6: no more than (1 + tau)^2 times the excess risk"
OF_ALL = (  # what the theory says of every optimizer
    "Thm 3.1: both sides of the ledger are equal",
    "Thm 3.1: the gradients are within its bound",
)
NEED_NO_CLOSURE = (
    "a step without gradients changes nothing",
    "gradients are as they were after a step",
    "a group that is added takes part",
    "groups of equal options are one group",
)


@dataclasses.dataclass(frozen=True)
class OptimizerReport(Report):
    """What `check_optimizer` looked at.

    Attributes:
        not_promised: statements that do not hold and that the optimizer does not promise, each with
            its smallest counterexample.

    Example:
        >>> print(OptimizerReport("SGD", ("equal runs are equal",), {}, ()))
        SGD: 1 statement holds: equal runs are equal
    """

    not_promised: tuple[Violation, ...] = ()

    def __str__(self) -> str:
        lines = [f"does not promise: {violation}" for violation in self.not_promised]
        return "\n".join([super().__str__(), *lines])


def check_optimizer(
    make_optimizer: MakeOptimizer,
    *,
    tau: float | None = None,
    strict: bool = False,
    promises: Collection[str] = (),
    leave_out: Collection[str] = (),
    max_examples: int = 10,
) -> OptimizerReport:
    """Check any torch optimizer on small problems, in float64.

    Every optimizer is to keep what a training loop takes for granted: equal runs are equal bit for
    bit, also one that is resumed from a file, into an optimizer that was used for something else,
    and that of a copy; parameters without a gradient stay; rates of groups, schedulers, closures
    and ``zero_grad`` act as torch says; gradients are not written to. And of every run both sides
    of Thm 3.1, kept by a `conjopt.bounds.ConvergenceLedger`, are equal, with gradients and risks of
    the run itself, and so is the bound over the last risk where C1 holds.

    `ConjSGD` promises more: a gradient that is not finite gives up the step and leaves no trace, a
    loaded state is not written to, groups of equal options are one group, gradients of zero move
    nothing (without weight decay), and where its step rule has a trust region the first step of a
    linear model multiplies the excess risk by at most ``(1 + tau)^2`` (Thm 3.6, exact if the odd
    and the even samples are alike, as they are here, and without weight decay). What of this
    another optimizer does not keep is in the report and raises nothing. The same is true of C1,
    which no optimizer promises.

    Args:
        make_optimizer: takes a model and a loss, and returns a new optimizer over the model's
            parameters, such as ``lambda model, loss: torch.optim.SGD(model.parameters(), lr=0.1)``.
            The models have one or two linear layers with biases, the losses are torch's
            cross-entropy, squared and logistic loss.
        tau: of Thm 3.6; None for that of a ConjSGD times its ``lr``, and 1 for others.
        strict: whether what is not promised raises, too.
        promises: names of further statements that yours promises.
        leave_out: names of statements not to look at.
        max_examples: drawn for each statement.

    Returns:
        a report of the statements that hold, and of those that do not and are not promised.

    Raises:
        TypeError: if ``make_optimizer`` cannot be called with a model and a loss, or returns no
            optimizer; and for arguments of another type.
        ValueError: for a name that is of no statement, numbers out of range, and an optimizer of
            other parameters, such as one that is returned again.
        RuntimeError: if one of its first steps raises.
        ViolationError: listing every promised statement that does not hold, with both sides and the
            smallest counterexample found.

    Reference:
        docs/theory.md, Thm 3.1 and 3.6.

    Example:
        >>> import torch
        >>> report = check_optimizer(
        ...     lambda model, loss: torch.optim.SGD(model.parameters(), lr=0.1), max_examples=5
        ... )
        >>> "exact resume from a file" in report.statements
        True
        >>> [violation.statement for violation in report.not_promised][-1]
        'Thm 3.6: no more than (1 + tau)^2 times the excess risk'
    """
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        return _checked(make_optimizer, tau, strict, promises, leave_out, max_examples)


def _checked(
    make_optimizer: MakeOptimizer,
    tau: float | None,
    strict: bool,
    promises: Collection[str],
    leave_out: Collection[str],
    max_examples: int,
) -> OptimizerReport:
    at_least("check_optimizer", "max_examples", max_examples, 1)
    _check_tau(tau)
    optimizer = stepped(make_optimizer)
    contract, theory = Contract(make_optimizer), Theory(make_optimizer, _tau(optimizer, tau))
    named = {**contract.all(), **theory.on_runs(), **theory.on_linear_models()}
    for argument, names in (("promises", promises), ("leave_out", leave_out)):
        if isinstance(names, str) or not set(names) <= set(named):
            raise ValueError(
                f"check_optimizer: {argument}={names!r}, expected a collection of names out of "
                f"{sorted(named)}"
            )
    promised = {*contract.all(), *OF_ALL, *promises}
    if isinstance(optimizer, ConjSGD):
        promised |= set(theory.on_runs()) - {C1} | {REPORTED}
        if largest_tau(optimizer) is not None:
            promised.add(TRUST)
    if strict:
        promised |= set(named)
    left_out = _left_out(optimizer) | dict.fromkeys(leave_out, "as you said")
    anywhere = settings()
    linear = settings(model="linear", scales=(1.0, 0.1, 10.0, 30.0))
    subject = type(optimizer).__name__
    hold: list[str] = []
    broken: list[Violation] = []
    not_promised: list[Violation] = []
    for name, sides in named.items():
        if name in left_out:
            continue
        examples = linear if name in theory.on_linear_models() else anywhere
        violation = smallest(Statement(name, _of_parts(sides)), examples, NAMES, max_examples)
        if violation is None:
            hold.append(name)
        else:
            (broken if name in promised else not_promised).append(violation)
    if broken:
        raise ViolationError(subject, broken)
    return OptimizerReport(subject, tuple(hold), left_out, tuple(not_promised))


def _check_tau(tau: Any) -> None:
    if tau is None:
        return
    if isinstance(tau, bool) or not isinstance(tau, int | float):
        raise TypeError(f"check_optimizer: tau={tau!r}, expected a number or None")
    if not 0 <= tau < math.inf:
        raise ValueError(f"check_optimizer: tau={tau}, expected a finite number of at least 0")


def _tau(optimizer: Optimizer, given: float | None) -> float:
    if given is not None:
        return given
    tau = largest_tau(optimizer)
    return 1.0 if tau is None else tau * max(float(g["lr"]) for g in optimizer.param_groups)


def _left_out(optimizer: Optimizer) -> dict[str, str]:
    """By statement, why it does not speak of an optimizer."""
    left_out = {}
    if not all("maximize" in group for group in optimizer.param_groups):
        left_out["maximize is the step of the negative gradient"] = "as its groups have no maximize"
    elif isinstance(optimizer, ConjSGD) and optimizer._rule.measures:
        left_out["maximize is the step of the negative gradient"] = "as a measured step refuses it"
    if not isinstance(optimizer, ConjSGD):
        left_out[REPORTED] = "as it reports none"
    elif largest_tau(optimizer) is None:
        left_out[REPORTED] = "as its step rule has none"
    elif optimizer._floor.value is not None:
        left_out[REPORTED] = "as it is over a data floor of your own"
    if needs_closure(optimizer):
        left_out |= dict.fromkeys(NEED_NO_CLOSURE, "as a step needs a closure")
    return left_out


def _of_parts(sides: Callable[[Setting], Sides]) -> Callable[..., Sides]:
    """A statement as one of the parts that were drawn."""

    @functools.wraps(sides)
    def of_parts(*parts: Any) -> Sides:
        return sides(Setting(*parts))

    return of_parts
