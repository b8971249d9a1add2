"""A callback of transformers' Trainer that logs where a ConjSGD stands."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from conjopt.report.scalars import conj_sgd, scalars

try:
    from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState
except ImportError as error:
    raise ImportError(
        "conjopt.report.transformers needs transformers "
        f'({error}): pip install "conjopt[transformers]"'
    ) from error

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments

__all__ = ["TransformersStatus"]


class TransformersStatus(TrainerCallback):
    """Logs `ConjSGD.status` whenever the Trainer logs its training loss.

    The numbers go through `Trainer.log`, and so to ``trainer.state.log_history`` and wherever
    ``report_to`` says. Reading them waits for the device, as logging the loss does.

    Args:
        trainer: to add it to: ``trainer.add_callback(TransformersStatus(trainer))``.

    Raises:
        TypeError: if it is given no trainer.
        ValueError: at the first log, if the optimizer is no ConjSGD.

    Example:
        >>> from conjopt.report.transformers import TransformersStatus
        >>> TransformersStatus(None)
        Traceback (most recent call last):
            ...
        TypeError: TransformersStatus: got a NoneType, expected the Trainer to log through:
        trainer.add_callback(TransformersStatus(trainer))
    """

    def __init__(self, trainer: Trainer) -> None:
        if not callable(getattr(trainer, "log", None)):
            raise TypeError(
                f"TransformersStatus: got a {type(trainer).__name__}, expected the Trainer to log "
                "through: trainer.add_callback(TransformersStatus(trainer))"
            )
        self._trainer = trainer

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Log the status beside a training loss.

        Args:
            args: of the trainer.
            state: of the trainer.
            control: of the trainer.
            logs: what it logs; a status logs once more, and has no "loss".
            kwargs: the optimizer among others.
        """
        if logs is None or "loss" not in logs or not state.is_world_process_zero:
            return
        for optimizer in conj_sgd([kwargs.get("optimizer")], "TransformersStatus").values():
            self._trainer.log(scalars(optimizer.status()))
