"""Thm 3.1 on what ConjSGD does in theorem mode, on real digits: it applies to every step."""

import dataclasses
import functools

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from conjopt import ConjSGD
from conjopt.bounds import ConvergenceLedger
from conjopt.bounds.records import bound_of
from conjopt.optim import Smoothness

SAMPLES, STEPS = 160, 60


@dataclasses.dataclass
class Run:
    ledger: ConvergenceLedger
    optimizer: ConjSGD
    squares: list[float]  # ||g_t||^2 of the criterion, from the loop itself
    taken: list[float]  # a_t in the criterion's units, by the ledger
    limits: list[float]  # what step_size was by the rule
    risk: float  # at the end, over the whole set, float64


def digits() -> tuple[Tensor, Tensor]:
    x, y = load_digits(return_X_y=True)
    return torch.tensor(x[:SAMPLES] / 16), torch.tensor(y[:SAMPLES])


def linear() -> nn.Module:
    return nn.Linear(64, 10)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 20), nn.Tanh(), nn.Linear(20, 10))


def rectified() -> nn.Module:
    return nn.Sequential(
        nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 10)
    )


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 4, 3, stride=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(36, 10),
    )


SETTINGS = {
    "linear, cross-entropy": (linear, nn.CrossEntropyLoss()),
    "tanh, cross-entropy": (mlp, nn.CrossEntropyLoss()),
    "relu, cross-entropy, smoothed": (rectified, nn.CrossEntropyLoss(label_smoothing=0.1)),
    "tanh, squared": (mlp, nn.MSELoss()),
    "relu, logistic": (rectified, nn.BCEWithLogitsLoss()),
    "convolutional, cross-entropy": (convolutional, nn.CrossEntropyLoss()),
}
any_setting = pytest.mark.parametrize("name", SETTINGS)
any_sizes = pytest.mark.parametrize("sizes", [(32,), (8, 64, 20, SAMPLES)], ids=["one", "many"])


@functools.cache
def run(
    name: str,
    sizes: tuple[int, ...],
    dtype: torch.dtype = torch.float64,
    momentum: float = 0,
    safety: float | None = None,
) -> Run:
    make, criterion = SETTINGS[name]
    x, labels = digits()
    x = x.to(dtype)
    one_hot = nn.functional.one_hot(labels, 10).to(dtype)
    y = labels if isinstance(criterion, nn.CrossEntropyLoss) else one_hot
    torch.manual_seed(0)
    model = make().to(dtype)
    ledger = ConvergenceLedger(model, criterion, x, y, whole=True)
    optimizer = ConjSGD(
        model.parameters(),
        model=model,
        loss=criterion,
        direction="sgd",
        momentum=momentum,
        step_rule="smoothness" if safety is None else Smoothness(safety),
        ledger=ledger,
        ledger_every=1,
    )
    squares, taken, limits = [], [], []
    for step in range(STEPS):
        torch.manual_seed(1000 + step)
        rows = torch.randperm(SAMPLES)[: sizes[step % len(sizes)]]
        optimizer.zero_grad()
        criterion(model(x[rows]), y[rows]).backward()
        squares.append(sum(p.grad.double().square().sum().item() for p in model.parameters()))
        optimizer.step()
        limits.append(optimizer.status().step_size)
        taken.append(ledger.steps[-1].step_size)
    with torch.no_grad():
        risk = criterion(model(x).double(), y.double() if y.is_floating_point() else y).item()
    return Run(ledger, optimizer, squares, taken, limits, risk)


@any_sizes
@any_setting
def test_every_step_is_the_theorems(name: str, sizes: tuple[int, ...]):
    found = run(name, sizes)
    scale = {"tanh, squared": 2 / 10, "relu, logistic": 1 / 10}.get(name, 1.0)
    ledger = found.ledger
    assert len(ledger.steps) == STEPS
    for step, square, a, limit in zip(ledger.steps, found.squares, found.taken, found.limits):
        assert step.along_gradient
        assert step.consecutive
        assert step.gradient_square == pytest.approx(square, rel=1e-9)
        assert a * scale == pytest.approx(limit, rel=1e-9)  # the rule's units are a sample's
        assert a > 0
        assert step.edge + step.edge_error < 1  # C1 at each step
    assert ledger.conditions()[0].state == "holds"
    assert found.optimizer.status().conditions[0].state == "holds"


