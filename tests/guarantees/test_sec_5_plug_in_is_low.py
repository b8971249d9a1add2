"""Section 5: entropies of counts are low on average, and the jackknife is above them.

Entropies are concave in the law, so a plug-in estimate is at most the truth in expectation, and at
least the mean of its leave-one-out values. Expectations are sums over all samples of a small finite
law, in float64; tolerances are of rounding size.
"""

import itertools
import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conjopt.entropy import (
    conditional_entropy,
    quantized_conditional_entropy,
    quantized_feature_entropies,
)
from conjopt.potentials import Entmax, Logistic, Poisson, Softmax, Sparsemax, Squared

TINY = 1e-12
POTENTIALS = [Softmax(), Sparsemax(), Entmax(1.5), Squared(), Logistic(), Poisson()]


@st.composite
def laws(draw):
    """Probabilities of pairs: row z of the table is a cell, column y a class."""
    cells, classes = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    weights = st.floats(0.01, 1)
    flat = draw(st.lists(weights, min_size=cells * classes, max_size=cells * classes))
    table = torch.tensor(flat, dtype=torch.float64).reshape(cells, classes)
    return table / table.sum()


def samples(table, n):
    """All samples of n up to their order: cells, classes, probability."""
    cells, classes = table.shape
    for atoms in itertools.combinations_with_replacement(range(cells * classes), n):
        atoms = torch.tensor(atoms)
        count = torch.bincount(atoms, minlength=cells * classes).double()
        log = (
            math.lgamma(n + 1)
            - torch.lgamma(count + 1).sum()
            + (count * table.log().flatten()).sum()
        )
        yield atoms // classes, atoms % classes, log.exp()


def renyi_half(table):
    return 2 * (table / table.sum()).sqrt().sum().log()


@settings(max_examples=25)
@given(laws(), st.integers(1, 4))
def test_feature_entropies_are_low_and_the_jackknife_is_above(table, n):
    mean = half = total = 0.0
    for z, y, p in samples(table, n):
        rows = z[:, None].double()
        plain = quantized_feature_entropies(rows, y, quantum=None, correction="none")
        moved = quantized_feature_entropies(rows, y, quantum=None, correction="jackknife")
        assert (moved.shannon >= plain.shannon - TINY).all()
        assert (moved.half >= plain.half - TINY).all()
        one = quantized_feature_entropies(rows, quantum=None, correction="none")
        mean, half, total = mean + p * plain.conditional, half + p * one.half[0], total + p
    assert abs(total - 1) < TINY
    truth = torch.special.entr(table).sum() - torch.special.entr(table.sum(0)).sum()
    assert mean <= truth + TINY
    assert half <= renyi_half(table.sum(1)) + TINY


@settings(max_examples=25)
@given(laws(), st.integers(1, 4), st.sampled_from(POTENTIALS), st.integers(0, 2**32))
def test_the_entropy_of_targets_is_low_and_the_jackknife_is_above(table, n, potential, seed):
    k = table.shape[1]
    points = torch.randn(k, 2, generator=torch.Generator().manual_seed(seed)).double()
    if potential.on_simplex:
        points = torch.eye(k, dtype=torch.float64)
    elif potential != Squared():
        points = points.sigmoid()
    mean = 0.0
    for z, y, p in samples(table, n):
        rows, targets = z[:, None].double(), points[y]
        plain, moved = (
            quantized_conditional_entropy(rows, targets, potential, quantum=None, correction=c)
            for c in ("none", "jackknife")
        )
        assert moved >= plain
        mean += p * plain
    cells, classes = table.shape
    z = torch.arange(cells).repeat_interleave(classes)
    truth = conditional_entropy(points.repeat(cells, 1), z, potential, weights=table.flatten())
    assert mean <= truth + TINY


@settings(max_examples=25)
@given(laws(), st.integers(1, 4), st.sampled_from([Squared(), Sparsemax()]))
def test_the_jackknife_has_no_bias_for_squares_but_for_single_samples(table, n, potential):
    # Ent is half a variance there, and what lacks is that of cells with one sample.
    cells, classes = table.shape
    targets = torch.eye(classes, dtype=torch.float64)
    z = torch.arange(cells).repeat_interleave(classes)
    of_cell = [conditional_entropy(targets, [0] * classes, potential, weights=row) for row in table]
    found = lacking = 0.0
    for z, y, p in samples(table, n):
        rows = z[:, None].double()
        found += p * quantized_conditional_entropy(
            rows, targets[y], potential, quantum=None, correction="jackknife"
        )
        single = torch.bincount(z, minlength=cells) == 1
        lacking += p * sum(e for e, alone in zip(of_cell, single.tolist()) if alone) / n
    truth = sum(share * e for share, e in zip(table.sum(1), of_cell))
    assert abs(found + lacking - truth) < TINY
