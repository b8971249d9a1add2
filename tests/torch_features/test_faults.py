"""What goes wrong in a user's loop leaves parameters and state valid."""

import copy
import io
import pickle
import struct
import zipfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loop import (
    RULES,
    any_rule,
    backward,
    criterion_of,
    data,
    equal,
    make,
    network,
    parameters,
    same,
    train,
)
from torch import nn

OPTIONS = {"warmup": 3, "measure_every": 4}


def started(rule, taken=0, **options):
    model = network()
    optimizer = make(model, **{**OPTIONS, **RULES[rule], **options})
    train(model, optimizer, taken)
    return model, optimizer


def snapshot(model, optimizer):
    state = copy.deepcopy(optimizer.state_dict())
    # An empty state of a parameter is no state.
    state["state"] = {number: of_one for number, of_one in state["state"].items() if of_one}
    return copy.deepcopy(model.state_dict()), state


# An exception in the loop.


class Stop(Exception):
    pass


def breaks_in_the_forward(model, optimizer, x, y):
    handle = model[3].register_forward_pre_hook(throw)
    try:
        criterion_of(optimizer)(model(x), y).backward()
    finally:
        handle.remove()


def breaks_after_the_forward(model, optimizer, x, y):
    model(x)
    raise Stop


def breaks_after_the_loss(model, optimizer, x, y):
    criterion_of(optimizer)(model(x), y)
    raise Stop


def breaks_in_the_backward(model, optimizer, x, y):
    outputs = model(x)
    outputs.register_hook(throw)
    criterion_of(optimizer)(outputs, y).backward()


def breaks_at_a_gradient(model, optimizer, x, y):
    handle = model[3].weight.register_hook(throw)
    try:
        criterion_of(optimizer)(model(x), y).backward()
    finally:
        handle.remove()


def breaks_after_the_backward(model, optimizer, x, y):
    criterion_of(optimizer)(model(x), y).backward()
    raise Stop


def breaks_in_the_closure(model, optimizer, x, y):
    optimizer.step(throw)


def breaks_in_a_step_hook(model, optimizer, x, y):
    handle = optimizer.register_step_pre_hook(throw)
    try:
        criterion_of(optimizer)(model(x), y).backward()
        optimizer.step()
    finally:
        handle.remove()


def throw(*_):
    raise Stop


BREAKS = [value for name, value in sorted(globals().items()) if name.startswith("breaks_")]


@settings(max_examples=25)
@given(
    rule=st.sampled_from(list(RULES)),
    breaks=st.lists(st.sampled_from(BREAKS), min_size=1, max_size=3),
    taken=st.integers(0, 6),
    by=st.sampled_from(["optimizer", "model"]),
)
def test_an_exception_in_the_loop_leaves_no_trace(rule, breaks, taken, by):
    """The run goes on as one in which nothing happened."""
    (model, optimizer), (twin, other) = started(rule, taken), started(rule, taken)
    before, (x, y) = snapshot(model, optimizer), data()
    for broken in breaks:
        with pytest.raises(Stop):
            broken(model, optimizer, x + 1, y)
        (optimizer if by == "optimizer" else model).zero_grad()
        assert same(before, snapshot(model, optimizer))
    train(model, optimizer, 5, taken)
    train(twin, other, 5, taken)
    assert equal(parameters(model), parameters(twin))
    assert str(optimizer.status()) == str(other.status())


# Numbers that are not finite.


@settings(max_examples=40)
@given(
    rule=st.sampled_from(list(RULES)),
    value=st.sampled_from([torch.nan, torch.inf, -torch.inf]),
    place=st.sampled_from(["input", "activation", "output", "loss", "factor", "gradient"]),
    layer=st.sampled_from([0, 1, 3, 4, 5]),
    entry=st.integers(0, 17),
    taken=st.integers(0, 6),
    average=st.sampled_from([0.0, 0.1]),
)
@pytest.mark.filterwarnings("ignore:ConjSGD gave up a step:RuntimeWarning")
# The poisoned bias that is added to the loss is a further term, with a finite gradient.
@pytest.mark.filterwarnings("ignore:ConjSGD.*did not come through the criterion:RuntimeWarning")
def test_not_finite_numbers_anywhere_give_up_the_step_alone(
    rule, value, place, layer, entry, taken, average
):
    def poison(tensor):
        flat = torch.zeros(tensor.numel())
        flat[entry % tensor.numel()] = value
        return tensor + flat.reshape(tensor.shape)

    model, optimizer = started(rule, taken, average=average)
    x, y = data()
    before = snapshot(model, optimizer)
    optimizer.zero_grad()
    handle = None
    if place == "activation":
        handle = model[layer].register_forward_hook(lambda module, args, output: poison(output))
    outputs = model(poison(x) if place == "input" else x)
    if handle is not None:
        handle.remove()
    loss = criterion_of(optimizer)(poison(outputs) if place == "output" else outputs, y)
    if place == "loss":
        loss = loss + poison(model[5].bias).sum()
    if place == "factor":
        loss = loss * abs(value)  # a negative one is refused
    loss.backward()
    if place == "gradient":
        p = list(model.parameters())[layer]
        p.grad = poison(p.grad)
    bad = not all(p.grad.isfinite().all() for p in model.parameters())
    optimizer.step()
    after = snapshot(model, optimizer)
    if bad:
        assert optimizer.status().skipped_steps == 1
        before[1]["param_groups"][0]["controller"]["statistics"]["skipped"] += 1
        assert same(before, after)
    assert all(p.isfinite().all() for p in model.parameters())
    train(model, optimizer, 4, taken)
    status = optimizer.status()
    assert all(p.isfinite().all() for p in model.parameters())
    assert status.step == taken + 5 - status.skipped_steps


