"""`optimizer.status()`, its table, its conditions, and a ledger that records the run."""

import copy
import dataclasses
import math

import pytest
import torch
from test_bad_input import same, untouched
from torch import nn

from conjopt import ConjSGD
from conjopt.bounds import ConvergenceLedger
from conjopt.measure import extreme_eigenvalues, structure_matrix
from conjopt.optim.status import Status
from conjopt.potentials import Softmax

CRITERION = nn.CrossEntropyLoss()
OPTIONS = {
    "spectral": {},
    "edge": {"direction": "sgd"},
    "smoothness": {"direction": "sgd", "step_rule": "smoothness", "momentum": 0},
    "polyak": {"direction": "sgd", "step_rule": "polyak", "momentum": 0},
    "constant": {"direction": "sgd", "step_rule": "constant", "lr": 0.1},
}
any_options = pytest.mark.parametrize("name", OPTIONS)
X = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))
Y = X[:, :3].argmax(1)


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


def ledger_of(model, **options):
    return ConvergenceLedger(model, CRITERION, X, Y, **{"whole": True, **options})


def make(model, **options):
    return ConjSGD(model.parameters(), model=model, loss=CRITERION, **options)


def train(model, optimizer, steps, start=0, size=8):
    for step in range(start, start + steps):
        rows = torch.randperm(24, generator=torch.Generator().manual_seed(step))[:size]
        optimizer.zero_grad()
        CRITERION(model(X[rows]), Y[rows]).backward()
        optimizer.step()


# The fields.

UNMEASURED = {  # the NaN of a status after some steps, by options
    "spectral": {"top_curvature", "lo", "hi"},
    "edge": {"slope", "lo", "hi"},
    "smoothness": {"slope", "lo", "hi"},
    "polyak": {"slope", "top_curvature", "lo", "hi"},
    "constant": {
        "loss",
        "slope",
        "raw_slope",
        "correlation",
        "curvature",
        "top_curvature",
        "output_change",
        "gradient_energy",
        "noise_scale",
        "lo",
        "hi",
    },
}
LIMITS = {
    "spectral": ["edge", "Polyak cap", "trust region"],
    "edge": ["edge", "stability", "trust region"],
    "smoothness": ["1/(2L)"],
    "polyak": ["Polyak step", "trust region"],
    "constant": [],
}


