"""`conjopt.testing.check_regularizer`: ours pass; each planted bug is found by its statement."""

import math

import pytest
import torch
from torch import nn

from conjopt.potentials import Entmax, Logistic, Poisson, Sparsemax, Squared
from conjopt.regularizers import (
    AttainableLoss,
    ConditionalEntropy,
    OutputCodingRate,
    PredictiveEntropy,
    WithinClassScatter,
)
from conjopt.testing import Report, ViolationError, check_regularizer

SCALAR = "the value is a finite scalar"
FINITE = "the gradient is finite"
DERIVATIVE = "the gradient is the derivative of the value"
NARROW = "value and gradient are finite in float32 and bfloat16"
SINGLE = "in float32 the value is that of float64"
ORDER = "the order of samples does not matter"
EQUAL = "equal calls are equal"
UNTOUCHED = "a call does not write to the batch"
EVALUATION = "in evaluation mode a call changes nothing"
RESUME = "exact resume from state_dict"
NO_WEIGHT = "without weight there is no value"
PROPORTIONAL = "the value is proportional to the weight"
SHIFT = "a shift of the outputs changes nothing"
SYMMETRIC = "classes may change their places"
MEAN = "a batch twice over has its value"
SIGN = "the value has its sign"
VERTICES = "probabilities at the vertices are classes"
IGNORED = "ignored samples do not count"
EMPTY = "an empty batch has the value 0"
EVERY = {
    *(value for name, value in list(globals().items()) if name.isupper() and type(value) is str)
}


def only(*names):
    """What to leave out to look at these alone."""
    return EVERY - set(names)


OURS = [
    ConditionalEntropy(),
    OutputCodingRate(),
    WithinClassScatter(),
    AttainableLoss(),
    PredictiveEntropy(),
    PredictiveEntropy(maximize=True),
    AttainableLoss(tau=0),
    AttainableLoss(tau=math.inf, potential=Entmax(1.5)),
    ConditionalEntropy(queue=6),
    OutputCodingRate(lambda calls: 0.1 * (calls + 1), queue=6, potential=Sparsemax()),
    WithinClassScatter(potential=Logistic()),
    ConditionalEntropy(potential=Squared()),
    AttainableLoss(potential=Poisson()),
    PredictiveEntropy(potential=Poisson(), maximize=True),
    WithinClassScatter(potential=nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5]))),
]


@pytest.mark.parametrize("term", OURS, ids=lambda term: type(term).__name__)
def test_ours_hold(term):
    weighs_classes = getattr(term.criterion, "weight", None) is not None
    before = term.state_dict()
    report = check_regularizer(term, k=3 if weighs_classes else None, max_examples=6)
    assert isinstance(report, Report)
    left_out = set()
    if not term.potential.on_simplex:
        left_out |= {SHIFT, VERTICES, IGNORED}
    if isinstance(term, ConditionalEntropy):
        left_out |= {MEAN}
    if isinstance(term, PredictiveEntropy) and term.potential == Poisson():
        left_out |= {SIGN}
    if weighs_classes:
        left_out |= {SYMMETRIC}
    assert set(report.left_out) == left_out
    assert set(report.statements) == EVERY - left_out
    assert term.state_dict().keys() == before.keys()  # the term itself was left alone
    assert len(getattr(term, "queue", None) or []) == 0


# A user's own.


class Margin(nn.Module):
    """The mean squared distance of an output from the largest one of its sample."""

    def __init__(self, weight=0.1):
        super().__init__()
        self.weight = weight

    def forward(self, outputs, targets):
        largest = outputs.amax(1, keepdim=True)
        return self.weight * (largest - outputs).square().sum(1).mean()


def test_a_users_own_holds():
    report = check_regularizer(Margin(), shift="each", mean=True, sign=1, max_examples=10)
    assert set(report.statements) == EVERY - {VERTICES, IGNORED, EMPTY}
    assert report.left_out[EMPTY] == "as empty= is False"
    assert report.left_out[IGNORED] == "as ignore_index= is None"


