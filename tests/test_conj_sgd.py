"""ConjSGD in a user's hands; torch's own features are in tests/torch_features."""

import copy
import gc
import math
import weakref

import pytest
import torch
from loop import (
    RULES,
    any_rule,
    backward,
    criterion_of,
    data,
    equal,
    hooks_of,
    make,
    network,
    parameters,
    same,
    train,
)
from torch import nn

from conjopt import ConjSGD
from conjopt.losses import SoftmaxLoss


@any_rule
def test_the_decay_is_capped(rule):
    """theta (1 - min(weight_decay a, max_decay)) - a u, from the same theta and u."""
    for decay in (0.01, 1e3):
        model, twin = network(torch.float64), network(torch.float64)
        before = parameters(model)
        optimizer = make(model, weight_decay=decay, max_decay=0.004, **RULES[rule])
        train(model, optimizer, 1)
        train(twin, make(twin, weight_decay=0.0, **RULES[rule]), 1)
        taken = min(decay * optimizer.status().step_size, 0.004)
        for old, p, q in zip(before, model.parameters(), twin.parameters()):
            torch.testing.assert_close(q - p, old * taken, rtol=1e-6, atol=1e-15)


@pytest.mark.parametrize(
    ("criterion", "options", "expected"),
    [
        (nn.CrossEntropyLoss(), {}, 0.1),
        (SoftmaxLoss(), {}, 0.1),
        (nn.BCEWithLogitsLoss(), {}, 0.1),
        (nn.CrossEntropyLoss(), {"step_rule": "constant"}, 0.1),
        (nn.MSELoss(), {}, 0.0),
        (nn.CrossEntropyLoss(), {"direction": "sgd"}, 0.0),
        (nn.BCEWithLogitsLoss(), {"direction": "sgd"}, 0.0),
        (nn.CrossEntropyLoss(), {"weight_decay": 0.02}, 0.02),
        (nn.CrossEntropyLoss(), {"weight_decay": 0.0}, 0.0),
        (nn.MSELoss(), {"weight_decay": 0.3, "direction": "sgd"}, 0.3),
    ],
)
def test_weight_decay_of_none_follows_from_the_loss(criterion, options, expected):
    assert make(network(), criterion, **options).param_groups[0]["weight_decay"] == expected


# The cap on the step.


@pytest.mark.parametrize("cap", [0.001, 0.0007, 0.0013, 1e-5, 0])
@any_rule
def test_max_step_is_respected_and_said(rule, cap):
    model = network()
    optimizer = make(model, max_step=cap, weight_decay=0.0, **RULES[rule])
    before = parameters(model)
    train(model, optimizer, 1)
    status = optimizer.status()
    assert status.limited_by == "max_step"
    assert status.step_size == pytest.approx(cap, rel=1e-6)
    assert "(limited by max_step)" in str(status)
    if rule == "sgd constant":
        for old, p in zip(before, model.parameters()):
            torch.testing.assert_close(p, old - cap * 1.9 * p.grad)  # Nesterov's first step
    assert equal(before, parameters(model)) == (cap == 0)


# The tail average.


@any_rule
@pytest.mark.parametrize("average", [0.1, 0.5])
def test_averaged_is_the_running_mean_of_the_docstring(average, rule):
    model = network(torch.float64)
    optimizer = make(model, average=average, **RULES[rule])
    mean = None
    for step in range(12):
        train(model, optimizer, 1, step)
        now = parameters(model)
        weight = 1 / (average * (step + 1) + 1)
        mean = now if mean is None else [m + weight * (p - m) for m, p in zip(mean, now)]
        with optimizer.averaged():
            for m, p in zip(mean, model.parameters(), strict=True):
                torch.testing.assert_close(p.detach(), m, rtol=1e-12, atol=1e-14)
        assert equal(now, parameters(model))