# Checkpoints that are cut or of another run.


def saved(state, legacy=False):
    file = io.BytesIO()
    torch.save(state, file, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_file_that_was_cut_is_torchs_error(share, legacy):
    model, optimizer = started("spectral", 3)
    before = snapshot(model, optimizer)
    whole = saved(optimizer.state_dict(), legacy)
    file = io.BytesIO(whole[: int(share * len(whole))])
    errors = (
        RuntimeError,
        EOFError,
        pickle.UnpicklingError,
        struct.error,
        zipfile.BadZipFile,
        ValueError,
    )
    with pytest.raises(errors):
        optimizer.load_state_dict(torch.load(file, weights_only=True))
    assert same(before, snapshot(model, optimizer))


def leaves(state, path=()):
    """The places of all that a state holds."""
    items = (
        state.items()
        if isinstance(state, dict)
        else enumerate(state)
        if isinstance(state, list)
        else ()
    )
    for key, value in items:
        yield (*path, key)
        yield from leaves(value, (*path, key))


@settings(max_examples=30)
@given(
    rule=st.sampled_from(list(RULES)),
    where=st.floats(0, 1, exclude_max=True),
    how=st.sampled_from(["missing", "None", "text", "shape"]),
)
def test_a_damaged_state_is_refused_whole_or_taken_whole(rule, where, how):
    """Nothing is loaded in part, and what was loaded takes steps."""
    model, optimizer = started(rule, 4, batch_rule="correlation")
    _, source = started(rule, 6, batch_rule="correlation")
    state = copy.deepcopy(source.state_dict())
    places = list(leaves(state))
    *path, key = places[int(where * len(places))]
    inner = state
    for step in path:
        inner = inner[step]
    if how == "missing":
        inner.pop(key)
    elif how == "shape":
        inner[key] = torch.ones(7, 3)
    else:
        inner[key] = None if how == "None" else "text"
    before = snapshot(model, optimizer)
    try:
        optimizer.load_state_dict(state)
    except ValueError:
        assert same(before, snapshot(model, optimizer))
    train(model, optimizer, 5, 4)
    assert all(p.isfinite().all() for p in model.parameters())


@any_rule
@pytest.mark.parametrize("value", [None, "text", torch.ones(7, 3), "missing"])
def test_a_step_size_is_no_state(rule, value):
    """It is made anew by every step, so a state may lack it or hold anything in its place."""
    model, optimizer = started(rule, 4)
    twin, other = started(rule, 4)
    state = copy.deepcopy(optimizer.state_dict())
    state["param_groups"][0].pop("step_size")
    if not isinstance(value, str) or value != "missing":
        state["param_groups"][0]["step_size"] = value
    other.load_state_dict(state)
    train(model, optimizer, 5, 4)
    train(twin, other, 5, 4)
    assert equal(parameters(model), parameters(twin))


def wider():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 7), nn.Tanh(), nn.Dropout(0), nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3)
    )


def deeper():
    return nn.Sequential(*network(), nn.Tanh(), nn.Linear(3, 3))


def turned():
    model = network()
    model[5] = nn.Linear(5, 3, bias=False)
    model[0] = nn.Linear(4, 6, bias=False)
    return model


@any_rule
@pytest.mark.parametrize("other", [wider, deeper, turned])
def test_a_state_of_another_model_is_refused(other, rule):
    strange = other()
    source = make(strange, **OPTIONS, **RULES[rule])
    train(strange, source, 4)
    model, optimizer = started(rule, 3)
    before = snapshot(model, optimizer)
    if other is wider and not any(source.state.values()):
        # Without momentum nothing in a state depends on the shapes, so it serves.
        optimizer.load_state_dict(source.state_dict())
        assert same(source.state_dict()["param_groups"], optimizer.state_dict()["param_groups"])
        return
    with pytest.raises(ValueError, match=r"same model|match the size"):
        optimizer.load_state_dict(source.state_dict())
    assert same(before, snapshot(model, optimizer))
    train(model, optimizer, 2, 3)


@any_rule
@pytest.mark.parametrize("other", [torch.optim.SGD, torch.optim.AdamW])
def test_a_state_of_another_optimizer_is_refused(other, rule):
    model, optimizer = started(rule, 3)
    source = other(model.parameters(), lr=0.1)
    backward(model, optimizer, 3)
    before = snapshot(model, optimizer)
    with pytest.raises(ValueError, match=r"load a state that ConjSGD.state_dict\(\) made"):
        optimizer.load_state_dict(source.state_dict())
    assert same(before, snapshot(model, optimizer))


@pytest.mark.parametrize("state", [{}, None, [], {"state": {}}, {"state": {}, "param_groups": []}])
def test_what_is_no_state_is_refused(state):
    model, optimizer = started("spectral", 1)
    with pytest.raises((ValueError, TypeError, AttributeError)):
        optimizer.load_state_dict(state)
    train(model, optimizer, 1)
