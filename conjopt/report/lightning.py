"""A callback of Lightning that logs where a ConjSGD stands."""

from __future__ import annotations

from typing import Any

from conjopt.report.scalars import PREFIX, conj_sgd, scalars

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise ImportError(
        f'conjopt.report.lightning needs lightning ({error}): pip install "conjopt[lightning]"'
    ) from error

__all__ = ["LightningStatus"]


class LightningStatus(Callback):
    """Logs `ConjSGD.status` through the loggers of the trainer, whichever they are.

    Reading a status waits for the device, so it is done on steps that log only, and on the first
    process. With several ConjSGDs, names carry their number: ``conjopt/0/step_size``.

    Args:
        every: optimizer steps from one record to the next; None for the trainer's
            ``log_every_n_steps``.

    Raises:
        ValueError: if ``every`` is less than 1, or, as the training starts, if no optimizer is a
            ConjSGD.

    Example:
        >>> from conjopt.report.lightning import LightningStatus
        >>> LightningStatus(every=50).every
        50
    """

    def __init__(self, every: int | None = None) -> None:
        if every is not None and (not isinstance(every, int) or every < 1):
            raise ValueError(f"LightningStatus: every={every!r}, expected None or at least 1")
        self.every = every
        self._last = 0  # the step that was logged last

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a trainer without a ConjSGD.

        Args:
            trainer: that calls.
            pl_module: that it trains.
        """
        conj_sgd(trainer.optimizers, "LightningStatus")
        self._last = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Log, if the step is due.

        Args:
            trainer: that calls.
            pl_module: that it trains.
            args: the outputs, the batch and its number.
        """
        step, before = trainer.global_step, self._last
        every = self.every or getattr(trainer, "log_every_n_steps", 0)
        # Several optimizers count several steps at once, and micro-batches none.
        if not every or step // every == before // every or not trainer.is_global_zero:
            return
        self._last = step
        found = {}
        for prefix, optimizer in conj_sgd(trainer.optimizers, "LightningStatus").items():
            for name, value in scalars(optimizer.status()).items():
                found[prefix + name.removeprefix(PREFIX)] = value
        for logger in trainer.loggers:
            logger.log_metrics(found, step=step)
