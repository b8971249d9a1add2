"""An SGD wrapper for PyTorch that sets its own step size by conjugate learning theory."""

from __future__ import annotations

from importlib.metadata import version as _version

from conjopt import bounds, entropy, losses, measure, optim, potentials, report
from conjopt.optim import ConjSGD

__all__ = ["ConjSGD", "bounds", "entropy", "losses", "measure", "optim", "potentials", "report"]

__version__ = _version("conjopt")
