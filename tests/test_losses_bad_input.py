"""Bad arguments, outputs and targets of losses: refused in words that help, where they are seen."""

import re
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from conjopt.losses import (
    EntmaxLoss,
    FenchelYoungLoss,
    LogisticLoss,
    PoissonLoss,
    SoftmaxLoss,
    SparsemaxLoss,
    SquaredLoss,
    potential_of,
)
from conjopt.potentials import Logistic, Poisson, Potential, Softmax, Squared

CLASS_LOSSES = [SoftmaxLoss, SparsemaxLoss, EntmaxLoss, partial(EntmaxLoss, 1.25)]
NAN, INF = float("nan"), float("inf")
SIMPLEX = r"expected probabilities that sum to 1 over the classes, the domain of \w+\("


class Quartic(Potential):
    """A user's potential, neither on the simplex nor declared separable."""

    def value(self, y: Tensor) -> Tensor:
        return 0.75 * y.abs().pow(4 / 3).sum(-1)

    def conjugate(self, f: Tensor) -> Tensor:
        return 0.25 * f.pow(4).sum(-1)


def refused(
    loss: nn.Module, targets: Tensor, error: type[Exception], match: str, outputs: Tensor = None
) -> None:
    """Check that a call raises, and leaves its arguments and the gradients alone."""
    outputs = torch.zeros(4, 3, requires_grad=True) if outputs is None else outputs
    before = outputs.detach().clone(), targets.clone()
    with pytest.raises(error, match=match):
        loss(outputs, targets)
    assert torch.equal(outputs, before[0])
    assert torch.equal(targets.nan_to_num(), before[1].nan_to_num())
    assert outputs.grad is None


# At construction.


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"reduction": "average"}, "reduction='average': expected 'none', 'mean' or 'sum'"),
        ({"reduction": None}, "reduction=None: expected 'none', 'mean' or 'sum'"),
        ({"label_smoothing": 1.5}, r"label_smoothing=1.5: expected a number in \[0, 1\]"),
        ({"label_smoothing": -0.1}, r"label_smoothing=-0.1: expected a number in \[0, 1\]"),
        ({"label_smoothing": NAN}, r"label_smoothing=nan: expected a number in \[0, 1\]"),
        ({"weight": torch.ones(3, 1)}, r"weight has shape \(3, 1\): expected one weight for each"),
        ({"weight": torch.tensor(1.0)}, r"weight has shape \(\): expected one weight for each"),
    ],
)
@pytest.mark.parametrize("kind", CLASS_LOSSES)
def test_bad_arguments_are_refused(kind: Callable, keywords: dict, message: str):
    with pytest.raises(ValueError, match=message):
        kind(**keywords)


@pytest.mark.parametrize(
    "weight",
    [
        torch.tensor([1.0, -1.0]),
        torch.tensor([1.0, NAN]),
        torch.tensor([1.0, INF]),
        torch.tensor([1, 1]),
        torch.tensor([True, False]),
    ],
)
@pytest.mark.parametrize("kind", [*CLASS_LOSSES, SquaredLoss, LogisticLoss, PoissonLoss])
def test_bad_weights_are_refused(kind: Callable, weight: Tensor):
    with pytest.raises(ValueError, match=r"weight=tensor.*finite floating-point numbers that are"):
        kind(weight=weight)


@pytest.mark.parametrize("order", [1, 0.5, 2.1, -1.0, NAN, INF])
def test_orders_outside_of_the_range_are_refused(order: float):
    with pytest.raises(ValueError, match=rf"order={order}: expected a number in \(1, 2\]"):
        EntmaxLoss(order)


@pytest.mark.parametrize("keywords", [{"label_smoothing": 0.1}, {"ignore_index": 0}])
@pytest.mark.parametrize("potential", [Squared(), Logistic(), Poisson(), Quartic()])
def test_class_options_need_a_potential_on_the_simplex(potential: Potential, keywords: dict):
    with pytest.raises(ValueError, match=r"\w+\(\) is not on the simplex: leave them out"):
        FenchelYoungLoss(potential, **keywords)
    with pytest.raises(TypeError):
        SquaredLoss(**keywords)


def test_weights_need_classes_or_coordinates_that_add_up():
    message = r"weight is given, but Quartic\(\) has no classes.*use reduction='none'"
    with pytest.raises(ValueError, match=message):
        FenchelYoungLoss(Quartic(), weight=torch.ones(3))
    loss, outputs, targets = FenchelYoungLoss(Quartic()), torch.ones(4, 3), torch.ones(4, 3)
    assert loss(outputs, targets) == 0
    refused(loss, NAN * targets, ValueError, r"Got the target \[nan, .*domain of Quartic")


