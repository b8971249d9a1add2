"""Estimators of docs/theory.md, section 3, by full enumeration of small populations in float64."""

import itertools
from collections.abc import Iterator, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from conjopt.measure.energy import per_sample_gradient_norms
from conjopt.measure.noise import (
    GradientNoise,
    gradient_noise,
    noise_from_halves,
    noise_from_norms,
    noise_from_parts,
)

Gradients = Tensor  # (n, P), one sample's in each row
SCALES = [1e-6, 1.0, 1e6]


@st.composite
def gradients(draw: st.DrawFn, least: int, most: int) -> Gradients:
    n, parameters = draw(st.integers(least, most)), draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    noise = torch.randn(n, parameters, generator=generator, dtype=torch.float64)
    mean = torch.randn(parameters, generator=generator, dtype=torch.float64)
    return draw(st.sampled_from(SCALES)) * (draw(st.sampled_from([0.0, 0.1, 10.0])) * mean + noise)


def truth(g: Gradients) -> tuple[Tensor, Tensor]:
    """`||G||^2` and `S^2` of the population."""
    G = g.mean(0)
    return G.square().sum(), (g - G).square().sum(1).mean()


def of_samples(g: Gradients, population: int | None = None) -> GradientNoise:
    square = g.mean(0).square().sum()
    return noise_from_norms(g.norm(dim=1), square, population=population)


def check_unbiased(found: Sequence[GradientNoise], g: Gradients) -> None:
    mean_square, noise = truth(g)
    atol = 1e-12 * g.square().sum(1).max().item()
    for name, expected in (("mean_square", mean_square), ("noise", noise)):
        mean = torch.stack([getattr(estimate, name) for estimate in found]).mean()
        assert_close(mean, expected, rtol=1e-12, atol=atol, msg=lambda text, n=name: f"{n}: {text}")


@settings(deadline=None, max_examples=40)
@given(gradients(1, 3), st.integers(2, 5))
def test_unbiased_with_replacement(g: Gradients, m: int):
    draws = itertools.product(range(len(g)), repeat=m)
    check_unbiased([of_samples(g[list(draw)]) for draw in draws], g)


@settings(deadline=None, max_examples=40)
@given(gradients(2, 7), st.data())
def test_unbiased_without_replacement(g: Gradients, data: st.DataObject):
    n = len(g)
    m = data.draw(st.integers(2, n))
    draws = itertools.combinations(range(n), m)
    check_unbiased([of_samples(g[list(draw)], n) for draw in draws], g)


def test_all_samples_are_known_exactly():
    g = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).double()
    check_unbiased([of_samples(g, 5)], g)


def test_the_wrong_kind_of_draws_is_biased():
    # So that the tests above can fail: two opposite gradients.
    g = torch.tensor([[1.0], [-1.0]]).double()
    assert of_samples(g).mean_square == -1
    assert of_samples(g).noise == 2
    assert of_samples(g, 2).mean_square == 0
    assert of_samples(g, 2).noise == 1


def splits(members: list[int], sizes: Sequence[int]) -> Iterator[list[list[int]]]:
    """All ways to take parts of these sizes out of the members, in order."""
    if not sizes:
        yield []
        return
    for part in itertools.combinations(members, sizes[0]):
        rest = [i for i in members if i not in part]
        for others in splits(rest, sizes[1:]):
            yield [list(part), *others]


def of_parts(
    parts: Sequence[Gradients], population: int | None = None
) -> tuple[GradientNoise, GradientNoise]:
    """From inner products, and from norms with that of the batch's gradient."""
    sizes = [len(part) for part in parts]
    means = torch.stack([part.mean(0) for part in parts])
    batch = torch.cat(list(parts)).mean(0).square().sum()
    return (
        noise_from_parts(means @ means.T, sizes, population=population),
        noise_from_norms(means.norm(dim=1), batch, sizes=sizes, population=population),
    )


EQUAL = [(1, 1), (2, 2), (3, 3), (1, 1, 1), (2, 2, 2)]
UNEQUAL = [(1, 2), (1, 3), (2, 1, 1), (1, 2, 2)]


@pytest.mark.parametrize("sizes", EQUAL + UNEQUAL, ids=str)
@pytest.mark.parametrize("more", [0, 1])
@pytest.mark.parametrize("seed", [0, 1])
def test_parts_without_replacement(sizes: tuple[int, ...], more: int, seed: int):
    n = sum(sizes) + more
    g = torch.randn(n, 2, generator=torch.Generator().manual_seed(seed)).double() + seed
    every = [of_parts([g[p] for p in s], n) for s in splits(list(range(n)), sizes)]
    for found in zip(*every):
        check_unbiased(found, g)
        assert found[0].batch_size == sum(sizes)


