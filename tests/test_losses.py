"""Fenchel-Young losses, and criteria written as them, against torch itself in float64."""

import copy
import math
import pickle
import warnings
from functools import partial

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from conjopt import ConjSGD
from conjopt.losses import (
    EntmaxLoss,
    FenchelYoungLoss,
    LogisticLoss,
    PoissonLoss,
    PotentialOf,
    SoftmaxLoss,
    SparsemaxLoss,
    SquaredLoss,
    potential_of,
)
from conjopt.potentials import Poisson

Instance = tuple[nn.Module, Tensor, Tensor]
REDUCTIONS = st.sampled_from(["mean", "sum"])
SMOOTHINGS = st.sampled_from([0.0, 0.1, 0.7, 1.0])
SCALES = st.sampled_from([0.01, 1.0, 100.0])


def generators() -> st.SearchStrategy[torch.Generator]:
    return st.integers(0, 2**32).map(lambda seed: torch.Generator().manual_seed(seed))


def normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@st.composite
def class_batches(draw: st.DrawFn) -> tuple[Tensor, Tensor, int]:
    """Outputs with hard targets, of which some are to be ignored, or with probabilities."""
    generator, classes = draw(generators()), draw(st.integers(1, 5))
    inner = draw(st.lists(st.integers(1, 3), max_size=2))
    shape = (classes,) if draw(st.booleans()) and not inner else (draw(st.integers(1, 4)), classes)
    outputs = draw(SCALES) * normal((*shape, *inner), generator)
    class_dim = outputs.dim() - 1 if outputs.dim() == 1 else 1
    if draw(st.booleans()):
        return outputs, normal(outputs.shape, generator).softmax(class_dim), -100
    ignore_index = draw(st.sampled_from([-100, 0, classes - 1]))
    terms = outputs.select(class_dim, 0).shape
    targets = torch.randint(classes, terms, generator=generator)
    share = draw(st.sampled_from([0.0, 0.5]))
    skip = torch.rand(terms, generator=generator) < share
    return outputs, targets.masked_fill(skip, ignore_index), ignore_index


@st.composite
def cross_entropies(draw: st.DrawFn) -> Instance:
    outputs, targets, ignore_index = draw(class_batches())
    weight = None
    if draw(st.booleans()):
        weight = normal(outputs.shape[:2][-1:], draw(generators())).exp()
    criterion = nn.CrossEntropyLoss(
        weight=weight,
        ignore_index=ignore_index,
        label_smoothing=draw(SMOOTHINGS),
        reduction=draw(REDUCTIONS),
    )
    return criterion, outputs, targets


CLASS_LOSSES = [SoftmaxLoss, SparsemaxLoss, EntmaxLoss, partial(EntmaxLoss, 1.25)]


@st.composite
def class_losses(draw: st.DrawFn) -> Instance:
    outputs, targets, ignore_index = draw(class_batches())
    weight = None
    if draw(st.booleans()):  # some classes weigh nothing
        weight = normal(outputs.shape[:2][-1:], draw(generators())).clamp(min=0)
    criterion = draw(st.sampled_from(CLASS_LOSSES))(
        weight=weight,
        ignore_index=ignore_index,
        label_smoothing=draw(SMOOTHINGS),
        reduction=draw(REDUCTIONS),
        include_target_entropy=draw(st.booleans()),
    )
    return criterion, outputs, targets


@st.composite
def value_batches(draw: st.DrawFn) -> tuple[Tensor, Tensor, torch.Generator]:
    generator, shape = draw(generators()), tuple(draw(st.lists(st.integers(1, 4), max_size=3)))
    outputs, targets = draw(SCALES) * normal(shape, generator), normal(shape, generator)
    return outputs, targets, generator


