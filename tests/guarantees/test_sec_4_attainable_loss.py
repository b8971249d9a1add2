"""Section 4: no target loses more than the attainable loss, and a target loses as much.

Tolerances are of rounding size: a multiple of `eps` times the size of the terms that are added.
"""

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from conjopt.entropy import attainable_losses, attainable_maximum_loss, observed_maximum_loss
from conjopt.potentials import Entmax, Logistic, Poisson, Softmax, Sparsemax, Squared

EPS = torch.finfo(torch.float64).eps
ON_SIMPLEX = [Softmax(), Sparsemax(), Entmax(1.3)]
SEPARABLE = [Squared(), Logistic(), Poisson()]


@st.composite
def instances(draw):
    """A potential, outputs, the ends of the targets, targets between them."""
    potential = draw(st.sampled_from([*ON_SIMPLEX, *SEPARABLE]))
    n, k = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    scale = draw(st.sampled_from([0.1, 1.0, 5.0, 30.0 if potential != Poisson() else 3.0]))
    outputs = scale * torch.randn(n, k, generator=generator, dtype=torch.float64)
    mix = torch.rand(n, k, generator=generator, dtype=torch.float64)
    if potential.on_simplex:
        return potential, outputs, {}, (8 * mix).softmax(1)
    least = torch.rand(k, generator=generator, dtype=torch.float64) / 2
    ends = {"least": least, "greatest": least + (0.5 if potential == Logistic() else 3)}
    if potential == Logistic() and draw(st.booleans()):
        return potential, outputs, {}, mix
    return potential, outputs, ends, least + mix * (ends["greatest"] - least)


def corners(potential, k, ends):
    if potential.on_simplex:
        return torch.eye(k, dtype=torch.float64)
    zero, one = torch.zeros(k).double(), torch.ones(k).double()
    pairs = zip(ends.get("least", zero).tolist(), ends.get("greatest", one).tolist())
    return torch.tensor(list(itertools.product(*pairs)), dtype=torch.float64)


@given(instances())
def test_no_target_loses_more_and_a_corner_loses_as_much(instance):
    potential, outputs, ends, targets = instance
    attainable = attainable_losses(outputs, potential, **ends)
    size = 1 + attainable.max() + potential.conjugate(outputs).abs().max()
    losses = potential.loss(targets, outputs)
    assert (losses <= attainable + 64 * EPS * size).all()
    at_corners = potential.loss(corners(potential, outputs.shape[1], ends), outputs[:, None])
    assert (at_corners.amax(1) - attainable).abs().max() <= 64 * EPS * size
    observed = observed_maximum_loss(outputs, targets, potential)
    assert (observed - losses.max().clamp(min=0)).abs() <= 64 * EPS * size
    assert observed <= attainable_maximum_loss(outputs, potential, **ends) + 64 * EPS * size
