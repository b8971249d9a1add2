"""`copy.deepcopy` and `pickle` of the optimizer, with its model or alone; copies of the model."""

import copy
import gc
import io
import pickle

import pytest
import torch
from loop import (
    RULES,
    any_rule,
    backward,
    criterion_of,
    data,
    equal,
    hooks_of,
    make,
    network,
    parameters,
    same,
    train,
)
from torch import nn

from conjopt.bounds import ConvergenceLedger
from conjopt.optim import Spectral


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


# The optimizer itself.


def copied(how, *parts):
    if how == "deepcopy":
        return copy.deepcopy(parts)
    if how == "pickle":
        return pickle.loads(pickle.dumps(parts))
    file = io.BytesIO()
    torch.save(parts, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


ways = pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])


@ways
@any_rule
def test_a_copy_with_its_model_goes_on_as_the_original_does(rule, how):
    options = {"warmup": 3, "measure_every": 4, "average": 0.1, **RULES[rule]}
    for taken in (1, 2, 4):  # before the end of the warm-up, at it, after it
        model = network(dropout=0.3)
        groups = [{"params": model[:3].parameters()}, {"params": model[3:].parameters()}]
        optimizer = make(model, params=groups, **options)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 4)
        for step in range(taken):
            train(model, optimizer, 1, step)
            scheduler.step()
        copies = copied(how, model, optimizer, scheduler)
        before = parameters(model)
        assert copies[2].optimizer is copies[1]
        assert copies[1]._model is copies[0]
        for net, other, rates in (copies, (model, optimizer, scheduler)):
            for step in range(taken, taken + 6):
                train(net, other, 1, step)
                rates.step()
            if net is not model:
                assert equal(before, parameters(model))  # the original knows nothing of it
        assert equal(parameters(copies[0]), parameters(model))
        assert same(copies[1].state_dict(), optimizer.state_dict())
        assert str(copies[1].status()) == str(optimizer.status())


@ways
@any_rule
def test_a_copy_alone_brings_its_model_and_criterion(rule, how):
    model = network()
    optimizer = make(model, **RULES[rule])
    train(model, optimizer, 3)
    (other,) = copied(how, optimizer)
    twin = other._model
    assert twin is not model
    assert criterion_of(other) is not criterion_of(optimizer)
    assert {id(p) for group in other.param_groups for p in group["params"]} == {
        id(p) for p in twin.parameters()
    }
    train(model, optimizer, 3, 3)
    train(twin, other, 3, 3)
    assert equal(parameters(model), parameters(twin))
    assert str(optimizer.status()) == str(other.status())


@ways
def test_copies_of_copies_have_no_more_hooks(how):
    model, optimizer = network(), None
    optimizer = make(model)
    for _ in range(3):
        model, optimizer = copied(how, model, optimizer)
        train(model, optimizer, 1)
    assert len(hooks_of(model)) == 2
    assert len(hooks_of(criterion_of(optimizer))) == 1
    assert optimizer.status().step == 3
    del optimizer
    gc.collect()
    assert hooks_of(model) == []


@ways
def test_a_copy_between_backward_and_step_has_no_gradients(how):
    model = network()
    optimizer = make(model)
    train(model, optimizer, 2)
    backward(model, optimizer, 2)
    twin, other = copied(how, model, optimizer)
    before = parameters(twin)
    other.step()  # does nothing, as torch copies no gradients
    assert equal(before, parameters(twin))
    optimizer.step()
    train(twin, other, 1, 2)
    assert equal(parameters(model), parameters(twin))


@ways
def test_what_else_belongs_to_the_optimizer_is_copied_along(how):
    model, criterion = network(), nn.CrossEntropyLoss()
    x, y = data()
    ledger = ConvergenceLedger(model, criterion, x, y, whole=True)
    optimizer = make(
        model, criterion, batch_rule="work", direction=Spectral(0.9), ledger=ledger, ledger_every=2
    )
    train(model, optimizer, 3)
    (other,) = copied(how, optimizer)
    assert same(optimizer.state_dict(), other.state_dict())
    train(model, optimizer, 3, 3)
    train(other._model, other, 3, 3)
    assert equal(parameters(model), parameters(other._model))
    for name in ("conditions", "recommended_batch_size", "lo", "hi"):
        assert str(getattr(optimizer.status(), name)) == str(getattr(other.status(), name))
    assert len(other._recording.ledger.steps) == len(ledger.steps)


def test_hooks_and_wrappers_of_others_stay_with_the_original():
    """As in torch."""
    model = network()
    optimizer = make(model)
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    torch.optim.lr_scheduler.StepLR(optimizer, 1)  # wraps optimizer.step
    twin, other = copied("deepcopy", model, optimizer)
    train(twin, other, 1)
    assert calls == []
    assert optimizer.status().step == 0
    assert other.status().step == 1


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_model_that_holds_its_optimizer(how):
    model = network()
    model.optimizer = make(model)
    train(model, model.optimizer, 1)
    with pytest.raises(TypeError, match=r"keep the optimizer outside of the model, and copy both"):
        copied(how, model)
    (other,) = copied("deepcopy", model.optimizer)  # its model comes along whole
    train(model, model.optimizer, 2, 1)
    train(other._model, other, 2, 1)
    assert equal(parameters(model), parameters(other._model))


def test_a_shallow_copy_shares_all_as_in_torch():
    model = network()
    optimizer = make(model)
    other = copy.copy(optimizer)
    assert other.param_groups is optimizer.param_groups
    train(model, other, 2)
    assert model[0].weight in optimizer.state
