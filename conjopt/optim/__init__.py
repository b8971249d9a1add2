"""The optimizer, and the directions and step rules that it is put together from."""

from __future__ import annotations

from conjopt.optim.conj_sgd import ConjSGD
from conjopt.optim.directions import Direction, Momentum, Spectral
from conjopt.optim.status import Status
from conjopt.optim.step_size import Constant, Edge, RayleighEdge, StepRule

__all__ = [
    "ConjSGD",
    "Constant",
    "Direction",
    "Edge",
    "Momentum",
    "RayleighEdge",
    "Spectral",
    "Status",
    "StepRule",
]
