"""Fenchel-Young losses, and what a criterion means as one (docs/theory.md, section 0).

`potential_of` writes a criterion as `scale * sum_r weights_r * l(points_r, rows_r) + offset`, with
`l` the Fenchel-Young loss of a potential; everything above this module works in units of `l`.
"""

import abc
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from conjopt.potentials import Logistic, Potential, Softmax, Squared

__all__ = [
    "FenchelYoungLoss",
    "LogisticLoss",
    "PotentialOf",
    "SoftmaxLoss",
    "SquaredLoss",
    "potential_of",
]


class FenchelYoungLoss(nn.Module):
    """The loss `l(y, f) = Phi(y) + Phi*(f) - <y, f>` of a potential, with torch's layouts.

    The value is `l` itself, which is 0 at the best output. torch's cross-entropy is `l` plus the
    entropy of the (smoothed) target, so the two differ for soft targets and not for hard ones.

    Potentials on the simplex take outputs of shape `(C)`, `(N, C)` or `(N, C, d1, ...)` and
    targets that are either class indices, `(...)` the outputs' shape without `C`, or probabilities
    of the outputs' shape; a loss term belongs to each of the `N * d1 * ...` tokens. Other
    potentials take targets of the outputs' shape; dimension 0 counts samples and all remaining
    elements of a sample are its `k` coordinates (`k = 1` for 1-d outputs; 0-d is one sample), and
    a loss term, summed over coordinates, belongs to each sample.

    Targets are constants: no gradient flows to them. Their values are not checked, which would
    synchronise a device. Half precision is computed in float32.

    Args:
        potential: The potential `Phi`.
        ignore_index: Class index of the tokens that do not count.
        label_smoothing: Share of the uniform distribution mixed into class or probability
            targets, in `[0, 1]`.
        reduction: `"mean"` over the terms that count (0 if none does), `"sum"`, or `"none"`, which
            has the shape of class-index targets on the simplex and `(N)` otherwise.

    Raises:
        ValueError: At construction for an unknown reduction, a smoothing outside of `[0, 1]`, or
            class options for a potential that is not on the simplex; at a call for shapes or
            types of outputs and targets that do not belong together.

    Reference:
        docs/theory.md, section 0.

    Example:
        >>> import torch
        >>> from conjopt.losses import FenchelYoungLoss
        >>> from conjopt.potentials import Softmax
        >>> outputs = torch.tensor([[2.0, 0.0], [0.0, 0.0]])
        >>> FenchelYoungLoss(Softmax())(outputs, torch.tensor([0, 1]))
        tensor(0.4100)
        >>> half = torch.full((2, 2), 0.5)
        >>> FenchelYoungLoss(Softmax(), reduction="none")(outputs, half)
        tensor([0.4338, 0.0000])
    """

    def __init__(
        self,
        potential: Potential,
        *,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        if reduction not in ("none", "mean", "sum"):
            raise ValueError(f"reduction={reduction!r}: expected 'none', 'mean' or 'sum'.")
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing={label_smoothing}: expected a number in [0, 1].")
        if not potential.on_simplex and (label_smoothing != 0 or ignore_index != -100):
            raise ValueError(
                f"label_smoothing={label_smoothing} and ignore_index={ignore_index} need class "
                f"targets, but {potential!r} is not on the simplex: leave them out, or smooth the "
                "targets yourself."
            )
        self.potential = potential
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.reduction = reduction

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of the layouts that the class describes.

        Args:
            outputs: Floating-point outputs.
            targets: Class indices, probabilities or target values.

        Returns:
            A scalar, or one value per term for `reduction="none"`; float32 or wider.
        """
        view = _of_fenchel_young(self)
        view._check(outputs, targets)
        losses = view._row_losses(outputs.to(_working_dtype(outputs, targets)), targets)
        if self.reduction == "none":
            return losses.reshape(view._terms_shape(outputs))
        return losses.sum() / view._divisor(outputs, targets).clamp(min=1)

    def extra_repr(self) -> str:
        """Return the arguments, for `repr`."""
        smoothing = f", label_smoothing={self.label_smoothing}" if self.label_smoothing else ""
        return f"{self.potential!r}{smoothing}, reduction={self.reduction!r}"


class SoftmaxLoss(FenchelYoungLoss):
    """Kullback-Leibler divergence of the softmax of the outputs from the targets.

    torch's cross-entropy less the entropy of the (smoothed) targets; the same for hard targets.
    Layouts, arguments and errors: `FenchelYoungLoss` with the potential `Softmax`.

    Example:
        >>> import torch
        >>> from conjopt.losses import SoftmaxLoss
        >>> outputs = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
        >>> SoftmaxLoss(label_smoothing=0.1)(outputs, torch.tensor([0, 1]))
        tensor(0.0966)
        >>> torch.nn.CrossEntropyLoss(label_smoothing=0.1)(outputs, torch.tensor([0, 1]))
        tensor(0.2951)
    """

    def __init__(
        self, *, ignore_index: int = -100, label_smoothing: float = 0.0, reduction: str = "mean"
    ) -> None:
        super().__init__(
            Softmax(),
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            reduction=reduction,
        )


class SquaredLoss(FenchelYoungLoss):
    """Half the squared error of a sample, summed over its coordinates.

    The mean over samples is `k / 2` times torch's `MSELoss`. Layouts and errors:
    `FenchelYoungLoss` with the potential `Squared`.

    Example:
        >>> import torch
        >>> from conjopt.losses import SquaredLoss
        >>> SquaredLoss()(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.zeros(2, 2))
        tensor(6.2500)
    """

    def __init__(self, *, reduction: str = "mean") -> None:
        super().__init__(Squared(), reduction=reduction)


class LogisticLoss(FenchelYoungLoss):
    """Binary cross-entropy of a sample, summed over its coordinates, less the targets' entropy.

    The mean over samples is `k` times torch's `BCEWithLogitsLoss` for hard targets. Layouts and
    errors: `FenchelYoungLoss` with the potential `Logistic`.

    Example:
        >>> import torch
        >>> from conjopt.losses import LogisticLoss
        >>> LogisticLoss()(torch.tensor([[0.0, 2.0]]), torch.tensor([[0.0, 1.0]]))
        tensor(0.8201)
    """

    def __init__(self, *, reduction: str = "mean") -> None:
        super().__init__(Logistic(), reduction=reduction)


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
        total, divisor = self._mass(outputs, targets).sum(), self._divisor(outputs, targets)
        return torch.where((total > 0) & (divisor > 0), total / divisor, 1).detach()

    def offset(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the part that no output can change, shape `()`; 0 if nothing counts.

        It is the weighted entropy of the targets in the criterion's units.
        """
        self._check(outputs, targets)
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

    @abc.abstractmethod
    def _check(self, outputs: Tensor, targets: Tensor) -> None: ...

    def _row_losses(self, outputs: Tensor, targets: Tensor) -> Tensor:  # (R,) mass times loss
        losses = self.potential.loss(self.points(outputs, targets), self.rows(outputs))
        mass = self._mass(outputs, targets).detach()
        return mass * torch.where(mass > 0, losses, 0)


def potential_of(criterion: nn.Module) -> PotentialOf:
    """Recognise a criterion as weighted Fenchel-Young losses of one potential.

    Args:
        criterion: `torch.nn.CrossEntropyLoss`, `MSELoss`, `BCEWithLogitsLoss`, a
            `FenchelYoungLoss`, or a subclass of one of these that does not override `forward`.

    Returns:
        The potential with scale, offset, rows, weights and points of a batch.

    Raises:
        TypeError: For a criterion that is not recognised.
        ValueError: For `reduction="none"`, and for negative class or element weights.

    Reference:
        docs/theory.md, section 0: autograd's output gradient is `scale * weights_r * e_r`.

    Example:
        >>> import torch
        >>> from conjopt.losses import potential_of
        >>> view = potential_of(torch.nn.CrossEntropyLoss(label_smoothing=0.1))
        >>> outputs, targets = torch.zeros(3, 2), torch.tensor([0, 1, -100])
        >>> view.potential, view.weights(outputs, targets)
        (Softmax(), tensor([0.5000, 0.5000, 0.0000]))
        >>> view.scale(outputs, targets), view.offset(outputs, targets)
        (tensor(1.), tensor(0.1985))
    """
    forward = getattr(getattr(criterion, "forward", None), "__func__", None)  # as patched, if it is
    kind = next((k for k in _RECOGNISED if isinstance(criterion, k) and forward is k.forward), None)
    if kind is None:
        raise TypeError(
            f"The criterion {criterion!r} is not recognised: expected an instance of "
            f"{', '.join(k.__name__ for k in _RECOGNISED)} that does not override forward. Use one "
            "of these, or observe the outputs and targets explicitly with `optimizer.observe`."
        )
    if criterion.reduction == "none":
        raise ValueError(
            f"The criterion {criterion!r} has reduction='none', so how its terms are weighed is "
            "not known: use reduction='mean' or 'sum', or observe the outputs and targets "
            "explicitly with `optimizer.observe`."
        )
    for name in ("weight", "pos_weight"):
        weight = getattr(criterion, name, None)
        if weight is not None and bool((weight < 0).any()):
            raise ValueError(
                f"The criterion's {name} has negative entries: its loss is no weighted mean. Use "
                "weights that are at least 0."
            )
    return _RECOGNISED[kind](criterion)


class _ClassTargets(PotentialOf):
    """Class layouts on the simplex: row `r` has coefficients `a_rc` and mass `sum_c a_rc`."""

    def rows(self, outputs_like: Tensor) -> Tensor:
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
                "(N, d1, ...) or floating-point probabilities of the outputs' shape. Move the "
                "classes to dimension 1."
            )

    def _divisor(self, outputs: Tensor, targets: Tensor) -> Tensor:
        weight = self._class_weight(outputs, targets)
        if self.criterion.reduction != "mean":
            return weight.new_ones(())
        if targets.is_floating_point():
            return weight.new_full((), self._terms_shape(outputs).numel())
        return self._gather(weight, targets).sum()

    def _row_losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        hard = not targets.is_floating_point() and not self.criterion.label_smoothing
        if hard and self.potential == Softmax():  # without an (R, C) matrix of targets
            skip = self.criterion.ignore_index
            losses = F.cross_entropy(outputs, targets.long(), ignore_index=skip, reduction="none")
            return losses.reshape(-1)
        return super()._row_losses(outputs, targets)

    def _class_weight(self, outputs: Tensor, targets: Tensor) -> Tensor:  # (C,)
        dtype = _working_dtype(outputs, targets)
        weight = getattr(self.criterion, "weight", None)
        if weight is None:
            weight = outputs.new_ones(outputs.shape[min(outputs.ndim - 1, 1)])
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
        return weight * ((1 - smoothing) * shares + smoothing / len(weight))

    def _mass(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if targets.is_floating_point():
            return self._coefficients(outputs, targets).sum(-1)
        return self._gather(self._mass_by_class(outputs, targets), targets)

    def _mass_by_class(self, outputs: Tensor, targets: Tensor) -> Tensor:  # (C,)
        weight, smoothing = self._class_weight(outputs, targets), self.criterion.label_smoothing
        return (1 - smoothing) * weight + smoothing * weight.mean()

    def _entropy(self, outputs: Tensor, targets: Tensor) -> Tensor:
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
        return outputs.new_full((), count, dtype=_working_dtype(outputs, targets))

    def _mass(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self._points(outputs, targets).new_ones(math.prod(outputs.shape[:1]))

    def _entropy(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return torch.zeros_like(self._mass(outputs, targets))

    def _points(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.rows(targets).to(_working_dtype(outputs, targets))


class _MeanSquaredError(_ValueTargets):
    def _mass(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return 2 * super()._mass(outputs, targets)  # (f - y)^2 = 2 l


class _BinaryCrossEntropy(_ValueTargets):
    """Rows are single elements when element or positive weights tell the elements apart."""

    @property
    def _weighted(self) -> bool:
        return self.criterion.weight is not None or self.criterion.pos_weight is not None

    def rows(self, outputs_like: Tensor) -> Tensor:
        return outputs_like.reshape(-1, 1) if self._weighted else super().rows(outputs_like)

    def _coefficients(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the coefficients of `-log p` and of `-log(1 - p)`, of the outputs' shape."""
        y = targets.to(_working_dtype(outputs, targets))
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


class _FenchelYoungClasses(_ClassTargets):
    def _entropy(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return torch.zeros_like(self._mass(outputs, targets))


class _FenchelYoungValues(_ValueTargets):
    def _divisor(self, outputs: Tensor, targets: Tensor) -> Tensor:
        mass = self._mass(outputs, targets)
        return mass.sum() if self.criterion.reduction == "mean" else mass.new_ones(())


def _of_fenchel_young(criterion: FenchelYoungLoss) -> PotentialOf:
    on_simplex = criterion.potential.on_simplex
    kind = _FenchelYoungClasses if on_simplex else _FenchelYoungValues
    return kind(criterion.potential, criterion)


_RECOGNISED: dict[type[nn.Module], Callable[[Any], PotentialOf]] = {
    nn.CrossEntropyLoss: lambda criterion: _ClassTargets(Softmax(), criterion),
    nn.MSELoss: lambda criterion: _MeanSquaredError(Squared(), criterion),
    nn.BCEWithLogitsLoss: lambda criterion: _BinaryCrossEntropy(Logistic(), criterion),
    FenchelYoungLoss: _of_fenchel_young,
}


def _working_dtype(outputs: Tensor, targets: Tensor) -> torch.dtype:
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
