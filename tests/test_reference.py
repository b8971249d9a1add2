"""The optimizer against the plain reference implementation of its step."""

import copy

import pytest
import torch
from reference import ReferenceSteps
from torch import nn

from conjopt import ConjSGD

STEPS = 60


def mlp(dropout):
    return nn.Sequential(
        nn.Linear(6, 9), nn.Tanh(), nn.Dropout(dropout), nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 4)
    )


def cnn(dropout):
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Dropout(dropout),
        nn.Conv2d(3, 4, 2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(16, 3),
    )


def problem(kind, dropout):
    torch.manual_seed(0)
    model = (mlp if kind == "mlp" else cnn)(dropout).double()
    shape = (6,) if kind == "mlp" else (1, 6, 6)
    classes = 4 if kind == "mlp" else 3
    y = torch.arange(80) % classes
    x = torch.randn(classes, *shape)[y] + 0.5 * torch.randn(80, *shape)
    x = x.double()
    return model, x, y


def compare(kind, *, clip=None, dropout=0.0, penalty=0.0, saturated=False, apart=False):
    """Train both for 60 steps; returns which limits set the step, and how often clipping acted.

    Each carries its own momentum and statistics through the run. Training amplifies rounding errors
    in the parameters, though, by up to a hundred a step where small singular values are made large,
    so the reference goes on from the parameters of the other, unless the two are to stay apart.
    """
    model, x, y = problem(kind, dropout)
    if saturated:  # all samples are wrong in the same way, where the loss has little curvature
        y = torch.ones_like(y)
        with torch.no_grad():
            model[-1].bias[0] += 4.0
    twin = copy.deepcopy(model)
    criterion = nn.CrossEntropyLoss()
    optimizer = ConjSGD(model.parameters(), model=model, loss=criterion, warmup=5, measure_every=7)
    reference = ReferenceSteps(list(twin.parameters()), warmup=5, every=7)
    batches = torch.Generator().manual_seed(1)
    limits, clipped = set(), 0
    for step in range(STEPS):
        size = 9 if step % 4 == 3 else 12  # odd batches have unequal halves
        batch = torch.randperm(len(x), generator=batches)[:size]
        torch.manual_seed(100 + step)  # the same dropout
        optimizer.zero_grad()
        outputs = model(x[batch])
        loss = criterion(outputs, y[batch])
        (loss + penalty * outputs.square().mean()).backward()
        if clip is not None:
            clipped += bool(nn.utils.clip_grad_norm_(model.parameters(), clip) > clip)
        optimizer.step()

        torch.manual_seed(100 + step)
        outputs = twin(x[batch])
        loss = criterion(outputs, y[batch])
        a = reference(outputs, loss + penalty * outputs.square().mean(), loss.detach(), clip)

        status = optimizer.status()
        limits.add(status.limited_by)
        assert status.step_size == pytest.approx(float(a), rel=1e-8), step
        for fast, plain in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(fast, plain, rtol=1e-8, atol=1e-10)
        if not apart:
            twin.load_state_dict(model.state_dict())
    assert status.step == STEPS
    return limits, clipped


@pytest.mark.parametrize("penalty", [0.0, 0.02])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_agrees_with_the_reference(kind, dropout, penalty):
    limits, _ = compare(kind, dropout=dropout, penalty=penalty)
    assert limits >= {"edge", "trust region"}


@pytest.mark.parametrize("penalty", [0.0, 0.02])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_agrees_with_the_reference_under_clipping(kind, dropout, penalty):
    _, clipped = compare(kind, clip=0.1, dropout=dropout, penalty=penalty)
    assert clipped > 10


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_stays_with_the_reference_over_a_whole_run(kind):
    compare(kind, clip=0.02, dropout=0.25, apart=True)


def test_agrees_with_the_reference_where_the_loss_is_saturated():
    limits, _ = compare("cnn", saturated=True)
    assert "Polyak cap" in limits
