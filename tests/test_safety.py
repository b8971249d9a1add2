"""`direction="sgd"` untuned: over random small problems a run stays finite and does not end worse.

A run ends above its start if the mean risk of its last 20 steps is above the first risk by more
than a tenth and three standard errors of a first batch's loss. The risk is that of all samples.
"""

import dataclasses
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from conjopt import ConjSGD
from conjopt.losses import SparsemaxLoss

STEPS, LAST, SAMPLES = 200, 20, 64


@dataclasses.dataclass(frozen=True)
class Setting:
    loss: str
    net: str
    scale: float  # of the inputs
    size: float  # of the targets: squared loss their scale, Poisson the largest count
    batch: int
    noise: float  # share of the targets that are not the teacher's
    seed: int


@dataclasses.dataclass
class Outcome:
    finite: bool
    first: float
    last: float
    margin: float

    @property
    def safe(self) -> bool:
        return self.finite and self.last <= self.first + self.margin


def network(kind: str, k: int) -> nn.Module:
    if kind == "linear":
        return nn.Linear(6, k)
    if kind == "tanh":
        return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, k))
    if kind == "relu":
        return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, k))
    layers = [nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, k)]
    return nn.Sequential(*layers)


def problem(setting: Setting) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    torch.manual_seed(setting.seed)
    k = 3
    model = network(setting.net, k)
    x = torch.randn(SAMPLES, 6)
    teacher = (x @ torch.randn(6, 8)).tanh() @ torch.randn(8, k)
    wrong = torch.rand(SAMPLES) < setting.noise
    x = x * setting.scale
    if setting.loss in ("softmax", "sparsemax"):
        y = torch.where(wrong, torch.randint(k, (SAMPLES,)), teacher.argmax(1))
        return model, nn.CrossEntropyLoss() if setting.loss == "softmax" else SparsemaxLoss(), x, y
    if setting.loss == "squared":
        y = torch.where(wrong[:, None], 2 * torch.randn(SAMPLES, k), teacher) * setting.size
        return model, nn.MSELoss(), x, y
    if setting.loss == "logistic":
        y = torch.where(wrong[:, None], torch.rand(SAMPLES, k) - 0.5, teacher) > 0
        return model, nn.BCEWithLogitsLoss(), x, y.float()
    rates = setting.size * torch.exp(teacher - teacher.max())
    return model, nn.PoissonNLLLoss(), x, torch.poisson(rates)


def run(setting: Setting) -> Outcome:
    model, criterion, x, y = problem(setting)

    def risk() -> float:
        with torch.no_grad():
            return criterion(model(x), y).item()

    with torch.no_grad():
        rows = [criterion(model(x[i : i + 1]), y[i : i + 1]).item() for i in range(SAMPLES)]
    first, spread = risk(), torch.tensor(rows).std().item()
    optimizer = ConjSGD(model.parameters(), model=model, loss=criterion, direction="sgd")
    generator, order = torch.Generator().manual_seed(setting.seed), []
    finite, tail = True, []
    for step in range(STEPS):
        if len(order) < setting.batch:
            order = torch.randperm(SAMPLES, generator=generator).tolist()
        batch, order = order[: setting.batch], order[setting.batch :]
        optimizer.zero_grad()
        value = criterion(model(x[batch]), y[batch])
        value.backward()
        finite = finite and math.isfinite(value.item())
        optimizer.step()
        if step >= STEPS - LAST:
            tail.append(risk())
    finite = finite and optimizer.status().skipped_steps == 0 and all(map(math.isfinite, tail))
    # Poisson's criterion leaves out log y! and can be negative; a tenth of it says nothing then.
    margin = 3 * spread / math.sqrt(setting.batch) + 0.1 * abs(first)
    return Outcome(finite, first, sum(tail) / LAST, margin)


def settings_of(losses: list[str]) -> st.SearchStrategy[Setting]:
    found = st.builds(
        Setting,
        loss=st.sampled_from(losses),
        net=st.sampled_from(["linear", "tanh", "relu", "deep"]),
        scale=st.sampled_from([1e-2, 1e-1, 1.0, 1e1, 1e2]),
        size=st.sampled_from([1e-2, 1e-1, 1.0, 1e1, 1e2, 1e3]),
        batch=st.sampled_from([2, 4, 8, 16, 32]),
        noise=st.sampled_from([0.0, 0.2, 1.0]),
        seed=st.integers(0, 10_000),
    )
    return found.map(
        lambda s: dataclasses.replace(
            s, size=min(s.size, 1e2) if s.loss == "squared" else max(s.size, 1.0)
        )
    )


def check(outcome: Outcome) -> None:
    assert outcome.finite, outcome
    assert outcome.safe, outcome


@settings(max_examples=30, derandomize=True)
@given(settings_of(["softmax", "squared", "logistic", "sparsemax"]))
def test_a_run_stays_finite_and_does_not_end_above_its_start(setting: Setting):
    outcome = run(setting)
    # Beyond, squares of gradients are not finite in float32, and every step is given up.
    assume(outcome.first < 1e10)
    check(outcome)


CURED = [  # of earlier rules
    # Where the predicted rates are small so is the curvature, and outputs could change by 3.
    Setting("Poisson", "tanh", 1.0, 100.0, 2, 0.2, 3927),
    Setting("Poisson", "linear", 0.01, 1000.0, 2, 0.0, 3621),
    Setting("Poisson", "relu", 1.0, 1.0, 8, 1.0, 3211),
    Setting("Poisson", "tanh", 0.01, 1.0, 8, 0.2, 6405),
    Setting("Poisson", "tanh", 1.0, 100.0, 4, 0.2, 9108),
    Setting("Poisson", "relu", 0.1, 10.0, 4, 1.0, 5969),
    Setting("Poisson", "tanh", 1.0, 1.0, 4, 1.0, 7882),
]
# Two samples a step, targets that are noise alone: between two measurements the loss rises tenfold,
# and has not come back after 200 steps. It stays finite.
KNOWN = Setting("squared", "relu", 10.0, 100.0, 2, 1.0, 4082)


@pytest.mark.parametrize("setting", CURED, ids=lambda s: f"{s.loss}-{s.net}-{s.seed}")
def test_found_counterexamples(setting: Setting):
    check(run(setting))


def test_a_known_counterexample_stays_finite():
    assert run(KNOWN).finite


@pytest.mark.xfail(strict=True, reason="a known failure of GradientEdge")
def test_a_known_counterexample():
    check(run(KNOWN))
