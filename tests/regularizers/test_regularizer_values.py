"""The terms against loops over samples, classes and labels (naive_regularizers.py), in float64."""

import math

import naive_regularizers as naive
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from conjopt.losses import EntmaxLoss
from conjopt.potentials import Entmax, Logistic, Poisson, Potential, Softmax, Sparsemax, Squared
from conjopt.regularizers import (
    AttainableLoss,
    ConditionalEntropy,
    OutputCodingRate,
    PredictiveEntropy,
    WithinClassScatter,
)

EXACT = {"rtol": 1e-9, "atol": 1e-9}
SIMPLEX = [Softmax(), Sparsemax(), Entmax(1.3)]
POTENTIALS = [*SIMPLEX, Logistic(), Squared(), Poisson()]


def outputs_and_points(
    potential: Potential, m: int, k: int, generator: torch.Generator, *, hard: bool = False
) -> tuple[Tensor, Tensor]:
    f = torch.randn(m, k, generator=generator, dtype=torch.float64)
    noise = torch.randn(m, k, generator=generator, dtype=torch.float64)
    if potential.on_simplex:
        y = F.one_hot(noise.argmax(1), k).double() if hard else noise.softmax(1)
    elif potential == Logistic():
        y = (noise > 0).double() if hard else noise.sigmoid()
    else:
        y = noise if potential == Squared() else noise.exp()
    return f, y


def terms(potential: Potential):
    """Each term with its loop, of outputs, points and masses."""
    found = [
        (ConditionalEntropy(potential=potential), naive.conditional_entropy),
        (
            ConditionalEntropy(1.0, bandwidth=2.0, potential=potential),
            lambda *args: naive.conditional_entropy(*args, bandwidth=2.0),
        ),
        (PredictiveEntropy(maximize=True, potential=potential), naive.predictive_entropy),
    ]
    for tau in (0, 0.1, 1, 30.0, math.inf):
        term = AttainableLoss(tau=tau, potential=potential)
        found.append((term, lambda *args, tau=tau: naive.attainable_loss(*args, tau=tau)))
    if potential.on_simplex or potential == Logistic():
        found.append((WithinClassScatter(potential=potential), naive.scatter))
        for eps2 in (0.01, 0.5):
            term = OutputCodingRate(eps2=eps2, potential=potential)
            found.append((term, lambda *args, eps2=eps2: naive.coding_rate(*args, eps2=eps2)))
    return found


@st.composite
def batches(draw: st.DrawFn) -> tuple[int, int, torch.Generator]:
    m, k = draw(st.integers(2, 9)), draw(st.sampled_from([1, 2, 3, 5]))
    return m, k, torch.Generator().manual_seed(draw(st.integers(0, 2**32)))


@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
@pytest.mark.parametrize("potential", POTENTIALS, ids=repr)
@settings(max_examples=20)
@given(batches())
def test_every_term_is_its_loop(potential, hard, batch):
    f, y = outputs_and_points(potential, *batch, hard=hard)
    mass = torch.ones(len(f), dtype=torch.float64)
    for term, loop in terms(potential):
        expected = loop(potential, f, y, mass)
        assert_close(term.estimate(f, y), expected, **EXACT, msg=lambda m, t=term: f"{t}: {m}")
        if potential.on_simplex and hard:
            assert_close(term.estimate(f, y.argmax(1)), expected, **EXACT)


@pytest.mark.parametrize(
    "shape", [(40, 3, 3), (40, 3, 50), (12, 30, 30), (50, 100, 4), (30, 4, 29)]
)
def test_the_rate_is_a_loop_over_classes_in_either_form(shape):
    """Many rows of few outputs take covariances, few rows of many outputs their Gram matrix."""
    m, k, width = shape
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(m, width, generator=generator, dtype=torch.float64)
    y = torch.randint(k, (m,), generator=generator)
    share = F.one_hot(y, k).double() / m
    found = naive.covariances(z, share)
    rate = sum(s * torch.logdet(torch.eye(width) + c / 0.5) / 2 for s, c in found)
    scatter = sum(s * c.trace() for s, c in found)
    outputs = torch.zeros(m, k, dtype=torch.float64)
    for targets in (y, F.one_hot(y, k).double()):
        assert_close(OutputCodingRate().estimate(outputs, targets, features=z), rate, **EXACT)
        assert_close(WithinClassScatter().estimate(outputs, targets, features=z), scatter, **EXACT)


@settings(max_examples=20)
@given(batches())
def test_the_upper_estimate_is_its_loop(batch):
    for potential in POTENTIALS:
        f, y = outputs_and_points(potential, *batch)
        expected = naive.conditional_entropy(
            potential, f, y, torch.ones(len(f)).double(), upper=True
        )
        assert_close(
            ConditionalEntropy(potential=potential).upper_estimate(f, y), expected, **EXACT
        )


