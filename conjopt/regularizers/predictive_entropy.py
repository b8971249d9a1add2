"""The entropy of the predictions, in either direction (docs/regularizers.md)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from conjopt.potentials import Logistic, Poisson, Potential, Squared
from conjopt.regularizers.base import Regularizer, Schedule
from conjopt.regularizers.rows import Rows

__all__ = ["PredictiveEntropy"]


class PredictiveEntropy(Regularizer):
    """The mean generalized entropy `-Phi(yhat)` of the predictions `yhat = link(f)`.

    It is the loss that a model expects of itself: `-Phi(yhat) = E l(Y, f)` for hard targets `Y`
    drawn from `yhat`. As a term of the loss it makes predictions confident (entropy
    minimization). With `maximize=True` it is subtracted, and makes them less so (confidence
    penalty); under `Squared` that is a penalty on half the squared outputs.

    Args:
        weight: See `Regularizer`.
        maximize: Subtract the weighted entropy in place of adding it.
        potential: `Softmax()` by default, or any other, or a criterion. See `Regularizer`.
        ignore_index: See `Regularizer`.

    Raises:
        TypeError: See `Regularizer`.
        ValueError: See `Regularizer`; for `Squared` and `Poisson` without `maximize`, as their
            entropy has no minimum.

    Reference:
        docs/regularizers.md.

    Example:
        >>> import torch
        >>> from conjopt.regularizers import PredictiveEntropy
        >>> outputs, targets = torch.tensor([[0.0, 0.0], [9.0, 0.0]]), torch.tensor([0, 0])
        >>> term = PredictiveEntropy(weight=0.1, maximize=True)
        >>> term.estimate(outputs, targets), term(outputs, targets)
        (tensor(0.3472), tensor(-0.0347))
    """

    _of_conjugate = True

    def __init__(
        self,
        weight: float | Schedule = 0.1,
        *,
        maximize: bool = False,
        potential: Potential | nn.Module | None = None,
        ignore_index: int = -100,
    ) -> None:
        super().__init__(weight, potential=potential, ignore_index=ignore_index)
        if not maximize and isinstance(self.potential, Squared | Poisson):
            raise ValueError(
                f"potential={self.potential!r} with maximize=False: its entropy has no minimum, so "
                "outputs would grow for ever. Use maximize=True."
            )
        self.maximize = bool(maximize)
        self._sign = -1 if maximize else 1

    def _value(self, batch: Rows) -> Tensor:
        f = batch.rows
        if isinstance(self.potential, Logistic):  # even in f: nothing cancels at |f|
            size = f.abs()
            return batch.mean((F.softplus(-size) + size * (-size).sigmoid()).sum(1))
        if self.potential.on_simplex:
            f = f - f.detach().amax(1, keepdim=True)  # changes nothing, and keeps digits
        # Phi(yhat) + Phi*(f) = <yhat, f>; Phi itself has no slope where a probability is 0.
        return batch.mean(self.potential.conjugate(f) - (self.potential.link(f) * f).sum(1))

    def extra_repr(self) -> str:
        """Return the arguments, for `repr`."""
        return f"{super().extra_repr()}, maximize={self.maximize}"
