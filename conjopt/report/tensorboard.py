"""Records of a run as scalars of TensorBoard."""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

from conjopt.optim import Status
from conjopt.report.scalars import scalars

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["TensorBoard"]


class TensorBoard:
    """Writes statuses and records as scalars, which are on disk as soon as recorded.

    Reading a status waits for the device, and nothing else here does: record every hundred steps,
    not every one.

    Args:
        log_dir: the folder of the run, or a `torch.utils.tensorboard.SummaryWriter`, which stays
            yours to close.

    Raises:
        ImportError: if tensorboard is missing; it names the extra to install.

    Example:
        >>> import tempfile
        >>> from torch import nn
        >>> from conjopt import ConjSGD
        >>> model = nn.Linear(2, 1)
        >>> optimizer = ConjSGD(model.parameters(), model=model, loss=nn.MSELoss())
        >>> with TensorBoard(tempfile.mkdtemp()) as board:
        ...     board.record(optimizer.status())
        ...     board.record({"test_loss": 0.5}, step=1)
    """

    def __init__(self, log_dir: str | os.PathLike[str] | SummaryWriter) -> None:
        self._own = isinstance(log_dir, str | os.PathLike)
        self._closed = False
        if not isinstance(log_dir, str | os.PathLike):
            if not callable(getattr(log_dir, "add_scalar", None)):
                raise TypeError(
                    f"TensorBoard: got a {type(log_dir).__name__}, expected the folder of the run "
                    "or a torch.utils.tensorboard.SummaryWriter"
                )
            self._writer = log_dir
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                f'TensorBoard needs tensorboard ({error}): pip install "conjopt[tensorboard]"'
            ) from error
        self._writer = SummaryWriter(os.fspath(log_dir))

    def record(self, values: Status | Mapping[str, Any], step: int | None = None) -> None:
        """Write the finite numbers of a status or a record, and flush them.

        Args:
            values: ``optimizer.status()``, or a record as `History` holds it.
            step: of the run; None for the one that the values name.

        Raises:
            ValueError: if no step is known, or the writer is closed.

        Example:
            >>> import tempfile
            >>> with TensorBoard(tempfile.mkdtemp()) as board:
            ...     for record in [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.4}]:
            ...         board.record(record)
        """
        if self._closed:
            raise ValueError("the TensorBoard writer is closed; make another one to go on")
        if step is None:
            step = values.step if isinstance(values, Status) else values.get("step")
        if step is None:
            raise ValueError('TensorBoard.record: no step; pass step=, or a record with a "step"')
        for name, value in scalars(values).items():
            self._writer.add_scalar(name, value, int(step))
        self._writer.flush()

    def close(self) -> None:
        """Close the writer if it was made here; closing twice is harmless.

        Example:
            >>> import tempfile
            >>> board = TensorBoard(tempfile.mkdtemp())
            >>> board.close()
            >>> board.record({"loss": 0.5}, step=1)
            Traceback (most recent call last):
                ...
            ValueError: the TensorBoard writer is closed; make another one to go on
        """
        if self._own and not self._closed:
            self._writer.close()
        self._closed = True

    def __enter__(self) -> TensorBoard:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
