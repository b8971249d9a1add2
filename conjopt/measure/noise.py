"""Gradient noise from a batch or its parts: the estimators of docs/theory.md, section 3."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor, nn

from conjopt.measure.energy import per_sample_gradient_norms
from conjopt.measure.graph_hooks import without_multi_grad_hooks
from conjopt.measure.layers.tape import as_arguments
from conjopt.measure.replay import Replay, refuse_reentrant

__all__ = [
    "GradientNoise",
    "cross_fitted_slope",
    "gradient_noise",
    "halves",
    "noise_from_halves",
    "noise_from_norms",
    "noise_from_parts",
]


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


def gradient_noise(
    model: nn.Module, loss: Any, inputs: Any, targets: Any, *, population: int | None = None
) -> GradientNoise:
    """Estimate `||G||^2` and the gradient noise `S^2` from the per-sample gradients of a batch.

    The model runs in the mode it is in, on copies of its buffers, and draws from the random number
    generators without moving them. No `.grad` is touched.

    Args:
        model: Returns one tensor with samples along dimension 0.
        loss: The criterion, called with outputs and targets.
        inputs: Of the model, `m` samples: a tensor, or a tuple or a dict of its arguments.
        targets: Of the criterion.
        population: `n`, where the batch was drawn without replacement from `n` samples; `None` for
            draws with replacement.

    Returns:
        Unbiased estimates, in squared units of the criterion per squared unit of the parameters.
        The gradients `g_i` are those of `conjopt.measure.per_sample_gradient_norms`, and their
        mean is the gradient of the batch (for `reduction="sum"`, that divided by `m`).

    Raises:
        ValueError: If the batch has fewer than two samples, or more than the population.
        RuntimeError: If per-sample gradients do not exist or cannot be seen.

    Reference:
        docs/theory.md, Estimators of energy and noise.

    Example:
        >>> import torch
        >>> from conjopt.measure import gradient_noise
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> torch.nn.init.zeros_(model.weight)
        Parameter containing:
        tensor([[0.]], requires_grad=True)
        >>> inputs, targets = torch.ones(2, 1), torch.tensor([[-1.0], [-2.0]])
        >>> noise = gradient_noise(model, torch.nn.MSELoss(), inputs, targets)  # g = 2 and 4
        >>> noise.mean_square, noise.noise
        (tensor(8.), tensor(2.))
        >>> gradient_noise(model, torch.nn.MSELoss(), inputs, targets, population=2).mean_square
        tensor(9.)
    """
    with torch.enable_grad():
        norms = per_sample_gradient_norms(model, loss, inputs, targets)
    norms = norms.detach()
    square = _gradient_square(model, loss, inputs, targets).to(norms.dtype)
    if getattr(loss, "reduction", "mean") == "sum":
        square = square / len(norms) ** 2
    return noise_from_norms(norms, square, population=population)


def noise_from_norms(
    norms: Tensor,
    batch_gradient_square: Tensor,
    *,
    sizes: Sequence[int] | None = None,
    population: int | None = None,
) -> GradientNoise:
    """Estimate `||G||^2` and `S^2` from the norms of the parts of a batch and that of their mean.

    The parts are single samples, or disjoint micro-batches or ranks `j = 1 ... b` of `h_j` samples
    with mean gradients `g_j`. With `m = sum_j h_j` and `g_B = sum_j h_j g_j / m`, draws with
    replacement have `E||g_j||^2 = ||G||^2 + S^2 / h_j` and `E||g_B||^2 = ||G||^2 + S^2 / m`, so

        S2 = (sum_j h_j ||g_j||^2 - m ||g_B||^2) / (b - 1)
        G2 = (m^2 ||g_B||^2 - sum_j h_j^2 ||g_j||^2) / (m^2 - sum_j h_j^2)

    are unbiased. Without replacement `S2 (n-1) / n` and `G2 + S2 / n` are, for parts of any sizes.

    Args:
        norms: `||g_j||`, shape `(b,)`.
        batch_gradient_square: `||g_B||^2`, shape `()`.
        sizes: `h_j`, samples of each part; `None` for single samples.
        population: `n` for draws without replacement, `None` for draws with replacement.

    Returns:
        The estimates, for a batch of `m`.

    Raises:
        ValueError: If there are fewer than two parts, an empty part, another number of sizes than
            of parts, or more samples than the population has.

    Reference:
        docs/theory.md, Estimators of energy and noise.

    Example:
        >>> import torch
        >>> from conjopt.measure import noise_from_norms
        >>> noise = noise_from_norms(torch.tensor([2.0, 4.0]), torch.tensor(9.0))
        >>> noise.mean_square, noise.noise
        (tensor(8.), tensor(2.))
        >>> noise_from_norms(torch.tensor([2.0, 4.0]), torch.tensor(9.0), sizes=[8, 8]).noise
        tensor(16.)
    """
    h = checked_sizes("noise_from_norms", len(norms), sizes, population)
    m, weights, squares = sum(h), _weights(h, norms), norms.square()
    between = (weights * squares).sum() - m * batch_gradient_square
    pairs = m**2 * batch_gradient_square - (weights**2 * squares).sum()
    return solved(pairs / _pairs(h), between / (len(h) - 1), m, population)


def noise_from_parts(
    inner: Tensor, sizes: Sequence[int] | None = None, *, population: int | None = None
) -> GradientNoise:
    """Estimate `||G||^2` and `S^2` from the inner products of the gradients of a batch's parts.

    These are the estimates of `noise_from_norms`, with less rounding: that of `||G||^2` is a mean
    of inner products of different parts. For two parts and draws with replacement they are those
    of `noise_from_halves`.

    Args:
        inner: `<g_j, g_l>`, shape `(b, b)`, of the mean gradients of disjoint parts.
        sizes: `h_j`, samples of each part; `None` for single samples.
        population: `n` for draws without replacement, `None` for draws with replacement.

    Returns:
        The estimates, for a batch of all parts.

    Raises:
        ValueError: If `inner` is not square, if there are fewer than two parts, an empty part,
            another number of sizes than of parts, or more samples than the population has.

    Reference:
        docs/theory.md, Estimators of energy and noise.

    Example:
        >>> import torch
        >>> from conjopt.measure import noise_from_parts
        >>> gradients = torch.tensor([[1.0, 2.0], [1.0, 0.0], [1.0, -2.0]])  # three micro-batches
        >>> noise = noise_from_parts(gradients @ gradients.T, sizes=[4, 4, 4])
        >>> noise.mean_square, noise.noise
        (tensor(-0.3333), tensor(16.))
    """
    if inner.ndim != 2 or inner.shape[0] != inner.shape[1]:
        raise ValueError(
            f"noise_from_parts: got inner products of shape {tuple(inner.shape)}, expected (b, b); "
            "for gradients g of shape (b, P) pass g @ g.T"
        )
    h = checked_sizes("noise_from_parts", len(inner), sizes, population)
    m, weights = sum(h), _weights(h, inner)
    pairs = (
        weights.unsqueeze(1)
        * weights
        * (1 - torch.eye(len(h), dtype=inner.dtype, device=inner.device))
    )
    squares = inner.diagonal()
    distances = squares.unsqueeze(1) + squares - 2 * inner
    between = (pairs * distances).sum() / (2 * m)  # sum_j h_j ||g_j - g_B||^2
    return solved((pairs * inner).sum() / _pairs(h), between / (len(h) - 1), m, population)


def checked_sizes(
    name: str, parts: int, sizes: Sequence[int] | None, population: int | None
) -> list[int]:
    """Return the sizes of the parts of a batch, or refuse them."""
    h = [1] * parts if sizes is None else [int(size) for size in sizes]
    if len(h) != parts:
        raise ValueError(f"{name}: got {parts} parts and {len(h)} sizes, expected as many")
    if parts < 2:
        raise ValueError(
            f"{name}: got {parts} {'sample' if sizes is None else 'part'}(s), expected at least 2; "
            "one gradient says nothing about its noise, use a larger batch"
        )
    if min(h) < 1:
        raise ValueError(f"{name}: got parts of {h} samples, expected at least 1 in each")
    if population is not None and population < sum(h):
        raise ValueError(
            f"{name}: got population={population} and a batch of {sum(h)} samples, expected at "
            "least as many; leave population out for draws with replacement"
        )
    return h


def _weights(h: Sequence[int], like: Tensor) -> Tensor:
    if len(set(h)) == 1:
        return like.new_full((len(h),), h[0])  # does not wait for the device
    return like.new_tensor(h)


def _pairs(h: Sequence[int]) -> int:
    return sum(h) ** 2 - sum(size**2 for size in h)


def solved(
    mean_square: Tensor, noise: Tensor, samples: int, population: int | None
) -> GradientNoise:
    """Correct for draws without replacement, where `E<g_j, g_l> = ||G||^2 - S^2 / (n - 1)`."""
    if population is not None:
        mean_square = mean_square + noise / population
        noise = noise * (population - 1) / population
    return GradientNoise(mean_square, noise, samples)


def _gradient_square(model: nn.Module, loss: Any, inputs: Any, targets: Any) -> Tensor:
    args, kwargs = as_arguments(inputs)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.enable_grad(), without_multi_grad_hooks(parameters):
        (outputs,) = Replay(model, args, kwargs, Replay.random_state(model)).run({})
        assert outputs is not None
        refuse_reentrant([outputs])
        gradients = torch.autograd.grad(loss(outputs, targets), parameters, allow_unused=True)
    squares = [g.square().sum() for g in gradients if g is not None]
    return torch.stack(squares).sum() if squares else outputs.new_zeros(())
