"""Thm 1.3: the risk is the floor plus the excess, on random and extreme instances in float64.

Tolerances are of rounding size: a multiple of `eps` times the size of the terms that are added.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from conjopt.entropy import conditional_entropy, data_floor, risk_decomposition
from conjopt.potentials import Entmax, Logistic, Poisson, Potential, Softmax, Sparsemax, Squared

EPS = torch.finfo(torch.float64).eps
POTENTIALS = [Softmax(), Sparsemax(), Entmax(1.3), Squared(), Logistic(), Poisson()]


def draw_targets(
    potential: Potential, kind: str, n: int, k: int, generator: torch.Generator
) -> Tensor:
    """Hard targets, soft ones with zeros, or ones in the interior of the domain."""
    noise = torch.randn(n, k, generator=generator, dtype=torch.float64)
    if potential.on_simplex:
        if kind == "hard":
            return F.one_hot(noise.argmax(1), k).double()
        y = noise.exp() if kind == "inside" else noise.relu() + (noise == noise.amax(1, True))
        return y / y.sum(1, keepdim=True)
    if kind == "hard":
        return (noise > 0).double()
    if potential == Squared():
        return 100 * noise
    y = noise.sigmoid() if kind == "inside" else noise.clamp(0, 1)
    return y if potential == Logistic() else 20 * y


@st.composite
def instances(
    draw: st.DrawFn, kinds: tuple[str, ...] = ("hard", "soft", "inside")
) -> tuple[Potential, Tensor, Tensor, Tensor]:
    potential = draw(st.sampled_from(POTENTIALS))
    n, k = draw(st.integers(1, 40)), draw(st.sampled_from([1, 2, 3, 10]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    groups = torch.randint(draw(st.sampled_from([1, 4, 100])), (n,), generator=generator)
    weights = torch.ones(n, dtype=torch.float64)
    if draw(st.booleans()):
        weights = 10 ** (3 * torch.randn(n, generator=generator, dtype=torch.float64))
    kind = draw(st.sampled_from(kinds))
    return potential, draw_targets(potential, kind, n, k, generator), groups, weights


def size(potential: Potential, y: Tensor, f: Tensor) -> Tensor:
    """The terms that a risk is added of, the greatest of a sample."""
    return (
        potential.value(y).abs() + potential.conjugate(f).abs() + (y * f).abs().sum(1)
    ).max() + 1


def means(y: Tensor, groups: Tensor, weights: Tensor) -> Tensor:
    """The mean target of each sample's group, by a dense matrix."""
    same = (groups[:, None] == groups) * weights
    return (same / same.sum(1, keepdim=True)) @ y


@given(instances(), st.integers(0, 2**32), st.sampled_from([0.0, 1e-3, 1.0, 30.0]))
def test_risk_is_floor_plus_excess(instance, seed, scale):
    potential, y, groups, weights = instance
    generator = torch.Generator().manual_seed(seed)
    table = scale * torch.randn(100, y.shape[1], generator=generator, dtype=torch.float64)
    f = table[groups].clamp(max=5) if potential == Poisson() else table[groups]
    parts = risk_decomposition(f, y, groups, potential, weights=weights)

    mass, rounding = weights.sum(), 64 * EPS * size(potential, y, f)
    risk = (potential.loss(y, f) * weights).sum() / mass
    excess = (potential.loss(means(y, groups, weights), f) * weights).sum() / mass
    assert (parts.risk - risk).abs() <= rounding
    assert (parts.excess - excess).abs() <= rounding
    floor = conditional_entropy(y, groups, potential, weights=weights)
    assert (parts.floor - floor).abs() <= 64 * EPS * floor
    assert (parts.risk - parts.floor - parts.excess).abs() <= rounding
    assert parts.risk >= parts.floor - rounding
    assert min(parts.floor, parts.excess) >= 0


def inverse_link(potential: Potential, y: Tensor) -> Tensor:
    """Outputs whose link is `y`, a point of the interior of the domain."""
    if potential == Logistic():
        return y.logit()
    if isinstance(potential, Entmax):
        return (y ** (potential.order - 1) - 1) / (potential.order - 1)
    return y if potential == Squared() else y.log()


@given(instances(kinds=("inside",)))
def test_the_floor_is_attained(instance):
    potential, y, groups, weights = instance
    f = inverse_link(potential, means(y, groups, weights))
    first = (groups[:, None] == groups).double().argmax(1)  # equal to the last bit in a group
    parts = risk_decomposition(f[first], y, groups, potential, weights=weights)
    rounding = 64 * EPS * size(potential, y, f)
    assert parts.excess <= rounding
    assert (parts.risk - parts.floor).abs() <= rounding


@given(instances(kinds=("hard",)), st.integers(0, 2**32))
def test_no_function_of_the_inputs_beats_the_floor(instance, seed):
    """Also in the units of torch's criteria, near the best output where a wrong floor shows."""
    potential, y, groups, weights = instance
    noise = torch.randn(
        100, y.shape[1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    inputs = noise[groups]
    floor = data_floor(inputs, y, potential, weights=weights)
    best = means(y, groups, weights).clamp(1e-6, 1 - 1e-6)
    first = (groups[:, None] == groups).double().argmax(1)
    f = inverse_link(potential, best)[first] + 1e-3 * noise.roll(1, 0)[groups]
    losses = potential.loss(y, f)
    if potential == Softmax():
        losses = F.cross_entropy(f, y.argmax(1), reduction="none")
    elif potential == Logistic():
        losses = F.binary_cross_entropy_with_logits(f, y, reduction="none").sum(1)
    elif potential == Squared():
        losses = F.mse_loss(f, y, reduction="none").mean(1) * y.shape[1] / 2
    risk = (losses * weights).sum() / weights.sum()
    assert risk >= floor - 64 * EPS * size(potential, y, f)
    assert risk <= floor + 1e-3 * y.shape[1]


@pytest.mark.parametrize("potential", POTENTIALS, ids=repr)
def test_equal_inputs_with_different_targets_make_a_floor(potential):
    y = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    assert data_floor([3, 3, 4, 5], y, potential) > 0.1
    assert data_floor([3, 2, 4, 5], y, potential) == 0
