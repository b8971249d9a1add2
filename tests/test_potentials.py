"""Values, digits and plumbing of the potentials; their laws are in guarantees/."""

import copy
import math
import pickle

import numpy as np
import pytest
import scipy.special
import torch
from torch import Tensor
from torch.testing import assert_close

from conjopt.potentials import (
    Entmax,
    Logistic,
    LossBounds,
    Poisson,
    Potential,
    Softmax,
    Sparsemax,
    Squared,
)

SIMPLEX = [Softmax(), Sparsemax(), Entmax(1.01), Entmax(1.3), Entmax(1.5), Entmax(2.0)]
ALL = [*SIMPLEX, Squared(), Logistic(), Poisson()]


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
    assert_close(plain.divergence(y, y.flip(-1)), potential.divergence(y, y.flip(-1)))
    assert_close(plain.generalized_entropy(y), potential.generalized_entropy(y))
    assert torch.equal(plain.contains(y), potential.contains(y))
    index = torch.tensor([[0, 1, 2, 3, 0], [3, 3, 2, 1, 0]])
    assert_close(plain.class_loss(index, f), potential.class_loss(index, f))
    norm = torch.ones(2, 5, dtype=torch.float64)
    assert_close(plain.loss_bounds(norm, y), LossBounds(0 * norm, norm + math.inf))


@pytest.mark.parametrize("potential", ALL, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 0, 3), (2, 4, 1)])
def test_shapes_and_dtypes(potential: Potential, dtype: torch.dtype, shape: tuple[int, ...]):
    f, v = torch.ones(shape, dtype=dtype), torch.ones(shape[-1], dtype=dtype)
    y = torch.full(shape, 1 / shape[-1], dtype=dtype)
    scalars = [potential.value(y), potential.conjugate(f), potential.loss(y, f)]
    scalars += [potential.divergence(y, y), potential.generalized_entropy(y)]
    scalars += [potential.class_loss(torch.zeros(shape[:-1], dtype=torch.long), f)]
    scalars += potential.loss_bounds(f[..., 0], y)
    scalars += potential.loss_bounds(f[..., 0], y, prediction=y)
    for scalar in scalars:
        assert (scalar.shape, scalar.dtype) == (shape[:-1], dtype)
    for vector in (potential.link(f), potential.hessian_product(f, v)):
        assert (vector.shape, vector.dtype) == (shape, dtype)
    assert potential.tangent_projection(f).shape == shape
    inside = potential.contains(y)
    assert (inside.shape, inside.dtype) == (shape[:-1], torch.bool)
    assert inside.all()


@pytest.mark.parametrize("potential", ALL, ids=repr)
def test_arguments_broadcast(potential: Potential):
    y, f, v = example()
    one = y[0, 0]
    assert_close(potential.loss(one, f), potential.loss(one.expand_as(f), f))
    assert_close(potential.loss(y, f[0, 0]), potential.loss(y, f[:1, :1].expand_as(y)))
    assert_close(potential.divergence(y, one), potential.divergence(y, one.expand_as(y)))
    product = potential.hessian_product(f[0, 0], v)
    assert_close(product, potential.hessian_product(f[:1, :1].expand_as(v), v))
    norm = torch.tensor(0.1, dtype=torch.float64)
    assert potential.loss_bounds(norm, y).upper.shape == (2, 5)
    assert potential.loss_bounds(norm.expand(3, 1, 1), y).lower.shape == (3, 2, 5)