def test_what_is_not_said_is_not_asked():
    report = check_regularizer(Margin(), leave_out=[EQUAL], max_examples=3)
    assert report.left_out.pop(EQUAL) == "as you said"
    assert set(report.left_out) == {SHIFT, MEAN, SIGN, VERTICES, IGNORED, EMPTY}


# Planted bugs.


class NotAScalar(Margin):
    def forward(self, outputs, targets):
        return self.weight * outputs.square().sum(1)


class LogOfSpread(Margin):
    """Whose gradient is NaN where all outputs of a batch are equal."""

    def forward(self, outputs, targets):
        return self.weight * (outputs - outputs.mean(0)).square().sum(1).sqrt().mean()


class OfTwoClasses(Margin):
    """Whose gradient is NaN on a batch of a single class."""

    def forward(self, outputs, targets):
        first = outputs[targets == targets.min()].mean(0)
        last = outputs[targets == targets.max()].mean(0)
        return self.weight * (first - last).square().sum().sqrt()


class NoOtherClass(Margin):
    """NaN on a batch of a single class."""

    def forward(self, outputs, targets):
        other = outputs[targets != targets[0]]
        return self.weight * (outputs[targets == targets[0]].mean() - other.mean()) ** 2


class Norms(Margin):
    """NaN where all outputs of a sample are zero."""

    def forward(self, outputs, targets):
        unit = outputs / outputs.norm(dim=1, keepdim=True)
        return self.weight * unit.sum(1).square().mean()


class RootOfSquares(Margin):
    """Whose gradient is NaN where all outputs of a sample are zero."""

    def forward(self, outputs, targets):
        return self.weight * outputs.square().sum(1).sqrt().mean()


class LogOfSizes(Margin):
    def forward(self, outputs, targets):
        return self.weight * outputs.abs().log().mean()


class RootOfVariances(Margin):
    """Whose gradient is NaN where the classes of a sample are equal, but for rounding."""

    def forward(self, outputs, targets):
        return self.weight * (outputs - outputs[:, :1]).square().sum(1).sqrt().mean()


class HalfDetached(Margin):
    def forward(self, outputs, targets):
        return super().forward(outputs, targets) + (outputs.detach() * outputs).mean()


class Overflows(Margin):
    """Outputs of 1e6 are beyond exp in any precision; a softmax would not be."""

    def forward(self, outputs, targets):
        return self.weight * outputs.exp().sum(1).log().mean()


class EighthPower(Margin):
    """Of outputs of 1e6 it is 1e48, more than float32 holds."""

    def forward(self, outputs, targets):
        return self.weight * outputs.pow(8).mean()


class OrderOfSamples(PredictiveEntropy):
    def _value(self, batch):
        rows = batch.rows * torch.linspace(1, 1.001, len(batch.rows)).unsqueeze(1)
        return super()._value(batch.with_rows(rows))


class Noisy(Margin):
    def forward(self, outputs, targets):
        return super().forward(outputs + 1e-9 * torch.randn_like(outputs), targets)


class InPlace(Margin):
    @staticmethod
    def centre(outputs):
        with torch.no_grad():
            outputs -= outputs.mean(1, keepdim=True)

    def forward(self, outputs, targets):
        self.centre(outputs)
        return super().forward(outputs, targets)


class TargetsInPlace(Margin):
    def forward(self, outputs, targets):
        targets.clamp_(max=0)
        return super().forward(outputs, targets)


class RunningMean(Margin):
    """A mean of past outputs that evaluation changes, too."""

    def __init__(self, weight=0.1):
        super().__init__(weight)
        self.register_buffer("past", torch.zeros(()))

    def forward(self, outputs, targets):
        past = self.past
        self.past = 0.9 * past + 0.1 * outputs.detach().mean().to(past)
        return self.weight * (outputs.mean() - past).square()


class QueueNotSaved(ConditionalEntropy):
    def state_dict(self, *args, **options):
        state = super().state_dict(*args, **options)
        return {name: v for name, v in state.items() if not name.startswith("queue")}

    def load_state_dict(self, state, strict=True, assign=False):
        return super().load_state_dict(state, strict=False)


