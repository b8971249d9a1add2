"""Inputs that a formula cannot take: the value and the gradient stay finite, or are 0."""

import warnings

import pytest
import torch
from torch import Tensor

from conjopt.potentials import Entmax, Logistic, Poisson, Softmax, Squared
from conjopt.regularizers import (
    AttainableLoss,
    ConditionalEntropy,
    OutputCodingRate,
    PredictiveEntropy,
    Regularizer,
    WithinClassScatter,
    coding_rate,
)
from conjopt.regularizers.logdet import half_logdet

KINDS = [
    ConditionalEntropy,
    OutputCodingRate,
    WithinClassScatter,
    AttainableLoss,
    PredictiveEntropy,
]
SPREADS = [OutputCodingRate, WithinClassScatter]
PAIRED = [ConditionalEntropy, *SPREADS]
of_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
of_paired = pytest.mark.parametrize("kind", PAIRED, ids=lambda kind: kind.__name__)
in_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def value_and_gradient(term, outputs: Tensor, targets: Tensor, **features) -> tuple[Tensor, Tensor]:
    outputs = outputs.clone().requires_grad_()
    value = term.estimate(outputs, targets, **features)
    (gradient,) = torch.autograd.grad(value, outputs)
    assert value.shape == ()
    assert gradient.shape == outputs.shape
    return value.detach(), gradient


def random_batch(m: int = 12, k: int = 4, dtype=torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    f = torch.randn(m, k, generator=generator, dtype=dtype)
    return f, torch.randint(k, (m,), generator=generator)


def nothing(value: Tensor, gradient: Tensor) -> bool:
    return value == 0 and bool((gradient == 0).all())


@of_paired
@pytest.mark.parametrize("m", [0, 1])
def test_fewer_than_two_rows_add_0_with_a_gradient(kind, m):
    f, y = random_batch(m)
    assert nothing(*value_and_gradient(kind(), f, y))
    assert nothing(*value_and_gradient(kind(), f, torch.eye(4)[y]))


@of_kind
def test_rows_that_do_not_count_are_not_there(kind):
    f, y = random_batch()
    nowhere = torch.full_like(y, -100)
    assert nothing(*value_and_gradient(kind(), f, nowhere))
    nowhere[3] = y[3]
    value, gradient = value_and_gradient(
        kind(), torch.where(nowhere.unsqueeze(1) < 0, 1e30, f), nowhere
    )
    if kind in PAIRED:
        assert nothing(value, gradient)
    assert torch.equal(value, kind().estimate(f[3:4], y[3:4]))
    assert (gradient[nowhere < 0] == 0).all()


@of_kind
def test_rows_that_do_not_count_need_not_be_finite(kind):
    f, y = random_batch()
    y[3] = -100
    expected = kind().estimate(f, y)
    f[3] = torch.nan
    term = kind()
    assert torch.equal(term.estimate(f, y), expected)
    term(f, y)
    assert term.skipped == 0


def test_a_term_is_not_asked_for_the_greatest_of_nothing():
    class Greatest(Regularizer):
        def _value(self, batch):
            return batch.rows.max()

    term = Greatest(1.0)
    assert nothing(*value_and_gradient(term, torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)))
    f, y = random_batch()
    assert term(f, y) == f.max()


def test_a_class_of_one_row_is_not_factorised(monkeypatch):
    """Of 12 rows the two that share a class are left: the others' determinants are 1."""
    sizes = []
    monkeypatch.setattr(
        coding_rate,
        "half_logdet",
        lambda matrices, *rest: sizes.append(len(matrices)) or half_logdet(matrices, *rest),
    )
    f, _ = random_batch(12, 100)
    y = torch.arange(12) + 50
    y[1] = y[0]
    assert OutputCodingRate().estimate(f, y) > 0
    assert sizes == [2]


@of_kind
@pytest.mark.parametrize("shape", ["(0, k)", "(0, k, T)", "(N, k, 0)"])
def test_an_empty_batch_adds_0(kind, shape):
    f = torch.zeros({"(0, k)": (0, 3), "(0, k, T)": (0, 3, 5), "(N, k, 0)": (2, 3, 0)}[shape])
    y = torch.zeros(f.shape[:1] + f.shape[2:], dtype=torch.int64)
    assert nothing(*value_and_gradient(kind(), f, y))


