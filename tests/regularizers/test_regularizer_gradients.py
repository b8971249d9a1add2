"""Gradients of the terms by finite differences in float64, and what they do to a network."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from conjopt import ConjSGD
from conjopt.potentials import Entmax, Logistic, Poisson, Softmax, Sparsemax, Squared
from conjopt.regularizers import (
    AttainableLoss,
    ConditionalEntropy,
    OutputCodingRate,
    PredictiveEntropy,
    WithinClassScatter,
)

# Links of sparse potentials have kinks, which the outputs below keep away from.
CASES = [
    (kind(potential=potential, **options), potential)
    for kind, options in [
        (ConditionalEntropy, {}),
        (AttainableLoss, {}),
        (AttainableLoss, {"tau": 0.2}),
        (AttainableLoss, {"tau": math.inf}),
        (PredictiveEntropy, {"maximize": True}),
    ]
    for potential in [Softmax(), Sparsemax(), Entmax(1.5), Logistic(), Squared(), Poisson()]
] + [
    (kind(potential=potential), potential)
    for kind in [OutputCodingRate, WithinClassScatter]
    for potential in [Softmax(), Logistic()]
]


@pytest.mark.parametrize("targets", ["classes", "points"])
@pytest.mark.parametrize(("term", "potential"), CASES, ids=lambda value: type(value).__name__)
def test_first_and_second_derivatives(term, potential, targets):
    generator = torch.Generator().manual_seed(1)
    f = 0.3 * torch.randn(7, 3, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (7,), generator=generator)
    if targets == "points" and potential.on_simplex:
        y = torch.randn(7, 3, generator=generator, dtype=torch.float64).softmax(1)
    elif not potential.on_simplex:
        y = F.one_hot(y, 3).double() if targets == "classes" else (f + 0.3).sigmoid().detach()
    f.requires_grad_()
    assert torch.autograd.gradcheck(lambda outputs: term.estimate(outputs, y), f)
    assert torch.autograd.gradgradcheck(
        lambda outputs: term.estimate(outputs, y), f, fast_mode=True
    )


@pytest.mark.parametrize("width", [3, 20])
def test_derivatives_by_features(width):
    """The rate has two forms: by covariances of few features, and by the Gram matrix of many."""
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(8, width, generator=generator, dtype=torch.float64, requires_grad=True)
    f, y = torch.zeros(8, 3, dtype=torch.float64), torch.arange(8) % 3
    for targets in (y, 0.8 * F.one_hot(y, 3).double() + 0.2 / 3):
        for term in (ConditionalEntropy(), OutputCodingRate(), WithinClassScatter()):
            args = (lambda rows, t=term, y=targets: t.estimate(f, y, features=rows), z)
            assert torch.autograd.gradcheck(*args)
            assert torch.autograd.gradgradcheck(*args, fast_mode=True)


def test_targets_get_no_gradient():
    f = torch.randn(6, 3, requires_grad=True)
    y = torch.rand(6, 3).softmax(1).requires_grad_()
    for term in (ConditionalEntropy(), OutputCodingRate(), AttainableLoss(), PredictiveEntropy()):
        y.grad = None
        term(f, y).backward()
        assert y.grad is None


def test_the_maximum_has_the_gradient_of_its_label():
    f = torch.tensor([[1.0, 2.0, 4.0]], requires_grad=True)
    AttainableLoss(tau=0).estimate(f, torch.tensor([0])).backward()
    expected = f.detach().softmax(1) - torch.tensor([[1.0, 0.0, 0.0]])
    torch.testing.assert_close(f.grad, expected)


@pytest.mark.parametrize(
    ("term", "measured"),
    [
        (ConditionalEntropy(1.0), lambda t, m, x, y: t.estimate(m(x), y)),
        (OutputCodingRate(1.0), lambda t, m, x, y: t.estimate(m(x), y)),
        (WithinClassScatter(1.0), lambda t, m, x, y: t.estimate(m(x), y)),
        (AttainableLoss(1.0), lambda t, m, x, y: t.estimate(m(x), y)),
        (PredictiveEntropy(1.0), lambda t, m, x, y: t.estimate(m(x), y)),
        (PredictiveEntropy(1.0, maximize=True), lambda t, m, x, y: -t.estimate(m(x), y)),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("optimizer_of", ["torch", "conjopt"])
def test_added_to_the_loss_a_term_gets_smaller_than_without(term, measured, optimizer_of):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 6, generator=generator)
    y = torch.randint(3, (60,), generator=generator)  # labels of no meaning

    def run(weight):
        torch.manual_seed(0)
        term.weight = weight
        model = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 3))
        criterion = nn.CrossEntropyLoss()
        if optimizer_of == "torch":
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        else:
            optimizer = ConjSGD(model.parameters(), model=model, loss=criterion)
        for _ in range(60):
            optimizer.zero_grad()
            outputs = model(x)
            (criterion(outputs, y) + term(outputs, y)).backward()
            optimizer.step()
        with torch.no_grad():
            return measured(term, model, x, y)

    assert run(1.0) < run(0.0)
