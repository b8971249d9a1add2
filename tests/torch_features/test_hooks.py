"""Hooks that others registered: on modules, tensors, gradients, and on the optimizer itself."""

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
from torch import nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from conjopt import ConjSGD

OPTIONS = {"warmup": 3, "measure_every": 4}


def on_modules(model, seen):
    for module in model.modules():
        module.register_forward_pre_hook(lambda *_: seen.append("before"))
        module.register_forward_hook(lambda *_: seen.append("after"))
        module.register_full_backward_pre_hook(lambda *_: seen.append("backward before"))
        module.register_full_backward_hook(lambda *_: seen.append("backward"))


def on_gradients(model, seen):
    for p in model.parameters():
        p.register_hook(lambda gradient: seen.append("gradient"))


def on_accumulation(model, seen):
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: seen.append("accumulated"))


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@any_rule
@pytest.mark.parametrize("add", [on_modules, on_gradients, on_accumulation])
@pytest.mark.parametrize("first", [True, False])
def test_hooks_that_only_look_change_nothing(add, first, rule):
    model, twin, seen = network(torch.float64), network(torch.float64), []
    if first:
        add(model, seen)
    optimizer, other = make(model, **OPTIONS, **RULES[rule]), make(twin, **OPTIONS, **RULES[rule])
    if not first:
        add(model, seen)
    train(model, optimizer, 8)
    train(twin, other, 8)
    assert seen
    if add is not on_accumulation:
        assert equal(parameters(model), parameters(twin))
        assert str(optimizer.status()) == str(other.status())
    for p, q in zip(model.parameters(), twin.parameters()):
        # They might have written to the gradients, so the halves are taken in another way.
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-10)


@any_rule
def test_a_hook_that_changes_the_forward_is_part_of_the_model(rule):
    model, twin = network(torch.float64), network(torch.float64)
    model[1].register_forward_hook(lambda module, args, output: 2 * output)
    model[0].register_forward_pre_hook(lambda module, args: (args[0] + 1,))

    class Changed(nn.Module):
        def __init__(self, body):
            super().__init__()
            self.body = body

        def forward(self, x):
            return self.body[2:](2 * self.body[:2](x + 1))

    twin = Changed(twin)
    optimizer, other = make(model, **OPTIONS, **RULES[rule]), make(twin, **OPTIONS, **RULES[rule])
    train(model, optimizer, 8)
    train(twin, other, 8)
    assert equal(parameters(model), parameters(twin))


@any_rule
def test_a_layer_whose_gradient_a_hook_masks_stands_still(rule):
    """The masked entries, at measuring steps as well, where the halves are pulled through it."""
    model = network()
    mask = (torch.arange(30).reshape(5, 6) % 3 > 0).float()
    model[3].weight.register_hook(lambda gradient: gradient * mask)
    model[0].weight.register_hook(torch.zeros_like)
    optimizer = make(model, **{**OPTIONS, "weight_decay": 0.0, **RULES[rule]})
    before = parameters(model)
    train(model, optimizer, 8)
    after = parameters(model)
    still = [torch.equal(p, q) for p, q in zip(before, after)]
    assert still == [True, False, False, False, False, False]
    if rule.startswith("sgd"):  # "spectral" mixes the entries of a matrix
        assert torch.equal(before[2][mask == 0], after[2][mask == 0])
    assert optimizer.status().skipped_steps == 0


def clamp(p):
    p.grad.clamp_(-0.01, 0.01)


@any_rule
def test_gradients_clipped_as_they_accumulate_are_clipped_gradients(rule):
    model, twin = network(), network()
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(clamp)
    optimizer, other = make(model, **OPTIONS, **RULES[rule]), make(twin, **OPTIONS, **RULES[rule])
    for step in range(8):
        train(model, optimizer, 1, step)
        backward(twin, other, step)
        nn.utils.clip_grad_value_(twin.parameters(), 0.01)
        other.step()
    assert equal(parameters(model), parameters(twin))
    assert str(optimizer.status()) == str(other.status())


def in_backward(model, criterion, **options):
    """One optimizer per parameter that steps as soon as its gradient is there."""
    optimizers = {
        p: ConjSGD([p], model=model, loss=criterion, **options) for p in model.parameters()
    }

    def step(p):
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step)
    return optimizers


