"""What the data allow: entropies of targets and the data floor (Def 1.1 and 1.2, Thm 1.3 and 1.4).

All results are exact for the given data as a discrete law of its own, computed in float64, in units
of the mean Fenchel-Young loss of a sample. They are not estimates of a population.
"""

from __future__ import annotations

from conjopt.entropy.entropies import conditional_entropy, generalized_entropy, information_loss
from conjopt.entropy.risk import RiskDecomposition, data_floor, risk_decomposition

__all__ = [
    "RiskDecomposition",
    "conditional_entropy",
    "data_floor",
    "generalized_entropy",
    "information_loss",
    "risk_decomposition",
]
