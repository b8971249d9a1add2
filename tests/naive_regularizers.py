"""The regularizers again, a loop over samples, classes and labels each, from their definitions."""

import itertools
import math

import torch
from torch import Tensor

from conjopt.potentials import Logistic, Potential


def conditional_entropy(
    potential: Potential,
    z: Tensor,
    y: Tensor,
    mass: Tensor,
    bandwidth: float = 0.1,
    *,
    upper: bool = False,
    classes: Tensor | None = None,
) -> Tensor:
    """Rows `z`, points `y`; rows of mass 0 are not there. Points before smoothing are `classes`."""
    classes = (y if classes is None else classes)[mass > 0]
    z, y, mass = z[mass > 0], y[mass > 0], mass[mass > 0]
    m, k = len(z), z.shape[1]
    share = mass / mass.sum()
    centred = z - sum(share[i] * z[i] for i in range(m))
    rms = sum(share[i] * centred[i].square().sum() / k for i in range(m)).sqrt()
    u = centred / rms if rms > 0 else centred
    total, weight = z.new_zeros(()), 0.0
    for i in range(m):
        others = [j for j in range(m) if j != i]
        alone = all((classes[i] * classes[j]).sum() == 0 for j in others)
        if potential.on_simplex and not upper and alone:
            continue
        scores = [-(u[i] - u[j]).square().sum() / (2 * k * bandwidth) for j in others]
        w = (torch.stack(scores) + mass[others].log()).softmax(0)
        mean = sum(a * y[j] for a, j in zip(w, others))
        if isinstance(potential, Logistic):
            mean = mean.clamp(0, 1)  # by rounding, weights may sum to more than 1
        if upper:
            term = potential.divergence(y[i], mean)
        else:
            term = sum(a * potential.value(y[j]) for a, j in zip(w, others)) - potential.value(mean)
        total, weight = total + mass[i] * term, weight + mass[i]
    return total / weight if weight else total


def covariances(z: Tensor, member: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Shares and covariances of the classes, from `(m, classes)` shares of samples in classes."""
    found = []
    for c in range(member.shape[1]):
        size = member[:, c].sum()
        if size == 0:
            continue
        mean = sum(member[i, c] * z[i] for i in range(len(z))) / size
        outer = [member[i, c] * torch.outer(z[i] - mean, z[i] - mean) for i in range(len(z))]
        found.append((size, sum(outer) / size))
    return found


def classes_of(
    potential: Potential, f: Tensor, y: Tensor, mass: Tensor
) -> list[tuple[Tensor, Tensor]]:
    share = (mass / mass.sum()).unsqueeze(1)
    if isinstance(potential, Logistic):
        parts = [
            covariances(f[:, j : j + 1], share * torch.stack([y[:, j], 1 - y[:, j]], 1))
            for j in range(f.shape[1])
        ]
        return list(itertools.chain.from_iterable(parts))
    return covariances(f - f.mean(1, keepdim=True), share * y)


def coding_rate(
    potential: Potential, f: Tensor, y: Tensor, mass: Tensor, eps2: float = 0.5
) -> Tensor:
    return sum(
        size * torch.logdet(torch.eye(len(c), dtype=c.dtype) + c / eps2) / 2
        for size, c in classes_of(potential, f, y, mass)
    )


def scatter(potential: Potential, f: Tensor, y: Tensor, mass: Tensor) -> Tensor:
    return sum(size * c.trace() for size, c in classes_of(potential, f, y, mass))


def label_losses(potential: Potential, f: Tensor, y: Tensor) -> Tensor:
    """The losses of one output under all labels."""
    k = len(f)
    if potential.on_simplex:
        labels = torch.eye(k, dtype=f.dtype)
    elif isinstance(potential, Logistic):
        labels = torch.tensor(list(itertools.product([0.0, 1.0], repeat=k)), dtype=f.dtype)
    else:
        labels = y
    return torch.stack([potential.loss(label, f) for label in labels])


def attainable_loss(
    potential: Potential, f: Tensor, y: Tensor, mass: Tensor, tau: float = 1.0
) -> Tensor:
    f, y, mass = f[mass > 0], y[mass > 0], mass[mass > 0]
    total = f.new_zeros(())
    for i in range(len(f)):
        losses = label_losses(potential, f[i], y)
        finite = potential.on_simplex or isinstance(potential, Logistic)
        share = torch.full_like(losses, 1 / len(losses)) if finite else mass / mass.sum()
        if tau == 0:
            soft = losses.max()
        elif math.isinf(tau):
            soft = (share * losses).sum()
        else:
            soft = tau * (share.log() + losses / tau).logsumexp(0)
        total = total + mass[i] * soft
    return total / mass.sum()


def predictive_entropy(potential: Potential, f: Tensor, y: Tensor, mass: Tensor) -> Tensor:
    return sum(
        m * potential.generalized_entropy(potential.link(row)) for m, row in zip(mass, f)
    ) / (mass.sum())