@pytest.mark.parametrize("rule", [name for name in RULES if "constant" in name])
def test_a_step_inside_the_backward_pass_under_a_constant_rule(rule):
    model, twin = network(), network()
    criterion = nn.CrossEntropyLoss()
    in_backward(model, criterion, **RULES[rule])
    x, y = data()
    other = make(twin, **RULES[rule])
    for _ in range(5):
        criterion(model(x), y).backward()
        other.zero_grad()
        criterion_of(other)(twin(x), y).backward()
        other.step()
    assert equal(parameters(model), parameters(twin))


@pytest.mark.parametrize("rule", [name for name in RULES if "constant" not in name])
def test_a_step_inside_the_backward_pass_is_refused_where_it_measures(rule):
    """The batch is not known yet; parameters stay as they were."""
    model, criterion = network(), nn.CrossEntropyLoss()
    in_backward(model, criterion, **RULES[rule])
    before, (x, y) = parameters(model), data()
    with pytest.raises(RuntimeError, match=r"inside a backward pass.*step_rule='constant'"):
        criterion(model(x), y).backward()
    assert equal(before, parameters(model))


# Hooks of the optimizer.


@any_rule
def test_step_hooks_see_every_step_and_may_give_the_closure(rule):
    model, twin = network(), network()
    optimizer, other = make(model, **OPTIONS, **RULES[rule]), make(twin, **OPTIONS, **RULES[rule])
    seen, before = [], []
    first = optimizer.register_step_pre_hook(lambda o, args, kwargs: seen.append((o, args, kwargs)))
    optimizer.register_step_pre_hook(lambda *_: before.append(parameters(model)))
    optimizer.register_step_post_hook(lambda *_: seen.append(parameters(model)))
    for step in range(5):
        start = parameters(model)
        train(model, optimizer, 1, step)
        train(twin, other, 1, step)
        assert seen[-2] == (optimizer, (optimizer,), {})
        assert equal(before[-1], start)
        assert equal(seen[-1], parameters(twin))
    assert len(seen) == 10
    first.remove()
    train(model, optimizer, 1, 5)
    assert len(seen) == 11


def test_hooks_of_all_optimizers():
    seen = []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: seen.append("before")),
        register_optimizer_step_post_hook(lambda *_: seen.append("after")),
    ]
    try:
        model = network()
        train(model, make(model), 2)
    finally:
        for handle in handles:
            handle.remove()
    assert seen == ["before", "after"] * 2


@any_rule
def test_a_hook_may_rewrite_a_state_on_its_way_out_and_in(rule):
    """Such as one that keeps the state of a run in another form."""
    model, twin = network(), network()
    optimizer, other = make(model, **OPTIONS, **RULES[rule]), make(twin, **OPTIONS, **RULES[rule])
    plain = make(twin, **OPTIONS, **RULES[rule])
    train(model, optimizer, 5)
    twin.load_state_dict(model.state_dict())
    order = []
    optimizer.register_state_dict_pre_hook(lambda o: order.append("out, before"))
    optimizer.register_state_dict_post_hook(lambda o, state: {"wrapped": state})
    other.register_load_state_dict_pre_hook(lambda o, state: state["wrapped"])
    steps = []
    other.register_load_state_dict_post_hook(lambda o: steps.append(o.status().step))
    state = copy.deepcopy(optimizer.state_dict())
    assert list(state) == ["wrapped"]
    other.load_state_dict(state)
    assert (order, steps) == (["out, before"], [5])
    plain.load_state_dict(state["wrapped"])
    assert same(other.state_dict(), plain.state_dict())
    train(model, optimizer, 3, 5)
    train(twin, other, 3, 5)
    assert equal(parameters(model), parameters(twin))


def test_no_hooks_of_our_own_are_left_in_the_optimizer():
    model = network()
    optimizer = make(model)
    train(model, optimizer, 1)
    optimizer.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="got a first group"):
        optimizer.load_state_dict({"state": {}, "param_groups": [{"params": []}]})
    assert not any(value for name, value in vars(optimizer).items() if name.endswith("_hooks"))