@any_sizes
@any_setting
def test_the_identity_holds_to_rounding(name: str, sizes: tuple[int, ...]):
    ledger = run(name, sizes).ledger
    for step in ledger.steps:
        assert step.left == pytest.approx(step.right, abs=1e-12 * (1 + step.risk))
    assert ledger.left() == pytest.approx(ledger.right(), abs=1e-11)
    risks = [ledger.steps[0].risk, ledger.steps[-1].risk_after]
    noise = sum(step.out_of_batch for step in ledger.steps)
    assert ledger.right() == pytest.approx(risks[0] - risks[1] + noise, abs=1e-11)


@any_sizes
@any_setting
def test_the_bound_is_never_violated(name: str, sizes: tuple[int, ...]):
    found = run(name, sizes)
    ledger, mean = found.ledger, sum(found.squares) / STEPS
    bound = ledger.bound()
    assert bound.applies
    assert bound.of == "gradient square"
    assert bound.mean == pytest.approx(mean, rel=1e-9)
    slack = 1 + 1e-9
    assert mean <= bound.mean_bound * slack
    assert bound.weighted_mean <= bound.weighted_bound * slack
    assert min(found.squares) <= bound.weighted_mean * slack
    # By the identity, the slack is the risk that is left over the floor 0.
    mass = sum(step.weight for step in ledger.steps)
    assert bound.weighted_bound - bound.weighted_mean == pytest.approx(found.risk / mass, rel=1e-6)
    # At every earlier end of the run as well.
    for end in range(1, STEPS):
        part = bound_of(ledger.steps[:end], 0.0, whole=True)
        assert sum(found.squares[:end]) / end <= part.mean_bound * slack
        assert part.weighted_mean <= part.weighted_bound * slack


def test_the_constant_of_the_statement():
    """With `a_t <= 1/(2 L_t)` the weight is at least `3/4 a (m/n)`, and `8/3 L` its constant."""
    whole = 0
    for name in SETTINGS:
        found = run(name, (32,))
        steps, share = found.ledger.steps, 32 / SAMPLES
        if any(step.edge + step.edge_error > 0.25 for step in steps):
            continue  # L_t was above 1/(2a): C1 holds still, the constant does not
        whole += 1
        for step, a in zip(steps, found.taken):
            assert a <= 1 / (2 * step.curvature) or step.curvature <= 0
            assert step.left >= 0.75 * share * a * step.gradient_square * (1 - 1e-9)
        L = 1 / (2 * min(found.taken))  # the largest, as the theorem has one
        noise = sum(step.out_of_batch for step in steps) / len(steps)  # ((n-m)/n) M
        bracket = (steps[0].risk / len(steps) + noise) / share
        assert sum(found.squares) / len(steps) <= 8 / 3 * L * bracket
    assert whole >= 3


@pytest.mark.parametrize("name", ["linear, cross-entropy", "tanh, cross-entropy"])
def test_a_float32_run_is_the_theorems_but_for_its_rounding(name: str):
    found = run(name, (32, 90), torch.float32)
    assert all(step.along_gradient for step in found.ledger.steps)
    assert found.ledger.conditions()[0].state == "holds"
    assert found.ledger.left() == pytest.approx(found.ledger.right(), abs=1e-11)
    bound = found.ledger.bound()
    assert bound.mean <= bound.mean_bound


def test_momentum_is_not_the_theorems():
    """What tells the two apart: the displacement of a heavy ball is not along the gradient."""
    found = run("tanh, cross-entropy", (32,), momentum=0.9)
    assert sum(step.along_gradient for step in found.ledger.steps) == 1  # the first
    assert found.ledger.left() == pytest.approx(found.ledger.right(), abs=1e-11)
    assert found.ledger.bound().of == "slope"


def test_longer_steps_than_the_theorem_allows_are_told():
    found = run("linear, cross-entropy", (32,), safety=0.01)
    assert found.ledger.conditions()[0].state == "fails"
    assert found.optimizer.status().conditions[0].state == "fails"
    assert not found.ledger.bound().applies
