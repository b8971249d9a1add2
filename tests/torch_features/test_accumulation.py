"""Gradient accumulation: micro-batches are the joined batch, and the halves of a measurement."""

import pytest
import torch
from loop import RULES, criterion_of, data, make, network, parameters, train


@pytest.mark.parametrize("rule", ["spectral", "sgd"])
@pytest.mark.parametrize("sizes", [(12, 12), (8, 8, 8), (4, 16, 4)])
def test_accumulated_micro_batches_are_the_joined_batch(sizes, rule):
    x, y = data(24, torch.float64)
    results = []
    for parts in (torch.arange(24).split(24), torch.arange(24).split(list(sizes))):
        model = network(torch.float64)
        optimizer = make(model, warmup=1, measure_every=1000, average=0.1, **RULES[rule])
        train(model, optimizer, 1)  # the one that measures; its two parts would differ
        for _ in range(3):
            optimizer.zero_grad()
            for rows in parts:
                (criterion_of(optimizer)(model(x[rows]), y[rows]) * (len(rows) / 24)).backward()
            optimizer.step()
        results.append((optimizer.state_dict(), optimizer.status(), parameters(model)))
    (state, status, after), (state_of_parts, status_of_parts, after_parts) = results
    assert status_of_parts.loss == pytest.approx(status.loss, rel=1e-12)
    assert status_of_parts.step_size == pytest.approx(status.step_size, rel=1e-12)
    for number, of_one in state["state"].items():
        for key, value in of_one.items():
            torch.testing.assert_close(state_of_parts["state"][number][key], value)
    for p, q in zip(after_parts, after):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("rule", ["spectral", "sgd"])
def test_accumulation_trains(rule):
    """The measuring steps as well, whose two parts are the first micro-batch and the others."""
    model = network()
    optimizer = make(model, warmup=4, measure_every=5, **RULES[rule])
    x, y = data()
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = 0
        for rows in torch.arange(24).split(8):
            part = criterion_of(optimizer)(model(x[rows]), y[rows]) / 3
            part.backward()
            loss += part.item()
        optimizer.step()
        losses.append(loss)
    assert losses[-1] < losses[0] / 2
    assert optimizer.status().loss < losses[0]
