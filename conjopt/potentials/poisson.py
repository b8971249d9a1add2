"""The potential of counts and rates (docs/theory.md, section 0)."""

from typing import final

import torch
from torch import Tensor

from conjopt.potentials.base import (
    Potential,
    positive_minimum,
    relative_entropy,
    relative_entropy_to,
)


@final
class Poisson(Potential):
    """The potential of counts on `R_+^k`: `sum_j y_j log y_j - y_j`, link `exp`.

    Outputs are logarithms of rates. The loss is half the Poisson deviance, that is torch's
    `PoissonNLLLoss` less its value at the rate `y`. The link has no Lipschitz constant.

    Reference:
        docs/theory.md, section 0.

    Example:
        >>> import torch
        >>> from conjopt.potentials import Poisson
        >>> poisson, f = Poisson(), torch.tensor([0.0, 1.0])
        >>> poisson.link(f)
        tensor([1.0000, 2.7183])
        >>> poisson.loss(torch.tensor([1.0, 4.0]), f)
        tensor(0.2635)
    """

    separable = True
    domain = "finite numbers that are at least 0"

    def value(self, y: Tensor) -> Tensor:
        """Return `sum_j y_j log y_j - y_j`, `(..., k) -> (...)`."""
        return -(torch.special.entr(y) + y).sum(-1)

    def conjugate(self, f: Tensor) -> Tensor:
        """Return `sum_j exp f_j`, `(..., k) -> (...)`."""
        return f.exp().sum(-1)

    def link(self, f: Tensor) -> Tensor:
        """Return the rates `exp(f)`, `(..., k) -> (..., k)`."""
        return f.exp()

    def hessian_product(self, f: Tensor, v: Tensor) -> Tensor:
        """Return `exp(f) v`, `(..., k) -> (..., k)`."""
        return f.exp() * v

    def loss(self, y: Tensor, f: Tensor) -> Tensor:
        """Return `sum_j exp f_j - y_j - y_j (f_j - log y_j)`, `(..., k), (..., k) -> (...)`."""
        return relative_entropy(y, torch.where(y > 0, y, 1).log(), f).sum(-1)

    def divergence(self, y: Tensor, mean: Tensor) -> Tensor:
        """Return `sum_j y_j log(y_j / mean_j) - y_j + mean_j`, `(..., k), (..., k) -> (...)`."""
        return relative_entropy_to(y, mean).sum(-1)

    def contains(self, y: Tensor) -> Tensor:
        """Return whether all coordinates are finite and at least 0, `(..., k) -> (...)`."""
        return (torch.isfinite(y) & (y >= 0)).all(-1)

    def _bounds(
        self, norm: Tensor, target: Tensor, prediction: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        # A coordinate loses y h(e / y), h(t) = t - log(1 + t); as a function of e^2 this is concave
        # for e > 0, less for greater y, and convex for e < 0: so the extremes put the residual on
        # one coordinate, but for the zero targets, which lose e itself.
        norm, most = torch.broadcast_tensors(norm, target.amax(-1))
        lower = _excess(norm, most)
        zeros, least = (target == 0).sum(-1).to(norm.dtype), positive_minimum(target)
        edge = least * (1 - 8 * torch.finfo(norm.dtype).eps)
        short = torch.where(norm < edge, _excess(-norm, least), torch.inf)
        upper = zeros.sqrt() * norm + torch.where(least == torch.inf, 0, short)
        if prediction is not None:
            square = (prediction - target).square()
            lower = torch.maximum(lower, _ratio(square, 2 * torch.maximum(target, prediction)))
            upper = torch.minimum(upper, _ratio(square, prediction))
        return lower, upper


def _excess(e: Tensor, y: Tensor) -> Tensor:
    """Return `e - y log(1 + e / y)`, the loss of one coordinate; `e` where `y` is 0."""
    positive = y > 0
    t = torch.where(positive, e, 0) / torch.where(positive, y, 1)
    return torch.where(positive, y * (t - t.clamp(min=-1).log1p()), e)


def _ratio(square: Tensor, size: Tensor) -> Tensor:
    return torch.where(square > 0, square / size, 0).sum(-1)