class CallsNotSaved(PredictiveEntropy):
    def get_extra_state(self):
        return {"calls": 0}


class NotWeighed(Margin):
    def forward(self, outputs, targets):
        return super().forward(outputs, targets) + 0.01 * outputs.mean().square()


class WeightSquared(Margin):
    def forward(self, outputs, targets):
        return self.weight * super().forward(outputs, targets)


class SquaredOutputs(AttainableLoss):
    """The size of logits, which a shift changes."""

    def _value(self, batch):
        return super()._value(batch) + 1e-3 * batch.mean(batch.rows.square().sum(1))


class OfTheFirstClass(PredictiveEntropy):
    def _value(self, batch):
        return super()._value(batch) + batch.mean(batch.rows.softmax(1)[:, 0])


class SumOfSamples(WithinClassScatter):
    def _value(self, batch):
        return super()._value(batch) * (batch.mass > 0).sum()


class Unbiased(WithinClassScatter):
    """Over the samples less one."""

    def _value(self, batch):
        count = (batch.mass > 0).sum()
        return super()._value(batch) * count / (count - 1).clamp(min=1)


class LessTheMean(AttainableLoss):
    def _value(self, batch):
        return super()._value(batch) - 1.0


class OnlyOfTheLargest(WithinClassScatter):
    """Probabilities are read as if all were less than certain."""

    def _of_shares(self, rows, shares):
        return 0.9 * super()._of_shares(rows, shares)


class CountsIgnored(PredictiveEntropy):
    def _value(self, batch):
        return super()._value(batch) * (batch.mass > 0).double().mean()


class NeedsASample(PredictiveEntropy):
    def forward(self, outputs, targets):
        return super().forward(outputs, targets) + 0 * outputs.max()


PLANTED = {
    NoOtherClass: SCALAR,
    LogOfSpread: FINITE,
    OfTwoClasses: FINITE,
    Norms: SCALAR,
    RootOfSquares: FINITE,
    LogOfSizes: SCALAR,
    RootOfVariances: FINITE,
    HalfDetached: DERIVATIVE,
    Overflows: SCALAR,
    EighthPower: NARROW,
    OrderOfSamples: ORDER,
    Noisy: EQUAL,
    InPlace: UNTOUCHED,
    TargetsInPlace: UNTOUCHED,
    RunningMean: EVALUATION,
    QueueNotSaved: RESUME,
    CallsNotSaved: RESUME,
    NotWeighed: NO_WEIGHT,
    WeightSquared: PROPORTIONAL,
    SquaredOutputs: SHIFT,
    OfTheFirstClass: SYMMETRIC,
    SumOfSamples: MEAN,
    Unbiased: MEAN,
    LessTheMean: SIGN,
    OnlyOfTheLargest: VERTICES,
    CountsIgnored: IGNORED,
    NeedsASample: EMPTY,
}
OPTIONS = {
    QueueNotSaved: {"queue": 6},
    CallsNotSaved: {"weight": lambda calls: 0.1 * (calls + 1)},
}


@pytest.mark.parametrize("kind", PLANTED, ids=lambda kind: kind.__name__)
def test_planted_bugs_are_found(kind):
    with pytest.raises(ViolationError) as error:
        check_regularizer(
            kind(**OPTIONS.get(kind, {})), leave_out=only(PLANTED[kind]), max_examples=20
        )
    violations = {v.statement: v for v in error.value.violations}
    assert PLANTED[kind] in violations
    found = violations[PLANTED[kind]]
    assert found.left != found.right
    assert set(found.example) == {"kind", "samples", "outputs", "seed"}
    assert str(found) in str(error.value)


DEGENERATE = {
    Norms: {"zero"},
    RootOfSquares: {"zero"},
    LogOfSizes: {"zero"},
    RootOfVariances: {"zero", "equal classes"},
}


