"""The smallest counterexample to a statement."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import hypothesis
import torch
from hypothesis import strategies as st

from conjopt.testing.report import PHASES, Statement, Violation

__all__ = ["Apart", "at_least", "smallest"]


class Apart(AssertionError):
    """A statement that does not hold, with both sides in words.

    Args:
        left: what was found.
        right: what was expected.
    """

    def __init__(self, left: str, right: str) -> None:
        super().__init__(f"{left}, expected {right}")
        self.left, self.right = left, right


def at_least(check: str, name: str, value: Any, least: int, of: str = "") -> None:
    """Refuse an argument that is no whole number, or too small.

    Args:
        check: that it is an argument of.
        name: of the argument.
        value: that was given.
        least: that it may be.
        of: what it counts.

    Raises:
        TypeError: if it is no whole number.
        ValueError: if it is less.
    """
    expected = f"expected a whole number of at least {least}{of and f' {of}'}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{check}: {name}={value!r}, {expected}")
    if value < least:
        raise ValueError(f"{check}: {name}={value}, {expected}")


def smallest(
    statement: Statement,
    examples: st.SearchStrategy[tuple[Any, ...]],
    names: Sequence[str],
    max_examples: int,
    given: Sequence[tuple[Any, ...]] = (),
) -> Violation | None:
    """Look for an example that contradicts a statement, and for smaller ones; None without any.

    An error that the statement raises is a contradiction, too.

    Args:
        statement: of examples.
        examples: a strategy of numbers and names.
        names: of the parts of an example.
        max_examples: to draw.
        given: examples that are looked at where none that was drawn contradicts.
    """
    broken: list[tuple[Any, ...]] = []

    def sides(parts: tuple[Any, ...]) -> tuple[str, str] | None:
        torch.manual_seed(0)
        try:
            return statement.violated(*parts)
        except Apart as error:
            return error.left, error.right
        except Exception as error:
            return f"{type(error).__name__}: {error}", "no error"

    def contradicts(parts: tuple[Any, ...]) -> bool:
        found = sides(parts) is not None
        if found:
            broken.append(parts)
        return found

    options = hypothesis.settings(
        max_examples=max_examples, database=None, deadline=None, derandomize=True, phases=PHASES
    )
    with torch.random.fork_rng(devices=[]):
        try:
            parts = hypothesis.find(examples, contradicts, settings=options)
        except hypothesis.errors.NoSuchExample:
            parts = next((parts for parts in given if contradicts(parts)), ())
            if not parts:
                return None
        except hypothesis.errors.Flaky:
            parts = broken[-1]
        found = sides(parts)
    if found is None:
        found = "not the same at a second look", "the same"
    return Violation(statement.name, *found, dict(zip(names, parts, strict=True)))
