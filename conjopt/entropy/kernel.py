"""Leave-one-out kernel estimates of `Ent(Y|Z)` for real features (Def 1.2).

`standardised` and `leave_one_out_means` check nothing, keep the dtype and the device, and never
wait for a device: they serve as a term of a loss, too.
"""

from __future__ import annotations

import math

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from conjopt.entropy.reading import Sample, read_rows, read_targets
from conjopt.potentials import Potential

TILE = 2**10  # columns of the kernel matrix that are held at a time
BLOCK = 2**19  # its entries that are: they stay in the cache of a CPU
ON_DEVICE = 2**25  # on a GPU, where many small blocks would leave it idle
FLOOR = 8.0  # spreads of this many roundings of the largest output count as none
FORMS = ("plug-in", "cross-entropy")


def kernel_conditional_entropy(
    outputs: Tensor | ArrayLike,
    targets: Tensor | ArrayLike,
    potential: Potential,
    *,
    bandwidth: float = 0.1,
    form: str = "plug-in",
) -> Tensor:
    """Estimate `Ent(Y|Z)` of real outputs by the targets of their neighbours.

    The mean target at sample `i` is that of the other samples,
    `ybar_i = sum_{j != i} w_ij y_j`, with weights `softmax_j(-||u_i - u_j||^2 / (2 d bandwidth))`.
    `u` are the outputs, centred over the samples and divided by one root mean square, so
    translations and changes of scale do not matter. The two forms are

    - `"plug-in"`: `mean_i Phi(y_i) - Phi(ybar_i)`. Its bias has either sign, and it can be
      negative.
    - `"cross-entropy"`: `mean_i l(y_i, link^-1(ybar_i)) = mean_i D(y_i, ybar_i)`, the loss of the
      neighbours' prediction. **In expectation it is at least `Ent(Y|Z)`**, provided that samples
      are independent, of one law, and the map from inputs to outputs was not fitted to them. Under
      `Softmax` and `Logistic` it is infinite if a target has no neighbour of its kind; under
      `Logistic`, where `1 - ybar` is rounded, a loss above 30 is only known to be large.

    Time grows as `n^2`. Without gradients, memory grows as `n`; with gradients as `n^2`.

    Args:
        outputs: Outputs or features, floating and finite, `(n, ...)`, `n >= 2`.
        targets: Class indices `(n,)` or points `(n, k)`, see `generalized_entropy`. Classes of a
            single sample are estimated by other classes alone.
        potential: The potential `Phi`.
        bandwidth: Squared width of the kernel, in units of the variance of a coordinate.
        form: `"plug-in"` or `"cross-entropy"`.

    Returns:
        Shape `()`, float64, on the device of the outputs and differentiable in them, in units of
        the mean Fenchel-Young loss. 0 if all targets are equal.

    Raises:
        TypeError: As `generalized_entropy`, and for outputs that are not floating.
        ValueError: As `generalized_entropy`, for a single sample, outputs that are not finite, a
            bandwidth that is not positive, or an unknown form.

    Reference:
        docs/theory.md, Def 1.2; docs/entropy_estimates.md.

    Example:
        >>> import torch
        >>> from conjopt.entropy import kernel_conditional_entropy
        >>> from conjopt.potentials import Softmax
        >>> outputs = torch.tensor([0.0, 0.1, 5.0, 5.1])  # two clusters
        >>> kernel_conditional_entropy(outputs, [0, 0, 1, 1], Softmax()) < 1e-6
        tensor(True)
        >>> kernel_conditional_entropy(outputs, [0, 1, 0, 1], Softmax(), form="cross-entropy") > 1
        tensor(True)
    """
    if not (math.isfinite(bandwidth) and bandwidth > 0):
        raise ValueError(f"bandwidth={bandwidth}: expected a positive number.")
    if form not in FORMS:
        raise ValueError(f"form={form!r}: expected one of {FORMS}.")
    sample = Sample(None, targets=targets, outputs=outputs)
    features, y = read_rows(sample), read_targets(sample, potential)
    n = len(features)
    if n < 2:
        raise ValueError("outputs hold one sample: expected two at least, to leave one out.")
    if isinstance(outputs, Tensor):
        features = outputs.reshape(n, -1)  # on its device, with its graph
    u = standardised(features.double())
    points = y.points().to(u.device)
    step = max((BLOCK if u.device.type == "cpu" else ON_DEVICE) // min(n, TILE), 1)
    total = u.new_zeros(())
    for lo in range(0, n, step):
        part = points[lo : lo + step]
        means = leave_one_out_means(u, points, bandwidth, lo, lo + step)
        if form == "plug-in":
            total = total + (potential.value(part) - potential.value(means)).sum()
        else:
            total = total + potential.divergence(part, means).sum()
    return total / n


def standardised(outputs: Tensor) -> Tensor:
    """Centre outputs over the samples, and divide by one root mean square.

    Outputs that are equal but for rounding stay near 0 and are not blown up.

    Args:
        outputs: Shape `(n, d)`, `n >= 1`.

    Returns:
        Shape `(n, d)`, in the dtype of the outputs.
    """
    largest = outputs.detach().abs().amax()  # a constant factor cancels, in gradients as well
    scaled = outputs / torch.where(largest > 0, largest, 1)
    centred = scaled - scaled.mean(0)
    least = FLOOR * torch.finfo(outputs.dtype).eps
    return centred / centred.square().mean().clamp_min(least**2).sqrt()


def leave_one_out_means(
    u: Tensor, points: Tensor, bandwidth: float, start: int = 0, end: int | None = None
) -> Tensor:
    """Return the kernel means `ybar_i` of the targets of all samples but `i`.

    Args:
        u: Standardised outputs, `(n, d)`, `n >= 2`.
        points: Targets, `(n, k)`, in the dtype of `u`.
        bandwidth: Squared width of the kernel.
        start: The first sample.
        end: The one after the last, None for all.

    Returns:
        Shape `(end - start, k)`. Gradients are 0 in coordinates that are at the least or greatest
        target, where the slope of `Phi` may be infinite.
    """
    scale = 1 / (u.shape[1] * bandwidth)
    square, ones = u.square().sum(1) / 2, points.new_ones(len(points), 1)
    weighed = torch.cat([points, ones], 1)
    rows = u[start:end]
    top = u.new_full((len(rows), 1), -torch.inf)
    sums = u.new_zeros(len(rows), weighed.shape[1])
    for lo in range(0, len(u), TILE):
        columns = slice(lo, lo + TILE)
        # -||u_i - u_j||^2 / 2 but for a constant of row i, which cancels.
        exponent = torch.addmm(square[columns], rows, u[columns].mT, beta=-scale, alpha=scale)
        exponent.diagonal(start - lo).fill_(-torch.inf)
        highest = torch.maximum(top, exponent.detach().amax(1, keepdim=True))
        weights = exponent.sub_(highest).exp_()
        sums = (top - highest).exp() * sums + weights @ weighed[columns]
        top = highest
    means = sums[:, :-1] / sums[:, -1:]
    least, most = points.amin(0), points.amax(0)
    inside = (means > least) & (means < most)
    return torch.where(inside, means, means.detach().clamp(least, most))
