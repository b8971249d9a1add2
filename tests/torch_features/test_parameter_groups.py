"""Parameter groups, each with its own rate, momentum, decay and cap, also added on the way."""

import copy

import pytest
import torch
from loop import RULES, any_rule, equal, make, network, parameters, same, train


@any_rule
def test_groups_of_equal_options_are_one_group(rule):
    one, two = network(), network()
    first = make(one, warmup=3, measure_every=4, **RULES[rule])
    groups = [{"params": two[i].parameters()} for i in (0, 3)]
    second = make(two, params=groups, warmup=3, measure_every=4, **RULES[rule])
    second.add_param_group({"params": two[5].parameters()})
    train(one, first, 15)
    train(two, second, 15)
    assert equal(parameters(one), parameters(two))
    assert str(first.status()) == str(second.status())
    sizes = [group["step_size"] for group in second.param_groups]
    assert sizes == [first.param_groups[0]["step_size"]] * 3


@any_rule
def test_a_group_of_rate_zero_stands_still(rule):
    model = network()
    lr = RULES[rule].get("lr", 1.0)
    groups = [{"params": model[0].parameters(), "lr": 0.0}, {"params": model[3:].parameters()}]
    optimizer = make(model, params=groups, weight_decay=0.1, **{**RULES[rule], "lr": lr})
    before = parameters(model)
    train(model, optimizer, 5)
    after = parameters(model)
    assert equal(before[:2], after[:2])
    assert not any(torch.equal(p, q) for p, q in zip(before[2:], after[2:]))


@pytest.mark.parametrize("rule", ["spectral", "sgd"])
def test_all_rates_zero_stand_still(rule):
    model = network()
    optimizer = make(model, lr=0.0, **RULES[rule])
    before = parameters(model)
    train(model, optimizer, 3)
    assert equal(before, parameters(model))
    assert (optimizer.status().step, optimizer.status().step_size) == (3, 0)


def test_step_sizes_are_the_least_limit_times_each_rate():
    model = network()
    groups = [{"params": model[i].parameters(), "lr": lr} for i, lr in ((0, 0.25), (3, 2), (5, 1))]
    optimizer = make(model, params=groups)
    for step in range(25):
        train(model, optimizer, 1, step)
        status = optimizer.status()
        least = min(status.limits.values())
        sizes = [float(group["step_size"]) for group in optimizer.param_groups]
        assert sizes == pytest.approx([0.25 * least, 2 * least, least], rel=1e-6)
        assert status.step_size == sizes[0]


def test_ratios_of_rates_are_part_of_the_measured_direction():
    model = network(torch.float64)
    groups = [{"params": model[i].parameters(), "lr": lr} for i, lr in ((0, 0.4), (3, 0), (5, 0.2))]
    optimizer = make(model, params=groups)
    train(model, optimizer, 1)
    raw = held = 0.0
    for group, ratio in zip(optimizer.param_groups, (1, 0, 0.5)):
        for p in group["params"]:
            state = optimizer.state[p]
            block = ratio * state["shrinkage"] * state["slopes"] / 0.1  # a mean of one, from zero
            raw, held = raw + block[0].item(), held + block[1].item()
    status = optimizer.status()
    assert status.raw_slope == pytest.approx(raw, rel=1e-10)
    assert status.slope == pytest.approx(held, rel=1e-10)

    one, two = network(torch.float64), network(torch.float64)  # a common factor is no part of it
    first, second = make(one), make(two, lr=0.5)
    train(one, first, 1)
    train(two, second, 1)
    assert first.status().limits == second.status().limits
    assert second.status().step_size == 0.5 * first.status().step_size


