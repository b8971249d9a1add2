"""The numbers behind the causes of Thm 2.3, on what was read of a loader."""

from __future__ import annotations

import dataclasses
import math
import random
from typing import Any

import torch
from torch import Tensor, nn

from conjopt.diagnosis.reading import Seen, taken
from conjopt.losses.reading import PotentialOf
from conjopt.measure import (
    batch_structure_matrix,
    noise_from_norms,
    per_sample_gradient_norms,
    top_curvature,
)
from conjopt.measure.krylov import Ritz
from conjopt.measure.linearised import Linearised
from conjopt.measure.structure import tangent_basis

__all__ = ["HIDDEN", "Numbers", "measure", "risks"]

HIDDEN = 1e-4
"""Share of `hi(K_B) / m` below which an eigenvalue of `K_B` counts as 0: along its direction the
largest stable step of plain descent takes more than `m / HIDDEN` steps."""

MOST_COORDINATES = 1280  # `m dim V` up to which structure matrices of batches are formed
LEAST_SAMPLES = 64  # that have to fit into them; else there are only products
PRODUCTS = 60  # of Lanczos from the residuals; half as many for the greatest eigenvalue
DIRECTIONS = 8  # of outputs along which the samples' sensitivities are compared


@dataclasses.dataclass(frozen=True)
class Numbers:
    """What was measured, in units of the mean Fenchel-Young loss; NaN where it was not.

    Attributes:
        samples: `n`, whose losses were seen.
        probed: `m`, whose gradients were.
        parameters: `P`, that are trained.
        dimensions: `dim V` of one sample.
        constant: `Ent(Y)`, the loss of the best constant prediction.
        risk: `R`, the mean loss.
        floor: The data floor `Ent(Y|X)`; `risk = floor + excess`.
        excess: The mean loss against the mean target of equal inputs.
        hidden: Share of the squared residuals, of the excess, in directions whose eigenvalue of
            `K_B` is below `HIDDEN hi(K_B) / m`.
        unresolved: Further share that may be hidden, as products alone do not tell; 0 if matrices
            were formed.
        compared: Samples that `hidden` is about.
        own: Share of the samples' squared sensitivities that is not common to all of them.
        energy: `E`, the gradient energy.
        gradient: `||g_B||^2` of the probe.
        noise: Estimate of `S^2`.
        curvature: `hi(GGN)`.
        scale: Factor between the criterion of a batch and the mean Fenchel-Young loss.
    """

    samples: int
    probed: int
    parameters: int
    dimensions: int
    constant: float
    risk: float
    floor: float
    excess: float
    hidden: float = math.nan
    unresolved: float = 0.0
    compared: int = 0
    own: float = math.nan
    energy: float = math.nan
    gradient: float = math.nan
    noise: float = math.nan
    curvature: float = math.nan
    scale: float = math.nan

    @property
    def visible(self) -> float:
        """The excess that plain descent can take away."""
        return self.excess * (1 - self.hidden)


