"""Entmax against references of its own, against its peer, and against autograd."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from conjopt.potentials import Entmax, Softmax, Sparsemax, threshold

ORDERS = [1.0001, 1.01, 1.3, 1.5, 1.7, 1.99, 2.0]
DTYPES = [torch.float32, torch.float64]
EPS = torch.finfo(torch.float64).eps
orders = pytest.mark.parametrize("order", ORDERS)
# torch compiles some derivatives by a function of its own that it has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])


def bisected(f: Tensor, order: float) -> tuple[np.ndarray, np.ndarray]:
    """Return link and conjugate by bisection, to the digits of numpy's longest float."""
    e = np.longdouble(order) - 1
    x = f.detach().numpy().astype(np.longdouble)
    top = x.max(-1, keepdims=True)
    below, low = x - top, np.zeros_like(top)
    high = np.full_like(top, -np.expm1(-e * np.log(np.longdouble(x.shape[-1]))) / e)

    def probabilities(s: np.ndarray) -> np.ndarray:
        inside = np.maximum(e * (below - s), -1)
        with np.errstate(divide="ignore", under="ignore"):
            return np.exp(np.log1p(inside) / e)

    for _ in range(200):
        middle = (low + high) / 2
        above = probabilities(middle).sum(-1, keepdims=True) > 1
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    p = probabilities((low + high) / 2)
    with np.errstate(under="ignore"):
        power = (p ** np.longdouble(order)).sum(-1)
    return p, ((low + high) / 2 + top)[..., 0] + (power - 1) / np.longdouble(order)


def sorted_sparsemax(f: Tensor) -> Tensor:
    z = f.sort(-1, descending=True).values
    count = torch.arange(1, f.shape[-1] + 1, dtype=f.dtype)
    thresholds = (z.cumsum(-1) - 1) / count
    size = (z > thresholds).sum(-1, keepdim=True)
    return (f - thresholds.gather(-1, size - 1)).clamp(min=0)


def sorted_entmax15(f: Tensor) -> Tensor:
    f = f / 2
    z = f.sort(-1, descending=True).values
    count = torch.arange(1, f.shape[-1] + 1, dtype=f.dtype)
    mean = z.cumsum(-1) / count
    spread = z.square().cumsum(-1) - count * mean.square()
    thresholds = mean - ((1 - spread) / count).clamp(min=0).sqrt()
    size = (thresholds <= z).sum(-1, keepdim=True)
    return (f - thresholds.gather(-1, size - 1)).clamp(min=0).square()


@st.composite
def outputs(draw: st.DrawFn) -> Tensor:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    k, scale = draw(st.sampled_from([1, 2, 3, 10, 1000])), draw(st.sampled_from(SCALES))
    f = scale * torch.randn(3, k, generator=generator, dtype=torch.float64)
    shape = draw(st.sampled_from(["random", "equal", "sign", "winner", "ties"]))
    if shape == "equal":
        f[:] = f[:, :1]
    elif shape == "sign":
        f = scale * f.sign()
    elif shape == "winner":
        f[:, 0] += scale
    elif shape == "ties":
        f = scale * (f / scale).round()
    return f


SCALES = [1e-6, 1e-3, 0.1, 1.0, 10.0, 100.0, 1e4]


@dtypes
@orders
@settings(max_examples=30)
@given(f=outputs())
def test_link_conjugate_and_loss_have_all_digits(order: float, dtype: torch.dtype, f: Tensor):
    f, entmax, eps = f.to(dtype), Entmax(order), torch.finfo(dtype).eps
    exact, conjugate = (torch.from_numpy(x.astype(np.float64)) for x in bisected(f, order))
    link = entmax.link(f).double()
    assert_close(link, exact, rtol=0, atol=16 * eps)
    assert_close(link.sum(-1), torch.ones(3).double(), rtol=0, atol=(16 + f.shape[-1]) * eps)
    size = float(1 + f.abs().max())
    assert_close(entmax.conjugate(f).double(), conjugate, rtol=0, atol=16 * eps * size)
    index = torch.arange(3) % f.shape[-1]
    loss = conjugate - f.double().gather(-1, index.unsqueeze(-1)).squeeze(-1)
    slack = 16 * EPS * (1 + f.double().abs().amax(-1)) + 16 * eps * (1 + loss)
    for actual in (
        entmax.class_loss(index, f),
        entmax.loss(torch.nn.functional.one_hot(index, f.shape[-1]).to(dtype), f),
    ):
        assert ((actual.double() - loss).abs() <= slack).all(), (actual, loss)


