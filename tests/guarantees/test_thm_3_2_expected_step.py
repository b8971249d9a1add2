"""Thm 3.2 by enumeration of all batches without replacement: squares, and what a step buys."""

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

from conjopt.bounds import ConvergenceLedger, batch_gradient_square, expected_decrease
from conjopt.potentials import Potential, Softmax, Squared


def batches(n: int, m: int) -> list[list[int]]:
    return [list(batch) for batch in itertools.combinations(range(n), m)]


@dataclasses.dataclass
class Linear:
    """``f = x W``: the risk is quadratic, or below the quadratic with L = beta hi(K) / n."""

    potential: Potential
    x: Tensor  # (n, d)
    y: Tensor  # (n, k)
    W: Tensor  # (d, k)

    @property
    def curvature(self) -> float:
        hi = torch.linalg.eigvalsh(self.x @ self.x.T)[-1].item()
        return self.potential.smoothness * hi / len(self.x)

    def risk(self, W: Tensor) -> float:
        return self.potential.loss(self.y, self.x @ W).mean().item()

    def gradients(self, W: Tensor) -> Tensor:
        """(n, d, k), one sample's in each."""
        e = self.potential.link(self.x @ W) - self.y
        return self.x[:, :, None] * e[:, None, :]

    def moments(self, W: Tensor) -> tuple[float, float]:
        """The squared norm of G, and the noise S^2."""
        g = self.gradients(W)
        square = g.mean(0).square().sum().item()
        return square, g.flatten(1).square().sum(1).mean().item() - square


@st.composite
def problems(draw: st.DrawFn) -> Linear:
    torch.manual_seed(draw(st.integers(0, 2**32)))
    n, d, k = draw(st.integers(1, 6)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    potential = draw(st.sampled_from([Squared(), Softmax()]))
    x, W = torch.randn(n, d).double(), torch.randn(d, k).double()
    y = torch.randn(n, k).double()
    if potential.on_simplex:
        y = torch.softmax(draw(st.sampled_from([1.0, 100.0])) * y, 1)
    return Linear(potential, x, y, draw(st.sampled_from([0.1, 1.0, 10.0])) * W)


@given(problems(), st.data())
def test_the_square_of_a_batch_gradient(problem: Linear, data: st.DataObject):
    n = len(problem.x)
    m = data.draw(st.integers(1, n))
    g = problem.gradients(problem.W)
    squares = [g[batch].mean(0).square().sum().item() for batch in batches(n, m)]
    square, noise = problem.moments(problem.W)
    found = batch_gradient_square(square, noise, batch_size=m, samples=n)
    energy = g.flatten(1).square().sum(1).mean().item()
    assert found == pytest.approx(sum(squares) / len(squares), rel=1e-12, abs=1e-14 * energy)


@given(problems(), st.data())
def test_what_a_step_buys_in_expectation(problem: Linear, data: st.DataObject):
    n = len(problem.x)
    m = data.draw(st.integers(1, n))
    s = data.draw(st.sampled_from([0.1, 1.0, 1.9]))
    W, g = problem.W, problem.gradients(problem.W)
    square, noise = problem.moments(W)
    assume(square > 1e-12)
    a, gain = expected_decrease(
        square, noise, batch_size=m, samples=n, curvature=problem.curvature, safety=s
    )
    after = [problem.risk(W - a * g[batch].mean(0)) for batch in batches(n, m)]
    R = problem.risk(W)
    size = R + (problem.x @ W).abs().max().item()
    assert sum(after) / len(after) <= R - gain + 1e-13 * (1 + size)
    assert gain >= 0


@given(st.integers(0, 2**32), st.integers(2, 6), st.data())
def test_it_is_attained_where_curvature_is_equal_in_all_directions(
    seed: int, n: int, data: st.DataObject
):
    torch.manual_seed(seed)
    m = data.draw(st.integers(1, n))
    s = data.draw(st.floats(0.01, 1.99))
    x, _ = torch.linalg.qr(torch.randn(n, 2).double())  # x^T x = I, so the Hessian is I / n
    problem = Linear(Squared(), x, torch.randn(n, 1).double(), torch.randn(2, 1).double())
    g = problem.gradients(problem.W)
    square, noise = problem.moments(problem.W)
    assume(square > 1e-9)
    options = {"batch_size": m, "samples": n, "curvature": 1 / n}
    a, gain = expected_decrease(square, noise, safety=s, **options)
    after = [problem.risk(problem.W - a * g[batch].mean(0)) for batch in batches(n, m)]
    found = problem.risk(problem.W) - sum(after) / len(after)
    assert found == pytest.approx(gain, rel=1e-8, abs=1e-12)
    assert gain <= expected_decrease(square, noise, **options)[1]  # s = 1 is best


@pytest.mark.parametrize("m", [1, 2, 3, 5])
def test_on_a_network_as_the_ledger_measures_it(m: int):
    torch.manual_seed(m)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    criterion, x, y = nn.CrossEntropyLoss(), torch.randn(5, 3).double(), torch.arange(5) % 3
    ledger = ConvergenceLedger(model, criterion, x, y, whole=True)

    def square(batch: list[int]) -> float:
        return ledger.end(ledger.begin(x[batch], y[batch])).gradient_square

    whole = square(list(range(5)))
    noise = sum(square([i]) for i in range(5)) / 5 - whole
    found = [square(batch) for batch in batches(5, m)]
    expected = batch_gradient_square(whole, noise, batch_size=m, samples=5)
    assert sum(found) / len(found) == pytest.approx(expected, rel=1e-12)


def test_a_longer_step_than_the_theorem_allows_can_ascend():
    # So that the tests above can fail: at s = 2 nothing is bought, beyond it something is lost.
    torch.manual_seed(0)
    x, _ = torch.linalg.qr(torch.randn(4, 2).double())
    problem = Linear(Squared(), x, torch.randn(4, 1).double(), torch.randn(2, 1).double())
    square, noise = problem.moments(problem.W)
    a, _ = expected_decrease(square, noise, batch_size=2, samples=4, curvature=0.25)
    g = problem.gradients(problem.W)
    after = [problem.risk(problem.W - 2.1 * a * g[batch].mean(0)) for batch in batches(4, 2)]
    assert sum(after) / len(after) > problem.risk(problem.W)


def test_no_gradient_and_bad_input():
    options = {"batch_size": 1, "samples": 2, "curvature": 1.0}
    assert expected_decrease(0.0, 1.0, **options) == (0.0, 0.0)
    assert batch_gradient_square(2.0, 0.0, batch_size=1, samples=1) == 2.0
    for change in ({"batch_size": 3}, {"batch_size": 0}, {"curvature": 0.0}, {"safety": 2.0}):
        with pytest.raises(ValueError, match="expected"):
            expected_decrease(1.0, 1.0, **{**options, **change})
    with pytest.raises(ValueError, match="curvature=nan"):
        expected_decrease(1.0, 1.0, **{**options, "curvature": math.nan})
