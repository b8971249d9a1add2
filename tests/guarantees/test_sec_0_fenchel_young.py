"""docs/theory.md, section 0 and Thm 2.2, first row, on random and extreme instances in float64.

Tolerances are of rounding size: a multiple of `eps` times the size of the terms that are added.
"""

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from conjopt.potentials import (
    Entmax,
    Logistic,
    Poisson,
    Potential,
    Softmax,
    Sparsemax,
    Squared,
)


class Hyperbolic(Potential):
    """A user's own potential, given by its value and its conjugate alone; domain `[-1, 1]^k`."""

    smoothness = 1.0

    def value(self, y: Tensor) -> Tensor:
        return -(1 - y.square()).sqrt().sum(-1)

    def conjugate(self, f: Tensor) -> Tensor:
        return (1 + f.square()).sqrt().sum(-1)


EPS = torch.finfo(torch.float64).eps
ENTMAX = [Entmax(a) for a in (1.0001, 1.01, 1.3, 1.5, 1.7, 2.0)]
SIMPLEX = [Softmax(), Sparsemax(), *ENTMAX]
SMOOTH = [Squared(), Logistic(), Hyperbolic(), *SIMPLEX]
ALL = [*SMOOTH, Poisson()]
SIZES = st.sampled_from([1, 2, 3, 10, 1000])

Instance = tuple[Potential, Tensor, Tensor]


def draw_logits(kind: str, k: int, generator: torch.Generator) -> Tensor:
    noise = torch.randn(3, k, generator=generator, dtype=torch.float64)
    if kind == "equal":
        return noise[:, :1].expand(3, k).clone()
    if kind == "extreme":
        return 1e4 * noise.sign()
    if kind == "one winner":
        return torch.zeros(3, k, dtype=torch.float64).index_fill(1, torch.tensor([0]), 1e4)
    return float(kind) * noise


def draw_targets(kind: str, potential: Potential, f: Tensor, generator: torch.Generator) -> Tensor:
    """Points of the domain: hard, soft, soft with zeros, or the link of `f` or of a near output."""
    k = f.shape[-1]
    noise = torch.randn(f.shape, generator=generator, dtype=torch.float64)
    if kind == "link":
        return potential.link(f)
    if kind == "near link":
        return potential.link(f + 1e-4 * noise)
    if potential == Squared():
        return 100 * noise if kind == "soft" else noise.sign()
    if potential == Logistic():
        return {"hard": (noise > 0).double(), "soft": noise.sigmoid()}.get(kind, noise.clamp(0, 1))
    if potential == Hyperbolic():
        return {"hard": noise.sign(), "soft": noise.tanh()}.get(kind, noise.clamp(-1, 1))
    if potential == Poisson():
        counts = (4 * noise).exp().floor()
        return {"hard": counts, "soft": noise.exp()}.get(kind, noise.clamp(min=0))
    if kind == "hard":
        index = torch.randint(k, f.shape[:1], generator=generator)
        return torch.nn.functional.one_hot(index, k).double()
    if kind == "worst":
        return torch.nn.functional.one_hot(f.argmin(-1), k).double()
    y = noise.exp() if kind == "soft" else noise.clamp(min=0) + (noise == noise.amax(-1, True))
    return y / y.sum(-1, keepdim=True)


@st.composite
def instances(draw: st.DrawFn, potentials: list[Potential]) -> Instance:
    potential, k = draw(st.sampled_from(potentials)), draw(SIZES)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    kinds = ["equal", "extreme", "one winner", "0.001", "1", "30", "300", "10000"]
    f = draw_logits(draw(st.sampled_from(kinds)), k, generator)
    if potential == Poisson():
        f = f.clamp(max=10)  # exp overflows
    kinds = ["hard", "soft", "sparse", "worst", "link", "near link"]
    return potential, draw_targets(draw(st.sampled_from(kinds)), potential, f, generator), f


def noise_like(f: Tensor, seed: int) -> Tensor:
    return torch.randn(f.shape, generator=torch.Generator().manual_seed(seed), dtype=f.dtype)


def size_of_terms(potential: Potential, y: Tensor, f: Tensor) -> Tensor:
    """Return the size of what the definition of the loss adds up."""
    return potential.value(y).abs() + potential.conjugate(f).abs() + (y * f).abs().sum(-1) + 1


