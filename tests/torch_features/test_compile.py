"""`torch.compile` of the model, of the loss and of the step."""

import torch
from loop import RULES, any_rule, equal, make, network, parameters, train


@any_rule
def test_a_compiled_model_is_watched_like_any_other(rule):
    model, twin = network(), network()
    compiled = torch.compile(model, backend="eager")
    optimizer, other = make(compiled, **RULES[rule]), make(twin, **RULES[rule])
    train(compiled, optimizer, 3)
    train(twin, other, 3)
    assert equal(parameters(model), parameters(twin))
    assert str(optimizer.status()) == str(other.status())
