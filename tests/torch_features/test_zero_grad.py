"""Gradients reset by anyone, to None or to zero, at any place."""

import copy

import pytest
import torch
from loop import RULES, criterion_of, data, equal, make, network, parameters
from torch import nn

from conjopt import ConjSGD


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("rule", ["spectral", "sgd"])
def test_gradients_can_be_reset_anywhere_before_the_backward_pass(rule, set_to_none):
    paths = []
    for where in ("before", "between", "after the step", "by the model"):
        model = network()
        optimizer = make(model, warmup=3, **RULES[rule])
        x, y = data()
        for _ in range(5):
            if where == "before":
                optimizer.zero_grad(set_to_none)
            if where == "by the model":
                model.zero_grad(set_to_none)
            outputs = model(x)
            if where == "between":
                optimizer.zero_grad(set_to_none)
            loss = criterion_of(optimizer)(outputs, y)
            loss.backward()
            optimizer.step()
            if where == "after the step":
                optimizer.zero_grad(set_to_none)
        paths.append(parameters(model))
    assert all(equal(paths[0], path) for path in paths)


@pytest.mark.parametrize("rule", ["spectral", "sgd"])
@pytest.mark.parametrize("reset", ["optimizer", "optimizer to zero", "model"])
def test_a_backward_pass_that_was_thrown_away_leaves_no_trace(rule, reset):
    model, twin = network(), network()
    optimizer, other = make(model, **RULES[rule]), make(twin, **RULES[rule])
    x, y = data()
    for _ in range(4):
        (3 * criterion_of(optimizer)(model(x + 1), y)).backward()
        if reset == "model":
            model.zero_grad()
        else:
            optimizer.zero_grad(set_to_none=reset == "optimizer")
        criterion_of(optimizer)(model(x), y).backward()
        optimizer.step()
        other.zero_grad()
        criterion_of(other)(twin(x), y).backward()
        other.step()
        model.zero_grad()
    assert equal(parameters(model), parameters(twin))
    assert str(optimizer.status()) == str(other.status())


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_thrown_away_by_the_model_do_not_count(set_to_none):
    torch.manual_seed(0)
    model, criterion = nn.Linear(3, 2), nn.CrossEntropyLoss()
    twin = copy.deepcopy(model)
    optimizer = ConjSGD(model.parameters(), model=model, loss=criterion)
    plain = ConjSGD(twin.parameters(), model=twin, loss=criterion)
    x, y = torch.randn(6, 3), torch.arange(6) % 2
    for _ in range(3):
        criterion(model(x + 1), y).backward()
        model.zero_grad(set_to_none=set_to_none)
        criterion(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        criterion(twin(x), y).backward()
        plain.step()
        plain.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters()))