@given(f=outputs())
def test_orders_with_closed_forms_agree_with_sorting(f: Tensor):
    f = f - f.amax(-1, keepdim=True)  # sorting sums the outputs themselves, and so loses digits
    tolerance = 16 * EPS * (1 + f.clamp(min=-2).norm(dim=-1).max().item())
    assert_close(Sparsemax().link(f), sorted_sparsemax(f), rtol=0, atol=tolerance)
    f = f.clamp(min=-3)  # at 2 the support ends
    assert_close(Entmax(1.5).link(f), sorted_entmax15(f), rtol=0, atol=1e3 * tolerance)


@dtypes
@pytest.mark.parametrize("order", [1.5, 2.0])
@pytest.mark.parametrize("k", [1000, 10000])
def test_small_probabilities_of_many_classes_keep_their_digits(
    order: float, dtype: torch.dtype, k: int
):
    for f in (torch.zeros(k), torch.linspace(0, 1 / k, k)):
        f = f.to(dtype)
        exact = torch.from_numpy(bisected(f[None], order)[0][0].astype(np.float64))
        tolerance = {"rtol": 32 * torch.finfo(dtype).eps, "atol": 0.0}
        assert_close(Entmax(order).link(f).double(), exact, **tolerance)


@orders
def test_tiny_probabilities_do_not_spoil_the_loss(order: float):
    """Where the probability of the target underflows, or does not but its inverse overflows."""
    for dtype, margin in itertools.product(
        DTYPES, (30, 62, 80, 95, 99.95, 300, 700, 740, 742.5, 760, 2e3, 1e4)
    ):
        f = torch.tensor([0.0, -margin, -2 * margin], dtype=dtype)
        exact = bisected(f[None], order)[1].astype(np.float64)[0]
        tolerance = {"rtol": 64 * torch.finfo(dtype).eps, "atol": 0.0, "check_dtype": False}
        y = torch.tensor([0.0, 1.0, 0.0], dtype=dtype)
        loss = torch.tensor(exact + float(-f[1]), dtype=torch.float64)
        assert_close(Entmax(order).class_loss(torch.tensor(1), f), loss, **tolerance)
        assert_close(Entmax(order).loss(y, f), loss, **tolerance)
        soft = torch.tensor([0.5, 0.25, 0.25], dtype=dtype)
        loss = exact + 0.75 * margin + Entmax(order).value(soft.double())
        assert_close(Entmax(order).loss(soft, f), loss, **tolerance)


def test_divergence_from_a_mean_whose_inverse_overflows():
    y = torch.tensor([1.0, 0.0], dtype=torch.float64)
    mean = torch.tensor([1e-310, 1.0], dtype=torch.float64)
    for order in (1.01, 1.3, 1.7):
        exact = (1 - order * 1e-310 ** (order - 1)) / (order * (order - 1)) + 1 / order
        actual = Entmax(order).divergence(y, mean)
        assert_close(actual, torch.tensor(exact, dtype=torch.float64), rtol=1e-12, atol=0)


@orders
def test_small_losses_keep_their_digits(order: float):
    generator = torch.Generator().manual_seed(0)
    f = torch.randn(50, 5, generator=generator, dtype=torch.float64) / 8
    v = torch.randn(50, 5, generator=generator, dtype=torch.float64)
    entmax = Entmax(order)
    p, width = entmax.link(f), 1e-6
    inside = (p > 0.01).all(-1)
    assert inside.sum() >= 5
    loss = entmax.loss(entmax.link(f + width * v), f)
    second = width**2 * (v * entmax.hessian_product(f, v)).sum(-1) / 2
    assert_close(loss[inside], second[inside], rtol=1e-3, atol=0)  # 1e-6 of the third order


def test_order_near_one_is_near_softmax():
    f = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    near, y = Entmax(1 + 1e-9), torch.softmax(2 * f.flip(-1), -1)
    assert_close(near.link(f), Softmax().link(f), rtol=1e-7, atol=0)
    assert_close(near.loss(y, f), Softmax().loss(y, f), rtol=1e-7, atol=0)
    assert_close(near.conjugate(f), Softmax().conjugate(f), rtol=1e-7, atol=0)
    assert_close(near.divergence(y, Softmax().link(f)), Softmax().loss(y, f), rtol=1e-7, atol=0)
    assert_close(near.hessian_product(f, y), Softmax().hessian_product(f, y), rtol=1e-6, atol=1e-8)


