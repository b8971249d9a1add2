"""A run that is killed at any step and resumed equals the unbroken one bit for bit."""

import copy
import io

import pytest
import torch
from loop import equal, make, network, parameters, same, train
from torch import nn

from conjopt.optim.conj_sgd import BLOCK_STATE

RESUMED = {
    "spectral": {},
    "spectral, averaged": {"average": 0.1, "max_step": 0.05},
    "spectral, half precision": {"dtype": torch.bfloat16, "average": 0.1},
    "spectral, double precision": {"dtype": torch.float64, "weight_decay": 0.03},
    "spectral, with a floor that is none": {"data_floor": 1.5},
    "spectral, batch norm": {"normalize": True},
    "sgd": {"direction": "sgd", "average": 0.2},
    "spectral constant": {"step_rule": "constant", "lr": 0.02, "average": 0.1},
    "sgd constant": {"step_rule": "constant", "direction": "sgd", "lr": 0.1},
}


@pytest.mark.filterwarnings("ignore:ConjSGD. losses stay below data_floor:RuntimeWarning")
@pytest.mark.parametrize("kind", RESUMED)
def test_a_resumed_run_equals_the_unbroken_one(kind):
    """Saved after every step: inside the warm-up, at measurements and between them."""
    options = {"warmup": 4, "measure_every": 5, **RESUMED[kind]}
    dtype, normalize = options.pop("dtype", torch.float32), options.pop("normalize", False)
    steps = 17

    def start():
        model = network(dtype, dropout=0.3)
        if normalize:
            model[1] = nn.BatchNorm1d(6)
        groups = [{"params": model[:3].parameters()}, {"params": model[3:].parameters()}]
        groups[0]["lr"] = 0.5 * options.get("lr", 1.0)
        optimizer = make(model, params=groups, **options)
        return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 6, gamma=0.5)

    def run(model, optimizer, scheduler, first, last):
        for step in range(first, last):
            loss = train(model, optimizer, 1, step)
            scheduler.step()
        return loss

    parts = start()
    saves = []
    for step in range(steps):
        file = io.BytesIO()
        torch.save([part.state_dict() for part in parts], file)
        saves.append(file.getvalue())
        run(*parts, step, step + 1)
    model, optimizer, _ = parts
    for step, save in enumerate(saves):
        again = start()
        again[0].eval()
        train(again[0], again[1], 2, 50)  # what is there before is forgotten
        again[0].train()
        for part, state in zip(again, torch.load(io.BytesIO(save), weights_only=True)):
            part.load_state_dict(state)
        run(*again, step, steps)
        assert equal(parameters(again[0]), parameters(model)), f"saved after {step} steps"
        assert same(again[1].state_dict(), optimizer.state_dict()), f"saved after {step} steps"
        assert str(again[1].status()) == str(optimizer.status())


def test_a_state_holds_its_own_precision():
    model = network(torch.bfloat16)
    optimizer = make(model, average=0.1)
    train(model, optimizer, 2)
    before = copy.deepcopy(optimizer.state_dict())
    assert set().union(*before["state"].values()) == {*BLOCK_STATE, "momentum_buffer", "average"}
    optimizer.load_state_dict(before)
    after = optimizer.state_dict()
    for number, state in before["state"].items():
        for key, value in state.items():
            assert value.dtype == after["state"][number][key].dtype
    assert after["state"][0]["slopes"].dtype == torch.float32