@of_paired
@in_dtype
def test_a_sample_of_each_class_has_nothing_to_be_compared_with(kind, dtype):
    f, _ = random_batch(4, 4, dtype)
    value, gradient = value_and_gradient(kind(), f, torch.arange(4))
    tolerance = 8 * torch.finfo(dtype).eps
    assert value.abs() <= tolerance
    assert gradient.abs().max() <= tolerance


@of_paired
@in_dtype
def test_more_classes_than_rows_with_one_pair(kind, dtype):
    """k = 100: a pair of one class counts, the others not."""
    f = random_batch(12, 100, dtype)[0]
    y = torch.arange(12) + 50
    y[1] = y[0]
    value, gradient = value_and_gradient(kind(), f, y)
    assert value > 0
    assert gradient.isfinite().all()
    if kind in SPREADS:
        assert gradient[:2].abs().max() > 0
        assert gradient[2:].abs().max() <= 1e-6


@in_dtype
def test_of_one_class_the_conditional_entropy_is_0(dtype):
    f, y = random_batch(dtype=dtype)
    value, gradient = value_and_gradient(ConditionalEntropy(), f, torch.zeros_like(y))
    assert value.abs() <= 8 * torch.finfo(dtype).eps
    assert gradient.abs().max() <= 64 * torch.finfo(dtype).eps


@of_kind
@in_dtype
def test_of_one_output_there_is_nothing_to_do(kind, dtype):
    """k = 1: every prediction is certain."""
    f, y = random_batch(6, 1, dtype)
    value, gradient = value_and_gradient(kind(), 100 * f, y)
    assert value.abs() <= 8 * torch.finfo(dtype).eps
    assert gradient.abs().max() <= 64 * torch.finfo(dtype).eps


@of_paired
@in_dtype
@pytest.mark.parametrize("level", [0.0, 1.0, 0.1, 1e-30, 1e6, 1e15])
def test_equal_rows_have_a_small_gradient_and_no_noise(kind, dtype, level):
    """The mean of equal numbers is off by rounding, which must not be taken for a spread."""
    _, y = random_batch(13, 3)
    f = level * torch.tensor([[0.3, -1.7, 0.9]], dtype=dtype).expand(13, 3)
    value, gradient = value_and_gradient(kind(), f, y)
    assert gradient.isfinite().all()
    if kind is ConditionalEntropy:
        counts = (torch.eye(3, dtype=dtype)[y]).sum(0)
        left_out = (counts - torch.eye(3, dtype=dtype)[y]) / 12
        expected = torch.special.entr(left_out).sum(1).mean()
        torch.testing.assert_close(value, expected)
        assert (gradient * level).abs().max() <= 1e-4
    else:
        rounding = (16 * torch.finfo(dtype).eps * level) ** 2
        assert value <= rounding + 8 * torch.finfo(dtype).eps


@of_kind
@in_dtype
@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e6, 1e15])
@pytest.mark.parametrize("targets", ["hard", "soft"])
def test_any_scale_has_a_finite_value_and_gradient(kind, dtype, scale, targets):
    f, y = random_batch(40, 4, dtype)
    f, y = torch.cat([f, f[:3]]), torch.cat([y, y[:3]])  # with duplicates
    given = y if targets == "hard" else torch.eye(4, dtype=dtype)[y] * 0.9 + 0.025
    value, gradient = value_and_gradient(kind(), scale * f, given)
    assert value.isfinite()
    assert value >= 0
    assert gradient.isfinite().all()


@pytest.mark.parametrize("k", [4, 100])
@pytest.mark.parametrize("scale", [1e2, 1e4, 1e8, 1e12])
def test_huge_outputs_have_the_rate_of_double_precision_where_it_can_be_told(k, scale):
    """Beyond, the factorisation neither fails nor makes a rate that falls as the outputs grow."""
    f, y = random_batch(60, k)
    y = y % 3
    value, gradient = value_and_gradient(OutputCodingRate(), scale * f, y)
    exact, _ = value_and_gradient(OutputCodingRate(), scale * f.double(), y)
    assert gradient.isfinite().all()
    assert value.double() >= 0.99 * exact if scale <= 1e4 else value > 0
    if scale <= 1e2:
        torch.testing.assert_close(value.double(), exact, rtol=2e-3, atol=0)