def risks(model: nn.Module, view: PotentialOf, seen: Seen) -> tuple[Numbers, Tensor]:
    """Split the risk of all samples seen into floor and excess (Thm 1.3).

    Args:
        model: Whose parameters are counted.
        view: The criterion.
        seen: What was read.

    Returns:
        The numbers without those of gradients, and the mean targets of equal inputs, `(R, k)`.
    """
    f, y = seen.outputs, seen.targets
    weight = view.weights(f, y).double()
    points = view.points(f, y).double()
    rows = view.rows(f).double()
    # The outputs for one sample at different places are functions of the whole input, and differ.
    places = max(1, len(rows) // len(f))
    place = torch.arange(places, device=f.device)
    group = (seen.groups.unsqueeze(1) * places + place).flatten()
    number = int(group.max()) + 1
    mass = weight.new_zeros(number).index_add_(0, group, weight)
    total = points.new_zeros(number, points.shape[1]).index_add_(
        0, group, weight.unsqueeze(1) * points
    )
    repeated = torch.bincount(group, minlength=number)[group] > 1
    means = total / torch.where(mass > 0, mass, 1).unsqueeze(1)
    alone = ~(repeated & (mass[group] > 0)).unsqueeze(1)
    means = torch.where(alone, points, means[group])
    potential = view.potential

    def mean(values: Tensor) -> float:
        return float(torch.where(weight > 0, weight * values, 0).sum())

    value = potential.value(points)
    overall = (weight.unsqueeze(1) * points).sum(0)
    floor = max(0.0, mean(torch.where(alone.squeeze(1), 0, value - potential.value(means))))
    excess = max(0.0, mean(potential.loss(means, rows)))
    numbers = Numbers(
        samples=len(f),
        probed=len(seen.probe),
        parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        dimensions=f[0].numel() - (places if potential.on_simplex else 0),
        constant=max(0.0, mean(value) - float(potential.value(overall))),
        risk=floor + excess,
        floor=floor,
        excess=excess,
    )
    return numbers, means.to(points.dtype)


def measure(
    model: nn.Module, view: PotentialOf, seen: Seen, numbers: Numbers, means: Tensor, seed: int
) -> Numbers:
    """Add the numbers of gradients and structure, on the probe.

    Args:
        model: In `eval()` mode.
        view: The criterion.
        seen: What was read.
        numbers: From `risks`.
        means: From `risks`.
        seed: Of the directions.

    Returns:
        All numbers.
    """
    linear = Linearised(model, seen.inputs, view.potential)
    f, y, m = linear.outputs, seen.targets[seen.probe], len(seen.probe)
    rows, back = torch.func.vjp(view.rows, f)[:2]
    weight = view.weights(f, y).to(rows.dtype).unsqueeze(1)
    places = len(rows) // m
    at = (seen.probe.unsqueeze(1) * places + torch.arange(places, device=f.device)).flatten()
    link = view.potential.link(rows)
    counts = weight > 0
    raw = torch.where(counts, link - view.points(f, y).to(rows), 0)
    over = torch.where(counts, link - means[at].to(rows), 0)
    root = back((m * weight).sqrt().expand_as(rows).contiguous())[0]
    start = (root * back(over)[0]).flatten().to(linear.zero.dtype)
    root = root.flatten().to(linear.zero.dtype)

    def structure(v: Tensor) -> Tensor:  # of K_B, weighed as the criterion weighs
        return root * linear.structure(root * v)

    few = min(m, MOST_COORDINATES // max(1, numbers.dimensions))
    if few >= min(m, LEAST_SAMPLES):
        part = torch.arange(few, device=f.device) * m // few
        inputs = taken(seen.inputs, part, m)
        hidden = _hidden_exactly(model, view, inputs, root.view_as(f)[part], start.view_as(f)[part])
        unresolved = 0.0
    else:
        few = m
        draw = torch.Generator().manual_seed(seed)
        other = linear.project(torch.randn(f.shape, generator=draw).to(f)).flatten().to(start)
        hidden, unresolved = _hidden_from_products(
            linear.solve(structure, start, PRODUCTS),
            linear.solve(structure, other, PRODUCTS // 2),
            m,
        )

    cotangent = back(weight * raw)[0]
    norms = per_sample_gradient_norms(model, _Along(m * cotangent), seen.inputs, y).detach()
    square = linear.pull(cotangent).square().sum()
    noise = math.nan
    if m > 1:
        population = numbers.samples if seen.complete else None
        noise = float(noise_from_norms(norms, square.to(norms), population=population).noise)
    residuals = back(over)[0]
    return dataclasses.replace(
        numbers,
        hidden=hidden,
        unresolved=unresolved,
        compared=few,
        own=_own_share(model, linear, seen.inputs, residuals, y, random.Random(seed)),
        energy=float(norms.double().square().mean()),
        gradient=float(square),
        noise=noise,
        curvature=float(top_curvature(model, view.potential, seen.inputs)),
        scale=float(view.scale(f, y)),
    )


def _hidden_exactly(
    model: nn.Module, view: PotentialOf, inputs: Any, root: Tensor, residuals: Tensor
) -> float:
    """Return the share of the squared residuals where `K_B` has no eigenvalues to speak of."""
    K = batch_structure_matrix(model, inputs, potential=view.potential).double()
    m = len(root)
    basis = tangent_basis(root.shape[1:], view.potential, device=root.device)
    weight = (root.flatten(1).double() @ basis.square().mT).flatten()  # equal over the classes
    values, vectors = torch.linalg.eigh(weight.unsqueeze(1) * K * weight)
    squares = (vectors.mT @ (residuals.flatten(1).double() @ basis.mT).flatten()).square()
    total, top = squares.sum(), values[-1]
    if not bool(total > 0):
        return 0.0
    small = values <= HIDDEN * top / m
    return float(squares[small].sum() / total) if bool(top > 0) else 1.0


def _hidden_from_products(residuals: Ritz, other: Ritz, m: int) -> tuple[float, float]:
    """Return that share and what may come to it, from Gauss quadrature.

    Of the mass below a threshold the quadrature misses at most that of the next node.
    """
    top = max(0.0, float(other.values.max()), float(residuals.values.max()))
    if not top:
        return 1.0, 0.0
    small = residuals.values <= HIDDEN * top / m
    hidden = float(residuals.weights[small].sum())
    over = torch.where(small, torch.inf, residuals.values)
    least = over.min()
    missed = float(residuals.weights[over == least].sum()) if bool(least < top / m) else 0.0
    return min(1.0, hidden), missed


def _own_share(
    model: nn.Module,
    linear: Linearised,
    inputs: Any,
    residuals: Tensor,
    targets: Tensor,
    draw: random.Random,
) -> float:
    """Return `1 - ||mean_i J_i^T q||^2 / mean_i ||J_i^T q||^2`, for residuals `q` of samples."""
    m = len(residuals)
    live = residuals.flatten(1).norm(dim=1).nonzero().squeeze(1).tolist()
    if m < 2 or not live:
        return math.nan
    total = common = 0.0
    for i in draw.sample(live, min(DIRECTIONS, len(live))):
        q = (residuals[i] / residuals[i].norm()).expand_as(residuals).contiguous()
        norms = per_sample_gradient_norms(model, _Along(q), inputs, targets).detach().double()
        total += float(norms.square().mean())
        common += float(linear.pull(q / m).double().square().sum())
    return max(0.0, 1 - common / total) if total > 0 else 0.0


class _Along:
    """A loss whose gradient in the outputs is given."""

    reduction = "sum"

    def __init__(self, cotangent: Tensor) -> None:
        self._cotangent = cotangent

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs * self._cotangent.to(outputs)).sum()
