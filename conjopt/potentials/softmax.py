"""The Shannon potential of the softmax (docs/theory.md, section 0)."""

from typing import final

import torch
from torch import Tensor
from torch.nn import functional as F

from conjopt.potentials.base import (
    Potential,
    largest_coordinate,
    positive_minimum,
    relative_entropy,
    relative_entropy_to,
    surprise,
    surprise_below,
)


@final
class Softmax(Potential):
    """Negative Shannon entropy on the simplex: `Phi(y) = sum_j y_j log y_j`, link softmax.

    Its loss is the Kullback-Leibler divergence of the softmax of `f` from `y`, that is
    cross-entropy less the entropy of `y`. The link is 1/2-Lipschitz. Logits of `-inf` (masked
    classes) are fine in `loss` where the target is 0.

    Reference:
        docs/theory.md, section 0.

    Example:
        >>> import torch
        >>> from conjopt.potentials import Softmax
        >>> softmax, f = Softmax(), torch.tensor([0.0, 0.0, 2.0])
        >>> softmax.link(f)
        tensor([0.1065, 0.1065, 0.7870])
        >>> softmax.loss(torch.tensor([0.0, 0.0, 1.0]), f)
        tensor(0.2395)
        >>> softmax.smoothness
        0.5
    """

    smoothness = 0.5
    on_simplex = True
    domain = "probabilities that sum to 1 over the classes"

    def value(self, y: Tensor) -> Tensor:
        """Return `sum_j y_j log y_j`, `(..., k) -> (...)`."""
        return -torch.special.entr(y).sum(-1)

    def conjugate(self, f: Tensor) -> Tensor:
        """Return `log sum_j exp f_j`, `(..., k) -> (...)`."""
        return torch.logsumexp(f, -1)

    def link(self, f: Tensor) -> Tensor:
        """Return the softmax of `f`, `(..., k) -> (..., k)`."""
        return torch.softmax(f, -1)

    def hessian_product(self, f: Tensor, v: Tensor) -> Tensor:
        """Return `(diag(p) - p p^T) v` for `p = softmax(f)`, `(..., k) -> (..., k)`."""
        f, v = torch.broadcast_tensors(f, v)
        p = torch.softmax(f, -1)
        # H 1 = 0: measured from the likeliest class, v keeps its digits when p is nearly one-hot.
        v = v - v.gather(-1, f.argmax(-1, keepdim=True))
        return p * (v - (p * v).sum(-1, keepdim=True))

    def loss(self, y: Tensor, f: Tensor) -> Tensor:
        """Return `KL(y || softmax(f))`, `(..., k), (..., k) -> (...)`, without cancellation."""
        log_y = torch.where(y > 0, y, 1).log()
        return relative_entropy(y, log_y, torch.log_softmax(f, -1)).sum(-1)

    def class_loss(self, index: Tensor, f: Tensor) -> Tensor:
        """Return cross-entropy, `(...), (..., k) -> (...)`, without a matrix of targets."""
        losses = F.cross_entropy(
            f.reshape(-1, f.shape[-1]), index.reshape(-1).long(), reduction="none"
        )
        return losses.reshape(f.shape[:-1])

    def divergence(self, y: Tensor, mean: Tensor) -> Tensor:
        """Return `KL(y || mean)`, `(..., k), (..., k) -> (...)`."""
        return relative_entropy_to(y, mean).sum(-1)

    def _bounds(
        self, norm: Tensor, target: Tensor, prediction: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        lower = super()._bounds(norm, target, prediction)[0]
        hard = target.amax(-1) == 1
        lower = torch.where(hard, surprise_below(norm / 2**0.5), lower)
        # No coordinate of the residual exceeds rho, so yhat_j >= y_j - rho.
        slack = 8 * torch.finfo(norm.dtype).eps
        rho = largest_coordinate(norm, target.shape[-1])
        ratio = rho.unsqueeze(-1) / torch.where(target > 0, target, 1)
        upper = torch.where(target > 0, target * surprise(ratio), 0).sum(-1)
        upper = torch.where(positive_minimum(target) - rho > slack, upper, torch.inf)
        room = target.amin(-1) - rho  # only targets of full support have any
        upper = torch.where(room > slack, torch.minimum(upper, norm.square() / (2 * room)), upper)
        if prediction is not None:
            ratio = (prediction - target).square() / prediction
            ratio = torch.where(prediction > 0, ratio, torch.where(target > 0, torch.inf, 0))
            upper = torch.minimum(upper, ratio.sum(-1).log1p())
        return lower, upper
