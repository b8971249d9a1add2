"""What losses of held-out samples say of the risk, with a stated confidence (Thm 4.4)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, overload

from numpy.typing import ArrayLike
from torch import Tensor

from conjopt.bounds import mean_bounds, sequences
from conjopt.bounds.reading import Array, miss_probability, read_losses

__all__ = ["HeldoutInterval", "heldout_certificate"]

Method = Literal["betting", "kl", "hoeffding", "empirical-bernstein"]

FIXED: dict[str, Callable[[Array, float], float]] = {
    "betting": mean_bounds.betting,
    "kl": mean_bounds.kl,
    "hoeffding": mean_bounds.hoeffding,
    "empirical-bernstein": mean_bounds.empirical_bernstein,
}
ANYTIME: dict[str, Callable[[Array, float], float]] = {
    "betting": sequences.betting,
    "kl": sequences.kl,
    "hoeffding": sequences.hoeffding,
    "empirical-bernstein": sequences.empirical_bernstein,
}


class HeldoutInterval(NamedTuple):
    """Two bounds that hold together, made by `heldout_certificate(..., side="two-sided")`.

    Attributes:
        lower: At most the risk.
        upper: At least the risk.

    Reference:
        docs/theory.md, Thm 4.4.

    Example:
        >>> from conjopt.bounds import HeldoutInterval
        >>> HeldoutInterval(0.25, 0.5).upper
        0.5
    """

    lower: float
    upper: float


@overload
def heldout_certificate(
    losses: Tensor | ArrayLike,
    *,
    max_loss: float,
    min_loss: float = ...,
    confidence: float = ...,
    method: Method = ...,
    side: Literal["upper", "lower"] = ...,
    anytime: bool = ...,
) -> float: ...


@overload
def heldout_certificate(
    losses: Tensor | ArrayLike,
    *,
    max_loss: float,
    min_loss: float = ...,
    confidence: float = ...,
    method: Method = ...,
    side: Literal["two-sided"],
    anytime: bool = ...,
) -> HeldoutInterval: ...


def heldout_certificate(
    losses: Tensor | ArrayLike,
    *,
    max_loss: float,
    min_loss: float = 0.0,
    confidence: float = 0.95,
    method: Method = "betting",
    side: Literal["upper", "lower", "two-sided"] = "upper",
    anytime: bool = False,
) -> float | HeldoutInterval:
    """Bound the risk by losses of samples that were used for nothing else (Thm 4.4).

    *A guarantee*: over draws of the held-out samples, the bound is wrong with probability at most
    `1 - confidence`. It needs independent samples of the law that the risk is of, no influence of
    them on the model (training, tuning, early stopping, temperature), and a range, a method and a
    confidence that were chosen beforehand. Of several certificates of the same samples each holds
    by itself; for all at once, or for the least of them, divide `1 - confidence` by their number.

    The method `"betting"`, and every method with `anytime`, depends on the order of the losses,
    which has to be that of an independent draw. Shuffle a sorted set first, once, with a seed
    chosen beforehand.

    - `"betting"`: the wealth of bets against a risk of `m`, each made from the losses before it.
      An `m` against which the wealth has ever reached `1/d` is ruled out, even if it shrinks
      again; so in unlucky samples (of probability at most `d`) the bound is below their mean.
    - `"kl"`: inversion of the relative entropy of two coins; does not depend on the order.
    - `"hoeffding"` and `"empirical-bernstein"`, for comparison; the latter says nothing of `n = 1`.

    With `anytime=True` the bound holds at every sample size at once, so one may look at it as
    losses come, and stop when it is low enough. It is the least over the past of a confidence
    sequence by Ville's inequality: for betting the wealth with bets that do not know `n`, for
    Hoeffding and empirical Bernstein the predictable plug-in sequences of Waudby-Smith and Ramdas,
    for kl the Beta(1/2,1/2) mixture of likelihood ratios.

    Computed in float64. A million losses take a fraction of a second.

    Args:
        losses: One of each sample, `(n,)`: a tensor, an array or a list; correct or not as 0 or 1.
        max_loss: `gamma`, which no loss can exceed; not the maximum of this sample.
        min_loss: `g0`, which no loss can fall below.
        confidence: `1 - d`.
        method: The method.
        side: "upper" for an upper bound, "lower" for a lower one, "two-sided" for both at half of
            `d` each.
        anytime: Whether the bound must hold at every sample size at once.

    Returns:
        The bound, in units of the losses and within their range; for "two-sided" both.

    Raises:
        ValueError: For losses that are NaN or out of the stated range (the message says how many
            and which), none, more than one for a sample, a confidence not between 0 and 1, an
            empty range, an unknown method or side.
        TypeError: For losses that are not real numbers.

    Reference:
        docs/theory.md, Thm 4.4. I. Waudby-Smith and A. Ramdas, *Estimating means of bounded random
        variables by betting*, JRSS B 86 (2024); A. Maurer and M. Pontil, *Empirical Bernstein
        bounds and sample variance penalization*, COLT (2009); S. R. Howard, A. Ramdas,
        J. McAuliffe and J. Sekhon, *Time-uniform, nonparametric, nonasymptotic confidence
        sequences*, Ann. Statist. 49 (2021).

    Example:
        >>> import torch
        >>> from conjopt.bounds import heldout_certificate
        >>> losses = torch.tensor([0.1, 0.3, 0.0, 0.2] * 100)  # mean 0.15
        >>> round(heldout_certificate(losses, max_loss=2.0), 4)
        0.1697
        >>> round(heldout_certificate(losses, max_loss=2.0, anytime=True), 4)
        0.1816
        >>> wrong = [False] * 95 + [True] * 5
        >>> low, high = heldout_certificate(wrong, max_loss=1.0, method="kl", side="two-sided")
        >>> round(low, 4), round(high, 4)
        (0.0112, 0.1315)
    """
    name = "heldout_certificate"
    d = miss_probability(name, confidence)
    if method not in FIXED:
        raise ValueError(
            f"{name}: method={method!r}, expected one of {', '.join(map(repr, FIXED))}"
        )
    if side not in ("upper", "lower", "two-sided"):
        raise ValueError(f"{name}: side={side!r}, expected 'upper', 'lower' or 'two-sided'")
    values = read_losses(name, losses, min_loss, max_loss)
    bound = (ANYTIME if anytime else FIXED)[method]
    width = max_loss - min_loss

    def upper(at: float) -> float:
        return min_loss + width * min(1.0, bound((values - min_loss) / width, at))

    def lower(at: float) -> float:
        return max_loss - width * min(1.0, bound((max_loss - values) / width, at))

    if side == "two-sided":
        return HeldoutInterval(lower(d / 2), upper(d / 2))
    return upper(d) if side == "upper" else lower(d)
