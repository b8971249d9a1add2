"""Thm 3.4: rates of exact expectations over all batches, and refused where there is none."""

import dataclasses
import itertools

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from conjopt.bounds import expected_decrease, linear_rate, one_hot_rate, pl_constant
from conjopt.losses import FenchelYoungLoss
from conjopt.measure import batch_structure_matrix, extreme_eigenvalues
from conjopt.potentials import Logistic, Potential, Softmax, Squared


@dataclasses.dataclass
class Linear:
    """``f = x W`` of independent inputs, so that a minimizer of value 0 (or none) exists."""

    potential: Potential
    x: Tensor  # (n, d)
    y: Tensor  # (n, k)
    W: Tensor  # (d, k)

    def losses(self, W: Tensor) -> Tensor:
        return self.potential.loss(self.y, self.x @ W)

    def residuals(self, W: Tensor) -> Tensor:
        return self.potential.link(self.x @ W) - self.y

    def extremes(self) -> tuple[float, float]:
        """Of K, from the package."""
        d, k = self.W.shape
        model = nn.Linear(d, k, bias=False).double()
        with torch.no_grad():
            model.weight.copy_(self.W.T)
        K = batch_structure_matrix(model, self.x, potential=self.potential)
        lo, hi = extreme_eigenvalues(K)
        return lo.item(), hi.item()


@dataclasses.dataclass
class Path:
    """All runs of some steps over all batches."""

    risks: list[float]  # exact expectations after 0, 1, ... steps
    correlation: float  # the least
    residual: float  # the greatest ||e||
    loss: float  # the greatest of a sample
    ratio: float  # the least ||G||^2 / (2 R)


def every_run(problem: Linear, steps: int, m: int, L: float, s: float) -> Path:
    n = len(problem.x)
    path = Path([], 1.0, 0.0, 0.0, float("inf"))
    places = [problem.W]
    for step in range(steps + 1):
        path.risks.append(sum(problem.losses(W).mean().item() for W in places) / len(places))
        following = []
        for W in places:
            losses, e = problem.losses(W), problem.residuals(W)
            g = problem.x[:, :, None] * e[:, None, :]
            square = g.mean(0).square().sum().item()
            noise = g.flatten(1).square().sum(1).mean().item() - square
            path.residual = max(path.residual, e.norm(dim=1).max().item())
            path.loss = max(path.loss, losses.max().item())
            R = losses.mean().item()
            if R > 1e-200:
                path.ratio = min(path.ratio, square / (2 * R))
            options = {"batch_size": m, "samples": n, "curvature": L, "safety": s}
            a, _ = expected_decrease(square, max(noise, 0.0), **options)
            path.correlation = min(path.correlation, a * L / s)
            if step < steps:
                chosen = itertools.combinations(range(n), m)
                following += [W - a * g[list(batch)].mean(0) for batch in chosen]
        places = following
    return path


@st.composite
def problems(draw: st.DrawFn, kind: str) -> tuple[Linear, int, float]:
    torch.manual_seed(draw(st.integers(0, 2**32)))
    n, k = draw(st.integers(1, 4)), draw(st.integers(2, 3))
    d = n + draw(st.integers(0, 2))
    x, W = torch.randn(n, d).double(), torch.randn(d, k).double()
    classes = torch.randint(k, (n,))
    if kind == "squared":
        problem = Linear(Squared(), x, torch.randn(n, k).double(), W)
    else:
        smoothing = 0.0 if kind == "one-hot" else 0.5
        y = (1 - smoothing) * nn.functional.one_hot(classes, k).double() + smoothing / k
        if smoothing:  # near the minimizer, where the theorem speaks
            W = torch.linalg.lstsq(x, y.log()).solution + 0.1 * W
        problem = Linear(Softmax(), x, y, W)
    return problem, draw(st.integers(1, n)), draw(st.sampled_from([0.5, 1.0, 1.5]))


@settings(max_examples=60)
@given(problems("squared"), st.integers(1, 3))
def test_linear_rate_of_squared_losses(drawn: tuple[Linear, int, float], steps: int):
    problem, m, s = drawn
    n = len(problem.x)
    lo, hi = problem.extremes()
    L = hi / n
    path = every_run(problem, steps, m, L, s)
    mu = pl_constant(FenchelYoungLoss(Squared()), problem.y, lo=lo, samples=n)
    assert mu == pytest.approx(lo / n)
    assert mu <= path.ratio * (1 + 1e-9)  # the PL inequality
    for T, risk in enumerate(path.risks):
        options = {"mu": mu, "curvature": L, "correlation": path.correlation, "safety": s}
        rounding = 1e-28 * (1 + problem.y.square().sum() + path.risks[0]).item()  # squared
        assert risk <= linear_rate(path.risks[0], T, **options) * (1 + 1e-10) + rounding


def test_linear_rate_is_attained():
    # Orthonormal inputs: one curvature, mu = L, and s = 1 over the whole sample goes all the way.
    x = torch.eye(3).double()
    problem = Linear(Squared(), x, torch.zeros(3, 1).double(), torch.ones(3, 1).double())
    for s in (0.5, 1.0, 1.5):
        risks = every_run(problem, 3, 3, 1 / 3, s).risks
        expected = [linear_rate(risks[0], T, mu=1 / 3, curvature=1 / 3, safety=s) for T in range(4)]
        assert risks == pytest.approx(expected, rel=1e-12, abs=1e-30)