@any_options
def test_every_field_is_measured_or_says_that_it_is_not(name):
    model = network()
    optimizer = make(model, **OPTIONS[name])
    train(model, optimizer, 30)
    status = optimizer.status()
    numbers = {
        field.name: value
        for field in dataclasses.fields(Status)
        if isinstance(value := getattr(status, field.name), float)
    }
    assert {n for n, value in numbers.items() if math.isnan(value)} == UNMEASURED[name]
    assert (status.step, status.skipped_steps) == (30, 0)
    assert list(status.limits) == LIMITS[name]
    assert status.limited_by in (status.limits or ["lr"])
    assert status.step_size == pytest.approx(min(status.limits.values(), default=0.1))
    assert status.batch_size == (None if name == "constant" else 8)
    assert status.recommended_batch_size is None
    assert status.brake == 1
    assert [condition.name for condition in status.conditions] == ["C1", "C2", "C3", "C4"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        status.step = 0


def test_the_numbers_along_the_gradient_are_the_batchs():
    model = network(torch.float64)
    optimizer = make(model, direction="sgd", momentum=0, warmup=1)
    x, y = X.double(), Y
    loss = CRITERION(model(x), y)
    loss.backward()
    g = [p.grad.clone() for p in model.parameters()]
    halves = []
    for part in (slice(0, None, 2), slice(1, None, 2)):
        halves.append(
            torch.cat(
                [
                    t.flatten()
                    for t in torch.autograd.grad(
                        nn.functional.cross_entropy(model(x[part]), y[part]),
                        list(model.parameters()),
                    )
                ]
            )
        )
    optimizer.step()
    status = optimizer.status()
    square = float(sum(t.square().sum() for t in g))
    inner = float(halves[0] @ halves[1])
    noise = 24 / 4 * float((halves[0] - halves[1]).square().sum())
    assert status.loss == pytest.approx(loss.item(), rel=1e-12)
    assert status.raw_slope == pytest.approx(square, rel=1e-12)
    assert status.correlation == pytest.approx(inner / square, rel=1e-10)
    assert status.gradient_energy == pytest.approx(inner + noise, rel=1e-10)
    assert status.noise_scale == pytest.approx(noise / inner, rel=1e-10)
    assert status.curvature <= status.top_curvature * square * (1 + 1e-12)


def test_the_brake_is_told():
    model = network()
    optimizer = make(model, direction="sgd")
    train(model, optimizer, 25)
    assert "braked" not in str(optimizer.status())
    optimizer._statistics.brake = torch.tensor(0.25)
    assert optimizer.status().brake == 0.25
    assert "braked by 0.25)" in str(optimizer.status())


# The table.


@any_options
def test_the_table_has_every_row(name):
    model = network()
    optimizer = make(model, **OPTIONS[name])
    train(model, optimizer, 3)
    status = optimizer.status()
    rows = {line[:16].strip(): line[17:] for line in str(status).splitlines()}
    assert list(rows) == [
        "step",
        "step size",
        "limits",
        "loss",
        "slope",
        "correlation",
        "curvature",
        "output change",
        "gradient energy",
        "noise scale",
        "batch size",
        "eigenvalues",
        "C1",
        "C2",
        "C3",
        "C4",
        "Thm 3.6",
    ]
    assert rows["step"] == "3, 0 skipped"
    assert rows["step size"] == f"{status.step_size:.4g} (limited by {status.limited_by})"
    limits = ", ".join(f"{n} {v:.3g}" for n, v in status.limits.items())
    assert rows["limits"] == (limits or "none")
    assert rows["eigenvalues"] == "lo not measured, hi not measured"
    for condition in status.conditions:
        assert rows[condition.name] == f"{condition.state}: {condition.text}"
    assert "nan" not in str(status)


def test_the_documentation_names_every_row():
    from test_docs import ROOT

    page = (ROOT / "docs" / "convergence.md").read_text(encoding="utf-8")
    model = network()
    status = make(model).status()
    for line in str(status).splitlines():
        assert f"| `{line[:16].strip()}` |" in page
    for field in dataclasses.fields(Status):
        assert f"`{field.name}`" in page or field.name == "conditions"


# Conditions without a ledger.


def test_the_conditions_of_the_measurements_alone():
    model = network()
    optimizer = make(model, direction="sgd")
    train(model, optimizer, 40)
    status = optimizer.status()
    one, two, three, four = status.conditions
    assert one.number == pytest.approx(status.step_size * status.top_curvature / 2, rel=1e-6)
    assert (one.state, one.margin) == ("holds", 1 - one.number)
    assert (two.state, three.state) == ("unknown", "unknown")
    assert (four.state, four.number) == ("holds", status.loss)
    assert all("ledger=" in condition.text for condition in (one, two, three))


def test_the_first_condition_of_held_out_slopes_goes_by_the_direction():
    model = network()
    optimizer = make(model)
    train(model, optimizer, 40)
    status = optimizer.status()
    number = status.step_size * status.curvature / (2 * status.raw_slope)
    assert status.conditions[0].number == pytest.approx(number, rel=1e-6)


def test_a_step_that_is_too_long_is_told():
    model = network()
    optimizer = make(model, direction="sgd", step_rule="smoothness", momentum=0, lr=10.0)
    train(model, optimizer, 1)
    condition = optimizer.status().conditions[0]
    assert condition.state == "fails"
    assert condition.margin < 0


@pytest.mark.parametrize("name", ["polyak", "constant"])
def test_the_first_condition_is_unknown_where_no_curvature_is_measured(name):
    model = network()
    optimizer = make(model, **OPTIONS[name])
    train(model, optimizer, 3)
    assert optimizer.status().conditions[0].state == "unknown"


# With a ledger.


@any_options
def test_a_ledger_does_not_change_the_run(name):
    model, twin = network(), network()
    ledger = ledger_of(twin)
    optimizer = make(model, warmup=4, measure_every=3, **OPTIONS[name])
    other = make(twin, warmup=4, measure_every=3, ledger=ledger, ledger_every=2, **OPTIONS[name])
    train(model, optimizer, 15)
    train(twin, other, 15)
    assert same(model.state_dict(), twin.state_dict())
    assert same(optimizer.state_dict(), other.state_dict())
    assert len(ledger.steps) == 8


@pytest.mark.parametrize("every", [1, 4, 25])
def test_every_so_many_steps_are_recorded(every):
    model = network()
    ledger = ledger_of(model)
    optimizer = make(model, direction="sgd", ledger=ledger, ledger_every=every)
    train(model, optimizer, 30)
    assert len(ledger.steps) == math.ceil(30 / every)
    assert all(step.consecutive for step in ledger.steps) == (every == 1)
    assert ledger.left() == pytest.approx(ledger.right(), abs=1e-12)


def test_a_constant_rule_with_a_ledger_is_torchs_sgd():
    model, twin = network(), network()
    ledger = ledger_of(model)
    options = {"momentum": 0.9, "nesterov": True}
    optimizer = make(
        model,
        direction="sgd",
        step_rule="constant",
        lr=0.1,
        ledger=ledger,
        ledger_every=3,
        **options,
    )
    other = torch.optim.SGD(twin.parameters(), lr=0.1, **options)
    train(model, optimizer, 20)
    train(twin, other, 20)
    assert same(model.state_dict(), twin.state_dict())
    assert len(ledger.steps) == 7
    assert optimizer.status().conditions[0].state == "holds"


def test_the_conditions_are_the_ledgers():
    model = network()
    ledger = ledger_of(model)
    optimizer = make(model, direction="sgd", ledger=ledger, ledger_every=1)
    assert optimizer.status().conditions[0].state == "unknown"  # none is recorded yet
    train(model, optimizer, 10)
    assert list(optimizer.status().conditions) == ledger.conditions()
    assert "of 10 steps" in str(optimizer.status())


def test_the_eigenvalues_are_those_of_the_last_probe():
    model = network(torch.float64)
    ledger = ConvergenceLedger(model, CRITERION, X.double(), Y, whole=True)
    optimizer = make(model, direction="sgd", ledger=ledger)
    assert math.isnan(optimizer.status().lo)
    ledger.probe_eigenvalues(24)
    x, y = X.double(), Y
    for _ in range(3):
        optimizer.zero_grad()
        CRITERION(model(x), y).backward()
        optimizer.step()
    ledger.probe_eigenvalues(24)
    status = optimizer.status()
    lo, hi = extreme_eigenvalues(structure_matrix(model, x, potential=Softmax()))
    assert status.lo == pytest.approx(lo.min().item(), rel=1e-9)
    assert status.hi == pytest.approx(hi.max().item(), rel=1e-9)
    assert status.conditions[2].state == "holds"
    assert f"lo {status.lo:.4g}, hi {status.hi:.4g}" in str(status)


class Named(nn.Module):
    """A model with a keyword argument."""

    def __init__(self):
        super().__init__()
        self.net = network()

    def forward(self, x, *, shift):
        return self.net(x) + shift


@pytest.mark.parametrize("positional", [True, False])
def test_forwards_with_keywords_are_recorded(positional):
    model, shift = Named(), torch.randn(24, 3)
    from conjopt.measure.layers.tape import Arguments

    whole = Arguments((X,), {"shift": shift}) if positional else {"x": X, "shift": shift}
    ledger = ConvergenceLedger(model, CRITERION, whole, Y, whole=True)
    optimizer = make(model, direction="sgd", ledger=ledger, ledger_every=1, momentum=0)
    for step in range(3):
        rows = torch.randperm(24, generator=torch.Generator().manual_seed(step))[:8]
        optimizer.zero_grad()
        args = (X[rows],) if positional else ()
        named = {} if positional else {"x": X[rows]}
        CRITERION(model(*args, **named, shift=shift[rows]), Y[rows]).backward()
        optimizer.step()
    assert [step.batch_size for step in ledger.steps] == [8, 8, 8]
    assert all(step.along_gradient for step in ledger.steps)
    assert ledger.left() == pytest.approx(ledger.right(), abs=1e-12)


# What is refused.


@pytest.mark.parametrize("given", [True, "ledger", object(), ConvergenceLedger])
def test_a_ledger_of_another_type_is_refused(given):
    model = network()
    with pytest.raises(TypeError, match=r"as ledger=, expected a\s+conjopt.bounds.ConvergenceLed"):
        make(model, ledger=given)


@pytest.mark.parametrize("every", [0, -1, 2.5, True, math.inf])
def test_steps_between_records_are_a_whole_number(every):
    model = network()
    with pytest.raises(ValueError, match=f"ledger_every={every}, expected a whole number >= 1"):
        make(model, ledger=ledger_of(model), ledger_every=every)


def accumulated(model):
    CRITERION(model(X[:8]), Y[:8]).backward()
    CRITERION(model(X[8:16]), Y[8:16]).backward()


def reshaped(model):
    CRITERION(2 * model(X[:8]), Y[:8]).backward()


@any_options
@pytest.mark.parametrize("scenario", [accumulated, reshaped])
def test_steps_that_a_ledger_cannot_record_are_refused_without_a_trace(scenario, name):
    model, twin = network(), network()
    ledger = ledger_of(model)
    optimizer = make(model, ledger=ledger, ledger_every=1, **OPTIONS[name])
    other = make(twin, **OPTIONS[name])
    train(model, optimizer, 3)
    train(twin, other, 3)
    optimizer.zero_grad()
    scenario(model)
    record = copy.deepcopy(ledger.state_dict())
    with (
        untouched(model, optimizer),
        pytest.raises(RuntimeError, match=r"ledger.begin\(inputs, targets\).*around step"),
    ):
        optimizer.step()
    assert ledger.state_dict() == record
    train(model, optimizer, 3, 3)
    train(twin, other, 3, 3)
    assert same(model.state_dict(), twin.state_dict())


def test_a_batch_that_the_ledgers_set_does_not_hold_is_refused_without_a_trace():
    model = network()
    ledger = ledger_of(model)
    optimizer = make(model, direction="sgd", ledger=ledger, ledger_every=1)
    train(model, optimizer, 2)
    optimizer.zero_grad()
    CRITERION(model(X[:8] + 1), Y[:8]).backward()
    with untouched(model, optimizer), pytest.raises(ValueError, match="not in the set"):
        optimizer.step()
    assert len(ledger.steps) == 2


def test_a_step_that_is_given_up_is_not_recorded():
    model = network()
    ledger = ledger_of(model)
    optimizer = make(model, direction="sgd", ledger=ledger, ledger_every=1)
    train(model, optimizer, 2)
    optimizer.zero_grad()
    (CRITERION(model(X[:8]), Y[:8]) * math.nan).backward()
    with pytest.warns(RuntimeWarning, match="gave up"):
        optimizer.step()
    assert len(ledger.steps) == 2
    train(model, optimizer, 2, 2)
    assert len(ledger.steps) == 4