@settings(max_examples=40)
@given(batches(), st.sampled_from([0.0, 0.2]))
def test_class_weights_ignored_rows_and_smoothing_are_the_criterions(batch, smoothing):
    m, k, generator = batch
    f, y = outputs_and_points(Softmax(), m, k, generator, hard=True)
    weight = torch.rand(k, generator=generator, dtype=torch.float64) + 0.1
    labels = y.argmax(1)
    labels[torch.rand(m, generator=generator) < 0.2] = -1
    counts = labels >= 0
    mixed = (1 - smoothing) * y + smoothing / k
    points = weight * mixed  # as torch weighs smoothed targets
    mass = torch.where(counts, points.sum(1), 0) if smoothing else weight[labels] * counts
    points = points / points.sum(1, keepdim=True)
    criterion = nn.CrossEntropyLoss(weight=weight, ignore_index=-1, label_smoothing=smoothing)
    f_nan = torch.where(counts.unsqueeze(1), f, torch.nan)  # what does not count may be anything
    if counts.sum() < 2:
        return
    args = (Softmax(), f, points, mass)
    close = {**EXACT, "check_dtype": False}
    entropy = ConditionalEntropy(potential=criterion)
    expected = naive.conditional_entropy(*args, classes=y)
    assert_close(entropy.estimate(f_nan, labels), expected, **close)
    attainable = AttainableLoss(potential=criterion)
    assert_close(attainable.estimate(f_nan, labels), naive.attainable_loss(*args), **close)
    predictive = PredictiveEntropy(potential=criterion)
    assert_close(predictive.estimate(f_nan, labels), naive.predictive_entropy(*args), **close)
    args = (Softmax(), f, y, mass)  # the class of a row stays what it is
    rate = OutputCodingRate(potential=criterion)
    assert_close(rate.estimate(f_nan, labels), naive.coding_rate(*args), **close)
    scatter = WithinClassScatter(potential=criterion)
    assert_close(scatter.estimate(f_nan, labels), naive.scatter(*args), **close)


@settings(max_examples=40)
@given(batches(), st.sampled_from([0.0, 0.2]), st.booleans())
def test_classes_and_their_vertices_are_the_same_targets(batch, smoothing, weighted):
    """Smoothed, a vertex shares mass with all others: a row's company is that of before."""
    m, k, generator = batch
    f, y = outputs_and_points(Softmax(), m, k, generator, hard=True)
    weight = torch.rand(k, generator=generator, dtype=torch.float64) + 0.1 if weighted else None
    criterion = nn.CrossEntropyLoss(weight=weight, label_smoothing=smoothing)
    term = ConditionalEntropy(potential=criterion)
    assert_close(term.estimate(f, y), term.estimate(f, y.argmax(1)), **EXACT)


ALL = [
    ConditionalEntropy(),
    OutputCodingRate(),
    WithinClassScatter(),
    AttainableLoss(),
    PredictiveEntropy(),
]
all_terms = pytest.mark.parametrize("term", ALL, ids=lambda term: type(term).__name__)


@all_terms
def test_tokens_are_rows_with_classes_at_dimension_1(term):
    generator = torch.Generator().manual_seed(0)
    f = torch.randn(3, 4, 5, 2, generator=generator)
    y = torch.randint(4, (3, 5, 2), generator=generator)
    y[1, 2:] = -100
    rows, labels = f.movedim(1, -1).reshape(-1, 4), y.reshape(-1)
    expected = term.estimate(rows[labels >= 0], labels[labels >= 0])
    assert_close(term.estimate(f, y), expected)
    one_hot = F.one_hot(y.clamp(min=0), 4).movedim(-1, 1).float()
    assert_close(term.estimate(f, one_hot), term.estimate(rows, labels.clamp(min=0)))


def test_features_take_the_place_of_outputs():
    generator = torch.Generator().manual_seed(0)
    f, z = torch.randn(2, 3, 6, generator=generator), torch.randn(2, 5, 6, generator=generator)
    y = torch.randint(3, (2, 6), generator=generator)
    rows, labels = z.movedim(1, -1).reshape(-1, 5), y.reshape(-1)
    points = F.one_hot(labels, 3).double()
    value = ConditionalEntropy().estimate(f, y, features=z)
    mass = torch.ones(12).double()
    expected = naive.conditional_entropy(Softmax(), rows.double(), points, mass)
    assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    other = ConditionalEntropy().estimate(torch.zeros_like(f), y, features=z)
    assert torch.equal(value, other)


