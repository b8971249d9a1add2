"""`maximize` under a constant step; measured rules bring a loss down to its floor, and refuse it.

Equality with torch.optim.SGD is checked in test_reduces_to_torch.py.
"""

import pytest
import torch
from loop import RULES, criterion_of, data, make, network, parameters


@pytest.mark.parametrize("rule", [name for name in RULES if "constant" in name])
def test_maximizing_is_minimizing_the_negative(rule):
    paths = []
    for sign in (1, -1):
        model = network(torch.float64)
        optimizer = make(model, maximize=sign == 1, weight_decay=0.0, **RULES[rule])
        x, y = data(dtype=torch.float64)
        losses = []
        for _ in range(8):
            optimizer.zero_grad()
            loss = criterion_of(optimizer)(model(x), y)
            (sign * loss).backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] > losses[0]
        paths.append(parameters(model))
    for p, q in zip(*paths):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("rule", [name for name in RULES if "constant" not in name])
def test_a_measured_rule_refuses_it_with_the_remedy(rule):
    model = network()
    with pytest.raises(ValueError, match="minimize the criterion, or use step_rule='constant'"):
        make(model, maximize=True, **RULES[rule])
    optimizer = make(model, **RULES[rule])
    x, y = data()
    (-criterion_of(optimizer)(model(x), y)).backward()
    before = parameters(model)
    with pytest.raises(RuntimeError, match=r"factor -1.*use step_rule='constant'"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters()))