@of_paired
def test_dead_features_have_no_spread(kind):
    f, y = random_batch()
    z = torch.zeros(12, 7, requires_grad=True)
    value = kind().estimate(f, y, features=z)
    (gradient,) = torch.autograd.grad(value, z)
    assert (gradient == 0).all()
    assert kind is ConditionalEntropy or value == 0


# Outputs that are not finite.


@of_kind
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.filterwarnings("ignore:.*adds 0 where outputs are NaN")
def test_a_batch_with_a_row_that_is_not_finite_is_left_out(kind, bad):
    f, y = random_batch()
    f[3, 1] = bad
    f.requires_grad_()
    term = kind(weight=2.0)
    value = term(f, y)
    value.backward()
    assert value == 0
    assert (f.grad == 0).all()
    assert term.skipped == 1


@pytest.mark.filterwarnings("ignore:.*adds 0 where outputs are NaN")
@pytest.mark.parametrize(
    ("term", "f"),
    [
        (OutputCodingRate(), 1e30),
        (WithinClassScatter(), 1e30),
        (PredictiveEntropy(potential=Poisson(), maximize=True), 1e3),
        (AttainableLoss(potential=Poisson()), 1e3),
        (AttainableLoss(potential=Squared()), 1e30),
    ],
    ids=lambda value: type(value).__name__,
)
def test_outputs_whose_value_overflows_are_left_out(term, f):
    outputs, y = random_batch()
    outputs = f * outputs
    outputs.requires_grad_()
    targets = y if term.potential.on_simplex else torch.ones(12, 4)
    term(outputs, targets).backward()
    assert (outputs.grad == 0).all()
    assert term.skipped == 1


@of_kind
def test_it_says_so_once(kind):
    f, y = random_batch()
    bad = f.clone()
    bad[0] = torch.nan
    term = kind()
    with pytest.warns(UserWarning, match=rf"{kind.__name__} adds 0 .* in \.skipped") as caught:
        term(bad, y)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        term(f, y)
        term(bad, y)
        term.estimate(bad, y)
    assert term.skipped == 2


def test_where_looking_would_wait_estimate_says_so(monkeypatch):
    f, y = random_batch()
    term = ConditionalEntropy()
    with monkeypatch.context() as patch:
        patch.setattr(
            ConditionalEntropy, "_warn", lambda self, skipped, depth: None
        )  # as on a device
        term(torch.full_like(f, torch.nan), y)
    with pytest.warns(UserWarning, match="adds 0") as caught:
        term.estimate(f, y)
    assert caught[0].filename == __file__


@of_kind
def test_outside_of_training_nothing_is_counted(kind):
    f, y = random_batch()
    bad = torch.full_like(f, torch.nan)
    term = kind()
    term._warned = True
    term.estimate(bad, y)
    with torch.no_grad():
        term(bad, y)
    term.eval()
    term(bad, y)
    assert term.skipped == 0


# Limits.


@pytest.mark.parametrize("potential", [Softmax(), Entmax(1.5)], ids=repr)
def test_separable_outputs_have_no_conditional_entropy_and_no_spread(potential):
    y = torch.arange(12) % 3
    f = 50 * torch.eye(3, dtype=torch.float64)[y]
    assert ConditionalEntropy(bandwidth=0.01, potential=potential).estimate(f, y) <= 1e-12
    assert ConditionalEntropy(potential=potential).estimate(f, y) <= 1e-4
    assert OutputCodingRate(potential=potential).estimate(f, y) == 0
    assert WithinClassScatter(potential=potential).estimate(f, y) == 0
    assert PredictiveEntropy(potential=potential).estimate(f, y) <= 1e-12


@pytest.mark.parametrize("potential", [Logistic(), Squared(), Poisson()], ids=repr)
def test_equal_targets_leave_no_conditional_entropy(potential):
    f, _ = random_batch(dtype=torch.float64)
    for level in (0.0, 0.3, 1.0):
        y = torch.full_like(f, level)
        value, gradient = value_and_gradient(ConditionalEntropy(potential=potential), f, y)
        assert value.abs() <= 1e-13
        assert gradient.abs().max() <= 1e-12


def test_constant_outputs_have_the_entropy_of_the_other_labels():
    y = torch.arange(300) % 3
    value = ConditionalEntropy().estimate(torch.zeros(300, 3), y)
    assert value == pytest.approx(torch.tensor(3.0).log().item(), rel=1e-4)
