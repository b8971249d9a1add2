"""Thm 3.5 on convex problems in float64: a Polyak step over a floor nears every minimizer."""

import dataclasses

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from conjopt.bounds import polyak_distance
from conjopt.entropy import data_floor
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


@settings(deadline=None, max_examples=200)
@given(problems(), st.sampled_from([0.1, 1.0, 1.9]), st.sampled_from([0.0, 0.1, 1.0]))
def test_the_bound_on_the_distance_covers_the_step(problem: Problem, s: float, below: float):
    R, least = problem.risk(problem.W).item(), problem.risk(problem.best).item()
    g = problem.gradient(problem.W)
    squared = g.square().sum().item()
    assume(squared > 1e-9 and least < R)
    before = (problem.W - problem.best).square().sum().item()
    bound = polyak_distance(before, R - least, R - least + below, squared, s)
    a = s * (R - least + below) / squared
    after = (problem.W - a * g - problem.best).square().sum().item()
    f = (problem.x @ problem.W).abs().max().item()
    rounding = EPS * (before + after + (1 + R + f) * (R - least + below) / squared)
    assert after <= bound + 64 * rounding


def test_the_floor_of_the_data_serves_contradicting_labels():
    # Equal inputs with different labels: the greatest floor for every function of x, reached here.
    x = torch.eye(3).double().repeat_interleave(4, 0)
    y = torch.tensor([0, 0, 0, 1, 1, 1, 0, 0, 1, 0, 1, 1])
    points = nn.functional.one_hot(y, 2).double()
    floor = float(data_floor(x, points, Softmax()))
    shares = points.reshape(3, 4, 2).mean(1)
    best = shares.log() - shares.log().mean(1, keepdim=True)  # the minimizer nearest to 0
    problem = Problem(Softmax(), x, points, torch.zeros(3, 2).double(), best)
    assert floor > 0
    assert problem.risk(problem.best).item() == pytest.approx(floor, rel=1e-12)
    while (excess := problem.risk(problem.W).item() - floor) > 1e-10:
        g = problem.gradient(problem.W)
        squared = g.square().sum().item()
        before = (problem.W - problem.best).square().sum().item()
        bound = polyak_distance(before, excess, excess, squared)
        problem.W = problem.W - excess / squared * g
        after = (problem.W - problem.best).square().sum().item()
        assert after <= bound + 1e-12
        assert bound < before
    assert (problem.W - problem.best).norm() < 1e-3


def test_refused_where_the_theorem_does_not_hold():
    for excess, over_floor in ((1.0, 0.5), (-0.1, 1.0), (float("nan"), 1.0)):
        with pytest.raises(ValueError, match="a floor above the minimum"):
            polyak_distance(1.0, excess, over_floor, 1.0)
    for square, s in ((0.0, 1.0), (1.0, 0.0)):
        with pytest.raises(ValueError, match="no Polyak step"):
            polyak_distance(1.0, 1.0, 1.0, square, s)


def test_a_floor_above_the_minimum_can_lead_away():
    # Why it is refused: R = theta^2 / 2 at 1 and a floor above the risk; the step ascends.
    theta, floor = 1.0, 0.75
    a = (theta**2 / 2 - floor) / theta**2
    assert abs(theta - a * theta) > theta
