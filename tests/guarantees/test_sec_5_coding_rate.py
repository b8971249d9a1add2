"""Section 5: `I(Z; Z + N | Y)` is at most the coding rate, with equality for Gaussian classes.

Laws of finitely many atoms, on a line or products of lines that are turned in space. There
`Z + N` is a mixture of Gaussians, and its entropy is an integral of a smooth function over all of
a line: the trapezoidal rule with steps of a fifth of a deviation gives it to 1e-12.
"""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conjopt.entropy import coding_rate

EXACT = 1e-11


def information(atoms, share, eps2):
    """`I(Z; Z + N)` on a line, by quadrature; `N` of variance `eps2`."""
    s = math.sqrt(eps2)
    count = int((atoms.max() - atoms.min()) / s * 5) + 121
    grid = atoms.min() - 12 * s + torch.arange(count, dtype=torch.float64) * (s / 5)
    normal = torch.exp(-((grid[:, None] - atoms) ** 2) / (2 * eps2)) / math.sqrt(2 * math.pi * eps2)
    density = normal @ share
    entropy = torch.special.entr(density).sum() * (s / 5)
    return float(entropy) - math.log(2 * math.pi * math.e * eps2) / 2


@st.composite
def lines(draw):
    """Atoms on a line with whole multiplicities, which make a sample of them a law."""
    values = st.integers(-8, 8)
    atoms = draw(st.lists(values, min_size=1, max_size=4, unique=True))
    counts = draw(st.lists(st.integers(1, 6), min_size=len(atoms), max_size=len(atoms)))
    return torch.tensor(atoms).double() / 2, torch.tensor(counts)


def test_the_quadrature_is_exact_enough():
    # One atom tells nothing; two that are far apart tell a fair coin.
    one, half = torch.ones(1).double(), torch.full((2,), 0.5).double()
    assert abs(information(torch.tensor([3.0]).double(), one, 0.3)) < EXACT
    far = information(torch.tensor([-20.0, 20.0]).double(), half, 0.5)
    assert abs(far - math.log(2)) < EXACT


@settings(max_examples=60)
@given(st.lists(lines(), min_size=1, max_size=3), st.sampled_from([0.1, 0.5, 3.0, 50.0]))
def test_the_rate_of_classes_bounds_what_features_tell(classes, eps2):
    outputs = torch.cat([a.repeat_interleave(c) for a, c in classes])[:, None]
    sizes = torch.tensor([int(c.sum()) for _, c in classes])
    targets = torch.arange(len(classes)).repeat_interleave(sizes)
    share = sizes.double() / sizes.sum()
    told = sum(
        q * information(a, c.double() / c.sum(), eps2) for q, (a, c) in zip(share.tolist(), classes)
    )
    assert told <= coding_rate(outputs, targets, eps2=eps2) + EXACT


@settings(max_examples=40)
@given(lines(), lines(), st.floats(0, 2 * math.pi), st.sampled_from([0.1, 0.5, 3.0]))
def test_the_rate_bounds_what_features_of_two_dimensions_tell(first, second, angle, eps2):
    (a, m), (b, n) = first, second
    a, b = a.repeat_interleave(m), b.repeat_interleave(n)
    outputs = torch.cartesian_prod(a, b)  # independent coordinates: what they tell adds up
    turn = torch.tensor(
        [[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]]
    ).double()
    told = sum(
        information(atoms, count.double() / count.sum(), eps2) for atoms, count in (first, second)
    )
    assert told <= coding_rate(outputs @ turn, eps2=eps2) + EXACT


def test_many_points_like_a_gaussian_come_close_to_the_rate():
    # Quantiles of a normal law of variance near 4: the bound cannot be improved.
    quantiles = (torch.arange(400).double() + 0.5) / 400
    atoms = 2 * math.sqrt(2) * torch.erfinv(2 * quantiles - 1)
    told = information(atoms, torch.full((400,), 1 / 400).double(), 0.5)
    rate = float(coding_rate(atoms[:, None], eps2=0.5))
    assert rate - 2e-3 < told <= rate
