"""With many classes only the rows that have company are looked at: the same to rounding."""

import pytest
import torch
from torch.testing import assert_close

from conjopt.potentials import Sparsemax, Squared
from conjopt.regularizers import ConditionalEntropy, OutputCodingRate, PredictiveEntropy
from conjopt.regularizers import coding_rate as rate_module
from conjopt.regularizers import conditional_entropy as entropy_module

TERMS = {
    "entropy": lambda **how: ConditionalEntropy(**how),
    "entropy, sparsemax": lambda **how: ConditionalEntropy(potential=Sparsemax(), **how),
    "entropy, smoothed": lambda **how: ConditionalEntropy(
        potential=torch.nn.CrossEntropyLoss(label_smoothing=0.1), **how
    ),
    "rate": lambda **how: OutputCodingRate(**how),
}


def value_and_gradient(make, outputs, targets, calls=1):
    term = make()
    for call in range(calls):
        z = outputs[call].clone().requires_grad_()
        value = term(z, targets[call])
        value.backward()
    return value.detach(), z.grad


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize(("how", "calls"), [({}, 1), ({"queue": 24}, 3)], ids=["plain", "queue"])
def test_few_rows_are_all_rows(name, how, calls, monkeypatch):
    torch.manual_seed(0)
    outputs = 2 * torch.randn(calls, 32, 200, dtype=torch.float64)
    targets = torch.randint(200, (calls, 32))
    targets[:, :4] = targets[:, 4:8]

    asked = []
    few = entropy_module._few
    monkeypatch.setattr(entropy_module, "_few", lambda m: asked.append(few(m)) or asked[-1])
    found = value_and_gradient(lambda: TERMS[name](**how), outputs, targets, calls)
    if "entropy" in name:
        assert len(asked[0]) in range(8, 16)  # of 32
    for module in (entropy_module, rate_module):
        monkeypatch.setattr(module, "_can_look_at", lambda tensor: False)
    expected = value_and_gradient(lambda: TERMS[name](**how), outputs, targets, calls)
    for a, b in zip(found, expected):
        assert_close(a, b, rtol=1e-10, atol=1e-14)
    assert expected[1].abs().max() > 1e-6


def test_a_call_is_the_weight_times_the_estimate():
    torch.manual_seed(0)
    outputs, targets = torch.randn(8, 3, dtype=torch.float64), torch.arange(8) % 3
    for maximize, sign in ((False, 1), (True, -1)):
        term = PredictiveEntropy(0.7, maximize=maximize)
        estimate = term.estimate(outputs, targets)
        expected = -torch.special.xlogy(*[outputs.softmax(1)] * 2).sum(1).mean()
        assert_close(estimate, expected, rtol=1e-12, atol=0)
        assert_close(term(outputs, targets), sign * 0.7 * expected, rtol=1e-12, atol=0)


def test_shifted_targets_lose_no_digits():
    """Of a squared loss; a mean of squares less the square of a mean would, at 1e6 from 0."""
    torch.manual_seed(0)
    outputs, targets = torch.randn(20, 2), torch.randn(20, 2)
    exact = ConditionalEntropy(potential=Squared())
    expected = exact.estimate(outputs.double(), targets.double())
    shifted = exact.estimate(outputs.double(), targets.double() + 1e6)
    assert_close(shifted, expected, rtol=1e-8, atol=0)
