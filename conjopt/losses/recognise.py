"""Recognising a criterion of torch's or of this package."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from conjopt.losses.fenchel_young import FenchelYoungLoss
from conjopt.losses.reading import (
    BinaryCrossEntropy,
    ClassTargets,
    MeanSquaredError,
    PoissonNegativeLogLikelihood,
    PotentialOf,
    of_fenchel_young,
)
from conjopt.potentials import Logistic, Poisson, Softmax, Squared

__all__ = ["potential_of"]


def potential_of(criterion: nn.Module) -> PotentialOf:
    """Recognise a criterion as weighted Fenchel-Young losses of one potential.

    Args:
        criterion: `torch.nn.CrossEntropyLoss`, `MSELoss`, `BCEWithLogitsLoss`, `PoissonNLLLoss`
            of logarithms of rates, a `FenchelYoungLoss`, or a subclass of one of these that does
            not override `forward`.

    Returns:
        The potential with scale, offset, rows, weights and points of a batch.

    Raises:
        TypeError: For a criterion that is not recognised.
        ValueError: For `reduction="none"`, negative class or element weights, and a
            `PoissonNLLLoss` with `log_input=False`.

    Reference:
        docs/theory.md, section 0: autograd's output gradient is `scale * weights_r * e_r`.

    Example:
        >>> import torch
        >>> from conjopt.losses import potential_of
        >>> view = potential_of(torch.nn.CrossEntropyLoss(label_smoothing=0.1))
        >>> outputs, targets = torch.zeros(3, 2), torch.tensor([0, 1, -100])
        >>> view.potential, view.weights(outputs, targets)
        (Softmax(), tensor([0.5000, 0.5000, 0.0000]))
        >>> view.scale(outputs, targets), view.offset(outputs, targets)
        (tensor(1.), tensor(0.1985))
    """
    forward = getattr(getattr(criterion, "forward", None), "__func__", None)  # as patched, if it is
    kind = next((k for k in _RECOGNISED if isinstance(criterion, k) and forward is k.forward), None)
    if kind is None and hasattr(criterion, "_orig_mod"):
        raise TypeError(
            f"The criterion {criterion!r} is the wrapper of torch.compile, through which nothing "
            "can be read: use the loss itself, and compile the model."
        )
    if kind is None:
        raise TypeError(
            f"The criterion {criterion!r} is not recognised: expected an instance of "
            f"{', '.join(k.__name__ for k in _RECOGNISED)} that does not override forward. Use one "
            "of these for its part of the loss, and add other terms to its value; a loss of "
            "another kind has no known units, so train it with `torch.optim`."
        )
    if criterion.reduction == "none":
        raise ValueError(
            f"The criterion {criterion!r} has reduction='none', so how its terms are weighed is "
            "not known: use reduction='mean' or 'sum'."
        )
    if kind is nn.PoissonNLLLoss and not criterion.log_input:
        raise ValueError(
            f"The criterion {criterion!r} reads its input as rates, which are no natural "
            "parameters: let the model return their logarithms, and use log_input=True."
        )
    for name in ("weight", "pos_weight"):
        weight = getattr(criterion, name, None)
        if weight is not None and bool((weight < 0).any()):
            raise ValueError(
                f"The criterion's {name} has negative entries: its loss is no weighted mean. Use "
                "weights that are at least 0."
            )
    return _RECOGNISED[kind](criterion)


_RECOGNISED: dict[type[nn.Module], Callable[[Any], PotentialOf]] = {
    nn.CrossEntropyLoss: lambda criterion: ClassTargets(Softmax(), criterion),
    nn.MSELoss: lambda criterion: MeanSquaredError(Squared(), criterion),
    nn.BCEWithLogitsLoss: lambda criterion: BinaryCrossEntropy(Logistic(), criterion),
    nn.PoissonNLLLoss: lambda criterion: PoissonNegativeLogLikelihood(Poisson(), criterion),
    FenchelYoungLoss: of_fenchel_young,
}
