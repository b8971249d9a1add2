"""`check_model` of `conjopt.testing`: good models pass, every planted bug is found and named."""

import copy
import dataclasses
import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from conjopt import bounds, losses, measure
from conjopt.measure.layers import Dense, Outer, rules
from conjopt.optim import step_size
from conjopt.potentials import LossBounds, Softmax
from conjopt.testing import Network, ViolationError, check_model
from conjopt.testing.models import _copies

COUPLING = "a sample's outputs do not depend on the others"
CRITERION = "section 0: the criterion is a sum of Fenchel-Young losses"
RESIDUAL = "section 0: the gradient in the outputs is the weighted residual"
IN_ENERGY = "accounting: every trainable parameter is in the gradient energy"
IN_STRUCTURE = "accounting: every trainable parameter is in the structure matrix"
NORMS = "autograd: the norms of the per-sample gradients"
ENERGY = "autograd: the gradient energy"
STRUCTURE = "autograd: the structure matrices"
ON_V = "autograd: the extreme eigenvalues on V"
BATCH_STRUCTURE = "autograd: the batch structure matrix"
CURVATURE = "autograd: the curvature along a direction"
TOP_CURVATURE = "autograd: the greatest curvature"
DERIVATIVE = "differences: the gradient is the derivative of the criterion"
NOISE = "autograd: the gradient noise"
BITS = "the probe leaves .grad the same to the bit"
PROBE = "autograd: the norms by the probe"
UNTOUCHED = "measuring leaves the model as it is"
THM_2_1 = "Thm 2.1: the gradient is between the eigenvalues times the residual"
THM_2_2 = "Thm 2.2: the losses are within the bounds by their residuals"
THM_2_3 = "Thm 2.3: the losses are within the sandwich"
MEANS = "Thm 2.3: the means bound the risk"
MADE_OF = "Thm 2.3: the sandwich is made of autograd's numbers"
THM_2_4 = "Thm 2.4: the gradient of the batch is within its bounds"
THM_2_5 = "Thm 2.5: the last layer is below the structure matrix"
THM_2_6 = "Thm 2.6: the curvature is at most beta times the structure matrix"
TRUST_REGION = "Thm 3.6: no step of the trust region does more"
EIGENVALUE_FORM = "Thm 3.6: no step of the eigenvalue form does more"

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(5, 3, generator=GENERATOR)
IMAGES = torch.randn(4, 2, 4, 3, generator=GENERATOR)
TOKENS = torch.randint(3, (4, 3), generator=GENERATOR)
Y = torch.tensor([0, 2, 1, 0, 1])
VALUES = torch.randn(5, 3, generator=GENERATOR)


