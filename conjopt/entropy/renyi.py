"""Matrix Renyi entropies of Gram matrices, conditional on labels (docs/theory.md, section 5)."""

from __future__ import annotations

import math

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from conjopt.entropy.coding_rate import classes
from conjopt.entropy.kernel import BLOCK, standardised
from conjopt.entropy.reading import Sample, read_labels, read_rows

SMALL_ORDER_RIDGE = 1e-3  # below order 1 the smallest eigenvalues count most, and are noise


def matrix_renyi_entropy(gram: Tensor, *, order: float = 2.0, ridge: float = 0.0) -> Tensor:
    """Return the Renyi entropy of the eigenvalues of a Gram matrix over their sum.

    `1/(1-a) log sum_i p_i^a` for the order `a`, `-sum_i p_i log p_i` for `a = 1`. It lies between 0
    (rank 1) and `log n` (equal eigenvalues), and decreases with the order. At order 2 it is
    `-log(||K||_F^2 / tr(K)^2)`, and takes no eigenvalues.

    Args:
        gram: Symmetric positive semidefinite, `(..., n, n)`, not 0. Eigenvalues below `n eps` of
            the greatest are taken as rounding, that is as 0.
        order: `a > 0`.
        ridge: Share `r >= 0` of the uniform law: `p_i` becomes `(p_i + r/n) / (1 + r)`.

    Returns:
        Shape `(...)`, float64, in nats.

    Raises:
        ValueError: For a matrix that is not square, not finite, not symmetric, has a negative
            eigenvalue (order 2 does not look for these) or no positive trace, for an order that is
            not positive, and for a negative ridge.

    Reference:
        docs/theory.md, section 5.

    Example:
        >>> import torch
        >>> from conjopt.entropy import matrix_renyi_entropy
        >>> gram = torch.diag(torch.tensor([2.0, 1.0, 1.0]))
        >>> [round(float(matrix_renyi_entropy(gram, order=a)), 4) for a in (0.5, 1.0, 2.0)]
        [1.0696, 1.0397, 0.9808]
    """
    _check_order(order, ridge)
    if gram.ndim < 2 or gram.shape[-1] != gram.shape[-2] or gram.shape[-1] == 0:
        raise ValueError(f"gram of shape {tuple(gram.shape)}: expected (..., n, n), n >= 1.")
    # torch.linalg.eigvalsh raises an error of its own on numbers that are not finite.
    if not bool(torch.isfinite(gram).all()):
        raise ValueError("gram has entries that are not finite.")
    largest = gram.abs().amax((-2, -1), keepdim=True).double()
    if not bool((largest > 0).all()):
        raise ValueError("gram is 0: expected a positive eigenvalue.")
    scaled = gram.double() / largest
    slack = 64 * gram.shape[-1] * torch.finfo(gram.dtype).eps
    if bool(((scaled - scaled.mT).abs() > slack).any()):
        raise ValueError("gram is not symmetric: expected inner products of samples.")
    n = gram.shape[-1]
    trace = scaled.diagonal(dim1=-2, dim2=-1).sum(-1)
    if bool((trace <= 0).any()):
        raise ValueError("gram has no positive trace: expected inner products of samples.")
    if order == 2:
        square = scaled.square().sum((-2, -1)) / trace.square()
        return -((square + (2 * ridge + ridge**2) / n) / (1 + ridge) ** 2).log().clamp(max=0)
    values = torch.linalg.eigvalsh(scaled)
    if bool((values[..., 0] < -slack * values[..., -1]).any()):
        raise ValueError(
            f"gram has the eigenvalue {float(values.min()):.3g} of its greatest entry: expected "
            "inner products of samples, which have none below 0."
        )
    noise = n * torch.finfo(gram.dtype).eps * values[..., -1:]
    values = torch.where(values > noise, values, 0)
    shares = (values / values.sum(-1, keepdim=True) + ridge / n) / (1 + ridge)
    if abs(order - 1) < 1e-8:  # closer the quotient is less exact than its limit
        return torch.special.entr(shares).sum(-1)
    return _power_sum(shares, order) / (1 - order)


