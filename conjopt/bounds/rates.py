"""How fast the risk falls under a PL inequality, and without one (docs/theory.md, Thm 3.4)."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from conjopt.bounds.steps import check_step
from conjopt.losses import potential_of
from conjopt.potentials import Softmax, Squared

__all__ = [
    "linear_rate",
    "one_hot_rate",
    "pl_constant",
]


def pl_constant(
    loss: Any,
    targets: Tensor,
    *,
    lo: float,
    samples: int,
    residual: float | None = None,
    classes: int | None = None,
) -> float:
    """Return `mu` with `||G||^2 >= 2 mu R` for the mean Fenchel-Young loss (Thm 3.4).

    Where there is one: for the squared potential `lo / n`, and for softmax with targets that give
    every class a share, as label smoothing does, `(lo / n) (min y - rho)`.

    Args:
        loss: A criterion that `conjopt.losses.potential_of` recognises, without class weights.
        targets: Class numbers, or points of the potential's domain, `(n, k)`.
        lo: Least eigenvalue of `K`, the structure matrix of all samples, on `V^n`
            (`conjopt.measure.batch_structure_matrix`).
        samples: `n`.
        residual: For softmax, an upper bound of `rho = ||e|| sqrt((k-1)/k)` over samples and path.
        classes: `k`, where smoothed targets are class numbers.

    Returns:
        `mu`, in units of the Fenchel-Young loss.

    Raises:
        ValueError: Where the theorem knows no `mu`: softmax with one-hot targets, whose loss is in
            proportion to the residual and not to its square near 0, residuals too large, other
            potentials, weights.

    Reference:
        docs/theory.md, Thm 3.4.

    Example:
        >>> from conjopt.bounds import pl_constant
        >>> import torch
        >>> from torch.nn import CrossEntropyLoss, MSELoss
        >>> pl_constant(MSELoss(), torch.zeros(2, 1), lo=4.0, samples=2)
        2.0
        >>> smoothed = CrossEntropyLoss(label_smoothing=0.2)
        >>> options = dict(lo=4.0, samples=2, residual=0.05, classes=2)
        >>> round(pl_constant(smoothed, torch.tensor([0, 1]), **options), 6)
        0.1
    """
    view = potential_of(loss)
    if getattr(loss, "weight", None) is not None:
        raise ValueError(
            f"pl_constant: {loss!r} weighs its terms; Thm 3.4 is about equal weights: use a "
            "criterion without weight="
        )
    if not lo >= 0 or samples < 1:
        raise ValueError(
            f"pl_constant: lo={lo} and samples={samples}, expected lo >= 0 and samples >= 1"
        )
    if view.potential == Squared():
        return lo / samples
    if view.potential != Softmax():
        raise ValueError(
            f"pl_constant: no PL constant is known for {view.potential!r}: expected Squared() or "
            "Softmax() with smoothed targets"
        )
    least = _least_share(loss, targets, classes)
    if not least > 0:
        raise ValueError(
            "pl_constant: cross-entropy of one-hot targets has no PL constant, because near 0 the "
            "loss is in proportion to the residual and not to its square: use one_hot_rate, or "
            "label_smoothing > 0, which brings a linear rate back"
        )
    if residual is None or not 0 <= residual < least:
        raise ValueError(
            f"pl_constant: residual={residual}, expected a bound of ||e|| sqrt((k-1)/k) over "
            f"samples and path that is below the least share of a class in a target, {least:.3g}"
        )
    return lo / samples * (least - residual)


def _least_share(loss: Any, targets: Tensor, classes: int | None) -> float:
    """Return the least share that a target gives to a class."""
    smoothing = float(getattr(loss, "label_smoothing", 0.0))
    soft = targets.is_floating_point()
    k = targets.shape[min(targets.ndim - 1, 1)] if soft else classes
    least = float(targets.min()) if soft else 0.0
    if not smoothing:
        return least
    if k is None:
        raise ValueError(
            "pl_constant: the number of classes cannot be told from class numbers: pass classes="
        )
    return (1 - smoothing) * least + smoothing / k


def linear_rate(
    excess: float,
    steps: int,
    *,
    mu: float,
    curvature: float,
    correlation: float = 1.0,
    safety: float = 1.0,
) -> float:
    """Bound the expected excess risk after `T` steps `a = s rho_m / L` (Thm 3.4, linear).

    It is a guarantee if `||G||^2 >= 2 mu (R - R_*)`, the quadratic bound of Thm 3.2 with `L`, and
    `rho_m >= rho` hold along the whole path.

    Args:
        excess: `R_0 - R_*`.
        steps: `T`.
        mu: The PL constant, from `pl_constant` or known otherwise.
        curvature: `L`.
        correlation: `rho`, a lower bound of the gradient correlation, at most 1.
        safety: `s`, between 0 and 2.

    Returns:
        `(1 - 2 mu s (1 - s/2) rho / L)^T (R_0 - R_*)`.

    Raises:
        ValueError: Without a positive `mu`: one-hot cross-entropy has none (`one_hot_rate`); for
            `mu > L`, which no risk has; for other numbers out of range.

    Reference:
        docs/theory.md, Thm 3.4.

    Example:
        >>> from conjopt.bounds import linear_rate
        >>> linear_rate(8.0, 3, mu=0.5, curvature=1.0)
        1.0
    """
    check_step("linear_rate", curvature, safety)
    _check_path("linear_rate", excess, steps, correlation)
    if not mu > 0:
        raise ValueError(
            f"linear_rate: mu={mu}, expected a positive PL constant; one-hot cross-entropy has "
            "none: use one_hot_rate, or label smoothing with pl_constant"
        )
    if mu > curvature:
        raise ValueError(
            f"linear_rate: mu={mu} above curvature={curvature}, but the quadratic bound gives "
            "||G||^2 <= 2 L (R - R_*), so mu <= L: measure both on the same samples and units"
        )
    factor = 1 - 2 * mu * safety * (1 - safety / 2) * correlation / curvature
    return float(factor**steps * excess)


def one_hot_rate(
    risk: float,
    steps: int,
    *,
    lo: float,
    samples: int,
    classes: int,
    max_loss: float,
    curvature: float,
    correlation: float = 1.0,
    safety: float = 1.0,
) -> float:
    """Bound the expected cross-entropy of one-hot targets after `T` steps (Thm 3.4, sublinear).

    It is a guarantee for steps `a = s rho_m / L` if the quadratic bound of Thm 3.2 with `L`,
    `rho_m >= rho`, `lo(K) >= lo` and losses of at most `max_loss` hold along the whole path.

    Args:
        risk: `R_0`, the mean loss of all samples.
        steps: `T`.
        lo: Least eigenvalue of `K`, the structure matrix of all samples, on `V^n`.
        samples: `n`.
        classes: `k`, at least 2.
        max_loss: `Gamma`, no less than any sample's loss along the path.
        curvature: `L`.
        correlation: `rho`, a lower bound of the gradient correlation, at most 1.
        safety: `s`, between 0 and 2.

    Returns:
        `1 / (1 / R_0 + 2 nu s (1 - s/2) rho T / L)`, with
        `2 nu = (lo / n) (k / (k-1)) ((1 - exp(-Gamma)) / Gamma)^2`.

    Raises:
        ValueError: For numbers out of range.

    Reference:
        docs/theory.md, Thm 3.4.

    Example:
        >>> from conjopt.bounds import one_hot_rate
        >>> options = dict(lo=1.0, samples=4, classes=2, max_loss=1.0, curvature=0.5)
        >>> [round(one_hot_rate(0.5, steps, **options), 4) for steps in (0, 10, 1000)]
        [0.5, 0.2501, 0.005]
    """
    check_step("one_hot_rate", curvature, safety)
    _check_path("one_hot_rate", risk, steps, correlation)
    if samples < 1 or classes < 2 or not lo >= 0:
        raise ValueError(
            f"one_hot_rate: samples={samples}, classes={classes}, lo={lo}: expected samples >= 1, "
            "classes >= 2, lo >= 0"
        )
    if not max_loss >= risk or math.isinf(max_loss):
        raise ValueError(
            f"one_hot_rate: max_loss={max_loss} with risk={risk}, expected a finite bound of every "
            "sample's loss, which is no less than their mean"
        )
    if risk == 0:
        return 0.0
    c = -math.expm1(-max_loss) / max_loss
    twice_nu = lo / samples * classes / (classes - 1) * c**2
    return 1 / (1 / risk + twice_nu * safety * (1 - safety / 2) * correlation * steps / curvature)


def _check_path(name: str, risk: float, steps: int, correlation: float) -> None:
    if not risk >= 0:
        raise ValueError(f"{name}: got a risk of {risk} over the floor, expected a number >= 0")
    if steps < 0:
        raise ValueError(f"{name}: steps={steps}, expected a whole number >= 0")
    if not 0 <= correlation <= 1:
        raise ValueError(f"{name}: correlation={correlation}, expected a number from 0 to 1")
