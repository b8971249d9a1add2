"""The losses of the package's potentials, by name."""

from __future__ import annotations

from torch import Tensor

from conjopt.losses.fenchel_young import FenchelYoungLoss
from conjopt.potentials import Entmax, Logistic, Poisson, Softmax, Sparsemax, Squared

__all__ = [
    "EntmaxLoss",
    "LogisticLoss",
    "PoissonLoss",
    "SoftmaxLoss",
    "SparsemaxLoss",
    "SquaredLoss",
]


class SoftmaxLoss(FenchelYoungLoss):
    """Kullback-Leibler divergence of the softmax of the outputs from the targets.

    torch's cross-entropy less the entropy of the (smoothed) targets: the same for hard targets,
    and the same for all with `include_target_entropy=True`. Layouts, arguments and errors:
    `FenchelYoungLoss` with the potential `Softmax`.

    Example:
        >>> import torch
        >>> from conjopt.losses import SoftmaxLoss
        >>> outputs = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
        >>> SoftmaxLoss(label_smoothing=0.1)(outputs, torch.tensor([0, 1]))
        tensor(0.0966)
        >>> torch.nn.CrossEntropyLoss(label_smoothing=0.1)(outputs, torch.tensor([0, 1]))
        tensor(0.2951)
        >>> loss = SoftmaxLoss(label_smoothing=0.1, include_target_entropy=True)
        >>> loss(outputs, torch.tensor([0, 1]))
        tensor(0.2951)
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        *,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        include_target_entropy: bool = False,
    ) -> None:
        super().__init__(
            Softmax(),
            weight=weight,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            reduction=reduction,
            include_target_entropy=include_target_entropy,
        )


class SparsemaxLoss(FenchelYoungLoss):
    """The sparsemax loss: half a squared distance to the predicted distribution, and a margin.

    It is exactly 0 once the target's output exceeds the others by 1, and predictions are sparse.
    Layouts, arguments and errors: `FenchelYoungLoss` with the potential `Sparsemax`.

    Reference:
        Martins and Astudillo, *From Softmax to Sparsemax*, ICML 2016.

    Example:
        >>> import torch
        >>> from conjopt.losses import SparsemaxLoss
        >>> outputs = torch.tensor([[2.0, 0.0], [0.0, 0.5]])
        >>> SparsemaxLoss(reduction="none")(outputs, torch.tensor([0, 1]))
        tensor([0.0000, 0.0625])
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        *,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        include_target_entropy: bool = False,
    ) -> None:
        super().__init__(
            Sparsemax(),
            weight=weight,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            reduction=reduction,
            include_target_entropy=include_target_entropy,
        )


class EntmaxLoss(FenchelYoungLoss):
    """The loss of `Entmax`, between softmax (order near 1) and sparsemax (order 2).

    It is exactly 0 once the target's output exceeds the others by `1 / (order - 1)`. Layouts,
    arguments and errors: `FenchelYoungLoss` with the potential `Entmax(order)`.

    Args:
        order: The order, in (1, 2].
        weight: As in `FenchelYoungLoss`, like all that follow.
        ignore_index: Class index of the tokens that do not count.
        label_smoothing: Share of the uniform distribution mixed into the targets.
        reduction: `"mean"`, `"sum"` or `"none"`.
        include_target_entropy: Add the Tsallis entropy of the targets.

    Reference:
        Peters, Niculae and Martins, *Sparse Sequence-to-Sequence Models*, ACL 2019.

    Example:
        >>> import torch
        >>> from conjopt.losses import EntmaxLoss
        >>> outputs = torch.tensor([[2.0, 0.0], [0.0, 0.5]])
        >>> EntmaxLoss(1.5, reduction="none")(outputs, torch.tensor([0, 1]))
        tensor([0.0000, 0.1844])
    """

    def __init__(
        self,
        order: float = 1.5,
        *,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        include_target_entropy: bool = False,
    ) -> None:
        super().__init__(
            Entmax(order),
            weight=weight,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            reduction=reduction,
            include_target_entropy=include_target_entropy,
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

    def __init__(self, weight: Tensor | None = None, *, reduction: str = "mean") -> None:
        super().__init__(Squared(), weight=weight, reduction=reduction)


class LogisticLoss(FenchelYoungLoss):
    """Binary cross-entropy of a sample, summed over its coordinates, less the targets' entropy.

    The mean over samples is `k` times torch's `BCEWithLogitsLoss` for hard targets, and for soft
    ones with `include_target_entropy=True`. Layouts and errors: `FenchelYoungLoss` with the
    potential `Logistic`.

    Example:
        >>> import torch
        >>> from conjopt.losses import LogisticLoss
        >>> LogisticLoss()(torch.tensor([[0.0, 2.0]]), torch.tensor([[0.0, 1.0]]))
        tensor(0.8201)
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        *,
        reduction: str = "mean",
        include_target_entropy: bool = False,
    ) -> None:
        super().__init__(
            Logistic(),
            weight=weight,
            reduction=reduction,
            include_target_entropy=include_target_entropy,
        )


class PoissonLoss(FenchelYoungLoss):
    """Half the Poisson deviance of counts, of a sample, summed over its coordinates.

    The outputs are logarithms of rates. The mean over samples is `k` times torch's
    `PoissonNLLLoss` if `include_target_entropy=True`. Layouts and errors: `FenchelYoungLoss` with
    the potential `Poisson`.

    Example:
        >>> import torch
        >>> from conjopt.losses import PoissonLoss
        >>> outputs, counts = torch.tensor([[0.0], [1.0]]), torch.tensor([[1.0], [4.0]])
        >>> PoissonLoss()(outputs, counts)
        tensor(0.1317)
        >>> PoissonLoss(include_target_entropy=True)(outputs, counts)
        tensor(-0.1409)
        >>> torch.nn.PoissonNLLLoss()(outputs, counts)
        tensor(-0.1409)
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        *,
        reduction: str = "mean",
        include_target_entropy: bool = False,
    ) -> None:
        super().__init__(
            Poisson(),
            weight=weight,
            reduction=reduction,
            include_target_entropy=include_target_entropy,
        )
