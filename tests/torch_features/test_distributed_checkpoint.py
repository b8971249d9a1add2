"""`torch.distributed.checkpoint`, here in a single process without a process group."""

import copy

import pytest
import torch
import torch.distributed.checkpoint as dcp
from loop import RULES, any_rule, equal, make, network, parameters, same, train
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch")

KINDS = {
    **RULES,
    "spectral, averaged": {"average": 0.1},
    "spectral, batch norm": {"normalize": True},
    "spectral, with a batch rule": {"batch_rule": "work"},
    "sgd, averaged": {"direction": "sgd", "average": 0.1, "max_step": 0.1},
}
kinds = pytest.mark.parametrize("kind", KINDS)


def start(kind):
    options = {"warmup": 3, "measure_every": 4, **KINDS[kind]}
    model = network(dropout=0.2)
    if options.pop("normalize", False):
        model[1] = nn.BatchNorm1d(6)
    groups = [{"params": model[:3].parameters()}, {"params": model[3:].parameters()}]
    groups[1]["lr"] = 0.5 * options.get("lr", 1.0)
    return model, make(model, params=groups, **options)


@kinds
@pytest.mark.parametrize("taken", [0, 2, 5])
def test_a_run_goes_on_exactly(kind, taken, tmp_path):
    model, optimizer = start(kind)
    train(model, optimizer, taken)
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optim": state}, checkpoint_id=tmp_path, no_dist=True)
    twin, other = start(kind)
    weights, state = get_state_dict(twin, other)
    loaded = {"model": weights, "optim": state}
    dcp.load(loaded, checkpoint_id=tmp_path, no_dist=True)
    set_state_dict(twin, other, model_state_dict=loaded["model"], optim_state_dict=loaded["optim"])
    assert same(optimizer.state_dict(), other.state_dict())
    train(model, optimizer, 6, taken)
    train(twin, other, 6, taken)
    assert equal(parameters(model), parameters(twin))
    assert str(optimizer.status()) == str(other.status())


@any_rule
def test_making_the_state_to_load_into_leaves_a_fresh_run_alone(rule):
    """It is made by a step at rate 0 along zeros."""
    model, twin = network(), network()
    options = {"warmup": 3, "measure_every": 4, "average": 0.1, **RULES[rule]}
    optimizer, other = make(model, **options), make(twin, **options)
    before = parameters(model)
    get_optimizer_state_dict(model, optimizer)
    assert equal(before, parameters(model))
    assert optimizer.status().step == 0
    train(model, optimizer, 6)
    train(twin, other, 6)
    assert equal(parameters(model), parameters(twin))
    assert same(optimizer.state_dict(), other.state_dict())


@any_rule
def test_every_parameter_has_the_same_state_from_the_first_step_on(rule):
    """What is loaded in place has to know its keys."""
    model, fresh = network(), network()
    options = {"average": 0.1, **RULES[rule]}
    optimizer, other = make(model, **options), make(fresh, **options)
    train(model, optimizer, 1)
    expected = get_optimizer_state_dict(fresh, other)["state"]
    found = get_optimizer_state_dict(model, optimizer)["state"]
    for name, _ in model.named_parameters():
        assert {k: (v.shape, v.dtype) for k, v in found.get(name, {}).items()} == {
            k: (v.shape, v.dtype) for k, v in expected.get(name, {}).items()
        }


@any_rule
def test_a_plain_state_dict_in_place(rule, tmp_path):
    """Without the helpers, into an optimizer that has taken a step."""
    model, twin = network(), network()
    optimizer, other = make(model, **RULES[rule]), make(twin, **RULES[rule])
    train(model, optimizer, 5)
    train(twin, other, 1)
    saved = {"model": model.state_dict(), "optim": optimizer.state_dict()}
    dcp.save(saved, checkpoint_id=tmp_path, no_dist=True)
    loaded = copy.deepcopy({"model": twin.state_dict(), "optim": other.state_dict()})
    dcp.load(loaded, checkpoint_id=tmp_path, no_dist=True)
    twin.load_state_dict(loaded["model"])
    other.load_state_dict(loaded["optim"])
    train(model, optimizer, 3, 5)
    train(twin, other, 3, 5)
    assert equal(parameters(model), parameters(twin))


def test_states_by_names_are_loaded_in_another_order():
    """The helpers speak of parameters by name, so the groups need not list them alike."""
    model, twin = network(), network()
    optimizer = make(model)
    other = make(twin, params=list(twin.parameters())[::-1])
    train(model, optimizer, 4)
    twin.load_state_dict(model.state_dict())
    set_optimizer_state_dict(twin, other, get_optimizer_state_dict(model, optimizer))
    for p, q in zip(model.parameters(), twin.parameters()):
        assert same(dict(optimizer.state[p]), dict(other.state[q]))
    assert torch.equal(optimizer._statistics.loss, other._statistics.loss)