@pytest.mark.parametrize("kind", DEGENERATE, ids=lambda kind: kind.__name__)
def test_no_kind_of_batch_is_missed(kind):
    """One of each kind is looked at, however few are drawn."""
    with pytest.raises(ViolationError) as error:
        check_regularizer(kind(), leave_out=only(PLANTED[kind]), max_examples=1)
    (found,) = error.value.violations
    assert found.example["kind"] in DEGENERATE[kind]


def test_a_wrong_precision_is_found():
    class Rounded(Margin):
        def forward(self, outputs, targets):
            width = 0.9 if outputs.dtype == torch.float32 else 1.0
            return width * super().forward(outputs, targets)

    with pytest.raises(ViolationError) as error:
        check_regularizer(Rounded(), max_examples=3)
    assert [v.statement for v in error.value.violations] == [SINGLE]


def test_switches_that_promise_too_much_are_found():
    with pytest.raises(ViolationError) as error:
        check_regularizer(
            ConditionalEntropy(), mean=True, shift="each", leave_out=only(MEAN, SHIFT, ORDER)
        )
    assert {v.statement for v in error.value.violations} == {MEAN, SHIFT}
    with pytest.raises(ViolationError) as error:
        check_regularizer(Margin(), sign=-1, soft_targets=True, empty=True, max_examples=5)
    assert {v.statement for v in error.value.violations} == {SIGN, EMPTY}


def test_the_counterexample_is_the_simplest():
    class Opposite(Margin):
        def forward(self, outputs, targets):
            return -1.0 - super().forward(outputs, targets)

    with pytest.raises(ViolationError) as error:
        check_regularizer(Opposite(), sign=1, leave_out=only(SIGN))
    (found,) = error.value.violations
    assert found.example == {"kind": "random", "samples": 1, "outputs": 2, "seed": 0}


def test_one_that_differs_from_call_to_call():
    """Where hypothesis cannot reproduce what it found, that is said."""

    class Counting(Margin):
        calls = [0]  # noqa: RUF012

        def forward(self, outputs, targets):
            self.calls[0] += 1
            value = super().forward(outputs, targets)
            return value if self.calls[0] % 7 else value * torch.nan

    with pytest.raises(ViolationError) as error:
        check_regularizer(Counting(), leave_out=only(EQUAL))
    assert EQUAL in {v.statement for v in error.value.violations}


def test_it_leaves_random_numbers_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    check_regularizer(Margin(), max_examples=2)
    assert torch.equal(torch.rand(3), expected)


# Bad input.


class WithPart(Margin):
    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, outputs, targets):
        return super().forward(self.part(outputs), targets)


@pytest.mark.parametrize("part", [nn.Dropout(0.1), nn.BatchNorm1d(3), nn.AlphaDropout(0.1)])
def test_random_and_coupling_parts_are_refused_in_training_mode(part):
    term = WithPart(part)
    with pytest.raises(ValueError, match=r"part is a .* in training mode.*call \.eval\(\) on it"):
        check_regularizer(term)
    part.eval()
    check_regularizer(term, k=3, symmetric=False, max_examples=2)


def test_bad_input():
    with pytest.raises(TypeError, match=r"got Margin, expected a torch\.nn\.Module"):
        check_regularizer(Margin)
    with pytest.raises(TypeError, match=r"got <lambda>, expected .* put a function into the for"):
        check_regularizer(lambda outputs, targets: outputs.sum())
    with pytest.raises(TypeError, match="got a str as potential=, expected a conjopt"):
        check_regularizer(Margin(), potential="softmax")
    with pytest.raises(ValueError, match="shift='none', expected 'each', 'all' or None"):
        check_regularizer(Margin(), shift="none")
    with pytest.raises(ValueError, match="sign=2, expected 1, -1 or None"):
        check_regularizer(Margin(), sign=2)
    with pytest.raises(ValueError, match=r"leave_out=.'all'., expected a collection of names out"):
        check_regularizer(Margin(), leave_out=["all"])
    with pytest.raises(ValueError, match="k=1, expected a whole number of at least 2 outputs"):
        check_regularizer(Margin(), k=1)
    with pytest.raises(TypeError, match=r"k=2\.5, expected a whole number of at least 2 outputs"):
        check_regularizer(Margin(), k=2.5)
    with pytest.raises(ValueError, match="max_examples=0, expected a whole number of at least 1"):
        check_regularizer(Margin(), max_examples=0)
    with pytest.raises(TypeError, match="max_examples=True, expected a whole number"):
        check_regularizer(Margin(), max_examples=True)


