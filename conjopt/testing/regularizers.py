"""What a term that is added to a loss keeps: docs/regularizers.md."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Collection
from typing import Any

from torch import nn

from conjopt.potentials import Poisson, Potential, Softmax, Squared
from conjopt.regularizers import ConditionalEntropy, PredictiveEntropy, Regularizer
from conjopt.testing.regularizer_batches import NAMES, batches, one_of_each
from conjopt.testing.regularizer_calls import call_once
from conjopt.testing.regularizer_statements import OnTerms, Traits
from conjopt.testing.report import Report, Statement, Violation, ViolationError
from conjopt.testing.searching import at_least, smallest

__all__ = ["check_regularizer"]

USE = "check_regularizer(term), term(outputs, targets) returning a scalar tensor"
UNSET: Any = inspect.Parameter.empty


def check_regularizer(
    term: nn.Module,
    *,
    potential: Potential | None = None,
    k: int | None = None,
    shift: str | None = UNSET,
    symmetric: bool = UNSET,
    mean: bool = UNSET,
    sign: int | None = UNSET,
    soft_targets: bool = UNSET,
    ignore_index: int | None = UNSET,
    empty: bool = UNSET,
    leave_out: Collection[str] = (),
    max_examples: int = 20,
) -> Report:
    """Check that a term of the loss has the invariances, values and gradients that it should.

    In float64, on batches of random outputs and on degenerate ones (one sample, one class, equal
    outputs, equal classes, outputs of 1e6, 1e-6 and 0): the value is a finite scalar and so is its
    gradient, which is its derivative (by differences); the order of samples does not matter; equal
    calls are equal, and change neither the batch nor, in evaluation mode, the term; a run that goes
    on from ``state_dict`` equals the unbroken one; and what the term has of the following.

    The term is copied for every look, its queue emptied, and left as it is.

    Args:
        term: a module that is called as ``term(outputs, targets)``, one of this package or yours.
        potential: says what targets are; None for that of a `Regularizer`, and `Softmax()` for
            others, whose targets are class indices.
        k: number of outputs; None for 2 to 4.
        shift: what may be added to outputs without changing the value: "each" for a number to all
            outputs of each sample, "all" for one number to all outputs of all samples, None for
            nothing. By default what the term of this package promises, and None for yours.
        symmetric: whether classes may change their places, in outputs and targets; by default True
            unless a criterion weighs classes.
        mean: whether a batch twice over has the value of the batch, as a mean has and a sum has
            not; by default True for terms of this package but `ConditionalEntropy`, whose samples
            are compared with the others, and False for yours.
        sign: 1 for a value that is never negative, -1 for one that is never positive, None for
            neither; by default what the term of this package promises, and None for yours.
        soft_targets: whether targets may be probabilities, which are to agree with class indices at
            the vertices; by default True for terms of this package, and False for yours.
        ignore_index: class index of samples that do not count; by default that of a `Regularizer`,
            and None for yours.
        empty: whether a batch without samples has the value 0; by default True for terms of this
            package, and False for yours.
        leave_out: names of further statements not to look at.
        max_examples: drawn for each statement.

    Returns:
        a report of the statements that hold, with those that do not apply and why.

    Raises:
        TypeError: if the term is no module, cannot be called with outputs and targets, or returns
            no tensor; and for switches of another type.
        RuntimeError: if a plain call of it, or the backward pass, raises.
        ValueError: if its value is not of shape (); if a part is random or couples samples by
            itself, such as dropout or batch norm in training mode; for switches out of range and
            names of no statement.
        ViolationError: listing every statement that does not hold, with both sides and the smallest
            counterexample found.

    Reference:
        docs/regularizers.md.

    Example:
        >>> from conjopt.regularizers import OutputCodingRate
        >>> report = check_regularizer(OutputCodingRate(), max_examples=5)
        >>> "the order of samples does not matter" in report.statements, dict(report.left_out)
        (True, {})
    """
    _refuse(term)
    at_least("check_regularizer", "max_examples", max_examples, 1)
    if k is not None:
        at_least("check_regularizer", "k", k, 2, "outputs")
    ours = term if isinstance(term, Regularizer) else None
    named_targets = ours is not None or potential is not None
    if potential is None:
        potential = Softmax() if ours is None else ours.potential
    if not isinstance(potential, Potential):
        raise TypeError(
            f"check_regularizer: got a {type(potential).__name__} as potential=, expected a "
            "conjopt.potentials.Potential"
        )
    traits = Traits(
        shift=_shift(ours, potential) if shift is UNSET else shift,
        symmetric=_symmetric(ours) if symmetric is UNSET else symmetric,
        mean=_mean(ours) if mean is UNSET else mean,
        sign=_sign(ours, potential) if sign is UNSET else sign,
        soft_targets=ours is not None if soft_targets is UNSET else soft_targets,
        ignore_index=_ignore_index(ours) if ignore_index is UNSET else ignore_index,
        empty=ours is not None if empty is UNSET else empty,
    )
    if traits.shift not in ("each", "all", None):
        raise ValueError(
            f"check_regularizer: shift={traits.shift!r}, expected 'each', 'all' or None"
        )
    if traits.sign not in (1, -1, None):
        raise ValueError(f"check_regularizer: sign={traits.sign!r}, expected 1, -1 or None")
    on_terms = OnTerms(term, potential, traits)
    named, left_out = on_terms.all()
    every = {*named, *left_out}
    if isinstance(leave_out, str) or not set(leave_out) <= every:
        raise ValueError(
            f"check_regularizer: leave_out={leave_out!r}, expected a collection of names out of "
            f"{sorted(every)}"
        )
    for name in leave_out:
        if named.pop(name, None) is not None:
            left_out[name] = "as you said"
    call_once(on_terms, range(2, 5) if k is None else [k], named_targets)
    violations: list[Violation] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, (sides, kinds) in named.items():
            found = smallest(
                Statement(name, sides),
                batches(kinds, k),
                NAMES,
                max_examples,
                one_of_each(kinds, k),  # a few that are drawn miss a kind
            )
            if found is not None:
                violations.append(found)
    subject = type(term).__name__
    if violations:
        raise ViolationError(subject, violations)
    return Report(subject, tuple(named), left_out)


def _refuse(term: Any) -> None:
    if not isinstance(term, nn.Module):
        what = getattr(term, "__name__", f"a {type(term).__name__}")
        raise TypeError(
            f"check_regularizer: got {what}, expected a torch.nn.Module: {USE}; put a function "
            "into the forward of one"
        )
    for name, part in term.named_modules():
        random = isinstance(part, nn.modules.dropout._DropoutNd)
        coupling = isinstance(part, nn.modules.batchnorm._BatchNorm)
        if part.training and (random or coupling):
            does = "draws random numbers" if random else "keeps statistics of the batch"
            raise ValueError(
                f"check_regularizer: {name or 'the term'} is a {type(part).__name__} in training "
                f"mode, which {does}, so that equal calls differ: call .eval() on it first"
            )


# What the terms of this package promise.


def _shift(ours: Regularizer | None, potential: Potential) -> str | None:
    if ours is None or not potential.on_simplex:
        return None
    return "all" if isinstance(ours, ConditionalEntropy) else "each"


def _symmetric(ours: Regularizer | None) -> bool:
    weights = (getattr(ours.criterion, n, None) for n in ("weight", "pos_weight")) if ours else ()
    return all(weight is None for weight in weights)


def _mean(ours: Regularizer | None) -> bool:
    return ours is not None and not isinstance(ours, ConditionalEntropy)


def _sign(ours: Regularizer | None, potential: Potential) -> int | None:
    if ours is None:
        return None
    # The entropy of predictions outside of the simplex and the cube may have any sign.
    if isinstance(ours, PredictiveEntropy) and isinstance(potential, Squared | Poisson):
        return None
    return ours._sign


def _ignore_index(ours: Regularizer | None) -> int | None:
    if ours is None or not ours.potential.on_simplex:
        return None
    return getattr(ours.criterion, "ignore_index", None)