def test_averaged_puts_the_parameters_back_after_an_exception():
    model = network()
    optimizer = make(model, average=0.1)
    train(model, optimizer, 4)
    before, state = parameters(model), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ZeroDivisionError), optimizer.averaged():
        _ = 1 / int(equal(before, parameters(model)))
    assert equal(before, parameters(model))
    assert same(state, optimizer.state_dict())


def test_averaging_leaves_the_run_alone():
    model, twin = network(), network()
    optimizer = make(model, average=0.1)
    other = make(twin)
    for step in range(6):
        train(model, optimizer, 1, step)
        with optimizer.averaged(), torch.no_grad():
            model(data()[0])
        train(twin, other, 1, step)
    assert equal(parameters(model), parameters(twin))


def test_averaged_before_any_step_changes_nothing():
    model = network()
    before = parameters(model)
    with make(model, average=0.1).averaged():
        assert equal(before, parameters(model))


# What it says of itself.


def test_status_before_and_after_the_first_step():
    model = network()
    optimizer = make(model)
    status = optimizer.status()
    assert (status.step, status.skipped_steps, status.step_size) == (0, 0, 0)
    assert (status.limited_by, status.limits) == ("nothing measured", {})
    assert math.isnan(status.loss)
    assert math.isnan(status.curvature)
    assert "loss             per sample, over the data floor not measured" in str(status)

    loss = train(model, optimizer, 1)
    status = optimizer.status()
    assert (status.step, status.skipped_steps) == (1, 0)
    assert list(status.limits) == ["edge", "Polyak cap", "trust region"]
    assert status.limited_by == min(status.limits, key=status.limits.get)
    assert status.step_size == min(status.limits.values())
    assert status.step_size == float(optimizer.param_groups[0]["step_size"])
    assert status.loss == pytest.approx(loss, rel=1e-6)
    assert status.correlation == pytest.approx(status.slope / status.raw_slope)
    slope, raw, q, v = status.slope, status.raw_slope, status.curvature, status.output_change
    assert status.limits["edge"] == pytest.approx(1.5 * max(slope, 0.3 * raw) / q, rel=1e-5)
    assert status.limits["Polyak cap"] == pytest.approx(loss / raw, rel=1e-5)
    assert status.limits["trust region"] == pytest.approx((2 * loss / 0.5) ** 0.5 / v, rel=1e-5)
    assert status.noise_scale > 0
    assert "heuristic" in status.guarantee

    rows = [line[:16].strip() for line in str(status).splitlines()]
    assert rows == [
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
    assert f"step size        {status.step_size:.4g} (limited by {status.limited_by})" in str(
        status
    )
    with pytest.raises(AttributeError, match="cannot assign"):
        status.step = 3


def test_status_of_other_rules():
    model = network()
    optimizer = make(model, **RULES["sgd"])
    train(model, optimizer, 2)
    status = optimizer.status()
    assert list(status.limits) == ["edge", "stability", "trust region"]
    assert math.isnan(status.slope)
    assert status.noise_scale > 0
    assert status.curvature > 0
    assert "held out not measured" in str(status)

    optimizer = make(model, **RULES["sgd constant"])
    train(model, optimizer, 2)
    status = optimizer.status()
    assert (status.step, status.limited_by, status.limits) == (2, "lr", {})
    assert status.step_size == optimizer.param_groups[0]["step_size"] == 0.1
    assert "constant" in status.guarantee
    assert "limits           none" in str(status).splitlines()


def test_status_does_not_disturb_the_run():
    model, twin = network(), network()
    optimizer, other = make(model), make(twin)
    for step in range(4):
        train(model, optimizer, 1, step)
        train(twin, other, 1, step)
        optimizer.status()
    assert equal(parameters(model), parameters(twin))


# The loop.


@any_rule
def test_inputs_are_kept_for_measuring_steps_alone(rule):
    model = network()
    optimizer = make(model, warmup=2, measure_every=5, **RULES[rule])
    kept = []
    for step in range(1, 12):
        backward(model, optimizer, step)
        (observation,) = optimizer._watch.batch().observations
        if observation.outputs is not None:
            assert observation.forward.replay is not None
            kept.append(step)
        forward = weakref.ref(observation.forward)
        del observation
        optimizer.step()
        assert forward() is None
    assert kept == ([1, 2, 5, 10] if optimizer._rule.measures else [])


# Copies of the model, and more than one optimizer.


def test_no_hooks_are_left_behind():
    model, criterion = network(), nn.CrossEntropyLoss()
    optimizer = make(model, criterion, average=0.1)
    train(model, optimizer, 2)
    backward(model, optimizer, 2)
    loss = criterion(model(data()[0]), data()[1])  # holds a graph, not the optimizer
    assert len(hooks_of(model)) == 2
    assert len(hooks_of(criterion)) == 1
    del optimizer
    gc.collect()
    assert hooks_of(model) == hooks_of(criterion) == []
    assert not any(hooks_of(module) for module in model.modules())
    loss.backward()


@pytest.mark.parametrize("rule", ["spectral", "sgd"])
def test_optimizers_one_after_the_other(rule):
    """The first ones are still there, as in a notebook, and do not meddle with the last."""
    model, twin, criterion = network(), network(), nn.CrossEntropyLoss()
    kept = []
    for _ in range(3):
        with torch.no_grad():
            for p, q in zip(model.parameters(), network().parameters()):
                p.copy_(q)
        optimizer = make(model, criterion, **RULES[rule])
        kept.append(optimizer)
        train(model, optimizer, 3)
    other = make(twin, **RULES[rule])
    train(twin, other, 3)
    assert equal(parameters(model), parameters(twin))
    assert str(optimizer.status()) == str(other.status())
    assert [o.status().step for o in kept] == [3, 3, 3]


def test_two_optimizers_share_a_model():
    model = network()
    first = make(model, params=model[:3].parameters())
    second = make(model, params=model[3:].parameters(), criterion=criterion_of(first))
    x, y = data()
    losses = []
    for _ in range(30):
        first.zero_grad()
        second.zero_grad()
        loss = criterion_of(first)(model(x), y)
        loss.backward()
        first.step()
        second.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


# On a device, which is not asked whether numbers are finite.


@pytest.fixture
def as_on_a_device(monkeypatch):
    """Switches the path of devices on, here on a CPU."""

    def switch():
        monkeypatch.setattr(ConjSGD, "_given_up", lambda self, finite: False)
        monkeypatch.setattr(ConjSGD, "_gate", lambda self, finite: finite)

    return switch


GATED = {
    **RULES,
    "spectral, averaged": {"average": 0.1, "max_step": 0.1},
    "spectral, no momentum": {"momentum": 0.0},
    "spectral constant, tensor": {"step_rule": "constant", "lr": torch.tensor(0.02)},
    "sgd constant, coupled": {
        "step_rule": "constant",
        "direction": "sgd",
        "lr": 0.1,
        "nesterov": False,
        "dampening": 0.3,
        "weight_decay": 0.1,
        "coupled_weight_decay": True,
    },
    "sgd constant, coupled, tensor": {
        "step_rule": "constant",
        "direction": "sgd",
        "lr": torch.tensor(0.1),
        "weight_decay": 0.1,
        "coupled_weight_decay": True,
    },
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", GATED)
def test_the_path_of_devices_takes_the_same_steps(kind, dtype, as_on_a_device):
    options = {"warmup": 3, "measure_every": 4, **GATED[kind]}
    model, twin = network(dtype), network(dtype)
    optimizer = make(model, **options)
    train(model, optimizer, 10)
    as_on_a_device()
    other = make(twin, **options)
    train(twin, other, 10)
    assert equal(parameters(model), parameters(twin))
    assert same(optimizer.state_dict(), other.state_dict())


def spoil(model, optimizer, step, how):
    loss = backward(model, optimizer, step)
    x, y = data(dtype=next(model.parameters()).dtype)
    if how == "gradient":
        model[0].weight.grad[0, 0] = torch.nan
        return loss
    optimizer.zero_grad()
    if how == "input":
        x = torch.where(x > 1, torch.nan, x)
    loss = criterion_of(optimizer)(model(x), y)
    (loss * torch.inf if how == "factor" else loss).backward()
    return loss


@pytest.mark.parametrize("how", ["gradient", "input", "factor"])
@pytest.mark.parametrize("kind", GATED)
def test_the_path_of_devices_gives_up_steps_that_are_not_finite(kind, how, as_on_a_device):
    """At a measuring step and at an ordinary one; the next warning is at the next record."""
    options = {"warmup": 3, "measure_every": 100, **GATED[kind]}
    as_on_a_device()
    for taken in (1, 4):
        model = network()
        optimizer = make(model, **options)
        train(model, optimizer, taken)
        before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        spoil(model, optimizer, taken, how)
        optimizer.step()
        after = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        assert after[1]["param_groups"][0]["controller"]["statistics"].pop("skipped") == 1
        before[1]["param_groups"][0]["controller"]["statistics"].pop("skipped")
        for _, state in before, after:  # of the host, which does not know
            for key in ("calls", "trust_only"):
                state["param_groups"][0]["controller"].pop(key)
            state["param_groups"][0]["controller"]["statistics"].pop("measured")
            for group in state["param_groups"]:
                group.pop("step_size")
        assert same(before, after)
        with pytest.warns(RuntimeWarning, match="gave up a step"):
            status = optimizer.status()
        assert (status.skipped_steps, status.step) == (1, taken)
        if optimizer._rule.measures:
            assert status.step_size == 0
        train(model, optimizer, 3, taken)
        assert all(p.isfinite().all() for p in model.parameters())
        assert optimizer.status().step == taken + 3


@pytest.mark.parametrize("kind", ["spectral", "sgd", "spectral, averaged"])
def test_the_path_of_devices_gives_up_the_first_step(kind, as_on_a_device):
    as_on_a_device()
    model, twin = network(), network()
    optimizer, other = make(model, **GATED[kind]), make(twin, **GATED[kind])
    before = parameters(model)
    spoil(model, optimizer, 0, "input")
    optimizer.step()
    assert equal(before, parameters(model))
    train(model, optimizer, 3)
    train(twin, other, 3)
    for p, q in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(p, q)


# Batches of every kind.


def normalized():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))