@settings(max_examples=60)
@given(problems("smoothed"), st.integers(1, 3))
def test_linear_rate_of_smoothed_targets(drawn: tuple[Linear, int, float], steps: int):
    problem, m, s = drawn
    n, k = problem.y.shape
    lo, hi = problem.extremes()
    L = hi / 2 / n
    path = every_run(problem, steps, m, L, s)
    residual = path.residual * ((k - 1) / k) ** 0.5
    assume(residual < problem.y.min().item() and path.risks[0] > 1e-12)
    options = {"lo": lo, "samples": n, "residual": residual}
    mu = pl_constant(nn.CrossEntropyLoss(), problem.y, **options)
    assert mu == pytest.approx(lo / n * (problem.y.min().item() - residual))
    # The same from class numbers and the criterion's own smoothing.
    criterion, classes = nn.CrossEntropyLoss(label_smoothing=0.5), problem.y.argmax(1)
    assert pl_constant(criterion, classes, classes=k, **options) == pytest.approx(mu)
    for T, risk in enumerate(path.risks):
        rate = {"mu": mu, "curvature": L, "correlation": path.correlation, "safety": s}
        assert risk <= linear_rate(path.risks[0], T, **rate) * (1 + 1e-9) + 1e-14


@settings(max_examples=60)
@given(problems("one-hot"), st.integers(1, 3))
def test_one_hot_rate(drawn: tuple[Linear, int, float], steps: int):
    problem, m, s = drawn
    n, k = problem.y.shape
    lo, hi = problem.extremes()
    L = hi / 2 / n
    path = every_run(problem, steps, m, L, s)
    for T, risk in enumerate(path.risks):
        bound = one_hot_rate(
            path.risks[0],
            T,
            lo=lo,
            samples=n,
            classes=k,
            max_loss=path.loss,
            curvature=L,
            correlation=path.correlation,
            safety=s,
        )
        assert risk <= bound * (1 + 1e-10)


@pytest.mark.parametrize("k", [2, 5])
def test_one_hot_losses_have_no_pl_constant_but_the_square_of_the_risk(k: int):
    # One sample, equally likely wrong classes: ||G||^2 / R vanishes, ||G||^2 / R^2 does not.
    problem = Linear(
        Softmax(),
        torch.ones(1, 1).double(),
        torch.eye(k).double()[:1],
        torch.zeros(1, k).double(),
    )
    ratios, squares = [], []
    for logit in (1.0, 10.0, 20.0):
        W = torch.zeros(1, k).double()
        W[0, 0] = logit
        R, e = problem.losses(W).item(), problem.residuals(W)
        ratios.append(e.square().sum().item() / R)
        squares.append(e.square().sum().item() / R**2)
    assert ratios[2] < 1e-4 * ratios[1] < 1e-6 * ratios[0]
    assert squares[2] == pytest.approx(k / (k - 1), rel=1e-6)  # where c -> 1 it is attained


def test_refused_where_there_is_no_rate():
    options = {"lo": 1.0, "samples": 4, "residual": 0.01}
    classes, one_hot = torch.tensor([0, 1, 2, 0]), torch.eye(4).double()
    for targets in (classes, one_hot):
        for loss in (nn.CrossEntropyLoss(), FenchelYoungLoss(Softmax())):
            with pytest.raises(ValueError, match=r"one_hot_rate.*label_smoothing"):
                pl_constant(loss, targets, **options)
    smoothed = nn.CrossEntropyLoss(label_smoothing=0.1)
    with pytest.raises(ValueError, match="pass classes="):
        pl_constant(smoothed, classes, **options)
    for residual in (None, 0.5, -1.0):
        with pytest.raises(ValueError, match="below the least share"):
            pl_constant(smoothed, one_hot, lo=1.0, samples=4, residual=residual)
    with pytest.raises(ValueError, match="no PL constant is known"):
        pl_constant(FenchelYoungLoss(Logistic()), one_hot, **options)
    with pytest.raises(ValueError, match="equal weights"):
        pl_constant(nn.CrossEntropyLoss(weight=torch.ones(3)), classes, **options)
    with pytest.raises(ValueError, match="lo >= 0"):
        pl_constant(nn.MSELoss(), one_hot, lo=-1.0, samples=4)
    with pytest.raises(ValueError, match="one_hot_rate, or label smoothing"):
        linear_rate(1.0, 3, mu=0.0, curvature=1.0)
    with pytest.raises(ValueError, match="mu <= L"):
        linear_rate(1.0, 3, mu=2.0, curvature=1.0)
    rate = {"lo": 1.0, "samples": 4, "classes": 2, "max_loss": 1.0, "curvature": 1.0}
    for change in ({"classes": 1}, {"max_loss": 0.1}, {"correlation": 1.1}, {"safety": 0.0}):
        with pytest.raises(ValueError, match=r"expected|number"):
            one_hot_rate(0.5, 3, **{**rate, **change})
    assert one_hot_rate(0.0, 3, **rate) == 0.0
