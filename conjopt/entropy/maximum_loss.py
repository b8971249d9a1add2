"""The greatest loss over targets, attainable or observed (docs/theory.md, section 4)."""

from __future__ import annotations

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from conjopt.entropy.laws import blocks
from conjopt.entropy.reading import Sample, read_rows, read_targets
from conjopt.potentials import Logistic, Potential


def attainable_losses(
    outputs: Tensor | ArrayLike,
    potential: Potential,
    *,
    least: float | Tensor | None = None,
    greatest: float | Tensor | None = None,
) -> Tensor:
    """Return the greatest loss of each output over all targets, `max_y l(y, f)`.

    The loss is convex in `y`, so it is greatest at an extreme point of the domain: a class on the
    simplex, `{0, 1}` in each coordinate for `Logistic`. It involves no label: mislabelled samples
    do not move it.

    Args:
        outputs: Outputs `f`, floating and finite, `(n, k)`, see `risk_decomposition`.
        potential: The potential `Phi`.
        least: Least target in each coordinate, a number or `(k,)`, for separable potentials whose
            domain has no bounds (`Squared`, `Poisson`), or narrower than it.
        greatest: Greatest target in each coordinate, a number or `(k,)`.

    Returns:
        Shape `(n,)`, float64 on the CPU, in units of the mean Fenchel-Young loss. Infinite for
        `Squared` and `Poisson` without both `least` and `greatest`.

    Raises:
        TypeError: For outputs that are not floating, or something else than a potential.
        ValueError: For outputs that are not finite; for `least` and `greatest` with a potential on
            the simplex, that do not belong to the domain, or out of order; for a potential of your
            own that is neither on the simplex nor separable, whose extreme points are not known.

    Reference:
        docs/theory.md, section 4.

    Example:
        >>> from conjopt.entropy import attainable_losses
        >>> from conjopt.potentials import Softmax, Squared
        >>> attainable_losses([[2.0, 0.0, -1.0], [0.0, 0.0, 0.0]], Softmax())
        tensor([3.1698, 1.0986], dtype=torch.float64)
        >>> attainable_losses([[0.5]], Squared(), least=-1.0, greatest=1.0)
        tensor([1.1250], dtype=torch.float64)
    """
    sample = Sample(None, targets=outputs, outputs=outputs)
    if not isinstance(potential, Potential):
        read_targets(sample, potential)  # refuses it
    f = read_rows(sample)
    if potential.on_simplex:
        if least is not None or greatest is not None:
            raise ValueError(
                f"least and greatest are bounds of a coordinate, {potential!r} is on the simplex: "
                "leave them out."
            )
        corner = potential.value(torch.eye(f.shape[1], dtype=torch.float64))
        losses = [potential.conjugate(part) + (corner - part).amax(1) for part in _double_blocks(f)]
        return torch.cat(losses).clamp(min=0)
    if not potential.separable:
        raise ValueError(
            f"{potential!r} is neither on the simplex nor separable: the extreme points of its "
            "domain are not known. Take the maximum of its loss over them yourself."
        )
    if potential == Logistic():
        least, greatest = 0.0 if least is None else least, 1.0 if greatest is None else greatest
    if least is None or greatest is None:
        return torch.full((len(f),), torch.inf, dtype=torch.float64)
    ends = [_end(f, potential, "least", least), _end(f, potential, "greatest", greatest)]
    if bool((ends[0] > ends[1]).any()):
        raise ValueError(f"least={least} is above greatest={greatest}.")
    losses = []
    for part in _double_blocks(f):
        # A sum over coordinates: each at the end of its interval that loses more.
        both = [potential.loss(end[:, None], part[..., None]) for end in ends]
        losses.append(torch.maximum(*both).sum(1))
    return torch.cat(losses).clamp(min=0)


def attainable_maximum_loss(
    outputs: Tensor | ArrayLike,
    potential: Potential,
    *,
    least: float | Tensor | None = None,
    greatest: float | Tensor | None = None,
) -> Tensor:
    """Return the greatest of the `attainable_losses` of some outputs.

    It is at least the loss of each of these samples, whatever their targets. For samples not seen
    it says nothing, unless the outputs are known to stay in a set beforehand, as clipped ones do.

    Args:
        outputs: See `attainable_losses`.
        potential: The potential `Phi`.
        least: See `attainable_losses`.
        greatest: See `attainable_losses`.

    Returns:
        Shape `()`, float64 on the CPU, in units of the mean Fenchel-Young loss.

    Raises:
        TypeError: As `attainable_losses`.
        ValueError: As `attainable_losses`.

    Reference:
        docs/theory.md, section 4.

    Example:
        >>> from conjopt.entropy import attainable_maximum_loss
        >>> from conjopt.potentials import Logistic
        >>> attainable_maximum_loss([[0.0], [-3.0]], Logistic())  # log(1 + exp(3))
        tensor(3.0486, dtype=torch.float64)
    """
    return attainable_losses(outputs, potential, least=least, greatest=greatest).max()


def observed_maximum_loss(
    outputs: Tensor | ArrayLike, targets: Tensor | ArrayLike, potential: Potential
) -> Tensor:
    """Return the greatest loss of some samples at their own targets.

    At most the `attainable_maximum_loss`. A sample maximum grows with the sample: it is no bound
    for samples not seen.

    Args:
        outputs: Outputs `f`, floating and finite, `(n, k)`, see `risk_decomposition`.
        targets: Class indices `(n,)` or points `(n, k)`, see `generalized_entropy`.
        potential: The potential `Phi`.

    Returns:
        Shape `()`, float64 on the CPU, in units of the mean Fenchel-Young loss.

    Raises:
        TypeError: As `generalized_entropy`, and for outputs that are not floating.
        ValueError: As `generalized_entropy`, for outputs that are not finite or whose shape does
            not fit the targets.

    Reference:
        docs/theory.md, section 4.

    Example:
        >>> from conjopt.entropy import observed_maximum_loss
        >>> from conjopt.potentials import Softmax
        >>> observed_maximum_loss([[2.0, 0.0, -1.0], [0.0, 0.0, 0.0]], [0, 1], Softmax())
        tensor(1.0986, dtype=torch.float64)
    """
    sample = Sample(None, targets=targets, outputs=outputs)
    f = read_rows(sample)
    points = read_targets(sample, potential, ("outputs", f.shape[1]))
    greatest = torch.zeros((), dtype=torch.float64)
    for lo, hi in blocks(0, len(f), f.shape[1]):
        part = f[lo:hi].double()
        if points.values.ndim == 1:
            losses = potential.class_loss(points.values[lo:hi], part)
        else:
            losses = potential.loss(points.proper(points.values[lo:hi].double()), part)
        greatest = torch.maximum(greatest, losses.max())
    return greatest


def _double_blocks(f: Tensor) -> list[Tensor]:
    return [f[lo:hi].double() for lo, hi in blocks(0, len(f), f.shape[1])]


def _end(f: Tensor, potential: Potential, name: str, value: float | Tensor) -> Tensor:
    """Return an end of the interval of each coordinate, `(k,)`."""
    end = torch.as_tensor(value, dtype=torch.float64).cpu()
    if end.shape not in ((), f.shape[1:]):
        raise ValueError(f"{name} of shape {tuple(end.shape)}: expected a number or {f.shape[1:]}.")
    end = end.expand(f.shape[1])
    if not bool(potential.contains(end[:, None]).all()):
        raise ValueError(
            f"{name}={value}: expected {potential.domain}, the domain of {potential!r}."
        )
    return end
