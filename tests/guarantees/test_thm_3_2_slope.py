"""Thm 3.2 and its estimators by enumeration of all batches and splits, in float64."""

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from conjopt.measure import cross_fitted_slope, halves, noise_from_halves
from conjopt.measure.parts import Parts, split
from conjopt.measure.watch import Watch

Gradients = Tensor  # (n, P), one sample's in each row


@st.composite
def gradients(draw: st.DrawFn, least: int, most: int) -> Gradients:
    n, parameters = draw(st.integers(least, most)), draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    noise = torch.randn(n, parameters, generator=generator, dtype=torch.float64)
    mean = torch.randn(parameters, generator=generator, dtype=torch.float64)
    scale = draw(st.sampled_from([1e-6, 1.0, 1e6]))
    return scale * (draw(st.sampled_from([0.0, 0.1, 10.0])) * mean + noise)


def half_splits(m: int, h: int | None = None) -> list[tuple[list[int], list[int]]]:
    """All ways to take h of m samples, by default half of them, as (the others, those)."""
    chosen = itertools.combinations(range(m), m // 2 if h is None else h)
    return [([i for i in range(m) if i not in second], list(second)) for second in chosen]


def energy(g: Gradients) -> Tensor:
    return g.square().sum(1).mean()


def mean_square_estimate(g: Gradients) -> Tensor:
    """``(m ||g_B||^2 - E_hat) / (m - 1)``."""
    m = len(g)
    return (m * g.mean(0).square().sum() - energy(g)) / (m - 1)


@settings(deadline=None)
@given(gradients(2, 7), st.data())
def test_mean_over_half_splits_is_the_estimate_of_the_theory(g: Gradients, data: st.DataObject):
    m = len(g)
    h = data.draw(st.integers(1, m - 1))  # true of halves, and of parts of any size
    slopes = []
    for first, second in half_splits(m, h):
        g1, g2 = g[first].mean(0), g[second].mean(0)
        u = g2
        slopes.append(cross_fitted_slope(g1 @ u, g2 @ u, half=h))
    assert_close(
        torch.stack(slopes).mean(),
        mean_square_estimate(g),
        rtol=1e-12,
        atol=1e-14 * energy(g).item(),
    )


def observed_halves(model: nn.Module, x: Tensor, y: Tensor, order: list[int]) -> Parts:
    """The package's two halves of a batch in this order, from an ordinary training step."""
    criterion = nn.CrossEntropyLoss()
    parameters = dict(model.named_parameters())
    watch = Watch(model, criterion, parameters)
    watch.armed = True
    model.zero_grad()
    criterion(model(x[order]), y[order]).backward()
    batch = watch.batch()
    g = [p.grad / batch.weight for p in parameters.values()]
    parts = split(batch, parameters, g, changed=False)
    assert parts is not None
    return parts


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


@pytest.mark.parametrize("m", [2, 4, 5])
def test_mean_over_half_splits_on_a_model(m: int):
    torch.manual_seed(m)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = torch.randn(m, 3).double(), torch.arange(m) % 3
    losses = nn.functional.cross_entropy(model(x), y, reduction="none")
    every = list(model.parameters())
    per_sample = torch.stack(
        [flat(torch.autograd.grad(loss, every, retain_graph=True)) for loss in losses]
    )
    even, odd = halves(m)
    slopes = []
    for first, second in half_splits(m):
        order = [0] * m
        for places, members in ((even, first), (odd, second)):
            for place, member in zip(places.nonzero().flatten().tolist(), members):
                order[place] = member
        parts = observed_halves(model, x, y, order)
        g1, g2 = flat(parts.first), flat(parts.second)
        assert_close(g1, per_sample[first].mean(0), rtol=1e-11, atol=1e-14)
        assert_close(g2, per_sample[second].mean(0), rtol=1e-11, atol=1e-14)
        assert parts.sizes == (len(first), len(second))
        slopes.append(cross_fitted_slope(g1 @ g2, g2 @ g2, half=parts.sizes[1]))
    assert_close(torch.stack(slopes).mean(), mean_square_estimate(per_sample), rtol=1e-11, atol=0)


DIRECTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "g2": lambda g: g,
    "normalised": lambda g: g / (g.norm() + 1e-9),
    "sign": torch.sign,
    "cubed": lambda g: g**3,
    "fixed": torch.ones_like,
    "clipped": lambda g: g * (1 / g.norm().clamp(min=1e-9)).clamp(max=1),
}