# At a call.


@pytest.mark.parametrize("kind", CLASS_LOSSES)
@pytest.mark.parametrize("index", [3, 255, -1, -100])
@pytest.mark.parametrize("ignore_index", [-100, 1, 7])
def test_class_indices_out_of_range_are_refused(kind: Callable, index: int, ignore_index: int):
    targets = torch.tensor([0, 1, index, ignore_index])
    for keywords in ({}, {"label_smoothing": 0.1}, {"weight": torch.ones(3)}):
        loss = kind(ignore_index=ignore_index, **keywords)
        if index == ignore_index:
            assert loss(torch.zeros(4, 3), targets).isfinite()
            continue
        message = rf"class index {index} at .*: expected one in \[0, 3\).*={ignore_index}\."
        refused(loss, targets, IndexError, message)
        refused(loss, targets[2], IndexError, message, torch.zeros(3))
        images = torch.zeros(1, 3, 2, 2)
        refused(loss, targets.reshape(1, 2, 2), IndexError, message, images)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32])
def test_class_indices_of_every_integer_type(dtype: torch.dtype):
    outputs, targets = torch.eye(3), torch.tensor([0, 2, 1])
    for kind in CLASS_LOSSES:
        assert kind()(outputs, targets.to(dtype)) == kind()(outputs, targets)
        refused(kind(), (targets + 1).to(dtype), IndexError, "class index 3", outputs)


@pytest.mark.parametrize("kind", CLASS_LOSSES)
@pytest.mark.parametrize(
    "target",
    [[0.5, 0.5, 0.5], [0.2, 0.2, 0.2], [1.5, -0.5, 0.0], [NAN, 0.5, 0.5], [INF, 0.0, 0.0]],
)
def test_targets_that_are_no_probabilities_are_refused(kind: Callable, target: list[float]):
    targets = torch.tensor([[1.0, 0.0, 0.0]] * 3 + [target])
    message = r"Got the target \[.*" + SIMPLEX
    for keywords in ({}, {"label_smoothing": 0.1}, {"weight": torch.ones(3)}):
        refused(kind(**keywords), targets, ValueError, message)
    refused(kind(), targets[3], ValueError, message, torch.zeros(3))
    images = targets.t().reshape(1, 3, 2, 2)  # classes are dimension 1
    refused(kind(), images, ValueError, message, torch.zeros(1, 3, 2, 2))


def test_probabilities_may_be_rounded():
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        targets = torch.rand(100, 1000).softmax(-1).to(dtype)
        loss = SoftmaxLoss()(torch.zeros(100, 1000, dtype=dtype), targets)
        assert loss.isfinite()


@pytest.mark.parametrize(
    ("kind", "bad"),
    [
        (PoissonLoss, [-1.0, NAN, INF]),
        (LogisticLoss, [-0.1, 1.1, NAN, INF]),
        (SquaredLoss, [NAN, INF, -INF]),
    ],
)
def test_values_outside_of_the_domain_are_refused(kind: Callable, bad: list[float]):
    for value in bad:
        for weight in (None, torch.ones(3)):
            targets = torch.ones(4, 3)
            targets[2, 1] = value
            domain = re.escape(kind().potential.domain)
            message = rf"Got the target \[.*{value:g}.*\], row [27]: expected {domain}, the domain"
            refused(kind(weight=weight), targets, ValueError, message)
    if kind is not SquaredLoss:
        for integer in (-1, 2) if kind is LogisticLoss else (-1,):
            targets = torch.full((4, 3), integer)
            refused(kind(), targets, ValueError, f"Got the target .*{integer}")


@pytest.mark.parametrize(
    ("criterion", "targets"),
    [
        (SquaredLoss(), torch.zeros(4)),
        (LogisticLoss(), torch.zeros(4, 1)),
        (PoissonLoss(), torch.zeros(3, dtype=torch.long)),
        *((kind(), torch.zeros(4)) for kind in CLASS_LOSSES),
        *((kind(), torch.zeros(4, 3, dtype=torch.long)) for kind in CLASS_LOSSES),
        *((kind(), torch.zeros(3, dtype=torch.long)) for kind in CLASS_LOSSES),
        *((kind(), torch.zeros(4, 2)) for kind in CLASS_LOSSES),
        (nn.MSELoss(), torch.zeros(4)),
        (nn.BCEWithLogitsLoss(), torch.zeros(4, 1)),
        (nn.PoissonNLLLoss(), torch.zeros(4, 1)),
        (nn.CrossEntropyLoss(), torch.zeros(3, dtype=torch.long)),
    ],
    ids=str,
)
def test_mismatched_targets_are_refused(criterion: nn.Module, targets: Tensor):
    outputs, view = torch.zeros(4, 3), potential_of(criterion)
    calls = [view.scale, view.offset, view.weights, view.points]
    for call in calls + [criterion] * isinstance(criterion, FenchelYoungLoss):
        with pytest.raises(ValueError, match=r"outputs of shape \(4, 3\) with targets of shape"):
            call(outputs, targets)