@st.composite
def element_weights(draw: st.DrawFn, outputs: Tensor) -> Tensor | None:
    """A weight that broadcasts to the outputs, with zeros, or none."""
    if draw(st.booleans()):
        return None
    shape = outputs.shape[draw(st.integers(0, outputs.dim())) :]
    shape = tuple(draw(st.sampled_from([1, n])) for n in shape)
    if draw(st.booleans()):
        return torch.ones(shape)
    return normal(shape, draw(generators())).clamp(min=0)


def counts(generator: torch.Generator, like: Tensor) -> Tensor:
    return torch.randint(4, like.shape, generator=generator).to(like)


@st.composite
def torch_value_losses(draw: st.DrawFn) -> Instance:
    outputs, targets, generator = draw(value_batches())
    kind, reduction = draw(st.sampled_from(["mse", "bce", "poisson"])), draw(REDUCTIONS)
    if kind == "mse":
        return nn.MSELoss(reduction=reduction), outputs, targets
    if kind == "poisson":
        criterion = nn.PoissonNLLLoss(full=draw(st.booleans()), reduction=reduction)
        return criterion, outputs, counts(generator, outputs)
    targets = (targets > 0).double() if draw(st.booleans()) else targets.sigmoid()
    weight, pos_weight = draw(element_weights(outputs)), draw(element_weights(outputs))
    criterion = nn.BCEWithLogitsLoss(weight, pos_weight=pos_weight, reduction=reduction)
    return criterion, outputs, targets


@st.composite
def value_losses(draw: st.DrawFn) -> Instance:
    outputs, targets, generator = draw(value_batches())
    keywords = {"weight": draw(element_weights(outputs)), "reduction": draw(REDUCTIONS)}
    kind = draw(st.sampled_from([SquaredLoss, LogisticLoss, PoissonLoss]))
    if kind is SquaredLoss:
        return SquaredLoss(**keywords), outputs, targets
    if kind is PoissonLoss:
        targets = counts(generator, outputs) if draw(st.booleans()) else targets.exp()
    else:
        targets = (targets > 0).double() if draw(st.booleans()) else targets.sigmoid()
    return kind(**keywords, include_target_entropy=draw(st.booleans())), outputs, targets


INSTANCES = st.one_of(cross_entropies(), class_losses(), torch_value_losses(), value_losses())


