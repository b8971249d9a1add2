"""Five planted faults are found and told apart, healthy runs raise no alarm, and nothing moves."""

import math
import random

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import conjopt
from conjopt import diagnose, entropy, measure
from conjopt.diagnosis import causes, numbers, reading
from conjopt.losses import potential_of

DIGITS = load_digits()
IMAGES = torch.tensor(DIGITS.data, dtype=torch.float32) / 16
LABELS = torch.tensor(DIGITS.target)
KINDS = ("softmax", "squared", "logistic")
SEEDS = (0, 1, 2)


def network(inputs, width, outputs, depth=1, activation=nn.ReLU):
    layers = []
    for _ in range(depth):
        layers += [nn.Linear(inputs, width), activation()]
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, outputs))


def criterion(kind, labels):
    """The loss, its targets and the number of outputs."""
    if kind == "softmax":
        return nn.CrossEntropyLoss(), labels, 10
    if kind == "squared":
        return nn.MSELoss(), nn.functional.one_hot(labels, 10).float(), 10
    return nn.BCEWithLogitsLoss(), (labels % 2).float().unsqueeze(1), 1


def descend(model, loss, x, y, steps, lr, batch, momentum=0.9):
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    for _ in range(steps):
        rows = torch.randint(len(x), (batch,)) if batch < len(x) else slice(None)
        optimizer.zero_grad()
        loss(model(x[rows]), y[rows]).backward()
        optimizer.step()
    return optimizer


def images(number):
    chosen = torch.randperm(len(IMAGES))[:number]
    return IMAGES[chosen], LABELS[chosen]


def contradicted(seed, kind, width, apart):
    """Pairs of inputs at a distance, 0 or small, with labels of different kinds; trained."""
    torch.manual_seed(seed)
    x, labels = images(64)
    x = torch.cat([x, x + apart * torch.randn_like(x)])
    labels = torch.cat([labels, (labels + 1 + 2 * torch.randint(4, (64,))) % 10])
    loss, y, outputs = criterion(kind, labels)
    model = network(64, width, outputs)
    optimizer = descend(model, loss, x, y, 1500, 0.5 if kind == "squared" else 0.2, 128)
    return model, loss, x, y, optimizer, 64


def digits(seed, kind, width, steps, depth=1, activation=nn.ReLU, lr=None):
    torch.manual_seed(seed)
    x, labels = images(512)
    loss, y, outputs = criterion(kind, labels)
    model = network(64, width, outputs, depth, activation)
    lr = lr or (0.2 if kind == "squared" else 0.05)
    return model, loss, x, y, descend(model, loss, x, y, steps, lr, 64), 64


def hovering(seed, kind, steps=2000):
    """A linear signal under noise, in batches of two, at a constant step."""
    torch.manual_seed(seed)
    x = torch.randn(512, 10)
    f = x @ torch.randn(10, 1) * 0.6
    random_label = torch.rand(512, 1) < torch.sigmoid(f)
    if kind == "softmax":
        loss, y, outputs, lr = nn.CrossEntropyLoss(), random_label.squeeze(1).long(), 2, 0.6
    elif kind == "logistic":
        loss, y, outputs, lr = nn.BCEWithLogitsLoss(), random_label.float(), 1, 0.6
    else:
        loss, y, outputs, lr = nn.MSELoss(), f + torch.randn_like(f), 1, 0.1
    model = network(10, 8, outputs, activation=nn.Tanh)
    return model, loss, x, y, descend(model, loss, x, y, steps, lr, 2, momentum=0), 2


def loader_of(case):
    return DataLoader(TensorDataset(case[2], case[3]), batch_size=case[5], shuffle=True)


def diagnosed(case, **options):
    return diagnose(case[0], case[1], loader_of(case), **options)


def with_and_without_optimizer(case):
    return {diagnosed(case).cause, diagnosed(case, optimizer=case[4]).cause}


every_kind = pytest.mark.parametrize("kind", KINDS)
every_seed = pytest.mark.parametrize("seed", SEEDS)
every_pair = pytest.mark.parametrize(
    ("seed", "width"),
    [
        (0, 16),
        (1, 32),
        (2, 48),
        *(
            pytest.param(seed, width, marks=pytest.mark.slow)
            for seed, width in [(0, 32), (0, 48), (1, 16), (1, 48), (2, 16), (2, 32)]
        ),
    ],
)


@every_kind
@every_pair
def test_duplicated_inputs_with_flipped_labels(kind, seed, width):
    case = contradicted(seed, kind, width, 0)
    assert with_and_without_optimizer(case) == {"data floor"}
    found = diagnosed(case).measurements
    expected = entropy.data_floor(case[2], case[3], potential_of(case[1]).potential)
    assert found["floor"] == pytest.approx(float(expected), rel=1e-6)