@pytest.mark.parametrize("rule", ["spectral", "sgd"])
def test_batch_norm_is_run_by_the_loop_alone(rule):
    model, twin = normalized(), normalized()
    optimizer = make(model, **RULES[rule])
    x, y = data(60)
    losses = []
    for step in range(60):
        rows = torch.randperm(60, generator=torch.Generator().manual_seed(step))[:20]
        twin.load_state_dict({**twin.state_dict(), **dict(model.named_parameters())})
        twin(x[rows])
        optimizer.zero_grad()
        loss = criterion_of(optimizer)(model(x[rows]), y[rows])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        for name, buffer in model.named_buffers():
            assert torch.equal(buffer, twin.get_buffer(name)), name
    assert model[1].num_batches_tracked == 60
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    if rule == "spectral":
        status = optimizer.status()
        assert list(status.limits) == ["trust region"]
        assert math.isnan(status.slope)
        assert math.isnan(status.curvature)
        assert status.output_change > 0


def test_batch_norm_in_eval_mode_couples_nothing():
    model = normalized().eval()
    optimizer = make(model)
    x, y = data(60)
    for _ in range(5):
        optimizer.zero_grad()
        criterion_of(optimizer)(model(x), y).backward()
        optimizer.step()
    assert list(optimizer.status().limits) == ["edge", "Polyak cap", "trust region"]


