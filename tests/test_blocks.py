"""`Blocks`: what a step moves."""

import pytest
import torch
from torch import nn

from conjopt import ConjSGD
from conjopt.optim import blocks as module
from conjopt.optim.blocks import Blocks


@pytest.mark.parametrize("place", [0, 1, None])
def test_a_model_is_sharded_if_any_of_its_parameters_is(place, monkeypatch):
    """Of a model of which FSDP2 shards a part, the first parameter may be a whole one."""
    model = nn.Linear(2, 3)
    optimizer = ConjSGD(model.parameters(), model=model, loss=nn.CrossEntropyLoss())
    model(torch.ones(1, 2)).sum().backward()
    found = Blocks.of(optimizer.param_groups, optimizer.state, optimizer._names)
    one = None if place is None else found.parameters[place]
    monkeypatch.setattr(module, "is_sharded", lambda tensor: tensor is one)
    assert found.sharded == (place is not None)
