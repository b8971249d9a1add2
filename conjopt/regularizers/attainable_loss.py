"""The greatest loss that an output could have, over labels (docs/regularizers.md)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from conjopt.potentials import Entmax, Logistic, Potential, Softmax
from conjopt.regularizers.base import Regularizer, Schedule
from conjopt.regularizers.rows import Rows

__all__ = ["AttainableLoss"]


class AttainableLoss(Regularizer):
    """The mean over samples of a soft maximum of the loss over all labels.

    `tau log mean_j exp(l(e_j, f) / tau)` attacks the maximum loss `gamma`, a factor of the
    generalization bounds. It is at most the maximum over the `k` labels and at least that less
    `tau log k`. `tau=0` is the maximum, `tau=inf` the mean over the labels, which is what label
    smoothing adds. It does not look at the targets, so that a wrong label does not attract it; a
    maximum of the training losses would chase such labels.

    Under `Logistic` the labels are all yes/no answers to all outputs, `2^k` in number. For
    potentials without a finite set of labels, such as `Squared`, they are the targets of the batch,
    which takes memory for samples x samples x outputs.

    Args:
        weight: See `Regularizer`.
        tau: Temperature of the soft maximum, from 0 to infinity, in units of the loss.
        potential: `Softmax()` by default, or any other, or a criterion. See `Regularizer`.
        ignore_index: See `Regularizer`.

    Raises:
        TypeError: See `Regularizer`.
        ValueError: See `Regularizer`; for a negative `tau`.

    Reference:
        docs/regularizers.md.

    Example:
        >>> import torch
        >>> from conjopt.regularizers import AttainableLoss
        >>> outputs, targets = torch.tensor([[4.0, 0.0]]), torch.tensor([0])
        >>> AttainableLoss(tau=1).estimate(outputs, targets)
        tensor(3.3432)
        >>> AttainableLoss(tau=0).estimate(outputs, targets)  # the loss of class 1
        tensor(4.0181)
    """

    _of_conjugate = True

    def __init__(
        self,
        weight: float | Schedule = 0.003,
        tau: float = 1.0,
        *,
        potential: Potential | nn.Module | None = None,
        ignore_index: int = -100,
    ) -> None:
        super().__init__(weight, potential=potential, ignore_index=ignore_index)
        if not isinstance(tau, int | float) or not tau >= 0:
            raise ValueError(f"tau={tau!r}: expected a number that is at least 0, or infinity.")
        self.tau = float(tau)

    def _value(self, batch: Rows) -> Tensor:
        f = batch.rows
        if self.potential.on_simplex:
            f = f - f.detach().amax(1, keepdim=True)  # changes no loss, and keeps its digits
            losses = self.potential.conjugate(f).unsqueeze(1) - f
            if not isinstance(self.potential, Softmax | Entmax):  # of which Phi is 0 at labels
                labels = torch.eye(f.shape[1], dtype=f.dtype, device=f.device)
                losses = losses + self.potential.value(labels)
            return batch.mean(_soft_maximum(losses, self.tau))
        if isinstance(self.potential, Logistic):
            losses = -torch.stack([logsigmoid(f), logsigmoid(-f)], -1)
            return batch.mean(_soft_maximum(losses, self.tau).sum(1))  # of sums: a sum of maxima
        losses = self.potential.loss(batch.points, f.unsqueeze(1))  # (R, labels)
        return batch.mean(_soft_maximum(losses, self.tau, batch.share))

    def extra_repr(self) -> str:
        """Return the arguments, for `repr`."""
        return f"{super().extra_repr()}, tau={self.tau}"


def _soft_maximum(losses: Tensor, tau: float, share: Tensor | None = None) -> Tensor:
    """`tau log sum_j share_j exp(losses_j / tau)`, `(..., n) -> (...)`; equal shares by default."""
    if share is not None:
        losses = torch.where(share > 0, losses, losses.detach().amin(-1, keepdim=True))
    most = losses.amax(-1)
    if tau == 0:
        return most
    if share is None:
        share = losses.new_full(losses.shape[-1:], 1 / losses.shape[-1])
    if math.isinf(tau):
        return losses @ share
    # Exact at either end: from the maximum on, and by expm1 and log1p where all are nearly equal.
    most = most.detach()
    return most + tau * (torch.expm1((losses - most.unsqueeze(-1)) / tau) @ share).log1p()
