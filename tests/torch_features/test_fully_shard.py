"""ConjSGD on parameters sharded by FSDP2's fully_shard, against one process on the joined batch.

One process measures the trust region alone here, as sharded models do: the rest needs forward mode
and halves. Three processes share matrices of seven rows and a bias of two, so that shards are
uneven and one is empty.
"""

import copy

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.testing import assert_close

from conjopt import ConjSGD
from conjopt.measure.replay import Replay
from conjopt.optim import blocks as blocks_module

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="torch has no distributed")

CLOSE = {"rtol": 1e-9, "atol": 1e-11}
# The output change is a difference of two forwards over a step of about 1e-8: rounding in float64
# enters it at 1e-8, whoever computes it.
DIFFERENCES = {"rtol": 1e-6, "atol": 1e-8}
OPTIONS = {"warmup": 3, "measure_every": 2}
RULES = {
    "spectral": {},
    "sgd polyak": {"direction": "sgd", "step_rule": "polyak"},
    "spectral constant": {"step_rule": "constant", "lr": 0.02},
    "sgd constant": {"direction": "sgd", "step_rule": "constant", "lr": 0.1},
}


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2), nn.Tanh(), nn.Linear(2, 3)]
    return nn.Sequential(*layers).double()


def shard(model: nn.Module, mesh=None, **options) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    if mesh is None:
        mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    fully_shard(model[0], mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def batches(steps: int, size: int = 12) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(steps, size, 5, generator=generator, dtype=torch.float64)
    return [(rows, rows[:, :3].argmax(1)) for rows in x]


def mine(rows: Tensor, part: int = 0, parts: int = 1, ranks: int = 2) -> Tensor:
    """The rows of a micro-batch of this rank, or of those of all ranks in one process."""
    if distributed.is_initialized():
        return rows[distributed.get_rank() :: distributed.get_world_size()][part::parts]
    return torch.cat([rows[rank::ranks][part::parts] for rank in range(ranks)])


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def left(model, optimizer) -> dict:
    """Everything that could differ, gathered, as arrays by name."""
    found = {f"model {name}": whole(p.detach()) for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        found |= {f"{name} {key}": whole(value) for key, value in optimizer.state[p].items()}
    statistics = optimizer.state_dict()["param_groups"][0]["controller"]["statistics"]
    found |= {f"statistics {name}": torch.as_tensor(value) for name, value in statistics.items()}
    found["step size"] = torch.as_tensor(optimizer.param_groups[0]["step_size"])
    return {name: value.clone().numpy() for name, value in found.items()}


def loop(model, optimizer, data, accumulate=1, clip=None, scale=1.0):
    criterion = optimizer._watch.criterion
    for x, y in data:
        optimizer.zero_grad()
        for part in range(accumulate):
            if accumulate > 1 and hasattr(model, "set_requires_gradient_sync"):
                model.set_requires_gradient_sync(part == accumulate - 1)
            rows, labels = mine(x, part, accumulate), mine(y, part, accumulate)
            (criterion(model(rows), labels) * scale / accumulate).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()


def run(rule, steps=8, sharding=None, **how):
    options = how.pop("options", {})
    model = shard(network(), **(sharding or {}))
    criterion = nn.CrossEntropyLoss()
    optimizer = ConjSGD(
        model.parameters(), model=model, loss=criterion, **OPTIONS, **RULES[rule], **options
    )
    loop(model, optimizer, batches(steps), **how)
    return left(model, optimizer)


def alone(rule, steps=8, **how):
    """The same in this process, measured in the way of sharded models."""
    options = how.pop("options", {})
    model, criterion = network(), nn.CrossEntropyLoss()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks_module.Blocks, "sharded", property(lambda self: True))
        optimizer = ConjSGD(
            model.parameters(), model=model, loss=criterion, **OPTIONS, **RULES[rule], **options
        )
        loop(model, optimizer, batches(steps), **how)
    return left(model, optimizer)


def agree(found: list[dict], expected: dict, close=DIFFERENCES) -> None:
    first = {name: torch.as_tensor(value) for name, value in found[0].items()}
    for other in found[1:]:
        assert first.keys() == other.keys()
        for name, value in first.items():
            assert torch.equal(value.nan_to_num(-1), torch.as_tensor(other[name]).nan_to_num(-1)), (
                name
            )
    assert first.keys() == expected.keys()
    for name, value in first.items():
        wanted = torch.as_tensor(expected[name])
        assert_close(value, wanted, **close, equal_nan=True, msg=lambda m, of=name: f"{of}: {m}")


def different(one: dict, other: dict) -> list[str]:
    pairs = {n: (torch.as_tensor(one[n]), torch.as_tensor(other[n])) for n in one}
    return [n for n, (a, b) in pairs.items() if not torch.equal(a.nan_to_num(-1), b.nan_to_num(-1))]


# The same steps as one process.


@pytest.mark.parametrize("rule", RULES)
def test_equals_one_process(two, three, rule):
    expected = alone(rule)
    assert expected["statistics steps"] == 8
    close = CLOSE if "constant" in rule else DIFFERENCES
    agree(two(run, rule), expected, close)
    agree(three(run, rule), expected, close)


def test_other_layouts(two):
    expected = alone("spectral")
    agree(two(run, "spectral", sharding={"reshard_after_forward": False}), expected)
    agree(two(run_on_a_mesh, (1, 2)), expected)
    agree(two(run_on_a_mesh, (2, 1)), expected)


def run_on_a_mesh(shape):
    """Hybrid: replicated along one dimension of a mesh and sharded along the other."""
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
    return run("spectral", sharding={"mesh": mesh})


@pytest.mark.parametrize("rule", ["spectral", "sgd polyak"])
def test_accumulation_without_synchronisation(two, rule):
    agree(two(run, rule, accumulate=3), alone(rule, accumulate=3))


def test_clipping(two):
    how = {"clip": 1e-2, "options": {"momentum": 0.5}}
    agree(two(run, "spectral", **how), alone("spectral", **how))


def test_loss_scale(two):
    """A factor on the loss, as a scaler has, is read and taken out."""
    agree(two(run, "spectral", scale=64.0), alone("spectral"))


def test_groups_weight_decay_and_average(two):
    options = {"average": 0.3, "weight_decay": 0.5, "max_step": 0.05}
    agree(two(run, "spectral", options=options), alone("spectral", options=options))


def mixed_precision():
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = shard(network().float(), mp_policy=policy)
    optimizer = ConjSGD(model.parameters(), model=model, loss=nn.CrossEntropyLoss(), **OPTIONS)
    losses = []
    for x, y in batches(40):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy  # the module below is what is watched
        value = optimizer._watch.criterion(model(mine(x.float())).float(), mine(y))
        assert_close(value, loss(model(mine(x.float())).float(), mine(y)), rtol=0.1, atol=0.1)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    kinds = {p.dtype for p in model.parameters()}
    return losses, kinds == {torch.float32}, optimizer.status().skipped_steps


def test_mixed_precision(two):
    for losses, kept, skipped in two(mixed_precision):
        assert kept
        assert skipped == 0
        assert sum(losses[-5:]) < 0.6 * sum(losses[:5])


# What a measurement leaves behind.


def trial():
    """A replay with other values in place, one that fails, and the shards before and after."""
    model = shard(network())
    x = torch.ones(4, 5, dtype=torch.float64)
    with torch.no_grad():
        here = model(x)
    replay = Replay(model, (x,), {}, Replay.random_state(model))
    model.reshard()
    named = dict(model.named_parameters())
    before = {name: p.to_local().detach().clone() for name, p in named.items()}
    moved = {name: p.detach() * 1.5 for name, p in named.items()}
    (there,) = replay.run(moved)
    twin = network()
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(1.5)
        assert_close(there, twin(x), **CLOSE)
    handle = model[2].register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        replay.run(moved)
    handle.remove()
    (again,) = replay.run({})
    kept = all(torch.equal(before[n], p.to_local()) for n, p in model.named_parameters())
    return kept, torch.equal(here, again), not torch.allclose(here, there)


def fail(*arguments):
    raise ZeroDivisionError


def test_a_trial_puts_the_shards_back(two):
    assert two(trial) == [(True, True, True)] * 2


def evaluated():
    """Training with evaluations between the steps, with the last and with averaged weights."""
    found = []
    for evaluates in (False, True):
        model = shard(network())
        optimizer = ConjSGD(
            model.parameters(), model=model, loss=nn.CrossEntropyLoss(), average=0.5, **OPTIONS
        )
        x = torch.ones(4, 5, dtype=torch.float64)
        for batch in batches(6):
            if evaluates:
                with torch.no_grad():
                    model(x)
                    with optimizer.averaged() if optimizer.state else torch.no_grad():
                        inside = model(x)
            loop(model, optimizer, [batch])
        found.append(left(model, optimizer))
        with torch.no_grad():
            model(x)  # leaves gathered parameters behind
        with torch.no_grad(), optimizer.averaged():
            inside = model(x)
            twin = network()
            model.reshard()
            twin.load_state_dict({n: whole(v) for n, v in model.state_dict().items()})
            assert_close(inside, twin(x), **CLOSE)
        with torch.no_grad():
            assert not torch.allclose(inside, model(x))
    assert all((found[0][name] == found[1][name]).all() for name in found[0] if "model" in name)
    return True


def test_evaluation_between_steps(two):
    assert two(evaluated) == [True, True]


# Faults.


def planted(where):
    model = shard(network())
    optimizer = ConjSGD(model.parameters(), model=model, loss=nn.CrossEntropyLoss(), **OPTIONS)
    data = batches(5)
    loop(model, optimizer, data[:3])
    before = left(model, optimizer)
    x, y = data[3]
    optimizer.zero_grad()
    value = optimizer._watch.criterion(model(mine(x)), mine(y))
    if where == "loss" and distributed.get_rank() == 1:
        value = value * torch.inf
    value.backward()
    if where == "gradient" and distributed.get_rank() == 1:
        model.reshard()
        model[0].weight.grad.to_local()[-1, 0] = torch.nan
    with pytest.warns(RuntimeWarning, match="gave up a step"):
        optimizer.step()
    after = left(model, optimizer)
    changed = different(before, after)
    loop(model, optimizer, data[4:])
    return changed, optimizer.status().skipped_steps, optimizer.status().step


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_not_finite_on_one_rank_skips_on_all(two, where):
    for changed, skipped, steps in two(planted, where):
        assert set(changed) <= {"statistics skipped"}
        assert (skipped, steps) == (1, 4)


def refused():
    model, criterion = shard(network()), nn.CrossEntropyLoss()
    with pytest.raises(ValueError, match="curvature products"):
        ConjSGD(model.parameters(), model=model, loss=criterion, direction="sgd")

    from torch.distributed.fsdp import fully_shard

    part = network()
    fully_shard(part[0], mesh=init_device_mesh("cpu", (2,)))
    with pytest.raises(ValueError, match="2 of 6 parameters are sharded"):
        ConjSGD(part.parameters(), model=part, loss=criterion)

    late = network()
    optimizer = ConjSGD(late.parameters(), model=late, loss=criterion)
    shard(late)
    x, y = batches(1)[0]
    criterion(late(mine(x)), mine(y)).backward()
    with pytest.raises(RuntimeError, match="make the optimizer after fully_shard"):
        optimizer.step()

    from torch.distributed.fsdp import FullyShardedDataParallel

    first = FullyShardedDataParallel.__new__(FullyShardedDataParallel)  # made it wants a GPU
    nn.Module.__init__(first)
    with pytest.raises(TypeError, match="FSDP2"):
        ConjSGD(network().parameters(), model=first, loss=criterion)

    from torch.distributed.tensor import Replicate, distribute_tensor

    copied = network()
    mesh = init_device_mesh("cpu", (2,))
    for module in copied:
        for name, p in list(module.named_parameters()):
            replicated = distribute_tensor(p.detach(), mesh, [Replicate()])
            module.register_parameter(name, nn.Parameter(replicated))
    with pytest.raises(ValueError, match="tensor parallel layouts are not supported"):
        ConjSGD(copied.parameters(), model=copied, loss=criterion)
    return True


def test_refusals(two):
    assert two(refused) == [True, True]


# State.


def resumed(folder, how):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    data = batches(9)

    def start():
        model = shard(network())
        options = {**OPTIONS, "average": 0.2}
        return model, ConjSGD(
            model.parameters(), model=model, loss=nn.CrossEntropyLoss(), **options
        )

    model, optimizer = start()
    loop(model, optimizer, data[:4])
    if how == "state_dict":
        state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    else:
        of_model, of_optimizer = get_state_dict(model, optimizer)
        dcp.save({"model": of_model, "optimizer": of_optimizer}, checkpoint_id=folder)
    loop(model, optimizer, data[4:])
    unbroken = left(model, optimizer)

    model, optimizer = start()
    if how == "state_dict":
        model.load_state_dict(state[0])
        optimizer.load_state_dict(state[1])
    else:
        of_model, of_optimizer = get_state_dict(model, optimizer)
        both = {"model": of_model, "optimizer": of_optimizer}
        dcp.load(both, checkpoint_id=folder)
        set_state_dict(
            model,
            optimizer,
            model_state_dict=both["model"],
            optim_state_dict=both["optimizer"],
        )
    sharded = all(hasattr(s["momentum_buffer"], "to_local") for s in optimizer.state.values())
    loop(model, optimizer, data[4:])
    again = left(model, optimizer)
    return sharded, different(unbroken, again)


@pytest.mark.parametrize("how", ["state_dict", "distributed.checkpoint"])
@pytest.mark.filterwarnings("ignore")
def test_resume_is_exact(two, how, tmp_path):
    assert two(resumed, str(tmp_path / "checkpoint"), how) == [(True, [])] * 2
