"""What every potential offers: `Phi`, `Phi*`, link, output Hessian (docs/theory.md, section 0)."""

import abc

import torch
from torch import Tensor


class Potential(abc.ABC):
    """A closed convex potential `Phi` on `R^k` with conjugate `Phi*(f) = sup_y <y, f> - Phi(y)`.

    The last dimension of every tensor holds the `k` coordinates, leading dimensions are batch.
    `value` and `conjugate` define a potential; the rest follows by automatic differentiation, and
    the potentials of this package override it by closed forms. Nothing is checked and nothing is
    clamped: outside of its domain `value` may be any number or NaN.

    Attributes:
        smoothness: `beta`, a constant for which the link is `beta`-Lipschitz in the Euclidean
            norm, or `None` where there is none or it is not known.
        on_simplex: Whether the domain is the probability simplex. Residuals then lie in the
            tangent space `V` of vectors that sum to zero, and the losses take class targets.

    Reference:
        docs/theory.md, section 0.

    Example:
        >>> import torch
        >>> from conjopt.potentials import Potential
        >>> class Quartic(Potential):
        ...     def value(self, y):
        ...         return 0.75 * y.abs().pow(4 / 3).sum(-1)
        ...     def conjugate(self, f):
        ...         return 0.25 * f.pow(4).sum(-1)
        >>> quartic, f = Quartic(), torch.tensor([2.0, -1.0])
        >>> quartic.link(f)
        tensor([ 8., -1.])
        >>> quartic.hessian_product(f, torch.tensor([1.0, 1.0]))
        tensor([12.,  3.])
    """

    smoothness: float | None = None
    on_simplex: bool = False

    @abc.abstractmethod
    def value(self, y: Tensor) -> Tensor:
        """Return `Phi(y)`.

        Args:
            y: Points of the domain of `Phi`, shape `(..., k)`.

        Returns:
            Shape `(...)`.
        """

    @abc.abstractmethod
    def conjugate(self, f: Tensor) -> Tensor:
        """Return `Phi*(f)`.

        Args:
            f: Outputs (logits, natural parameters), shape `(..., k)`.

        Returns:
            Shape `(...)`.
        """

    def link(self, f: Tensor) -> Tensor:
        """Return the prediction `yhat = grad Phi*(f)`.

        Args:
            f: Outputs, shape `(..., k)`.

        Returns:
            Points of the domain of `Phi`, shape `(..., k)`.
        """
        return torch.func.grad(lambda outputs: self.conjugate(outputs).sum())(f)

    def hessian_product(self, f: Tensor, v: Tensor) -> Tensor:
        """Return `H(f) v`, `H(f)` the Jacobian of the link.

        Args:
            f: Outputs, shape `(..., k)`.
            v: Output changes, shape `(..., k)`.

        Returns:
            Shape `(..., k)`.
        """
        f, v = torch.broadcast_tensors(f, v)
        return torch.func.vjp(self.link, f)[1](v)[0]  # H is symmetric

    def tangent_projection(self, v: Tensor) -> Tensor:
        """Project orthogonally on the tangent space `V`, which holds every residual.

        Args:
            v: Vectors, shape `(..., k)`.

        Returns:
            Shape `(..., k)`: `v` less its mean on the simplex, else `v`.
        """
        return v - v.mean(-1, keepdim=True) if self.on_simplex else v

    def loss(self, y: Tensor, f: Tensor) -> Tensor:
        """Return the Fenchel-Young loss `Phi(y) + Phi*(f) - <y, f>`, 0 iff `y` is the link of `f`.

        Args:
            y: Targets, points of the domain of `Phi`, shape `(..., k)`.
            f: Outputs, shape `(..., k)`.

        Returns:
            Shape `(...)`, non-negative up to rounding.
        """
        return self.value(y) + self.conjugate(f) - (y * f).sum(-1)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in vars(self).items())})"

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash(type(self))


def relative_entropy(y: Tensor, log_y: Tensor, log_p: Tensor) -> Tensor:
    """Return `p - y - y log(p / y) >= 0` elementwise, without cancellation where `p` is near `y`.

    Summed over a distribution it is the Kullback-Leibler divergence. With `d = log(p / y)` a term
    is `y (exp(d) - 1 - d)`, whose rounding error shrinks with `d`.

    Args:
        y: Target probabilities; where they are 0 the value of `log_y` is not used.
        log_y: Their logarithms.
        log_p: Logarithms of the predicted probabilities; `-inf` is allowed where `y` is 0.

    Returns:
        The common shape of the arguments.
    """
    d = torch.where(y > 0, log_p - log_y, 0)
    near = (y > 0) & (d.abs() < 1)
    d_near = torch.where(near, d, 0)  # keeps overflow out of the branch that is not taken
    return torch.where(near, y * (torch.expm1(d_near) - d_near), log_p.exp() - y - y * d)