class Doubly(nn.Module):
    """One weight that a linear layer and a product use, the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3, generator=GENERATOR))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(F.linear(x, self.weight)) @ self.weight


def perceptron() -> nn.Module:
    return Network("mlp", k=3, width=3, activation="Tanh")


GOOD = {
    "perceptron": (perceptron, nn.CrossEntropyLoss(), X, Y),
    "perceptron, weights": (
        perceptron,
        nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 0.5]), ignore_index=2, label_smoothing=0.1),
        X,
        Y,
    ),
    "perceptron, a sum of squares": (perceptron, nn.MSELoss(reduction="sum"), X, VALUES),
    "residual, sparse": (
        lambda: Network("residual", k=3, width=2, activation="GELU", norm="layer"),
        losses.EntmaxLoss(1.5),
        X,
        Y,
    ),
    "convolution": (
        lambda: Network(
            "convolution", k=2, width=2, groups=2, stride=2, padding=1, activation="ReLU"
        ),
        nn.BCEWithLogitsLoss(),
        IMAGES,
        (VALUES[:4, :2] > 0).float(),
    ),
    "batch norm in eval mode": (
        lambda: Network("convolution", k=1, width=2, norm="batch"),
        losses.SquaredLoss(),
        IMAGES,
        VALUES[:4, :1],
    ),
    "embedding": (
        lambda: Network("embedding", k=3, width=2, activation="Tanh"),
        nn.PoissonNLLLoss(),
        TOKENS,
        VALUES[:4].exp().floor(),
    ),
    "tokens": (
        lambda: Network("tokens", k=3, width=2, activation="Tanh"),
        nn.CrossEntropyLoss(ignore_index=2),
        TOKENS,
        TOKENS,
    ),
    "tied": (lambda: Network("tied", k=3, width=2), nn.CrossEntropyLoss(), TOKENS, Y[:4]),
    "used both ways": (Doubly, losses.LogisticLoss(), X, VALUES.sigmoid()),
    "reused": (lambda: Network("reused", k=3, width=2, depth=2), nn.CrossEntropyLoss(), X, Y),
}


@pytest.mark.parametrize("name", GOOD)
def test_good_models_pass(name: str):
    make, loss, x, y = GOOD[name]
    report = check_model(make(), loss, x, y, max_examples=4)
    assert len(report.statements) + len(report.left_out) == 27
    assert THM_2_1 in report.statements
    assert (TRUST_REGION in report.left_out) == isinstance(loss, nn.PoissonNLLLoss)
    assert (THM_2_3 in report.left_out) == (name == "tokens")
    assert (THM_2_5 in report.left_out) == (name in ("tied", "used both ways"))


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_other_types(dtype: torch.dtype | None):
    report = check_model(
        perceptron().float(), nn.CrossEntropyLoss(), X, Y, dtype=dtype, max_examples=5
    )
    assert len(report.statements) == 26
    assert "need float64, and there is torch.float32" in report.left_out[DERIVATIVE]


def test_inputs_by_name_and_a_batch_of_one():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, a: Tensor, b: Tensor, times: float = 1.0) -> Tensor:
            return self.layer(times * a * b)

    inputs = {"a": X[:1], "b": X[:1] + 1, "times": 2.0}
    report = check_model(Two(), nn.MSELoss(), inputs, VALUES[:1, :2], max_examples=3)
    assert "noise needs two" in report.left_out[NOISE]
    assert len(report.statements) == 26
    report = check_model(Two(), nn.MSELoss(), (X, X), VALUES[:, :2], max_examples=3)
    assert len(report.statements) == 27


# Planted bugs. Each takes pytest's monkeypatch, and gives a model, a loss and a batch.

Case = tuple[nn.Module, nn.Module, Tensor, Tensor]
PLANTED: dict[str, tuple[Callable[[pytest.MonkeyPatch], Case], set[str], set[str]]] = {}
MEASURED = {NORMS, ENERGY, STRUCTURE, ON_V, BATCH_STRUCTURE, CURVATURE, TOP_CURVATURE, NOISE}
THEOREMS = {THM_2_1, THM_2_2, THM_2_3, THM_2_4, THM_2_5, THM_2_6, TRUST_REGION, EIGENVALUE_FORM}
EVERYTHING = MEASURED | THEOREMS | {IN_ENERGY, IN_STRUCTURE, MEANS, MADE_OF, BITS, PROBE, UNTOUCHED}
EVERYTHING |= {DERIVATIVE}


def planted(name: str, found: set[str], spared: set[str]):
    """A bug that these statements find, and that those say nothing about."""

    def put(plant):
        PLANTED[name] = plant, found, spared
        return plant

    return put


def classified(model: nn.Module | None = None) -> Case:
    return model or perceptron(), nn.CrossEntropyLoss(), X, Y


@planted("a layer left out of the energy", {IN_ENERGY, NORMS, ENERGY}, {CURVATURE, BITS, THM_2_2})
def left_out(patch: pytest.MonkeyPatch) -> Case:
    right = rules._RULES[F.linear]

    def wrong(use, cotangents):
        found = right(use, cotangents)
        return [(w, piece) for w, piece in found if w.shape != (3, 3) or w is not use.args[1]]

    patch.setitem(rules._RULES, F.linear, wrong)
    return classified()


@planted(
    "a bias forgotten in the structure matrix",
    {IN_STRUCTURE, STRUCTURE, ON_V},
    {IN_ENERGY, NORMS, ENERGY, BATCH_STRUCTURE, THM_2_2, THM_2_3, MADE_OF, THM_2_4, THM_2_6},
)
def forgotten_bias(patch: pytest.MonkeyPatch) -> Case:
    right = measure.structure_matrix

    def wrong(model, inputs, **options):
        biases = [p for n, p in model.named_parameters() if "bias" in n and p.requires_grad]
        for bias in biases:
            bias.requires_grad_(False)
        found = right(model, inputs, **options)
        for bias in biases:
            bias.requires_grad_(True)
        return found

    patch.setattr(measure, "structure_matrix", wrong)
    return classified()


@planted("a sign error in a rule", {NORMS, IN_ENERGY, STRUCTURE}, {CURVATURE, BITS, THM_2_2})
def wrong_sign(patch: pytest.MonkeyPatch) -> Case:
    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([0.5, -1.0, 0.2]))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight - self.weight

    right = rules._RULES[Tensor.sub]

    def wrong(use, cotangents):
        if use.function is Tensor.__sub__ or use.function is Tensor.sub:
            cotangents = [None if c is None else -c for c in cotangents]
        return right(use, cotangents)

    for function in (Tensor.sub, Tensor.__sub__, torch.sub):
        patch.setitem(rules._RULES, function, wrong)
    return classified(Centred())


def by_patches(kind: str):
    """A rule for `torch.conv2d` that takes patches of the images, with a mistake or without."""

    def rule(use, cotangents):
        x, weight, bias, stride, padding, _, groups = (
            use.argument(i, name, default)
            for i, (name, default) in enumerate(
                [
                    ("input", None),
                    ("weight", None),
                    ("bias", None),
                    ("stride", 1),
                    ("padding", 0),
                    ("dilation", 1),
                    ("groups", 1),
                ]
            )
        )
        (b,) = cotangents  # (k, m, channels, height, width)
        across, down = (padding, padding) if isinstance(padding, int) else padding[::-1]
        mode = "replicate" if kind == "padding" and across else "constant"
        x = F.pad(x, (across, across, down, down), mode=mode)
        if kind == "stride":
            x = x.roll(1, -1)
        m, height = len(x), weight.shape[2] * weight.shape[3]
        patches = F.unfold(x, weight.shape[2:], stride=stride)  # (m, channels * height, places)
        patches = patches.reshape(m, groups, -1, patches.shape[-1])
        if kind == "groups":
            patches = patches.flip(1)
        b = b.reshape(*b.shape[:2], groups, -1, patches.shape[-1])
        gradients = torch.einsum("kmgot,mgit->kmgoi", b, patches)
        assert gradients[0, 0].numel() == weight.numel(), height
        found = [(weight, Dense(gradients.reshape(*b.shape[:2], 1, 1, -1)))]
        if bias is not None and use.is_weight(bias):
            found.append((bias, Dense(b.sum(-1).reshape(*b.shape[:2], 1, 1, -1))))
        return found

    return rule


def convolution(patch: pytest.MonkeyPatch, kind: str) -> Case:
    patch.setitem(rules._RULES, torch.conv2d, by_patches(kind))
    model = Network("convolution", k=2, width=1, groups=2, stride=2, padding=1, activation="Tanh")
    return model, nn.MSELoss(), IMAGES, VALUES[:4, :2]


for kind in ("padding", "stride", "groups"):
    planted(
        f"a rule that mistakes the {kind}",
        {IN_ENERGY, IN_STRUCTURE, NORMS, STRUCTURE, BATCH_STRUCTURE},
        {CURVATURE, TOP_CURVATURE, BITS, UNTOUCHED, THM_2_2, TRUST_REGION},
    )(functools.partial(convolution, kind=kind))


def test_a_right_rule_passes(monkeypatch: pytest.MonkeyPatch):
    """So what is found of the others is their mistake."""
    assert len(check_model(*convolution(monkeypatch, "right"), max_examples=4).statements) == 27


@planted(
    "a rule that transposes the weight",
    {NORMS, STRUCTURE, IN_ENERGY},
    {CURVATURE, TOP_CURVATURE, BITS, THM_2_2, TRUST_REGION},
)
def transposed(patch: pytest.MonkeyPatch) -> Case:
    right = rules._RULES[Tensor.matmul]

    def wrong(use, cotangents):
        return [(w, Outer(piece.right, piece.left)) for w, piece in right(use, cotangents)]

    for function in (Tensor.matmul, Tensor.__matmul__, torch.matmul):
        patch.setitem(rules._RULES, function, wrong)
    return classified(Doubly())


@planted("a biased noise estimator", {NOISE}, EVERYTHING - {NOISE})
def biased(patch: pytest.MonkeyPatch) -> Case:
    right = measure.gradient_noise

    def wrong(*args):
        found = right(*args)
        m = found.batch_size
        return dataclasses.replace(found, noise=found.noise * (m - 1) / m)

    patch.setattr(measure, "gradient_noise", wrong)
    return classified()


class TooTight(Softmax):
    def loss_bounds(self, residual_norm, target, *, prediction=None):
        lower, upper = super().loss_bounds(residual_norm, target, prediction=prediction)
        return LossBounds(2 * lower, upper)


@planted("a wrong constant in 2.2", {THM_2_2}, MEASURED | {MADE_OF, THM_2_1, THM_2_4, THM_2_6})
def wrong_2_2(patch: pytest.MonkeyPatch) -> Case:
    return perceptron(), losses.FenchelYoungLoss(TooTight()), X, Y


def with_sandwich(patch: pytest.MonkeyPatch, **factors: float) -> None:
    right = bounds.risk_sandwich

    def wrong(*args):
        found = right(*args)
        changed = {name: factor * getattr(found, name) for name, factor in factors.items()}
        return dataclasses.replace(found, **changed)

    patch.setattr(bounds, "risk_sandwich", wrong)


@planted("a wrong constant in 2.3", {THM_2_3, MEANS}, EVERYTHING - {THM_2_3, MEANS})
def wrong_2_3(patch: pytest.MonkeyPatch) -> Case:
    with_sandwich(patch, upper=0.5)
    return Network("linear", k=2), nn.MSELoss(), X, VALUES[:, :2]


@planted(
    "the mean eigenvalue instead of the least", {THM_2_3, MADE_OF, THM_2_4}, MEASURED | {THM_2_1}
)
def mean_eigenvalue(patch: pytest.MonkeyPatch) -> Case:
    def wrong(matrix):
        hi = measure.extreme_eigenvalues(matrix)[1]
        return matrix.diagonal(0, -2, -1).mean(-1), hi, matrix.shape[-1]

    patch.setattr("conjopt.bounds.trainability._extremes", wrong)
    return perceptron(), nn.MSELoss(), X, VALUES


@planted("a wrong constant in 2.4", {THM_2_4}, EVERYTHING - {THM_2_4})
def wrong_2_4(patch: pytest.MonkeyPatch) -> Case:
    right = bounds.pl_bound

    def wrong(model, loss, inputs, targets):
        found = right(model, loss, inputs, targets)
        return dataclasses.replace(found, upper=found.upper / 2)

    patch.setattr(bounds, "pl_bound", wrong)
    return classified()


@planted("a bias that is not there in 2.5", {THM_2_5}, EVERYTHING - {THM_2_5})
def wrong_2_5(patch: pytest.MonkeyPatch) -> Case:
    right = measure.last_layer_bound
    patch.setattr(measure, "last_layer_bound", lambda *args: right(*args) + 1)
    return classified(Network("linear", k=3, bias=False))


class TooSmooth(Softmax):
    smoothness = 0.1


@planted(
    "a wrong constant in 2.6",
    {THM_2_6, TRUST_REGION, EIGENVALUE_FORM},
    MEASURED | {THM_2_1, MADE_OF, THM_2_4},
)
def wrong_2_6(patch: pytest.MonkeyPatch) -> Case:
    model = Network("linear", k=3, scale=0.01)
    return model, losses.FenchelYoungLoss(TooSmooth()), X, Y


@planted(
    "a wrong constant in 3.6",
    {TRUST_REGION, EIGENVALUE_FORM},
    EVERYTHING - {TRUST_REGION, EIGENVALUE_FORM},
)
def wrong_3_6(patch: pytest.MonkeyPatch) -> Case:
    right = step_size.trust_region
    patch.setattr(step_size, "trust_region", lambda *args: 2**0.5 * right(*args))
    return perceptron(), nn.MSELoss(), X, VALUES


@planted("a sum instead of a mean", {ENERGY}, EVERYTHING - {ENERGY})
def summed(patch: pytest.MonkeyPatch) -> Case:
    def wrong(*args):
        return measure.per_sample_gradient_norms(*args).square().sum()

    patch.setattr(measure, "gradient_energy", wrong)
    return classified()


@planted("a criterion read by rows instead of elements", {CRITERION, RESIDUAL}, EVERYTHING)
def wrong_scale(patch: pytest.MonkeyPatch) -> Case:
    def wrong(self, outputs, targets):
        return outputs.new_full((), len(outputs), dtype=torch.float64)

    patch.setattr("conjopt.losses.reading.MeanSquaredError._divisor", wrong)
    return perceptron(), nn.MSELoss(), X, VALUES


class Backwards(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss):
        return loss.clone()

    @staticmethod
    def backward(ctx, gradient):
        return -gradient


class WrongSign(Softmax):
    def loss(self, y, f):
        return Backwards.apply(super().loss(y, f))

    def class_loss(self, index, f):
        return Backwards.apply(super().class_loss(index, f))


@planted("a residual of the wrong sign", {RESIDUAL}, EVERYTHING | {COUPLING, CRITERION})
def wrong_residual(patch: pytest.MonkeyPatch) -> Case:
    return perceptron(), losses.FenchelYoungLoss(WrongSign()), X, Y


@planted(
    "eigenvalues on another space than V",
    {ON_V, MADE_OF},
    {NORMS, ENERGY, STRUCTURE, BATCH_STRUCTURE, CURVATURE, IN_STRUCTURE, THM_2_2, TRUST_REGION},
)
def wrong_projection(patch: pytest.MonkeyPatch) -> Case:
    def wrong(outputs, potential):
        identity = torch.eye(outputs[0].numel(), dtype=outputs.dtype)
        return identity if potential is None else identity[1:]  # one coordinate dropped

    patch.setattr("conjopt.measure.structure.basis_like", wrong)
    return classified()


@planted(
    "least and greatest eigenvalue swapped",
    {ON_V, THM_2_1},
    {NORMS, ENERGY, STRUCTURE, BATCH_STRUCTURE, CURVATURE, THM_2_3, MADE_OF, THM_2_4},
)
def swapped(patch: pytest.MonkeyPatch) -> Case:
    right = measure.extreme_eigenvalues
    patch.setattr(measure, "extreme_eigenvalues", lambda matrix: right(matrix)[::-1])
    return classified()


@planted("a curvature that is off by 2", {CURVATURE}, EVERYTHING - {CURVATURE, TRUST_REGION})
def half_curvature(patch: pytest.MonkeyPatch) -> Case:
    right = measure.curvature_along
    patch.setattr(measure, "curvature_along", lambda *args: right(*args) / 2)
    return classified()


@planted("a greatest curvature too great", {TOP_CURVATURE}, EVERYTHING - {TOP_CURVATURE, THM_2_6})
def great_curvature(patch: pytest.MonkeyPatch) -> Case:
    right = measure.top_curvature

    def wrong(*args, **options):
        found = right(*args, **options)
        return found._replace(value=1.1 * found.value)

    patch.setattr(measure, "top_curvature", wrong)
    return classified()


@planted(
    "a tied parameter counted twice",
    {NORMS, IN_ENERGY, THM_2_1},
    {STRUCTURE, BATCH_STRUCTURE, CURVATURE, THM_2_2, THM_2_3, THM_2_4, IN_STRUCTURE},
)
def counted_twice(patch: pytest.MonkeyPatch) -> Case:
    right = measure.per_sample_gradient_norms

    def wrong(model, *args):
        names = [n for n, p in model.named_parameters() if p.requires_grad]
        whole = right(model, *args).square()
        if "table.weight" in names:
            others = [p for n, p in model.named_parameters() if n in names and n != "table.weight"]
            for parameter in others:
                parameter.requires_grad_(False)
            whole = whole + right(model, *args).square()
            for parameter in others:
                parameter.requires_grad_(True)
        return whole.sqrt()

    patch.setattr(measure, "per_sample_gradient_norms", wrong)
    return Network("tied", k=3, width=2), nn.CrossEntropyLoss(), TOKENS, Y[:4]


class HalfSquare(torch.autograd.Function):
    """``x * x`` whose backward forgets the 2."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * x