@every_kind
@every_pair
def test_contradicting_near_copies(kind, seed, width):
    case = contradicted(seed, kind, width, 1e-4)
    assert with_and_without_optimizer(case) == {"conflicting samples"}
    assert diagnosed(case).measurements["floor"] == 0


@every_kind
@every_pair
@pytest.mark.parametrize("depth", [5, pytest.param(8, marks=pytest.mark.slow)])
def test_a_deep_plain_sigmoid_network(kind, seed, width, depth):
    case = digits(seed, kind, width, 400, depth, nn.Sigmoid, lr=0.1)
    assert with_and_without_optimizer(case) == {"collapsed structure"}


@every_kind
@every_pair
@pytest.mark.parametrize("depth", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_a_fresh_network(kind, seed, width, depth):
    case = digits(seed, kind, width, 0, depth)
    assert with_and_without_optimizer(case) == {"gradient energy"}


@every_kind
@every_seed
def test_a_tiny_batch_under_noise(kind, seed):
    case = hovering(seed, kind)
    found = diagnosed(case, optimizer=case[4])
    assert found.cause == "batch noise"
    # The same weights would do under large batches; and the step is what tells.
    assert diagnosed(case, optimizer=case[4], batch_size=128).cause == "gradient energy"
    unknown = diagnosed(case)
    assert unknown.cause == "cannot tell"
    assert "optimizer=" in unknown.evidence
    # The remedy works, which is what the diagnosis promises.
    descend(case[0], case[1], case[2], case[3], 300, 0.1, 128, momentum=0)
    after = diagnosed(case).measurements
    assert after["risk"] < 0.9 * found.measurements["risk"]


@every_kind
@every_pair
@pytest.mark.parametrize(
    "steps", [300, *(pytest.param(steps, marks=pytest.mark.slow) for steps in (30, 1500))]
)
def test_no_false_alarm_on_a_healthy_run(kind, seed, width, steps):
    case = digits(seed, kind, width, steps)
    assert with_and_without_optimizer(case) <= {"gradient energy", "none"}


@every_seed
def test_a_run_that_is_down_is_none(seed):
    found = diagnosed(digits(seed, "softmax", 48, 1500))
    assert found.cause == "none"
    assert {finding.state for finding in found.findings} == {"does not"}


@every_seed
def test_dead_units_are_a_collapse(seed):
    """A trained output bias keeps lo at 1 there, which hides nothing from the criterion."""
    case = digits(seed, "softmax", 16, 0)
    with torch.no_grad():
        case[0][0].bias.fill_(-100)
    descend(*case[:4], 300, 0.5, 512)
    assert diagnosed(case).cause == "collapsed structure"
    assert float(measure.last_layer_bound(case[0], case[2]).min()) == 1


def test_the_split_of_the_residuals_is_that_of_the_jacobian():
    """Against singular values of the Jacobian that plain autograd gives, in float64."""
    torch.manual_seed(0)
    model = network(3, 4, 2, activation=nn.Tanh).double()
    x = torch.randn(12, 3, dtype=torch.float64)
    x[6:] = x[:6] + 1e-5 * torch.randn(6, 3)
    y = torch.randn(12, 2, dtype=torch.float64)
    parameters = tuple(model.parameters())
    names = [name for name, _ in model.named_parameters()]

    def run(*values):
        return torch.func.functional_call(model, dict(zip(names, values)), x).flatten()

    parts = torch.autograd.functional.jacobian(run, parameters)
    J = torch.cat([part.flatten(1) for part in parts], 1)
    U, s, _ = torch.linalg.svd(J)
    e = (model(x) - y).detach().flatten()
    values = torch.zeros(24, dtype=torch.float64)
    values[: len(s)] = s.square()
    small = values < numbers.HIDDEN * values.max() / 12
    share = float(((U.T @ e).square() * small).sum() / e.square().sum())
    G = J.T @ e / 12
    per_sample = torch.stack([J[2 * i : 2 * i + 2].T @ e[2 * i : 2 * i + 2] for i in range(12)])
    found = diagnose(model, nn.MSELoss(), [(x, y)]).measurements
    assert 0.2 < share < 0.99
    assert found["hidden"] == pytest.approx(share, rel=1e-6)
    assert found["gradient"] == pytest.approx(float(G.square().sum()), rel=1e-9)
    assert found["energy"] == pytest.approx(float(per_sample.square().sum(1).mean()), rel=1e-9)
    noise = (per_sample - G).square().sum(1).mean()  # the probe is the whole set
    assert found["noise"] == pytest.approx(float(noise), rel=1e-9)


def test_what_the_floor_explains_is_not_looked_for_again():
    """Against raw targets, pairs of equal inputs leave residuals along eigenvalues that are 0."""
    torch.manual_seed(0)
    x = torch.randn(8, 16).repeat(2, 1)
    y = torch.cat([torch.zeros(8, 1), torch.rand(8, 1) + 2])
    found = diagnose(nn.Linear(16, 1), nn.MSELoss(), [(x, y)]).measurements
    assert found["floor"] > 0.3
    assert found["excess"] > 0.3
    assert found["hidden"] < 1e-6


def test_the_noise_floor_is_that_of_plain_sgd_on_a_quadratic():
    """The stationary covariance of `theta+ = theta - a (H theta + noise)`, solved directly."""
    torch.manual_seed(0)
    A = torch.randn(5, 5, dtype=torch.float64)
    H, B = A @ A.T, torch.randn(5, 5, dtype=torch.float64)
    S, a, m = B @ B.T, 1e-6, 3
    I = torch.eye(5, dtype=torch.float64)  # noqa: E741
    M = I - a * H
    C = torch.linalg.solve(torch.eye(25) - torch.kron(M, M), (a**2 * S / m).flatten())
    excess = float((H * C.view(5, 5)).sum()) / 2
    found = numbers.Numbers(100, 50, 5, 1, 1, 1, 0, 1, noise=float(S.trace()))
    assert causes.noise_floor(found, a, m, whole=False) == pytest.approx(excess, rel=1e-4)
    assert causes.noise_floor(found, a, 100, whole=True) == 0


def test_class_weights_ignored_samples_and_tokens_count_as_the_criterion_counts():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 6), nn.Unflatten(1, (3, 2)))
    x, y = torch.randn(24, 4), torch.randint(3, (24, 2))
    y[::5, 0] = -100
    x[1] = x[2]
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5]))
    found = diagnose(model, loss, [(x[:10], y[:10]), (x[10:], y[10:])]).measurements
    assert found["risk"] == pytest.approx(float(loss(model(x), y).detach()), rel=1e-5)
    gradients = torch.autograd.grad(loss(model(x), y), tuple(model.parameters()))
    square = sum(float(g.square().sum()) for g in gradients)
    assert found["gradient"] == pytest.approx(square, rel=1e-4)
    assert found["dimensions"] == 4