class OneArgument(Margin):
    def forward(self, outputs):
        return self.weight * outputs.square().mean()


class AFloat(Margin):
    def forward(self, outputs, targets):
        return super().forward(outputs, targets).item()


class OfThree(Margin):
    def forward(self, outputs, targets):
        return self.weight * (outputs * torch.arange(3.0)).square().mean()


class NotCopied(Margin):
    def __init__(self):
        super().__init__()
        self.past = torch.zeros(2, requires_grad=True) * 2


class NoBackward(Margin):
    def forward(self, outputs, targets):
        root = outputs.exp()
        value = root.square().mean()
        root.zero_()
        return value


def test_a_queue_of_other_batches_is_no_matter():
    term = ConditionalEntropy(queue=6)
    term(torch.randn(4, 7), torch.tensor([0, 1, 5, 6]))
    before = {name: str(value) for name, value in term.state_dict().items()}
    check_regularizer(term, max_examples=1)
    assert {name: str(value) for name, value in term.state_dict().items()} == before


def test_a_term_that_fails_a_plain_call_is_one_error():
    with pytest.raises(TypeError, match=r"OneArgument\.forward cannot .*; take targets also"):
        check_regularizer(OneArgument())
    with pytest.raises(
        ValueError, match=r"shape \(4,\), expected a scalar tensor of shape \(\); t"
    ):
        check_regularizer(NotAScalar())
    with pytest.raises(TypeError, match=r"a float, expected a scalar .*without \.item\(\)"):
        check_regularizer(AFloat())
    with pytest.raises(
        RuntimeError, match=r"outputs \(4, 2\) and targets \(4,\).* raised .*say k="
    ):
        check_regularizer(OfThree())
    check_regularizer(OfThree(), k=3, symmetric=False, max_examples=1)
    with pytest.raises(
        RuntimeError, match=r"NotCopied: copy\.deepcopy of it raised Runtime"
    ) as error:
        check_regularizer(NotCopied())
    assert isinstance(error.value.__cause__, RuntimeError)
    with pytest.raises(RuntimeError, match=r"NoBackward: the backward pass after a call .* raised"):
        check_regularizer(NoBackward())


def test_a_loss_of_numbers_is_told_to_say_its_potential():
    with pytest.raises(RuntimeError, match=r"class indices unless .*such as potential=Squared\(\)"):
        check_regularizer(nn.MSELoss())
    check_regularizer(nn.MSELoss(), potential=Squared(), max_examples=2)
    with pytest.raises(RuntimeError, match=r"targets are those of potential=Squared\(\)"):
        check_regularizer(nn.CrossEntropyLoss(weight=torch.ones(7)), potential=Squared())


def test_sides_tell_what_was_found():
    found = {}
    for kind, name in (
        (LogOfSizes, SCALAR),
        (Norms, EQUAL),
        (Norms, ORDER),
        (RootOfSquares, FINITE),
        (EighthPower, NARROW),
    ):
        with pytest.raises(ViolationError) as error:
            check_regularizer(kind(), leave_out=only(name), max_examples=1)
        (violation,) = error.value.violations
        found[name] = violation.left, violation.right
    assert found == {
        SCALAR: ("the value is -inf", "finite numbers"),
        EQUAL: ("nan against nan", "finite numbers to compare"),
        ORDER: ("nan against nan", "finite numbers to compare"),
        FINITE: ("4 of 4 entries of the gradient are like nan", "finite numbers"),
        NARROW: ("the value in torch.float32 is inf", "finite numbers"),
    }