@planted("a backward that is not the derivative", {DERIVATIVE}, EVERYTHING - {DERIVATIVE})
def wrong_backward(patch: pytest.MonkeyPatch) -> Case:
    class Squaring(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(HalfSquare.apply(self.first(x)))

    return classified(Squaring())


@planted("a model that couples samples", {COUPLING}, EVERYTHING | {CRITERION, RESIDUAL})
def coupled(patch: pytest.MonkeyPatch) -> Case:
    class Coupled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            f = self.layer(x)
            return f - f.mean(0)

    return classified(Coupled())


@planted("a probe that changes .grad", {BITS}, EVERYTHING - {BITS})
def changed_gradients(patch: pytest.MonkeyPatch) -> Case:
    patch.setattr(measure, "EnergyProbe", functools.partial(measure.EnergyProbe, fused=True))
    model = Network("convolution", k=2, width=3, activation="Tanh")
    return model, nn.MSELoss(), IMAGES, VALUES[:4, :2]


@planted("a measurement that draws random numbers", {UNTOUCHED}, EVERYTHING - {UNTOUCHED})
def drawing(patch: pytest.MonkeyPatch) -> Case:
    right = measure.structure_matrix

    def wrong(*args, **options):
        torch.rand(1)
        return right(*args, **options)

    patch.setattr(measure, "structure_matrix", wrong)
    return classified()


@pytest.mark.parametrize("name", PLANTED)
def test_planted_bugs_are_found(name: str, monkeypatch: pytest.MonkeyPatch):
    plant, expected, spared = PLANTED[name]
    case = plant(monkeypatch)
    drawn = 20 if EIGENVALUE_FORM in expected else 4  # few directions contradict it
    with pytest.raises(ViolationError) as error:
        check_model(*case, max_examples=drawn)
    violated = {violation.statement for violation in error.value.violations}
    assert expected <= violated
    assert not violated & spared
    for violation in error.value.violations:
        assert str(violation) in str(error.value)
        assert violation.left != violation.right
        assert "Error" not in violation.left
    if IN_ENERGY in expected:  # and it says which parameter
        (found,) = (v for v in error.value.violations if v.statement == IN_ENERGY)
        names = [name for name, _ in case[0].named_parameters()]
        assert any(f"('{name}')" in found.left for name in names)


@pytest.mark.parametrize("x", ["zeros", "drawn"])
def test_kinks_raise_no_alarm(x: str):
    """Zeros through layers without a bias put every ReLU at its kink, and tie every maximum."""
    inputs = torch.zeros(4, 1, 4, 4) if x == "zeros" else IMAGES[:, :1, :4].repeat(1, 1, 1, 2)
    for seed in range(2):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()
        ).append(nn.LazyLinear(3))
        model(inputs)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                nn.init.zeros_(parameter)
        found = check_model(model, nn.CrossEntropyLoss(), inputs, Y[:4], max_examples=1)
        assert DERIVATIVE in found.statements


