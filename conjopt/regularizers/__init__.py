"""Terms that are added to the loss for the sake of unseen data (docs/regularizers.md)."""

from __future__ import annotations

from conjopt.regularizers.attainable_loss import AttainableLoss
from conjopt.regularizers.base import Regularizer
from conjopt.regularizers.batch import BatchRegularizer
from conjopt.regularizers.coding_rate import OutputCodingRate, WithinClassScatter
from conjopt.regularizers.conditional_entropy import ConditionalEntropy
from conjopt.regularizers.predictive_entropy import PredictiveEntropy

__all__ = [
    "AttainableLoss",
    "BatchRegularizer",
    "ConditionalEntropy",
    "OutputCodingRate",
    "PredictiveEntropy",
    "Regularizer",
    "WithinClassScatter",
]
