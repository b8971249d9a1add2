"""Reading and checking losses, their range and a confidence."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from conjopt.entropy.reading import as_tensor

__all__ = ["Array", "check_range", "miss_probability", "read_losses"]

Array = NDArray[np.float64]
SHOWN = 10  # indices that an error lists


def miss_probability(name: str, confidence: float) -> float:
    """Return `d = 1 - confidence`, checked to be a probability of missing."""
    if not 0 < confidence < 1:
        raise ValueError(
            f"{name}: confidence={confidence}, expected a number between 0 and 1, such as 0.95; "
            "no finite sample makes a bound certain"
        )
    return 1 - float(confidence)


def check_range(name: str, min_loss: float, max_loss: float) -> None:
    """Refuse a range of losses that is empty or infinite."""
    if not (math.isfinite(min_loss) and math.isfinite(max_loss) and min_loss < max_loss):
        raise ValueError(
            f"{name}: min_loss={min_loss} and max_loss={max_loss}, expected finite numbers with "
            "min_loss < max_loss, known before the losses are: those of a loss that is clipped, "
            "or of logits that are"
        )


def read_losses(name: str, losses: Tensor | ArrayLike, min_loss: float, max_loss: float) -> Array:
    """Return losses `(n,)` in float64, all in the stated range, up to rounding in their own dtype.

    Args:
        name: Of the caller, for messages.
        losses: One for each sample.
        min_loss: `g0`.
        max_loss: `gamma`.

    Returns:
        The losses.

    Raises:
        ValueError: For losses that are not one row, not numbers, or out of range.
    """
    check_range(name, min_loss, max_loss)
    given = as_tensor(f"{name}: losses", losses)
    if given.ndim != 1 or len(given) == 0:
        raise ValueError(
            f"{name}: losses of shape {tuple(given.shape)}, expected (n,), one of each "
            "independent sample and at least one; average those of the tokens or pixels of a sample"
        )
    values: Array = given.double().numpy()
    missing = np.isnan(values)
    if missing.any():
        raise ValueError(
            f"{name}: {_which(missing)} are NaN: a sample whose loss is unknown must not be left "
            "out; find out why, or count it as max_loss"
        )
    # A loss clipped in float32 is at the float32 number nearest to the limit.
    top, bottom = _rounded(max_loss, given.dtype), _rounded(min_loss, given.dtype)
    above, below = values > max(max_loss, top), values < min(min_loss, bottom)
    if above.any():
        raise ValueError(
            f"{name}: {_which(above)} are above max_loss={max_loss}, the greatest is "
            f"{values.max():.6g}: state a maximum that no loss can exceed, or clip the losses "
            "(losses.clamp(max=max_loss)) and speak of the clipped risk; the maximum of this "
            "sample is no such number"
        )
    if below.any():
        raise ValueError(
            f"{name}: {_which(below)} are below min_loss={min_loss}, the least is "
            f"{values.min():.6g}: state a minimum that no loss can fall below"
        )
    return np.clip(values, min_loss, max_loss)


def _rounded(limit: float, dtype: torch.dtype) -> float:
    return float(torch.tensor(limit, dtype=dtype)) if dtype.is_floating_point else limit


def _which(bad: NDArray[Any]) -> str:
    found = np.flatnonzero(bad)
    listed = ", ".join(map(str, found[:SHOWN]))
    more = ", ..." if len(found) > SHOWN else ""
    return f"{len(found)} of {len(bad)} losses, at [{listed}{more}],"