def rounding(potential: Potential, y: Tensor, f: Tensor) -> Tensor:
    """Return the size of the terms of the loss: closed forms are free of cancellation."""
    if potential == Hyperbolic():
        return size_of_terms(potential, y, f)
    return 1 + y.abs().sum(-1) + potential.link(f).abs().sum(-1)


def assert_close(actual: Tensor, expected: Tensor, size: Tensor | float) -> None:
    """Assert equality up to rounding, `size` being the size of the terms of a sum."""
    excess = (actual - expected).abs() - 64 * EPS * size
    assert (excess <= 0).all(), f"off by {(actual - expected).abs().max()}, size {size}"


@given(instances(ALL))
def test_loss_is_non_negative_and_is_its_definition(instance: Instance):
    potential, y, f = instance
    loss = potential.loss(y, f)
    definition = potential.value(y) + potential.conjugate(f) - (y * f).sum(-1)
    size = size_of_terms(potential, y, f)
    assert torch.isfinite(loss).all()
    assert (definition >= -64 * EPS * size).all()
    assert (loss >= -4 * EPS * f.shape[-1] * rounding(potential, y, f)).all()
    assert_close(loss, definition, size)


@given(instances(ALL))
def test_loss_vanishes_at_the_link_and_only_there(instance: Instance):
    potential, y, f = instance
    link = potential.link(f)
    assert_close(potential.loss(link, f), torch.zeros(3), rounding(potential, link, f))
    if potential == Hyperbolic():
        return  # the definition cancels: nothing above rounding is left of a small loss
    residual_norm = (link - y).norm(dim=-1)
    assert (potential.loss(y, f)[residual_norm > 1e-6 * (1 + y.norm(dim=-1))] > 1e-13).all()


@given(instances(ALL))
def test_link_is_the_gradient_of_the_conjugate(instance: Instance):
    potential, _, f = instance
    gradient = torch.func.grad(lambda f: potential.conjugate(f).sum())(f)
    link = potential.link(f)
    assert_close(link, gradient, f.abs().max() + link.abs().max() + 1)


@given(instances(ALL))
def test_residual_is_the_gradient_of_the_loss_and_tangent(instance: Instance):
    potential, y, f = instance
    residual = potential.link(f) - y
    gradient = torch.func.grad(lambda f: potential.loss(y, f).sum())(f)
    size = f.abs().max() + y.abs().max() + residual.abs().max() + 1
    assert_close(gradient, residual, size)
    assert_close(potential.tangent_projection(residual), residual, size)


@given(instances(SIMPLEX), st.integers(0, 2**32))
def test_loss_of_a_class_is_the_loss_of_the_one_hot_target(instance: Instance, seed: int):
    potential, _, f = instance
    k = f.shape[-1]
    index = torch.randint(k, (3,), generator=torch.Generator().manual_seed(seed))
    one_hot = torch.nn.functional.one_hot(index, k).double()
    loss = potential.class_loss(index, f)
    assert_close(loss, potential.loss(one_hot, f), 1 + loss)
    gradient = torch.func.grad(lambda f: potential.class_loss(index, f).sum())(f)
    assert_close(gradient, potential.link(f) - one_hot, 1.0)