@pytest.mark.parametrize("rule", ["spectral", "sgd"])
def test_single_samples_at_the_end_of_epochs(rule):
    model = network()
    optimizer = make(model, warmup=8, measure_every=4, **RULES[rule])
    x, y = data(25)
    first = last = None
    for _ in range(12):
        for rows in torch.arange(25).split(8):  # 8, 8, 8, 1: each measurement after the warm-up
            optimizer.zero_grad()
            loss = criterion_of(optimizer)(model(x[rows]), y[rows])
            loss.backward()
            optimizer.step()
            last = loss.item() if len(rows) > 1 else last
            first = last if first is None else first
    status = optimizer.status()
    assert (status.step, status.skipped_steps) == (48, 0)
    assert len(status.limits) == 3
    assert last < first / 2


@pytest.mark.parametrize("rule", ["spectral", "sgd"])
def test_single_samples_only(rule):
    model = network()
    optimizer = make(model, **RULES[rule])
    x, y = data()
    before = criterion_of(optimizer)(model(x), y).item()
    for step in range(4 * len(x)):
        rows = slice(step % len(x), step % len(x) + 1)
        optimizer.zero_grad()
        criterion_of(optimizer)(model(x[rows]), y[rows]).backward()
        optimizer.step()
    assert criterion_of(optimizer)(model(x), y).item() < before
    if rule == "spectral":
        assert list(optimizer.status().limits) == ["trust region"]