# The package `entmax`, by the authors of the links.


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("k", [2, 5, 300])
def test_agrees_with_the_package_entmax(scale: float, k: int):
    peer = pytest.importorskip("entmax")
    generator = torch.Generator().manual_seed(k)
    f = scale * torch.randn(20, k, generator=generator, dtype=torch.float64)
    index = torch.randint(k, (20,), generator=generator)
    close = {"rtol": 0, "atol": 1e-13 * (1 + scale)}
    for ours, link, loss in [
        (Sparsemax(), peer.sparsemax, peer.SparsemaxLoss(reduction="none")),
        (Entmax(1.5), peer.entmax15, peer.Entmax15Loss(k=None, reduction="none")),
    ]:
        assert_close(ours.link(f), link(f, dim=-1), **close)
        assert_close(ours.class_loss(index, f), loss(f, index), **close)
    for order in (1.01, 1.3, 1.7):
        ours = Entmax(order)
        link = peer.entmax_bisect(f, alpha=order, dim=-1, n_iter=60)
        assert_close(ours.link(f), link, **close)
        loss = peer.EntmaxBisectLoss(alpha=order, n_iter=60, reduction="none")
        # Their loss divides by order - 1 what is left of a difference.
        close_loss = {"rtol": 0, "atol": close["atol"] / (order - 1)}
        assert_close(ours.class_loss(index, f), loss(f, index), **close_loss)
        x = f[:3].clone().requires_grad_()
        v = torch.randn(3, k, generator=generator, dtype=torch.float64)
        theirs = peer.entmax_bisect(x, alpha=order, dim=-1, n_iter=60)
        (theirs,) = torch.autograd.grad(theirs, x, v)
        assert_close(ours.hessian_product(x.detach(), v), theirs, rtol=1e-7, atol=1e-9)


# Derivatives.


def clear_of_edges(order: float, shape: tuple[int, ...] = (3, 4)) -> Tensor:
    """Return outputs with classes within and outside of the support, none of them near its edge."""
    f = torch.tensor([[0.0, 0.3, -0.1, 0.1], [1.0, 0.7, -5.0, -6.0], [9.0, 0.0, 1.0, -2.0]])
    f = f.double()[: math.prod(shape[:-1])].reshape(shape)
    p = Entmax(order).link(f)
    if order >= 1.3:  # below, nothing is out of the support for so small margins
        assert bool((p == 0).any())
    return f


DERIVATIVE_ORDERS = [1.01, 1.3, 1.5, 1.7, 2.0]
derivatives = pytest.mark.parametrize("order", DERIVATIVE_ORDERS)
CHECKS = {"check_forward_ad": True, "check_batched_grad": True}


def functions(order: float) -> list:
    entmax = Entmax(order)
    index = torch.tensor([0, 1, 3])
    y = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.5, 0.0, 0.5, 0.0], [0.0, 1.0, 0.0, 0.0]]).double()
    v = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return [
        entmax.link,
        entmax.conjugate,
        lambda f: entmax.loss(y, f),
        lambda f: entmax.class_loss(index, f),
        lambda f: entmax.hessian_product(f, v),
    ]


@derivatives
@pytest.mark.parametrize("which", range(5))
def test_derivatives_are_those_of_the_values(order: float, which: int):
    f = clear_of_edges(order).requires_grad_()
    function = functions(order)[which]
    assert torch.autograd.gradcheck(function, f, **CHECKS, check_batched_forward_grad=True)
    if (order, which) == (2, 4):
        return  # the Hessian of sparsemax is constant
    assert torch.autograd.gradgradcheck(
        function, f, check_batched_grad=True, check_fwd_over_rev=True
    )


@derivatives
def test_derivatives_in_the_target(order: float):
    """On the simplex: the derivative of the potential is known up to a constant."""
    entmax, f = Entmax(order), clear_of_edges(order)
    y = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    both = f.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda y: entmax.loss(y.softmax(-1), f), y, **CHECKS)
    assert torch.autograd.gradcheck(lambda y, f: entmax.loss(y.softmax(-1), f), (y, both), **CHECKS)
    assert torch.autograd.gradgradcheck(lambda y, f: entmax.loss(y.softmax(-1), f), (y, both))


