"""Section 5: what the terms are bounds of, exactly, in float64."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from conjopt.entropy import conditional_entropy
from conjopt.potentials import Entmax, Logistic, Softmax, Sparsemax
from conjopt.regularizers import (
    AttainableLoss,
    ConditionalEntropy,
    OutputCodingRate,
    PredictiveEntropy,
    WithinClassScatter,
)

EPS = torch.finfo(torch.float64).eps
SEEDS = st.integers(0, 2**32)


@pytest.mark.parametrize("potential", [Softmax(), Sparsemax(), Entmax(1.3)], ids=repr)
@pytest.mark.parametrize("m", [2, 3])
@settings(max_examples=20)
@given(seed=SEEDS)
def test_the_upper_estimate_is_at_least_the_conditional_entropy_in_expectation(potential, m, seed):
    """All samples of a law on three outputs and two classes, each with its probability."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(3, 2, generator=generator, dtype=torch.float64)
    law = torch.rand(3, 2, generator=generator, dtype=torch.float64) + 0.05
    law = law / law.sum()
    cells = list(itertools.product(range(3), range(2)))
    term = ConditionalEntropy(bandwidth=0.5, potential=potential)
    mean = 0.0
    for sample in itertools.product(cells, repeat=m):
        at, y = torch.tensor(sample).T
        probability = math.prod(float(law[cell]) for cell in sample)
        mean += probability * float(term.upper_estimate(z[at], y))
    groups, labels = torch.tensor(cells).T
    floor = conditional_entropy(labels, groups, potential, weights=law.flatten())
    assert mean >= float(floor) - 1e3 * EPS


@given(SEEDS, st.sampled_from([0.0, 0.01, 1.0, 30.0]))
def test_the_plug_in_is_between_0_and_the_greatest_entropy(seed, scale):
    generator = torch.Generator().manual_seed(seed)
    f = scale * torch.randn(15, 4, generator=generator, dtype=torch.float64)
    y = torch.randint(4, (15,), generator=generator)
    for potential in (Softmax(), Sparsemax(), Entmax(1.3)):
        value = ConditionalEntropy(potential=potential).estimate(f, y)
        most = potential.generalized_entropy(torch.full((4,), 0.25, dtype=torch.float64))
        assert -64 * EPS <= value <= most + 64 * EPS


@pytest.mark.parametrize("tau", [0.0, 0.01, 1.0, 100.0, math.inf])
@given(seed=SEEDS, scale=st.sampled_from([0.1, 3.0, 100.0]))
def test_the_soft_maximum_is_within_tau_log_k_of_the_maximum(tau, seed, scale):
    generator = torch.Generator().manual_seed(seed)
    k = 5
    f = scale * torch.randn(1, k, generator=generator, dtype=torch.float64)
    y = torch.zeros(1, dtype=torch.int64)
    rounding = 1e3 * EPS * (1 + float(f.abs().max()))
    for potential in (Softmax(), Sparsemax(), Entmax(1.3)):
        losses = potential.loss(torch.eye(k, dtype=torch.float64), f)
        value = AttainableLoss(tau=tau, potential=potential).estimate(f, y)
        assert value <= losses.max() + rounding
        assert value >= losses.mean() - rounding  # Jensen
        if tau < math.inf:
            assert value >= losses.max() - tau * math.log(k) - rounding
    labels = torch.tensor(list(itertools.product([0.0, 1.0], repeat=k)), dtype=torch.float64)
    losses = Logistic().loss(labels, f)
    value = AttainableLoss(tau=tau, potential=Logistic()).estimate(f, labels[:1])
    assert losses.mean() - rounding <= value <= losses.max() + rounding
    if tau < math.inf:
        assert value >= losses.max() - tau * math.log(2**k) - rounding


@given(SEEDS, st.sampled_from([0.1, 3.0, 100.0]))
def test_predictive_entropy_is_the_loss_that_a_model_expects_of_itself(seed, scale):
    generator = torch.Generator().manual_seed(seed)
    f = scale * torch.randn(1, 4, generator=generator, dtype=torch.float64)
    rounding = 1e3 * EPS * (1 + float(f.abs().max()))
    for potential in (Softmax(), Sparsemax(), Entmax(1.3)):
        losses = potential.loss(torch.eye(4, dtype=torch.float64), f)
        expected = potential.link(f)[0] @ losses
        value = PredictiveEntropy(potential=potential).estimate(f, torch.tensor([0]))
        assert (value - expected).abs() <= rounding
        assert (value - potential.generalized_entropy(potential.link(f))[0]).abs() <= rounding


@given(SEEDS, st.sampled_from([1e-3, 1.0, 30.0]), st.sampled_from([0.01, 0.5, 100.0]))
def test_the_rate_is_at_most_its_first_order(seed, scale, eps2):
    generator = torch.Generator().manual_seed(seed)
    f = scale * torch.randn(20, 4, generator=generator, dtype=torch.float64)
    y = torch.randint(4, (20,), generator=generator)
    for potential, targets in ((Softmax(), y), (Logistic(), F.one_hot(y, 4).double())):
        rate = OutputCodingRate(eps2=eps2, potential=potential).estimate(f, targets)
        first = WithinClassScatter(potential=potential).estimate(f, targets) / (2 * eps2)
        assert 0 <= rate <= first * (1 + 64 * EPS) + 64 * EPS
        fine = OutputCodingRate(eps2=1e9 * scale**2, potential=potential).estimate(f, targets)
        assert fine * 2e9 * scale**2 == pytest.approx(float(first * 2 * eps2), rel=1e-5)


@given(SEEDS)
def test_scatter_between_and_within_classes_add_up(seed):
    """The law of total variance: knowing the class never adds scatter."""
    generator = torch.Generator().manual_seed(seed)
    f = torch.randn(20, 4, generator=generator, dtype=torch.float64)
    y = torch.randint(4, (20,), generator=generator)
    within = WithinClassScatter().estimate(f, y)
    total = WithinClassScatter().estimate(f, torch.zeros_like(y))
    assert within <= total + 64 * EPS
    assert OutputCodingRate().estimate(f, y) <= OutputCodingRate().estimate(f, 0 * y) + 64 * EPS
