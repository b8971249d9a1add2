"""Fenchel-Young losses as modules, drop-in for torch's (docs/theory.md, section 0)."""

from __future__ import annotations

from torch import Tensor, nn

from conjopt.losses.reading import of_fenchel_young, working_dtype
from conjopt.potentials import Logistic, Potential, Softmax, Squared

__all__ = ["FenchelYoungLoss", "LogisticLoss", "SoftmaxLoss", "SquaredLoss"]


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
        view = of_fenchel_young(self)
        view._check(outputs, targets)
        losses = view._row_losses(outputs.to(working_dtype(outputs, targets)), targets)
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