def reconstructed(view: PotentialOf, outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the criterion as `PotentialOf` promises it."""
    losses = view.potential.loss(view.points(outputs, targets), view.rows(outputs))
    mean = (view.weights(outputs, targets) * losses).sum()
    return view.scale(outputs, targets) * mean + view.offset(outputs, targets)


@given(INSTANCES)
@settings(deadline=None, max_examples=500)
def test_criterion_is_scale_times_mean_loss_plus_offset(instance: Instance):
    criterion, outputs, targets = instance
    value, view = criterion(outputs, targets), potential_of(criterion)
    if value.isnan():  # torch's mean over nothing
        assert criterion.label_smoothing or (view.weights(outputs, targets) == 0).all()
        assert view.scale(outputs, targets) == 1
        assert view.offset(outputs, targets) == 0
    else:
        result = reconstructed(view, outputs, targets)
        assert_close(result, value, rtol=1e-12, atol=1e-13 * (1 + outputs.abs().max().item()))


@given(INSTANCES)
@settings(deadline=None, max_examples=300)
def test_output_gradient_is_scale_times_weight_times_residual(instance: Instance):
    criterion, outputs, targets = instance
    view = potential_of(criterion)
    assume(not criterion(outputs, targets).isnan())
    gradient = torch.func.grad(criterion)(outputs, targets)
    residuals = view.potential.link(view.rows(outputs)) - view.points(outputs, targets)
    scale, weights = view.scale(outputs, targets), view.weights(outputs, targets)
    expected = scale * weights.unsqueeze(1) * residuals
    assert_close(view.rows(gradient), expected, rtol=1e-12, atol=1e-12)


@given(INSTANCES)
@settings(deadline=None)
def test_weights_and_points_are_valid(instance: Instance):
    criterion, outputs, targets = instance
    view = potential_of(criterion)
    weights, points = view.weights(outputs, targets), view.points(outputs, targets)
    assert (weights >= 0).all()
    total = weights.sum().item()
    assert total == 0 or total == pytest.approx(1, abs=1e-13)
    assert points.shape == view.rows(outputs).shape == (*weights.shape, points.shape[1])
    if view.potential.on_simplex:
        assert_close(points.sum(-1), torch.ones_like(weights), rtol=1e-13, atol=0)
    assert view.potential.contains(points).all()


@given(INSTANCES)
@settings(deadline=None)
def test_rows_belong_to_the_samples_in_order(instance: Instance):
    criterion, outputs, _ = instance
    view = potential_of(criterion)
    assume(outputs.dim() > view.potential.on_simplex)  # else there is one sample
    samples = len(outputs)
    owners = torch.arange(samples).view(-1, *[1] * (outputs.dim() - 1)).expand_as(outputs)
    rows = view.rows(owners)
    expected = torch.arange(len(rows)) // (len(rows) // samples)
    assert (rows == expected.unsqueeze(1)).all()


@given(INSTANCES)
@settings(deadline=None, max_examples=200)
def test_nothing_waits_for_the_device_and_nothing_is_attached(instance: Instance):
    """A meta tensor has no values: `.item()`, `bool()` and boolean indexing raise."""
    criterion, outputs, targets = instance
    view = potential_of(criterion)
    view = type(view)(view.potential, copy.deepcopy(criterion).to("meta"))
    outputs = outputs.to("meta").requires_grad_()
    targets = targets.to("meta")
    if targets.is_floating_point():
        targets.requires_grad_()
    for method in (view.scale, view.offset, view.weights, view.points):
        assert not method(outputs, targets).requires_grad
    assert view.rows(outputs).requires_grad


@pytest.mark.parametrize("weight", [None, torch.rand(100)])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_hard_targets_form_no_matrix_of_rows_by_classes(weight: Tensor | None, smoothing: float):
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                self.numel = max(self.numel, result.numel())
            return result

    view = potential_of(nn.CrossEntropyLoss(weight, label_smoothing=smoothing))
    outputs, targets = torch.zeros(512, 100), torch.arange(512) % 100
    for method in (view.scale, view.offset, view.weights):
        with Largest() as largest:
            method(outputs, targets)
        assert 0 < largest.numel <= 512
    assert smoothing or view.offset(outputs, targets) == 0


@given(class_batches(), SMOOTHINGS)
@settings(deadline=None)
def test_softmax_loss_is_cross_entropy_less_the_entropy_of_the_targets(
    batch: tuple[Tensor, Tensor, int], smoothing: float
):
    outputs, targets, ignore_index = batch
    keywords = {"ignore_index": ignore_index, "label_smoothing": smoothing, "reduction": "none"}
    loss = SoftmaxLoss(**keywords)(outputs, targets)
    cross_entropy = nn.CrossEntropyLoss(**keywords)(outputs, targets)
    if targets.is_floating_point():
        class_dim = min(outputs.dim() - 1, 1)
        mixed = (1 - smoothing) * targets + smoothing / outputs.shape[class_dim]
        entropy = torch.special.entr(mixed).sum(class_dim)
    else:
        classes = outputs.shape[min(outputs.dim() - 1, 1)]
        best = torch.full((classes,), smoothing / classes, dtype=torch.float64)
        best[0] += 1 - smoothing
        entropy = torch.special.entr(best).sum() * (targets != ignore_index)
    atol = 1e-13 * (1 + outputs.abs().max().item())
    assert_close(loss, cross_entropy - entropy, rtol=1e-12, atol=atol)


def test_scale_and_offset_of_the_reductions():
    outputs, targets = torch.zeros(4, 3), torch.full((4, 3), 0.5)
    expected = [
        (nn.MSELoss(), 2 / 3, 0),
        (nn.MSELoss(reduction="sum"), 8, 0),
        (nn.BCEWithLogitsLoss(), 1 / 3, math.log(2)),
        (nn.BCEWithLogitsLoss(reduction="sum"), 4, 12 * math.log(2)),
        (SquaredLoss(), 1, 0),
        (LogisticLoss(reduction="sum"), 4, 0),
        (LogisticLoss(include_target_entropy=True), 1, 3 * math.log(2)),
        (SquaredLoss(weight=torch.tensor([1.0, 2.0, 0.0])), 3, 0),
        (nn.PoissonNLLLoss(), 1 / 3, (1 + math.log(2)) / 2),
        (nn.PoissonNLLLoss(reduction="sum"), 4, 6 * (1 + math.log(2))),
        (PoissonLoss(), 1, 0),
    ]
    for criterion, scale, offset in expected:
        view = potential_of(criterion)
        assert view.scale(outputs, targets).item() == pytest.approx(scale)
        assert view.offset(outputs, targets).item() == pytest.approx(offset)


def test_weights_that_vanish_leave_finite_points():
    outputs = torch.tensor([[1.0, 2.0], [0.0, 1.0]], dtype=torch.float64)
    targets = torch.tensor([[1.0, 0.0], [1.0, 0.5]], dtype=torch.float64)
    criterion = nn.BCEWithLogitsLoss(pos_weight=torch.zeros(2))
    view = potential_of(criterion)
    assert_close(reconstructed(view, outputs, targets), criterion(outputs, targets))
    hard = torch.tensor([1, 1])
    criterion = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 0.0]).double())
    view = potential_of(criterion)
    assert view.points(outputs, hard).isfinite().all()
    assert (view.scale(outputs, hard), view.offset(outputs, hard)) == (1, 0)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_where_nothing_counts_loss_and_gradient_are_those_of_torch(reduction: str):
    for loss in (SoftmaxLoss(reduction=reduction), nn.CrossEntropyLoss(reduction=reduction)):
        outputs = torch.ones(3, 2, requires_grad=True)
        value = loss(outputs, torch.full((3,), -100))
        value.backward()
        assert value.isnan() if reduction == "mean" else value == 0
        assert (outputs.grad == 0).all()
    for criterion in (SquaredLoss(reduction=reduction), nn.MSELoss(reduction=reduction)):
        view, empty = potential_of(criterion), torch.ones(0, 2)
        assert (view.scale(empty, empty), view.offset(empty, empty)) == (1, 0)
        assert view.points(empty, empty).shape == (0, 2)
    empty_loss = SquaredLoss(reduction=reduction)(empty, empty)
    assert empty_loss.isnan() if reduction == "mean" else empty_loss == 0


def test_stirlings_formula_is_in_the_offset():
    outputs, targets = torch.zeros(4, 1), torch.tensor([[0.0], [1.0], [2.0], [7.0]])
    plain, full = (potential_of(nn.PoissonNLLLoss(full=full)) for full in (False, True))
    difference = full.offset(outputs, targets) - plain.offset(outputs, targets)
    exact = (math.lgamma(3) + math.lgamma(8)) / 4
    assert difference.item() == pytest.approx(exact, abs=0.02)


@pytest.mark.parametrize("criterion", [nn.CrossEntropyLoss(), SoftmaxLoss(), SparsemaxLoss()])
def test_probabilities_need_not_sum_to_one_exactly(criterion: nn.Module):
    outputs = normal((4, 3), torch.Generator().manual_seed(0)).float()
    targets = normal((4, 3), torch.Generator().manual_seed(1)).softmax(-1).bfloat16()
    if isinstance(criterion, nn.CrossEntropyLoss):  # torch takes anything
        targets = 1.5 * targets.float()
    else:
        assert (targets.float().sum(-1) != 1).any()
    view, value = potential_of(criterion), criterion(outputs, targets)
    assert_close(reconstructed(view, outputs, targets), value)
    assert view.scale(outputs, targets) != 1


def test_targets_below_zero_by_rounding_are_taken_for_zero():
    outputs = torch.tensor([[0.0, 1.0, -1.0]])
    rounded, exact = torch.tensor([[-1e-8, 1.0, 0.0]]), torch.tensor([[0.0, 1.0, 0.0]])
    for kind in CLASS_LOSSES:
        for entropy in (False, True):
            criterion = kind(include_target_entropy=entropy)
            assert_close(criterion(outputs, rounded), criterion(outputs, exact))
            assert potential_of(criterion).points(outputs, rounded).min() == 0
    assert potential_of(nn.CrossEntropyLoss()).offset(outputs, rounded).abs() < 1e-6


def test_losses_are_ordinary_modules():
    loss = SoftmaxLoss(label_smoothing=0.1, reduction="sum")
    assert repr(loss) == "SoftmaxLoss(Softmax(), label_smoothing=0.1, reduction='sum')"
    assert repr(SquaredLoss()) == "SquaredLoss(Squared(), reduction='mean')"
    loss = PoissonLoss(include_target_entropy=True)
    assert repr(loss) == "PoissonLoss(Poisson(), reduction='mean', include_target_entropy=True)"
    assert repr(EntmaxLoss(1.25)) == "EntmaxLoss(Entmax(order=1.25), reduction='mean')"
    assert loss.state_dict() == {}
    assert list(loss.parameters()) == []


@pytest.mark.parametrize("kind", [*CLASS_LOSSES, SquaredLoss, LogisticLoss, PoissonLoss])
@pytest.mark.parametrize("weight", [None, torch.tensor([0.5, 2.0])])
def test_copies_give_the_same_loss(kind: type[FenchelYoungLoss], weight: Tensor | None):
    loss = kind(weight=weight, reduction="sum")
    outputs = torch.tensor([[1.0, 2.0]])
    targets = torch.tensor([0]) if loss.potential.on_simplex else torch.tensor([[1.0, 0.0]])
    value = loss(outputs, targets)
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss)), loss.double()):
        assert twin(outputs, targets) == value
    assert loss(outputs.double(), targets).dtype == torch.float64
    if loss.potential.on_simplex or weight is not None:
        return
    loss(outputs, targets.int())  # integer values are values


def test_a_weight_is_a_buffer():
    loss, other = SoftmaxLoss(weight=torch.tensor([0.5, 2.0])), SoftmaxLoss(weight=torch.ones(2))
    assert list(loss.state_dict()) == ["weight"]
    other.load_state_dict(loss.state_dict())
    outputs, targets = torch.tensor([[1.0, 2.0], [0.5, 0.0]]), torch.tensor([0, 1])
    assert other(outputs, targets) == loss(outputs, targets)
    assert other.double().weight.dtype == torch.float64
    assert other(outputs, targets).dtype == torch.float32
    assert other.to("meta")(outputs.to("meta"), targets.to("meta")).device.type == "meta"


TRAINING = [
    SparsemaxLoss(),
    EntmaxLoss(),
    EntmaxLoss(1.25, label_smoothing=0.1),
    SoftmaxLoss(weight=torch.tensor([0.5, 1.0, 2.0])),
    PoissonLoss(),
    nn.PoissonNLLLoss(),
    LogisticLoss(weight=torch.tensor([0.5, 1.0, 2.0]), include_target_entropy=True),
]


@pytest.mark.parametrize("criterion", TRAINING, ids=str)
@pytest.mark.parametrize("direction", ["spectral", "sgd"])
def test_the_optimizer_trains_with_them(criterion: nn.Module, direction: str):
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    x = torch.randn(32, 4, generator=generator)
    potential = potential_of(criterion).potential
    y = x[:, :3].argmax(1)
    if not potential.on_simplex:
        y = x[:, :3].exp().round() if potential == Poisson() else (x[:, :3] > 0).float()
    optimizer = ConjSGD(model.parameters(), model=model, loss=criterion, direction=direction)
    losses = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(15):
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert all(map(math.isfinite, losses))
    assert losses[-1] < losses[0] - 0.05 * abs(losses[0])
