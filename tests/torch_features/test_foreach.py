"""`foreach`, kernels over many tensors or one after the other, changes nothing."""

import pytest
import torch
from loop import RULES, any_rule, backward, equal, make, network, parameters, same, train
from torch import nn


@any_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("foreach", [True, None])
def test_foreach_changes_nothing(foreach, dtype, rule):
    model, twin = network(dtype), network(dtype)
    options = {"warmup": 3, "measure_every": 4, "average": 0.1, "weight_decay": 0.01}
    optimizer = make(model, foreach=foreach, **options, **RULES[rule])
    other = make(twin, foreach=False, **options, **RULES[rule])
    train(model, optimizer, 8)
    train(twin, other, 8)
    assert equal(parameters(model), parameters(twin))
    assert same(optimizer.state_dict(), other.state_dict())


@any_rule
def test_parameters_of_mixed_types(rule):
    """A float64 head on a float32 body: each keeps its type, and state that goes with it."""
    paths = []
    for foreach in (True, False):
        model = network()
        model[5].double()
        model[4].register_forward_hook(lambda module, args, output: output.double())
        optimizer = make(model, foreach=foreach, **RULES[rule])
        train(model, optimizer, 6)
        paths.append(parameters(model))
        assert [p.dtype for p in model.parameters()] == [torch.float32] * 4 + [torch.float64] * 2
        for p in model.parameters():
            buffer = optimizer.state[p].get("momentum_buffer")
            assert buffer is None or buffer.dtype == p.dtype
    assert equal(*paths)


@pytest.mark.parametrize("foreach", [True, False, None])
def test_a_gradient_that_is_not_finite_is_seen(foreach):
    model = network()
    optimizer = make(model, foreach=foreach)
    train(model, optimizer, 2)
    before = parameters(model)
    backward(model, optimizer, 2)
    nn.init.constant_(model[5].bias.grad, torch.nan)
    with pytest.warns(RuntimeWarning, match="gave up a step"):
        optimizer.step()
    assert equal(before, parameters(model))