@settings(deadline=None)
@given(gradients(2, 6), st.sampled_from(sorted(DIRECTIONS)), st.data())
def test_corrected_slope_is_unbiased_without_replacement(
    g: Gradients, name: str, data: st.DataObject
):
    n = len(g)
    m = data.draw(st.integers(2, n))
    h = data.draw(st.sampled_from(sorted({m // 2, m - m // 2})))  # odd batches: either one
    G = g.mean(0)
    slopes, expected, size = [], [], 0.0
    for batch in itertools.combinations(range(n), m):
        for first, second in half_splits(m, h):
            g1 = g[[batch[i] for i in first]].mean(0)
            g2 = g[[batch[i] for i in second]].mean(0)
            u = DIRECTIONS[name](g2)
            slopes.append(cross_fitted_slope(g1 @ u, g2 @ u, half=h, population=n))
            expected.append(G @ u)
            size = max(size, (g.norm(dim=1).max() * u.norm()).item())
    assert_close(
        torch.stack(slopes).mean(), torch.stack(expected).mean(), rtol=1e-12, atol=1e-13 * size
    )


@settings(deadline=None)
@given(gradients(1, 3), st.integers(2, 4), st.sampled_from(sorted(DIRECTIONS)))
def test_held_out_slope_is_unbiased_with_replacement(g: Gradients, m: int, name: str):
    G = g.mean(0)
    even, odd = halves(m)
    slopes, expected, size = [], [], 0.0
    for batch in itertools.product(range(len(g)), repeat=m):
        drawn = g[list(batch)]
        g1, g2 = drawn[even].mean(0), drawn[odd].mean(0)
        u = DIRECTIONS[name](g2)
        slopes.append(cross_fitted_slope(g1 @ u, g2 @ u, half=int(odd.sum())))
        expected.append(G @ u)
        size = max(size, (g.norm(dim=1).max() * u.norm()).item())
    assert_close(
        torch.stack(slopes).mean(), torch.stack(expected).mean(), rtol=1e-12, atol=1e-13 * size
    )


def test_the_uncorrected_slope_is_biased_without_replacement():
    # So that the tests above can fail: two opposite gradients, a batch of both.
    g = torch.tensor([[1.0], [-1.0]]).double()
    assert cross_fitted_slope(g[0] @ g[1], g[1] @ g[1], half=1) == -1
    assert cross_fitted_slope(g[0] @ g[1], g[1] @ g[1], half=1, population=2) == 0


def noise_of_batch(drawn: Gradients) -> tuple[Tensor, Tensor]:
    even, odd = halves(len(drawn))
    g1, g2 = drawn[even].mean(0), drawn[odd].mean(0)
    sizes = (int(even.sum()), int(odd.sum()))
    noise = noise_from_halves(g1 @ g2, (g1 - g2).square().sum(), sizes)
    assert noise.batch_size == len(drawn)
    return noise.mean_square, noise.noise


@settings(deadline=None)
@given(gradients(1, 3), st.integers(2, 5))
def test_noise_from_halves_is_unbiased_with_replacement(g: Gradients, m: int):
    found = [noise_of_batch(g[list(b)]) for b in itertools.product(range(len(g)), repeat=m)]
    mean_square, noise = (torch.stack(values).mean() for values in zip(*found))
    G2 = g.mean(0).square().sum()
    atol = 1e-13 * energy(g).item()
    assert_close(mean_square, G2, rtol=1e-12, atol=atol)
    assert_close(noise, energy(g) - G2, rtol=1e-12, atol=atol)


@settings(deadline=None)
@given(gradients(2, 6), st.data())
def test_noise_from_halves_without_replacement_is_off_by_its_share_of_the_noise(
    g: Gradients, data: st.DataObject
):
    n = len(g)
    m = data.draw(st.integers(2, n))
    found = [noise_of_batch(g[list(p)]) for p in itertools.permutations(range(n), m)]
    mean_square, noise = (torch.stack(values).mean() for values in zip(*found))
    G2 = g.mean(0).square().sum()
    S2 = energy(g) - G2
    atol = 1e-13 * energy(g).item()
    assert_close(mean_square, G2 - S2 / (n - 1), rtol=1e-12, atol=atol)
    assert_close(noise, S2 * n / (n - 1), rtol=1e-12, atol=atol)
