"""docs/theory.md, Thm 2.2: every row of the table, on random and extreme instances.

The bounds are functions of a residual norm that is itself rounded. So they are taken at the norm
moved by its own rounding error, `NORM` times `eps`, and nothing else is allowed for but the
rounding of the loss. For one-hot softmax, whose upper bound has the slope `exp(l)` in `rho`, this
amounts to the `eps * exp(l)` that the theorem speaks of.
"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from conjopt.potentials import Entmax, Logistic, Poisson, Potential, Softmax, Sparsemax, Squared

EPS = torch.finfo(torch.float64).eps
NORM = 16
ORDERS = [1.0001, 1.01, 1.3, 1.5, 1.7, 2.0]
ENTMAX = [Entmax(a) for a in ORDERS]
SIMPLEX = [Softmax(), Sparsemax(), *ENTMAX]
ALL = [Squared(), Logistic(), Poisson(), *SIMPLEX]
SIZES = st.sampled_from([1, 2, 3, 10, 300])
SEEDS = st.integers(0, 2**32)
DTYPES = st.sampled_from([torch.float32, torch.float64])


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def draw_targets(kind: str, potential: Potential, k: int, generator: torch.Generator) -> Tensor:
    noise = torch.randn(3, k, generator=generator, dtype=torch.float64)
    if potential == Squared():
        return 100 * noise if kind == "soft" else noise.sign()
    if potential == Logistic():
        soft = (2 * noise).sigmoid()
        mixed = torch.where(noise.abs() < 0.5, soft, (noise > 0).double())
        return {"hard": (noise > 0).double(), "soft": soft}.get(kind, mixed)
    if potential == Poisson():
        counts = (3 * noise).exp().floor()
        return {"hard": counts, "soft": noise.exp()}.get(kind, noise.clamp(min=0))
    if kind == "hard":
        index = torch.randint(k, (3,), generator=generator)
        return torch.nn.functional.one_hot(index, k).double()
    y = noise.exp() if kind == "soft" else noise.clamp(min=0) + (noise == noise.amax(-1, True))
    return y / y.sum(-1, keepdim=True)


@st.composite
def instances(
    draw: st.DrawFn, potentials: list[Potential], kinds: tuple[str, ...] = ("hard", "soft", "mixed")
) -> tuple[Potential, Tensor, Tensor]:
    """Draw outputs far from and near to those that give the targets, or give another class."""
    potential, k, dtype = draw(st.sampled_from(potentials)), draw(SIZES), draw(DTYPES)
    generator = torch.Generator().manual_seed(draw(SEEDS))
    y = draw_targets(draw(st.sampled_from(kinds)), potential, k, generator)
    noise = torch.randn(3, k, generator=generator, dtype=torch.float64)
    scale = draw(st.sampled_from([1e-6, 1e-3, 0.1, 1.0, 5.0, 30.0, 1e4]))
    center = draw(st.sampled_from(["zero", "near", "margin", "wrong"]))
    best = torch.zeros_like(y)
    if center == "near" and potential == Squared():
        best = y
    elif center == "near":
        slope = torch.func.grad(lambda y: potential.value(y).sum())(y)
        best = slope.nan_to_num().clamp(-20, 20)
    elif center in ("margin", "wrong"):
        margin = draw(st.sampled_from([0.5, 1.0, 3.0, 10.0, 30.0]))
        best = margin * (y if center == "margin" else y.roll(1, -1))
    f = best + scale * noise
    if potential == Poisson():
        f = f.clamp(max=10)
    return potential, y.to(dtype), f.to(dtype)


def measure(potential: Potential, y: Tensor, f: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the loss, the residual norm, its rounding error and the rounding of the loss."""
    eps = torch.finfo(f.dtype).eps
    loss, link = potential.loss(y, f), potential.link(f)
    norm = (link - y).norm(dim=-1)
    moved = NORM * eps * (link.norm(dim=-1) + y.norm(dim=-1))
    return loss, norm, moved, 64 * eps * (loss + norm + moved)


