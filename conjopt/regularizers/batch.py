"""The base of the terms that compare rows of a batch with one another."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn

from conjopt.potentials import Potential
from conjopt.regularizers.base import Regularizer, Schedule
from conjopt.regularizers.queue import Queue
from conjopt.regularizers.ranks import gathered
from conjopt.regularizers.rows import Rows

__all__ = ["BatchRegularizer"]


class BatchRegularizer(Regularizer):
    """A `Regularizer` of a whole batch: its rows are compared with one another.

    It can do so on features instead of the outputs, with rows of past batches, and with the rows of
    all ranks. Of many rows, as of tokens, it takes `max_rows` spread over the batch, as the cost is
    that of all pairs. At least two rows have to count.

    Args:
        weight: See `Regularizer`.
        potential: See `Regularizer`; a criterion may not weigh single elements of an output.
        ignore_index: See `Regularizer`.
        queue: Number of rows of past training calls to compare with, 0 for none. They have no
            gradient; they are buffers, so that `state_dict` resumes exactly.
        max_rows: The most rows of a call to use, at least 2.
        group: A process group of `torch.distributed`, such as `torch.distributed.group.WORLD`, to
            join the rows of its ranks. Every rank then has to call the term as often. The gradient
            is that of the joined batch once DistributedDataParallel has averaged it. On a device
            other than a CPU all ranks need the same number of rows.

    Attributes:
        queue: The `Queue`, or None.

    Raises:
        TypeError: See `Regularizer`.
        ValueError: See `Regularizer`; for sizes out of range, for a criterion that weighs elements,
            and for features whose rows are not those of the outputs.

    Reference:
        docs/regularizers.md.

    Example:
        >>> import torch
        >>> from conjopt.regularizers import BatchRegularizer
        >>> class Spread(BatchRegularizer):
        ...     def _value(self, batch):
        ...         return batch.mean((batch.rows - batch.share @ batch.rows).square().sum(1))
        >>> outputs, targets = torch.tensor([[3.0, 4.0], [1.0, 2.0]]), torch.tensor([0, 1])
        >>> Spread(1.0)(outputs, targets)
        tensor(2.)
        >>> features = torch.tensor([[6.0], [0.0]])
        >>> Spread(1.0)(outputs, targets, features=features)
        tensor(9.)
    """

    _least = 2

    def __init__(
        self,
        weight: float | Schedule,
        *,
        potential: Potential | nn.Module | None = None,
        ignore_index: int = -100,
        queue: int = 0,
        max_rows: int = 1024,
        group: Any = None,
    ) -> None:
        super().__init__(weight, potential=potential, ignore_index=ignore_index)
        for name, given, least in (("queue", queue, 0), ("max_rows", max_rows, 2)):
            if not isinstance(given, int) or isinstance(given, bool) or given < least:
                raise ValueError(f"{name}={given!r}: expected an integer that is at least {least}.")
        elements = (getattr(self.criterion, name, None) for name in ("weight", "pos_weight"))
        if not self.potential.on_simplex and any(weight is not None for weight in elements):
            raise ValueError(
                f"The criterion {self.criterion!r} weighs elements of an output, but the term "
                f"compares whole outputs: give potential={self.potential!r} in its place."
            )
        self.queue = Queue(queue) if queue else None
        self.max_rows = max_rows
        self.group = group

    def forward(
        self, outputs: Tensor, targets: Tensor, *, features: Tensor | None = None
    ) -> Tensor:
        """Return the weighted term, to be added to the loss.

        Args:
            outputs: Outputs of the model (logits, natural parameters).
            targets: Class indices, probabilities or target values.
            features: Compare these in place of the outputs: any width at dimension 1, the other
                dimensions as those of the outputs.

        Returns:
            Shape `()`, in float32 or wider.
        """
        return self._term(outputs, targets, features)

    def estimate(
        self, outputs: Tensor, targets: Tensor, *, features: Tensor | None = None
    ) -> Tensor:
        """Return the term without its weight; changes nothing.

        Args:
            outputs: As for a call.
            targets: As for a call.
            features: As for a call.

        Returns:
            Shape `()`, in float32 or wider.
        """
        return self._estimate(outputs, targets, features)

    def _read(self, outputs: Tensor, targets: Tensor, features: Tensor | None) -> Rows:
        if features is not None:
            self._check_features(outputs, features)
        batch = super()._read(outputs, targets, features)
        count = len(batch.rows)
        if count <= self.max_rows:
            return batch
        step = _spreading_step(count)
        chosen = torch.arange(self.max_rows, device=batch.rows.device) * step % count
        return dataclasses.replace(
            batch,
            rows=batch.rows[chosen],
            mass=batch.mass[chosen],
            targets=batch.targets[chosen],
            fresh=self.max_rows,
        )

    def _check_features(self, outputs: Tensor, features: Tensor) -> None:
        if not isinstance(features, Tensor) or not features.is_floating_point():
            raise TypeError(f"features={features!r}: expected a floating-point tensor.")
        tokens = outputs.shape[2:] if self.potential.on_simplex else None
        expected = outputs.shape[:1] if tokens is None else (*outputs.shape[:1], *tokens)
        given = features.shape[:1] if tokens is None else features.shape[:1] + features.shape[2:]
        if features.ndim < 2 or outputs.ndim < 1 or tuple(given) != tuple(expected):
            raise ValueError(
                f"Got features of shape {tuple(features.shape)} with outputs of shape "
                f"{tuple(outputs.shape)}: expected the outputs' shape with any number in place of "
                "dimension 1. Flatten what belongs to one sample, by features.flatten(1), or move "
                "the width to dimension 1."
            )

    def _joined(self, fresh: Rows) -> Rows:
        batch = fresh if self.group is None else gathered(fresh, self.group)
        return batch if self.queue is None else self.queue.joined(batch)

    def _remember(self, batch: Rows) -> None:
        if self.queue is not None and batch.fresh:
            self.queue.push(batch)


def _spreading_step(count: int) -> int:
    """A step whose multiples visit all rows, modulo their number, spread evenly all the time."""
    step = round(count * (math.sqrt(5) - 1) / 2)
    while math.gcd(step, count) > 1:
        step += 1
    return step
