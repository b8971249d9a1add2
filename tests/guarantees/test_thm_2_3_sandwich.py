"""Thm 2.3 and 2.4 on random instances in float64: losses and gradients lie between their bounds."""

import dataclasses

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from conjopt.bounds import pl_bound, risk_sandwich
from conjopt.losses import FenchelYoungLoss
from conjopt.potentials import Entmax, Logistic, Poisson, Potential, Softmax, Sparsemax, Squared

EPS = torch.finfo(torch.float64).eps
POTENTIALS = [Softmax(), Squared(), Logistic(), Sparsemax(), Entmax(1.5), Poisson()]


@dataclasses.dataclass
class Instance:
    model: nn.Module
    potential: Potential
    loss: nn.Module
    inputs: Tensor
    targets: Tensor


def make_model(kind: str, k: int) -> tuple[nn.Module, tuple[int, ...]]:
    """A model, and the shape of one sample of its inputs."""
    if kind == "linear":
        return nn.Linear(3, k, bias=False), (3,)
    if kind == "narrow":  # lo = 0: everything that is trained goes through one number
        head = nn.Linear(1, k).requires_grad_(False)
        return nn.Sequential(nn.Linear(3, 1), nn.Tanh(), head), (3,)
    if kind == "perceptron":
        return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, k)), (3,)
    return nn.Sequential(nn.Conv1d(2, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(9, k)), (2, 4)


def draw_targets(potential: Potential, hard: bool, shape: tuple[int, int]) -> Tensor:
    noise = torch.randn(*shape).double()
    if potential == Squared():
        return noise
    if potential == Logistic():
        return (noise > 0).double() if hard else noise.sigmoid()
    if potential == Poisson():
        return noise.exp().floor() if hard else noise.exp()
    if hard:
        return torch.randint(shape[1], shape[:1])
    return noise.softmax(1)


@st.composite
def instances(draw: st.DrawFn) -> Instance:
    potential = draw(st.sampled_from(POTENTIALS))
    k, m = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    torch.manual_seed(draw(st.integers(0, 2**32)))
    model, shape = make_model(
        draw(st.sampled_from(["linear", "narrow", "perceptron", "convolution"])), k
    )
    model.double()
    scale = draw(st.sampled_from([1e-3, 1.0, 1.0, 4.0]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    targets = draw_targets(potential, draw(st.booleans()), (m, k))
    loss = FenchelYoungLoss(potential, reduction=draw(st.sampled_from(["mean", "sum"])))
    inputs = torch.randn(m, *shape).double()
    if draw(st.booleans()) and potential == Softmax():
        torch_loss = nn.CrossEntropyLoss(label_smoothing=draw(st.sampled_from([0.0, 0.1])))
        return Instance(model, potential, torch_loss, inputs, targets)
    return Instance(model, potential, loss, inputs, targets)


def dense(instance: Instance) -> Tensor:
    """Jacobians on `V`, `(m, d, P)`, by reverse mode alone."""
    trained = {n: p.detach() for n, p in instance.model.named_parameters() if p.requires_grad}

    def run(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(instance.model, parameters, instance.inputs)

    J = torch.cat([j.flatten(2) for j in torch.func.jacrev(run)(trained).values()], 2)
    if not instance.potential.on_simplex:
        return J
    k = J.shape[1]
    everything = torch.cat([torch.ones(k, 1), torch.eye(k)[:, : k - 1]], 1).double()
    Q = torch.linalg.qr(everything)[0][:, 1:]
    return Q.T @ J


def by_autograd(instance: Instance) -> tuple[Tensor, Tensor]:
    """Losses and norms of their gradients, one sample at a time."""
    loss = FenchelYoungLoss(
        instance.potential,
        reduction="sum",
        label_smoothing=getattr(instance.loss, "label_smoothing", 0.0),
    )
    trained = [p for p in instance.model.parameters() if p.requires_grad]
    losses, norms = [], []
    for i in range(len(instance.inputs)):
        value = loss(instance.model(instance.inputs[i : i + 1]), instance.targets[i : i + 1])
        gradients = torch.autograd.grad(value, trained)
        losses.append(value.detach())
        norms.append(torch.cat([g.flatten() for g in gradients]).norm())
    return torch.stack(losses), torch.stack(norms)


def rounding(losses: Tensor) -> Tensor:
    """The upper bound of softmax has the slope `exp(l)`, and the norms are rounded."""
    return 1e-9 * (EPS**0.25 + losses) + 1e4 * EPS * losses.exp()


@settings(max_examples=150)
@given(instances())
def test_each_loss_lies_between_its_bounds(instance: Instance):
    found = risk_sandwich(instance.model, instance.loss, instance.inputs, instance.targets)
    losses, norms = by_autograd(instance)
    J = dense(instance)
    spectrum = torch.linalg.svdvals(J) ** 2
    d = J.shape[1]
    zeros = torch.zeros(len(J)).double()
    lo = spectrum.amin(1) if 0 < d <= J.shape[2] else zeros
    hi = spectrum.amax(1) if d else zeros
    assert_close(found.losses, losses, rtol=1e-11, atol=1e-14)
    assert_close(found.gradient_norms, norms, rtol=1e-11, atol=1e-13)
    assert_close(found.hi, hi, rtol=1e-11, atol=1e-15)
    assert ((found.lo - lo).abs() <= 1e-13 * hi).all()
    assert (found.lower <= losses + rounding(losses)).all(), (found.lower, losses)
    assert (losses <= found.upper + rounding(losses)).all(), (losses, found.upper)
    assert (found.upper[lo <= EPS * hi].isinf() | (found.hi[lo <= EPS * hi] == 0)).all()
    for between in (found.lo * found.residual_norms**2, norms**2):  # Thm 2.1
        assert (between <= found.hi * found.residual_norms**2 * (1 + 1e-12) + 1e-25).all()
    assert (found.lo * found.residual_norms**2 <= norms**2 + 1e-12 * norms**2 + 1e-25).all()


@settings(max_examples=50)
@given(instances())
def test_the_means_bound_the_risk(instance: Instance):
    found = risk_sandwich(instance.model, instance.loss, instance.inputs, instance.targets).mean()
    losses, _ = by_autograd(instance)
    assert_close(found.losses, losses.mean(), rtol=1e-11, atol=1e-14)
    slack = rounding(losses).mean()
    assert found.lower <= found.losses + slack
    assert found.losses <= found.upper + slack


@settings(max_examples=60)
@given(
    st.integers(0, 2**32), st.integers(1, 5), st.sampled_from(["softmax", "squared", "logistic"])
)
def test_where_V_is_a_line_both_bounds_are_the_loss(seed: int, m: int, kind: str):
    """Two classes, or one output: lo = hi, and the two columns of Thm 2.2 agree."""
    torch.manual_seed(seed)
    potential = {"softmax": Softmax(), "squared": Squared(), "logistic": Logistic()}[kind]
    model, shape = make_model("perceptron", 1 + potential.on_simplex)
    x = torch.randn(m, *shape).double()
    y = torch.randint(2, (m,)) if potential.on_simplex else torch.randint(2, (m, 1)).double()
    found = risk_sandwich(model.double(), FenchelYoungLoss(potential), x, y)
    assert_close(found.lower, found.losses, rtol=1e-11, atol=1e-14)
    assert_close(found.upper, found.losses, rtol=1e-11, atol=1e-14)


def test_one_class_has_nothing_to_lose():
    x, y = torch.randn(3, 2), torch.zeros(3, dtype=torch.long)
    found = risk_sandwich(nn.Linear(2, 1), nn.CrossEntropyLoss(), x, y)
    for values in (found.lower, found.losses, found.upper, found.lo, found.hi):
        assert (values == 0).all()


def test_without_a_gradient_only_zero_and_infinity_are_left():
    model = nn.Linear(2, 3, bias=False).double()
    found = risk_sandwich(
        model, nn.CrossEntropyLoss(), torch.zeros(1, 2).double(), torch.tensor([1])
    )
    assert (found.hi, found.lower) == (0, 0)
    assert found.upper == torch.inf


def test_an_eigenvalue_that_is_zero_but_for_rounding_bounds_nothing():
    """`g = 0` with a residual in the null space of A, whose lo is 1e-17: psi(g / sqrt(lo)) is 0."""
    torch.manual_seed(0)
    y, positive = torch.tensor([2]), 0
    for _ in range(30):
        first, head = nn.Linear(2, 1).double(), nn.Linear(1, 3).double().requires_grad_(False)
        nn.init.zeros_(first.weight)
        nn.init.zeros_(first.bias)
        e = head.bias.softmax(0) - nn.functional.one_hot(y, 3)[0]
        along = head.weight[:, 0] - head.weight.mean()
        head.weight[:, 0] = along - (along @ e) / (e @ e) * e  # what can be trained
        model, x = nn.Sequential(first, head), torch.randn(1, 2).double()
        found = risk_sandwich(model, nn.CrossEntropyLoss(), x, y)
        positive += int(found.lo > 0)
        assert found.residual_norms > 0.5
        assert found.gradient_norms < 1e-14
        assert found.hi > 1e-3
        assert found.upper == torch.inf
    assert positive > 0  # so that taking lo at its word would fail


@settings(max_examples=100)
@given(instances())
def test_the_gradient_of_a_batch_lies_between_its_bounds(instance: Instance):
    """Thm 2.4."""
    found = pl_bound(instance.model, instance.loss, instance.inputs, instance.targets)
    losses, _ = by_autograd(instance)
    J, m = dense(instance), len(losses)
    sandwich = risk_sandwich(instance.model, instance.loss, instance.inputs, instance.targets)
    JJ = J.flatten(0, 1)
    spectrum = torch.linalg.eigvalsh(JJ @ JJ.T) if JJ.numel() else torch.zeros(1).double()
    assert_close(found.hi, spectrum[-1], rtol=1e-11, atol=1e-15)
    assert abs(found.lo - spectrum[0]) <= 1e-12 * spectrum[-1]
    square = sandwich.residual_norms.square().mean()
    assert_close(found.residual_square, square, rtol=1e-11, atol=1e-28)
    assert found.lower <= found.gradient_square * (1 + 1e-11) + 1e-13 * found.hi * square
    assert found.gradient_square <= found.upper * (1 + 1e-11)
    trained = [p for p in instance.model.parameters() if p.requires_grad]
    outputs = instance.model(instance.inputs)
    smoothing = getattr(instance.loss, "label_smoothing", 0.0)
    mean = FenchelYoungLoss(instance.potential, label_smoothing=smoothing)
    gradients = torch.autograd.grad(mean(outputs, instance.targets), trained)
    expected = sum(g.square().sum() for g in gradients)
    assert_close(found.gradient_square, expected, rtol=1e-10, atol=1e-26)
    # What the theorem says of the risk.
    if instance.potential == Squared():
        assert m * expected / 2 <= losses.mean() * found.hi * (1 + 1e-11)
        if found.lo > 1e-9 * found.hi:
            assert losses.mean() <= m * expected / (2 * found.lo) * (1 + 1e-5)
    if beta := instance.potential.smoothness:
        assert m * expected <= 2 * beta * found.hi * losses.mean() * (1 + 1e-11) + 1e-20
    if found.lo > 1e-9 * found.hi:
        norm = m * found.gradient_square.sqrt() / found.lo.sqrt() * (1 + 1e-5)
        points = instance.targets
        if points.ndim == 1:
            points = nn.functional.one_hot(points, J.shape[1] + 1).double()
        points = (1 - smoothing) * points + smoothing / points.shape[1]
        above = instance.potential.loss_bounds(norm.expand(m), points).upper
        assert (losses <= above + rounding(losses)).all()


def test_equal_inputs_make_the_batch_singular():
    """The condition of Thm 2.4: samples in conflict have lo(K) = 0 although no lo_i is 0."""
    model = nn.Linear(2, 3).double()
    x, y = torch.ones(2, 2).double(), torch.tensor([0, 1])
    assert (risk_sandwich(model, nn.CrossEntropyLoss(), x, y).lo > 2).all()
    assert pl_bound(model, nn.CrossEntropyLoss(), x, y).lo < 1e-14


def test_a_stationary_point_of_high_risk():
    """Dead hidden units and a fitted bias: G = 0, lo >= 1, the risk of the frequencies."""
    model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    with torch.no_grad():
        model[0].bias.fill_(-100)
        model[2].bias.zero_()
    x, y = torch.randn(4, 2).double(), torch.tensor([0, 1, 0, 1])
    sandwich = risk_sandwich(model, nn.CrossEntropyLoss(), x, y)
    batch = pl_bound(model, nn.CrossEntropyLoss(), x, y)
    assert batch.gradient_square < 1e-30
    assert (sandwich.lo >= 1 - 1e-12).all()
    assert_close(sandwich.mean().losses, torch.tensor(2.0).double().log())
    assert (sandwich.gradient_norms > 0.7).all()
    assert batch.lo < 1e-14
