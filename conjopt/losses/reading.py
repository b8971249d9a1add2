"""A criterion read as weighted Fenchel-Young losses of one potential.

`scale * sum_r weights_r * l(points_r, rows_r) + offset`, with `l` the Fenchel-Young loss of the
potential (docs/theory.md, section 0); everything above this module works in units of `l`.
"""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from conjopt.potentials import Potential, Softmax

__all__ = [
    "BinaryCrossEntropy",
    "ClassTargets",
    "MeanSquaredError",
    "PoissonNegativeLogLikelihood",
    "PotentialOf",
    "of_fenchel_young",
    "working_dtype",
]


@dataclass(frozen=True)
class PotentialOf(abc.ABC):
    """A criterion as weighted Fenchel-Young losses of one potential; made by `potential_of`.

    `criterion(outputs, targets) == scale * sum_r weights_r * potential.loss(points_r, rows_r) +
    offset`, where row `r` belongs to sample `r // (R / N)` of the `N` samples along dimension 0 of
    the outputs. The criterion's options are read at each call, never copied. No method waits for
    the device. All results but `rows` are constants for autograd, in float32 or wider.

    Attributes:
        potential: The potential `Phi`.
        criterion: The criterion.

    Raises:
        ValueError: By `scale`, `offset`, `weights` and `points` for shapes of outputs and targets
            that do not belong together.

    Example:
        >>> import torch
        >>> from conjopt.losses import potential_of
        >>> criterion = torch.nn.MSELoss()
        >>> outputs, targets = torch.tensor([[3.0, 4.0], [0.0, 1.0]]), torch.zeros(2, 2)
        >>> view = potential_of(criterion)
        >>> losses = view.potential.loss(view.points(outputs, targets), view.rows(outputs))
        >>> losses, view.scale(outputs, targets)
        (tensor([12.5000,  0.5000]), tensor(1.))
        >>> criterion(outputs, targets) == (view.weights(outputs, targets) * losses).sum()
        tensor(True)
    """

    potential: Potential
    criterion: Any

    def scale(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the factor `c` of the weighted mean loss, shape `()`; 1 if nothing counts."""
        self._check(outputs, targets)
        if self._unit(targets):
            return outputs.new_ones((), dtype=working_dtype(outputs, targets))
        total, divisor = self._mass(outputs, targets).sum(), self._divisor(outputs, targets)
        return torch.where((total > 0) & (divisor > 0), total / divisor, 1).detach()

    def offset(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the part that no output can change, shape `()`; 0 if nothing counts.

        It is the weighted entropy of the targets in the criterion's units.
        """
        self._check(outputs, targets)
        if self._certain(targets):
            return outputs.new_zeros((), dtype=working_dtype(outputs, targets))
        entropy, divisor = self._entropy(outputs, targets).sum(), self._divisor(outputs, targets)
        return torch.where(divisor > 0, entropy / divisor, 0).detach()

    def weights(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the weights of the rows, shape `(R,)`: they sum to 1, or all are 0."""
        self._check(outputs, targets)
        mass = self._mass(outputs, targets)
        total = mass.sum()
        return (mass / torch.where(total > 0, total, 1)).detach()

    def points(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the targets as points of the domain of `Phi`, shape `(R, k)`.

        Rows of weight 0 hold any valid point.
        """
        self._check(outputs, targets)
        return self._points(outputs, targets).detach()

    @abc.abstractmethod
    def rows(self, outputs_like: Tensor) -> Tensor:
        """Rearrange a tensor of the outputs' shape to shape `(R, k)`, linearly, no cast."""

    # Shortcuts where the answer does not depend on the values: every training step asks.
    def _unit(self, targets: Tensor) -> bool:
        return False

    def _certain(self, targets: Tensor) -> bool:
        return False

    # The criterion is sum_r (mass_r l(points_r, rows_r) + entropy_r) / divisor, and the terms_shape
    # is that of its value under reduction="none".
    @abc.abstractmethod
    def _mass(self, outputs: Tensor, targets: Tensor) -> Tensor: ...  # (R,)

    @abc.abstractmethod
    def _entropy(self, outputs: Tensor, targets: Tensor) -> Tensor: ...  # (R,)

    @abc.abstractmethod
    def _points(self, outputs: Tensor, targets: Tensor) -> Tensor: ...  # (R, k)

    @abc.abstractmethod
    def _divisor(self, outputs: Tensor, targets: Tensor) -> Tensor: ...  # ()

    @abc.abstractmethod
    def _terms_shape(self, outputs: Tensor) -> torch.Size: ...

    def _terms(self, by_row: Tensor, outputs: Tensor) -> Tensor:
        return by_row.reshape(self._terms_shape(outputs))

    @abc.abstractmethod
    def _check(self, outputs: Tensor, targets: Tensor) -> None: ...

    def _row_losses(self, outputs: Tensor, targets: Tensor) -> Tensor:  # (R,) mass times loss
        losses = self.potential.loss(self.points(outputs, targets), self.rows(outputs))
        mass = self._mass(outputs, targets).detach()
        return torch.where(mass > 0, mass * losses, 0)  # also for the gradient of 0 / 0


class ClassTargets(PotentialOf):
    """Class layouts on the simplex: row `r` has coefficients `a_rc` and mass `sum_c a_rc`."""

    def rows(self, outputs_like: Tensor) -> Tensor:
        """Classes last: a row per token."""
        if outputs_like.ndim == 1:
            return outputs_like.unsqueeze(0)
        return outputs_like.movedim(1, -1).reshape(-1, outputs_like.shape[1])

    def _terms_shape(self, outputs: Tensor) -> torch.Size:
        return outputs.shape[:1] + outputs.shape[2:] if outputs.ndim > 1 else torch.Size()

    def _check(self, outputs: Tensor, targets: Tensor) -> None:
        soft, terms = targets.is_floating_point(), self._terms_shape(outputs)
        if outputs.ndim == 0 or targets.shape != (outputs.shape if soft else terms):
            raise ValueError(
                f"Got outputs of shape {tuple(outputs.shape)} with targets of shape "
                f"{tuple(targets.shape)} and type {targets.dtype}: expected outputs (C), (N, C) or "
                "(N, C, d1, ...) with either integer class targets of shape (), (N) or "
                "(N, d1, ...) or floating-point probabilities of the outputs' shape. "
                + self._advice(outputs, targets)
            )
        if targets.dtype in (torch.bool, torch.uint16, torch.uint32, torch.uint64):
            raise ValueError(
                f"Got class targets of type {targets.dtype}: expected an integer type that torch "
                "computes with; use targets.long()."
            )

    def _advice(self, outputs: Tensor, targets: Tensor) -> str:
        if outputs.ndim and targets.shape == outputs.shape:
            return "Give one-hot targets as probabilities, by targets.float()."
        if targets.ndim == len(self._terms_shape(outputs)) + 1 and targets.shape[1] == 1:
            return "Take the dimension of size 1 away, by targets.squeeze(1)."
        if targets.is_floating_point() and targets.shape == self._terms_shape(outputs):
            return "Give classes as integers, by targets.long()."
        return "Move the classes to dimension 1."

    def _unit(self, targets: Tensor) -> bool:
        plain = getattr(self.criterion, "weight", None) is None
        return plain and not targets.is_floating_point() and self.criterion.reduction == "mean"

    def _certain(self, targets: Tensor) -> bool:
        return not targets.is_floating_point() and not self.criterion.label_smoothing

    def _divisor(self, outputs: Tensor, targets: Tensor) -> Tensor:
        like = outputs.new_empty((), dtype=working_dtype(outputs, targets))
        if self.criterion.reduction != "mean":
            return like.new_ones(())
        if targets.is_floating_point():
            return like.new_full((), self._terms_shape(outputs).numel())
        if getattr(self.criterion, "weight", None) is None:
            return self._index(targets)[1].sum().to(like.dtype)
        return self._gather(self._class_weight(outputs, targets), targets).sum()

    def _row_losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if targets.is_floating_point() or self.criterion.label_smoothing:
            return super()._row_losses(outputs, targets)
        index, counts = self._index(targets)  # without an (R, C) matrix of targets
        losses = self.potential.class_loss(index, self.rows(outputs))
        if getattr(self.criterion, "weight", None) is None:
            return torch.where(counts, losses, 0)
        mass = self._mass(outputs, targets).detach()
        return torch.where(mass > 0, mass * losses, 0)

    def _class_weight(self, outputs: Tensor, targets: Tensor) -> Tensor:  # (C,)
        dtype = working_dtype(outputs, targets)
        weight = getattr(self.criterion, "weight", None)
        classes = outputs.shape[min(outputs.ndim - 1, 1)]
        if weight is None:
            return outputs.new_ones(classes, dtype=dtype)
        if weight.shape != (classes,):
            raise ValueError(
                f"The criterion's weight has shape {tuple(weight.shape)}: expected one weight for "
                f"each of the {classes} classes of outputs of shape {tuple(outputs.shape)}."
            )
        return weight.to(dtype)

    def _index(self, targets: Tensor) -> tuple[Tensor, Tensor]:  # (R,) class, (R,) does it count
        index = targets.reshape(-1).long()
        counts = index != self.criterion.ignore_index
        return torch.where(counts, index, 0), counts

    def _gather(self, by_class: Tensor, targets: Tensor) -> Tensor:  # (C,) -> (R,)
        index, counts = self._index(targets)
        return torch.where(counts, by_class[index], 0)

    def _coefficients(self, outputs: Tensor, targets: Tensor) -> Tensor:  # (R, C)
        weight, smoothing = self._class_weight(outputs, targets), self.criterion.label_smoothing
        if targets.is_floating_point():
            shares = self.rows(targets).to(weight.dtype)
        else:
            classes = torch.arange(len(weight), device=weight.device)
            shares = (self._index(targets)[0].unsqueeze(1) == classes).to(weight.dtype)
        mixed = (1 - smoothing) * shares + smoothing / len(weight)
        return weight * mixed.clamp(min=0)  # rounding may leave probabilities just below 0

    def _mass(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if targets.is_floating_point():
            return self._coefficients(outputs, targets).sum(-1)
        return self._gather(self._mass_by_class(outputs, targets), targets)

    def _mass_by_class(self, outputs: Tensor, targets: Tensor) -> Tensor:  # (C,)
        weight, smoothing = self._class_weight(outputs, targets), self.criterion.label_smoothing
        return (1 - smoothing) * weight + smoothing * weight.mean()

    def _entropy(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if self.potential != Softmax():
            points, mass = self._points(outputs, targets), self._mass(outputs, targets)
            return mass * self.potential.generalized_entropy(points)
        entr = torch.special.entr  # s H(a / s) = sum_c entr(a_c) - entr(s)
        if targets.is_floating_point():
            a = self._coefficients(outputs, targets)
            return entr(a).sum(-1) - entr(a.sum(-1))
        weight, smoothing = self._class_weight(outputs, targets), self.criterion.label_smoothing
        rest = smoothing / len(weight) * weight  # a_c of the classes that are not the target
        peak = (1 - smoothing) * weight + rest
        entropy = entr(peak) + entr(rest).sum() - entr(rest)
        return self._gather(entropy - entr(self._mass_by_class(outputs, targets)), targets)

    def _points(self, outputs: Tensor, targets: Tensor) -> Tensor:
        a = self._coefficients(outputs, targets)
        mass = a.sum(-1, keepdim=True)
        return torch.where(mass > 0, a / mass, 1 / a.shape[-1])


class _ValueTargets(PotentialOf):
    """Targets of the outputs' shape; a row is a sample, dimension 0, with all of its elements."""

    def rows(self, outputs_like: Tensor) -> Tensor:
        shape = outputs_like.shape
        return outputs_like.reshape(math.prod(shape[:1]), math.prod(shape[1:]))

    def _terms_shape(self, outputs: Tensor) -> torch.Size:
        return outputs.shape[:1]

    def _check(self, outputs: Tensor, targets: Tensor) -> None:
        if outputs.shape != targets.shape:
            raise ValueError(
                f"Got outputs of shape {tuple(outputs.shape)} with targets of shape "
                f"{tuple(targets.shape)}: expected equal shapes. Reshape the targets, for example "
                "by `targets.view_as(outputs)`, or expand them."
            )

    def _divisor(self, outputs: Tensor, targets: Tensor) -> Tensor:
        count = outputs.numel() if self.criterion.reduction == "mean" else 1
        return outputs.new_full((), count, dtype=working_dtype(outputs, targets))

    def _mass(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self._points(outputs, targets).new_ones(math.prod(outputs.shape[:1]))

    def _entropy(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return torch.zeros_like(self._mass(outputs, targets))

    def _points(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.rows(targets).to(working_dtype(outputs, targets))


class MeanSquaredError(_ValueTargets):
    """`torch.nn.MSELoss`, whose mean runs over all elements."""

    def _certain(self, targets: Tensor) -> bool:
        return True

    def _mass(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return 2 * super()._mass(outputs, targets)  # (f - y)^2 = 2 l


class BinaryCrossEntropy(_ValueTargets):
    """Rows are single elements when element or positive weights tell the elements apart."""

    @property
    def _weighted(self) -> bool:
        return self.criterion.weight is not None or self.criterion.pos_weight is not None

    def rows(self, outputs_like: Tensor) -> Tensor:
        """A row per sample, or per element if these are weighed."""
        return outputs_like.reshape(-1, 1) if self._weighted else super().rows(outputs_like)

    def _coefficients(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the coefficients of `-log p` and of `-log(1 - p)`, of the outputs' shape."""
        y = targets.to(working_dtype(outputs, targets))
        ones, zeros = y, 1 - y
        if self.criterion.pos_weight is not None:
            ones = ones * _expand(self.criterion.pos_weight, y, "pos_weight")
        if self.criterion.weight is not None:
            weight = _expand(self.criterion.weight, y, "weight")
            ones, zeros = ones * weight, zeros * weight
        return ones, zeros

    def _mass(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if not self._weighted:
            return super()._mass(outputs, targets)
        ones, zeros = self._coefficients(outputs, targets)
        return (ones + zeros).reshape(-1)

    def _entropy(self, outputs: Tensor, targets: Tensor) -> Tensor:
        ones, zeros = self._coefficients(outputs, targets)
        entr = torch.special.entr  # s H(a / s) = entr(a_1) + entr(a_0) - entr(s)
        return self.rows(entr(ones) + entr(zeros) - entr(ones + zeros)).sum(-1)

    def _points(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if not self._weighted:
            return super()._points(outputs, targets)
        ones, zeros = self._coefficients(outputs, targets)
        mass = ones + zeros
        return self.rows(torch.where(mass > 0, ones / mass, targets))


class PoissonNegativeLogLikelihood(_ValueTargets):
    """`torch.nn.PoissonNLLLoss` of logarithms of rates, whose mean runs over all elements."""

    def _entropy(self, outputs: Tensor, targets: Tensor) -> Tensor:
        y = self._points(outputs, targets)
        entropy = self.potential.generalized_entropy(y)
        if not self.criterion.full:
            return entropy
        many = torch.where(y > 1, y, 1)  # Stirling's formula is torch's above 1
        log_factorial = torch.xlogy(many, many) - many + (2 * math.pi * many).log() / 2
        return entropy + torch.where(y > 1, log_factorial, 0).sum(-1)


class _FenchelYoungClasses(ClassTargets):
    def _certain(self, targets: Tensor) -> bool:
        return not self.criterion.include_target_entropy

    def _entropy(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if self.criterion.include_target_entropy:
            return super()._entropy(outputs, targets)
        return torch.zeros_like(self._mass(outputs, targets))


class _FenchelYoungValues(_ValueTargets):
    """Rows are single elements when these are weighed."""

    def rows(self, outputs_like: Tensor) -> Tensor:
        if self.criterion.weight is None:
            return super().rows(outputs_like)
        return outputs_like.reshape(-1, 1)

    def _terms(self, by_row: Tensor, outputs: Tensor) -> Tensor:
        if self.criterion.weight is None or outputs.ndim < 2:
            return by_row.reshape(self._terms_shape(outputs))
        return by_row.reshape(outputs.shape).flatten(1).sum(-1)

    def _unit(self, targets: Tensor) -> bool:
        return bool(self.criterion.reduction == "mean" and self.criterion.weight is None)

    def _certain(self, targets: Tensor) -> bool:
        return not self.criterion.include_target_entropy

    def _mass(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if self.criterion.weight is None:
            return super()._mass(outputs, targets)
        like = outputs.to(working_dtype(outputs, targets))
        return _expand(self.criterion.weight, like, "weight").reshape(-1)

    def _entropy(self, outputs: Tensor, targets: Tensor) -> Tensor:
        mass = self._mass(outputs, targets)
        if not self.criterion.include_target_entropy:
            return torch.zeros_like(mass)
        return mass * self.potential.generalized_entropy(self._points(outputs, targets))

    def _divisor(self, outputs: Tensor, targets: Tensor) -> Tensor:
        count = math.prod(outputs.shape[:1]) if self.criterion.reduction == "mean" else 1
        return outputs.new_full((), count, dtype=working_dtype(outputs, targets))


def of_fenchel_young(criterion: Any) -> PotentialOf:
    """Read a `FenchelYoungLoss`."""
    on_simplex = criterion.potential.on_simplex
    kind = _FenchelYoungClasses if on_simplex else _FenchelYoungValues
    return kind(criterion.potential, criterion)


def working_dtype(outputs: Tensor, targets: Tensor) -> torch.dtype:
    """Return the dtype that losses are computed in: float32, or wider where an argument is."""
    dtype = torch.promote_types(outputs.dtype, torch.float32)
    return torch.promote_types(dtype, targets.dtype)


def _expand(weight: Tensor, like: Tensor, name: str) -> Tensor:
    """Broadcast a weight to the elements, in their dtype."""
    try:
        return weight.to(like.dtype).expand_as(like)
    except RuntimeError:
        raise ValueError(
            f"The criterion's {name} of shape {tuple(weight.shape)} does not broadcast to outputs "
            f"of shape {tuple(like.shape)}: reshape it."
        ) from None
