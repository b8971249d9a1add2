"""Parameter groups, each with its own rate, momentum, decay and cap, also added on the way."""

import copy

import pytest
import torch
from loop import (
    RULES,
    any_rule,
    backward,
    criterion_of,
    data,
    equal,
    make,
    network,
    parameters,
    same,
    train,
)
from torch.testing import assert_close

from conjopt.optim import Direction


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
            assert optimizer.param_groups[-1]["step_size"] == 0  # none taken yet
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


# A direction of its own.


def mixed(model, first, second, **options):
    groups = [
        {"params": model[0].parameters(), "direction": first},
        {"params": [*model[3].parameters(), *model[5].parameters()], "direction": second},
    ]
    return make(model, params=groups, warmup=3, measure_every=4, **options)


@pytest.mark.parametrize("default", ["spectral", "sgd"])
def test_each_group_has_its_direction(default):
    """Under a constant step a model with two is two optimizers with one each."""
    constant = {"step_rule": "constant", "lr": 0.02}
    one, two = network(), network()
    both = mixed(one, "sgd", "spectral", direction=default, weight_decay=0.1, **constant)
    apart = [
        make(two, params=two[0].parameters(), direction="sgd", weight_decay=0.1, **constant),
        make(two, params=two[3:].parameters(), direction="spectral", weight_decay=0.1, **constant),
    ]
    for step in range(6):
        train(one, both, 1, step)
        apart[1].zero_grad()
        backward(two, apart[0], step)
        for optimizer in apart:
            optimizer.step()
    assert equal(parameters(one), parameters(two))
    assert [group["direction"] for group in both.param_groups] == ["sgd", "spectral"]


def test_groups_that_name_the_same_direction_are_one_group():
    one, two = network(), network()
    first, second = mixed(one, "spectral", "spectral"), make(two, warmup=3, measure_every=4)
    train(one, first, 9)
    train(two, second, 9)
    assert equal(parameters(one), parameters(two))


def test_held_out_slopes_of_both():
    """The first step: u from the odd rows in both groups, buffers from all rows."""
    model = network(torch.float64)
    before = parameters(model)
    optimizer = mixed(model, "sgd", "spectral", momentum=0.9, weight_decay=0.0)
    x, y = data(8, torch.float64)
    grads = {}
    for name, rows in (("even", slice(0, None, 2)), ("odd", slice(1, None, 2))):
        loss = torch.nn.functional.cross_entropy(model(x[rows]), y[rows])
        grads[name] = torch.autograd.grad(loss, list(model.parameters()))
    criterion_of(optimizer)(model(x), y).backward()
    optimizer.step()
    weight, bias = (optimizer.state[p] for p in model[0].parameters())
    size = optimizer.param_groups[0]["step_size"]
    for i, state in enumerate((weight, bias)):
        g, held = grads["odd"][i], grads["even"][i]
        u = 1.9 * g  # Nesterov's first step
        slopes = torch.stack([((g + held) / 2 * u).sum(), (held * u).sum()])
        assert_close(state["slopes"], 0.1 * slopes, rtol=1e-12, atol=0)
        assert_close(state["momentum_buffer"], (g + held) / 2, rtol=1e-12, atol=1e-15)
        moved = before[i] - list(model.parameters())[i].detach()
        assert_close(moved, size * state["shrinkage"] * u, rtol=1e-9, atol=1e-14)
    status = optimizer.status()
    measured = sum(
        float(optimizer.state[p]["slopes"][1]) * float(optimizer.state[p]["shrinkage"])
        for p in model.parameters()
    )
    assert status.slope == pytest.approx(10 * measured, rel=1e-9)


def test_mixed_directions_train_and_resume():
    model = network()
    optimizer = mixed(model, "sgd", "spectral")
    first = sum(train(model, optimizer, 1, s) for s in range(5))
    train(model, optimizer, 30, 5)
    twin = network()
    twin.load_state_dict(model.state_dict())
    other = mixed(twin, "sgd", "spectral")
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    last = sum(train(model, optimizer, 1, s) for s in range(35, 40))
    for s in range(35, 40):
        train(twin, other, 1, s)
    assert equal(parameters(model), parameters(twin))
    assert last < 0.7 * first
    assert optimizer.status().skipped_steps == 0


def test_a_loaded_state_brings_its_directions():
    model, twin = network(), network()
    optimizer = mixed(model, "sgd", "spectral")
    train(model, optimizer, 6)
    twin.load_state_dict(model.state_dict())
    other = mixed(twin, "spectral", "spectral")
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, 6, 6)
    train(twin, other, 6, 6)
    assert equal(parameters(model), parameters(twin))


class Sign(Direction):
    """One of a user's own, whose pending state is no list per parameter."""

    name, held_out = "sign", True

    def propose(self, gradients, batch_gradients, states, groups):
        return [g.sign() * 0.01 for g in gradients], [len(gradients)]

    def commit(self, batch_gradients, states, groups, pending, gate):
        assert pending == [len(states)]


def test_a_direction_of_ones_own():
    model = network()
    optimizer = mixed(model, Sign(), "spectral")
    train(model, optimizer, 6)
    assert optimizer.param_groups[0]["direction"] == "sign"
    assert optimizer.status().step == 6
    assert copy.deepcopy((model, optimizer))[1].param_groups[0]["direction"] == "sign"


def test_refused_directions():
    model = network()
    with pytest.raises(ValueError, match="or a Direction"):
        mixed(model, "adam", "spectral")
    with pytest.raises(ValueError, match="goes by the gradient alone"):
        mixed(model, "spectral", "sgd", direction="sgd")
    with pytest.raises(ValueError, match="not the same object"):
        mixed(model, Sign(), Sign())
    optimizer = mixed(model, "sgd", "spectral")
    state = optimizer.state_dict()
    before = copy.deepcopy(state)
    state["param_groups"][0]["direction"] = "sign"
    with pytest.raises(ValueError, match="or a Direction"):
        optimizer.load_state_dict(state)
    assert same(optimizer.state_dict(), before)
    plain = make(network(), direction="sgd")
    with pytest.raises(ValueError, match="goes by the gradient alone"):
        plain.load_state_dict(make(network()).state_dict())
