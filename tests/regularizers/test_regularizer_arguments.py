"""Weights, schedules, and errors that say what to do."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from conjopt.potentials import Logistic, Poisson, Squared
from conjopt.regularizers import (
    AttainableLoss,
    BatchRegularizer,
    ConditionalEntropy,
    OutputCodingRate,
    PredictiveEntropy,
    WithinClassScatter,
)

KINDS = [
    ConditionalEntropy,
    OutputCodingRate,
    WithinClassScatter,
    AttainableLoss,
    PredictiveEntropy,
]
PAIRED = KINDS[:3]
of_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
of_paired = pytest.mark.parametrize("kind", PAIRED, ids=lambda kind: kind.__name__)


def batch():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(8, 3, generator=generator), torch.arange(8) % 3


@of_kind
@pytest.mark.parametrize("weight", [0, 0.0, 2.5, np.float32(0.5), torch.tensor(0.5)])
def test_a_call_is_the_weight_times_the_estimate(kind, weight):
    f, y = batch()
    term = kind(weight)
    assert torch.equal(term(f, y), float(weight) * term.estimate(f, y))
    term.weight = 0.25
    assert torch.equal(term(f, y), 0.25 * term.estimate(f, y))


def test_the_confidence_penalty_is_the_entropy_with_the_other_sign():
    f, y = batch()
    for weight in (0.5, lambda calls: 0.5):
        term = PredictiveEntropy(weight, maximize=True)
        assert torch.equal(term(f, y), -PredictiveEntropy(0.5)(f, y))
        assert torch.equal(term.estimate(f, y), PredictiveEntropy().estimate(f, y))


@of_kind
def test_a_schedule_gets_the_number_of_training_calls_so_far(kind):
    f, y = batch()
    seen = []

    def schedule(calls):
        seen.append(calls)
        return 0.5**calls

    term = kind(schedule)
    value = term.estimate(f, y)
    assert [float(term(f, y) / value) for _ in range(3)] == pytest.approx([1, 0.5, 0.25])
    with torch.no_grad():
        term(f, y)
    term.eval()
    term(f, y)
    term.train()
    term(f, y)
    assert seen == [0, 1, 2, 3, 3, 3]
    assert term.calls == 4
    other = kind(schedule)
    other.load_state_dict(term.state_dict())
    assert other.calls == 4


@of_kind
@pytest.mark.parametrize("weight", [-0.1, float("nan"), float("inf"), torch.tensor(-1.0)])
def test_a_weight_that_is_no_weight_is_refused(kind, weight):
    with pytest.raises(ValueError, match=r"weight is .*expected a finite number that is at least"):
        kind(weight)
    with pytest.raises(ValueError, match="weight is"):
        kind().weight = weight
    term = kind(lambda calls: weight if calls == 1 else 0.1)
    term(*batch())
    with pytest.raises(ValueError, match=r"The weight after 1 calls is .*at least 0"):
        term(*batch())


@pytest.mark.parametrize("weight", ["0.3", None, True, torch.ones(2), [0.3]])
def test_a_weight_of_another_type_is_refused(weight):
    with pytest.raises(TypeError, match=r"weight is .*expected a number, or a function"):
        ConditionalEntropy(weight)
    with pytest.raises(TypeError, match=r"The weight after 0 calls is .*expected a number"):
        ConditionalEntropy(lambda calls: weight)(*batch())


@of_kind
def test_outputs_and_targets_that_do_not_match(kind):
    f, y = batch()
    with pytest.raises(ValueError, match=r"outputs of shape \(8, 3\) with targets of shape \(7,\)"):
        kind()(f, y[:7])
    with pytest.raises(ValueError, match="one-hot targets as probabilities"):
        kind()(f, torch.eye(3, dtype=torch.int64)[y])
    with pytest.raises(ValueError, match=r"targets.squeeze\(1\)"):
        kind()(f, y.unsqueeze(1))
    with pytest.raises(ValueError, match="the outputs come first"):
        kind()(y, f)
    with pytest.raises(TypeError, match="expected tensors"):
        kind()(f, y.tolist())


@of_kind
def test_targets_outside_of_the_domain(kind):
    f, y = batch()
    y = y.clone()
    y[4] = 3
    for term in (kind(), kind(potential=nn.CrossEntropyLoss())):
        with pytest.raises(IndexError, match=r"class index 3 at targets\[4\]"):
            term(f, y)
        with pytest.raises(ValueError, match="expected probabilities that sum to 1"):
            term(f, 2 * torch.eye(3)[batch()[1]])
    y[4] = -7
    with pytest.raises(IndexError, match="class index -7"):
        kind()(f, y)
    kind(ignore_index=-7)(f, y)
    if kind is not PredictiveEntropy:
        with pytest.raises(ValueError, match=r"expected numbers in \[0, 1\]"):
            kind(potential=nn.BCEWithLogitsLoss())(f, 2 * torch.ones(8, 3))


def test_a_term_without_a_value_is_none():
    class Nothing(BatchRegularizer):
        pass

    class Zero(BatchRegularizer):
        def _value(self, batch):
            return 0 * batch.rows.sum()

    assert Zero(1.0).weight == 1
    with pytest.raises(TypeError, match="abstract"):
        Nothing(1.0)


def test_a_term_of_ones_own_ignores_what_the_losses_ignore():
    class Mean(BatchRegularizer):
        def _value(self, batch):
            return batch.share @ batch.rows[:, 0]

    f = torch.tensor([[1.0, 0.0], [9.0, 0.0], [3.0, 0.0]])
    assert Mean(1.0)(f, torch.tensor([0, -100, 1])) == 2


@of_kind
def test_a_potential_that_is_none(kind):
    with pytest.raises(TypeError, match="expected an instance of a Potential"):
        kind(potential="softmax")
    with pytest.raises(TypeError, match="is not recognised"):
        kind(potential=nn.HuberLoss())
    with pytest.raises(ValueError, match="give it to the criterion"):
        kind(potential=nn.CrossEntropyLoss(), ignore_index=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ConditionalEntropy(bandwidth=0), "bandwidth=0: expected a positive number"),
        (lambda: ConditionalEntropy(bandwidth=float("nan")), "bandwidth=nan"),
        (lambda: ConditionalEntropy(bandwidth="wide"), "bandwidth='wide'"),
        (lambda: OutputCodingRate(eps2=-1), "eps2=-1: expected a positive number"),
        (lambda: OutputCodingRate(eps2=float("inf")), "eps2=inf"),
        (lambda: AttainableLoss(tau=-1), "tau=-1: expected a number that is at least 0"),
        (lambda: AttainableLoss(tau=float("nan")), "tau=nan"),
        (lambda: ConditionalEntropy(queue=-1), "queue=-1: expected an integer"),
        (lambda: ConditionalEntropy(queue=1.5), "queue=1.5: expected an integer"),
        (lambda: ConditionalEntropy(max_rows=1), "max_rows=1: expected .* at least 2"),
        (lambda: OutputCodingRate(potential=Squared()), "real targets use ConditionalEntropy"),
        (lambda: WithinClassScatter(potential=Poisson()), "a spread within classes"),
        (lambda: PredictiveEntropy(potential=Squared()), "has no minimum.*maximize=True"),
        (lambda: PredictiveEntropy(potential=nn.MSELoss()), "has no minimum.*maximize=True"),
        (
            lambda: ConditionalEntropy(potential=nn.BCEWithLogitsLoss(pos_weight=torch.ones(3))),
            r"weighs elements of an output.*potential=Logistic\(\)",
        ),
    ],
)
def test_options_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@of_paired
@pytest.mark.parametrize("features", [torch.randn(7, 5), torch.randn(8), torch.randn(8, 5, 2)])
def test_features_of_other_samples(kind, features):
    f, y = batch()
    with pytest.raises(ValueError, match="expected the outputs' shape with any number in place of"):
        kind()(f, y, features=features)


@of_paired
def test_features_that_are_none(kind):
    f, y = batch()
    with pytest.raises(TypeError, match="expected a floating-point tensor"):
        kind()(f, y, features=y)
    with pytest.raises(TypeError, match="expected a floating-point tensor"):
        kind()(f, y, features="features")


def test_yes_no_answers_have_no_spread_of_features():
    f, _ = batch()
    with pytest.raises(ValueError, match="a class for each output: leave them out"):
        OutputCodingRate(potential=Logistic())(f, f.sigmoid(), features=f)


@of_kind
def test_copies_and_pickles(kind):
    f, y = batch()
    term = kind(0.7, potential=nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0])))
    for twin in (copy.deepcopy(term), pickle.loads(pickle.dumps(term))):
        assert torch.equal(twin(f, y), term(f, y))
        assert twin._view.criterion is twin.criterion
    assert repr(term).startswith(f"{kind.__name__}(\n  weight=0.7")
    assert term.to(torch.float64)(f.double(), y).dtype == torch.float64
