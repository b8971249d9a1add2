"""An ordinary step on a device never waits for it: no value is read on the host."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from conjopt import ConjSGD
from conjopt.report import History

READS = {"_local_scalar_dense", "nonzero", "equal", "masked_select", "is_nonzero", "_to_copy"}


class Spy(TorchDispatchMode):
    """Records what would make a device wait, or be waited for."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        # A copy counts if it leaves the device; a change of precision does not.
        if name in READS and (name != "_to_copy" or (kwargs or {}).get("device") is not None):
            self.seen.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"direction": "sgd"},
        {"step_rule": "constant", "lr": 0.1},
        {"average": 0.1},
        {"data_floor": 0.01},
        {"max_step": 0.1},
        {"loss": nn.CrossEntropyLoss(label_smoothing=0.1)},
        {"history": "in memory"},
        {"history": "in memory", "step_rule": "constant", "lr": 0.1},
    ],
    ids=str,
)
def test_an_ordinary_step_reads_nothing(options, monkeypatch):
    # A CPU is asked whether a step is finite, and more; a device is not. Take the way of devices.
    monkeypatch.setattr(ConjSGD, "_given_up", lambda self, finite: False)
    monkeypatch.setattr(ConjSGD, "_gate", lambda self, finite: finite)
    monkeypatch.setattr("conjopt.optim.checks.positive", lambda weight: None)
    monkeypatch.setattr("conjopt.optim.blocks.is_known_one", lambda number: False)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    options = {"loss": nn.CrossEntropyLoss(), **options}
    loss = options["loss"]
    if "history" in options:
        options["history"] = History()
    optimizer = ConjSGD(model.parameters(), model=model, warmup=2, **options)
    x, y = torch.randn(16, 4), torch.arange(16) % 3

    def step():
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()

    for _ in range(3):
        step()
    with Spy() as spy:
        for _ in range(3):
            step()
    assert not spy.seen
    if "history" in options:
        assert [record["step"] for record in options["history"].records] == [1, 2]
    with Spy() as spy:
        optimizer.status()
    assert spy.seen  # the spy does see
