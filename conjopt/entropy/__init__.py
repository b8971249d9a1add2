"""What the data allow: entropies of targets and features (docs/theory.md, sections 1, 4 and 5).

All is computed in float64, and entropies of targets are in units of the mean Fenchel-Young loss of
a sample. `generalized_entropy`, `conditional_entropy`, `data_floor`, `information_loss` and
`risk_decomposition` are exact for the given data as a discrete law of its own. The others estimate
or bound entropies of a population from real features; docs/entropy_estimates.md says how well.
"""

from __future__ import annotations

from conjopt.entropy.coding_rate import coding_rate, quantizer_entropy_bound
from conjopt.entropy.entropies import conditional_entropy, generalized_entropy, information_loss
from conjopt.entropy.kernel import kernel_conditional_entropy
from conjopt.entropy.maximum_loss import (
    attainable_losses,
    attainable_maximum_loss,
    observed_maximum_loss,
)
from conjopt.entropy.quantized import (
    FeatureEntropies,
    quantized_conditional_entropy,
    quantized_feature_entropies,
)
from conjopt.entropy.renyi import conditional_renyi_entropy, matrix_renyi_entropy
from conjopt.entropy.risk import RiskDecomposition, data_floor, risk_decomposition

__all__ = [
    "FeatureEntropies",
    "RiskDecomposition",
    "attainable_losses",
    "attainable_maximum_loss",
    "coding_rate",
    "conditional_entropy",
    "conditional_renyi_entropy",
    "data_floor",
    "generalized_entropy",
    "information_loss",
    "kernel_conditional_entropy",
    "matrix_renyi_entropy",
    "observed_maximum_loss",
    "quantized_conditional_entropy",
    "quantized_feature_entropies",
    "quantizer_entropy_bound",
    "risk_decomposition",
]