def test_each_group_has_its_own_momentum_and_decay():
    model, twin = network(torch.float64), network(torch.float64)
    common = {"step_rule": "constant", "lr": 0.01}
    groups = [
        {"params": model[0].parameters(), "momentum": 0.5, "weight_decay": 0.15},
        {"params": model[3:].parameters(), "nesterov": False},
    ]
    optimizer = make(model, params=groups, weight_decay=0.0, **common)
    other = make(twin, params=[dict(g, weight_decay=0.0) for g in regroup(groups, twin)], **common)
    before = parameters(model)
    train(model, optimizer, 1)
    train(twin, other, 1)
    for old, p, q in zip(before[:2], model[0].parameters(), twin[0].parameters()):
        torch.testing.assert_close(q - p, old * 0.15 * 0.01)
    for p, q in zip(model[3:].parameters(), twin[3:].parameters()):
        assert torch.equal(p, q)
    for p in model.parameters():
        momentum = 0.5 if p is model[0].weight or p is model[0].bias else 0.9
        torch.testing.assert_close(optimizer.state[p]["momentum_buffer"], (1 - momentum) * p.grad)


def regroup(groups, twin):
    """The groups of `test_each_group_has_its_own_momentum_and_decay`, of another model."""
    parts = (twin[0], twin[3:])
    return [dict(g, params=part.parameters()) for g, part in zip(groups, parts)]


def test_max_step_caps_after_lr_and_by_group():
    model = network()
    groups = [{"params": model[:2].parameters()}, {"params": model[2:].parameters()}]
    groups[1]["max_step"] = 1e-4
    optimizer = make(model, params=groups, lr=0.5, max_step=100.0)
    train(model, optimizer, 2)
    status = optimizer.status()
    assert status.limited_by in status.limits
    assert status.step_size == pytest.approx(0.5 * min(status.limits.values()), rel=1e-6)
    assert float(optimizer.param_groups[1]["step_size"]) == pytest.approx(1e-4, rel=1e-6)


@any_rule
def test_a_group_added_on_the_way_is_one_that_was_frozen_until_then(rule):
    model, twin = network(), network()
    options = {"warmup": 3, "measure_every": 4, **RULES[rule]}
    late = {"lr": 0.5 * options.get("lr", 1.0), "weight_decay": 0.03, "max_step": 0.05}
    optimizer = make(model, params=model[3:].parameters(), **options)
    groups = [{"params": twin[3:].parameters()}, {"params": twin[:3].parameters(), **late}]
    other = make(twin, params=groups, **options)
    twin[:3].requires_grad_(False)
    for first in (0, 5):
        train(model, optimizer, 5, first)
        train(twin, other, 5, first)
        assert equal(parameters(model), parameters(twin))
        if first == 0:
            state = copy.deepcopy(optimizer.state_dict()["state"])
            model.zero_grad()
            optimizer.add_param_group({"params": model[:3].parameters(), **late})
            twin[:3].requires_grad_(True)
            assert same(state, optimizer.state_dict()["state"])
    assert not equal(parameters(model[:3]), parameters(network()[:3]))
    assert [float(a["step_size"]) for a in optimizer.param_groups] == [
        float(b["step_size"]) for b in other.param_groups
    ]


@any_rule
def test_parameters_with_their_names(rule):
    model, twin = network(), network()
    optimizer = make(model, params=model.named_parameters(), **RULES[rule])
    other = make(twin, **RULES[rule])
    train(model, optimizer, 3)
    train(twin, other, 3)
    assert equal(parameters(model), parameters(twin))
    names = optimizer.state_dict()["param_groups"][0]["param_names"]
    assert names == [name for name, _ in model.named_parameters()]
    again = make(model, params=model.named_parameters(), **RULES[rule])
    again.load_state_dict(optimizer.state_dict())
    assert same(again.state_dict(), optimizer.state_dict())


@any_rule
def test_options_of_a_group_can_be_changed_between_steps(rule):
    model, twin = network(), network()
    options = {"warmup": 3, "measure_every": 4, **RULES[rule]}
    optimizer, other = make(model, **options), make(twin, weight_decay=0.5, **options)
    other.param_groups[0]["weight_decay"] = optimizer.param_groups[0]["weight_decay"]
    other.param_groups[0]["max_step"] = 1e9
    train(model, optimizer, 4)
    train(twin, other, 4)
    assert equal(parameters(model), parameters(twin))
