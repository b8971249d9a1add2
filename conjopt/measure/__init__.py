"""Measuring what the theory speaks of: plain functions of a model, a loss and a batch."""

from __future__ import annotations

from conjopt.measure.curvature import curvature_along
from conjopt.measure.noise import GradientNoise, cross_fitted_slope, halves, noise_from_halves

__all__ = [
    "GradientNoise",
    "cross_fitted_slope",
    "curvature_along",
    "halves",
    "noise_from_halves",
]
