"""Thm 1.4: a map raises the floor by its information loss, on random instances in float64.

Tolerances are of rounding size: a multiple of `eps` times the size of the terms that are added.
"""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from conjopt.entropy import conditional_entropy, information_loss
from conjopt.potentials import Entmax, Logistic, Poisson, Potential, Softmax, Sparsemax, Squared

EPS = torch.finfo(torch.float64).eps
POTENTIALS = [Softmax(), Sparsemax(), Entmax(1.3), Squared(), Logistic(), Poisson()]


def draw_targets(
    potential: Potential, hard: bool, n: int, k: int, generator: torch.Generator
) -> Tensor:
    noise = torch.randn(n, k, generator=generator, dtype=torch.float64)
    if potential.on_simplex:
        if hard:
            return noise.argmax(1) if k > 1 else torch.zeros(n, dtype=torch.int64)
        y = noise.relu() + (noise == noise.amax(1, True))
        return y / y.sum(1, keepdim=True)
    if hard:
        return noise > 0
    if potential == Squared():
        return 100 * noise
    return noise.clamp(0, 1) if potential == Logistic() else 20 * noise.clamp(0, 1)


@st.composite
def instances(draw: st.DrawFn) -> tuple[Potential, Tensor, Tensor, Tensor]:
    """A potential, targets, values of X in [0, 16) and weights."""
    potential = draw(st.sampled_from(POTENTIALS))
    n, k = draw(st.integers(1, 40)), draw(st.sampled_from([1, 2, 3, 10]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    x = torch.randint(16, (n,), generator=generator)
    weights = torch.ones(n, dtype=torch.float64)
    if draw(st.booleans()):
        weights = 10 ** (3 * torch.randn(n, generator=generator, dtype=torch.float64))
    return potential, draw_targets(potential, draw(st.booleans()), n, k, generator), x, weights


def as_points(potential: Potential, y: Tensor) -> Tensor:
    if potential.on_simplex and y.ndim == 1:
        y = F.one_hot(y)
    return y.double()


def rounding(potential: Potential, y: Tensor) -> Tensor:
    return 64 * EPS * (1 + potential.value(as_points(potential, y)).abs().max())


@given(instances(), st.integers(0, 2**32), st.sampled_from([1, 2, 5, 16]))
def test_a_map_raises_the_floor_by_its_information_loss(instance, seed, values):
    potential, y, x, weights = instance
    z = torch.randint(values, (16,), generator=torch.Generator().manual_seed(seed))[x]
    before = conditional_entropy(y, x, potential, weights=weights)
    after = conditional_entropy(y, z, potential, weights=weights)
    loss = information_loss(y, x, z, potential, weights=weights)
    assert loss >= 0
    assert (after - before - loss).abs() <= rounding(potential, y)


@given(instances(), st.integers(0, 2**32))
def test_an_injective_map_loses_nothing(instance, seed):
    potential, y, x, weights = instance
    z = torch.randperm(16, generator=torch.Generator().manual_seed(seed))[x]
    assert information_loss(y, x, z, potential, weights=weights) == 0
    before = conditional_entropy(y, x, potential, weights=weights)
    after = conditional_entropy(y, z, potential, weights=weights)
    assert (after - before).abs() <= rounding(potential, y)


@given(instances())
def test_the_absolute_value_loses_nothing_if_the_mean_target_is_even(instance):
    potential, y, x, weights = instance
    # Each sample again at -x, in another order: sums are rounded in another way.
    x, y, weights = (
        torch.cat([x, -x.flip(0)]),
        torch.cat([y, y.flip(0)]),
        torch.cat([weights, weights.flip(0)]),
    )
    assert information_loss(y, x, x.abs(), potential, weights=weights) <= rounding(potential, y)


@given(instances())
def test_a_map_that_unites_different_means_loses(instance):
    potential, y, x, weights = instance
    points = as_points(potential, y)
    points = points.reshape(len(points), -1)
    same = (x[:, None] == x) * weights
    means = (same / same.sum(1, keepdim=True)) @ points
    if (means - means[0]).abs().max() <= 1e-3 * means.abs().max():
        return
    assert information_loss(y, x, 0 * x, potential, weights=weights) > 0


@given(instances(), st.integers(0, 2**32))
def test_losses_along_a_chain_add_up(instance, seed):
    potential, y, x, weights = instance
    generator = torch.Generator().manual_seed(seed)
    z = torch.randint(6, (16,), generator=generator)[x]
    last = torch.randint(3, (6,), generator=generator)[z]
    whole = information_loss(y, x, last, potential, weights=weights)
    first = information_loss(y, x, z, potential, weights=weights)
    second = information_loss(y, z, last, potential, weights=weights)
    assert (whole - first - second).abs() <= rounding(potential, y)


def test_the_sign_of_an_odd_function_is_lost_by_the_absolute_value():
    x = torch.tensor([-2.0, -1.0, 1.0, 2.0])
    loss = information_loss(x, x, x.abs(), Squared())
    torch.testing.assert_close(loss, x.double().square().mean() / 2)
