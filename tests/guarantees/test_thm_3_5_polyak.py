"""Thm 3.5 on convex problems in float64: a Polyak step over a floor nears every minimizer."""

import dataclasses

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from conjopt.optim.step_size import polyak_cap
from conjopt.potentials import Logistic, Potential, Softmax, Squared

EPS = torch.finfo(torch.float64).eps


@dataclasses.dataclass
class Problem:
    """``f = x W`` with targets that the link takes at `best`, or around it for equal inputs."""

    potential: Potential
    x: Tensor  # (m, d)
    y: Tensor  # (m, k)
    W: Tensor  # (d, k)
    best: Tensor  # (d, k)

    def risk(self, W: Tensor) -> Tensor:
        return self.potential.loss(self.y, self.x @ W).mean()

    def gradient(self, W: Tensor) -> Tensor:
        return self.x.T @ (self.potential.link(self.x @ W) - self.y) / len(self.x)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    torch.manual_seed(draw(st.integers(0, 2**32)))
    potential = draw(st.sampled_from([Softmax(), Squared(), Logistic()]))
    m, d, k = draw(st.integers(1, 5)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    x, best = torch.randn(m, d).double(), torch.randn(d, k).double()
    y = potential.link(x @ best)
    if draw(st.booleans()):  # equal inputs whose targets differ: their mean is the best output
        smallest = torch.minimum(y, 1 - y).amin(1, keepdim=True)
        spread = potential.tangent_projection(torch.randn_like(y))
        spread = 0.9 * smallest.abs() * spread / spread.abs().amax(1, keepdim=True).clamp(min=1)
        x, y = torch.cat([x, x]), torch.cat([y + spread, y - spread])
    W = best + draw(st.sampled_from([1e-3, 1.0, 100.0])) * torch.randn(d, k).double()
    return Problem(potential, x, y, W, best)


def excess_over_the_theorem(problem: Problem, floor: Tensor, s: float) -> tuple[float, float]:
    """How far the new distance is over its bound, and what rounding may make of it."""
    R, least = problem.risk(problem.W), problem.risk(problem.best)
    g = problem.gradient(problem.W)
    squared = g.square().sum()
    a = s * polyak_cap(R - floor, squared)
    after = (problem.W - a * g - problem.best).square().sum()
    gain = s * (R - floor) * (2 * (R - least) - s * (R - floor)) / squared
    before = (problem.W - problem.best).square().sum()
    # The losses are right to eps, and over ||g||^2 that is what the bound is right to.
    f = (problem.x @ problem.W).abs().max()
    error = EPS * (1 + R + f) * (R - floor) / squared
    rounding = 64 * (EPS * (before + after) + error)
    return (after - (before - gain)).item(), rounding.item()


@settings(deadline=None, max_examples=300)
@given(problems(), st.sampled_from([0.1, 1.0, 1.9]), st.sampled_from([0.0, 0.1, 1.0]))
def test_step_over_a_floor_nears_the_minimizer(problem: Problem, s: float, below: float):
    floor = problem.risk(problem.best) - below  # any number up to the least risk
    assume(problem.gradient(problem.W).norm() > 1e-6)
    excess, rounding = excess_over_the_theorem(problem, floor, s)
    assert excess <= rounding


def test_at_the_least_risk_every_step_of_the_cap_nears_the_minimizer():
    torch.manual_seed(0)
    x, best = torch.randn(8, 3).double(), torch.randn(3, 4).double()
    problem = Problem(Softmax(), x, Softmax().link(x @ best), best + torch.randn(3, 4), best)
    for _ in range(50):
        before = (problem.W - best).norm()
        g = problem.gradient(problem.W)
        problem.W = problem.W - polyak_cap(problem.risk(problem.W), g.square().sum()) * g
        assert (problem.W - best).norm() < before


def test_linear_losses_attain_the_theorem():
    # One sample, far on the wrong side, where the loss of two classes is linear in the output.
    x, y = torch.ones(1, 1).double(), torch.tensor([[1.0, 0.0]]).double()
    W, best = torch.tensor([[-100.0, 100.0]]).double(), torch.tensor([[20.0, -20.0]]).double()
    problem = Problem(Softmax(), x, y, W, best)
    g = problem.gradient(W)
    cap = polyak_cap(nn.functional.softplus(torch.tensor(200.0).double()), g.square().sum())
    assert cap.item() == pytest.approx(100.0)
    at = W - cap * g
    torch.testing.assert_close(at, torch.zeros(1, 2).double(), rtol=0, atol=1e-9)
