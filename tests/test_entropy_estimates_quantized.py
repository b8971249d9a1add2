"""Quantized entropies against plain counting, their corrections, and bad input."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conjopt.entropy import (
    conditional_entropy,
    quantized_conditional_entropy,
    quantized_feature_entropies,
)
from conjopt.potentials import Entmax, Logistic, Poisson, Softmax, Sparsemax, Squared

CORRECTIONS = ["none", "miller-madow", "jackknife"]
POTENTIALS = [Softmax(), Sparsemax(), Entmax(1.3), Squared(), Logistic(), Poisson()]


def shannon(labels):
    n = len(labels)
    return math.fsum(c / n * math.log(n / c) for c in Counter(labels).values())


def half(labels):
    n = len(labels)
    return 2 * math.log(math.fsum(math.sqrt(c / n) for c in Counter(labels).values()))


def jackknife(estimate, rows):
    """By its definition: every sample is left out once."""
    n = len(rows)
    if n < 2:
        return estimate(rows)
    left = math.fsum(estimate(rows[:i] + rows[i + 1 :]) for i in range(n)) / n
    return n * estimate(rows) - (n - 1) * left


@given(st.lists(st.integers(0, 5), min_size=1, max_size=25))
def test_the_closed_form_is_the_jackknife_of_each_entropy(cells):
    outputs = torch.tensor(cells).double()
    found = quantized_feature_entropies(outputs, quantum=1.0, correction="jackknife")
    assert abs(float(found.shannon) - jackknife(shannon, cells)) < 1e-11
    assert abs(float(found.half) - jackknife(half, cells)) < 1e-11


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), min_size=1, max_size=25))
def test_given_the_class_it_is_the_jackknife_of_the_whole_sample(pairs):
    def conditional(rows):
        return shannon(rows) - shannon([y for _, y in rows])

    outputs, targets = (list(column) for column in zip(*pairs))
    found = quantized_feature_entropies(
        np.array(outputs, dtype=float), targets, quantum=1.0, correction="jackknife"
    )
    assert abs(float(found.conditional) - jackknife(conditional, pairs)) < 1e-11


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), min_size=2, max_size=20),
    st.sampled_from(POTENTIALS),
    st.booleans(),
    st.integers(0, 2**32),
)
def test_the_closed_form_is_the_jackknife_for_every_potential(pairs, potential, hard, seed):
    cells = torch.tensor([z for z, _ in pairs])
    y = torch.tensor([y for _, y in pairs])
    table = torch.randn(3, 3, generator=torch.Generator().manual_seed(seed)).double()
    if potential.on_simplex:
        table = torch.eye(3).double() if hard else table.softmax(1)
        targets = y if hard else table[y]
    else:
        table = (table > 0).double() if hard else table.sigmoid()
        targets = table[y]

    def estimate(rows):
        rows = torch.tensor(rows)
        return float(conditional_entropy(targets[rows], cells[rows], potential))

    found = quantized_conditional_entropy(
        cells.double(), targets, potential, quantum=None, correction="jackknife"
    )
    assert abs(float(found) - jackknife(estimate, list(range(len(y))))) < 1e-11


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), min_size=1, max_size=25))
def test_miller_and_madow_add_the_cells_that_occur(pairs):
    z, y = (list(column) for column in zip(*pairs))
    n, occur, classes = len(pairs), len(set(pairs)), len(set(y))
    outputs = np.array(z, dtype=float)
    plain, moved = (
        quantized_feature_entropies(outputs, y, quantum=None, correction=c) for c in CORRECTIONS[:2]
    )
    added = float(moved.conditional - plain.conditional)
    assert abs(added - (occur - classes) / (2 * n)) < 1e-13
    plain, moved = (
        quantized_conditional_entropy(outputs, y, Softmax(), quantum=None, correction=c)
        for c in CORRECTIONS[:2]
    )
    assert abs(float(moved - plain) - (occur - len(set(z))) / (2 * n)) < 1e-13


def test_the_first_order_term_of_the_half_entropy_is_its_derivative():
    # The bias of order 1/n at a law p, by E f(p + X) = f + tr(f'' Cov X) / 2 with autograd.
    count = torch.tensor([9.0, 5.0, 2.0]).double()
    n, p = count.sum(), count / count.sum()
    hessian = torch.autograd.functional.hessian(lambda p: 2 * p.sqrt().sum().log(), p)
    bias = (hessian * (p.diag() - torch.outer(p, p)) / n).sum() / 2
    outputs = torch.arange(3).repeat_interleave(count.long()).double()
    plain, moved = (
        quantized_feature_entropies(outputs, quantum=None, correction=c).half
        for c in CORRECTIONS[:2]
    )
    assert abs(float(moved - plain + bias)) < 1e-13


# That corrections help is no theorem. Their bias was smaller on all of 4,800 random laws of 2 to 4
# cells with 2 to 14 samples; here is the same on random laws anew.
@settings(max_examples=20)
@given(
    st.lists(st.floats(0.01, 1), min_size=2, max_size=4),
    st.integers(2, 9),
    st.sampled_from(CORRECTIONS[1:]),
)
def test_corrections_lower_the_bias(weights, n, correction):
    p = torch.tensor(weights, dtype=torch.float64) / math.fsum(weights)
    bias = {c: torch.zeros(2, dtype=torch.float64) for c in ("none", correction)}
    truth = torch.stack([torch.special.entr(p).sum(), 2 * p.sqrt().sum().log()])
    for atoms in itertools.combinations_with_replacement(range(len(p)), n):
        outputs = torch.tensor(atoms).double()
        count = torch.bincount(outputs.long(), minlength=len(p)).double()
        log = math.lgamma(n + 1) - torch.lgamma(count + 1).sum() + (count * p.log()).sum()
        for name in bias:
            found = quantized_feature_entropies(outputs, quantum=None, correction=name)
            bias[name] += log.exp() * torch.cat([found.shannon, found.half])
    assert ((bias[correction] - truth).abs() < (bias["none"] - truth).abs()).all()


def test_corrections_lower_the_bias_of_the_entropy_of_targets():
    table = torch.tensor([[0.3, 0.1], [0.15, 0.45]], dtype=torch.float64)
    truth = (torch.special.entr(table).sum() - torch.special.entr(table.sum(1)).sum()).item()
    generator = torch.Generator().manual_seed(0)
    bias = []
    draws = torch.multinomial(table.flatten(), 400 * 20, True, generator=generator).reshape(400, 20)
    for correction in CORRECTIONS:
        found = [
            quantized_conditional_entropy(
                (atoms // 2).double(), atoms % 2, Softmax(), quantum=None, correction=correction
            )
            for atoms in draws
        ]
        bias.append(abs(float(torch.stack(found).mean()) - truth))
    # Standard error of each mean below 0.006, and the same draws for all; plug-in bias about 0.05.
    assert bias[0] > 0.04
    assert max(bias[1:]) < 0.02


@given(st.integers(1, 40), st.integers(0, 2**32), st.sampled_from([0.1, 1.0]))
def test_the_root_sum_is_that_of_the_cells(n, seed, quantum):
    generator = torch.Generator().manual_seed(seed)
    outputs = torch.randn(n, 2, generator=generator)
    targets = 3 * torch.randint(3, (n,), generator=generator)
    found = quantized_feature_entropies(outputs, targets, quantum=quantum, correction="none")
    rows = (outputs.double() / quantum).round().tolist()
    cells = Counter((y, *row) for y, row in zip(targets.tolist(), rows))
    assert found.cells == len(cells)
    assert abs(float(found.root_sum) - math.fsum(math.sqrt(c / n) for c in cells.values())) < 1e-12
    assert found.classes.tolist() == sorted(set(targets.tolist()))
    assert found.counts.tolist() == [(targets == c).sum() for c in found.classes]


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_limits(correction):
    def features(outputs, targets=None):
        return quantized_feature_entropies(outputs, targets, quantum=1.0, correction=correction)

    def targets_given(outputs, targets):
        return quantized_conditional_entropy(
            outputs, targets, Softmax(), quantum=1.0, correction=correction
        )

    one = features([[3.0]], [0])
    assert one.conditional == one.half[0] == 0
    assert features(np.zeros((9, 2)), [0, 1, 2] * 3).conditional == 0
    assert targets_given([[3.0]], [0]) == 0
    assert targets_given(np.zeros((9, 2)), [1] * 9) == 0  # one class
    assert targets_given(np.arange(9.0), [0, 1, 2] * 3) == 0  # a cell for each sample


def test_bad_input():
    outputs = np.zeros((3, 2))
    for quantum in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="quantum="):
            quantized_feature_entropies(outputs, quantum=quantum)
    with pytest.raises(ValueError, match="correction='best'"):
        quantized_feature_entropies(outputs, quantum=1.0, correction="best")
    with pytest.raises(ValueError, match="lengths"):
        quantized_feature_entropies(outputs, [0, 1], quantum=1.0)
    with pytest.raises(TypeError, match="class indices"):
        quantized_feature_entropies(outputs, outputs, quantum=1.0)
    with pytest.raises(ValueError, match="class indices >= 0"):
        quantized_feature_entropies(outputs, [0, 1, -100], quantum=1.0)
    with pytest.raises(ValueError, match=r"outputs\[1\]"):
        quantized_feature_entropies([[0.0], [math.nan]], quantum=1.0)
    with pytest.raises(TypeError, match="floating"):
        quantized_feature_entropies(np.zeros((3, 2), dtype=int), quantum=1.0)
    with pytest.raises(ValueError, match="greater one"):
        quantized_feature_entropies([[1e300]], quantum=1e-300)
    with pytest.raises(ValueError, match="use 'jackknife'"):
        quantized_conditional_entropy(
            outputs, [0, 1, 2], Sparsemax(), quantum=1.0, correction="miller-madow"
        )