@given(instances(ALL))
def test_loss_lies_between_the_bounds_of_the_residual_norm(
    instance: tuple[Potential, Tensor, Tensor],
):
    potential, y, f = instance
    loss, norm, moved, rounding = measure(potential, y, f)
    lower = potential.loss_bounds((norm - moved).clamp(min=0), y).lower
    upper = potential.loss_bounds(norm + moved, y).upper
    assert (lower <= loss + rounding).all(), (lower, loss)
    assert (loss <= upper + rounding).all(), (loss, upper)
    assert lower.shape == upper.shape == loss.shape
    assert lower.dtype == upper.dtype == loss.dtype


@given(instances(ALL))
def test_predictions_tighten_the_bounds(instance: tuple[Potential, Tensor, Tensor]):
    potential, y, f = instance
    loss, norm, moved, rounding = measure(potential, y, f)
    link = potential.link(f)
    lower = potential.loss_bounds((norm - moved).clamp(min=0), y, prediction=link).lower
    upper = potential.loss_bounds(norm + moved, y, prediction=link).upper
    if potential == Logistic():  # 1 - yhat is rounded by eps, which is eps exp(l) of itself
        each = potential.loss(y.unsqueeze(-1), f.unsqueeze(-1))
        rounding = rounding + 4 * torch.finfo(f.dtype).eps * each.exp().sum(-1)
    assert (lower <= loss + rounding).all(), (lower, loss)
    assert (loss <= upper + rounding).all(), (loss, upper)
    loose, tight = potential.loss_bounds(norm, y), potential.loss_bounds(norm, y, prediction=link)
    assert (tight.lower >= loose.lower).all()
    assert (tight.upper <= loose.upper).all()