def test_regression_features_are_samples_flattened():
    generator = torch.Generator().manual_seed(0)
    f, y = torch.randn(2, 7, generator=generator).double()
    z = torch.randn(7, 2, 3, generator=generator).double()
    value = ConditionalEntropy(potential=nn.MSELoss()).estimate(f, y, features=z)
    args = (z.flatten(1), y.unsqueeze(1), torch.ones(7).double())
    assert_close(value, naive.conditional_entropy(Squared(), *args), **EXACT)


def test_of_many_rows_some_are_taken_spread_over_the_batch():
    m = 1000
    f = torch.arange(m, dtype=torch.float64).unsqueeze(1).repeat(1, 2)
    term = ConditionalEntropy(potential=Squared(), max_rows=50)
    batch = term._read(f, f, None)
    taken = batch.rows[:, 0].sort().values
    assert len(taken.unique()) == 50
    assert (taken.diff() <= 3 * m / 50).all()
    assert taken[0] < 3 * m / 50
    assert m - taken[-1] < 3 * m / 50
    assert torch.equal(batch.rows, batch.targets)
    assert_close(term.estimate(f, f), term.estimate(batch.rows, batch.targets))


# Invariances.


@all_terms
@given(seed=st.integers(0, 2**32))
def test_the_order_of_samples_and_of_classes_is_immaterial(term, seed):
    generator = torch.Generator().manual_seed(seed)
    f, y = outputs_and_points(Softmax(), 9, 4, generator, hard=True)
    value = term.estimate(f, y.argmax(1))
    rows, classes = torch.randperm(9, generator=generator), torch.randperm(4, generator=generator)
    shuffled = (f[rows][:, classes], y[rows][:, classes])
    assert_close(term.estimate(shuffled[0], shuffled[1].argmax(1)), value, **EXACT)
    assert_close(term.estimate(*shuffled), value, **EXACT)


@all_terms
@given(seed=st.integers(0, 2**32), size=st.sampled_from([1.0, 1e3]))
def test_a_shift_that_the_loss_does_not_see_changes_nothing(term, seed, size):
    """One number added to all logits; for each sample another, where a term is one of the links."""
    generator = torch.Generator().manual_seed(seed)
    f, y = outputs_and_points(Softmax(), 9, 4, generator, hard=True)
    shift = size * torch.randn(9, 1, generator=generator, dtype=torch.float64)
    shift = shift[:1] if isinstance(term, ConditionalEntropy) else shift
    assert_close(term.estimate(f + shift, y.argmax(1)), term.estimate(f, y.argmax(1)), **EXACT)


@given(seed=st.integers(0, 2**32), scale=st.sampled_from([1e-12, 1e-3, 1e3, 1e12]))
def test_conditional_entropy_has_no_origin_and_no_scale(seed, scale):
    generator = torch.Generator().manual_seed(seed)
    for potential in POTENTIALS:
        f, y = outputs_and_points(potential, 9, 4, generator)
        term = ConditionalEntropy(potential=potential)
        moved = scale * (f + torch.randn(1, 4, generator=generator, dtype=torch.float64))
        assert_close(term.estimate(moved, y), term.estimate(f, y), **EXACT)


@given(seed=st.integers(0, 2**32), shift=st.sampled_from([1.0, 1e3]))
def test_conditional_entropy_of_regression_has_no_origin_of_targets(seed, shift):
    f, y = outputs_and_points(Squared(), 9, 4, torch.Generator().manual_seed(seed))
    term = ConditionalEntropy(potential=Squared())
    assert_close(term.estimate(f, y + shift), term.estimate(f, y), **EXACT)


@given(seed=st.integers(0, 2**32))
def test_spreads_see_no_shift_within_a_class(seed):
    generator = torch.Generator().manual_seed(seed)
    f, y = outputs_and_points(Softmax(), 12, 4, generator, hard=True)
    shift = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    for term in (OutputCodingRate(), WithinClassScatter()):
        moved = f + shift[y.argmax(1)]
        assert_close(term.estimate(moved, y.argmax(1)), term.estimate(f, y.argmax(1)), **EXACT)
        assert_close(term.estimate(moved, y), term.estimate(f, y), **EXACT)


def test_a_criterion_of_this_package_is_read_like_its_potential():
    generator = torch.Generator().manual_seed(0)
    f, y = outputs_and_points(Entmax(1.5), 8, 3, generator, hard=True)
    for kind in (ConditionalEntropy, AttainableLoss, PredictiveEntropy):
        value = kind(potential=EntmaxLoss(1.5)).estimate(f, y)
        assert torch.equal(value, kind(potential=Entmax(1.5)).estimate(f, y))
        assert not torch.isclose(value, kind().estimate(f, y))