@pytest.mark.parametrize("potential", ALL, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_domains(potential: Potential, dtype: torch.dtype):
    points = {
        "corner": ([1.0, 0.0, 0.0], {"simplex", "box", "cone", "space"}),
        "inner": ([0.2, 0.3, 0.5], {"simplex", "box", "cone", "space"}),
        "sum": ([0.2, 0.3, 0.6], {"box", "cone", "space"}),
        "large": ([2.0, 3.0, 0.0], {"cone", "space"}),
        "negative": ([-0.1, 0.6, 0.5], {"space"}),
        "infinite": ([math.inf, 0.0, 0.0], set()),
        "nan": ([math.nan, 0.5, 0.5], set()),
    }
    kinds = {Squared(): "space", Logistic(): "box", Poisson(): "cone"}
    kind = kinds.get(potential, "simplex")
    y = torch.tensor([point for point, _ in points.values()], dtype=dtype)
    assert potential.contains(y).tolist() == [kind in of for _, of in points.values()]


def test_domain_of_a_potential_of_ones_own_is_where_its_value_is_finite():
    class Barrier(Potential):
        def value(self, y: Tensor) -> Tensor:
            return -y.log().sum(-1)

        def conjugate(self, f: Tensor) -> Tensor:
            return -(1 + (-f).log()).sum(-1)

    y = torch.tensor([[1.0, 2.0], [0.0, 1.0], [-1.0, 1.0], [math.inf, 1.0]])
    assert Barrier().contains(y).tolist() == [True, False, False, False]
    assert Barrier().loss_bounds(torch.tensor(3.0), y[0]) == (0, math.inf)


@pytest.mark.parametrize("potential", SIMPLEX, ids=repr)
@pytest.mark.parametrize("k", [10, 10000])
def test_rounded_distributions_are_in_the_simplex(potential: Potential, k: int):
    f = torch.randn(5, k, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.float64):
        assert potential.contains(torch.softmax(f.to(dtype), -1)).all()
        assert potential.contains(potential.link(f.to(dtype))).all()


@pytest.mark.parametrize("potential", ALL, ids=repr)
def test_vmap_and_double_backward(potential: Potential):
    y, f, v = example()
    y, f, v = y[0], f[0], v[0]
    mapped = torch.func.vmap(potential.hessian_product)(f, v)
    assert_close(mapped, potential.hessian_product(f, v))
    assert_close(torch.func.vmap(potential.loss)(y, f), potential.loss(y, f))
    assert_close(torch.func.vmap(potential.link)(f), potential.link(f))
    assert_close(
        torch.func.vmap(potential.divergence)(y, y.flip(-1)), potential.divergence(y, y.flip(-1))
    )
    norm = torch.full((5,), 0.3, dtype=torch.float64)
    bounds = torch.func.vmap(potential.loss_bounds)(norm, y)
    assert_close(tuple(bounds), tuple(potential.loss_bounds(norm, y)))
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
    rate = np.exp(f.numpy())
    deviance = scipy.special.kl_div(y.numpy(), rate).sum(-1)
    assert_close(Poisson().loss(y, f), torch.as_tensor(deviance))
    counts = torch.tensor([0.0, 1.0, 7.0], dtype=torch.float64)
    value = scipy.special.xlogy(counts.numpy(), counts.numpy()) - counts.numpy()
    assert_close(Poisson().value(counts), torch.as_tensor(value.sum()))
    assert_close(Sparsemax().value(y), (y.square().sum(-1) - 1) / 2)
    for order in (1.01, 1.3, 1.5, 2.0):
        power = (torch.as_tensor(y.numpy() ** order).sum(-1) - 1) / (order * (order - 1))
        assert_close(Entmax(order).value(y), power)


def test_poisson_loss_is_that_of_torch_less_its_value_at_the_target():
    f = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = torch.tensor([0.0, 2.0, 5.0], dtype=torch.float64).expand(4, 3)
    criterion = torch.nn.PoissonNLLLoss(reduction="none")
    excess = criterion(f, y) - torch.where(y > 0, y - y * y.clamp(min=1).log(), 0)
    assert_close(Poisson().loss(y, f), excess.sum(-1))
    assert Poisson().loss(y[0], torch.tensor([-math.inf, 0, 0]).double()).isfinite()
    assert Poisson().loss(y[0], torch.tensor([0, -math.inf, 0]).double()) == math.inf


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


@pytest.mark.parametrize("potential", ALL, ids=repr)
def test_divergences_of_tiny_points_are_numbers(potential: Potential):
    """The inverse of a number below the normal ones overflows."""
    for dtype, tiny in ((torch.float32, 1e-44), (torch.float64, 1e-320)):
        y = torch.tensor([tiny, 1.0], dtype=dtype)
        mean = torch.tensor([0.75, 0.25], dtype=dtype)
        expected = potential.divergence(torch.tensor([0.0, 1.0], dtype=dtype), mean)
        assert_close(potential.divergence(y, mean), expected)
        assert torch.isfinite(potential.divergence(mean, y)) or potential == Logistic()


def test_tangent_space():
    v = torch.tensor([1.0, 2.0, 6.0])
    assert_close(Softmax().tangent_projection(v), torch.tensor([-2.0, -1.0, 3.0]))
    assert Softmax().tangent_projection(v[:1]) == 0
    assert_close(Squared().tangent_projection(v), v)
    assert_close(Logistic().tangent_projection(v), v)


def test_classes_give_cross_entropy():
    _, f, _ = example()
    index = torch.tensor([[0, 1, 2, 3, 0], [3, 3, 2, 1, 0]])
    expected = torch.nn.functional.cross_entropy(f.movedim(-1, 1), index, reduction="none")
    assert_close(Softmax().class_loss(index, f), expected)


def test_generalized_entropies_of_predictions():
    y = torch.tensor([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0]], dtype=torch.float64)
    shannon = torch.tensor([1.5 * math.log(2), 0.0], dtype=torch.float64)
    assert_close(Softmax().generalized_entropy(y), shannon)
    gini = torch.tensor([(1 - 0.375) / 2, 0.0], dtype=torch.float64)
    assert_close(Sparsemax().generalized_entropy(y), gini)
    tsallis = torch.tensor([(1 - 0.5**1.5 - 2 * 0.25**1.5) / 0.75, 0.0], dtype=torch.float64)
    assert_close(Entmax(1.5).generalized_entropy(y), tsallis)


