"""`conjopt.bounds`: units, weights, layouts, and input that it refuses."""

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from conjopt.bounds import pl_bound, risk_sandwich
from conjopt.losses import FenchelYoungLoss, potential_of
from conjopt.measure import MeasurementError
from conjopt.potentials import Softmax, Squared

FIELDS = ("lower", "losses", "upper", "lo", "hi", "gradient_norms", "residual_norms")


def model_of(*sizes: int) -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).double()


MODEL = model_of(4, 5, 3)
X, Y = torch.randn(5, 4).double(), torch.arange(5) % 3
VALUES = torch.rand(5, 3).double()


@pytest.mark.parametrize(
    ("criterion", "same", "targets"),
    [
        (nn.CrossEntropyLoss(reduction="sum"), nn.CrossEntropyLoss(), Y),
        (FenchelYoungLoss(Softmax()), nn.CrossEntropyLoss(), Y),
        (nn.MSELoss(), FenchelYoungLoss(Squared()), VALUES),
        (nn.MSELoss(reduction="sum"), nn.MSELoss(), VALUES),
        (nn.BCEWithLogitsLoss(reduction="sum"), nn.BCEWithLogitsLoss(), VALUES),
    ],
)
def test_units_are_those_of_the_fenchel_young_loss(
    criterion: nn.Module, same: nn.Module, targets: Tensor
):
    a, b = (risk_sandwich(MODEL, loss, X, targets) for loss in (criterion, same))
    for name in FIELDS:
        assert_close(getattr(a, name), getattr(b, name), rtol=1e-14, atol=1e-16)
        assert getattr(a, name).shape == (5,)
    a, b = (pl_bound(MODEL, loss, X, targets) for loss in (criterion, same))
    for field in dataclasses.fields(a):
        assert_close(getattr(a, field.name), getattr(b, field.name), rtol=1e-14, atol=1e-16)
        assert getattr(a, field.name).shape == ()


CRITERIA = {
    "plain": nn.CrossEntropyLoss(),
    "weighted": nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0]).double()),
    "ignoring": nn.CrossEntropyLoss(ignore_index=1),
    "both, sum": nn.CrossEntropyLoss(
        weight=torch.tensor([1.0, 0.0, 3.0]).double(), ignore_index=1, reduction="sum"
    ),
    "smoothed": nn.CrossEntropyLoss(label_smoothing=0.2),
}


@pytest.mark.parametrize("name", CRITERIA)
def test_the_mean_is_the_criterion_without_scale_and_offset(name: str):
    criterion = CRITERIA[name]
    view, outputs = potential_of(criterion), MODEL(X)
    scale, offset = view.scale(outputs, Y), view.offset(outputs, Y)
    found = risk_sandwich(MODEL, criterion, X, Y).mean()
    value = criterion(outputs, Y)
    assert_close(scale * found.losses + offset, value.detach(), rtol=1e-13, atol=0)
    assert found.lower <= found.losses <= found.upper
    bound = pl_bound(MODEL, criterion, X, Y)
    gradients = torch.autograd.grad(value, list(MODEL.parameters()))
    square = sum(g.square().sum() for g in gradients)
    assert_close(scale**2 * bound.gradient_square, square, rtol=1e-12, atol=0)
    assert bound.lower <= bound.gradient_square <= bound.upper


def test_class_weights_do_not_change_the_bounds_of_a_sample():
    plain, weighted = (risk_sandwich(MODEL, CRITERIA[n], X, Y) for n in ("plain", "weighted"))
    for name in FIELDS:
        assert_close(getattr(plain, name), getattr(weighted, name), rtol=1e-14, atol=1e-16)
    assert_close(weighted.weights, torch.tensor([1.0, 2.0, 3.0, 1.0, 2.0]).double() / 9)


@pytest.mark.parametrize("name", ["ignoring", "both, sum"])
def test_ignored_samples_have_no_bound(name: str):
    plain, found = (risk_sandwich(MODEL, CRITERIA[n], X, Y) for n in ("plain", name))
    ignored = Y == 1
    for field in FIELDS:
        values = getattr(found, field)
        if field not in ("lo", "hi"):
            assert values[ignored].isnan().all()
        assert_close(values[~ignored], getattr(plain, field)[~ignored], rtol=1e-14, atol=1e-16)
    assert (found.weights[ignored] == 0).all()


