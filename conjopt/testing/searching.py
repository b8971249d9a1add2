"""The smallest counterexample to a statement."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import hypothesis
import torch
from hypothesis import strategies as st

from conjopt.testing.report import PHASES, Statement, Violation

__all__ = ["smallest"]


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
