"""Fenchel-Young losses, and what a criterion means as one (docs/theory.md, section 0)."""

from __future__ import annotations

from conjopt.losses.fenchel_young import FenchelYoungLoss
from conjopt.losses.named import (
    EntmaxLoss,
    LogisticLoss,
    PoissonLoss,
    SoftmaxLoss,
    SparsemaxLoss,
    SquaredLoss,
)
from conjopt.losses.reading import PotentialOf
from conjopt.losses.recognise import potential_of
from conjopt.losses.trainer import trainer_loss

__all__ = [
    "EntmaxLoss",
    "FenchelYoungLoss",
    "LogisticLoss",
    "PoissonLoss",
    "PotentialOf",
    "SoftmaxLoss",
    "SparsemaxLoss",
    "SquaredLoss",
    "potential_of",
    "trainer_loss",
]
