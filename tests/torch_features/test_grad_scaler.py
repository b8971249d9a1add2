"""`torch.amp.GradScaler`: unscaled gradients, skipped steps, scales that change."""

import copy

import pytest
import torch
from loop import (
    RULES,
    any_rule,
    criterion_of,
    data,
    equal,
    make,
    network,
    parameters,
    same,
    train,
)
from torch import nn
from torch.amp import GradScaler

from conjopt.optim.scaling import unscaled_by

OPTIONS = {"warmup": 3, "measure_every": 4}


def loss_of(model, optimizer, rows=slice(None)):
    x, y = data(dtype=next(model.parameters()).dtype)
    return criterion_of(optimizer)(model(x[rows]), y[rows])


def plain(model, optimizer, clip=None):
    optimizer.zero_grad()
    loss_of(model, optimizer).backward()
    if clip is not None:
        nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()


def scaled(model, optimizer, scaler, clip=None, overflow=False):
    optimizer.zero_grad()
    scaler.scale(loss_of(model, optimizer)).backward()
    if overflow:
        model[3].weight.grad[1, 2] = torch.inf
    if clip is not None:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), clip)
    scaler.step(optimizer)
    scaler.update()


@any_rule
@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("scheduled", [False, True])
def test_a_power_of_two_changes_nothing(rule, clip, scheduled):
    """Bit for bit, whoever wraps the step, and while the scale grows."""
    model, twin = network(), network()
    optimizer, other = make(model, **OPTIONS, **RULES[rule]), make(twin, **OPTIONS, **RULES[rule])
    scaler = GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    if scheduled:
        optimizer.register_step_post_hook(lambda *_: None)
        rates = [torch.optim.lr_scheduler.ExponentialLR(o, 0.9) for o in (optimizer, other)]
    for _ in range(9):
        scaled(model, optimizer, scaler, clip)
        plain(twin, other, clip)
        for schedule in rates if scheduled else ():
            schedule.step()
        assert equal(parameters(model), parameters(twin))
    assert same(optimizer.state_dict(), other.state_dict())
    assert str(optimizer.status()) == str(other.status())
    assert scaler.get_scale() == 1024 * 2**4


@any_rule
@pytest.mark.parametrize("clip", [None, 0.05])
def test_any_other_scale_changes_no_more_than_rounding(rule, clip):
    model, twin = network(torch.float64), network(torch.float64)
    optimizer, other = make(model, **OPTIONS, **RULES[rule]), make(twin, **OPTIONS, **RULES[rule])
    scaler = GradScaler("cpu", init_scale=1000.0)
    for _ in range(4):
        scaled(model, optimizer, scaler, clip)
        plain(twin, other, clip)
    for p, q in zip(model.parameters(), twin.parameters()):
        # The scaler's reciprocal is of single precision.
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


@any_rule
@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("taken", [0, 2, 5])
def test_a_skipped_step_leaves_no_trace(rule, clip, taken):
    model, twin = network(), network()
    optimizer, other = make(model, **OPTIONS, **RULES[rule]), make(twin, **OPTIONS, **RULES[rule])
    scaler = GradScaler("cpu", init_scale=1024.0)
    for _ in range(taken):
        scaled(model, optimizer, scaler, clip)
        plain(twin, other, clip)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    for _ in range(2):
        scaled(model, optimizer, scaler, clip, overflow=True)
        assert same(before, (model.state_dict(), optimizer.state_dict()))
    assert scaler.get_scale() == 256
    for _ in range(4):
        scaled(model, optimizer, scaler, clip)
        plain(twin, other, clip)
    assert equal(parameters(model), parameters(twin))
    assert str(optimizer.status()) == str(other.status())
    assert optimizer.status().skipped_steps == 0  # the scaler's, not the optimizer's


@any_rule
def test_accumulation_under_a_scaler(rule):
    model, twin = network(), network()
    optimizer, other = make(model, **OPTIONS, **RULES[rule]), make(twin, **OPTIONS, **RULES[rule])
    scaler = GradScaler("cpu", init_scale=512.0)
    for _ in range(6):
        for net, by in ((model, optimizer), (twin, other)):
            by.zero_grad()
            for rows in (slice(0, 12), slice(12, 24)):
                loss = loss_of(net, by, rows) / 2
                (scaler.scale(loss) if net is model else loss).backward()
        scaler.step(optimizer)
        scaler.update()
        other.step()
    assert equal(parameters(model), parameters(twin))


@any_rule
def test_a_scaler_that_is_off_and_a_scaled_loss_without_unscaling(rule):
    model, twin = network(), network()
    optimizer, other = make(model, **OPTIONS, **RULES[rule]), make(twin, **OPTIONS, **RULES[rule])
    scaler = GradScaler("cpu", enabled=False)
    for _ in range(5):
        scaled(model, optimizer, scaler)
        plain(twin, other)
    assert equal(parameters(model), parameters(twin))
    if optimizer._rule.measures:  # whose units do not depend on factors of the loss
        model = network()
        optimizer = make(model, **OPTIONS, **RULES[rule])
        for _ in range(5):
            optimizer.zero_grad()
            (64 * loss_of(model, optimizer)).backward()
            optimizer.step()
        assert equal(parameters(model), parameters(twin))


def test_two_optimizers_under_one_scaler():
    paths = []
    for scaler in (GradScaler("cpu", init_scale=256.0), GradScaler("cpu", enabled=False)):
        model, criterion = network(), nn.CrossEntropyLoss()
        first = make(model, criterion, model[:3].parameters(), **OPTIONS)
        second = make(model, criterion, model[3:].parameters(), **OPTIONS, direction="sgd")
        for _ in range(6):
            first.zero_grad()
            second.zero_grad()
            scaler.scale(loss_of(model, first)).backward()
            scaler.step(first)
            scaler.step(second)
            scaler.update()
        paths.append(parameters(model))
    assert equal(*paths)


@any_rule
def test_state_of_scaler_and_optimizer_resume_together(rule):
    model = network()
    optimizer = make(model, **OPTIONS, **RULES[rule])
    scaler = GradScaler("cpu", init_scale=2.0**20, growth_interval=3)
    for _ in range(4):
        scaled(model, optimizer, scaler)
    twin = network()
    other, again = make(twin, **OPTIONS, **RULES[rule]), GradScaler("cpu")
    for ours, theirs in ((twin, model), (other, optimizer), (again, scaler)):
        ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    for _ in range(4):
        scaled(model, optimizer, scaler)
        scaled(twin, other, again)
    assert equal(parameters(model), parameters(twin))
    train(model, optimizer, 1)  # and without it
    train(twin, other, 1)
    assert equal(parameters(model), parameters(twin))


def test_a_scaler_that_did_not_call_for_the_step_divided_nothing():
    class Own(GradScaler):
        def asked(self) -> float:
            return unscaled_by()

        def _maybe_opt_step(self, *given) -> float:
            return self.asked()

    scaler = Own("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))  # which makes the scale
    assert scaler.asked() == 1
    assert scaler._maybe_opt_step() == 4
