"""Thm 3.1 over random runs and over digits: the identity to rounding, its bound never violated."""

import copy
import dataclasses
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from conjopt.bounds import (
    ConvergenceLedger,
    convergence_bound,
    realised_curvature,
)
from conjopt.measure import top_structure
from conjopt.potentials import Softmax

EPS = torch.finfo(torch.float64).eps


@dataclasses.dataclass
class Problem:
    model: nn.Module
    criterion: nn.Module
    x: Tensor
    y: Tensor

    def losses(self) -> Tensor:
        """Of each sample alone: independent of any mean."""
        with torch.no_grad():
            return torch.stack(
                [self.criterion(self.model(x[None]), y[None]) for x, y in zip(self.x, self.y)]
            )


def network(kind: str, k: int, width: int) -> nn.Module:
    if kind == "linear":
        return nn.Linear(3, k)
    last = nn.Linear(width, k)
    if kind == "relu":
        return nn.Sequential(nn.Linear(3, width), nn.ReLU(), last)
    if kind == "normed":
        return nn.Sequential(nn.Linear(3, width), nn.LayerNorm(width), nn.Tanh(), last)
    return nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), last)


@st.composite
def problems(draw: st.DrawFn, dtype: torch.dtype | None = None) -> Problem:
    torch.manual_seed(draw(st.integers(0, 2**32)))
    n, k = draw(st.integers(1, 7)), draw(st.integers(2, 4))
    kind = draw(st.sampled_from(["linear", "relu", "normed", "deep"]))
    model = network(kind, k, draw(st.integers(1, 5)))
    x = torch.randn(n, 3)
    loss = draw(st.sampled_from(["classes", "smoothed", "values", "bits", "huber"]))
    if loss in ("classes", "smoothed"):
        y = torch.randint(k, (n,))
        criterion: nn.Module = nn.CrossEntropyLoss(label_smoothing=0.1 * (loss == "smoothed"))
    else:
        y = torch.rand(n, k)
        criterion = {
            "values": nn.MSELoss(),
            "bits": nn.BCEWithLogitsLoss(),
            "huber": nn.HuberLoss(),  # which potential_of does not know
        }[loss]
    if dtype is None:
        dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    y = y.to(dtype) if y.is_floating_point() else y
    return Problem(model.to(dtype), criterion, x.to(dtype), y)


OPTIMIZERS = {
    "sgd": lambda p, lr: torch.optim.SGD(p, lr=lr),
    "ascent": lambda p, lr: torch.optim.SGD(p, lr=lr, maximize=True),
    "momentum": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9, weight_decay=0.1),
    "adam": lambda p, lr: torch.optim.Adam(p, lr=lr),
}


@dataclasses.dataclass
class Reference:
    """A step as the theorem defines it, from losses of single samples in float64."""

    left: float
    R: float
    R_after: float
    R_out_change: float
    share: float
    size: float  # of what rounding is relative to


def reference_step(problem: Problem, batch: list[int], move: Callable[[], object]) -> Reference:
    """Take a step, and measure it on float64 twins of the model."""
    n, m = len(problem.x), len(batch)
    rest = [i for i in range(n) if i not in batch]

    def twin() -> Problem:
        y = problem.y.double() if problem.y.is_floating_point() else problem.y
        model = copy.deepcopy(problem.model).double()
        return Problem(model, problem.criterion, problem.x.double(), y)

    before = twin()
    losses = before.losses()
    value = sum(before.criterion(before.model(before.x[[i]]), before.y[[i]]) for i in batch) / m
    g = torch.cat([v.flatten() for v in torch.autograd.grad(value, before.model.parameters())])
    move()
    after = twin()
    losses_after = after.losses()
    d = torch.cat(
        [
            (a - b).detach().flatten()
            for a, b in zip(before.model.parameters(), after.model.parameters())
        ]
    )
    R_B, R_B_after = losses[batch].mean(), losses_after[batch].mean()
    L = realised_curvature(R_B.item(), R_B_after.item(), (g @ d).item(), (d @ d).item())
    left = m / n * ((g @ d).item() - L * (d @ d).item() / 2)
    M = (losses_after[rest].mean() - losses[rest].mean()).item() if rest else 0.0
    with torch.no_grad():
        outputs = max(before.model(before.x).abs().max(), after.model(after.x).abs().max())
    size = max(losses.abs().max(), losses_after.abs().max(), outputs, (g @ d).abs()).item()
    after_mean = losses_after.mean().item()
    return Reference(left, losses.mean().item(), after_mean, M, m / n, size)


