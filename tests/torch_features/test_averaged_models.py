"""Averages of the parameters by `torch.optim.swa_utils`, and `update_bn`."""

import copy

import pytest
import torch
from loop import (
    RULES,
    any_rule,
    criterion_of,
    data,
    equal,
    hooks_of,
    make,
    network,
    parameters,
    train,
)
from torch import nn
from torch.optim import swa_utils

AVERAGES = {
    "mean": lambda model: swa_utils.AveragedModel(model),
    "exponential": lambda model: swa_utils.AveragedModel(
        model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9)
    ),
    "with buffers": lambda model: swa_utils.AveragedModel(model, use_buffers=True),
}


@any_rule
@pytest.mark.parametrize("average", AVERAGES)
def test_an_average_is_that_of_the_run_and_leaves_it_alone(average, rule):
    model, twin = network(torch.float64), network(torch.float64)
    options = {"warmup": 3, "measure_every": 4, **RULES[rule]}
    optimizer, other = make(model, **options), make(twin, **options)
    averaged, seen = AVERAGES[average](model), []
    for step in range(8):
        train(model, optimizer, 1, step)
        averaged.update_parameters(model)
        train(twin, other, 1, step)
        seen.append(parameters(twin))
        averaged(data(dtype=torch.float64)[0])  # it is no forward of the model
    assert equal(parameters(model), parameters(twin))
    assert str(optimizer.status()) == str(other.status())
    for i, p in enumerate(averaged.parameters()):
        expected = seen[0][i]
        for t, now in enumerate(seen[1:], 2):
            share = 0.1 if average == "exponential" else 1 / t
            expected = expected + share * (now[i] - expected)
        torch.testing.assert_close(p.detach(), expected)


@any_rule
def test_update_bn_is_no_training(rule):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
    twin = copy.deepcopy(model)
    optimizer, other = make(model, **RULES[rule]), make(twin, **RULES[rule])
    averaged = swa_utils.AveragedModel(model)
    x, y = data()
    for _ in range(4):
        for net, by in ((model, optimizer), (twin, other)):
            by.zero_grad()
            criterion_of(by)(net(x), y).backward()
            by.step()
        averaged.update_parameters(model)
        swa_utils.update_bn([x, x + 1], averaged)
    assert equal(parameters(model), parameters(twin))
    torch.testing.assert_close(
        averaged.module[1].running_mean,
        averaged.module[0](torch.cat([x, x + 1])).mean(0).detach(),
    )
    assert hooks_of(averaged) == []


@pytest.mark.parametrize("rule", ["spectral", "sgd"])
def test_swa_with_its_schedule_and_the_own_tail_average(rule):
    """`average=` keeps its mean in the optimizer; both can be had."""
    model = network()
    optimizer = make(model, average=0.2, **RULES[rule])
    averaged = swa_utils.AveragedModel(model)
    schedule = swa_utils.SWALR(optimizer, 0.5, anneal_epochs=4)
    for step in range(8):
        train(model, optimizer, 1, step)
        averaged.update_parameters(model)
        schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.5
    with optimizer.averaged():
        averaged.update_parameters(model)
        inside = parameters(model)
    assert not equal(inside, parameters(model))
    assert averaged.n_averaged == 9
