"""States and models that move between devices."""

import copy
import io

import pytest
import torch
from loop import RULES, any_rule, backward, equal, make, network, parameters, same, train

from conjopt.optim.saving import BLOCK_STATE


@any_rule
def test_a_state_is_loaded_onto_the_devices_of_the_parameters(rule):
    """Onto "meta" here, which has shapes and no numbers."""
    model = network()
    options = {"average": 0.1, **RULES[rule]}
    optimizer = make(model, **options)
    train(model, optimizer, 4)
    other = make(network().to("meta"), **options)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for state in other.state.values():
        assert {value.device.type for value in state.values()} <= {"meta"}
        assert not set(state) - {*BLOCK_STATE, "momentum_buffer", "average"}
    assert other._statistics.loss.device.type == "meta"


@any_rule
def test_a_checkpoint_read_by_map_location(rule):
    model, twin = network(), network()
    optimizer, other = make(model, **RULES[rule]), make(twin, **RULES[rule])
    train(model, optimizer, 4)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    saved = torch.load(io.BytesIO(file.getvalue()), map_location="cpu", weights_only=True)
    for part, state in zip((twin, other), saved):
        part.load_state_dict(state)
    train(model, optimizer, 3, 4)
    train(twin, other, 3, 4)
    assert equal(parameters(model), parameters(twin))


def test_a_step_on_meta_parameters_does_nothing_without_gradients():
    optimizer = make(network().to("meta"))
    optimizer.step()
    assert not any(optimizer.state.values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@any_rule
def test_a_run_moves_to_a_gpu_and_back(rule):
    model = network()
    options = {"warmup": 3, "measure_every": 4, "average": 0.1, **RULES[rule]}
    optimizer = make(model, **options)
    train(model, optimizer, 4)
    twin = network().cuda()
    twin.load_state_dict(model.state_dict())
    other = make(twin, **options)
    other.load_state_dict(optimizer.state_dict())
    assert {v.device.type for state in other.state.values() for v in state.values()} == {"cuda"}
    back = make(network(), **options)
    back.load_state_dict(other.state_dict())
    assert same(back.state_dict()["state"], optimizer.state_dict()["state"])
    x = torch.randn(8, 4, device="cuda")
    y = torch.arange(8, device="cuda") % 3
    for _ in range(4):
        other.zero_grad()
        other._watch.criterion(twin(x), y).backward()
        other.step()
    assert other.status().step == 8
    backward(model, optimizer, 4)