@settings(max_examples=80)
@given(problems(), st.data())
def test_the_identity_holds_over_any_run(problem: Problem, data: st.DataObject):
    n = len(problem.x)
    name = data.draw(st.sampled_from(sorted(OPTIMIZERS)))
    lr = data.draw(st.sampled_from([1e-6, 1e-2, 0.5, 30.0]))
    optimizer = OPTIMIZERS[name](problem.model.parameters(), lr)
    ledger = ConvergenceLedger(
        problem.model,
        problem.criterion,
        problem.x,
        problem.y,
        whole=True,
        chunk=data.draw(st.integers(1, n)),
    )
    references = []
    for _ in range(data.draw(st.integers(1, 4))):
        m = data.draw(st.integers(1, n))
        batch = data.draw(st.permutations(range(n)))[:m]
        optimizer.zero_grad()
        problem.criterion(problem.model(problem.x[batch]), problem.y[batch]).backward()
        start = ledger.begin(problem.x[batch], problem.y[batch])
        reference = reference_step(problem, batch, optimizer.step)
        record = ledger.end(start)
        assume(math.isfinite(reference.size))
        references.append(reference)
        tolerance = 200 * n * EPS * (1 + reference.size)
        assert record.share == pytest.approx(reference.share, rel=1e-14)
        assert record.risk == pytest.approx(reference.R, abs=tolerance)
        assert record.risk_after == pytest.approx(reference.R_after, abs=tolerance)
        assert (1 - record.share) * record.out_change == pytest.approx(
            (1 - reference.share) * reference.R_out_change, abs=tolerance
        )
        assert record.left == pytest.approx(reference.left, abs=tolerance)
        assert record.left == pytest.approx(record.right, abs=tolerance)
        assert record.consecutive
    # The theorem: both sides over the run, from the definitions and as the ledger has them.
    R_0, R_T = references[0].R, references[-1].R_after
    right = R_0 - R_T + sum((1 - r.share) * r.R_out_change for r in references)
    tolerance = 1000 * n * EPS * (1 + max(r.size for r in references))
    assert sum(r.left for r in references) == pytest.approx(right, abs=tolerance)
    assert ledger.left() == pytest.approx(right, abs=tolerance)
    assert ledger.right() == pytest.approx(right, abs=tolerance)


