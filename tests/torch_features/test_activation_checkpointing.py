"""Non-reentrant activation checkpointing changes nothing; the reentrant one is refused.

The halves of a checkpointed batch are checked in test_observation.py.
"""

import pytest
from loop import RULES, any_rule, backward, equal, make, network, parameters, train
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential


class Checkpointed(nn.Module):
    """A network whose parts are run again in the backward pass."""

    def __init__(self, how):
        super().__init__()
        self.body, self.how = network(dropout=0.3), how

    def forward(self, x):
        if self.how == "plain":
            return self.body(x)
        if self.how == "segments":
            return checkpoint_sequential(self.body, 3, x, use_reentrant=False)
        if self.how == "inside":
            return self.body[3:](checkpoint(self.body[:3], x, use_reentrant=False))
        if self.how == "reentrant":
            return checkpoint(self.body[3:], self.body[:3](x), use_reentrant=True)
        return checkpoint(self.body, x, use_reentrant=False)


@any_rule
@pytest.mark.parametrize("how", ["whole", "inside", "segments"])
def test_a_checkpointed_run_is_the_plain_run(how, rule):
    """Bit for bit, with dropout, at measuring steps and between them."""
    model, twin = Checkpointed(how), Checkpointed("plain")
    options = {"warmup": 3, "measure_every": 4, **RULES[rule]}
    optimizer, other = make(model, **options), make(twin, **options)
    train(model, optimizer, 9)
    train(twin, other, 9)
    assert equal(parameters(model), parameters(twin))
    assert str(optimizer.status()) == str(other.status())


@pytest.mark.parametrize("rule", [name for name in RULES if "constant" not in name])
def test_reentrant_checkpointing_is_refused_with_the_remedy(rule):
    model = Checkpointed("reentrant")
    optimizer = make(model, **RULES[rule])
    with pytest.raises(RuntimeError, match=r"use_reentrant=True.*pass use_reentrant=False"):
        backward(model, optimizer)


@pytest.mark.parametrize("rule", [name for name in RULES if "constant" in name])
def test_a_constant_rule_takes_it_as_nothing_is_measured(rule):
    model, twin = Checkpointed("reentrant"), Checkpointed("plain")
    train(model, make(model, **RULES[rule]), 4)
    train(twin, make(twin, **RULES[rule]), 4)
    assert equal(parameters(model), parameters(twin))