@orders
def test_hessian_is_the_derivative_of_the_residual(order: float):
    entmax, f = Entmax(order), clear_of_edges(order)
    eye = torch.eye(4, dtype=torch.float64)
    index = torch.tensor(2)
    for row in f:
        columns = entmax.hessian_product(row, eye)
        p = entmax.link(row)
        w = torch.where(p > 0, p ** (2 - order), 0)
        dense = w.diag() - torch.outer(w, w) / w.sum()
        assert_close(columns, dense)
        assert_close(torch.func.hessian(entmax.conjugate)(row), dense)
        assert_close(torch.func.hessian(lambda f: entmax.class_loss(index, f))(row), dense)
        assert_close(torch.func.hessian(lambda f: entmax.loss(eye[1], f))(row), dense)
        assert_close(torch.func.jacrev(torch.func.jacfwd(entmax.conjugate))(row), dense)
        assert_close(torch.func.jacrev(torch.func.jacrev(entmax.conjugate))(row), dense)


@orders
def test_vmap(order: float):
    entmax, f = Entmax(order), clear_of_edges(order)
    index, y = torch.tensor([0, 1, 3]), torch.softmax(f.flip(-1), -1)
    vmap = torch.func.vmap
    assert_close(vmap(entmax.link)(f), entmax.link(f))
    assert_close(vmap(entmax.link, in_dims=1)(f.mT), entmax.link(f))
    assert_close(vmap(entmax.conjugate)(f), entmax.conjugate(f))
    assert_close(vmap(entmax.loss)(y, f), entmax.loss(y, f))
    assert_close(vmap(entmax.class_loss)(index, f), entmax.class_loss(index, f))
    assert_close(vmap(entmax.loss, in_dims=(None, 0))(y[0], f), entmax.loss(y[0], f))
    assert_close(
        vmap(entmax.class_loss, in_dims=(0, None))(index, f[0]),
        entmax.class_loss(index, f[:1].expand(3, 4)),
    )
    gradients = vmap(torch.func.grad(entmax.class_loss, argnums=1))(index, f)
    assert_close(gradients, entmax.link(f) - torch.eye(4, dtype=torch.float64)[index])
    nested = vmap(vmap(entmax.link, in_dims=1, out_dims=1))(f.expand(2, 3, 4).mT).mT
    assert_close(nested, entmax.link(f).expand(2, 3, 4))
    hessians = vmap(torch.func.hessian(entmax.conjugate))(f)
    assert_close(hessians[1], torch.func.hessian(entmax.conjugate)(f[1]))


