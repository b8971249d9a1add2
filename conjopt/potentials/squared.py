"""The squared Euclidean potential of regression (docs/theory.md, section 0)."""

from typing import final

import torch
from torch import Tensor

from conjopt.potentials.base import Potential


@final
class Squared(Potential):
    """Half the squared norm on `R^k`: `Phi(y) = ||y||^2 / 2`, link the identity, 1-Lipschitz.

    Its loss is `||y - f||^2 / 2`.

    Reference:
        docs/theory.md, section 0.

    Example:
        >>> import torch
        >>> from conjopt.potentials import Squared
        >>> Squared().loss(torch.tensor([1.0, 2.0]), torch.tensor([4.0, 6.0]))
        tensor(12.5000)
    """

    smoothness = 1.0
    separable = True
    domain = "finite numbers"

    def value(self, y: Tensor) -> Tensor:
        """Return `||y||^2 / 2`, `(..., k) -> (...)`."""
        return y.square().sum(-1) / 2

    def conjugate(self, f: Tensor) -> Tensor:
        """Return `||f||^2 / 2`, `(..., k) -> (...)`."""
        return f.square().sum(-1) / 2

    def link(self, f: Tensor) -> Tensor:
        """Return `f`."""
        return f

    def hessian_product(self, f: Tensor, v: Tensor) -> Tensor:
        """Return `v`, broadcast with `f`."""
        return torch.broadcast_tensors(f, v)[1]

    def loss(self, y: Tensor, f: Tensor) -> Tensor:
        """Return `||y - f||^2 / 2`, `(..., k), (..., k) -> (...)`."""
        return (y - f).square().sum(-1) / 2

    def divergence(self, y: Tensor, mean: Tensor) -> Tensor:
        """Return `||y - mean||^2 / 2`, `(..., k), (..., k) -> (...)`."""
        return (y - mean).square().sum(-1) / 2

    def contains(self, y: Tensor) -> Tensor:
        """Return whether all coordinates are finite, `(..., k) -> (...)`."""
        return torch.isfinite(y).all(-1)

    def _bounds(
        self, norm: Tensor, target: Tensor, prediction: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        exact = super()._bounds(norm, target, prediction)[0]
        return exact, exact
