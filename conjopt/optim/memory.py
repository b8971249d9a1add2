"""What happens where memory runs out in a measurement: it is left out, and the next one is smaller.

On several ranks the others wait for what a measurement sends, so a rank that ran out sends that it
has nothing, in the same sum; then no rank measures at this step.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, TypeVar

from conjopt.measure.chunks import ran_out_of_memory, run_in_chunks
from conjopt.measure.observation import Batch
from conjopt.measure.process_group import Ranks
from conjopt.optim.user_frame import levels_to_the_user

__all__ = ["Memory"]

MOST = 4096  # chunks of a batch

Result = TypeVar("Result")


class Memory:
    """How measurements get by with the memory there is.

    Attributes:
        chunks: that the samples of a forward run in where a measurement runs it again; doubled
            each time that memory did not do.

    Example:
        >>> import torch
        >>> memory = Memory()
        >>> def greedy():
        ...     raise torch.OutOfMemoryError("CUDA out of memory.")
        >>> memory.attempt(greedy), memory.chunks
        (None, 2)
    """

    def __init__(self) -> None:
        self.chunks = 1
        self._unsaid = self._said = False
        self._given_up = False  # the measurement that is under way

    def attempt(
        self, work: Callable[..., Result], *args: Any, shrink: bool = True
    ) -> Result | None:
        """What some work gives; None where it runs out of memory.

        Args:
            work: leaves everything as it was where it fails.
            args: of it.
            shrink: whether its next attempt can be in smaller chunks.

        Raises:
            BaseException: any other error of the work.
        """
        try:
            return work(*args)
        except RuntimeError as error:  # which torch.OutOfMemoryError is
            if not ran_out_of_memory(error):
                raise
        self._unsaid = True
        if shrink:
            self.chunks = min(2 * self.chunks, MOST)
        return None

    def alone(self, ranks: Ranks, work: Callable[..., Result], *args: Any) -> Result | None:
        """`attempt` work in a single process; on several ranks others may wait for what it sends.

        Args:
            ranks: that share the step.
            work: see `attempt`.
            args: of it.
        """
        self._given_up = False
        return work(*args) if ranks.several else self.attempt(work, *args)

    def together(self, ranks: Ranks, work: Callable[..., Result], *args: Any) -> Result | None:
        """`attempt` work that sends nothing, on several ranks; in a single process `alone` does.

        What follows in a measurement that has failed is not tried any more.

        Args:
            ranks: that share the step.
            work: see `attempt`.
            args: of it.
        """
        if not ranks.several:
            return work(*args)
        found = None if self._given_up else self.attempt(work, *args)
        self._given_up = found is None
        return found

    def fit(self, batch: Batch) -> None:
        """Let the forwards of a batch run again in chunks, if memory did not do before.

        Args:
            batch: observed while the watch was armed, whose samples do not see one another.
        """
        samples = max(forward.batch_size or 1 for forward in batch.forwards)
        while self.chunks > 1:
            tried = self.chunks
            if self.attempt(run_in_chunks, batch, tried) is not None or tried >= samples:
                break

    def say_once(self) -> None:
        """Warn, once, that memory ran out; at the end of a step, as warnings may be errors."""
        if self._unsaid and not self._said:
            self._said = True
            warnings.warn(
                "ConjSGD ran out of memory while it measured. The measurement was left out, and "
                "the step taken by what was known before; from now on measurements run the batch "
                "in smaller chunks, where the model allows it (no dropout, no batch norm). If the "
                "training itself runs out of memory, or steps stay at 0 because nothing could be "
                "measured, use smaller batches.",
                RuntimeWarning,
                stacklevel=levels_to_the_user(),
            )
