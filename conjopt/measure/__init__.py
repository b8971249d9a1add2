"""Measuring what the theory speaks of: plain functions of a model, a loss and a batch."""

from __future__ import annotations

from conjopt.measure.checking import MeasurementError, self_check
from conjopt.measure.curvature import curvature_along
from conjopt.measure.energy import EnergyProbe, gradient_energy, per_sample_gradient_norms
from conjopt.measure.last_layer import last_layer_bound
from conjopt.measure.layer_information import LayerInformation, layer_information_loss
from conjopt.measure.noise import (
    GradientNoise,
    cross_fitted_slope,
    gradient_noise,
    halves,
    noise_from_halves,
    noise_from_norms,
    noise_from_parts,
)
from conjopt.measure.ranks import noise_from_ranks
from conjopt.measure.spectrum import (
    Eigenvalue,
    Ritz,
    SpectralDensity,
    lanczos,
    sample_top_eigenvalues,
    spectral_density,
    top_curvature,
    top_structure,
)
from conjopt.measure.structure import (
    batch_structure_matrix,
    extreme_eigenvalues,
    structure_matrix,
)

__all__ = [
    "Eigenvalue",
    "EnergyProbe",
    "GradientNoise",
    "LayerInformation",
    "MeasurementError",
    "Ritz",
    "SpectralDensity",
    "batch_structure_matrix",
    "cross_fitted_slope",
    "curvature_along",
    "extreme_eigenvalues",
    "gradient_energy",
    "gradient_noise",
    "halves",
    "lanczos",
    "last_layer_bound",
    "layer_information_loss",
    "noise_from_halves",
    "noise_from_norms",
    "noise_from_parts",
    "noise_from_ranks",
    "per_sample_gradient_norms",
    "sample_top_eigenvalues",
    "self_check",
    "spectral_density",
    "structure_matrix",
    "top_curvature",
    "top_structure",
]
