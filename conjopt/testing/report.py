"""What a check found, and the error that it raises."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import hypothesis
from hypothesis import strategies as st
from torch import Tensor

__all__ = [
    "Report",
    "Statement",
    "UnfitExample",
    "Violation",
    "ViolationError",
    "refuse_counts",
    "run",
]

# To explain a counterexample takes hypothesis longer than to find and to shrink it.
PHASES = (hypothesis.Phase.generate, hypothesis.Phase.shrink)


@dataclasses.dataclass(frozen=True)
class Violation:
    """A statement that an example contradicts.

    Attributes:
        statement: what does not hold.
        left: one side of it, in words and numbers.
        right: the other.
        example: the smallest counterexample found, by name.

    Example:
        >>> print(Violation("Fenchel-Young", "loss = -1", "0", {"f": [0.0]}))
        Fenchel-Young: loss = -1, expected 0; for f=[0.0]
    """

    statement: str
    left: str
    right: str
    example: Mapping[str, Any]

    def __str__(self) -> str:
        named = ", ".join(f"{name}={value}" for name, value in self.example.items())
        where = f"; for {named}" if named else ", where examples are made"
        return f"{self.statement}: {self.left}, expected {self.right}{where}"


@dataclasses.dataclass(frozen=True)
class Report:
    """What a check looked at; it holds.

    Attributes:
        subject: what was checked.
        statements: that hold on all examples.
        left_out: by statement, why it was not checked.

    Example:
        >>> print(Report("Softmax()", ("link",), {}))
        Softmax(): 1 statement holds: link
    """

    subject: str
    statements: tuple[str, ...]
    left_out: Mapping[str, str]

    def __str__(self) -> str:
        n = len(self.statements)
        lines = [f"{self.subject}: {n} statement{'s hold' if n != 1 else ' holds'}: "]
        lines[0] += ", ".join(self.statements)
        lines += [f"not checked: {name}, {why}" for name, why in self.left_out.items()]
        return "\n".join(lines)


class ViolationError(AssertionError):
    """Some statements do not hold.

    Attributes:
        violations: all of them.

    Example:
        >>> raise ViolationError("Mine()", [Violation("link", "1", "2", {"f": [0.0]})])
        Traceback (most recent call last):
            ...
        conjopt.testing.report.ViolationError: Mine() violates 1 of what was checked:
        - link: 1, expected 2; for f=[0.0]
    """

    def __init__(self, subject: str, violations: Sequence[Violation]) -> None:
        self.violations = tuple(violations)
        lines = [f"{subject} violates {len(self.violations)} of what was checked:"]
        super().__init__("\n".join([*lines, *(f"- {violation}" for violation in violations)]))


@dataclasses.dataclass(frozen=True)
class Statement:
    """A statement as a function of an example.

    Attributes:
        name: with the number of the theory.
        sides: from an example, ``(left, right, tolerance, relation)`` with ``relation`` "=",
            "<=" or ">="; all tensors of one shape. What was found is on the left.
        where: from the number of an element and an example, what the element belongs to.

    Example:
        >>> import torch
        >>> positive = Statement("positive", lambda x: (x, x * 0 + 1, 0 * x, ">="))
        >>> positive.violated(torch.tensor([2.0])) is None
        True
        >>> positive.violated(torch.tensor([2.0, -3.0]))
        ('-3', 'at least 1')
    """

    name: str
    sides: Callable[..., tuple[Tensor, Tensor, Tensor, str]]
    where: Callable[..., str] | None = None

    def violated(self, *example: Any) -> tuple[str, str] | None:
        """Both sides where they are furthest apart, None if the statement holds.

        Args:
            example: what ``sides`` takes.
        """
        left, right, tolerance, relation = self.sides(*example)
        apart = left - right
        if relation != "<=":
            apart = apart.abs() if relation == "=" else -apart
        excess = apart - tolerance
        bad = ~(excess <= 0)  # NaN is a violation
        if not bad.any():
            return None
        place = int(excess.nan_to_num(float("inf")).argmax())
        sign = {"=": "", "<=": "at most ", ">=": "at least "}[relation]
        of = "" if self.where is None else f" ({self.where(place, *example)})"
        a, b = (f"{float(side.flatten()[place]):.6g}" for side in (left, right))
        if a == b:  # what is apart by rounding
            a, b = (f"{float(side.flatten()[place]):.17g}" for side in (left, right))
        return f"{a}{of}", f"{sign}{b}"


class UnfitExample(ValueError):
    """A strategy of the user's draws what a check cannot take: no statement is at fault.

    Example:
        >>> raise UnfitExample("check_potential: targets= drew (2, 4), expected (2, 3)")
        Traceback (most recent call last):
            ...
        conjopt.testing.report.UnfitExample: check_potential: targets= drew (2, 4), expected (2, 3)
    """


def refuse_counts(caller: str, **counts: Any) -> None:
    """Refuse counts that are no positive integers.

    Args:
        caller: named in the error.
        counts: by name.

    Raises:
        TypeError: for what is no integer.
        ValueError: for one below 1.

    Example:
        >>> refuse_counts("check_model", rows=0)
        Traceback (most recent call last):
            ...
        ValueError: check_model: got rows=0, expected at least 1
    """
    for name, count in counts.items():
        if not isinstance(count, int) or isinstance(count, bool):
            raise TypeError(f"{caller}: got {name}={count!r}, expected an integer of at least 1")
        if count < 1:
            raise ValueError(f"{caller}: got {name}={count}, expected at least 1")


def run(
    subject: str,
    statements: Sequence[Statement],
    examples: st.SearchStrategy[tuple[Any, ...]],
    names: Sequence[str],
    *,
    max_examples: int,
    left_out: Mapping[str, str],
    given: Sequence[tuple[Any, ...]] = (),
    describe: Callable[..., Mapping[str, Any]] | None = None,
) -> Report:
    """Check every statement by itself on drawn examples.

    Args:
        subject: what is checked, for the report.
        statements: to look at.
        examples: a strategy of what they take.
        names: of its parts.
        max_examples: for each statement.
        left_out: by statement, why it is not checked.
        given: examples, the smallest first. Every statement is checked on the last one before
            any is drawn; if it does not hold there, the first one that it does not hold on is told.
        describe: from an example, what a violation tells of it; its parts by their names if None.

    Returns:
        the report, if all of them hold.

    Raises:
        ViolationError: with all that do not.
    """
    if describe is None:

        def describe(*example: Any) -> Mapping[str, Any]:
            return {name: part.tolist() for name, part in zip(names, example, strict=True)}

    found = []
    for statement in statements:
        smallest = None
        if given and _violation(statement, given[-1], describe) is not None:
            tried = (_violation(statement, example, describe) for example in given)
            smallest = next(violation for violation in tried if violation is not None)
        found.append(smallest or _smallest(statement, examples, describe, max_examples))
    violations = [violation for violation in found if violation is not None]
    if violations:
        raise ViolationError(subject, violations)
    return Report(subject, tuple(s.name for s in statements), left_out)


def _violation(
    statement: Statement, example: tuple[Any, ...], describe: Callable[..., Mapping[str, Any]]
) -> Violation | None:
    try:
        sides = statement.violated(*example)
    except Exception as error:
        sides = f"{type(error).__name__}: {error}", "no error"
    return None if sides is None else Violation(statement.name, *sides, describe(*example))


def _smallest(
    statement: Statement,
    examples: st.SearchStrategy[tuple[Any, ...]],
    describe: Callable[..., Mapping[str, Any]],
    max_examples: int,
) -> Violation | None:
    """The smallest counterexample found, None if there is none."""
    found: list[Violation] = []

    @hypothesis.settings(
        max_examples=max_examples,
        database=None,
        deadline=None,
        derandomize=True,
        phases=PHASES,
        suppress_health_check=[hypothesis.HealthCheck.too_slow],  # a model may be
    )
    @hypothesis.given(examples)
    def holds(example: tuple[Any, ...]) -> None:
        violation = _violation(statement, example, describe)
        if violation is not None:
            found.append(violation)
            raise AssertionError(statement.name)

    try:
        holds()
    except UnfitExample:
        raise
    except Exception as error:
        if found:
            return found[-1]  # hypothesis runs the smallest last
        return Violation(statement.name, f"{type(error).__name__}: {error}", "no error", {})
    return None
