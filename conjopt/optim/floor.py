"""The data floor that the running loss is counted from (Thm 1.3)."""

from __future__ import annotations

import torch
from torch import Tensor

from conjopt.measure.observation import Batch
from conjopt.optim.gate import Gate, choose
from conjopt.optim.statistics import Statistics

__all__ = ["DataFloor"]

PATIENCE = 10  # steps at a running loss of 0 or less before a floor is given up


class DataFloor:
    """What the training loss cannot fall below; given up if it does, as it would freeze training.

    Args:
        value: in the criterion's units; None for the entropy of the targets, which holds always.
    """

    def __init__(self, value: float | None) -> None:
        self.value = value

    def excess(self, batch: Batch, statistics: Statistics) -> Tensor:
        """() loss of a batch over the floor, or the targets' entropy if that proved wrong.

        Args:
            batch: the observed one.
            statistics: say whether the floor was given up.
        """
        free = batch.loss(None)
        if self.value is not None:
            free = torch.where(statistics.lowered > 0, free, batch.loss(self.value))
        return free.to(statistics.loss)

    def give_up(self, statistics: Statistics, gate: Gate) -> None:
        """Count the steps at a running loss that is not positive; after some, start anew without.

        Args:
            statistics: written to.
            gate: () whether the step is taken.
        """
        if self.value is None:
            return
        below = torch.where(statistics.loss <= 0, statistics.below + 1, 0.0)
        statistics.below = choose(gate, below, statistics.below)
        now = (statistics.below >= PATIENCE) & (statistics.lowered == 0)
        statistics.lowered = torch.where(now, 1.0, statistics.lowered)
        statistics.loss = torch.where(now, torch.nan, statistics.loss)
        statistics.cap = torch.where(now, torch.inf, statistics.cap)
        # What the brake has seen was over the wrong floor, too.
        statistics.lowest = torch.where(now, torch.nan, statistics.lowest)
        for name in ("slow", "slow_weight", "spread"):
            setattr(statistics, name, torch.where(now, 0.0, getattr(statistics, name)))