@settings(max_examples=80)
@given(problems(dtype=torch.float64), st.data())
def test_the_bounds_are_never_violated(problem: Problem, data: st.DataObject):
    n = len(problem.x)
    lr = data.draw(st.sampled_from([1e-3, 1e-1, 0.5, 2.0]))
    sizes = data.draw(st.lists(st.integers(1, n), min_size=1, max_size=5))
    if data.draw(st.booleans()):
        sizes = [sizes[0]] * len(sizes)
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=lr)
    floor = data.draw(st.sampled_from([0.0, -1.0]))
    options = {"whole": True, "floor": floor}
    ledger = ConvergenceLedger(problem.model, problem.criterion, problem.x, problem.y, **options)
    squares = []
    for m in sizes:
        batch = data.draw(st.permutations(range(n)))[:m]
        optimizer.zero_grad()
        problem.criterion(problem.model(problem.x[batch]), problem.y[batch]).backward()
        squares.append(sum(p.grad.square().sum().item() for p in problem.model.parameters()))
        start = ledger.begin(problem.x[batch], problem.y[batch])
        optimizer.step()
        record = ledger.end(start, lr)
        assert record.along_gradient
    moving = [(q, step) for q, step in zip(squares, ledger.steps) if not step.rests]
    assume(moving)
    bound = ledger.bound()
    mean = sum(q for q, _ in moving) / len(moving)
    edges = [lr * step.curvature / 2 for _, step in moving]
    assert bound.of == "gradient square"
    if all(edge + step.edge_error < 1 for edge, (_, step) in zip(edges, moving)):
        weights = [step.share * lr * (1 - edge) for edge, (_, step) in zip(edges, moving)]
        assert bound.applies
        slack = 1 + 1e-7
        weighted = sum(w * q for w, (q, _) in zip(weights, moving)) / sum(weights)
        assert bound.weighted_mean == pytest.approx(weighted, rel=1e-6)
        assert weighted <= bound.weighted_bound * slack + 1e-12
        assert mean <= bound.mean_bound * slack + 1e-12
        # By the identity the bound's slack is what the floor leaves, and nothing else.
        spare = (problem.losses().mean().item() - floor) / sum(weights)
        assert bound.weighted_bound == pytest.approx(weighted + spare, rel=1e-6, abs=1e-12)
    if not math.isnan(bound.constant_bound):
        assert len(set(sizes)) == 1 or len(moving) < len(sizes)
        assert mean <= bound.constant_bound * (1 + 1e-7) + 1e-12
    if len(set(sizes)) == 1 and all(not step.rests for step in ledger.steps):
        # The statement itself, with envelopes: any L >= L_t at this a, and M >= M_t.
        L = max(step.curvature + step.curvature_error for step in ledger.steps)
        M = max(step.out_change for step in ledger.steps)
        value = convergence_bound(
            ledger.steps[0].risk - floor,
            len(sizes),
            batch_size=sizes[0],
            samples=n,
            curvature=L,
            out_change=M,
            step_size=lr,
        )
        assert mean <= value * (1 + 1e-7) + 1e-12


def test_the_constant_of_the_statement():
    # R = L theta^2 / 2, full batch, a = 1/(2L): 3/4 a ||g||^2 is the decrease of every step.
    L, theta, squares = 3.0, 2.0, []
    R_0 = L * theta**2 / 2
    for _ in range(5):
        squares.append((L * theta) ** 2)
        theta -= theta / 2
    R_T = L * theta**2 / 2
    exact = convergence_bound(R_0 - R_T, 5, batch_size=1, samples=1, curvature=L)
    assert exact == pytest.approx(sum(squares) / 5, rel=1e-14)  # attained
    assert exact == pytest.approx(8 / 3 * L * (R_0 - R_T) / 5, rel=1e-14)
    best = convergence_bound(1.0, 5, batch_size=1, samples=1, curvature=L, step_size=1 / L)
    assert best == pytest.approx(2 * L / 5, rel=1e-14)
    for a in (0.0, -0.1, 2 / L, 1.0):
        assert math.isinf(
            convergence_bound(1.0, 5, batch_size=1, samples=1, curvature=L, step_size=a)
        )


def test_the_bounds_of_a_ledger_are_attained():
    # One curvature, L = 1, the whole sample, a = 1/(2L), and the last risk as the floor.
    model, criterion = nn.Linear(3, 1, bias=False).double(), nn.MSELoss()
    x, y = math.sqrt(1.5) * torch.eye(3).double(), torch.ones(3, 1).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    ledger = ConvergenceLedger(model, criterion, x, y, whole=True)
    for _ in range(4):
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        start = ledger.begin(x, y)
        optimizer.step()
        ledger.end(start)
    ledger.floor = ledger.steps[-1].risk_after
    bound, mean = ledger.bound(), ledger.vector("gradient_square").mean().item()
    for value in (bound.mean, bound.weighted_mean, bound.weighted_bound, bound.mean_bound):
        assert value == pytest.approx(mean, rel=1e-9)
    assert bound.constant_bound == pytest.approx(mean, rel=1e-9)
    assert ledger.promise(1).step_size == pytest.approx(0.5, rel=1e-9)


