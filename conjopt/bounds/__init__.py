"""Bounds on the risk from what can be measured."""

from __future__ import annotations

from conjopt.bounds.conditions import Condition
from conjopt.bounds.convergence import ConvergenceLedger
from conjopt.bounds.generalization import (
    GeneralizationRange,
    generalization_range,
    total_variation_gap,
    uniform_gap_bound,
)
from conjopt.bounds.heldout import HeldoutInterval, heldout_certificate
from conjopt.bounds.promise import Promise
from conjopt.bounds.quantizers import Cells, LogitGrid, TopClass
from conjopt.bounds.rates import linear_rate, one_hot_rate, pl_constant
from conjopt.bounds.records import LedgerBound, LedgerStep
from conjopt.bounds.report import GeneralizationReport, generalization_report
from conjopt.bounds.report_factors import Factor, ReportedBound
from conjopt.bounds.steps import (
    batch_gradient_square,
    convergence_bound,
    expected_decrease,
    polyak_distance,
    realised_curvature,
)
from conjopt.bounds.trainability import MeanBounds, PLBound, RiskSandwich, pl_bound, risk_sandwich

__all__ = [
    "Cells",
    "Condition",
    "ConvergenceLedger",
    "Factor",
    "GeneralizationRange",
    "GeneralizationReport",
    "HeldoutInterval",
    "LedgerBound",
    "LedgerStep",
    "LogitGrid",
    "MeanBounds",
    "PLBound",
    "Promise",
    "ReportedBound",
    "RiskSandwich",
    "TopClass",
    "batch_gradient_square",
    "convergence_bound",
    "expected_decrease",
    "generalization_range",
    "generalization_report",
    "heldout_certificate",
    "linear_rate",
    "one_hot_rate",
    "pl_bound",
    "pl_constant",
    "polyak_distance",
    "realised_curvature",
    "risk_sandwich",
    "total_variation_gap",
    "uniform_gap_bound",
]
