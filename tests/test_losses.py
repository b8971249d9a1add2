"""Fenchel-Young losses, and criteria written as them, against torch itself in float64."""

import copy
import math
import pickle

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from conjopt.losses import (
    FenchelYoungLoss,
    LogisticLoss,
    PotentialOf,
    SoftmaxLoss,
    SquaredLoss,
    potential_of,
)
from conjopt.potentials import Logistic, Softmax, Squared

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


@st.composite
def softmax_losses(draw: st.DrawFn) -> Instance:
    outputs, targets, ignore_index = draw(class_batches())
    criterion = SoftmaxLoss(
        ignore_index=ignore_index, label_smoothing=draw(SMOOTHINGS), reduction=draw(REDUCTIONS)
    )
    return criterion, outputs, targets


@st.composite
def value_batches(draw: st.DrawFn) -> tuple[Tensor, Tensor, torch.Generator]:
    generator, shape = draw(generators()), tuple(draw(st.lists(st.integers(1, 4), max_size=3)))
    outputs, targets = draw(SCALES) * normal(shape, generator), normal(shape, generator)
    return outputs, targets, generator


@st.composite
def squared_errors(draw: st.DrawFn) -> Instance:
    outputs, targets, _ = draw(value_batches())
    kind = draw(st.sampled_from([nn.MSELoss, SquaredLoss]))
    return kind(reduction=draw(REDUCTIONS)), outputs, targets


@st.composite
def binary_cross_entropies(draw: st.DrawFn) -> Instance:
    outputs, targets, generator = draw(value_batches())
    targets = (targets > 0).double() if draw(st.booleans()) else targets.sigmoid()
    if draw(st.booleans()):
        return LogisticLoss(reduction=draw(REDUCTIONS)), outputs, targets

    def weight() -> Tensor | None:
        """Draw a broadcastable weight, with zeros, or none."""
        if draw(st.booleans()):
            return None
        shape = outputs.shape[draw(st.integers(0, outputs.dim())) :]
        shape = tuple(draw(st.sampled_from([1, n])) for n in shape)
        return normal(shape, generator).clamp(min=0) if draw(st.booleans()) else torch.ones(shape)

    criterion = nn.BCEWithLogitsLoss(
        weight=weight(), pos_weight=weight(), reduction=draw(REDUCTIONS)
    )
    return criterion, outputs, targets


INSTANCES = st.one_of(
    cross_entropies(), softmax_losses(), squared_errors(), binary_cross_entropies()
)


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
        assert (view.weights(outputs, targets) == 0).all()
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
    gradient = torch.func.grad(criterion)(outputs, targets)
    assume(not gradient.isnan().any())
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
    if view.potential == Softmax():
        assert_close(points.sum(-1), torch.ones_like(weights), rtol=1e-13, atol=0)
    if view.potential != Squared():
        assert ((points >= 0) & (points <= 1)).all()


@given(INSTANCES)
@settings(deadline=None)
def test_rows_belong_to_the_samples_in_order(instance: Instance):
    criterion, outputs, _ = instance
    view = potential_of(criterion)
    assume(outputs.dim() > (view.potential == Softmax()))  # else there is one sample
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


@pytest.mark.parametrize(("loss", "criterion"), [(SquaredLoss, nn.MSELoss), (LogisticLoss, None)])
def test_value_losses_against_torch(loss: type[FenchelYoungLoss], criterion: type | None):
    criterion = criterion or nn.BCEWithLogitsLoss
    unit = 2 if criterion is nn.MSELoss else 1
    outputs = normal((4, 3, 2), torch.Generator().manual_seed(0))
    targets = (outputs.roll(1) > 0).double()
    total = criterion(reduction="sum")(outputs, targets) / unit
    assert_close(loss(reduction="sum")(outputs, targets), total)
    assert_close(loss()(outputs, targets), total / 4)
    assert_close(loss(reduction="none")(outputs, targets).sum(), total)
    assert loss(reduction="none")(outputs, targets).shape == (4,)
    assert loss(reduction="none")(outputs[0, 0, 0], targets[0, 0, 0]).shape == ()
    flat, flat_targets = outputs.flatten(), targets.flatten()
    assert_close(loss()(flat, flat_targets), total / 24)