def test_outputs_without_classes_are_refused():
    for targets in (torch.tensor(0), torch.tensor(1.0)):
        refused(SoftmaxLoss(), targets, ValueError, r"outputs of shape \(\)", torch.tensor(0.5))


@pytest.mark.parametrize("kind", [*CLASS_LOSSES, SquaredLoss, LogisticLoss, PoissonLoss])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_outputs_that_are_no_numbers_of_a_model_are_refused(kind: Callable, dtype: torch.dtype):
    message = rf"outputs of type {dtype}.*the outputs come first and the targets second"
    for targets in (torch.zeros(4, dtype=torch.long), torch.zeros(4, 3)):
        refused(kind(), targets, ValueError, message, torch.zeros(4, 3, dtype=dtype))


@pytest.mark.parametrize("kind", CLASS_LOSSES)
def test_weights_of_other_classes_are_refused(kind: Callable):
    message = r"weight has shape \(2,\): expected one weight for each of the 3 classes"
    for targets in (torch.zeros(4, dtype=torch.long), torch.full((4, 3), 1 / 3)):
        refused(kind(weight=torch.ones(2)), targets, ValueError, message)


def test_weights_that_do_not_broadcast_are_refused():
    message = r"weight of shape \(2,\) does not broadcast to outputs of shape \(4, 3\)"
    for kind in (SquaredLoss, LogisticLoss, PoissonLoss):
        refused(kind(weight=torch.ones(2)), torch.zeros(4, 3), ValueError, message)
    refused(SquaredLoss(weight=torch.ones(2, 4, 3)), torch.zeros(4, 3), ValueError, "broadcast")
    view = potential_of(nn.BCEWithLogitsLoss(pos_weight=torch.ones(2)))
    with pytest.raises(ValueError, match=r"pos_weight of shape \(2,\) does not broadcast"):
        view.weights(torch.zeros(4, 3), torch.zeros(4, 3))


@pytest.mark.parametrize("kind", [*CLASS_LOSSES, SquaredLoss, LogisticLoss, PoissonLoss])
def test_nan_outputs_give_nan_losses(kind: Callable):
    outputs = torch.zeros(4, 3)
    outputs[1, 2] = NAN
    hard, soft = torch.tensor([0, 1, 2, 0]), torch.eye(3)[[0, 1, 2, 0]]
    for weight in (None, torch.ones(3)):
        for targets in [soft, hard] if kind in CLASS_LOSSES else [soft]:
            terms = kind(weight=weight, reduction="none")(outputs, targets)
            assert terms.isnan().tolist() == [False, True, False, False]
            assert kind(weight=weight)(outputs, targets).isnan()
    if kind in CLASS_LOSSES:  # tokens that do not count have no value, whatever their outputs
        assert kind()(outputs, torch.tensor([0, -100, 2, 0])).isfinite()


# What cannot be seen without waiting for a device is not looked at.


@pytest.mark.parametrize("kind", [*CLASS_LOSSES, SquaredLoss, LogisticLoss, PoissonLoss])
def test_other_devices_and_transforms_are_not_asked(kind: Callable):
    outputs, targets = torch.zeros(4, 3), torch.full((4, 3), -2.0)
    assert kind()(outputs.to("meta"), targets.to("meta")).shape == ()
    torch.func.vmap(kind())(outputs, targets)
    torch.func.vmap(lambda y: kind()(outputs[0], y))(targets)
    with pytest.raises(RuntimeError, match=r"meta.*cpu|cpu.*meta"):
        kind()(outputs, targets.to("meta"))


# Criteria that have no reading.


@pytest.mark.parametrize(
    "kind", [nn.CrossEntropyLoss, nn.MSELoss, nn.PoissonNLLLoss, SoftmaxLoss, PoissonLoss]
)
def test_unreduced_criteria_are_refused(kind: type[nn.Module]):
    with pytest.raises(ValueError, match=r"reduction='none'.*use reduction='mean' or 'sum'"):
        potential_of(kind(reduction="none"))


def test_rates_are_no_natural_parameters():
    with pytest.raises(ValueError, match=r"PoissonNLLLoss\(\).*logarithms, and use log_input=True"):
        potential_of(nn.PoissonNLLLoss(log_input=False))
    assert potential_of(nn.PoissonNLLLoss()).potential == Poisson()