@pytest.mark.parametrize("sizes", [(1, 1), (2, 2), (1, 2), (2, 1, 1), (2, 2, 2)], ids=str)
def test_parts_with_replacement(sizes: tuple[int, ...]):
    g = torch.randn(2 if sum(sizes) > 4 else 3, 2, generator=torch.Generator().manual_seed(3))
    g = g.double() + 0.5
    every = []
    for draw in itertools.product(range(len(g)), repeat=sum(sizes)):
        every.append(of_parts(g[list(draw)].split(list(sizes))))
    for found in zip(*every):
        check_unbiased(found, g)


@pytest.mark.parametrize(("m", "b"), [(4, 2), (6, 3), (6, 2), (3, 3)])
def test_formulas_of_the_theory_for_equal_parts(m: int, b: int):
    """`S2_hat (n-1)/n` for `S^2 b/m`, and `G2_hat + m/(b n) S2_hat` for `||G||^2`."""
    n = m + 2
    means = torch.randn(b, 3, generator=torch.Generator().manual_seed(m)).double()
    E_hat, square = means.square().sum(1).mean(), means.mean(0).square().sum()
    G2_hat, S2_hat = (b * square - E_hat) / (b - 1), b * (E_hat - square) / (b - 1)
    for found in (
        noise_from_parts(means @ means.T, [m // b] * b, population=n),
        noise_from_norms(means.norm(dim=1), square, sizes=[m // b] * b, population=n),
    ):
        assert_close(found.noise * b / m, S2_hat * (n - 1) / n, rtol=1e-13, atol=0)
        assert_close(found.mean_square, G2_hat + m / (b * n) * S2_hat, rtol=1e-12, atol=1e-14)
        if m == b:
            other = E_hat - S2_hat * (n - 1) / n
            assert_close(found.mean_square, other, rtol=1e-12, atol=1e-14)


def test_two_parts_are_the_halves():
    g = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)).double()
    halves = noise_from_halves(g[0] @ g[1], (g[0] - g[1]).square().sum(), (3, 2))
    parts = noise_from_parts(g @ g.T, (3, 2))
    assert_close(parts.mean_square, halves.mean_square, rtol=1e-14, atol=0)
    assert_close(parts.noise, halves.noise, rtol=1e-13, atol=0)
    assert parts.batch_size == halves.batch_size == 5


MODELS = {
    "linear": lambda: nn.Linear(3, 3),
    "dropout": lambda: nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 3)),
    "norm": lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 3)),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("population", [None, 9])
def test_gradient_noise_of_a_model(name: str, reduction: str, population: int | None):
    torch.manual_seed(0)
    model = MODELS[name]().double()
    x, y = torch.randn(5, 3).double(), torch.arange(5) % 3
    loss = nn.CrossEntropyLoss(reduction=reduction)
    state = torch.get_rng_state()
    found = gradient_noise(model, loss, x, y, population=population)
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())
    losses = nn.functional.cross_entropy(model(x), y, reduction="none")
    every = list(model.parameters())
    g = torch.stack(
        [
            torch.cat([t.flatten() for t in torch.autograd.grad(one, every, retain_graph=True)])
            for one in losses
        ]
    )
    expected = of_samples(g, population)
    assert_close(found.mean_square, expected.mean_square, rtol=1e-10, atol=1e-13)
    assert_close(found.noise, expected.noise, rtol=1e-10, atol=1e-13)
    assert found.batch_size == 5
    assert not found.noise.requires_grad


def test_gradients_weigh_as_the_criterion_weighs_them():
    """Their mean is the gradient of the batch, with class weights and ignored samples."""
    torch.manual_seed(0)
    model = nn.Linear(3, 3).double()
    x, y = torch.randn(4, 3).double(), torch.tensor([0, 1, -100, 2])
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0]).double())
    found = gradient_noise(model, loss, x, y)
    gradients = torch.autograd.grad(loss(model(x), y), list(model.parameters()))
    square = sum(g.square().sum() for g in gradients)
    energy = per_sample_gradient_norms(model, loss, x, y).square().mean()
    assert_close(found.mean_square + found.noise / 4, square, rtol=1e-11, atol=0)
    assert_close(found.mean_square + found.noise, energy, rtol=1e-11, atol=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: noise_from_norms(torch.ones(1), torch.ones(())), "expected at least 2"),
        (lambda: noise_from_parts(torch.ones(1, 1)), "expected at least 2"),
        (lambda: noise_from_parts(torch.ones(2, 3)), r"g @ g\.T"),
        (lambda: noise_from_parts(torch.ones(2, 2), [1, 0]), "at least 1 in each"),
        (lambda: noise_from_parts(torch.ones(2, 2), [1, 1, 1]), "2 parts and 3 sizes"),
        (
            lambda: noise_from_norms(torch.ones(2), torch.ones(()), sizes=[4, 4], population=7),
            "population=7 and a batch of 8",
        ),
        (
            lambda: gradient_noise(
                nn.Linear(2, 1), nn.MSELoss(), torch.ones(1, 2), torch.ones(1, 1)
            ),
            "use a larger batch",
        ),
    ],
)
def test_bad_input(call, message: str):
    with pytest.raises(ValueError, match=message):
        call()
