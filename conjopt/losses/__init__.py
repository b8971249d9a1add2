"""Fenchel-Young losses, and what a criterion means as one (docs/theory.md, section 0)."""

from __future__ import annotations

from conjopt.losses.fenchel_young import FenchelYoungLoss, LogisticLoss, SoftmaxLoss, SquaredLoss
from conjopt.losses.reading import PotentialOf
from conjopt.losses.recognise import potential_of

__all__ = [
    "FenchelYoungLoss",
    "LogisticLoss",
    "PotentialOf",
    "SoftmaxLoss",
    "SquaredLoss",
    "potential_of",
]
