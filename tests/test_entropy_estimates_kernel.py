"""The leave-one-out kernel estimate against plain loops, its gradient, limits and bad input."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from conjopt.entropy import kernel, kernel_conditional_entropy
from conjopt.potentials import Entmax, Logistic, Poisson, Softmax, Sparsemax, Squared

EPS = torch.finfo(torch.float64).eps
POTENTIALS = [Softmax(), Sparsemax(), Entmax(1.3), Squared(), Logistic(), Poisson()]
FORMS = ["plug-in", "cross-entropy"]


def draw_targets(potential, hard, n, k, generator):
    noise = torch.randn(n, k, generator=generator, dtype=torch.float64)
    if potential.on_simplex:
        return noise.argmax(1) if hard else noise.softmax(1)
    if potential == Squared():
        return noise
    return (noise > 0).double() if hard else noise.sigmoid()


@st.composite
def instances(draw):
    potential = draw(st.sampled_from(POTENTIALS))
    n, d, k = draw(st.integers(2, 12)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    outputs = torch.randn(n, d, generator=generator, dtype=torch.float64)
    targets = draw_targets(potential, draw(st.booleans()), n, k, generator)
    return potential, outputs, targets, draw(st.sampled_from([0.05, 0.1, 1.0]))


def plain(potential, outputs, targets, bandwidth, form):
    """Each sample's term by the definition, one pair of samples after the other, `(n,)`."""
    n, d = outputs.shape
    if targets.ndim == 1:
        targets = F.one_hot(targets).double()
    mean = [math.fsum(column) / n for column in outputs.T.tolist()]
    u = [[v - m for v, m in zip(row, mean)] for row in outputs.tolist()]
    rms = math.sqrt(math.fsum(v * v for row in u for v in row) / (n * d))
    u = [[v / rms for v in row] for row in u]
    terms = []
    for i in range(n):
        weights = [
            0 if i == j else math.exp(-(math.dist(u[i], u[j]) ** 2) / (2 * d * bandwidth))
            for j in range(n)
        ]
        ybar = torch.tensor(weights, dtype=torch.float64) @ targets / math.fsum(weights)
        ybar = ybar.clamp(targets.amin(0), targets.amax(0))  # as all means but for rounding
        if form == "plug-in":
            terms.append(potential.value(targets[i]) - potential.value(ybar))
        else:
            terms.append(potential.divergence(targets[i], ybar))
    return torch.stack(terms)


def rounding(potential, form, terms):
    """Of `log(1 - ybar)` with `ybar` near 1; where that is all that is left, no test."""
    if potential != Logistic() or form == "plug-in":
        return 0.0
    assume(terms.max() < 30)
    return 64 * EPS * float(terms.max().exp())


@given(instances(), st.sampled_from(FORMS))
def test_the_estimate_is_its_definition(instance, form):
    potential, outputs, targets, bandwidth = instance
    terms = plain(potential, outputs, targets, bandwidth, form)
    expected, slack = float(terms.mean()), rounding(potential, form, terms)
    found = float(
        kernel_conditional_entropy(outputs, targets, potential, bandwidth=bandwidth, form=form)
    )
    assert found == expected or abs(found - expected) <= 1e-10 * (1 + abs(expected)) + slack


@given(instances(), st.sampled_from(FORMS), st.floats(0.01, 100), st.floats(-100, 100))
def test_order_place_and_scale_do_not_matter(instance, form, scale, shift):
    potential, outputs, targets, bandwidth = instance

    def estimate(outputs, targets):
        return float(
            kernel_conditional_entropy(outputs, targets, potential, bandwidth=bandwidth, form=form)
        )

    expected = estimate(outputs, targets)
    slack = rounding(potential, form, plain(potential, outputs, targets, bandwidth, form))
    order = torch.randperm(len(outputs), generator=torch.Generator().manual_seed(0))
    for found in (
        estimate(outputs[order], targets[order]),
        estimate(scale * outputs + shift, targets),
    ):
        # A shift costs digits of the outputs, the exponents multiply what is left by 1 / bandwidth.
        assert found == expected or abs(found - expected) <= 1e-8 * (1 + abs(expected)) + 64 * slack


def test_classes_may_be_renamed():
    generator = torch.Generator().manual_seed(0)
    outputs, y = torch.randn(30, 2, generator=generator), torch.arange(30) % 3
    for form in FORMS:
        a, b = (
            kernel_conditional_entropy(outputs, labels, Softmax(), bandwidth=1.0, form=form)
            for labels in (y, 7 - 2 * y)
        )
        assert (a - b).abs() < 1e-13


