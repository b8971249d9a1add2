"""Clipping between `backward()` and `step()`, by norm and by value.

What a step makes of clipped gradients is checked against a dense reference in test_step_rules.py.
"""

import pytest
import torch
from loop import RULES, any_rule, backward, equal, make, network, parameters, train
from torch import nn

CLIPS = {
    "norm": lambda model, most: nn.utils.clip_grad_norm_(model.parameters(), most),
    "norm, foreach": lambda model, most: nn.utils.clip_grad_norm_(
        model.parameters(), most, foreach=True
    ),
    "greatest entry": lambda model, most: nn.utils.clip_grad_norm_(
        model.parameters(), most, norm_type=torch.inf
    ),
    "value": lambda model, most: nn.utils.clip_grad_value_(model.parameters(), most),
    "total norm": lambda model, most: nn.utils.clip_grads_with_norm_(
        model.parameters(), most, nn.utils.get_total_norm([p.grad for p in model.parameters()])
    ),
}


@any_rule
@pytest.mark.parametrize("clip", CLIPS)
def test_clipping_at_nothing_changes_nothing(clip, rule):
    """The gradients were written to, so the halves are taken in another way."""
    model, twin = network(torch.float64), network(torch.float64)
    options = {"warmup": 3, "measure_every": 4, **RULES[rule]}
    optimizer, other = make(model, **options), make(twin, **options)
    for step in range(8):
        backward(model, optimizer, step)
        CLIPS[clip](model, 1e6)
        optimizer.step()
        train(twin, other, 1, step)
    for p, q in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-10)


@any_rule
@pytest.mark.parametrize("clip", CLIPS)
def test_clipped_gradients_are_those_of_the_step(clip, rule):
    """A plain step along what is left; under a measured rule the loss falls along it."""
    model = network(torch.float64)
    optimizer = make(model, warmup=3, measure_every=4, weight_decay=0.0, **RULES[rule])
    losses = []
    for step in range(40):
        losses.append(backward(model, optimizer, step, size=24))
        CLIPS[clip](model, 0.05)
        if step == 0 and rule == "sgd constant":
            expected = [p - 0.1 * 1.9 * p.grad for p in model.parameters()]  # Nesterov's first step
        optimizer.step()
        if step == 0 and rule == "sgd constant":
            for p, q in zip(model.parameters(), expected):
                torch.testing.assert_close(p.detach(), q.detach())
    assert losses[-1] < losses[0]
    assert optimizer.status().skipped_steps == 0


@any_rule
def test_clipping_to_zero_leaves_the_gradients_no_say(rule):
    model = network()
    optimizer = make(model, weight_decay=0.0, **RULES[rule])
    before = parameters(model)
    backward(model, optimizer)
    nn.utils.clip_grad_value_(model.parameters(), 0.0)
    optimizer.step()
    assert equal(before, parameters(model))