def test_slopes_start_when_the_first_halves_come():
    """Measurements of the trust region alone do not count in the means of the others."""
    model, twin = network(torch.float64), network(torch.float64)
    optimizer = make(model, weight_decay=0.0)
    x, y = data(dtype=torch.float64)
    for step in range(4):
        optimizer.zero_grad()
        criterion_of(optimizer)(model(x[step : step + 1]), y[step : step + 1]).backward()
        optimizer.step()
    twin.load_state_dict(model.state_dict())
    other = make(twin, weight_decay=0.0)
    for p, q in zip(model.parameters(), twin.parameters()):
        keys = ("momentum_buffer", "square", "square_weight")
        state = optimizer.state[p]
        other.state[q] = {key: state[key].clone() for key in keys if key in state}
    train(model, optimizer, 1)
    train(twin, other, 1)
    ours, theirs = optimizer.status(), other.status()
    for name in ("slope", "raw_slope", "curvature", "noise_scale", "output_change"):
        assert getattr(ours, name) == pytest.approx(getattr(theirs, name), rel=1e-9), name
    assert ours.limits["edge"] == pytest.approx(theirs.limits["edge"], rel=1e-9)


@pytest.mark.parametrize("rule", ["spectral", "sgd"])
@pytest.mark.parametrize(
    "criterion", [nn.MSELoss(), nn.BCEWithLogitsLoss(), nn.MSELoss(reduction="sum")], ids=str
)
def test_regression_and_binary_losses_fall(criterion, rule):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2))
    x = torch.randn(100, 4)
    y = torch.stack([x[:, 0] * x[:, 1], x[:, 2]], 1)
    if isinstance(criterion, nn.BCEWithLogitsLoss):
        y = (y > 0).float()
    optimizer = make(model, criterion, **RULES[rule])
    start = criterion(model(x), y).item()
    for step in range(150):
        rows = torch.randperm(100, generator=torch.Generator().manual_seed(step))[:20]
        optimizer.zero_grad()
        criterion(model(x[rows]), y[rows]).backward()
        optimizer.step()
    assert criterion(model(x), y).item() < start / 2
    status = optimizer.status()
    assert status.skipped_steps == 0
    assert math.isfinite(status.step_size)


def test_sgd_edge_classifies():
    model = network()
    optimizer = make(model, **RULES["sgd"])
    x, y = data()
    start = criterion_of(optimizer)(model(x), y).item()
    train(model, optimizer, 150)
    assert criterion_of(optimizer)(model(x), y).item() < start / 2