def table(potential: Potential, y: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """Return the bounds of one target as docs/theory.md prints them, row by row."""
    if potential == Squared():
        return r**2 / 2, r**2 / 2
    k, inf, support = y.numel(), torch.tensor(math.inf, dtype=torch.float64), y[y > 0]
    if potential == Logistic():
        return 2 * r**2, -math.sqrt(k) * torch.log1p(-r) if r < 1 else inf
    rho, hard, least = r * math.sqrt((k - 1) / k), bool(y.amax() == 1), support.amin()
    if potential == Softmax():
        lower = torch.maximum(r**2, -torch.log1p(-r / math.sqrt(2))) if hard else r**2
        upper = -(support * torch.log1p(-rho / support)).sum() if rho < least else inf
        if support.numel() == k and rho < least:
            upper = torch.minimum(upper, r**2 / (2 * (least - rho)))
        return lower, upper
    assert isinstance(potential, Entmax)
    a = potential.order
    if a == 2 and rho < least:
        return r**2 / 2, r**2 / 2
    if not hard or rho >= 1:
        return r**2 / 2, inf
    upper = 1 - a * (1 - rho) ** (a - 1) + (a - 1) * ((1 - rho) ** a + rho**a)
    return r**2 / 2, upper / (a * (a - 1))


@given(st.sampled_from(ALL), SIZES, SEEDS, st.floats(1e-3, 1.4), st.sampled_from(["hard", "soft"]))
def test_bounds_are_at_least_as_tight_as_the_table(
    potential: Potential, k: int, seed: int, r: float, kind: str
):
    y = draw_targets(kind, potential, k, torch.Generator().manual_seed(seed))[0]
    if (potential == Logistic() and kind == "soft") or potential == Poisson():
        return
    if potential in SIMPLEX and k == 1:
        return
    norm = torch.tensor(r, dtype=torch.float64)
    lower, upper = potential.loss_bounds(norm, y)
    weakest, widest = table(potential, y, norm)
    # The printed form of entmax divides what is left of a difference by a (a - 1).
    order = potential.order if isinstance(potential, Entmax) else 2.0
    rounding = 64 * EPS * (1 + widest.nan_to_num(posinf=0).exp()) / (order - 1)
    assert weakest <= lower * (1 + 64 * EPS)
    assert upper <= widest + rounding


@given(instances(SIMPLEX))
def test_one_class_has_no_loss(instance: tuple[Potential, Tensor, Tensor]):
    potential, _, f = instance
    y = torch.ones(3, 1, dtype=f.dtype)
    for prediction in (None, y):
        for norm in (torch.zeros(3, dtype=f.dtype), torch.full((3,), 2.0, dtype=f.dtype)):
            lower, upper = potential.loss_bounds(norm, y, prediction=prediction)
            assert (lower == 0).all()
            assert (upper == 0).all()
    assert (potential.loss(y, f[:, :1]) == 0).all()


@given(
    st.sampled_from(ALL), SIZES, SEEDS, st.sampled_from(["hard", "soft", "mixed"]), st.booleans()
)
def test_both_bounds_grow_with_the_residual_norm(
    potential: Potential, k: int, seed: int, kind: str, ending: bool
):
    """Thm 2.3 puts a bound of the norm in place of the norm."""
    y = draw_targets(kind, potential, k, torch.Generator().manual_seed(seed))[0]
    least = 1.0 if (y <= 0).all() else float(y[y > 0].min())
    end = least * math.sqrt(k / max(k - 1, 1))  # about where the upper bounds end
    norm = end - tensor(*[10.0**-j for j in range(16)]).sort(descending=True).values
    norm = norm.clamp(min=0) if ending else torch.logspace(-9, 0.4, 300, dtype=torch.float64)
    lower, upper = potential.loss_bounds(norm, y.expand(norm.numel(), k))
    zero = potential.loss_bounds(torch.zeros(()).double(), y)
    assert zero.lower == 0
    assert zero.upper == 0
    for bound in (lower, upper):
        slack = 64 * EPS * (bound[1:] + norm[1:])
        assert (bound[1:] >= bound[:-1] - slack.nan_to_num(posinf=0)).all()
        assert (bound >= 0).all()
        assert not bound.isnan().any()
    assert torch.isfinite(lower).all()
    assert (lower <= upper + 64 * EPS * (upper + lower.exp())).all()


# The cases in which a bound is attained.


def assert_attained(bound: Tensor, loss: Tensor, norm: Tensor, slope: Tensor | float = 1.0) -> None:
    """Assert equality up to the rounding of the norm, which `slope` carries to the bound.

    The norm has an error of `eps` times itself and the target, which is of size 1.
    """
    tolerance = 64 * EPS * (loss + (1 + norm) * slope)
    assert ((bound - loss).abs() <= tolerance).all(), (bound, loss, tolerance)


@given(instances([Squared()]))
def test_squared_loss_is_both_bounds(instance: tuple[Potential, Tensor, Tensor]):
    potential, y, f = instance
    y, f = y.double(), f.double()
    loss, norm, moved, _ = measure(potential, y, f)
    for bound in potential.loss_bounds(norm, y):
        assert_attained(bound, loss, norm, moved / EPS)


MARGINS = torch.tensor([-8.0, -1.0, 0.0, 1.0, 8.0, 20.0], dtype=torch.float64)


def test_softmax_of_two_classes_attains_both_bounds():
    f = torch.stack([MARGINS, torch.zeros_like(MARGINS)], -1)
    y = tensor(1, 0).expand_as(f)
    loss, norm, _, _ = measure(Softmax(), y, f)
    for bound in Softmax().loss_bounds(norm, y):
        assert_attained(bound, loss, norm, loss.exp())


@pytest.mark.parametrize("k", [2, 3, 10, 1000])
def test_softmax_attains_the_upper_bound_where_the_wrong_classes_are_equally_likely(k: int):
    f = torch.cat([MARGINS.unsqueeze(-1), torch.zeros(6, k - 1, dtype=torch.float64)], -1)
    y = torch.zeros_like(f)
    y[:, 0] = 1
    loss, norm, _, _ = measure(Softmax(), y, f)
    assert_attained(Softmax().loss_bounds(norm, y).upper, loss, norm, loss.exp())


@pytest.mark.parametrize("k", [3, 10, 1000])
def test_softmax_attains_the_lower_bound_where_one_wrong_class_has_the_rest(k: int):
    f = torch.full((6, k), -1e4, dtype=torch.float64)
    f[:, 0], f[:, 1] = MARGINS, 0
    y = torch.zeros_like(f)
    y[:, 0] = 1
    loss, norm, _, _ = measure(Softmax(), y, f)
    assert_attained(Softmax().loss_bounds(norm, y).lower, loss, norm, loss.exp())


def test_softmax_attains_the_bound_of_predictions_for_one_hot_targets():
    f = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = torch.eye(5, dtype=torch.float64)[[0, 1, 2, 3, 4, 0]]
    loss, norm, _, _ = measure(Softmax(), y, 5 * f)
    upper = Softmax().loss_bounds(norm, y, prediction=Softmax().link(5 * f)).upper
    assert_attained(upper, loss, norm)


def test_softmax_of_full_support_is_exact_to_second_order():
    y, f = tensor(0.5, 0.5), tensor(1e-3, 0)
    loss, norm, _, _ = measure(Softmax(), y, f)
    assert loss <= Softmax().loss_bounds(norm, y).upper <= loss * (1 + 2e-3)
    assert loss >= Softmax().loss_bounds(norm, y).lower >= loss * (1 - 1e-6)


def test_a_single_hard_logistic_target_attains_both_bounds():
    f, y = MARGINS.unsqueeze(-1), torch.ones(6, 1, dtype=torch.float64)
    for targets, outputs in ((y, f), (1 - y, -f)):
        loss, norm, _, _ = measure(Logistic(), targets, outputs)
        for bound in Logistic().loss_bounds(norm, targets):
            assert_attained(bound, loss, norm, loss.exp())


@pytest.mark.parametrize("k", [1, 2, 3, 10, 1000])
@pytest.mark.parametrize("r", [0.1, 0.5, 0.9, 0.99, 0.9999])
def test_hard_logistic_targets_attain_the_upper_bound(k: int, r: float):
    norm, y = tensor(r), torch.ones(1, k, dtype=torch.float64)
    upper = Logistic().loss_bounds(norm, y).upper
    residuals = [torch.full((k,), r / math.sqrt(k), dtype=torch.float64)]
    discriminant = k * r**2 - (k - 1)
    if discriminant >= 0:  # one coordinate s, the others 1 - s
        s = (k - 1 + math.sqrt(discriminant)) / k
        residuals.append(torch.full((k,), 1 - s, dtype=torch.float64))
        residuals[-1][0] = s
    losses = []
    for e in residuals:
        f = torch.logit(1 - e).unsqueeze(0)
        loss, found, _, _ = measure(Logistic(), y, f)
        assert_attained(found, norm, norm)
        losses.append(loss)
    assert_attained(upper, torch.stack(losses).amax(0), norm, upper.exp().clamp(max=1e6))
    assert upper <= -math.sqrt(k) * torch.log1p(-norm) * (1 + 64 * EPS)


@given(st.integers(2, 30), st.floats(1e-3, 0.999999), SEEDS)
def test_no_split_of_the_residual_exceeds_the_upper_bound_of_hard_logistic(
    k: int, r: float, seed: int
):
    """The bound is the maximum of Thm 2.2, here found on a grid, and no split exceeds it."""
    upper = Logistic().loss_bounds(tensor(r), torch.ones(1, k, dtype=torch.float64)).upper

    def phi(square: Tensor) -> Tensor:
        return -torch.log1p(-square.sqrt())

    # Denser towards u = r^2, where the slope of the second term is infinite.
    u = r**2 * (1 - torch.linspace(0, 1, 20001, dtype=torch.float64) ** 4)
    grid = (phi(u) + (k - 1) * phi((r**2 - u).clamp(min=0) / (k - 1))).max()
    generator = torch.Generator().manual_seed(seed)
    splits = torch.rand(2000, k, generator=generator, dtype=torch.float64).log() ** 8
    splits = splits / splits.sum(-1, keepdim=True)
    slack = 64 * EPS * (1 + upper.exp().clamp(max=1 / (1 - r)))
    assert phi(r**2 * splits).sum(-1).max() <= upper + slack
    assert grid <= upper + slack
    assert upper <= grid * (1 + 1e-4)  # the width of the grid


def test_logistic_attains_the_bound_of_predictions_for_hard_targets():
    f = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = (f > 0.5).double()
    loss, norm, _, _ = measure(Logistic(), y, 3 * f)
    upper = Logistic().loss_bounds(norm, y, prediction=Logistic().link(3 * f)).upper
    assert_attained(upper, loss, norm, loss.exp())


@pytest.mark.parametrize("potential", [Sparsemax(), *ENTMAX], ids=repr)
def test_entmax_of_two_classes_attains_the_upper_bound(potential: Entmax):
    f = torch.stack([MARGINS / 10, torch.zeros_like(MARGINS)], -1)
    y = tensor(1, 0).expand_as(f)
    loss, norm, _, _ = measure(potential, y, f)
    q = 1 - potential.link(f)[:, 0]
    assert (q < 1).all()
    slope = (1 - q).pow(potential.order - 2) + q.pow(potential.order - 1)
    assert_attained(potential.loss_bounds(norm, y).upper, loss, norm, slope)


@pytest.mark.parametrize("potential", [Sparsemax(), Entmax(2.0)], ids=repr)
@given(k=st.sampled_from([2, 3, 10]), seed=SEEDS, size=st.floats(1e-6, 1.0))
def test_sparsemax_loss_is_half_the_square(potential: Entmax, k: int, seed: int, size: float):
    generator = torch.Generator().manual_seed(seed)
    for kind in ("hard", "soft", "mixed"):
        y = draw_targets(kind, potential, k, generator)
        # Predictions: at `size` of the way from y to another point, so that y stays in the support.
        other = draw_targets("mixed", potential, k, generator)
        f = y + size * torch.where(y > 0, y, 1).amin(-1, keepdim=True) * (other - y)
        loss, norm, moved, _ = measure(potential, y, f)
        rho, least = norm * math.sqrt((k - 1) / k), torch.where(y > 0, y, 1).amin(-1)
        exact = rho < least - moved
        bounds = potential.loss_bounds(norm, y)
        for bound in bounds:
            assert_attained(bound[exact], loss[exact], norm[exact])
        assert_attained(bounds.lower, norm.square() / 2, norm)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("potential", [Sparsemax(), *ENTMAX], ids=repr)
@pytest.mark.parametrize("k", [2, 3, 5, 7, 10, 100])
def test_nothing_bounds_the_loss_where_the_target_has_no_probability(
    potential: Entmax, k: int, dtype: torch.dtype
):
    """All the mass on one wrong class, or on all of them: the loss grows with the margin."""
    f = torch.zeros(2, k, dtype=dtype)
    f[0, 1], f[1, 1:] = 2e4, 2e4
    y = torch.zeros_like(f)
    y[:, 0] = 1
    link = potential.link(f)
    assert (link[:, 0] == 0).all()
    norm = (link - y).norm(dim=-1)
    for prediction in (None, link):
        assert (potential.loss_bounds(norm, y, prediction=prediction).upper == math.inf).all()
    assert (potential.loss(y, f) > 1e4 - 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [2, 3, 5, 7, 10, 100])
def test_nothing_bounds_the_loss_of_softmax_where_the_target_has_no_probability(
    k: int, dtype: torch.dtype
):
    f = torch.zeros(2, k, dtype=dtype)
    f[0, 1], f[1, 1:] = 2e4, 2e4
    y = torch.zeros_like(f)
    y[:, 0] = 1
    norm = (Softmax().link(f) - y).norm(dim=-1)
    lower, upper = Softmax().loss_bounds(norm, y)
    assert (upper == math.inf).all()
    assert torch.isfinite(lower).all()


@pytest.mark.parametrize("order", ORDERS)
def test_entmax_attains_the_bound_of_predictions_on_the_zeros_of_the_target(order: float):
    entmax, f = Entmax(order), tensor(1.0, 0.9, 0.8, 0.7)
    y, link = tensor(1, 0, 0, 0), entmax.link(f)
    norm = (link - y).norm()
    upper = entmax.loss_bounds(norm, y, prediction=link).upper
    own = entmax.divergence(y[:1], link[:1])
    direct = (y - link)[0].square() * link[0] ** (order - 2) / order
    smallest = torch.minimum(entmax.loss_bounds(norm, y).upper, entmax.loss(y, f) - own + direct)
    assert_attained(upper, smallest, norm)


@pytest.mark.parametrize("order", [1.01, 1.1, 1.3, 1.5, 1.7])
@pytest.mark.parametrize("n", [10, 100])
def test_soft_targets_of_entmax_lose_most_on_their_zeros(order: float, n: int):
    """Mass moved from `n` classes to as many zeros: the bound is right but for `2^(a/2)`."""
    entmax, moved = Entmax(order), 1e-4
    half = torch.full((n,), 1 / n, dtype=torch.float64)
    y = torch.cat([half, 0 * half])
    link = torch.cat([(1 - moved) * half, moved * half])
    loss, norm, _, rounding = measure(entmax, y, link ** (order - 1) / (order - 1))
    upper = entmax.loss_bounds(norm, y).upper
    assert loss <= upper + rounding
    assert upper <= 1.3 * 2 ** (order / 2) * loss


@pytest.mark.parametrize("order", ORDERS)
def test_bounds_of_tiny_predictions_are_numbers(order: float):
    """The power of a probability overflows where its square underflows."""
    for dtype, tiny in ((torch.float32, 1e-44), (torch.float64, 1e-320)):
        link, y = torch.tensor([1.0, tiny], dtype=dtype), torch.tensor([1.0, 0.0], dtype=dtype)
        for target in (y, y.flip(0)):
            norm = (link - target).norm()
            bounds = Entmax(order).loss_bounds(norm, target, prediction=link)
            assert not torch.stack(bounds).isnan().any()


@pytest.mark.parametrize("y", [0.5, 1.0, 7.0])
def test_a_single_count_attains_both_bounds(y: float):
    target = tensor(y).unsqueeze(-1).expand(6, 1)
    f = math.log(y) + tensor(-3, -1, -0.1, 0.1, 1, 3).unsqueeze(-1)
    loss, norm, _, _ = measure(Poisson(), target, f)
    lower, upper = Poisson().loss_bounds(norm, target)
    assert_attained(lower[3:], loss[3:], norm[3:])
    assert_attained(upper[:3], loss[:3], norm[:3], 1 + y / f[:3, 0].exp())
    assert (upper[norm >= y] == math.inf).all()


def test_zero_counts_attain_both_bounds():
    f = torch.zeros(3, 7, dtype=torch.float64)
    y = torch.zeros_like(f)
    loss, norm, _, _ = measure(Poisson(), y, f)
    assert_attained(Poisson().loss_bounds(norm, y).upper, loss, norm)
    f[:, 1:] = -math.inf  # a rate of 0
    loss, norm, _, _ = measure(Poisson(), y, f)
    assert_attained(Poisson().loss_bounds(norm, y).lower, loss, norm)
    upper = Poisson().loss_bounds(norm, y, prediction=Poisson().link(f)).upper
    assert_attained(upper, loss, norm)


def test_many_counts_attain_both_bounds():
    y = tensor(1.0, 3.0, 8.0).expand(2, 3)
    link = y + torch.stack([tensor(0, 0, 2.0), tensor(-0.5, 0, 0)])
    loss, norm, _, _ = measure(Poisson(), y, link.log())
    bounds = Poisson().loss_bounds(norm, y)
    assert_attained(bounds.lower[0], loss[0], norm[0], 10.0)
    assert_attained(bounds.upper[1], loss[1], norm[1], 10.0)


def test_poisson_bounds_of_predictions_are_those_of_section_0():
    y, link = tensor(2.0, 0.0, 5.0), tensor(3.0, 1.0, 4.0)
    loss, norm, _, _ = measure(Poisson(), y, link.log())
    lower, upper = Poisson().loss_bounds(norm, y, prediction=link)
    assert lower >= (1 / 3 + 1 + 1 / 5) / 2 - 8 * EPS
    assert upper <= 1 / 3 + 1 + 1 / 4 + 8 * EPS
    assert lower <= loss <= upper


def test_residuals_that_are_1_by_rounding_bound_nothing_from_above():
    """Counterexamples: an upper bound below the loss."""
    f, y = torch.tensor([[16.629289]]), torch.zeros(1, 1)
    loss, norm = Logistic().loss(y, f), (Logistic().link(f) - y).norm(dim=-1)
    bounds = Logistic().loss_bounds(norm, y)
    assert bounds.lower < loss < bounds.upper
    f, y = torch.tensor([[-16.51]]), torch.tensor([[2.0]])
    loss, norm = Poisson().loss(y, f), (Poisson().link(f) - y).norm(dim=-1)
    bounds = Poisson().loss_bounds(norm, y)
    assert bounds.lower < loss < bounds.upper
