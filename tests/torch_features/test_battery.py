"""What torch checks of every optimizer of its own, for each direction and step rule here.

Constructor errors are in test_bad_input.py; equality with torch.optim.SGD in
test_reduces_to_torch.py.
"""

import copy
import gc
import inspect
import weakref

import pytest
import torch
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

from conjopt import ConjSGD

OPTIONS = {"warmup": 3, "measure_every": 4}


class Shaped(nn.Module):
    """A linear layer whose parameters have unusual shapes and layouts."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(4, 2, 3).mT.flatten(1).T.contiguous().T)
        self.factor = nn.Parameter(torch.tensor(1.5))
        self.row = nn.Parameter(torch.randn(1, 3))
        self.strided = nn.Parameter(torch.randn(6, 6)[::2, ::2])
        self.empty = nn.Parameter(torch.empty(0, 3))

    def forward(self, x):
        hidden = (x @ self.weight).tanh()[:, :3]
        return self.factor * hidden @ self.strided + self.row + self.empty.sum()


class Contiguous(Shaped):
    def __init__(self):
        super().__init__()
        for name, p in list(self.named_parameters()):
            setattr(self, name, nn.Parameter(p.detach().contiguous()))


@any_rule
def test_it_is_a_torch_optimizer(rule):
    optimizer = make(network(), **RULES[rule])
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert set(optimizer.defaults) <= {*inspect.signature(ConjSGD).parameters, "differentiable"}
    assert {**optimizer.defaults}.items() <= optimizer.param_groups[0].items()
    text = repr(optimizer)
    assert text.startswith("ConjSGD (\nParameter Group 0\n")
    for name in ("lr", "momentum", "weight_decay", "max_step", "step_size"):
        assert f"    {name}: {optimizer.param_groups[0][name]}\n" in text


@any_rule
def test_its_state_is_of_tensors_by_parameter(rule):
    model = network()
    optimizer = make(model, average=0.1, **RULES[rule])
    assert len(optimizer.state) == 0
    train(model, optimizer, 3)
    assert set(optimizer.state) <= set(model.parameters())
    assert {type(v) for state in optimizer.state.values() for v in state.values()} == {torch.Tensor}
    assert not any(v.requires_grad for state in optimizer.state.values() for v in state.values())


@any_rule
def test_shapes_and_layouts(rule):
    """Not contiguous, without dimensions, one row, no elements."""
    model, twin = Shaped(), Contiguous()
    assert not model.strided.is_contiguous()
    assert not model.weight.is_contiguous()
    before = parameters(model)
    optimizer, other = make(model, **OPTIONS, **RULES[rule]), make(twin, **OPTIONS, **RULES[rule])
    strides = [p.stride() for p in model.parameters()]
    train(model, optimizer, 6)
    train(twin, other, 6)
    for p, q in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)
    assert strides == [p.stride() for p in model.parameters()]
    moved = [not torch.equal(p, q) for p, q in zip(before, model.parameters()) if p.numel()]
    assert all(moved)
    again, fresh = Shaped(), None
    fresh = make(again, **OPTIONS, **RULES[rule])
    again.load_state_dict(model.state_dict())
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, 3)
    train(again, fresh, 3)
    assert equal(parameters(model), parameters(again))


@any_rule
@pytest.mark.parametrize("taken", [0, 1, 4])
def test_a_state_goes_round(rule, taken):
    """Into a fresh optimizer, from which the very same state comes out again."""
    model = network()
    groups = [{"params": model[:3].parameters(), "lr": 0.01}, {"params": model[3:].parameters()}]
    optimizer = make(model, params=groups, average=0.1, **RULES[rule])
    train(model, optimizer, taken)
    state = copy.deepcopy(optimizer.state_dict())
    twin = network()
    groups = [{"params": twin[:3].parameters()}, {"params": twin[3:].parameters()}]
    other = make(twin, params=groups, average=0.1, **RULES[rule])
    other.load_state_dict(state)
    assert same(other.state_dict(), state)
    assert other.param_groups[0]["lr"] == 0.01
    # And into parameters of another type, which it is cast to.
    wide = network(torch.float64)
    groups = [{"params": wide[:3].parameters()}, {"params": wide[3:].parameters()}]
    other = make(wide, params=groups, average=0.1, **RULES[rule])
    other.load_state_dict(state)
    for p in wide.parameters():
        for key in ("momentum_buffer", "average"):
            assert other.state[p].get(key, p).dtype == torch.float64
    train(wide, other, 1)
    assert all(p.isfinite().all() for p in wide.parameters())


@any_rule
def test_a_state_of_before_an_option_is_loaded_with_its_default(rule):
    model, twin = network(), network()
    optimizer, other = make(model, **OPTIONS, **RULES[rule]), make(twin, **OPTIONS, **RULES[rule])
    train(model, optimizer, 4)
    twin.load_state_dict(model.state_dict())
    state = copy.deepcopy(optimizer.state_dict())
    for name in ("max_step", "maximize", "coupled_weight_decay"):
        del state["param_groups"][0][name]
    other.load_state_dict(state)
    train(model, optimizer, 3, 4)
    train(twin, other, 3, 4)
    assert equal(parameters(model), parameters(twin))


@any_rule
@pytest.mark.parametrize("name", ["lr", "weight_decay", "momentum"])
def test_a_tensor_is_as_good_as_a_number(rule, name):
    value = {"lr": RULES[rule].get("lr", 1.0), "weight_decay": 0.25, "momentum": 0.5}[name]
    paths = []
    for given in (value, torch.tensor(value)):
        model = network(torch.float64)
        optimizer = make(model, **{**OPTIONS, **RULES[rule], name: given})
        train(model, optimizer, 6)
        paths.append(parameters(model))
    for p, q in zip(*paths):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


@any_rule
def test_a_rate_written_into_its_tensor_counts(rule):
    model, twin = network(), network()
    base = RULES[rule].get("lr", 1.0)
    rate = torch.tensor(base)
    optimizer = make(model, **{**OPTIONS, **RULES[rule], "lr": rate})
    other = make(twin, **{**OPTIONS, **RULES[rule], "lr": torch.tensor(base)})
    for step in range(4):
        rate.mul_(0.5)
        other.param_groups[0]["lr"] = torch.tensor(base * 0.5 ** (step + 1))
        train(model, optimizer, 1, step)
        train(twin, other, 1, step)
    assert equal(parameters(model), parameters(twin))


@any_rule
def test_steps_without_gradients_change_nothing(rule):
    model = network()
    optimizer = make(model, **RULES[rule])
    before, state = parameters(model), copy.deepcopy(optimizer.state_dict())
    for _ in range(3):
        optimizer.step()
    assert equal(before, parameters(model))
    assert same(state, optimizer.state_dict())


@any_rule
def test_gradients_of_zero_move_nothing_without_decay(rule):
    model = network()
    optimizer = make(model, **{"weight_decay": 0.0, **RULES[rule]})
    before, (x, y) = parameters(model), data()
    for _ in range(3):
        optimizer.zero_grad()
        (0.0 * model(x).sum() + criterion_of(optimizer)(model(x), y)).backward()
        for p in model.parameters():
            p.grad.zero_()
        optimizer.step()
    assert equal(before, parameters(model))
    assert optimizer.status().skipped_steps == 0


@any_rule
def test_sparse_and_complex_are_refused(rule):
    model = nn.Sequential(nn.Linear(4, 3, dtype=torch.complex64))
    with pytest.raises(ValueError, match="is complex, expected real"):
        make(model, **RULES[rule])
    model = network()
    optimizer = make(model, **RULES[rule])
    train(model, optimizer, 1)
    before = parameters(model)
    backward(model, optimizer, 1)
    model[0].weight.grad = model[0].weight.grad.to_sparse()
    with pytest.raises(RuntimeError, match="is sparse"):
        optimizer.step()
    assert equal(before, parameters(model))


@any_rule
def test_duplicate_parameters_are_refused_or_said(rule):
    model = network()
    optimizer = make(model, **RULES[rule])
    with pytest.raises(ValueError, match="some parameters appear in more than one"):
        optimizer.add_param_group({"params": [model[0].weight]})
    with pytest.warns(UserWarning, match="duplicate parameters"):
        make(model, params=[model[0].weight, model[0].weight], **RULES[rule])


@any_rule
def test_a_step_leaves_no_memory_behind(rule):
    """Graphs, inputs and gradients of steps past are let go of."""
    model = network()
    optimizer = make(model, **OPTIONS, **RULES[rule])
    train(model, optimizer, 5)
    gc.collect()

    def tensors():
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    before = tensors()
    for step in range(5, 25):
        train(model, optimizer, 1, step)
    gc.collect()
    assert tensors() <= before + 2
    x, y = data()
    output = model(x)
    loss = criterion_of(optimizer)(output, y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    held = weakref.ref(output)
    del output, loss
    assert held() is None


@any_rule
def test_a_quadratic_bowl_is_gone_down(rule):
    """Least squares in two unknowns with condition 100, as torch tries its optimizers on."""
    torch.manual_seed(0)
    model = nn.Linear(2, 1, bias=False).double()
    x = torch.randn(50, 2, dtype=torch.float64) * torch.tensor([1.0, 0.1])
    y = x @ torch.tensor([[2.0], [-1.0]], dtype=torch.float64)
    optimizer = make(model, nn.MSELoss(), weight_decay=0.0, **RULES[rule])
    losses = []
    for _ in range(200):
        optimizer.zero_grad()
        loss = criterion_of(optimizer)(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.02 * losses[0]
