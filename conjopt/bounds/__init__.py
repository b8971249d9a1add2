"""Bounds on the risk from what can be measured."""

from __future__ import annotations

from conjopt.bounds.trainability import MeanBounds, PLBound, RiskSandwich, pl_bound, risk_sandwich

__all__ = ["MeanBounds", "PLBound", "RiskSandwich", "pl_bound", "risk_sandwich"]
