"""`channels_last` models and inputs: the same run, and parameters keep their layout."""

import copy

import pytest
import torch
from loop import RULES, any_rule, equal, make, parameters
from torch import nn

LAST = torch.channels_last


def images():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(12, 3, 6, 6, generator=generator, dtype=torch.float64)
    return x, x[:, :, 0, 0].argmax(1)


def convolutions():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.Flatten(), nn.Linear(20, 3)
    ).double()


def run(model, optimizer, x, y, steps=8):
    for _ in range(steps):
        optimizer.zero_grad()
        optimizer._watch.criterion(model(x), y).backward()
        optimizer.step()


@any_rule
@pytest.mark.parametrize("average", [0.0, 0.1])
def test_the_layout_changes_no_more_than_rounding(rule, average):
    (x, y), model, twin = images(), convolutions(), convolutions()
    model = model.to(memory_format=LAST)
    options = {"warmup": 3, "measure_every": 4, "average": average, **RULES[rule]}
    optimizer, other = make(model, **options), make(twin, **options)
    run(model, optimizer, x.to(memory_format=LAST), y)
    run(twin, other, x, y)
    for p, q in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)
        if p.ndim == 4:
            assert p.is_contiguous(memory_format=LAST)


@any_rule
def test_a_checkpoint_of_such_a_model_resumes(rule):
    (x, y), model, twin = images(), convolutions(), convolutions()
    model, twin = model.to(memory_format=LAST), twin.to(memory_format=LAST)
    x = x.to(memory_format=LAST)
    optimizer, other = make(model, **RULES[rule]), make(twin, **RULES[rule])
    run(model, optimizer, x, y, 3)
    twin.load_state_dict(copy.deepcopy(model.state_dict()))
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(model, optimizer, x, y, 3)
    run(twin, other, x, y, 3)
    assert equal(parameters(model), parameters(twin))