def test_scale_and_offset_of_the_reductions():
    outputs, targets = torch.zeros(4, 3), torch.full((4, 3), 0.5)
    expected = [
        (nn.MSELoss(), 2 / 3, 0),
        (nn.MSELoss(reduction="sum"), 8, 0),
        (nn.BCEWithLogitsLoss(), 1 / 3, math.log(2)),
        (nn.BCEWithLogitsLoss(reduction="sum"), 4, 12 * math.log(2)),
        (SquaredLoss(), 1, 0),
        (LogisticLoss(reduction="sum"), 4, 0),
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype):
    outputs = torch.tensor([[8.0, 1.0], [0.5, -4.0]], dtype=dtype, requires_grad=True)
    probabilities = torch.tensor([[0.75, 0.25], [0.5, 0.5]], dtype=dtype)
    for criterion in (SoftmaxLoss(), SquaredLoss(), LogisticLoss()):
        loss = criterion(outputs, probabilities)
        assert loss.dtype == torch.float32
        assert_close(loss, criterion(outputs.float(), probabilities.float()))
        assert torch.autograd.grad(loss, outputs)[0].dtype == dtype
        view = potential_of(criterion)
        assert view.points(outputs, probabilities).dtype == torch.float32
        assert view.scale(outputs, probabilities).dtype == torch.float32


def test_recognition_of_subclasses():
    class Renamed(nn.CrossEntropyLoss):
        pass

    class Changed(nn.CrossEntropyLoss):
        def forward(self, input: Tensor, target: Tensor) -> Tensor:
            return 2 * super().forward(input, target)

    assert potential_of(Renamed()).potential == Softmax()
    assert potential_of(FenchelYoungLoss(Logistic())).potential == Logistic()
    patched = nn.CrossEntropyLoss()
    patched.forward = lambda input, target: input.sum()
    for criterion in (Changed(), patched, nn.L1Loss(), nn.functional.mse_loss):
        with pytest.raises(TypeError, match=r"CrossEntropyLoss, MSELoss.*Use one"):
            potential_of(criterion)


@pytest.mark.parametrize("kind", [nn.CrossEntropyLoss, nn.MSELoss, SoftmaxLoss])
def test_unreduced_criteria_are_refused(kind: type[nn.Module]):
    with pytest.raises(ValueError, match=r"reduction='none'.*use reduction='mean' or 'sum'"):
        potential_of(kind(reduction="none"))


def test_negative_weights_are_refused():
    for criterion in (
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, -1.0])),
        nn.BCEWithLogitsLoss(pos_weight=torch.tensor([-1.0])),
    ):
        with pytest.raises(ValueError, match="weight has negative entries"):
            potential_of(criterion)


@pytest.mark.parametrize(
    ("criterion", "targets"),
    [
        (SquaredLoss(), torch.zeros(4)),
        (LogisticLoss(), torch.zeros(4, 1)),
        (SoftmaxLoss(), torch.zeros(4)),
        (SoftmaxLoss(), torch.zeros(4, 3, dtype=torch.long)),
        (SoftmaxLoss(), torch.zeros(4, 2)),
        (nn.MSELoss(), torch.zeros(4)),
        (nn.BCEWithLogitsLoss(), torch.zeros(4, 1)),
        (nn.CrossEntropyLoss(), torch.zeros(3, dtype=torch.long)),
    ],
)
def test_mismatched_targets_are_refused(criterion: nn.Module, targets: Tensor):
    outputs, view = torch.zeros(4, 3), potential_of(criterion)
    calls = [view.scale, view.offset, view.weights, view.points]
    for call in calls + [criterion] * isinstance(criterion, FenchelYoungLoss):
        with pytest.raises(ValueError, match=r"outputs of shape \(4, 3\) with targets of shape"):
            call(outputs, targets)


def test_weights_that_do_not_broadcast_are_refused():
    view = potential_of(nn.BCEWithLogitsLoss(pos_weight=torch.ones(2)))
    with pytest.raises(ValueError, match=r"pos_weight of shape \(2,\) does not broadcast"):
        view.weights(torch.zeros(4, 3), torch.zeros(4, 3))


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"reduction": "average"}, "reduction='average': expected 'none', 'mean' or 'sum'"),
        ({"label_smoothing": 1.5}, r"label_smoothing=1.5: expected a number in \[0, 1\]"),
    ],
)
def test_bad_arguments_are_refused(keywords: dict, message: str):
    with pytest.raises(ValueError, match=message):
        SoftmaxLoss(**keywords)


@pytest.mark.parametrize("keywords", [{"label_smoothing": 0.1}, {"ignore_index": 0}])
def test_class_options_need_a_potential_on_the_simplex(keywords: dict):
    with pytest.raises(ValueError, match=r"Squared\(\) is not on the simplex"):
        FenchelYoungLoss(Squared(), **keywords)


def test_losses_are_ordinary_modules():
    loss = SoftmaxLoss(label_smoothing=0.1, reduction="sum")
    outputs, targets = torch.tensor([[1.0, 2.0]]), torch.tensor([0])
    twin = pickle.loads(pickle.dumps(copy.deepcopy(loss)))
    assert twin(outputs, targets) == loss(outputs, targets)
    assert repr(loss) == "SoftmaxLoss(Softmax(), label_smoothing=0.1, reduction='sum')"
    assert repr(SquaredLoss()) == "SquaredLoss(Squared(), reduction='mean')"
