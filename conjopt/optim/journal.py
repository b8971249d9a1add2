"""Steps that a history records: watch -> ... -> step -> record."""

from __future__ import annotations

import os
import warnings
from typing import Any, Protocol

from torch import distributed

from conjopt.measure.observation import Batch, sum_of
from conjopt.measure.process_group import Joined
from conjopt.optim.floor import DataFloor
from conjopt.optim.statistics import Statistics
from conjopt.optim.status import Status
from conjopt.optim.user_frame import levels_to_the_user

__all__ = ["Journal"]


class _Records(Protocol):
    """What a journal writes to, such as a `conjopt.report.History`."""

    def record(self, /, **values: Any) -> None: ...


class Journal:
    """Writes the status of an optimizer to a history, on the steps that measure.

    Reading a status waits for a device, so no ordinary step is recorded. A history that cannot be
    written costs the run its records and one warning, no more. A copy of the optimizer has none:
    two runs in one file would be told apart by nobody.

    Args:
        history: with a method ``record(**values)``, or the path of a `conjopt.report.History`; None
            for none. On other ranks than the first it is left alone.
        every: steps from one record to the next.
        warmup: first steps, each of which is recorded.
        group: of `torch.distributed`, whose first rank writes; None for all processes.

    Raises:
        TypeError: if the history is of another kind.
        ValueError: if the path is that of another file than a history.
        OSError: if the file cannot be opened.

    Example:
        >>> journal = Journal(None, 25, 20)
        >>> journal.due(0)
        False
    """

    def __init__(self, history: Any, every: int, warmup: int, group: Any = None) -> None:
        self.every, self.warmup, self._said = every, warmup, False
        self.history: _Records | None = _opened(history) if _writes(group) else None

    def due(self, calls: int) -> bool:
        """Whether the step after so many calls is recorded.

        Args:
            calls: of ``step`` so far.
        """
        number = calls + 1
        return self.history is not None and (number <= self.warmup or number % self.every == 0)

    def write(
        self,
        status: Status,
        lr: float,
        batch: Batch | None,
        joined: Joined | None,
        floor: DataFloor,
        statistics: Statistics,
        *,
        taken: bool = True,
    ) -> None:
        """Record a step.

        Args:
            status: after it.
            lr: of the first group.
            batch: that was observed; None under a rule that does not measure.
            joined: the batches of all ranks.
            floor: of the loss.
            statistics: say whether the floor was given up.
            taken: whether it was; of one that was given up only the loss and the counts are
                recorded, as the rest of the status is of a step before.
        """
        values = (of_status(status) if taken else of_skipped(status)) | {"lr": lr}
        if batch is not None and joined is not None:
            kappas = [o.kappa for o in batch.observations]
            kappa = sum_of(kappas)
            least = sum_of([k * o.offset for k, o in zip(kappas, batch.observations, strict=True)])
            given = floor.value is not None and not bool(statistics.lowered > 0)
            lowest = floor.value if given and floor.value is not None else float(least / kappa)
            # Back from a sample's Fenchel-Young loss to the criterion's units.
            loss = lowest + float(joined.loss * batch.weight / kappa)
            values |= {"loss": loss, "data_floor": lowest}
        self._record(values)

    def gave_up(
        self,
        status: Status,
        lr: float,
        batch: Batch | None,
        joined: Joined | None,
        floor: DataFloor,
        statistics: Statistics,
    ) -> None:
        """Record a step that was given up, each of the first and then one of so many.

        Args:
            status: after it.
            lr: of the first group.
            batch: that was observed, if it was.
            joined: the batches of all ranks.
            floor: of the loss.
            statistics: say whether the floor was given up.
        """
        if self.due(status.skipped_steps - 1):
            self.write(status, lr, batch, joined, floor, statistics, taken=False)

    def _record(self, values: dict[str, Any]) -> None:
        assert self.history is not None
        try:
            self.history.record(**values)
        except (OSError, ValueError) as error:  # the latter if it was closed
            if self._said:
                return
            self._said = True
            warnings.warn(
                f"ConjSGD could not write to its history ({error}); training goes on, and records "
                "are lost as long as this lasts.",
                RuntimeWarning,
                stacklevel=levels_to_the_user(),
            )

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"history": None}


def of_status(status: Status) -> dict[str, Any]:
    """What of a status a history holds, by the names that `conjopt.report` draws.

    Limits are ``limits/edge`` and so on, conditions ``conditions/C1`` with their state.

    Args:
        status: of an optimizer.

    Example:
        >>> from torch import nn
        >>> from conjopt import ConjSGD
        >>> model = nn.Linear(2, 1)
        >>> status = ConjSGD(model.parameters(), model=model, loss=nn.MSELoss()).status()
        >>> found = of_status(status)
        >>> found["step"], found["limited_by"], found["slope"], found["conditions/C1"]
        (0, 'nothing measured', None, 'unknown')
    """
    numbers = {
        "excess_loss": status.loss,
        "step_size": status.step_size,
        "slope": status.slope,
        "raw_slope": status.raw_slope,
        "correlation": status.correlation,
        "curvature": status.curvature,
        "top_curvature": status.top_curvature,
        "output_change": status.output_change,
        "gradient_energy": status.gradient_energy,
        "noise_scale": status.noise_scale,
        "brake": status.brake,
        "lo": status.lo,
        "hi": status.hi,
    }
    return {
        "step": status.step,
        "limited_by": status.limited_by,
        # NaN says of a status that something was not measured, and of a record that it is none.
        **{name: None if value != value else value for name, value in numbers.items()},
        "batch_size": status.batch_size,
        "recommended_batch_size": status.recommended_batch_size,
        "skipped_steps": status.skipped_steps,
        **{f"limits/{name}": value for name, value in status.limits.items()},
        **{f"conditions/{condition.name}": condition.state for condition in status.conditions},
    }


def of_skipped(status: Status) -> dict[str, Any]:
    """What of a status a history holds for a step that was given up.

    Nothing limited such a step, so ``limited_by`` is None.

    Args:
        status: of an optimizer, after it.

    Example:
        >>> from torch import nn
        >>> from conjopt import ConjSGD
        >>> model = nn.Linear(2, 1)
        >>> of_skipped(ConjSGD(model.parameters(), model=model, loss=nn.MSELoss()).status())
        {'step': 0, 'limited_by': None, 'skipped_steps': 0}
    """
    return {"step": status.step, "limited_by": None, "skipped_steps": status.skipped_steps}


def _writes(group: Any) -> bool:
    """Whether this process is the first of its group."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return True
    return distributed.get_rank(group) == 0


def _opened(history: Any) -> _Records | None:
    if isinstance(history, str | os.PathLike):
        # The room of reports lies above this one; only a path, which stands for one of its
        # histories, needs it.
        from conjopt.report.history import History

        opened: _Records = History(history)
        return opened
    if history is not None and not callable(getattr(history, "record", None)):
        raise TypeError(
            f"ConjSGD: got a {type(history).__name__} as history=, expected a "
            'conjopt.report.History, or the path of one: history="run/history.jsonl"'
        )
    found: _Records | None = history
    return found
