"""`copy.deepcopy` and `pickle` of the optimizer, with its model or alone; copies of the model."""

import copy
import io
import pickle

import torch
from loop import backward, criterion_of, data, equal, make, network, parameters, train


def test_copies_of_the_model_are_not_watched():
    model, twin = network(), network()
    optimizer, other = make(model), make(twin)
    train(model, optimizer, 2)
    train(twin, other, 2)
    copied = copy.deepcopy(model)
    mean = torch.optim.swa_utils.AveragedModel(model)
    x, y = data()
    backward(model, optimizer, 2)
    for net in (copied, mean, pickle.loads(pickle.dumps(model))):
        criterion_of(optimizer)(net(x + 1), y).backward()
        with torch.no_grad():
            net(x)
    optimizer.step()
    mean.update_parameters(model)
    train(twin, other, 1, 2)
    assert equal(parameters(model), parameters(twin))
    assert str(optimizer.status()) == str(other.status())


def test_a_copy_has_an_optimizer_of_its_own():
    model = network()
    optimizer = make(model)
    train(model, optimizer, 2)
    copied = copy.deepcopy(model)
    fresh = make(copied)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, 3, 2)
    train(copied, fresh, 3, 2)
    assert equal(parameters(model), parameters(copied))


def test_a_watched_model_can_be_saved_whole():
    model = network()
    optimizer = make(model)
    train(model, optimizer, 1)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    x, _ = data()
    assert torch.equal(model(x), loaded(x))
    train(model, optimizer, 1, 1)
    assert optimizer.status().step == 2
