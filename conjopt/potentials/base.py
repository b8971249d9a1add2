"""What every potential offers: `Phi`, `Phi*`, link, output Hessian (docs/theory.md, section 0)."""

import abc
import math
from typing import NamedTuple

import torch
from torch import Tensor


class LossBounds(NamedTuple):
    """The least and the greatest loss that a residual norm leaves possible (Thm 2.2).

    A pair: `lower` is at most the loss, `upper` at least, shape `(...)` each; `upper` is infinite
    where the norm does not bound the loss.

    Reference:
        docs/theory.md, Thm 2.2.

    Example:
        >>> import torch
        >>> from conjopt.potentials import Squared
        >>> lower, upper = Squared().loss_bounds(torch.tensor(2.0), torch.tensor([1.0, 0.0]))
        >>> lower, upper
        (tensor(2.), tensor(2.))
    """

    lower: Tensor
    """At most the loss."""
    upper: Tensor
    """At least the loss."""


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
        domain: The domain of `Phi` in words, for messages.
        separable: Whether `Phi` is a sum over coordinates of one function of one coordinate.

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
    separable: bool = False
    domain: str = "a finite value of the potential"

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
        y, f = torch.broadcast_tensors(y, f)
        value, conjugate = self.value(y), self.conjugate(f)
        if not value.shape == conjugate.shape == f.shape[:-1]:
            raise ValueError(
                f"{self!r}: value and conjugate returned shapes {tuple(value.shape)} and "
                f"{tuple(conjugate.shape)} for points of shape {tuple(f.shape)}: expected "
                "(..., k) -> (...), a sum over the last dimension."
            )
        return value + conjugate - (y * f).sum(-1)

    def class_loss(self, index: Tensor, f: Tensor) -> Tensor:
        """Return the loss for one-hot targets that are given by their class.

        Args:
            index: Classes, integers in `[0, k)`, shape `(...)`.
            f: Outputs, shape `(..., k)`.

        Returns:
            Shape `(...)`.
        """
        classes = torch.arange(f.shape[-1], device=f.device)
        return self.loss((index.unsqueeze(-1) == classes).to(f.dtype), f)

    def divergence(self, y: Tensor, mean: Tensor) -> Tensor:
        """Return the Bregman divergence `Phi(y) - Phi(mean) - <grad Phi(mean), y - mean>`.

        Its mean over `y` is the generalized entropy when `mean` is the mean of `y` (Def 1.1).

        Args:
            y: Points of the domain of `Phi`, shape `(..., k)`.
            mean: Points of the domain; coordinates on its boundary are shared with `y`, as a mean
                shares them with the points it is taken of. Shape `(..., k)`.

        Returns:
            Shape `(...)`, non-negative up to rounding and 0 where the arguments are equal.
        """
        y, mean = torch.broadcast_tensors(y, mean)
        slope = torch.func.grad(lambda points: self.value(points).sum())(mean)
        step = y - mean
        return self.value(y) - self.value(mean) - torch.where(step == 0, 0, slope * step).sum(-1)

    def generalized_entropy(self, y: Tensor) -> Tensor:
        """Return `-Phi(y)`, the generalized entropy of a prediction.

        Where `Phi` is 0 at hard targets (the potentials on the simplex, and `Logistic`), this is
        `Ent(Y)` of Def 1.1 for hard targets `Y` of mean `y`: Shannon's entropy for `Softmax`, the
        Gini impurity over 2 for `Sparsemax`. The entropy of a law of other targets depends on more
        than its mean: `conjopt.entropy.generalized_entropy` takes the targets.

        Args:
            y: Points of the domain of `Phi`, shape `(..., k)`.

        Returns:
            Shape `(...)`.

        Example:
            >>> import torch
            >>> from conjopt.potentials import Softmax
            >>> Softmax().generalized_entropy(torch.tensor([0.5, 0.5]))
            tensor(0.6931)
        """
        return -self.value(y)

    def contains(self, y: Tensor) -> Tensor:
        """Return whether points lie in the domain of `Phi`.

        On the simplex their sum may be off by 0.01, or by the rounding of a shorter dtype.

        Args:
            y: Points, shape `(..., k)`.

        Returns:
            Booleans, shape `(...)`.
        """
        y = y if y.is_floating_point() else y.to(WORK)
        finite = torch.isfinite(y).all(-1)
        if not self.on_simplex:
            return finite & torch.isfinite(self.value(y.to(torch.promote_types(y.dtype, WORK))))
        # Generous, as mixtures are often computed in half precision before they come here.
        slack = max(0.01, math.sqrt(torch.finfo(y.dtype).eps))
        total = y.sum(-1, dtype=torch.promote_types(y.dtype, WORK))
        return finite & (y >= -slack).all(-1) & ((total - 1).abs() <= slack)

    def loss_bounds(
        self, residual_norm: Tensor, target: Tensor, *, prediction: Tensor | None = None
    ) -> LossBounds:
        """Bound the loss by the norm of its residual `e = yhat - y` (Thm 2.2).

        Args:
            residual_norm: `||e||`, shape `(...)`.
            target: Targets `y`, points of the domain of `Phi`, shape `(..., k)`.
            prediction: Predictions `yhat = link(f)`, shape `(..., k)`. Where they are given, the
                rows of the table that use them count too, and the bounds are tighter.

        Returns:
            Both bounds, shape `(...)`. The upper one is infinite where the norm bounds nothing.
            The norm is subtracted from 1 or from a target: next to that the bounds are off by
            rounding, relative to `eps exp(loss)`.
        """
        norm_dtype = torch.promote_types(target.dtype, WORK)
        residual_norm = torch.as_tensor(residual_norm, device=target.device).to(norm_dtype)
        lower, upper = self._bounds(residual_norm, target, prediction)
        if self.on_simplex and target.shape[-1] == 1:  # dim V = 0: there is nothing to lose
            lower, upper = torch.zeros_like(lower), torch.zeros_like(upper)
        return LossBounds(lower, upper)

    def _bounds(
        self, norm: Tensor, target: Tensor, prediction: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        norm = torch.broadcast_tensors(norm, target[..., 0])[0]
        floor = norm.square() / (2 * self.smoothness) if self.smoothness else 0 * norm
        return floor, torch.full_like(norm, torch.inf)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in vars(self).items())})"

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other) or vars(self).keys() != vars(other).keys():
            return False
        pairs = ((value, vars(other)[name]) for name, value in vars(self).items())
        return all(
            torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else bool(a == b)
            for a, b in pairs
        )

    def __hash__(self) -> int:
        return hash(type(self))