def test_nothing_counts():
    loss = nn.CrossEntropyLoss(ignore_index=1)
    found = risk_sandwich(MODEL, loss, X, torch.ones_like(Y))
    assert found.losses.isnan().all()
    assert found.mean() == (0, 0, 0)
    assert pl_bound(MODEL, loss, X, torch.ones_like(Y)).gradient_square == 0


class Reshaped(nn.Module):
    def __init__(self, model: nn.Module, *shape: int) -> None:
        super().__init__()
        self.model, self.shape = model, shape

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).reshape(len(x), *self.shape)


@pytest.mark.parametrize("shape", [(6,), (2, 3), (3, 1, 2)])
@pytest.mark.parametrize("loss", [nn.MSELoss(), nn.BCEWithLogitsLoss(), nn.PoissonNLLLoss()])
def test_a_sample_of_values_is_one_row(shape: tuple[int, ...], loss: nn.Module):
    model, y = model_of(4, 5, 6), torch.rand(5, 6).double()
    flat = risk_sandwich(model, loss, X, y)
    found = risk_sandwich(Reshaped(model, *shape), loss, X, y.reshape(5, *shape))
    for name in FIELDS:
        assert_close(getattr(found, name), getattr(flat, name), rtol=1e-12, atol=1e-13)
    batch = pl_bound(Reshaped(model, *shape), loss, X, y.reshape(5, *shape))
    assert batch.lower <= batch.gradient_square <= batch.upper


def test_outputs_without_a_dimension_of_coordinates():
    model, y = model_of(4, 1), torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0]).double()
    flat = risk_sandwich(model, nn.BCEWithLogitsLoss(), X, y.unsqueeze(1))
    found = risk_sandwich(Reshaped(model), nn.BCEWithLogitsLoss(), X, y)
    for name in FIELDS:
        assert_close(getattr(found, name), getattr(flat, name), rtol=1e-13, atol=1e-15)


def test_nothing_of_the_model_is_touched():
    model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5)).double()
    state = torch.get_rng_state()
    for bound in (risk_sandwich, pl_bound):
        found = bound(model, nn.CrossEntropyLoss(), X, Y)
        assert not any(value.requires_grad for value in vars(found).values())
        assert torch.equal(state, torch.get_rng_state())
        assert all(p.grad is None for p in model.parameters())
        with pytest.raises(dataclasses.FrozenInstanceError):
            found.lo = found.hi


@pytest.mark.parametrize("bound", [risk_sandwich, pl_bound])
def test_single_precision(bound):
    model = nn.Linear(4, 3)
    found = bound(model, nn.CrossEntropyLoss(), 0.2 * X.float(), Y)
    wide = bound(nn.Linear(4, 3).double(), nn.CrossEntropyLoss(), X, Y)
    assert all(value.dtype == torch.float32 for value in vars(found).values())
    assert all(value.dtype == torch.float64 for value in vars(wide).values())
    if bound is risk_sandwich:  # lo = ||x||^2 + 1: far from rounding
        assert found.upper.isfinite().all()
        assert (found.lower <= found.losses * (1 + 1e-5)).all()
        assert (found.losses <= found.upper * (1 + 1e-5)).all()


@pytest.mark.parametrize("bound", [risk_sandwich, pl_bound])
@pytest.mark.parametrize(
    ("loss", "model", "targets", "error", "message"),
    [
        (
            nn.CrossEntropyLoss(),
            Reshaped(model_of(4, 6), 3, 2),
            torch.zeros(5, 2, dtype=torch.long),
            (ValueError, MeasurementError),  # whichever meets it first
            r"has 10 terms for outputs of shape \(5, 3, 2\), expected one for each sample",
        ),
        (
            nn.BCEWithLogitsLoss(pos_weight=torch.tensor(2.0)),
            MODEL,
            VALUES,
            ValueError,
            "has 15 terms",
        ),
        (nn.MSELoss(), MODEL, VALUES[:, :2], ValueError, "expected equal shapes"),
        (nn.MSELoss(reduction="none"), MODEL, VALUES, ValueError, "reduction='none'"),
        (nn.L1Loss(), MODEL, VALUES, TypeError, "not recognised"),
    ],
)
def test_what_is_refused(bound, loss, model, targets, error, message):
    with pytest.raises(error, match=message):
        bound(model, loss, X, targets)