def test_negative_weights_are_refused():
    changed = SoftmaxLoss(weight=torch.ones(2))
    changed.weight[0] = -1
    for criterion in (
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, -1.0])),
        nn.BCEWithLogitsLoss(pos_weight=torch.tensor([-1.0])),
        nn.BCEWithLogitsLoss(weight=torch.tensor([-1.0])),
        changed,
    ):
        with pytest.raises(ValueError, match="weight has negative entries"):
            potential_of(criterion)


def test_recognition_of_subclasses():
    class Renamed(nn.CrossEntropyLoss):
        pass

    class Changed(nn.CrossEntropyLoss):
        def forward(self, input: Tensor, target: Tensor) -> Tensor:
            return 2 * super().forward(input, target)

    class Ours(SoftmaxLoss):
        def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return 2 * super().forward(outputs, targets)

    assert potential_of(Renamed()).potential == Softmax()
    assert potential_of(FenchelYoungLoss(Logistic())).potential == Logistic()
    patched = nn.CrossEntropyLoss()
    patched.forward = lambda input, target: input.sum()
    for criterion in (Changed(), Ours(), patched, nn.L1Loss(), nn.functional.mse_loss):
        with pytest.raises(TypeError, match=r"CrossEntropyLoss, MSELoss.*Use one"):
            potential_of(criterion)


def test_wrong_types_are_refused():
    for potential in (Softmax, "softmax"):
        with pytest.raises(TypeError, match="expected an instance of a Potential"):
            FenchelYoungLoss(potential)
    with pytest.raises(TypeError, match="expected a tensor"):
        SoftmaxLoss(weight=[1.0, 2.0])
    with pytest.raises(TypeError, match="targets of type list: expected tensors"):
        SoftmaxLoss()(torch.zeros(2, 3), [0, 1])


def test_an_ignored_class_of_probability_targets_is_refused():
    targets = torch.full((2, 3), 1 / 3)
    refused(
        SoftmaxLoss(ignore_index=1), targets, ValueError, "probability targets", targets.clone()
    )


def test_unsigned_labels_do_not_wrap_around():
    outputs = torch.randn(4, 200)
    targets = torch.tensor([156, 3, 156, 199], dtype=torch.uint8)  # -100 is 156 modulo 256
    assert SoftmaxLoss()(outputs, targets) == SoftmaxLoss()(outputs, targets.long())
    refused(SoftmaxLoss(), targets, IndexError, "class index 156 at targets", outputs[:, :100])
    signed = torch.tensor([-1, 0, 1, 2], dtype=torch.int8)
    refused(SoftmaxLoss(ignore_index=255), signed, IndexError, "class index -1", outputs)


@pytest.mark.parametrize(
    ("targets", "advice"),
    [
        (torch.zeros(4, 1, dtype=torch.long), "squeeze"),
        (torch.zeros(4, 3, dtype=torch.long), "targets.float"),
        (torch.zeros(4), "targets.long"),
    ],
)
def test_the_advice_fits_the_shape(targets: Tensor, advice: str):
    refused(SoftmaxLoss(), targets, ValueError, advice)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint16, torch.uint32, torch.uint64])
def test_class_targets_that_torch_does_not_compute_with_are_refused(dtype: torch.dtype):
    refused(SoftmaxLoss(), torch.zeros(4, dtype=dtype), ValueError, "use targets.long")


def test_potentials_of_the_wrong_shape_are_refused():
    class Unsummed(Potential):
        def value(self, y: Tensor) -> Tensor:
            return y.square() / 2

        def conjugate(self, f: Tensor) -> Tensor:
            return f.square() / 2

    class Scalar(Unsummed):
        def value(self, y: Tensor) -> Tensor:
            return y.square().sum() / 2

        def conjugate(self, f: Tensor) -> Tensor:
            return f.square().sum() / 2

    class Naive(Potential):
        on_simplex = True

        def value(self, y: Tensor) -> Tensor:
            return (y * y.log()).sum(-1)

        def conjugate(self, f: Tensor) -> Tensor:
            return f.logsumexp(-1)

    for potential in (Unsummed(), Scalar()):
        for k in (1, 4):
            with pytest.raises(ValueError, match="a sum over the last dimension"):
                FenchelYoungLoss(potential)(torch.zeros(4, k), torch.zeros(4, k))
    with pytest.raises(ValueError, match="on the boundary of the simplex"):
        FenchelYoungLoss(Naive())


@pytest.mark.parametrize("keywords", [{"ignore_index": None}, {"label_smoothing": None}])
def test_options_of_wrong_types_are_refused(keywords: dict):
    with pytest.raises(TypeError, match="expected a number and an integer"):
        SoftmaxLoss(**keywords)
