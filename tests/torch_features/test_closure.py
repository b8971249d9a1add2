"""`step(closure)` is the same loop."""

import torch
from loop import RULES, any_rule, backward, equal, make, network, parameters, train


@any_rule
def test_a_closure_is_the_same_loop(rule):
    model, twin = network(), network()
    optimizer, other = make(model, **RULES[rule]), make(twin, **RULES[rule])
    for step in range(5):

        def closure(step=step):
            assert torch.is_grad_enabled()
            return backward(model, optimizer, step)

        assert optimizer.step(closure) == train(twin, other, 1, step)
    assert equal(parameters(model), parameters(twin))