def test_bounds_are_a_named_tuple():
    norm, y = torch.tensor(0.5), torch.tensor([1.0, 0.0])
    bounds = Softmax().loss_bounds(norm, y)
    assert isinstance(bounds, LossBounds)
    assert bounds.lower is bounds[0]
    assert bounds.upper is bounds[1]
    assert_close(bounds.lower, -torch.log1p(-norm / math.sqrt(2)))
    assert_close(Poisson().loss_bounds(norm, 4 * y[:1]).lower, norm - 4 * torch.log1p(norm / 4))


def test_potentials_of_equal_settings_are_equal():
    names = ["Softmax()", "Sparsemax()", "Entmax(order=1.01)", "Entmax(order=1.3)"]
    names += ["Entmax(order=1.5)", "Entmax(order=2.0)", "Squared()", "Logistic()", "Poisson()"]
    assert [repr(p) for p in ALL] == names
    assert [p.smoothness for p in ALL] == [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.25, None]
    assert [p for p in ALL if p.on_simplex] == SIMPLEX
    assert Softmax() == Softmax()
    assert len({*ALL, *ALL, Softmax(), Entmax(1.5)}) == len(ALL)
    assert Softmax() != Squared()
    assert Entmax() == Entmax(1.5) != Entmax(1.6)
    assert hash(Entmax(1.5)) == hash(Entmax(1.5))
    assert Entmax(2) == Entmax(2.0)
    assert Entmax(2) != Sparsemax()  # a class of its own, of the same values
    assert Sparsemax().order == 2
    assert Plain(Softmax()) != Plain(Squared())
    assert repr(Plain(Softmax())) == "Plain(known=Softmax(), on_simplex=True)"


@pytest.mark.parametrize("potential", ALL, ids=repr)
def test_potentials_can_be_copied_and_pickled(potential: Potential):
    assert copy.deepcopy(potential) == potential
    assert pickle.loads(pickle.dumps(potential)) == potential
