"""Gradient noise from the two halves of a batch: the estimators of docs/theory.md, section 3."""

from __future__ import annotations

import dataclasses
from typing import overload

import torch
from torch import Tensor

__all__ = ["GradientNoise", "cross_fitted_slope", "halves", "noise_from_halves"]


@dataclasses.dataclass(frozen=True)
class GradientNoise:
    """What a batch says about the gradient of all samples and its noise (Thm 3.2, Estimators).

    Smooth ``mean_square`` and ``noise`` separately over steps before dividing: the first can be
    negative in one batch.

    Attributes:
        mean_square: () estimate of ``||G||^2``.
        noise: () estimate of ``S^2``, the variance of one sample's gradient.
        batch_size: m, of the batch it was made from.

    Example:
        >>> noise = GradientNoise(torch.tensor(2.0), torch.tensor(8.0), 4)
        >>> noise.noise_scale, noise.correlation
        (tensor(4.), tensor(0.5000))
    """

    mean_square: Tensor
    noise: Tensor
    batch_size: int

    @property
    def noise_scale(self) -> Tensor:
        """() ``B_noise = S^2 / ||G||^2`` in samples; infinite unless ``||G||^2`` is positive."""
        positive = self.mean_square > 0
        ratio = self.noise / torch.where(positive, self.mean_square, 1.0)
        return torch.where(positive, ratio, torch.inf)

    @property
    def correlation(self) -> Tensor:
        """() ``rho_m = ||G||^2 / E||g_B||^2`` for draws with replacement, in [0, 1]."""
        return 1 / (1 + self.noise_scale / self.batch_size)


def halves(samples: int, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
    """Even and odd samples of a batch, never first and second: sorted loaders bias those.

    Args:
        samples: m, at least 2.
        device: of the masks.

    Returns:
        two (m,) boolean masks, the second of the odd samples.

    Raises:
        ValueError: if there are fewer than two samples.

    Example:
        >>> halves(3)
        (tensor([ True, False,  True]), tensor([False,  True, False]))
    """
    if samples < 2:
        raise ValueError(f"halves: got {samples} samples, expected at least 2; use a larger batch")
    odd = torch.arange(samples, device=device) % 2 == 1
    return ~odd, odd


@overload
def cross_fitted_slope(
    held_out: Tensor, own: Tensor, *, half: int, population: int | None = None
) -> Tensor: ...


@overload
def cross_fitted_slope(held_out: float, own: float, *, half: int, population: int) -> float: ...


def cross_fitted_slope(
    held_out: Tensor | float, own: Tensor | float, *, half: int, population: int | None = None
) -> Tensor | float:
    """Unbiased estimate of ``<G, u>`` for a direction that one half of the batch made.

    The half that ``u`` was not made from gives ``<g1, u>``: unbiased for draws with replacement.
    Without, ``g1`` is a mean over the other ``n - h`` samples, and
    ``((n-h) <g1, u> + h <g2, u>) / n`` is unbiased. For ``u = g2`` the mean over half splits of the
    first form is ``(m ||g_B||^2 - E_hat) / (m-1)``, the estimate of ``||G||^2`` of the theory.

    Args:
        held_out: ``<g1, u>``, of the half that ``u`` does not depend on.
        own: ``<g2, u>``, of the half that made ``u``.
        half: h, samples in that second half.
        population: n, samples in all; None for draws with replacement.

    Returns:
        the slope, in the type of what was given.

    Raises:
        ValueError: if the half is not in 1 ... n.

    Example:
        >>> cross_fitted_slope(2.0, 4.0, half=2, population=8)
        2.5
    """
    if half < 1 or (population is not None and population < half):
        raise ValueError(
            f"cross_fitted_slope: half={half} and population={population}, expected "
            "1 <= half <= population; count the samples of the half that made the direction"
        )
    if population is None:
        return held_out
    return ((population - half) * held_out + half * own) / population


def noise_from_halves(inner: Tensor, distance: Tensor, sizes: tuple[int, int]) -> GradientNoise:
    """Gradient noise from the mean gradients of two disjoint parts of a batch.

    ``<g1, g2>`` is unbiased for ``||G||^2`` and ``||g1 - g2||^2 / (1/h1 + 1/h2)`` for ``S^2`` under
    draws with replacement; without, both are off by terms of order ``S^2/n``.

    Args:
        inner: () ``<g1, g2>``.
        distance: () ``||g1 - g2||^2``.
        sizes: h1 and h2, at least 1.

    Returns:
        the estimates, for a batch of ``h1 + h2``.

    Raises:
        ValueError: if a part is empty.

    Example:
        >>> noise = noise_from_halves(torch.tensor(1.0), torch.tensor(4.0), (2, 2))
        >>> noise.mean_square, noise.noise
        (tensor(1.), tensor(4.))
    """
    if min(sizes) < 1:
        raise ValueError(f"noise_from_halves: got parts of {sizes} samples, expected at least 1")
    return GradientNoise(inner, distance / (1 / sizes[0] + 1 / sizes[1]), sum(sizes))
