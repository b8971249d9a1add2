"""Parameters without a gradient stand still: frozen, unused, empty, thawed on the way."""

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
    train,
)
from torch import nn


@any_rule
def test_frozen_and_unused_parameters_stand_still(rule):
    model, twin = network(), network()
    for net in (model, twin):
        net[0].bias.requires_grad_(False)
        net.unused = nn.Linear(2, 2)
        net.forward = lambda x, net=net: nn.Sequential.forward(net[:6], x)
    optimizer = make(model, average=0.2, **RULES[rule])
    needed = [p for name, p in twin.named_parameters() if "unused" not in name and name != "0.bias"]
    other = make(twin, params=needed, average=0.2, **RULES[rule])
    before = [model[0].bias.clone(), *parameters(model.unused)]
    train(model, optimizer, 6)
    train(twin, other, 6)
    assert equal(before, [model[0].bias, *parameters(model.unused)])
    assert not any(optimizer.state.get(p) for p in (model[0].bias, *model.unused.parameters()))
    for p, q in zip(needed, twin.parameters()):
        assert p is q or p.requires_grad
    assert equal(parameters(model[:6]), parameters(twin[:6]))


@any_rule
def test_layers_can_be_frozen_and_thawed_on_the_way(rule):
    model = network()
    optimizer = make(model, **RULES[rule])
    train(model, optimizer, 3)
    model[0].requires_grad_(False)
    before = parameters(model)
    train(model, optimizer, 3, 3)
    assert equal(before[:2], parameters(model)[:2])
    model[0].requires_grad_(True)
    train(model, optimizer, 3, 6)
    assert not torch.equal(before[0], model[0].weight)
    assert optimizer.status().step == 9


@any_rule
def test_a_frozen_layer_with_a_left_over_gradient(rule):
    model = network()
    optimizer = make(model, **RULES[rule])
    train(model, optimizer, 2)
    optimizer.zero_grad(set_to_none=False)
    model[0].requires_grad_(False)  # its gradient stays at zero; momentum goes on, as in torch
    x, y = data()
    criterion_of(optimizer)(model(x), y).backward()
    optimizer.step()
    assert optimizer.status().step == 3
    assert all(p.isfinite().all() for p in model.parameters())


@any_rule
def test_parameters_without_elements_are_no_trouble(rule):
    model, twin = network(), network()
    model.register_parameter("none", nn.Parameter(torch.empty(0, 3)))
    optimizer, other = make(model, **RULES[rule]), make(twin, **RULES[rule])
    x, y = data()
    for _ in range(3):
        optimizer.zero_grad()
        (criterion_of(optimizer)(model(x), y) + model.none.sum()).backward()
        optimizer.step()
        other.zero_grad()
        criterion_of(other)(twin(x), y).backward()
        other.step()
    assert equal(parameters(model[:6]), parameters(twin))