WORK = torch.float32


def positive_minimum(y: Tensor) -> Tensor:
    """Return the least positive coordinate, `(..., k) -> (...)`; infinite where there is none."""
    return torch.where(y > 0, y, torch.inf).amin(-1)


def largest_coordinate(norm: Tensor, k: int) -> Tensor:
    """Return `rho`: no coordinate of a vector in `R^k` that sums to 0 exceeds `rho`."""
    return norm * math.sqrt(max(k - 1, 0) / max(k, 1))


def surprise(r: Tensor) -> Tensor:
    """Return `-log(1 - r)`, infinite from `r = 1` on."""
    return torch.where(r < 1, -torch.log1p(-r.clamp(max=1)), torch.inf)


def surprise_below(r: Tensor) -> Tensor:
    """Return `-log(1 - r)` for a lower bound: where `r` is 1 by rounding it stays finite."""
    return -torch.log1p(-r.clamp(max=1 - 8 * torch.finfo(r.dtype).eps))


def relative_entropy_to(y: Tensor, p: Tensor) -> Tensor:
    """Return `p - y - y log(p / y) >= 0` elementwise from the points themselves.

    Where they are close it is more accurate than `relative_entropy`, which has their logarithms.
    """
    positive = y > 0
    base = torch.where(positive, y, 1)
    step = torch.where(positive, (p - y) / base, 0)
    near = step.abs() <= 0.5
    close = y * (torch.where(near, step, 0) - torch.where(near, step, 0).log1p())
    far = p - y - y * (p.log() - base.log())
    return torch.where(positive, torch.where(near, close, far), p)


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