@every_seed
def test_products_bracket_what_matrices_say(monkeypatch, seed):
    torch.manual_seed(seed)
    model, x = network(6, 12, 4, activation=nn.Tanh).double(), torch.randn(60, 6).double()
    y = torch.randint(4, (60,))
    exact = diagnose(model, nn.CrossEntropyLoss(), [(x, y)]).measurements
    monkeypatch.setattr(numbers, "MOST_COORDINATES", 0)
    monkeypatch.setattr(numbers, "PRODUCTS", 25)
    found = diagnose(model, nn.CrossEntropyLoss(), [(x, y)]).measurements
    assert exact["unresolved"] == 0 < found["unresolved"]
    assert 0.01 < exact["hidden"] < 0.9
    high = found["hidden"] + found["unresolved"]
    assert found["hidden"] - 1e-9 <= exact["hidden"] <= high + 1e-9


def test_products_find_conflicts_too(monkeypatch):
    case = contradicted(0, "squared", 16, 1e-4)
    monkeypatch.setattr(numbers, "MOST_COORDINATES", 0)
    assert diagnosed(case).cause == "conflicting samples"


def test_nothing_is_left_changed():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3)
    )
    model[3].eval()
    x, y = torch.randn(40, 4), torch.randint(3, (40,))
    loss = nn.CrossEntropyLoss()
    optimizer = conjopt.ConjSGD(model.parameters(), model=model, loss=loss)
    loss(model(x), y).backward()
    optimizer.step()
    generator = torch.Generator().manual_seed(3)
    loader = DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True, generator=generator)

    def state():
        return [
            *(t.clone() for t in model.state_dict().values()),
            *(p.grad.clone() for p in model.parameters()),
            torch.get_rng_state(),
            generator.get_state(),
            torch.from_numpy(np.random.get_state()[1].copy()),  # noqa: NPY002
        ]

    before, modes, python = state(), [m.training for m in model.modules()], random.getstate()
    first = diagnose(model, loss, loader, optimizer=optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before, state()))
    assert modes == [m.training for m in model.modules()]
    assert python == random.getstate()
    assert str(first) == str(diagnose(model, loss, loader, optimizer=optimizer))
    optimizer.zero_grad()
    loss(model(x), y).backward()
    optimizer.step()
    assert optimizer.status().skipped_steps == 0


