"""Section 5: the leave-one-out cross-entropy is at least `Ent(Y|Z)` in expectation.

Finite laws of `(Z, Y)`, the expectation over all samples of 2 or 3 as an exact sum in float64, so
the tolerance is of rounding size. Targets are inside of the domain where the slope of `Phi` is
infinite on its boundary: else the expectation is infinite, and the bound says nothing.
"""

import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conjopt.entropy import conditional_entropy, kernel_conditional_entropy
from conjopt.potentials import Entmax, Logistic, Poisson, Softmax, Sparsemax, Squared

EPS = torch.finfo(torch.float64).eps


@st.composite
def laws(draw):
    """A potential, and atoms of a law: outputs, targets, probabilities."""
    potential = draw(
        st.sampled_from([Softmax(), Sparsemax(), Entmax(1.5), Squared(), Logistic(), Poisson()])
    )
    atoms, cells = draw(st.integers(2, 4)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    noise = torch.randn(atoms, 3, generator=generator, dtype=torch.float64)
    if potential == Softmax():
        targets = (2 * noise).softmax(1)
    elif potential.on_simplex:
        targets = torch.eye(3, dtype=torch.float64)[noise.argmax(1)]
    elif potential == Logistic():
        targets = noise.sigmoid()
    else:
        targets = noise.exp() if potential == Poisson() else noise
    places = torch.randn(cells, 2, generator=generator, dtype=torch.float64)
    outputs = places[torch.randint(cells, (atoms,), generator=generator)]
    share = torch.rand(atoms, generator=generator, dtype=torch.float64) + 0.01
    return potential, outputs, targets, share / share.sum()


def expectation(law, n, bandwidth, form):
    """The mean of the estimate over all samples of `n`."""
    potential, outputs, targets, share = law
    total = 0.0
    for drawn in itertools.product(range(len(share)), repeat=n):
        rows = list(drawn)
        estimate = kernel_conditional_entropy(
            outputs[rows], targets[rows], potential, bandwidth=bandwidth, form=form
        )
        total += share[rows].prod() * estimate
    return total


@settings(max_examples=30)
@given(laws(), st.integers(2, 3), st.sampled_from([0.01, 0.1, 1.0, 100.0]))
def test_the_cross_entropy_form_is_an_upper_bound_in_expectation(law, n, bandwidth):
    potential, outputs, targets, share = law
    truth = conditional_entropy(targets, outputs, potential, weights=share)
    found = expectation(law, n, bandwidth, "cross-entropy")
    assert found >= truth - 64 * EPS * (1 + potential.value(targets).abs().max() + found)


def test_the_plug_in_form_is_not_a_bound_on_either_side():
    share = torch.tensor([0.5, 0.5], dtype=torch.float64)
    targets = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    # Of two samples, the plug-in is (y_1^2 - y_2^2 + y_2^2 - y_1^2) / 4 = 0 whatever they are.
    one_cell = Squared(), torch.zeros(2, 1, dtype=torch.float64), targets, share
    truth = conditional_entropy(targets, [0, 0], Squared(), weights=share)
    assert expectation(one_cell, 2, 0.1, "plug-in") < truth - 0.4
    # Two cells with a target each, and a kernel that is wide: neighbours are of the other cell.
    two_cells = Squared(), targets, targets, share
    truth = conditional_entropy(targets, targets, Squared(), weights=share)
    assert truth == 0
    assert expectation(two_cells, 3, 100.0, "plug-in") > 0.1
