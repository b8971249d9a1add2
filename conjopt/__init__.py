"""An SGD wrapper for PyTorch that sets its own step size by conjugate learning theory."""

from __future__ import annotations

import importlib as _importlib
from importlib.metadata import version as _version
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from conjopt import bounds, entropy, losses, measure, optim, potentials
from conjopt.optim import AdaptiveBatchSampler, ConjSGD

if _TYPE_CHECKING:
    from conjopt import regularizers, report
    from conjopt.diagnosis import Diagnosis, diagnose

__all__ = [
    "AdaptiveBatchSampler",
    "ConjSGD",
    "Diagnosis",
    "bounds",
    "diagnose",
    "entropy",
    "losses",
    "measure",
    "optim",
    "potentials",
    "regularizers",
    "report",
]

__version__ = _version("conjopt")


def __getattr__(name: str) -> _Any:
    """Import what training does not need when it is first asked for."""
    if name in ("Diagnosis", "diagnose"):
        from conjopt import diagnosis

        return getattr(diagnosis, name)
    if name in ("regularizers", "report"):
        return _importlib.import_module(f"conjopt.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Name what is imported late, too."""
    return sorted({*globals(), *__all__})
