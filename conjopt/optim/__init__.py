"""The optimizer, the directions and the rules that it is put together from, and batch sizes."""

from __future__ import annotations

from conjopt.optim.batch_rule import (
    BatchRule,
    Correlation,
    Fixed,
    NoiseReading,
    Recommendation,
    WorkOptimal,
)
from conjopt.optim.batch_size import (
    batch_size_bound,
    best_batch_size,
    gradient_correlation,
    least_batch_size,
    work_optimum,
)
from conjopt.optim.conj_sgd import ConjSGD
from conjopt.optim.directions import Direction, Momentum, Spectral
from conjopt.optim.gradient_rules import GradientEdge, PolyakStep, Smoothness
from conjopt.optim.sampler import AdaptiveBatchSampler, Part
from conjopt.optim.status import Status
from conjopt.optim.step_size import Constant, Edge, StepRule
from conjopt.optim.step_times import Cost, StepTimes

__all__ = [
    "AdaptiveBatchSampler",
    "BatchRule",
    "ConjSGD",
    "Constant",
    "Correlation",
    "Cost",
    "Direction",
    "Edge",
    "Fixed",
    "GradientEdge",
    "Momentum",
    "NoiseReading",
    "Part",
    "PolyakStep",
    "Recommendation",
    "Smoothness",
    "Spectral",
    "Status",
    "StepRule",
    "StepTimes",
    "WorkOptimal",
    "batch_size_bound",
    "best_batch_size",
    "gradient_correlation",
    "least_batch_size",
    "work_optimum",
]
