"""The binary entropy potential of independent sigmoids (docs/theory.md, section 0)."""

from typing import final

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from conjopt.potentials.base import (
    Potential,
    positive_minimum,
    relative_entropy,
    relative_entropy_to,
    surprise,
    surprise_below,
)


@final
class Logistic(Potential):
    """Negative binary entropy on `[0, 1]^k`: `sum_j y_j log y_j + (1 - y_j) log(1 - y_j)`.

    The link is the sigmoid, 1/4-Lipschitz. Its loss is binary cross-entropy, summed over the
    coordinates, less the binary entropy of `y`.

    Reference:
        docs/theory.md, section 0.

    Example:
        >>> import torch
        >>> from conjopt.potentials import Logistic
        >>> logistic, f = Logistic(), torch.tensor([0.0, 2.0])
        >>> logistic.link(f)
        tensor([0.5000, 0.8808])
        >>> logistic.loss(torch.tensor([0.5, 1.0]), f)
        tensor(0.1269)
    """

    smoothness = 0.25
    separable = True
    domain = "numbers in [0, 1]"

    def value(self, y: Tensor) -> Tensor:
        """Return `sum_j y_j log y_j + (1 - y_j) log(1 - y_j)`, `(..., k) -> (...)`."""
        return (torch.special.xlog1py(1 - y, -y) - torch.special.entr(y)).sum(-1)

    def conjugate(self, f: Tensor) -> Tensor:
        """Return `sum_j log(1 + exp f_j)`, `(..., k) -> (...)`."""
        return -logsigmoid(-f).sum(-1)  # torch's softplus drops exp(-f) above f = 20

    def link(self, f: Tensor) -> Tensor:
        """Return the sigmoid of `f`, `(..., k) -> (..., k)`."""
        return torch.sigmoid(f)

    def hessian_product(self, f: Tensor, v: Tensor) -> Tensor:
        """Return `sigmoid(f) sigmoid(-f) v`, `(..., k) -> (..., k)`."""
        return torch.sigmoid(f) * torch.sigmoid(-f) * v

    def loss(self, y: Tensor, f: Tensor) -> Tensor:
        """Return `sum_j KL(y_j || sigmoid(f_j))`, `(..., k), (..., k) -> (...)`."""
        log_y = torch.where(y > 0, y, 1).log()
        log_rest = torch.where(y < 1, -y, 0).log1p()
        ones = relative_entropy(y, log_y, logsigmoid(f))
        zeros = relative_entropy(1 - y, log_rest, logsigmoid(-f))
        return (ones + zeros).sum(-1)

    def divergence(self, y: Tensor, mean: Tensor) -> Tensor:
        """Return `sum_j KL(y_j || mean_j)`, `(..., k), (..., k) -> (...)`."""
        return (relative_entropy_to(y, mean) + relative_entropy_to(1 - y, 1 - mean)).sum(-1)

    def contains(self, y: Tensor) -> Tensor:
        """Return whether all coordinates lie in `[0, 1]`, `(..., k) -> (...)`."""
        return ((y >= 0) & (y <= 1)).all(-1)

    def _bounds(
        self, norm: Tensor, target: Tensor, prediction: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        floor = super()._bounds(norm, target, prediction)[0]
        margin = torch.minimum(target, 1 - target)  # of a coordinate from the ends of [0, 1]
        hard = margin == 0
        # Hard and soft coordinates are bounded apart, each group as if it held the whole residual:
        # the exact supremum of the hard ones, and for soft ones the row of full support at k = 2.
        room = positive_minimum(margin) - norm
        soft = torch.where(room > 0, norm.square() / room, torch.inf)
        upper = _hard_supremum(norm, hard.sum(-1)) + torch.where(hard.all(-1), 0, soft)
        if target.shape[-1] == 1:
            single = hard.all(-1)
            floor = torch.where(single, surprise_below(norm), floor)
        if prediction is not None:
            spread = prediction * (1 - prediction)
            ratio = (prediction - target).square() / spread
            upper = torch.minimum(upper, torch.where(spread > 0, ratio, torch.inf).log1p().sum(-1))
        return floor, upper


def _hard_supremum(norm: Tensor, count: Tensor) -> Tensor:
    """Return the greatest loss of `count` coordinates with hard targets and residuals `s_j`.

    It is `max sum_j -log(1 - s_j)` over `sum_j s_j^2 = norm^2`. A stationary point has
    `s (1 - s)` equal for all coordinates, and at most one coordinate above 1/2 at a maximum: so
    all are equal, or one is `s` and the others are `1 - s`.
    """
    m = count.clamp(min=1).to(norm.dtype)
    most_norm = 1 - 8 * torch.finfo(norm.dtype).eps
    equal = m * surprise(norm / m.sqrt())
    discriminant = m * norm.square() - (m - 1)
    s = (m - 1 + discriminant.clamp(min=0).sqrt()) / m
    apart = surprise(s) - torch.xlogy(m - 1, s)
    most = torch.where(discriminant >= 0, torch.maximum(equal, apart), equal)
    return torch.where(count == 0, 0, torch.where(norm < most_norm, most, torch.inf))
