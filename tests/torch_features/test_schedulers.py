"""Learning-rate schedulers act on the dimensionless `lr`: the step is scaled by their factor."""

import pytest
import torch
from loop import RULES, any_rule, equal, make, network, parameters, train


@any_rule
def test_a_scheduler_scales_the_step_by_its_factor(rule):
    model, twin = network(), network()
    options = {"lr": 1.0, "weight_decay": 0.0, **RULES[rule]}
    base = options["lr"]
    optimizer, other = make(model, **options), make(twin, **options)
    factors = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1.0 if t < 6 else 0.25)
    for step in range(6):
        train(model, optimizer, 1, step)
        factors.step()
        train(twin, other, 1, step)
    assert equal(parameters(model), parameters(twin))
    before = parameters(model)
    assert optimizer.param_groups[0]["lr"] == 0.25 * base
    train(model, optimizer, 1, 6)
    train(twin, other, 1, 6)
    assert optimizer.status().step_size == 0.25 * other.status().step_size
    assert optimizer.status().limits == other.status().limits
    for old, p, q in zip(before, parameters(model), parameters(twin)):
        torch.testing.assert_close((p - old) / 0.25, q - old, rtol=1e-3, atol=3e-6)


@pytest.mark.parametrize("rule", ["spectral", "sgd"])
def test_a_tensor_for_lr_is_as_good(rule):
    model, twin = network(), network()
    train(model, make(model, lr=torch.tensor(0.5), **RULES[rule]), 4)
    train(twin, make(twin, lr=0.5, **RULES[rule]), 4)
    assert equal(parameters(model), parameters(twin))
