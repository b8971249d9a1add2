"""An ordinary training loop around ConjSGD, for the tests of what may happen in it."""

import pytest
import torch
from torch import nn

from conjopt import ConjSGD
from conjopt.measure.watch import Hook


def network(dtype=torch.float32, dropout=0.0):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 6), nn.Tanh(), nn.Dropout(dropout), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)
    ).to(dtype)


def data(size=24, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(size, 4, generator=generator, dtype=dtype)
    return x, x[:, :3].argmax(1)


def make(model, criterion=None, params=None, **options):
    params = model.parameters() if params is None else params
    criterion = nn.CrossEntropyLoss() if criterion is None else criterion
    return ConjSGD(params, model=model, loss=criterion, **options)


def criterion_of(optimizer):
    return optimizer._watch.criterion


def backward(model, optimizer, step=0, size=8):
    """One forward and backward pass; the batch and the dropout follow from the step."""
    x, y = data(dtype=next(model.parameters()).dtype)
    torch.manual_seed(100 + step)
    rows = torch.randperm(len(x))[:size]
    optimizer.zero_grad()
    loss = criterion_of(optimizer)(model(x[rows]), y[rows])
    loss.backward()
    return loss.item()


def train(model, optimizer, steps, start=0, **options):
    loss = None
    for step in range(start, start + steps):
        loss = backward(model, optimizer, step, **options)
        optimizer.step()
    return loss


def parameters(model):
    return [p.detach().clone() for p in model.parameters()]


def equal(a, b):
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def same(a, b):
    """Whether two nested states are equal, NaN being equal to itself."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a.nan_to_num(1e9), b.nan_to_num(1e9))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(p, q) for p, q in zip(a, b))
    return a == b


def hooks_of(module):
    hooks = [
        *module._forward_hooks.values(),
        *module._forward_pre_hooks.values(),
        *module._backward_hooks.values(),
    ]
    return [hook for hook in hooks if isinstance(hook, Hook)]


# Every direction with every step rule that goes with it; "edge" where none is named.
RULES = {
    "spectral": {},
    "sgd": {"direction": "sgd"},
    "spectral constant": {"step_rule": "constant", "lr": 0.02},
    "sgd constant": {"step_rule": "constant", "direction": "sgd", "lr": 0.1},
    "sgd smoothness": {"step_rule": "smoothness", "direction": "sgd", "momentum": 0.0},
    "sgd polyak": {"step_rule": "polyak", "direction": "sgd", "momentum": 0.0},
}


any_rule = pytest.mark.parametrize("rule", RULES)
