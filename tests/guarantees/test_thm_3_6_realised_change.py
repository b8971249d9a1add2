"""Thm 3.6 with the change that a step really makes, on networks that are not linear.

Its proof speaks of any change ``D_i`` of the outputs that is a function of ``x_i``. A step whose
realised change has rms at most ``2 tau sqrt(2L/beta)`` multiplies the excess risk of the samples
that L and D are of by at most ``(1 + 2 tau)^2``, whatever the network is.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from conjopt import ConjSGD
from conjopt.optim import Edge

LOSSES = {
    "softmax": (nn.CrossEntropyLoss(), 0.5, 1.0),
    "squared": (nn.MSELoss(), 1.0, 1.5),  # c = 2/k
    "logistic": (nn.BCEWithLogitsLoss(), 0.25, 3.0),  # c = 1/k
}


@pytest.mark.parametrize("kind", LOSSES)
@settings(max_examples=25)
@given(
    seed=st.integers(0, 10**6),
    depth=st.integers(0, 4),
    scale=st.sampled_from([1.0, 30.0, 1000.0]),
    normed=st.booleans(),
)
def test_no_step_multiplies_the_risk_by_more_than_the_realised_change_allows(
    kind, seed, depth, scale, normed
):
    criterion, beta, units = LOSSES[kind]
    torch.manual_seed(seed)
    layers = [nn.Linear(4, 8), nn.ReLU()]
    for _ in range(depth):
        layers += [nn.Linear(8, 8), *([nn.BatchNorm1d(8)] if normed else []), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(8, 3)).double()
    rule = Edge(tau_alone=1.0)
    optimizer = ConjSGD(
        model.parameters(),
        model=model,
        loss=criterion,
        step_rule=rule,
        weight_decay=0.0,
        decay=0.0,  # L is the batch's own
        warmup=100,
    )
    x = torch.randn(6, 4, dtype=torch.float64)
    y = torch.randint(3, (6,))
    if kind != "softmax":
        y = nn.functional.one_hot(y, 3).double()
    if kind == "squared":
        y = scale * y
    else:
        with torch.no_grad():
            model[-1].weight.mul_(scale / 30 + 1)
    # Each sample twice in a row: the even and the odd samples are the same.
    x, y = x.repeat_interleave(2, 0), y.repeat_interleave(2, 0)

    def risk():
        with torch.no_grad():
            return units * criterion(model(x), y), model(x)

    for _ in range(8):
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        before, outputs = risk()
        optimizer.step()
        after, moved = risk()
        change = moved - outputs
        if kind == "softmax":
            change = change - change.mean(1, keepdim=True)
        rms = change.square().sum(1).mean().sqrt()
        radius = 2 * (2 * before / beta).sqrt()
        rounding = 1e-12 * outputs.square().sum(1).mean().sqrt()
        assert rms <= radius * (1 + 1e-9) + rounding
        assert after <= 9 * before * (1 + 1e-9) + rounding


def test_the_linearised_limits_alone_break_it():
    torch.manual_seed(0)
    layers = [nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1)]
    model, criterion = nn.Sequential(*layers).double(), nn.MSELoss()
    rule = Edge(realised=None)
    optimizer = ConjSGD(model.parameters(), model=model, loss=criterion, step_rule=rule)
    x, y = torch.randn(16, 4).double(), 1e3 * torch.randn(16, 1).double()
    before = criterion(model(x), y)
    before.backward()
    optimizer.step()
    assert criterion(model(x), y) > 100 * before