class Cancelling(nn.Module):
    """The identity; where it is 0, autograd says that its slope is 0."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.shift = nn.Linear(3, 3), nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + F.relu(self.shift) - F.relu(-self.shift)


def test_a_kink_right_at_the_parameters_raises_no_alarm():
    found = check_model(Cancelling(), nn.CrossEntropyLoss(), X, Y, max_examples=2)
    assert DERIVATIVE in found.statements


def test_a_table_that_the_forward_writes_to_is_not_moved():
    model = nn.Sequential(nn.Embedding(3, 2, max_norm=0.5), nn.Flatten(), nn.Linear(6, 3))
    found = check_model(model, nn.CrossEntropyLoss(), TOKENS, Y[:4], max_examples=1)
    assert "max_norm" in found.left_out[DERIVATIVE]


MILLIONTHS = {
    "gradient_energy": ENERGY,
    "per_sample_gradient_norms": NORMS,
    "structure_matrix": STRUCTURE,
    "batch_structure_matrix": BATCH_STRUCTURE,
    "curvature_along": CURVATURE,
    "top_curvature": TOP_CURVATURE,
    "gradient_noise": NOISE,
}


@pytest.mark.parametrize("name", MILLIONTHS)
def test_a_millionth_is_found(name: str, monkeypatch: pytest.MonkeyPatch):
    """Tolerances are of rounding size."""
    right, factor = getattr(measure, name), 1 + 1e-6

    def wrong(*args, **options):
        found = right(*args, **options)
        if name == "top_curvature":
            return found._replace(value=factor * found.value)
        if name == "gradient_noise":
            return dataclasses.replace(found, noise=factor * found.noise)
        return factor * found

    monkeypatch.setattr(measure, name, wrong)
    with pytest.raises(ViolationError) as error:
        check_model(*classified(), max_examples=1)
    assert MILLIONTHS[name] in {violation.statement for violation in error.value.violations}


def test_all_statements_are_found_by_some_bug():
    found = set().union(*(expected for _, expected, _ in PLANTED.values()))
    assert {COUPLING, CRITERION, RESIDUAL} | EVERYTHING == found | {PROBE}


def test_the_smallest_counterexample_is_told(monkeypatch: pytest.MonkeyPatch):
    """A rule that is wrong for one sample only: this row, alone, and as it was given."""
    right = rules._RULES[F.linear]

    def wrong(use, cotangents):
        x, found = use.args[0], right(use, cotangents)
        if x.shape[-1] != 3:
            return found
        odd = (x == X[3].double()).all(-1).to(x)[None, :, None, None, None]
        return [
            (w, Outer(piece.left, (1 + odd) * piece.right) if w.ndim == 2 else piece)
            for w, piece in found
        ]

    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    monkeypatch.setitem(rules._RULES, F.linear, wrong)
    with pytest.raises(ViolationError) as error:
        check_model(model, nn.CrossEntropyLoss(), X, Y, rows=5, max_examples=3)
    found = {violation.statement: violation for violation in error.value.violations}
    assert found[NORMS].example == {"rows": [3]}
    assert "('0.weight')" in found[IN_ENERGY].left
    assert THM_2_2 not in found


def test_the_search_goes_beyond_what_was_given(monkeypatch: pytest.MonkeyPatch):
    """A rule that is wrong where an input is large: no row is, until one is made so."""
    right = rules._RULES[F.linear]

    def wrong(use, cotangents):
        found = right(use, cotangents)
        if use.args[0].abs().max() <= 3:
            return found
        return [
            (w, Dense(2 * piece.gradients)) if w.ndim == 1 else (w, piece) for w, piece in found
        ]

    assert X.abs().max() < 3
    monkeypatch.setitem(rules._RULES, F.linear, wrong)
    with pytest.raises(ViolationError) as error:
        check_model(nn.Linear(3, 2), nn.MSELoss(), X, VALUES[:, :2], max_examples=8)
    found = {violation.statement: violation for violation in error.value.violations}
    assert found[NORMS].example == {"rows": [0], "inputs": "times 10"}
    assert "Error" not in found[NORMS].left


def state(model: nn.Module) -> list:
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    modes = [module.training for module in model.modules()]
    tensors = [t.clone() for t in (*model.parameters(), *model.buffers())]
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    flags = [p.requires_grad for p in model.parameters()]
    return [*tensors, *gradients, torch.get_rng_state(), hooks, modes, flags]


@pytest.mark.parametrize("outcome", ["passes", "violates", "refused"])
def test_the_model_is_left_as_it_was(outcome: str, monkeypatch: pytest.MonkeyPatch):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    model(X)  # statistics
    model[2].bias.requires_grad_(False)
    model[0].register_forward_hook(lambda *_: None)
    model.eval()
    nn.CrossEntropyLoss()(model(X), Y).backward()
    model[1].train(outcome == "refused")
    before = state(model)
    if outcome == "violates":
        right = measure.gradient_energy
        monkeypatch.setattr(measure, "gradient_energy", lambda *args: 2 * right(*args))
    expected = {"passes": None, "violates": ViolationError, "refused": ValueError}[outcome]
    if expected is None:
        check_model(model, nn.CrossEntropyLoss(), X, Y, max_examples=2)
    else:
        with pytest.raises(expected):
            check_model(model, nn.CrossEntropyLoss(), X, Y, max_examples=2)
    for a, b in zip(before, state(model), strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


class Several(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer(x), x


class ByName(Several):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.layer(x)}


@dataclasses.dataclass
class Output:
    logits: Tensor


class AsObject(Several):
    def forward(self, x: Tensor) -> Output:
        return Output(self.layer(x))


class Writing(Several):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.mul_(2))


class WritingUnseen(Several):
    def forward(self, x: Tensor) -> Tensor:
        x.data += 1
        return self.layer(x)


class Detached(Several):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).detach()


class Noisy(Several):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + torch.rand_like(x)


class Keeping(Several):
    def forward(self, x: Tensor) -> Tensor:
        self.kept = self.layer(x)
        return self.kept


class Transposing(Several):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).T


def kept() -> nn.Module:
    model = Keeping()
    model(X)
    return model


CE = nn.CrossEntropyLoss()
BAD = {
    "dropout": (nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)), CE, X, Y, "'1' .*model.eval()"),
    "batch norm": (nn.Sequential(nn.BatchNorm1d(3)), CE, X, Y, "'0' .*model.eval()"),
    "statistics of the batch alone": (
        nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, track_running_stats=False)).eval(),
        CE,
        X,
        Y,
        "with running statistics, or use group",
    ),
    "recurrent dropout": (nn.GRU(3, 3, 2, dropout=0.1), CE, X, Y, "GRU draws random numbers"),
    "no samples": (nn.Linear(3, 3), CE, X[:0], Y[:0], "no samples: pass at least one"),
    "no tensors": (nn.Linear(3, 3), CE, 1.0, Y, "samples along dimension 0"),
    "too few targets": (nn.Linear(3, 3), CE, X, Y[:2], "one target for each sample"),
    "targets that are none": (nn.Linear(3, 3), CE, X, [0] * 5, "expected a tensor"),
    "an input that is not finite": (nn.Linear(3, 3), CE, X / 0, Y, "not finite in input 0"),
    "a target that is not finite": (nn.Linear(3, 3), CE, X, X / 0, "not finite in targets"),
    "a parameter that is not finite": (
        Network("linear", k=3, scale=float("nan")),
        CE,
        X,
        Y,
        "parameter 'head.weight', parameter 'head.bias'",
    ),
    "nothing trained": (
        nn.Linear(3, 3).requires_grad_(False),
        CE,
        X,
        Y,
        r"requires_grad_\(\) on what you train",
    ),
    "an unknown loss": (nn.Linear(3, 3), nn.L1Loss(), X, X, "not recognised"),
    "an unreduced loss": (nn.Linear(3, 3), nn.MSELoss(reduction="none"), X, X, "reduction='mean'"),
    "no module": (lambda x: x, CE, X, Y, "expected a torch.nn.Module"),
    "integers": (nn.Linear(3, 3), CE, X.long(), Y, "no embedding .*pass inputs.float()"),
    "a model that fails": (nn.Linear(4, 3), CE, X, Y, "fails on this batch .*pass dtype=None"),
    "several outputs": (
        Several(),
        CE,
        X,
        Y,
        "returned a value of type tuple, .*wrap it in a module",
    ),
    "a dict": (ByName(), CE, X, Y, "returned a value of type dict, .*wrap it in a module"),
    "a dataclass": (AsObject(), CE, X, Y, "returned a value of type Output, .*wrap it in a module"),
    "a forward that writes": (Writing(), CE, X, Y, "Writing writes to its inputs: copy them first"),
    "written by its data": (WritingUnseen(), CE, X, Y, "writes to its inputs: copy them first"),
    "detached": (Detached(), CE, X, Y, "no trainable parameter reaches the outputs"),
    "no numbers": (nn.Linear(3, 3, device="meta"), CE, X, Y, "'weight', .*'bias': on the meta"),
    "inputs without numbers": (nn.Linear(3, 3), CE, X.to("meta"), Y, "input 0: on the meta"),
    "lazy": (nn.LazyLinear(3), CE, X, Y, "'bias': not initialised: run the model once"),
    "complex": (nn.Linear(3, 3), CE, X.to(torch.complex64), Y, "input 0: complex: .*real ones"),
    "random numbers": (Noisy(), CE, X, Y, r"two runs of Noisy differ: call model.eval\(\)"),
    "a model that cannot be copied": (kept(), CE, X, Y, "cannot be copied"),
    "samples along dimension 1": (Transposing(), CE, X, Y, "expected samples along dimension 0"),
    "targets out of range": (nn.Linear(3, 3), CE, X, Y + 3, "the criterion fails on this batch"),
    "nothing counts": (nn.Linear(3, 3), CE, X, Y * 0 - 100, "of which at least one counts"),
    "a large model": (nn.Linear(3, 9000), nn.MSELoss(), X, torch.zeros(5, 9000), "GiB.*rows=1"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str):
    model, loss, x, y, message = BAD[name]
    with pytest.raises((TypeError, ValueError), match=message):
        check_model(model, loss, x, y)


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float64])
def test_the_batch_is_copied(dtype: torch.dtype | None):
    """Also where it needs no conversion."""
    x, y = X.double(), VALUES.double()
    _, _, inputs, targets = _copies(nn.Linear(3, 3), CE, {"x": x}, y, dtype)
    assert inputs["x"].data_ptr() != x.data_ptr()
    assert targets.data_ptr() != y.data_ptr()


def test_bad_numbers():
    for options, kind, message in (
        ({"rows": 0}, ValueError, "rows=0, expected at least 1"),
        ({"rows": 2.5}, TypeError, "rows=2.5, expected an integer"),
        ({"max_examples": 0}, ValueError, "max_examples=0, expected at least 1"),
        ({"dtype": "float64"}, TypeError, "dtype='float64', expected torch.float64"),
        ({"dtype": torch.bfloat16}, ValueError, r"torch.bfloat16, .* torch.float64 \(the default"),
        ({"dtype": torch.float16}, ValueError, "told from rounding"),
        ({"dtype": torch.int64}, ValueError, "torch.int64, expected torch.float64"),
    ):
        with pytest.raises(kind, match=message):
            check_model(nn.Linear(3, 3), CE, X, Y, **options)
    with pytest.raises(ValueError, match=r"'weight', parameter 'bias' in torch.bfloat16.*default"):
        check_model(nn.Linear(3, 3).bfloat16(), CE, X, Y, dtype=None)
    half = check_model(nn.Linear(3, 3).bfloat16(), CE, X.bfloat16(), Y, max_examples=2)
    assert NORMS in half.statements  # the copy is in float64
    with pytest.raises(ValueError, match="kind='deep', expected one of linear, mlp"):
        Network("deep")
    with pytest.raises(ValueError, match="norm='group', expected one of none"):
        Network("mlp", norm="group")


def test_a_copy_is_the_same_network():
    model = Network("residual", k=2, width=3, depth=2, norm="batch", activation="GELU", seed=3)
    for other in (eval(repr(model), {"Network": Network}), copy.deepcopy(model)):
        assert torch.equal(model(X.double()), other(X.double()))
        assert repr(other) == repr(model)