@pytest.mark.filterwarnings("ignore:.* should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("order", [1.3, 1.5, 2.0])
def test_compiles_to_one_graph(order: float, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(threshold, "STEPS", 6)  # enough for few classes, and sooner compiled
    entmax, generator = Entmax(order), torch.Generator().manual_seed(0)

    torch.compiler.reset()
    compiled = torch.compile(entmax.class_loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for n, k in [(3, 4), (5, 7)]:
        f = torch.randn(n, k, generator=generator, dtype=torch.float64).requires_grad_()
        index = torch.randint(k, (n,), generator=generator)
        actual, expected = compiled(index, f), entmax.class_loss(index, f)
        assert_close(actual, expected)
        gradients = [torch.autograd.grad(losses.sum(), f)[0] for losses in (actual, expected)]
        assert_close(*gradients)
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore:.* should not be instantiated:DeprecationWarning")
def test_compiles_for_several_orders(monkeypatch: pytest.MonkeyPatch):
    """torch.compile takes numbers that change for symbols, which the order must not become."""
    monkeypatch.setattr(threshold, "STEPS", 6)
    torch.compiler.reset()
    f = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y = torch.softmax(f.detach().flip(-1), -1)
    for order, name in [(1.3, "link"), (1.7, "link"), (1.5, "link"), (1.6, "conjugate")]:
        function = getattr(Entmax(order), name)
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        assert_close(compiled(f), function(f))
    compiled = torch.compile(Entmax(1.5).loss, fullgraph=True, backend="aot_eager")
    (gradient,) = torch.autograd.grad(compiled(y, f).sum(), f)
    assert_close(gradient, Entmax(1.5).link(f) - y)
    torch.compiler.reset()


# Inputs that are not ordinary.


@dtypes
@orders
def test_extreme_outputs(order: float, dtype: torch.dtype):
    f = torch.tensor([[1e4, -1e4, 0.0], [1e4, 1e4, -1e4], [-1e4, -1e4, -1e4]], dtype=dtype)
    entmax, third = Entmax(order), 1 / 3
    exact = torch.tensor([[1, 0, 0], [0.5, 0.5, 0], [third, third, third]], dtype=dtype)
    assert_close(entmax.link(f), exact, rtol=0, atol=4 * torch.finfo(dtype).eps)
    losses = entmax.class_loss(torch.tensor([0, 0, 0]), f)
    assert losses[0] == 0
    assert torch.isfinite(losses).all()
    worst = entmax.class_loss(torch.tensor([1]), f[:1])
    assert_close(worst, torch.tensor([2e4], dtype=dtype))
    assert torch.isfinite(entmax.hessian_product(f, f)).all()
    big = torch.finfo(dtype).max
    assert_close(
        entmax.link(torch.tensor([big, 0, -big / 2], dtype=dtype)),
        torch.tensor([1, 0, 0], dtype=dtype),
    )


@dtypes
@orders
def test_rows_without_a_meaning_are_nan_as_for_softmax(order: float, dtype: torch.dtype):
    nan, inf = math.nan, math.inf
    f = torch.tensor(
        [[0, 1, 2], [0, nan, 2], [0, inf, 2], [inf, inf, 0], [-inf, -inf, -inf], [-inf, 3, 2]],
        dtype=dtype,
    )
    link = Entmax(order).link(f)
    assert torch.equal(link.isnan(), torch.softmax(f, -1).isnan())
    assert_close(link[0], Entmax(order).link(f[0]))
    assert link[5, 0] == 0
    assert Entmax(order).conjugate(f).isnan().tolist() == [False, True, True, True, True, False]
    assert Entmax(order).class_loss(torch.tensor(0), f[5]) == inf
    assert torch.isfinite(Entmax(order).class_loss(torch.tensor(1), f[5]))


@orders
def test_masked_classes_have_gradients_of_zero(order: float):
    f = torch.tensor([0.5, -math.inf, 1.0], dtype=torch.float64, requires_grad=True)
    y = torch.tensor([0.5, 0.0, 0.5], dtype=torch.float64)
    for loss in (
        Entmax(order).loss(y, f),
        Entmax(order).class_loss(torch.tensor(0), f),
        Entmax(order).conjugate(f),
        Entmax(order).link(f)[0],
    ):
        (gradient,) = torch.autograd.grad(loss, f)
        assert gradient[1] == 0
        assert torch.isfinite(gradient).all()


@orders
def test_empty_batches(order: float):
    entmax, f = Entmax(order), torch.zeros(0, 4, requires_grad=True)
    assert entmax.link(f).shape == (0, 4)
    assert entmax.conjugate(f).shape == (0,)
    assert entmax.loss(f, f).shape == (0,)
    losses = entmax.class_loss(torch.zeros(0, dtype=torch.long), f)
    assert losses.shape == (0,)
    losses.sum().backward()
    assert f.grad.shape == (0, 4)
    assert entmax.hessian_product(f, f).shape == (0, 4)
    assert entmax.loss_bounds(torch.zeros(0), torch.zeros(0, 4)).upper.shape == (0,)


@pytest.mark.parametrize("order", [1.0, 0.5, 2.0001, -1, 0, math.nan, math.inf])
def test_other_orders_are_refused(order: float):
    with pytest.raises(ValueError, match=r"expected a number in \(1, 2\]"):
        Entmax(order)


def test_inputs_are_left_alone():
    f = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    y = torch.softmax(f, -1)
    kept = f.clone(), y.clone()
    for order in (1.3, 1.5, 2.0):
        entmax = Entmax(order)
        entmax.loss(y, f), entmax.conjugate(f), entmax.hessian_product(f, y)
        entmax.class_loss(torch.tensor([0, 1, 2]), f), entmax.divergence(y, y.flip(-1))
        entmax.loss_bounds(f[:, 0].abs(), y, prediction=y), entmax.value(y)
    assert torch.equal(f, kept[0])
    assert torch.equal(y, kept[1])


# The number of Newton steps.


def shapes(k: int, generator: torch.Generator) -> Tensor:
    """Return rows of outputs of many shapes and scales, all at most 0."""
    rows, j = [], torch.arange(k, dtype=torch.float64)
    rand = torch.rand(k, generator=generator, dtype=torch.float64)
    for q in (0.02, 0.1, 0.3, 0.5, 1.0, 2.0, 4.0, 10.0, 50.0):
        rows += [-(rand**q), -(((j + 0.5) / k) ** q)]
    for ratio in (0.01, 0.3, 0.5, 0.7, 0.9, 0.99):
        rows += [-(ratio**j), ratio**j - 1]
    rows += [-j, -j / k, -(j.sqrt()), -(j + 1).log(), rand.log(), -(rand > 0.5).double()]
    rows += [-(rand > 1 / k).double(), -torch.logspace(-9, 1, k, dtype=torch.float64)]
    rows += [-(8 * rand).floor() - 1e-6 * rand, rand.log() * torch.sign(rand - 0.1).clamp(min=0)]
    rows = torch.stack(rows)
    scales = torch.tensor([1e-4, 1e-2, 0.1, 0.5, 1.0, 2.0, 5.0, 20.0, 300.0], dtype=torch.float64)
    return (scales[:, None, None] * rows).flatten(0, 1)


def steps_needed(f: Tensor, order: float, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Return for each row how many fixed steps give the link to 32 `eps`, `(n, k) -> (n,)`."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    links = []
    for steps in [*range(1, threshold.STEPS + 1), 4 * threshold.STEPS]:
        monkeypatch.setattr(threshold, "STEPS", steps)
        links.append(threshold.solve(f, order).p)
    monkeypatch.undo()
    errors = torch.stack([(p - links[-1]).abs().amax(-1) for p in links])
    count = torch.arange(1, len(links) + 1).unsqueeze(-1)
    return (count * (errors > 32 * torch.finfo(f.dtype).eps)).amax(0) + 1


@dtypes
@orders
@pytest.mark.parametrize("k", [2, 5, 40, 1000])
def test_fixed_steps_suffice(
    order: float, dtype: torch.dtype, k: int, monkeypatch: pytest.MonkeyPatch
):
    f = shapes(k, torch.Generator().manual_seed(k)).to(dtype)
    looked = threshold.solve(f, order).p
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    fixed = threshold.solve(f, order).p
    monkeypatch.undo()
    # Both are within rounding of the root, of which p_j has the slope p_j^(2 - a) <= 1.
    assert_close(fixed, looked, rtol=0, atol=32 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("order", [1.01, 1.3, 1.5, 1.7, 2.0])
def test_fixed_steps_suffice_for_the_worst_of_a_search(
    order: float, monkeypatch: pytest.MonkeyPatch
):
    """Climb from the worst shapes: outputs are moved, and kept where more steps are needed."""
    generator = torch.Generator().manual_seed(0)
    f = shapes(300, generator)
    needed = steps_needed(f, order, monkeypatch)
    f = f[needed.topk(4).indices]
    for _ in range(8):
        moved = f.repeat(8, 1)
        noise = torch.randn(moved.shape, generator=generator, dtype=torch.float64)
        moved = torch.cat([f, moved * (0.3 * noise).exp()])
        needed = steps_needed(moved, order, monkeypatch)
        f = moved[needed.topk(4).indices]
    assert needed.max() <= threshold.STEPS


@pytest.mark.parametrize("order", [1.3, 1.5, 1.7, 2.0])
def test_fixed_steps_suffice_for_very_many_classes(order: float, monkeypatch: pytest.MonkeyPatch):
    f = shapes(50000, torch.Generator().manual_seed(0))[::11]
    looked = threshold.solve(f, order).p
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert_close(threshold.solve(f, order).p, looked, rtol=0, atol=32 * EPS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("potential", [Sparsemax(), Entmax(1.5), Entmax(1.3)], ids=repr)
def test_half_precision_is_computed_in_float32(potential: Entmax, dtype: torch.dtype):
    for f in (torch.zeros(512), torch.ones(100_000), torch.linspace(-3, 3, 1000)):
        half = f.to(dtype)
        exact = potential.link(half.float())
        assert torch.equal(potential.link(half), exact.to(dtype))
        assert torch.equal(potential.conjugate(half), potential.conjugate(half.float()).to(dtype))
    assert potential.loss(torch.tensor([0, 0, 1]), torch.zeros(3)).isfinite()  # integer one-hot
    assert potential.class_loss(torch.tensor(2, dtype=torch.uint8), torch.zeros(3)).isfinite()


@pytest.mark.parametrize("order", [1.2, 1.5, 1.7, 2.0])
def test_the_divergence_from_a_sparse_mean(order):
    y = torch.tensor([0.5, 0.3, 0.0, 0.2], dtype=torch.float64)
    mean = torch.tensor([0.6, 0.0, 0.4, 0.0], dtype=torch.float64)
    value = (y**order - mean**order).sum() / (order * (order - 1))
    slope = (mean ** (order - 1) * (y - mean)).sum() / (order - 1)
    assert_close(Entmax(order).divergence(y, mean), value - slope, rtol=1e-12, atol=0)
