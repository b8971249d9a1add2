"""What of a status or a record a logger of scalars can hold."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from conjopt.optim import ConjSGD, Status

__all__ = ["conj_sgd", "scalars"]

PREFIX = "conjopt/"  # of what comes from a status, in every logger


def scalars(values: Status | Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a status or a record, by names that loggers accept.

    Of a status, what was not measured is left out, and so are infinite limits. Limits are
    ``conjopt/limits/edge`` and so on; conditions 1 where they hold and 0 where they fail. The step
    is an axis and no value.

    Args:
        values: `ConjSGD.status`, or a record as `History` holds it.

    Example:
        >>> scalars({"step": 3, "loss": 0.5, "rule": "edge", "accuracy": None})
        {'loss': 0.5}
        >>> from torch import nn
        >>> model = nn.Linear(2, 1)
        >>> scalars(ConjSGD(model.parameters(), model=model, loss=nn.MSELoss()).status())
        {'conjopt/step_size': 0.0, 'conjopt/brake': 1.0, 'conjopt/skipped_steps': 0.0}
    """
    pairs = _of_status(values) if isinstance(values, Status) else values.items()
    found = {}
    for name, value in pairs:
        if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
            value = value.item()
        if name != "step" and isinstance(value, int | float) and math.isfinite(value):
            found[name] = float(value)
    return found


def conj_sgd(optimizers: Iterable[Any], caller: str) -> dict[str, ConjSGD]:
    """Each ConjSGD among optimizers and their wrappers, by the prefix of its scalars.

    Args:
        optimizers: those of a trainer, in Accelerate's or Lightning's wrapper or bare.
        caller: of whom an error speaks.

    Raises:
        ValueError: if there is none.

    Example:
        >>> from torch import nn
        >>> model = nn.Linear(2, 1)
        >>> list(conj_sgd([ConjSGD(model.parameters(), model=model, loss=nn.MSELoss())], "logger"))
        ['conjopt/']
    """
    given = list(optimizers)
    # Lightning's wrapper claims the class of what it wraps, so the inside is looked at first.
    bare = [_unwrapped(optimizer) for optimizer in given]
    found = [optimizer for optimizer in bare if isinstance(optimizer, ConjSGD)]
    if not found:
        kinds = ", ".join(type(optimizer).__name__ for optimizer in bare) or "no optimizer"
        raise ValueError(
            f"{caller}: got {kinds}, expected a conjopt.ConjSGD, whose status it logs; train with "
            "one, or leave the callback out"
        )
    if len(found) == 1:
        return {PREFIX: found[0]}
    return {f"{PREFIX}{number}/": optimizer for number, optimizer in enumerate(found)}


def _unwrapped(optimizer: Any) -> Any:
    while (inside := getattr(optimizer, "optimizer", None)) is not None:
        optimizer = inside
    return optimizer


def _of_status(status: Status) -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(status):
        if field.name not in ("step", "limits", "conditions"):
            yield PREFIX + field.name, getattr(status, field.name)
    for name, limit in status.limits.items():
        yield f"{PREFIX}limits/{_plain(name)}", limit
    for condition in status.conditions:
        if condition.state != "unknown":
            yield f"{PREFIX}conditions/{condition.name}", condition.state == "holds"


def _plain(name: str) -> str:
    """A name without what loggers replace: "Polyak cap" and "1/(2L)"."""
    return re.sub(r"\W+", "_", name).strip("_")
