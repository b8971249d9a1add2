"""The binary entropy potential of independent sigmoids (docs/theory.md, section 0)."""

from typing import final

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from conjopt.potentials.base import Potential, relative_entropy


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