def test_a_failure_puts_everything_back():
    model = nn.Linear(2, 3)
    with pytest.raises(TypeError, match="dict"):
        diagnose(model, nn.CrossEntropyLoss(), [{"x": torch.zeros(1, 2)}])
    assert model.training


def test_the_table_names_all_five_with_the_dominant_first():
    case = contradicted(0, "softmax", 16, 0)
    lines = str(diagnosed(case)).splitlines()
    assert lines[0].startswith("data floor: Ent(Y|X) = ")
    table = lines[-5:]
    assert table[0].startswith("data floor")
    assert "holds up the loss" in table[0]
    assert {line[:20].strip() for line in table} == set(causes.CAUSES)
    shares = [finding.share for finding in diagnosed(case, optimizer=case[4]).findings]
    assert sum(shares) == pytest.approx(1)


def test_equal_inputs_are_found_beyond_the_probe():
    torch.manual_seed(0)
    x = torch.randn(300, 3)
    x = torch.cat([x, x])
    y = torch.cat([torch.zeros(300), torch.ones(300)]).long()
    model = nn.Linear(3, 2)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    loader = DataLoader(TensorDataset(x, y), batch_size=50)
    found = diagnose(model, nn.CrossEntropyLoss(), loader, samples=16)
    assert found.cause == "data floor"
    assert found.measurements["samples"] == 600
    assert found.measurements["probed"] == 16
    assert diagnose(model, nn.CrossEntropyLoss(), loader, limit=300).measurements["floor"] == 0


def test_one_sample_cannot_be_compared():
    torch.manual_seed(0)
    found = diagnose(
        nn.Linear(2, 3), nn.CrossEntropyLoss(), [(torch.ones(1, 2), torch.tensor([1]))]
    )
    assert math.isnan(found.measurements["own"])
    assert found.cause in ("gradient energy", "cannot tell")


def test_outputs_that_are_not_finite_are_said():
    model = nn.Linear(2, 3)
    x = torch.ones(4, 2)
    x[1] = torch.nan
    found = diagnose(model, nn.CrossEntropyLoss(), [(x, torch.zeros(4).long())])
    assert found.cause == "cannot tell"
    assert "1 of 4 samples are not finite" in found.evidence


def test_other_optimizers_have_no_step_in_these_units():
    assert "Adam" in causes.step_of(torch.optim.Adam(nn.Linear(1, 1).parameters())).reason
    sgd = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1, momentum=0.9)
    assert causes.step_of(sgd).size == pytest.approx(1)


def test_a_probe_is_drawn_evenly():
    """Each of 20 samples is kept about as often as the others."""
    model, x, y = nn.Linear(1, 1), torch.arange(20.0).unsqueeze(1), torch.zeros(20, 1)
    count = torch.zeros(20)
    for seed in range(400):
        seen = reading.read(model, [(x[:7], y[:7]), (x[7:], y[7:])], samples=5, limit=99, seed=seed)
        assert torch.equal(seen.inputs.squeeze(1).long(), seen.probe)
        count[seen.probe] += 1
    assert count.sum() == 2000
    assert count.min() > 60  # 100 on average, deviation 8.7
    assert count.max() < 140


X, Y = torch.ones(4, 2), torch.zeros(4).long()


@pytest.mark.parametrize(
    ("loader", "options", "error", "message"),
    [
        ([], {}, ValueError, "no samples"),
        (X, {}, TypeError, r"\[\(inputs, targets\)\]"),
        (3, {}, TypeError, "int"),
        ([{"x": X, "y": Y}], {}, TypeError, "dict with the keys"),
        ([X], {}, TypeError, "Tensor"),
        ([(X, Y, Y)], {}, TypeError, "length 3"),
        ([(X, Y[:3])], {}, ValueError, "as many samples"),
        ([(X, Y)], {"samples": 0}, ValueError, "samples=0"),
        ([(X, Y)], {"batch_size": 0}, ValueError, "batch_size=0"),
        ([(X, Y)], {"optimizer": 0.1}, TypeError, "float"),
        ([(X, Y)], {"loss": nn.CrossEntropyLoss(reduction="none")}, ValueError, "reduction"),
        ([(X, Y)], {"loss": nn.L1Loss()}, TypeError, "not recognised"),
    ],
)
def test_bad_input(loader, options, error, message):
    loss = (
        options.pop("loss", nn.CrossEntropyLoss()) if "loss" in options else nn.CrossEntropyLoss()
    )
    with pytest.raises(error, match=message):
        diagnose(nn.Linear(2, 3), loss, loader, **options)


def test_a_frozen_model_is_refused():
    with pytest.raises(ValueError, match="no parameter"):
        diagnose(nn.Linear(2, 3).requires_grad_(False), nn.CrossEntropyLoss(), [(X, Y)])
