"""The terms of the loss and the estimates for reports are the same formulas."""

import pytest
import torch
from torch.testing import assert_close

from conjopt import entropy, regularizers
from conjopt.potentials import Softmax, Sparsemax


@pytest.mark.parametrize("potential", [Softmax(), Sparsemax()])
@pytest.mark.parametrize("classes", [3, 10])
def test_conditional_entropy(potential, classes):
    torch.manual_seed(0)
    outputs = 3 * torch.randn(40, classes, dtype=torch.float64)
    targets = torch.arange(40) % classes  # the term leaves out classes of a single sample
    term = regularizers.ConditionalEntropy(potential=potential, bandwidth=0.2)
    expected = entropy.kernel_conditional_entropy(outputs, targets, potential, bandwidth=0.2)
    assert_close(float(term.estimate(outputs, targets)), float(expected), rtol=1e-10, atol=1e-12)


def test_coding_rate():
    torch.manual_seed(0)
    outputs = 2 * torch.randn(60, 5, dtype=torch.float64)
    targets = torch.randint(5, (60,))
    term = regularizers.OutputCodingRate(eps2=0.5)
    centred = outputs - outputs.mean(1, keepdim=True)
    expected = entropy.coding_rate(centred, targets, eps2=0.5)
    assert_close(float(term.estimate(outputs, targets)), float(expected), rtol=1e-10, atol=1e-12)