def by_quadrature(problem: Problem, before: list[Tensor], after: list[Tensor]) -> float:
    """L without differences of losses: the mean of second derivatives along the step."""
    nodes, weights = np.polynomial.legendre.leggauss(20)
    d = [b - a for b, a in zip(before, after)]
    square = sum(v.square().sum() for v in d).item()
    names = [name for name, _ in problem.model.named_parameters()]
    total = 0.0
    for node, weight in zip((nodes + 1) / 2, weights / 2):
        at = [(b - node * v).requires_grad_() for b, v in zip(before, d)]
        outputs = torch.func.functional_call(problem.model, dict(zip(names, at)), problem.x)
        value = problem.criterion(outputs, problem.y)
        g = torch.autograd.grad(value, at, create_graph=True)
        slope = sum((a * v).sum() for a, v in zip(g, d))
        second = torch.autograd.grad(slope, at, allow_unused=True, materialize_grads=True)
        form = sum((a * v).sum() for a, v in zip(second, d)).item()
        total += weight * 2 * (1 - node) * form
    return total / square


@settings(max_examples=100)
@given(st.integers(0, 2**32), st.data())
def test_the_error_of_the_curvature_is_covered(seed: int, data: st.DataObject):
    torch.manual_seed(seed)
    n, k = data.draw(st.integers(1, 7)), data.draw(st.integers(2, 4))
    model = network("deep", k, data.draw(st.integers(2, 5))).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(data.draw(st.sampled_from([0.1, 1.0, 3.0])))
    y = torch.randint(k, (n,))
    problem = Problem(model, nn.CrossEntropyLoss(), torch.randn(n, 3).double(), y)
    ledger = ConvergenceLedger(model, problem.criterion, problem.x, y, whole=True)
    before = [p.detach().clone() for p in model.parameters()]
    length = 10.0 ** data.draw(st.integers(-9, -2))
    start = ledger.begin(problem.x, y)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.sub_(length * torch.randn_like(parameter))
    record = ledger.end(start)
    after = [p.detach().clone() for p in model.parameters()]
    expected = by_quadrature(problem, before, after)
    gap = abs(record.curvature - expected)
    assert gap <= record.curvature_error + 1e-9 * abs(expected)


def digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target).long()


@pytest.mark.parametrize(("m", "seed"), [(64, 0), (256, 1), (1000, 2)])
def test_on_digits_in_theorem_mode(m: int, seed: int):
    torch.manual_seed(seed)
    x, y = (t[:1000] for t in digits())
    model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))
    criterion = nn.CrossEntropyLoss()
    ledger = ConvergenceLedger(model, criterion, x, y, whole=True)
    # L from the eigenvalues at the start, doubled: the path must show that it was enough.
    L = 2 * 0.5 * float(top_structure(model, x[:200], potential=Softmax())) / 200
    a = 1 / (2 * L)
    optimizer = torch.optim.SGD(model.parameters(), lr=a)
    squares = []
    for _ in range(40):
        batch = torch.randperm(len(x))[:m]
        optimizer.zero_grad()
        criterion(model(x[batch]), y[batch]).backward()
        squares.append(sum(p.grad.square().sum().item() for p in model.parameters()))
        start = ledger.begin(x[batch], y[batch])
        optimizer.step()
        record = ledger.end(start, a)
        assert record.along_gradient
        assert record.curvature <= L  # the precondition
        # Every prefix of the run is a run.
        bound = ledger.bound()
        mean = sum(squares) / len(squares)
        assert mean <= min(bound.mean_bound, bound.constant_bound) * (1 + 1e-5)
        assert bound.weighted_mean <= bound.weighted_bound
        M = max(step.out_change for step in ledger.steps)
        envelope = convergence_bound(
            ledger.steps[0].risk,
            len(squares),
            batch_size=m,
            samples=len(x),
            curvature=L,
            out_change=M,
        )
        assert mean <= envelope * (1 + 1e-5)
    assert ledger.left() == pytest.approx(ledger.right(), abs=1e-12)
    R_0, R_T = ledger.steps[0].risk, ledger.steps[-1].risk_after
    noise = sum((1 - m / len(x)) * step.out_change for step in ledger.steps)
    assert ledger.left() == pytest.approx(R_0 - R_T + noise, abs=1e-12)
    states = {c.name: c.state for c in ledger.conditions(energy_target=1e3)}
    assert states["C1"] == states["C2"] == states["C4"] == "holds"
