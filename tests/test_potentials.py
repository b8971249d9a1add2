"""Values, digits and plumbing of the potentials; their laws are in guarantees/."""

import math

import pytest
import scipy.special
import torch
from torch import Tensor
from torch.testing import assert_close

from conjopt.potentials import Logistic, Potential, Softmax, Squared

ALL = [Softmax(), Squared(), Logistic()]


class Plain(Potential):
    """A potential given by `value` and `conjugate` alone, as a user would write it."""

    def __init__(self, known: Potential) -> None:
        self.known = known
        self.on_simplex = known.on_simplex

    def value(self, y: Tensor) -> Tensor:
        return self.known.value(y)

    def conjugate(self, f: Tensor) -> Tensor:
        return self.known.conjugate(f)


def example(k: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(k)
    f, v, y = torch.randn(3, 2, 5, k, generator=generator, dtype=torch.float64)
    return torch.softmax(y, -1), f, v


@pytest.mark.parametrize("potential", ALL, ids=repr)
def test_defaults_agree_with_closed_forms(potential: Potential):
    y, f, v = example()
    plain = Plain(potential)
    assert plain.smoothness is None
    assert_close(plain.link(f), potential.link(f))
    assert_close(plain.hessian_product(f, v), potential.hessian_product(f, v))
    assert_close(plain.tangent_projection(v), potential.tangent_projection(v))
    assert_close(plain.loss(y, f), potential.loss(y, f))


@pytest.mark.parametrize("potential", ALL, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 0, 3), (2, 4, 1)])
def test_shapes_and_dtypes(potential: Potential, dtype: torch.dtype, shape: tuple[int, ...]):
    f, v = torch.ones(shape, dtype=dtype), torch.ones(shape[-1], dtype=dtype)
    y = torch.full(shape, 1 / shape[-1], dtype=dtype)
    for scalar in (potential.value(y), potential.conjugate(f), potential.loss(y, f)):
        assert (scalar.shape, scalar.dtype) == (shape[:-1], dtype)
    for vector in (potential.link(f), potential.hessian_product(f, v)):
        assert (vector.shape, vector.dtype) == (shape, dtype)
    assert potential.tangent_projection(f).shape == shape


@pytest.mark.parametrize("potential", ALL, ids=repr)
def test_vmap_and_double_backward(potential: Potential):
    y, f, v = example()
    y, f, v = y[0], f[0], v[0]
    mapped = torch.func.vmap(potential.hessian_product)(f, v)
    assert_close(mapped, potential.hessian_product(f, v))
    f.requires_grad_()
    (residual,) = torch.autograd.grad(potential.loss(y, f).sum(), f, create_graph=True)
    (second,) = torch.autograd.grad(residual, f, v)
    assert_close(second, potential.hessian_product(f, v))


def test_values_against_scipy():
    y, f, _ = example()
    assert_close(Softmax().value(y), -torch.as_tensor(scipy.special.entr(y.numpy()).sum(-1)))
    assert_close(Softmax().conjugate(f), torch.as_tensor(scipy.special.logsumexp(f.numpy(), -1)))
    kl = scipy.special.rel_entr(y.numpy(), scipy.special.softmax(f.numpy(), -1)).sum(-1)
    assert_close(Softmax().loss(y, f), torch.as_tensor(kl))
    p = scipy.special.expit(f.numpy())
    kl = scipy.special.rel_entr(y.numpy(), p) + scipy.special.rel_entr(1 - y.numpy(), 1 - p)
    assert_close(Logistic().loss(y, f), torch.as_tensor(kl.sum(-1)))
    assert_close(Squared().loss(y, f), (y - f).square().sum(-1) / 2)


@pytest.mark.parametrize("margin", [10.0, 30.0, 300.0])
def test_tiny_losses_and_curvatures_keep_their_digits(margin: float):
    f = torch.tensor([margin, 0.0], dtype=torch.float64)
    y = torch.tensor([1.0, 0.0], dtype=torch.float64)
    tiny = torch.tensor(math.log1p(math.exp(-margin)), dtype=torch.float64)
    close = {"rtol": 1e-13, "atol": 0.0}
    assert_close(Softmax().loss(y, f), tiny, **close)
    assert_close(Logistic().loss(y[:1], f[:1]), tiny, **close)
    assert_close(Logistic().conjugate(-f[:1]), tiny, **close)
    slope = torch.tensor(math.exp(-margin) / (1 + math.exp(-margin)) ** 2, dtype=torch.float64)
    product = Softmax().hessian_product(f, torch.tensor([5.0, 4.0], dtype=torch.float64))
    assert_close(product, torch.stack([slope, -slope]), **close)
    assert_close(Logistic().hessian_product(f[:1], torch.ones(1).double())[0], slope, **close)


def test_conjugate_of_the_logistic_is_exact_where_softplus_of_torch_is_not():
    f = torch.tensor([21.0], dtype=torch.float64)
    exact = torch.tensor(21 + math.log1p(math.exp(-21)), dtype=torch.float64)
    assert_close(Logistic().conjugate(f), exact, rtol=1e-15, atol=0)
    assert torch.nn.functional.softplus(f) != exact


def test_masked_classes_have_finite_losses_and_gradients():
    f = torch.tensor([1.0, -math.inf, 0.0], dtype=torch.float64, requires_grad=True)
    y = torch.tensor([0.5, 0.0, 0.5], dtype=torch.float64)
    loss = Softmax().loss(y, f)
    loss.backward()
    assert_close(loss.detach(), Softmax().loss(y[::2], f.detach()[::2]))
    assert_close(f.grad, Softmax().link(f.detach()) - y)


def test_impossible_targets_have_infinite_losses():
    f = torch.tensor([1.0, -math.inf], dtype=torch.float64)
    assert Softmax().loss(torch.tensor([0.5, 0.5]).double(), f) == math.inf


def test_tangent_space():
    v = torch.tensor([1.0, 2.0, 6.0])
    assert_close(Softmax().tangent_projection(v), torch.tensor([-2.0, -1.0, 3.0]))
    assert Softmax().tangent_projection(v[:1]) == 0
    assert_close(Squared().tangent_projection(v), v)
    assert_close(Logistic().tangent_projection(v), v)


def test_identity_is_by_type():
    assert [repr(p) for p in ALL] == ["Softmax()", "Squared()", "Logistic()"]
    assert [p.smoothness for p in ALL] == [0.5, 1.0, 0.25]
    assert Softmax() == Softmax()
    assert len({Softmax(), Softmax(), Squared(), Logistic()}) == 3
    assert Softmax() != Squared()
    assert Plain(Softmax()) != Plain(Squared())
    assert repr(Plain(Softmax())) == "Plain(known=Softmax(), on_simplex=True)"
