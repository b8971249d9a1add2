"""docs/theory.md, section 0 and Thm 2.2, first row, on random and extreme instances in float64.

Tolerances are of rounding size: a multiple of `eps` times the size of the terms that are added.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from conjopt.potentials import Logistic, Potential, Softmax, Squared

EPS = torch.finfo(torch.float64).eps
POTENTIALS = st.sampled_from([Softmax(), Squared(), Logistic()])
SIZES = st.sampled_from([1, 2, 3, 10, 1000])


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
    if kind == "hard":
        index = torch.randint(k, f.shape[:1], generator=generator)
        return torch.nn.functional.one_hot(index, k).double()
    y = noise.exp() if kind == "soft" else noise.clamp(min=0) + (noise == noise.amax(-1, True))
    return y / y.sum(-1, keepdim=True)


@st.composite
def instances(draw: st.DrawFn) -> tuple[Potential, Tensor, Tensor]:
    potential, k = draw(POTENTIALS), draw(SIZES)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    kinds = ["equal", "extreme", "one winner", "0.001", "1", "30", "10000"]
    f = draw_logits(draw(st.sampled_from(kinds)), k, generator)
    kinds = ["hard", "soft", "sparse", "link", "near link"]
    return potential, draw_targets(draw(st.sampled_from(kinds)), potential, f, generator), f


def assert_close(actual: Tensor, expected: Tensor, size: Tensor | float) -> None:
    """Assert equality up to rounding, `size` being the size of the terms of a sum."""
    excess = (actual - expected).abs() - 64 * EPS * size
    assert (excess <= 0).all(), f"off by {(actual - expected).abs().max()}, size {size}"


@settings(deadline=None)
@given(instances())
def test_loss_is_non_negative_and_is_its_definition(instance: tuple[Potential, Tensor, Tensor]):
    potential, y, f = instance
    loss = potential.loss(y, f)
    definition = potential.value(y) + potential.conjugate(f) - (y * f).sum(-1)
    size = potential.value(y).abs() + potential.conjugate(f).abs() + (y * f).abs().sum(-1) + 1
    assert torch.isfinite(loss).all()
    assert (loss >= -EPS * f.shape[-1]).all()
    assert_close(loss, definition, size)


@settings(deadline=None)
@given(instances())
def test_loss_vanishes_at_the_link_and_only_there(instance: tuple[Potential, Tensor, Tensor]):
    potential, y, f = instance
    assert_close(potential.loss(potential.link(f), f), torch.zeros(3), 1.0)
    residual_norm = (potential.link(f) - y).norm(dim=-1)
    assert (potential.loss(y, f)[residual_norm > 1e-6] > 1e-13).all()


@settings(deadline=None)
@given(instances())
def test_link_is_the_gradient_of_the_conjugate(instance: tuple[Potential, Tensor, Tensor]):
    potential, _, f = instance
    gradient = torch.func.grad(lambda f: potential.conjugate(f).sum())(f)
    assert_close(potential.link(f), gradient, f.abs().max() + 1)


@settings(deadline=None)
@given(instances())
def test_residual_is_the_gradient_of_the_loss_and_tangent(
    instance: tuple[Potential, Tensor, Tensor],
):
    potential, y, f = instance
    residual = potential.link(f) - y
    gradient = torch.func.grad(lambda f: potential.loss(y, f).sum())(f)
    assert_close(gradient, residual, f.abs().max() + y.abs().max() + 1)
    assert_close(potential.tangent_projection(residual), residual, y.abs().max() + 1)


@settings(deadline=None)
@given(instances(), st.integers(0, 2**32))
def test_hessian_product_is_the_derivative_of_the_link(
    instance: tuple[Potential, Tensor, Tensor], seed: int
):
    potential, _, f = instance
    v = torch.randn(f.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    jacobian = torch.func.jacrev(potential.link)(f[0])
    assert_close(potential.hessian_product(f, v)[0], jacobian @ v[0], f.abs().max() + 1)
    tangent = potential.tangent_projection(v)
    assert_close(potential.hessian_product(f, tangent), potential.hessian_product(f, v), 10.0)


@settings(deadline=None)
@given(instances(), st.integers(0, 2**32), st.sampled_from([1e-6, 1e-2, 1.0, 100.0]))
def test_link_is_beta_lipschitz(
    instance: tuple[Potential, Tensor, Tensor], seed: int, radius: float
):
    potential, _, f = instance
    assert potential.smoothness is not None
    v = torch.randn(f.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    g = f + radius * v
    change = (potential.link(g) - potential.link(f)).norm(dim=-1)
    size = 64 * EPS * (1 + potential.link(f).norm(dim=-1))
    assert (change <= potential.smoothness * (g - f).norm(dim=-1) + size).all()
    product = potential.hessian_product(f, v).norm(dim=-1)
    assert (product <= (1 + 64 * EPS) * potential.smoothness * v.norm(dim=-1)).all()


@settings(deadline=None)
@given(instances())
def test_loss_is_at_least_the_squared_residual_over_two_beta(
    instance: tuple[Potential, Tensor, Tensor],
):
    potential, y, f = instance
    assert potential.smoothness is not None
    loss = potential.loss(y, f)
    residual = potential.link(f) - y
    bound = residual.square().sum(-1) / (2 * potential.smoothness)
    # The residual is rounded at the size of y, which moves its square by eps times |y| |e|.
    size = loss + y.norm(dim=-1) * residual.norm(dim=-1) + EPS * f.shape[-1]
    assert (bound <= loss + 64 * EPS * size).all()


@pytest.mark.parametrize(
    ("potential", "f", "v"),
    [
        (Softmax(), (0.0, 0.0), (1.0, -1.0)),
        (Squared(), (3.0,), (1.0,)),
        (Logistic(), (0.0,), (1.0,)),
    ],
)
def test_beta_is_attained(potential: Potential, f: tuple[float, ...], v: tuple[float, ...]):
    at, along = torch.tensor(f, dtype=torch.float64), torch.tensor(v, dtype=torch.float64)
    product = potential.hessian_product(at, along)
    assert_close(product, potential.smoothness * along, 1.0)
    near = potential.link(at + 1e-5 * along)
    bound = (near - potential.link(at)).square().sum() / (2 * potential.smoothness)
    torch.testing.assert_close(potential.loss(near, at), bound, rtol=1e-8, atol=0)
