"""With the plain direction and a constant step, ConjSGD is `torch.optim.SGD`, bit for bit."""

import copy
import itertools

import pytest
import torch
from torch import nn

from conjopt import ConjSGD

STEPS = 50
CRITERION = nn.CrossEntropyLoss()


class Scale(nn.Module):
    """A parameter without dimensions, and one that takes part in every other step only."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(1.1))
        self.shift = nn.Parameter(torch.zeros(3, 1))
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.factor * x + (self.shift if self.calls % 2 else 0)


def network(dtype):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 5), nn.Tanh(), nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 3, 5, bias=False), Scale()
    ).to(dtype)


def train(model, optimizer, dtype, *, steps=STEPS, scheduler=None, maximize=False):
    """An ordinary loop; returns the parameters after each step."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(steps, 6, 4, generator=generator).to(dtype)
    targets = torch.randint(3, (steps, 6, 1), generator=generator)
    path = []
    for x, y in zip(inputs, targets):
        optimizer.zero_grad()
        loss = CRITERION(model(x), y)
        (-loss if maximize else loss).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        path.append([p.detach().clone() for p in model.parameters()])
    return path


def plain(params, model, **options):
    return ConjSGD(
        params,
        model=model,
        loss=CRITERION,
        direction="sgd",
        step_rule="constant",
        coupled_weight_decay=True,
        **options,
    )


def assert_same_path(ours, theirs):
    for step, (a, b) in enumerate(zip(ours, theirs, strict=True), 1):
        for i, (p, q) in enumerate(zip(a, b, strict=True)):
            assert torch.equal(p, q), f"parameter {i} after step {step}"
    first, last = theirs[0], theirs[-1]
    assert all(not torch.equal(p, q) for p, q in zip(first, last, strict=True))  # all of them move


COMBINATIONS = [
    (momentum, dampening, nesterov, weight_decay, maximize)
    for momentum, dampening, nesterov, weight_decay, maximize in itertools.product(
        (0.0, 0.9), (0.0, 0.3), (False, True), (0.0, 0.05), (False, True)
    )
    if not nesterov or (momentum > 0 and dampening == 0)  # what torch allows
]


@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("momentum", "dampening", "nesterov", "weight_decay", "maximize"), COMBINATIONS
)
def test_equals_torch_sgd(momentum, dampening, nesterov, weight_decay, maximize, dtype, foreach):
    ours, theirs = network(dtype), network(dtype)
    options = {
        "lr": 0.1,
        "momentum": momentum,
        "dampening": dampening,
        "nesterov": nesterov,
        "weight_decay": weight_decay,
        "maximize": maximize,
        "foreach": foreach,
    }
    path = train(ours, plain(ours.parameters(), ours, **options), dtype, maximize=maximize)
    expected = train(
        theirs, torch.optim.SGD(theirs.parameters(), **options), dtype, maximize=maximize
    )
    assert_same_path(path, expected)


@pytest.mark.parametrize("foreach", [None, True, False])
def test_equals_torch_sgd_with_a_tensor_for_lr(foreach):
    ours, theirs = network(torch.float32), network(torch.float32)
    options = {"momentum": 0.9, "weight_decay": 0.05, "foreach": foreach}
    path = train(
        ours,
        plain(ours.parameters(), ours, nesterov=False, lr=torch.tensor(0.1), **options),
        torch.float32,
    )
    expected = train(
        theirs, torch.optim.SGD(theirs.parameters(), lr=torch.tensor(0.1), **options), torch.float32
    )
    for a, b in zip(path[-1], expected[-1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_ignores_nesterov_without_momentum():
    ours, theirs = network(torch.float32), network(torch.float32)
    path = train(
        ours, plain(ours.parameters(), ours, lr=0.1, momentum=0, nesterov=True), torch.float32
    )
    expected = train(theirs, torch.optim.SGD(theirs.parameters(), lr=0.1), torch.float32)
    assert_same_path(path, expected)


SCHEDULES = {
    "steps": lambda o: torch.optim.lr_scheduler.StepLR(o, 7, gamma=0.7),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, STEPS),
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.3, total_steps=STEPS + 1),
    "warm-up": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [
            torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=5),
            torch.optim.lr_scheduler.ExponentialLR(o, 0.95),
        ],
        milestones=[5],
    ),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_equals_torch_sgd_under_a_scheduler(schedule):
    paths = []
    for make in (plain, lambda params, _, **options: torch.optim.SGD(params, **options)):
        model = network(torch.float64)
        options = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.05}
        optimizer = make(model.parameters(), model, **options)
        scheduler = SCHEDULES[schedule](optimizer)
        paths.append(train(model, optimizer, torch.float64, scheduler=scheduler))
    assert_same_path(*paths)


def test_equals_torch_sgd_with_groups():
    paths = []
    for make in (plain, lambda params, _, **options: torch.optim.SGD(params, **options)):
        model = network(torch.float32)
        linear, _, _, conv, scale = model
        groups = [
            {"params": linear.parameters(), "lr": 0.2, "momentum": 0.5},
            {"params": conv.parameters(), "weight_decay": 0.1},
        ]
        optimizer = make(groups, model, lr=0.05, momentum=0.9, nesterov=False)
        optimizer.add_param_group({"params": scale.parameters(), "lr": 0.01, "nesterov": True})
        paths.append(train(model, optimizer, torch.float32))
    assert_same_path(*paths)


def test_goes_on_from_its_state_as_torch_does():
    paths = []
    for make in (plain, lambda params, _, **options: torch.optim.SGD(params, **options)):
        model = network(torch.float32)
        options = {"lr": 0.1, "momentum": 0.9, "nesterov": True}
        optimizer = make(model.parameters(), model, **options)
        path = train(model, optimizer, torch.float32, steps=8)
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        model = network(torch.float32)
        optimizer = make(model.parameters(), model, **options)
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
        paths.append(path + train(model, optimizer, torch.float32, steps=8))
    assert_same_path(*paths)


@pytest.mark.parametrize(("weight_decay", "taken"), [(0.01, 0.1 * 0.01), (0.5, 0.002)])
def test_decoupled_decay_of_the_constant_rule(weight_decay, taken):
    model = network(torch.float64)
    twin = copy.deepcopy(model)
    optimizer = ConjSGD(
        model.parameters(),
        model=model,
        loss=CRITERION,
        direction="sgd",
        step_rule="constant",
        lr=0.1,
        momentum=0,
        weight_decay=weight_decay,
    )
    path = train(model, optimizer, torch.float64, steps=10)

    class Reference(torch.optim.SGD):
        @torch.no_grad()
        def step(self):
            for p in (p for p in twin.parameters() if p.grad is not None):
                p.mul_(1 - taken).sub_(0.1 * p.grad)

    expected = train(twin, Reference(twin.parameters(), lr=0.1), torch.float64, steps=10)
    for a, b in zip(path, expected, strict=True):
        for p, q in zip(a, b, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-14, atol=1e-15)
