"""Steps that a ledger records: watch -> ... -> step -> record."""

from __future__ import annotations

import functools
import math
from typing import Any

from conjopt.bounds import ConvergenceLedger
from conjopt.bounds.start import LedgerStart
from conjopt.measure.layers.tape import Arguments
from conjopt.measure.observation import Batch
from conjopt.measure.process_group import Ranks
from conjopt.optim.memory import Memory

__all__ = ["Recording"]


class Recording:
    """Feeds a ledger with every so many steps of an optimizer.

    Args:
        ledger: of the run; None for none.
        every: steps from one record to the next, the first being recorded.
        memory: there is; a record that it does not do for is left out.

    Example:
        >>> Recording(None, 25, Memory()).due(0)
        False
    """

    def __init__(self, ledger: ConvergenceLedger | None, every: int, memory: Memory) -> None:
        self.ledger, self.every, self.memory = ledger, every, memory

    def due(self, calls: int) -> bool:
        """Whether the step after so many calls is recorded.

        Args:
            calls: of ``step`` so far.
        """
        return self.ledger is not None and calls % self.every == 0

    def begin(self, batch: Batch | None, ranks: Ranks) -> LedgerStart | None:
        """Measure before the parameters move.

        Args:
            batch: observed while the watch was armed; None if it was not observed.
            ranks: that share the step.

        Raises:
            RuntimeError: if the batch is not one call of the model and the criterion, or a part of
                a batch.
        """
        assert self.ledger is not None
        if ranks.several:
            raise RuntimeError(
                f"ConjSGD: the ledger records steps of one process, but {ranks.size} ranks share "
                "this one, each with a part of its batch; leave out ledger=, or train in one "
                "process"
            )
        if batch is None or batch.forwards[-1].replay is None:
            return None
        if len(batch.observations) != 1 or batch.observations[0].place is None:
            raise RuntimeError(
                "ConjSGD: the ledger records steps of one forward and one call of the criterion "
                "on the model's own output, but several were accumulated, or the output was "
                "reshaped in between. Leave out ledger=, and call ledger.begin(inputs, targets) "
                "and ledger.end(start) around step() yourself"
            )
        (observation,) = batch.observations
        replay = batch.forwards[-1].replay
        inputs: Any = replay.args
        if replay.kwargs:
            inputs = Arguments(replay.args, replay.kwargs) if replay.args else replay.kwargs
        return self.memory.attempt(self.ledger.begin, inputs, observation.targets, shrink=False)

    def end(self, start: LedgerStart | None, calls: int) -> None:
        """Record the step, after the parameters moved.

        Args:
            start: what `begin` returned.
            calls: of ``step`` before this one.
        """
        if self.ledger is not None and start is not None:
            self.memory.attempt(functools.partial(self.ledger.end, start, step=calls), shrink=False)

    @property
    def extremes(self) -> tuple[float, float]:
        """``lo`` and ``hi`` at the ledger's last probe; NaN without one."""
        if self.ledger is None or not self.ledger.probes:
            return math.nan, math.nan
        return self.ledger.probes[-1][1:]
