"""One plain call of a term, before statements on it are looked at."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable

import torch
from torch import Tensor

from conjopt.potentials import Potential
from conjopt.testing.regularizer_batches import KINDS, batch
from conjopt.testing.regularizer_statements import OnTerms

__all__ = ["call_once"]

USE = "a term is called as term(outputs, targets) and returns a scalar tensor"


def call_once(on_terms: OnTerms, widths: Iterable[int], named_targets: bool) -> None:
    """Call a copy on a random batch of each width, with a backward pass.

    What fails here would fail every statement.

    Args:
        on_terms: the statements on a term, of which a copy is called.
        widths: numbers of outputs.
        named_targets: whether the potential was said, and is not the default.

    Raises:
        TypeError: if it cannot be called with outputs and targets, or returns no tensor.
        RuntimeError: if it cannot be copied, or the call or the backward pass raises.
        ValueError: if its value is not of shape ().
    """
    term = on_terms.term
    try:
        inspect.signature(term.forward).bind(None, None)
    except TypeError as error:
        raise TypeError(
            f"check_regularizer: {type(term).__name__}.forward cannot be called with outputs and "
            f"targets ({error}): {USE}; take targets also where they are not used"
        ) from None
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        for k in widths:
            _call(on_terms, k, named_targets)


def _call(on_terms: OnTerms, k: int, named_targets: bool) -> None:
    term, potential = on_terms.term, on_terms.potential
    outputs, targets = batch(potential, KINDS[0], k + 2, k, 0)
    outputs.requires_grad_()
    sizes = f"outputs {tuple(outputs.shape)} and targets {tuple(targets.shape)}"
    what = "copy.deepcopy of it"
    try:
        twin = on_terms.fresh()
        what = f"a call with {sizes}, in torch.float64,"
        with torch.enable_grad():
            value = twin(outputs, targets)
            what = f"the backward pass after a call with {sizes}"
            if isinstance(value, Tensor) and value.shape == () and value.requires_grad:
                value.backward()
    except Exception as error:
        raise RuntimeError(
            f"check_regularizer: {type(term).__name__}: {what} raised {type(error).__name__}: "
            f"{error}; {USE}{_hint(potential, named_targets)}; for a number of outputs of its own "
            "say k="
        ) from error
    if not isinstance(value, Tensor):
        raise TypeError(
            f"check_regularizer: {type(term).__name__} returned a {type(value).__name__}, expected "
            "a scalar tensor of shape (); return a torch.Tensor that depends on the outputs, "
            "without .item() or float()"
        )
    if value.shape != ():
        raise ValueError(
            f"check_regularizer: {type(term).__name__} returned a tensor of shape "
            f"{tuple(value.shape)}, expected a scalar tensor of shape (); take the mean or the sum "
            f"of it{_hint(potential, named_targets)}"
        )


def _hint(potential: Potential, named_targets: bool) -> str:
    if not named_targets:
        return (
            "; targets are class indices unless potential= says otherwise, such as "
            "potential=Squared() for targets like the outputs"
        )
    return f"; targets are those of potential={potential!r}"