def test_blocks_do_not_matter(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    outputs, y = torch.randn(50, 2, generator=generator), torch.arange(50) % 3
    for form in FORMS:
        whole = kernel_conditional_entropy(outputs, y, Softmax(), form=form)
        with monkeypatch.context() as patch:
            patch.setattr(kernel, "TILE", 11)
            patch.setattr(kernel, "BLOCK", 7 * 11)
            assert (
                kernel_conditional_entropy(outputs, y, Softmax(), form=form) - whole
            ).abs() < 1e-13


@settings(max_examples=25)
@given(instances(), st.sampled_from(FORMS))
def test_the_gradient_is_that_of_the_estimate(instance, form):
    potential, outputs, targets, _ = instance

    def estimate(outputs):
        return kernel_conditional_entropy(outputs, targets, potential, bandwidth=1.0, form=form)

    assume(torch.isfinite(estimate(outputs)))  # a single sample of a class has no neighbour
    assert torch.autograd.gradcheck(estimate, outputs.requires_grad_(), eps=1e-7, atol=1e-5)


@pytest.mark.parametrize("potential", POTENTIALS, ids=repr)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", ["far apart", "equal", "two", "a class each", "tiny", "huge"])
def test_the_gradient_is_finite(potential, form, case):
    n = 2 if case == "two" else 12
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    scale = {"far apart": 1.0, "equal": 0.0, "tiny": 1e-200, "huge": 1e200}.get(case, 1.0)
    outputs = outputs.cumsum(0) * scale
    targets = draw_targets(potential, True, n, 3, generator)
    if potential.on_simplex:
        targets = torch.arange(n) % (n if case == "a class each" else 2)
    outputs.requires_grad_()
    value = kernel_conditional_entropy(outputs, targets, potential, bandwidth=0.001, form=form)
    if form == "plug-in":
        assert torch.isfinite(value)
    assert not torch.isnan(value)
    value.backward()
    if case != "tiny":  # a slope of 1e200
        assert torch.isfinite(outputs.grad).all()


def test_it_does_not_matter_how_exactly_outputs_are_equal():
    outputs = (torch.full((9, 2), 0.1) * 3).double()
    outputs[4] += EPS / 4  # the next number
    y = torch.arange(9) % 3
    exact = kernel_conditional_entropy(torch.zeros(9, 2), y, Softmax())
    assert (kernel_conditional_entropy(outputs, y, Softmax()) - exact).abs() < 0.01
    # Left out, a class has 2 of 8 samples: the entropy of (2, 3, 3) / 8.
    entropy = torch.special.entr(torch.tensor([2, 3, 3]).double() / 8).sum()
    assert (exact - entropy).abs() < 1e-13


def test_a_small_spread_about_a_large_mean_counts_in_full():
    outputs = (
        torch.randn(30, 2, generator=torch.Generator().manual_seed(0)).double().round(decimals=2)
    )
    y = torch.arange(30) % 3
    exact = kernel_conditional_entropy(outputs, y, Softmax(), bandwidth=1.0)
    # A spread of 1e-8 of the mean: half of the digits are left.
    found = kernel_conditional_entropy(outputs + 1e8, y, Softmax(), bandwidth=1.0)
    assert (found - exact).abs() < 1e-6


def test_shorter_dtypes_give_the_same_term():
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(64, 5, generator=generator, dtype=torch.float64)
    points = F.one_hot(torch.arange(64) % 5).double()
    exact, short = (
        kernel.leave_one_out_means(kernel.standardised(outputs.to(t)), points.to(t), 0.1)
        for t in (torch.float64, torch.float32)
    )
    assert short.dtype == torch.float32
    assert (exact - short).abs().max() < 1e-5


def test_both_forms_approach_a_smooth_law():
    # Z normal, Y = 1 with probability sigmoid(2 Z); Ent(Y|Z) by the trapezoidal rule.
    grid = torch.arange(-12, 12, 1 / 64, dtype=torch.float64)
    density = (-(grid**2) / 2).exp() / math.sqrt(2 * math.pi)
    entropy = -Logistic().value((2 * grid).sigmoid()[:, None])
    truth = float((density * entropy).sum() / 64)
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(4000, 1, generator=generator, dtype=torch.float64)
    y = torch.bernoulli((2 * z).sigmoid(), generator=generator)
    plug_in, cross = (
        float(kernel_conditional_entropy(z, y, Logistic(), bandwidth=0.01, form=form))
        for form in FORMS
    )
    # The standard deviation of a loss is about 0.4, so that of its mean 0.006: three of them.
    assert abs(plug_in - truth) < 0.02
    assert abs(cross - truth) < 0.02
    wide = float(kernel_conditional_entropy(z, y, Logistic(), bandwidth=0.3, form="cross-entropy"))
    assert wide > cross  # too wide a kernel says less


@pytest.mark.parametrize("form", FORMS)
def test_one_class_has_none(form):
    outputs = torch.randn(9, 2, generator=torch.Generator().manual_seed(0))
    assert kernel_conditional_entropy(outputs, [4] * 9, Softmax(), form=form) == 0
    targets = torch.ones(9, 3)
    assert kernel_conditional_entropy(outputs, targets, Logistic(), form=form) == 0


def test_a_class_of_one_sample_has_no_neighbour():
    outputs = [[0.0], [0.1], [5.0]]
    assert (
        kernel_conditional_entropy(outputs, [0, 0, 1], Softmax(), form="cross-entropy") == math.inf
    )
    assert 0 <= kernel_conditional_entropy(outputs, [0, 0, 1], Softmax()) < math.inf


def test_bad_input():
    outputs, y = torch.zeros(3, 2), [0, 1, 1]
    with pytest.raises(ValueError, match="two at least"):
        kernel_conditional_entropy(outputs[:1], [0], Softmax())
    with pytest.raises(ValueError, match="lengths"):
        kernel_conditional_entropy(outputs, [0, 1], Softmax())
    with pytest.raises(ValueError, match=r"outputs\[2\] = \(0, nan\)"):
        kernel_conditional_entropy([[0.0, 0.0], [0.0, 0.0], [0.0, math.nan]], y, Softmax())
    with pytest.raises(TypeError, match=r"outputs of dtype torch\.int64"):
        kernel_conditional_entropy(outputs.long(), y, Softmax())
    with pytest.raises(ValueError, match=r"d >= 1"):
        kernel_conditional_entropy(torch.zeros(3, 0), y, Softmax())
    with pytest.raises(TypeError, match="expected a Potential"):
        kernel_conditional_entropy(outputs, y, torch.nn.CrossEntropyLoss())
    with pytest.raises(ValueError, match="form='loo'"):
        kernel_conditional_entropy(outputs, y, Softmax(), form="loo")
    for bandwidth in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="bandwidth="):
            kernel_conditional_entropy(outputs, y, Softmax(), bandwidth=bandwidth)
