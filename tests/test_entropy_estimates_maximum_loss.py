"""The attainable and the observed maximum loss: closed forms, infinite cases and bad input."""

import math

import pytest
import torch
from torch.nn import functional as F

from conjopt.entropy import attainable_losses, attainable_maximum_loss, observed_maximum_loss
from conjopt.potentials import Entmax, Logistic, Poisson, Potential, Softmax, Sparsemax, Squared


def draw(*shape):
    return 4 * torch.randn(*shape, generator=torch.Generator().manual_seed(0)).double()


@pytest.mark.parametrize("k", [1, 2, 7])
def test_closed_forms(k):
    f = draw(50, k)
    greatest = f.logsumexp(1) - f.amin(1)
    torch.testing.assert_close(attainable_losses(f, Softmax()), greatest, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(
        attainable_losses(f, Logistic()), F.softplus(f.abs()).sum(1), rtol=1e-13, atol=0
    )
    box = (f.abs() + 2).square().sum(1) / 2
    torch.testing.assert_close(
        attainable_losses(f, Squared(), least=-2.0, greatest=torch.full((k,), 2.0)), box
    )


@pytest.mark.parametrize("potential", [Softmax(), Sparsemax(), Entmax(1.5)], ids=repr)
def test_the_observed_maximum_is_below_the_attainable_and_equal_at_the_worst_class(potential):
    f = draw(80, 5)
    y = f.argmax(1)
    attainable = attainable_maximum_loss(f, potential)
    assert observed_maximum_loss(f, y, potential) < attainable
    worst = observed_maximum_loss(f, f.argmin(1), potential)
    assert (worst - attainable).abs() <= 1e-13 * attainable
    one_hot = F.one_hot(f.argmin(1), 5).double()
    assert (observed_maximum_loss(f, one_hot, potential) - worst).abs() <= 1e-13 * attainable


def test_many_rows_are_the_same_in_blocks():
    f, y = draw(3000, 100), torch.arange(3000) % 100
    expected = F.cross_entropy(f, y, reduction="none").max()
    assert (observed_maximum_loss(f, y, Softmax()) - expected).abs() < 1e-12
    assert (
        attainable_maximum_loss(f.float(), Softmax()) - (f.logsumexp(1) - f.amin(1)).max()
    ).abs() < 1e-4


def test_domains_without_ends_have_no_greatest_loss():
    f = draw(3, 2)
    for potential in (Squared(), Poisson()):
        assert attainable_losses(f, potential).tolist() == [math.inf] * 3
        assert attainable_losses(f, potential, least=0.0).tolist() == [math.inf] * 3
    assert attainable_maximum_loss(f, Poisson(), least=0.0, greatest=3.0) < math.inf


def test_one_class_and_one_sample():
    assert attainable_maximum_loss([[3.0]], Softmax()) == 0
    assert observed_maximum_loss([[3.0]], [0], Softmax()) == 0
    assert attainable_maximum_loss([0.0], Logistic()) == math.log(2)


class Coupled(Potential):
    def value(self, y):
        return y.square().sum(-1) ** 2 / 4

    def conjugate(self, f):
        return 0.75 * f.square().sum(-1) ** (2 / 3)


def test_bad_input():
    f = torch.zeros(3, 2)
    with pytest.raises(ValueError, match=r"outputs\[0\]"):
        attainable_losses([[math.nan]], Softmax())
    with pytest.raises(TypeError, match="floating"):
        attainable_losses(f.long(), Softmax())
    with pytest.raises(TypeError, match="expected a Potential"):
        attainable_losses(f, torch.nn.CrossEntropyLoss())
    with pytest.raises(ValueError, match="leave them out"):
        attainable_losses(f, Softmax(), greatest=1.0)
    with pytest.raises(ValueError, match="extreme points"):
        attainable_losses(f, Coupled())
    with pytest.raises(ValueError, match="above greatest"):
        attainable_losses(f, Squared(), least=1.0, greatest=0.0)
    with pytest.raises(ValueError, match=r"least=-1.0: expected"):
        attainable_losses(f, Poisson(), least=-1.0, greatest=2.0)
    with pytest.raises(ValueError, match=r"greatest=1.5: expected"):
        attainable_losses(f, Logistic(), greatest=1.5)
    with pytest.raises(ValueError, match="greatest of shape"):
        attainable_losses(f, Squared(), least=0.0, greatest=torch.ones(3))
    with pytest.raises(ValueError, match="class indices below 2"):
        observed_maximum_loss(f, [0, 1, 2], Softmax())
    with pytest.raises(ValueError, match="lengths"):
        observed_maximum_loss(f, [0, 1], Softmax())
    with pytest.raises(ValueError, match="outputs gives 2"):
        observed_maximum_loss(f, torch.ones(3, 3) / 3, Softmax())