def conditional_renyi_entropy(
    outputs: Tensor | ArrayLike,
    targets: Tensor | ArrayLike | None = None,
    *,
    order: float = 2.0,
    bandwidth: float = 0.1,
    ridge: float | None = None,
    largest_class: int = 2000,
    seed: int = 0,
) -> Tensor:
    """Return the matrix Renyi entropy of features given the class, `sum_c (n_c/n) S_a(K_c)`.

    `K_c` is the Gram matrix of the Gaussian kernel `exp(-||u_i - u_j||^2 / (2 d bandwidth))` in a
    class, `u` the outputs standardised as in `kernel_conditional_entropy`. It is 0 where all
    features of each class are equal, and `E log n_c` where all are far apart. It compares
    networks on the same samples; it estimates no entropy of the population, as it grows with `n_c`.

    Args:
        outputs: Logits or features, floating and finite, `(n, ...)`, flattened to `(n, d)`.
        targets: Class indices `(n,)`; None takes all samples as one class. A class of one sample
            has entropy 0.
        order: `a > 0`; 2 is the cheapest, as it takes no eigenvalues.
        bandwidth: Squared width of the kernel, in units of the variance of a coordinate.
        ridge: See `matrix_renyi_entropy`; None for 1e-3 below order 1 and else 0.
        largest_class: Eigenvalues of larger classes are those of this many of their samples,
            drawn at random, as they take `n_c^3`. Order 2 takes all.
        seed: Of the draw.

    Returns:
        Shape `()`, float64 on the CPU, in nats.

    Raises:
        TypeError: As `coding_rate`.
        ValueError: As `coding_rate`, and for an order, bandwidth or class size that is not
            positive, or a negative ridge.

    Reference:
        docs/theory.md, section 5; docs/entropy_estimates.md.

    Example:
        >>> from conjopt.entropy import conditional_renyi_entropy
        >>> outputs = [[0.0], [0.0], [9.0], [90.0]]
        >>> conditional_renyi_entropy(outputs, [0, 0, 1, 1])  # log 2 in half of the samples
        tensor(0.3466, dtype=torch.float64)
    """
    ridge = (SMALL_ORDER_RIDGE if order < 1 else 0.0) if ridge is None else ridge
    _check_order(order, ridge)
    for name, value in (("bandwidth", bandwidth), ("largest_class", largest_class)):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name}={value}: expected a positive number.")
    sample = Sample(None, targets=outputs if targets is None else targets, outputs=outputs)
    label = torch.zeros(len(sample.rows), dtype=torch.int64)
    label = label if targets is None else read_labels(sample)
    u = standardised(read_rows(sample).double())
    scale = 1 / (u.shape[1] * bandwidth)
    generator = torch.Generator().manual_seed(seed)
    total = u.new_zeros(())
    for members in classes(label):
        share = len(members) / len(u)
        if order == 2:
            total += share * _second_order(u[members], scale, ridge)
            continue
        if len(members) > largest_class:
            members = members[torch.randperm(len(members), generator=generator)[:largest_class]]
        gram = _kernel(u[members], u[members], scale)
        total += share * matrix_renyi_entropy((gram + gram.mT) / 2, order=order, ridge=ridge)
    return total


def _kernel(u: Tensor, v: Tensor, scale: float) -> Tensor:
    squares = u.square().sum(1, keepdim=True) + v.square().sum(1)
    return ((u @ v.mT - squares / 2) * scale).clamp_(max=0).exp_()


def _second_order(u: Tensor, scale: float, ridge: float) -> Tensor:
    """Return the entropy of order 2, a block of the Gram matrix at a time."""
    n = len(u)
    parts = u.split(math.isqrt(BLOCK))
    blocks = [_kernel(rows, columns, 2 * scale).sum() for rows in parts for columns in parts]
    square = torch.stack(blocks).sum() / n**2
    return -((square + (2 * ridge + ridge**2) / n) / (1 + ridge) ** 2).log().clamp(max=0)


def _power_sum(shares: Tensor, order: float) -> Tensor:
    """Return `log sum_i p_i^a`, also where the powers underflow."""
    logs = torch.where(shares > 0, shares, 1).log() * order
    return torch.where(shares > 0, logs, -torch.inf).logsumexp(-1)


def _check_order(order: float, ridge: float) -> None:
    if not (math.isfinite(order) and order > 0):
        raise ValueError(f"order={order}: expected a positive number.")
    if not (math.isfinite(ridge) and ridge >= 0):
        raise ValueError(f"ridge={ridge}: expected a number that is not negative.")
