"""Thm 4.1: the gap lies in its range, on random finite laws and every sample of small ones.

The risk under the law is an exact sum in float64; tolerances are of rounding size.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conjopt.bounds import generalization_range
from conjopt.entropy import conditional_entropy
from conjopt.potentials import Entmax, Logistic, Potential, Softmax, Sparsemax, Squared

POTENTIALS = [Softmax(), Sparsemax(), Entmax(1.5), Squared(), Logistic()]
ROUNDING = 1e-12


def entropy_of_groups(potential: Potential, y: np.ndarray, z: np.ndarray, p: np.ndarray) -> float:
    """`E Phi(Y) - Phi(E[Y|Z])`, one group after the other."""
    total = 0.0
    for value in np.unique(z):
        weight = p[z == value]
        if weight.sum() == 0:
            continue
        points = torch.from_numpy(y[z == value])
        share = torch.from_numpy(weight / weight.sum())
        mean = (share @ points).clamp(max=1)  # not beyond the domain by rounding
        gap = share @ potential.value(points) - potential.value(mean)
        total += weight.sum() * float(gap)
    return total


@st.composite
def laws(draw: st.DrawFn):
    """Points (z, y) with probabilities, and the losses of a head that is a table over z."""
    potential = draw(st.sampled_from(POTENTIALS))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    size, k, features = draw(st.integers(1, 8)), draw(st.integers(2, 3)), draw(st.integers(1, 3))
    z = rng.integers(features, size=size)
    if potential.on_simplex:
        y = np.eye(k)[rng.integers(k, size=size)]
        if draw(st.booleans()):
            y = 0.8 * y + 0.2 * rng.dirichlet(np.ones(k), size=size)
    else:
        y = (
            rng.random((size, k))
            if potential == Squared()
            else rng.integers(2, size=(size, k)) * 1.0
        )
    q = rng.dirichlet(np.full(size, 0.5))
    head = draw(st.sampled_from([0.1, 1.0, 5.0])) * rng.standard_normal((features, k))
    losses = potential.loss(torch.from_numpy(y), torch.from_numpy(head[z])).numpy()
    return potential, z, y, q / q.sum(), losses


@given(laws(), st.integers(1, 30), st.integers(0, 2**32))
def test_the_gap_is_in_the_range(law, n, seed):
    potential, z, y, q, losses = law
    drawn = np.random.default_rng(seed).choice(len(q), size=n, p=q)
    gamma = losses.max() + 1e-9
    targets = torch.from_numpy(y[drawn])
    sample_entropy = float(conditional_entropy(targets, torch.from_numpy(z[drawn]), potential))
    entropy = entropy_of_groups(potential, y, z, q)
    found = generalization_range(
        losses[drawn], max_loss=gamma, sample_entropy=sample_entropy, entropy=max(entropy, 0.0)
    )
    gap = q @ losses - losses[drawn].mean()
    assert found.lower - ROUNDING <= gap <= found.upper + ROUNDING
    assert found.measured_lower - ROUNDING <= gap <= found.measured_upper + ROUNDING
    # What is known of the losses can only help.
    assert found.lower <= found.measured_lower + ROUNDING
    assert found.measured_upper <= found.upper + ROUNDING
    # Each end is what the theorem says.
    uniform = np.full(n, 1 / n)
    plain = entropy_of_groups(potential, y[drawn], z[drawn], uniform)
    assert found.upper == pytest.approx(gamma - plain, abs=1e-9)
    assert found.lower == pytest.approx(entropy - losses[drawn].max(), abs=1e-9)


@given(laws())
def test_the_gap_of_every_small_sample_is_in_the_range(law):
    potential, z, y, q, losses = law
    z, y, losses = z[:4], y[:4], losses[:4]
    q = np.full(len(z), 1 / len(z)) if q[:4].sum() == 0 else q[:4] / q[:4].sum()
    entropy = max(entropy_of_groups(potential, y, z, q), 0.0)
    for drawn in itertools.product(range(len(z)), repeat=3):
        rows = list(drawn)
        sample_entropy = entropy_of_groups(potential, y[rows], z[rows], np.full(3, 1 / 3))
        found = generalization_range(
            losses[rows],
            max_loss=losses.max() + 1e-9,
            sample_entropy=max(sample_entropy, 0.0),
            entropy=entropy,
        )
        gap = q @ losses - losses[rows].mean()
        assert found.lower - ROUNDING <= gap <= found.upper + ROUNDING


def test_both_ends_are_attained():
    # Fair coins at f = 0: the law and a balanced sample have the risk log 2, their entropy.
    coins = generalization_range(
        [math.log(2)] * 2,
        max_loss=math.log(2),
        sample_entropy=math.log(2),
        entropy=math.log(2),
    )
    assert coins.lower == coins.upper == 0
    # A deterministic law and a head that is wrong wherever the sample was not.
    assert generalization_range([0.0, 0.0], max_loss=3.0).upper == 3.0
    # A head that is right except on the sample.
    assert generalization_range([3.0, 3.0], max_loss=3.0).lower == -3.0


def test_information_loss_narrows_the_range_from_above():
    y, x = [0, 1, 0, 1], [0, 1, 2, 3]
    losses = [math.log(2)] * 4
    ends = [
        generalization_range(
            losses, max_loss=2.0, sample_entropy=float(conditional_entropy(y, z, Softmax()))
        ).upper
        for z in (x, [0, 0, 1, 1])
    ]
    assert ends == pytest.approx([2.0, 2 - math.log(2)], abs=1e-15)
