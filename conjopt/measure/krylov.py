"""Lanczos for symmetric operators that are only known by their products (Thm 2.6)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Ritz", "lanczos", "norm"]

ROUNDING = 8  # units of rounding of the operator's size that a residual bar is widened by


class Ritz(NamedTuple):
    """What `lanczos` finds of a symmetric operator, ascending.

    Attributes:
        values: Ritz values, shape `(..., s)`, `s = min(steps, n)`. Where the Krylov space ended
            earlier, the first entries repeat the least one.
        residuals: Within `residuals` of each of the `values` there is an eigenvalue, shape
            `(..., s)`.
        weights: Squared first components: the weights of the Gauss quadrature of the spectrum as
            the start sees it, shape `(..., s)`. They sum to 1, or to 0 for a start of 0.

    Reference:
        docs/theory.md, Thm 2.6.

    Example:
        >>> import torch
        >>> from conjopt.measure.spectrum import lanczos
        >>> ritz = lanczos(lambda v: 3 * v, torch.ones(4), steps=3)
        >>> ritz.values, ritz.weights.sum()
        (tensor([3., 3., 3.], dtype=torch.float64), tensor(1., dtype=torch.float64))
    """

    values: Tensor
    residuals: Tensor
    weights: Tensor


def lanczos(product: Callable[[Tensor], Tensor], start: Tensor, *, steps: int) -> Ritz:
    """Return the Ritz values of symmetric operators, from products with vectors alone.

    Each vector is made orthogonal to all before it, twice, so that no eigenvalue is found more
    often than it is there from this start (once, however often it is repeated in the operator).
    The recurrence is kept in float64, the vectors in their own dtype: `steps` of them are stored.
    Leading dimensions hold independent operators, that one call of `product` applies to all. The
    loop never waits for the device; the eigenvalues of the tridiagonal matrices do, once.

    Args:
        product: From `(..., n)` to `(..., n)`, linear and symmetric along the last dimension.
        start: Shape `(..., n)`, of any length; 0 gives 0.
        steps: Products, at least 1; no more than `n` are made.

    Returns:
        Ritz values with bars: the greatest is at most the greatest eigenvalue, the least at least
        the least, up to rounding.

    Raises:
        ValueError: For fewer than one step, a start without coordinates, a product of another
            shape or, on the CPU, one that is not finite; elsewhere NaN goes on to the results.

    Reference:
        docs/theory.md, Thm 2.6. G. H. Golub and C. F. Van Loan, Matrix Computations, 4th ed.,
        10.1 to 10.3.

    Example:
        >>> import torch
        >>> from conjopt.measure.spectrum import lanczos
        >>> diagonal = torch.tensor([[1.0, 2.0, 4.0], [0.0, 0.0, 5.0]])
        >>> lanczos(lambda v: diagonal * v, torch.ones(2, 3), steps=3).values.round(decimals=4)
        tensor([[1., 2., 4.],
                [0., 0., 5.]], dtype=torch.float64)
    """
    if steps < 1:
        raise ValueError(f"Got steps={steps}: expected at least 1 product; 15 is the default.")
    if not start.ndim or not start.shape[-1] or not start.is_floating_point():
        raise ValueError(
            f"Got a start of shape {tuple(start.shape)} and type {start.dtype}: expected a "
            "floating-point tensor (..., n) with n > 0."
        )
    *lead, n = start.shape
    steps = min(steps, n)
    eps = torch.finfo(start.dtype).eps
    basis = start.new_zeros(*lead, steps, n)
    length = norm(start)
    v = _over(start, length, length > 0)
    beta = scale = torch.zeros_like(length)
    alive = length > 0
    diagonal, off_diagonal, live = [], [], []
    for j in range(steps):
        basis[..., j, :] = v
        w = product(v)
        if w.shape != v.shape:
            raise ValueError(
                f"The product has shape {tuple(w.shape)}: expected that of the vectors, "
                f"{tuple(v.shape)}."
            )
        known = basis[..., : j + 1, :]
        along = (known @ w.unsqueeze(-1)).squeeze(-1)  # (..., j + 1)
        w = w - (along.unsqueeze(-2) @ known).squeeze(-2)
        again = (known @ w.unsqueeze(-1)).squeeze(-1)
        w = w - (again.unsqueeze(-2) @ known).squeeze(-2)
        alpha = along[..., -1].double() + again[..., -1].double()
        before, beta = beta, norm(w)
        live.append(alive)
        scale = torch.maximum(scale, alpha.abs() + before + beta)
        # What is left of a vector in an invariant subspace is rounding: the space ends there.
        alive = alive & (beta > ROUNDING * eps * scale)
        beta = torch.where(alive, beta, 0)
        v = _over(w, beta, alive)
        diagonal.append(alpha)
        off_diagonal.append(beta)
    stacked = [torch.stack(parts, -1) for parts in (diagonal, off_diagonal, live)]
    return _ritz(stacked[0], stacked[1], stacked[2], eps)


def _ritz(alpha: Tensor, beta: Tensor, live: Tensor, eps: float) -> Ritz:
    """Solve tridiagonal eigenproblems of size `s`, all arguments `(..., s)`."""
    size = (alpha.abs() + 2 * beta).amax(-1, keepdim=True)
    finite = torch.isfinite(size)
    if size.device.type == "cpu" and not finite.all():
        raise ValueError(
            "A product with the matrix is not finite: the outputs, their derivatives or the output "
            "Hessians overflow. Look for inf and nan in the inputs, the parameters and the outputs."
        )
    alpha, beta = torch.where(finite, alpha, 0), torch.where(finite, beta, 0)
    unit = torch.where(finite & (size > 0), size, 1)
    size = torch.where(finite, size, math.nan)
    # Steps after the end of the space are sorted below everything, apart from the rest.
    diagonal = torch.where(live, alpha / unit, -4.0)
    off = beta[..., :-1] / unit
    matrix = torch.diag_embed(diagonal) + torch.diag_embed(off, 1) + torch.diag_embed(off, -1)
    values, vectors = torch.linalg.eigh(matrix)
    over = values < -2
    least = torch.where(over, torch.inf, values).amin(-1, keepdim=True)
    least = torch.where(torch.isfinite(least), least, 0)
    values = torch.where(finite, torch.where(over, least, values) * unit, math.nan)
    residuals = (beta[..., -1:] * vectors[..., -1, :]).abs()
    residuals = torch.where(over, 0, residuals) + ROUNDING * eps * size
    weights = torch.where(over, 0, vectors[..., 0, :].square())
    return Ritz(values, residuals, weights)


def norm(v: Tensor) -> Tensor:
    """Return the Euclidean norms along the last dimension, in float64."""
    return torch.linalg.vector_norm(v, dim=-1, dtype=torch.float64)


def _over(v: Tensor, length: Tensor, positive: Tensor) -> Tensor:
    """Scale to unit length; 0 where that is not known."""
    unit = (v / torch.where(positive, length, 1).unsqueeze(-1).to(v.dtype)).to(v.dtype)
    return torch.where(positive.unsqueeze(-1), unit, 0)