@pytest.mark.parametrize("potential", SIMPLEX, ids=repr)
@pytest.mark.parametrize("f", [0.0, -3.0, 1e4])
def test_one_class_has_nothing_to_lose(potential: Potential, f: float):
    outputs, y = torch.tensor([f], dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    assert potential.link(outputs) == 1
    assert potential.loss(y, outputs) == 0
    assert potential.class_loss(torch.tensor(0), outputs) == 0
    assert potential.conjugate(outputs) == f
    assert potential.hessian_product(outputs, y) == 0


@given(instances(ALL), st.integers(0, 2**32))
def test_potential_is_its_biconjugate(instance: Instance, seed: int):
    """`Phi(y)` is the greatest `<y, f> - Phi*(f)`, attained where `y` is the link of `f`."""
    potential, y, f = instance
    below = (y * f).sum(-1) - potential.conjugate(f)
    assert (below <= potential.value(y) + 64 * EPS * size_of_terms(potential, y, f)).all()
    link = potential.link(f)
    attained = (link * f).sum(-1) - potential.conjugate(f)
    assert_close(attained, potential.value(link), size_of_terms(potential, link, f))
    # In the interior the maximizer is the gradient of Phi.
    inner = draw_targets("soft", potential, f, torch.Generator().manual_seed(seed))
    best = torch.func.grad(lambda y: potential.value(y).sum())(inner)
    size = size_of_terms(potential, inner, best) + best.abs().amax(-1)
    assert_close(potential.link(best), inner, (size * (1 + inner.norm(dim=-1))).unsqueeze(-1))
    attained = (inner * best).sum(-1) - potential.conjugate(best)
    assert_close(attained, potential.value(inner), size)


@given(instances(ALL), st.integers(0, 2**32))
def test_hessian_product_is_the_derivative_of_the_link(instance: Instance, seed: int):
    potential, _, f = instance
    v = noise_like(f, seed)
    jacobian = torch.func.jacrev(potential.link)(f[0])
    size = (f.abs().max() + potential.link(f).abs().max() + 1) * (1 + v.abs().max())
    assert_close(potential.hessian_product(f, v)[0], jacobian @ v[0], size)
    tangent = potential.tangent_projection(v)
    product = potential.hessian_product(f, tangent)
    assert_close(product, potential.hessian_product(f, v), 10.0)


def support(potential: Potential, f: Tensor) -> Tensor:
    return potential.link(f) > 0 if potential.on_simplex else torch.ones_like(f)


@given(st.sampled_from(ALL), SIZES, st.sampled_from([0.001, 0.3, 1.0, 3.0]), st.integers(0, 2**32))
def test_hessian_product_is_the_limit_of_differences_of_the_link(
    potential: Potential, k: int, scale: float, seed: int
):
    """The tolerance is that of central differences, extrapolated to order 4 in the width."""
    generator = torch.Generator().manual_seed(seed)
    f = scale * torch.randn(3, k, generator=generator, dtype=torch.float64)
    v = torch.randn(3, k, generator=generator, dtype=torch.float64)

    def slope(width: float) -> Tensor:
        return (potential.link(f + width * v) - potential.link(f - width * v)) / (2 * width)

    width = 1e-4
    product, slopes = potential.hessian_product(f, v), (4 * slope(width / 2) - slope(width)) / 3
    # Within reach of a change of the support, at twice the width for safety, the link has a kink.
    supports = [support(potential, f + t * width * v) for t in (-2, -1, -0.5, 0, 0.5, 1, 2)]
    smooth = (torch.stack(supports) == supports[0]).all(0).all(-1)
    if isinstance(potential, Entmax) and 1.01 < potential.order < 2:
        p = potential.link(f)  # p^(2 - a) has an unbounded derivative towards the edge
        smooth &= (torch.where(p > 0, p ** (potential.order - 1), 1) > 0.02).all(-1)
    scale_of_link = potential.link(f).norm(dim=-1, keepdim=True) + 1
    error = (product - slopes).abs() / (scale_of_link * (1 + v.abs().max()) ** 5)
    assert (error[smooth] <= 1e-8).all(), error[smooth].max()


@given(instances(SMOOTH), st.integers(0, 2**32), st.sampled_from([1e-6, 1e-2, 1.0, 100.0]))
def test_link_is_beta_lipschitz(instance: Instance, seed: int, radius: float):
    potential, _, f = instance
    assert potential.smoothness is not None
    v = noise_like(f, seed)
    g = f + radius * v
    change = (potential.link(g) - potential.link(f)).norm(dim=-1)
    size = 64 * EPS * (1 + potential.link(f).norm(dim=-1))
    assert (change <= potential.smoothness * (g - f).norm(dim=-1) + size).all()
    product = potential.hessian_product(f, v).norm(dim=-1)
    assert (product <= (1 + 64 * EPS) * potential.smoothness * v.norm(dim=-1)).all()


@given(instances(SMOOTH))
def test_loss_is_at_least_the_squared_residual_over_two_beta(instance: Instance):
    potential, y, f = instance
    assert potential.smoothness is not None
    loss = potential.loss(y, f)
    residual = potential.link(f) - y
    bound = residual.square().sum(-1) / (2 * potential.smoothness)
    # The residual is rounded at the size of y, which moves its square by eps times |y| |e|.
    size = loss + y.norm(dim=-1) * residual.norm(dim=-1) + EPS * f.shape[-1]
    if potential == Hyperbolic():
        size = size + size_of_terms(potential, y, f)
    assert (bound <= loss + 64 * EPS * size).all()


@pytest.mark.parametrize(
    ("potential", "beta", "f", "v"),
    [
        (Softmax(), 1 / 2, (0.0, 0.0), (1.0, -1.0)),
        (Squared(), 1.0, (3.0,), (1.0,)),
        (Logistic(), 1 / 4, (0.0,), (1.0,)),
        (Sparsemax(), 1.0, (0.0, 0.0), (1.0, -1.0)),
        (Entmax(2.0), 1.0, (0.0, 0.0, 0.0), (1.0, 1.0, -2.0)),
        (Hyperbolic(), 1.0, (0.0,), (1.0,)),
    ],
    ids=repr,
)
def test_beta_is_attained(
    potential: Potential, beta: float, f: tuple[float, ...], v: tuple[float, ...]
):
    assert potential.smoothness == beta
    at, along = torch.tensor(f, dtype=torch.float64), torch.tensor(v, dtype=torch.float64)
    product = potential.hessian_product(at, along)
    assert_close(product, beta * along, 1.0)
    near = potential.link(at + 1e-5 * along)
    bound = (near - potential.link(at)).square().sum() / (2 * beta)
    # To second order in the step; the definition alone cancels all but a few digits.
    tolerance = {"rtol": 1e-8, "atol": 16 * EPS if potential == Hyperbolic() else 0.0}
    torch.testing.assert_close(potential.loss(near, at), bound, **tolerance)


@pytest.mark.parametrize("order", [1.2, 1.5, 1.8])
def test_no_constant_below_one_serves_entmax_for_every_k(order: float):
    """At `p ~ |v|^q`, `v = (1, -1/N, ...)`, the slope is `(1 + 1/N) / (1 + N^(1-q))^(2/q)`."""
    entmax, q = Entmax(order), 2 / (3 - order)
    assert entmax.smoothness == 1
    slopes = []
    for n in [1, 10, 10**3, 10**5, 10**6]:
        v = torch.full((n + 1,), -1 / n, dtype=torch.float64)
        v[0] = 1
        p = v.abs() ** q / (v.abs() ** q).sum()
        f = p ** (order - 1) / (order - 1)
        product = entmax.hessian_product(f, v)
        slopes.append((v @ product / v.square().sum()).item())
        expected = (1 + 1 / n) / (1 + n ** (1 - q)) ** (2 / q)
        assert slopes[-1] == pytest.approx(expected, rel=1e-9)  # n terms of eps each, and more
        assert product.norm() <= v.norm()
    assert slopes[0] == pytest.approx(2 ** (order - 2))  # right for k = 2, and wrong for large k
    assert slopes[-1] > 2 ** (order - 2)
    assert slopes[-1] > 1 - 2 * 10 ** (6 * (1 - q))


def test_poisson_has_no_beta():
    assert Poisson().smoothness is None
    f = torch.linspace(0, 20, 5, dtype=torch.float64).unsqueeze(-1)
    assert_close(Poisson().hessian_product(f, torch.ones_like(f)), f.exp(), f.exp())


@given(instances(SIMPLEX), st.integers(0, 2**32))
def test_masked_classes_are_no_classes(instance: Instance, seed: int):
    potential, _, f = instance
    k = f.shape[-1]
    masked = noise_like(torch.zeros(k, dtype=torch.float64), seed) > 0
    masked[seed % k] = False
    hidden = torch.where(masked, -math.inf, f)
    y = draw_targets("sparse", potential, f[:, ~masked], torch.Generator().manual_seed(seed))
    wide = torch.zeros_like(f)
    wide[:, ~masked] = y
    loss = potential.loss(y, f[:, ~masked])
    assert_close(potential.loss(wide, hidden), loss, 1 + loss)
    assert_close(
        potential.conjugate(hidden), potential.conjugate(f[:, ~masked]), 1 + f.abs().amax(-1)
    )
    link = potential.link(hidden)
    assert (link[:, masked] == 0).all()
    assert_close(link[:, ~masked], potential.link(f[:, ~masked]), 1.0)
    gradient = torch.func.grad(lambda f: potential.loss(wide, f).sum())(hidden)
    assert_close(gradient, link - wide, 1.0)
    product = potential.hessian_product(hidden, noise_like(f, seed))
    assert (product[:, masked] == 0).all()
    assert torch.isfinite(product).all()
    index = (~masked).nonzero()[0].expand(3)
    one_hot = torch.nn.functional.one_hot(index, k).double()
    loss = potential.loss(one_hot, hidden)
    assert_close(potential.class_loss(index, hidden), loss, 1 + loss)


@given(instances(ALL), st.integers(0, 2**32))
def test_divergence_is_non_negative_and_is_its_definition(instance: Instance, seed: int):
    potential, y, f = instance
    mean = draw_targets("soft", potential, f, torch.Generator().manual_seed(seed))
    divergence = potential.divergence(y, mean)
    slope = torch.func.grad(lambda y: potential.value(y).sum())(mean)
    definition = potential.value(y) - potential.value(mean) - (slope * (y - mean)).sum(-1)
    size = potential.value(y).abs() + potential.value(mean).abs() + 1
    size = size + (slope * (y.abs() + mean.abs())).abs().sum(-1)
    assert_close(divergence, definition, size)
    size = size if potential == Hyperbolic() else 1 + y.abs().sum(-1) + mean.abs().sum(-1)
    assert (divergence >= -4 * EPS * f.shape[-1] * size).all()
    assert_close(potential.divergence(y, y), torch.zeros(3), 0.0)
    # The loss of an output is the divergence from its link where that link is in the interior.
    loss = potential.loss(y, slope)
    size = size + size_of_terms(potential, y, slope) + potential.link(slope).abs().sum(-1)
    assert_close(loss, divergence, size)


ALMOST_ONE = torch.tensor([[1 - EPS / 2], [1.0], [1.0]], dtype=torch.float64)


@example((Logistic(), ALMOST_ONE, torch.logit(ALMOST_ONE)))
@given(instances(ALL))
def test_mean_divergence_from_the_mean_is_the_generalized_entropy(instance: Instance):
    """Def 1.1: `E Phi(Y) - Phi(E Y) = E D(Y, E Y)`."""
    potential, y, _ = instance
    # A mean that rounds to 0, or to 1 for Logistic, has another support than its points, which
    # `divergence` excludes.
    y = torch.where(y.abs() < 1e-300, 0, y)
    if potential == Logistic():
        y = torch.where(1 - y < 4 * EPS, 1, y)
    weights = torch.tensor([0.25, 0.25, 0.5], dtype=torch.float64)  # exact in binary
    mean = weights @ y
    entropy = weights @ potential.value(y) - potential.value(mean)
    slope = torch.func.grad(lambda y: potential.value(y).sum())(mean)
    rises = torch.where(y == mean, 0, slope).abs() * (y.abs() + mean.abs())
    size = (weights @ potential.value(y)).abs() + potential.value(mean).abs() + 1
    size = size + weights @ rises.sum(-1)
    assert_close(weights @ potential.divergence(y, mean), entropy, size)
    assert entropy >= -64 * EPS * size


@pytest.mark.parametrize("potential", [*SIMPLEX, Logistic()], ids=repr)
def test_generalized_entropy_of_a_prediction_is_that_of_hard_targets(potential: Potential):
    mean = torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=torch.float64)
    hard, weights = torch.eye(4, dtype=torch.float64), mean
    if potential == Logistic():  # independent coordinates
        hard = torch.cartesian_prod(*[torch.tensor([0.0, 1.0]).double()] * 4)
        weights = torch.where(hard > 0, mean, 1 - mean).prod(-1)
    entropy = weights @ potential.value(hard) - potential.value(weights @ hard)
    assert_close(potential.generalized_entropy(mean), entropy, 1.0)
    expected = {Softmax(): 1.75 * math.log(2), Sparsemax(): (1 - mean @ mean) / 2}
    if potential in expected:
        assert float(entropy) == pytest.approx(float(expected[potential]), rel=1e-15)
