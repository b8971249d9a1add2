"""Property tests of what conjopt promises, on its objects and on your own.

Needs hypothesis: ``pip install "conjopt[testing]"``. A check draws examples, looks at every
statement of docs/theory.md that it names, and raises one error that lists all that are violated,
each with both sides and the smallest counterexample found.
"""

from __future__ import annotations

try:
    import hypothesis as _hypothesis  # noqa: F401
except ImportError as error:  # pragma: no cover
    raise ImportError(
        'conjopt.testing draws its examples by hypothesis: pip install "conjopt[testing]"'
    ) from error

from conjopt.testing.models import check_model
from conjopt.testing.networks import Network, networks
from conjopt.testing.optimizers import OptimizerReport, check_optimizer
from conjopt.testing.potentials import check_potential
from conjopt.testing.regularizers import check_regularizer
from conjopt.testing.report import Report, Statement, Violation, ViolationError
from conjopt.testing.strategies import (
    Batch,
    DiscreteLaw,
    batches,
    discrete_laws,
    losses,
    outputs,
    potentials,
    targets,
)

__all__ = [
    "Batch",
    "DiscreteLaw",
    "Network",
    "OptimizerReport",
    "Report",
    "Statement",
    "Violation",
    "ViolationError",
    "batches",
    "check_model",
    "check_optimizer",
    "check_potential",
    "check_regularizer",
    "discrete_laws",
    "losses",
    "networks",
    "outputs",
    "potentials",
    "targets",
]
