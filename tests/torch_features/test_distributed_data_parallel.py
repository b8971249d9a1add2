"""ConjSGD under DistributedDataParallel, against a single process on the joined batch.

Two or three gloo processes on a CPU run the functions below that are named after what they do; what
these return comes back as a list over the ranks.
"""

import contextlib
import datetime
import itertools
import os
import time
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from conjopt import AdaptiveBatchSampler, ConjSGD
from conjopt.bounds import ConvergenceLedger
from conjopt.optim import Edge

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="torch has no distributed")
CLOSE = {"rtol": 1e-9, "atol": 1e-11}

# The problem, and what a run of it leaves.


def network(kind: str = "plain") -> nn.Module:
    torch.manual_seed(0)
    if kind == "batch norm":
        model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 3))
    else:
        model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    return model.double()


def batches(steps: int, size: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(steps, size, 5, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (steps, size), generator=generator)
    return list(zip(x, y, strict=True))


def left(model: nn.Module, optimizer: ConjSGD) -> dict[str, Any]:
    """Everything that could differ, as plain tensors by name."""
    statistics = optimizer.state_dict()["param_groups"][0]["controller"]["statistics"]
    found = {f"statistics {name}": value for name, value in statistics.items()}
    found |= {f"model {name}": p.detach().clone() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        found |= {f"{name} {key}": value for key, value in optimizer.state[p].items()}
    # As arrays, for a queue shares the memory of tensors with processes that may be gone.
    return {n: value.numpy() if isinstance(value, Tensor) else value for n, value in found.items()}


def tensors(found: dict[str, Any]) -> dict[str, Any]:
    return {name: torch.as_tensor(value) for name, value in found.items()}


def same(found: list[dict[str, Any]]) -> dict[str, Any]:
    """What all ranks have, if it is the same bit for bit."""
    first, *others = [tensors(f) for f in found]
    assert sum("model" in name for name in first) >= 4
    for other in others:
        assert first.keys() == other.keys()
        for name, value in first.items():
            assert torch.equal(value.nan_to_num(-1.5), other[name].nan_to_num(-1.5)), name
    return first


def agree(found: dict[str, Any], expected: dict[str, Any]) -> None:
    expected = tensors(expected)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert_close(
            value, expected[name], **CLOSE, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )


def criterion_of(reduction: str) -> nn.Module:
    return nn.CrossEntropyLoss(reduction=reduction)


OPTIONS = {"warmup": 3, "measure_every": 3}


def train(
    model: nn.Module,
    optimizer: ConjSGD,
    criterion: nn.Module,
    data: list[list[tuple[Tensor, Tensor, float]]],
    call: nn.Module | None = None,
    clip: float | None = None,
    waits: bool = True,
) -> None:
    """A step for each list of micro-batches (inputs, targets, factor)."""
    call = model if call is None else call
    for micro in data:
        optimizer.zero_grad()
        for number, (x, y, factor) in enumerate(micro):
            last = number == len(micro) - 1 or not isinstance(call, DistributedDataParallel)
            with contextlib.nullcontext() if last or not waits else call.no_sync():
                (criterion(call(x), y) * factor).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()


def groups_of(model: nn.Module, groups: bool) -> Any:
    if not groups:
        return model.parameters()
    parameters = list(model.parameters())
    return [{"params": parameters[:2], "lr": 0.5}, {"params": parameters[2:], "weight_decay": 0.02}]


def ddp_run(
    options: dict[str, Any],
    data: list[list[list[tuple[Tensor, Tensor, float]]]],
    reduction: str = "mean",
    clip: float | None = None,
    groups: bool = False,
    wrap: dict[str, Any] | None = None,
    give: str = "wrapper",
    kind: str = "plain",
    waits: bool = True,
) -> dict[str, Any]:
    """On every rank: a run on its own list of steps."""
    model = network(kind)
    ddp = DistributedDataParallel(model, **(wrap or {}))
    criterion = criterion_of(reduction)
    more = {"process_group": distributed.group.WORLD} if give == "group" else {}
    optimizer = ConjSGD(
        groups_of(ddp if give == "wrapper" else model, groups),
        model=ddp if give == "wrapper" else model,
        loss=criterion,
        **{**OPTIONS, **options},
        **more,
    )
    if give == "group":  # gradients averaged by hand
        for micro in data[distributed.get_rank()]:
            optimizer.zero_grad()
            for x, y, factor in micro:
                (criterion(model(x), y) * factor).backward()
            for p in model.parameters():
                distributed.all_reduce(p.grad)
                p.grad /= distributed.get_world_size()
            optimizer.step()
    else:
        train(model, optimizer, criterion, data[distributed.get_rank()], ddp, clip, waits)
    return left(model, optimizer)


def alone_run(
    options: dict[str, Any],
    data: list[list[tuple[Tensor, Tensor, float]]],
    reduction: str = "mean",
    clip: float | None = None,
    groups: bool = False,
) -> dict[str, Any]:
    model, criterion = network(), criterion_of(reduction)
    optimizer = ConjSGD(
        groups_of(model, groups), model=model, loss=criterion, **{**OPTIONS, **options}
    )
    train(model, optimizer, criterion, data, None, clip)
    return left(model, optimizer)


def whole(data: list[tuple[Tensor, Tensor]]) -> list[list[tuple[Tensor, Tensor, float]]]:
    return [[(x, y, 1.0)] for x, y in data]


def dealt(
    data: list[tuple[Tensor, Tensor]], ranks: int
) -> list[list[list[tuple[Tensor, Tensor, float]]]]:
    return [whole([(x[r::ranks], y[r::ranks]) for x, y in data]) for r in range(ranks)]


# Two ranks with the even and the odd rows are a single process with both.

RULES = {
    "spectral edge": {},
    "sgd edge": {"direction": "sgd"},
    "sgd smoothness": {"direction": "sgd", "step_rule": "smoothness", "momentum": 0.0},
    "sgd polyak": {"direction": "sgd", "step_rule": "polyak"},
    "spectral constant": {"step_rule": "constant", "lr": 0.02},
    "sgd constant": {"direction": "sgd", "step_rule": "constant", "lr": 0.02},
}


@pytest.mark.parametrize("rule", RULES)
def test_two_ranks_are_one_process_on_the_joined_batch(two, rule):
    data = batches(8, 12)
    agree(same(two(ddp_run, RULES[rule], dealt(data, 2))), alone_run(RULES[rule], whole(data)))


def test_a_step_that_is_tried_and_cut(two):
    options = {"step_rule": Edge(realised=0.05)}
    data = [(x[:size], y[:size]) for (x, y), size in zip(batches(8, 12), [12] * 6 + [7, 5])]
    found = same(two(ddp_run, options, dealt(data, 2), reduction="sum"))
    assert found["statistics reach"].isfinite()  # the trial binds
    assert found["statistics share"] < 1
    agree(found, alone_run(options, whole(data), reduction="sum"))


@pytest.mark.parametrize("rule", ["spectral edge", "sgd edge"])
def test_uneven_batches_weigh_by_samples_where_the_loss_does(two, rule):
    data = [(x[:size], y[:size]) for (x, y), size in zip(batches(7, 9), [9, 9, 9, 9, 5, 3, 2])]
    found = same(two(ddp_run, RULES[rule], dealt(data, 2), reduction="sum"))
    agree(found, alone_run(RULES[rule], whole(data), reduction="sum"))
    assert found["statistics curvature"] > 0


def test_uneven_batches_weigh_by_ranks_where_the_loss_does(two):
    # A rank with one sample has half the weight: so have its samples in one process.
    mine, other = batches(6, 7), batches(6, 1)
    ranks = [whole(mine), whole(other)]
    joined = [[(*a, 0.5), (*b, 0.5)] for a, b in zip(mine, other, strict=True)]
    agree(same(two(ddp_run, {}, ranks)), alone_run({}, joined))


@pytest.mark.parametrize("rule", ["spectral edge", "sgd edge"])
def test_clipping_and_groups(two, rule):
    data = batches(7, 10)
    found = same(two(ddp_run, RULES[rule], dealt(data, 2), clip=0.05, groups=True))
    expected = alone_run(RULES[rule], whole(data), clip=0.05, groups=True)
    agree(found, expected)
    unclipped = tensors(alone_run(RULES[rule], whole(data), groups=True))
    assert not torch.allclose(found["statistics noise"], unclipped["statistics noise"])


@pytest.mark.parametrize("waits", [True, False], ids=["no_sync", "averaged each time"])
def test_accumulation(two, waits):
    # Rank 1 has two micro-batches, the last of which shows the curvature; rank 0 its own in two.
    zero, one = batches(6, 8), batches(6, 6)
    ranks = [
        [[(x[:4], y[:4], 0.5), (x[4:], y[4:], 0.5)] for x, y in zero],
        [[(x[:3], y[:3], 0.5), (x[3:], y[3:], 0.5)] for x, y in one],
    ]
    joined = [
        [(*zero[t], 0.5), *((x, y, factor / 2) for x, y, factor in ranks[1][t])] for t in range(6)
    ]
    agree(same(two(ddp_run, {}, ranks, waits=waits)), alone_run({}, joined))


@pytest.mark.slow
def test_three_ranks_are_two_parts(three):
    # Ranks 0 and 2 are the first part, as the first micro-batch of a single process is.
    sizes = [[4, 3, 5], [4, 3, 5], [1, 1, 1], [5, 2, 1], [4, 4, 4]]
    data = [(x[: sum(s)], y[: sum(s)]) for (x, y), s in zip(batches(5, 12), sizes, strict=True)]
    ranks: list[Any] = [[], [], []]
    joined = []
    for (x, y), size in zip(data, sizes, strict=True):
        xs, ys = x.split(size), y.split(size)
        for r in range(3):
            ranks[r].append([(xs[r], ys[r], 1.0)])
        even = torch.cat([xs[0], xs[2]]), torch.cat([ys[0], ys[2]]), 1.0
        joined.append([even, (xs[1], ys[1], 1.0)])
    found = same(three(ddp_run, {}, ranks, reduction="sum"))
    agree(found, alone_run({}, joined, reduction="sum"))
    # With a mean on each rank, their weights are equal, not those of their samples.
    assert found["statistics noise"] > 0
    same(three(ddp_run, {"direction": "sgd"}, ranks))


@pytest.mark.slow
def test_three_ranks_against_plain_numbers(three):
    sizes = [2, 3, 4]
    x, y = batches(1, 9)[0]
    xs, ys = x.split(sizes), y.split(sizes)
    ranks = [[[(xs[r], ys[r], 1.0)]] for r in range(3)]
    options = {"direction": "sgd", "step_rule": "smoothness", "momentum": 0.0}
    found = same(three(ddp_run, options, ranks))
    model = network()
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])

    def run(theta: Tensor, inputs: Tensor) -> Tensor:
        parts, at = {}, 0
        for name, p in model.named_parameters():
            parts[name] = theta[at : at + p.numel()].reshape(p.shape)
            at += p.numel()
        return torch.func.functional_call(model, parts, (inputs,))

    jacobian = torch.func.jacrev(run)(flat, x)  # (m, k, P)
    prediction = run(flat, x).softmax(-1)
    residual = prediction - nn.functional.one_hot(y, 3)
    weights = torch.cat([torch.full((m,), 1 / (3 * m), dtype=torch.float64) for m in sizes])
    each = torch.einsum("mkp,mk->mp", jacobian, residual)
    g = weights @ each
    hessian = torch.diag_embed(prediction) - prediction.unsqueeze(-1) * prediction.unsqueeze(-2)
    ggn = torch.einsum("m,mkp,mkl,mlq->pq", weights, jacobian, hessian, jacobian)
    moved = jacobian @ g
    moved = moved - moved.mean(-1, keepdim=True)
    local = [part.mean(0) for part in each.split(sizes)]
    g1, g2 = (local[0] + local[2]) / 2, local[1]
    h1, h2 = 4 / (1 / sizes[0] + 1 / sizes[2]), sizes[1]
    loss = nn.functional.cross_entropy(run(flat, x), y, reduction="none")
    top = g
    for _ in range(6):  # the power method that the rule takes
        top = ggn @ (top / top.norm())
    expected = {
        "loss": weights @ loss,
        "change": (weights @ moved.square().sum(-1)).sqrt(),
        "curvature": g @ ggn @ g,
        "top": top.norm(),
        "correlation": (g1 @ g2) / (g @ g),
        "mean_square": g1 @ g2,
        "noise": (g1 - g2).square().sum() / (1 / h1 + 1 / h2),
    }
    for name, value in expected.items():
        weight = found.get(f"statistics {name}_weight", torch.tensor(1.0))
        assert_close(found[f"statistics {name}"] / weight, value, **CLOSE, msg=name)


def noises(outcomes: list[list[list[float]]]) -> list[list[float]]:
    """On every rank: what each outcome of the draws says about the noise, the weights at rest."""
    model = nn.Linear(2, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    ddp, criterion = DistributedDataParallel(model), nn.MSELoss()
    optimizer = ConjSGD(
        ddp.parameters(), model=ddp, loss=criterion, direction="sgd", lr=0.0, warmup=len(outcomes)
    )
    found = []
    see = optimizer._statistics.see

    def seen(measurement: Any, gate: Any) -> None:
        found.append([float(measurement.mean_square), float(measurement.noise)])
        see(measurement, gate)

    optimizer._statistics.see = seen  # type: ignore[method-assign]
    for outcome in outcomes:
        optimizer.zero_grad()
        y = torch.tensor(outcome[distributed.get_rank()], dtype=torch.float64).unsqueeze(1)
        criterion(ddp(torch.ones(len(y), 2, dtype=torch.float64)), y).backward()
        optimizer.step()
    return found


@pytest.mark.slow
def test_noise_of_uneven_ranks_is_unbiased(three):
    # All draws with replacement from {1, 4}, of 1, 1 and 2 samples: g_i = -y_i (1, 1).
    draws = itertools.product([1.0, 4.0], repeat=4)
    outcomes = [[[a], [b], [c, d]] for a, b, c, d in draws]
    found, *_ = three(noises, outcomes)
    assert len(found) == 16
    mean = torch.tensor(found, dtype=torch.float64).mean(0)
    assert_close(mean, torch.tensor([2 * 2.5**2, 2 * 1.5**2], dtype=torch.float64), **CLOSE)


# How it is wrapped and given.


def bits(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    a, b = same(found), same(expected)
    for name, value in a.items():
        assert torch.equal(value.nan_to_num(-1.5), b[name].nan_to_num(-1.5)), name


@pytest.mark.parametrize("rule", ["spectral edge", "sgd edge"])
@pytest.mark.parametrize(
    ("give", "wrap"),
    [
        ("inner", {}),
        ("wrapper", {"gradient_as_bucket_view": True}),
        ("wrapper", {"find_unused_parameters": True}),
        ("inner", {"find_unused_parameters": True}),
        ("wrapper", {"static_graph": True}),
        ("group", {}),
    ],
)
def test_however_it_is_wrapped(two, rule, give, wrap):
    data = dealt(batches(5, 8), 2)
    expected = two(ddp_run, RULES[rule], data)
    found = two(ddp_run, RULES[rule], data, wrap=wrap, give=give)
    if give == "group":  # sums in another order
        agree(same(found), same(expected))
    else:
        bits(found, expected)


def branches(find: bool) -> dict[str, Any]:
    """On every rank: a run in which rank 1 alone uses a layer, and none another one."""
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {name: nn.Linear(5, 3) for name in ("always", "second", "never")}
    ).double()
    second = distributed.get_rank() == 1

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = model

        def forward(self, x: Tensor) -> Tensor:
            out = self.layers["always"](x)
            if second or not find:
                out = out + self.layers["second"](x) * float(second)
            return out if find else out + self.layers["never"](x) * 0.0

    inner = Branches()
    if not find:
        inner.layers["never"].requires_grad_(False)
    ddp = DistributedDataParallel(inner, find_unused_parameters=find)
    criterion = nn.CrossEntropyLoss()
    optimizer = ConjSGD(ddp.parameters(), model=ddp, loss=criterion, **OPTIONS)
    train(inner, optimizer, criterion, dealt(batches(6, 8), 2)[int(second)], ddp)
    return left(inner, optimizer)


def test_layers_that_some_or_no_ranks_use(two):
    agree(same(two(branches, True)), same(two(branches, False)))


def alone_in_a_group(rule: dict[str, Any]) -> dict[str, Any]:
    """On every rank: a group of its own, with and without the wrapper."""
    groups = [distributed.new_group([r]) for r in range(distributed.get_world_size())]
    data = whole(batches(6, 8))
    model, criterion = network(), nn.CrossEntropyLoss()
    ddp = DistributedDataParallel(model, process_group=groups[distributed.get_rank()])
    optimizer = ConjSGD(ddp.parameters(), model=ddp, loss=criterion, **OPTIONS, **rule)
    train(model, optimizer, criterion, data, ddp)
    found, expected = tensors(left(model, optimizer)), tensors(alone_run(rule, data))
    for name, value in found.items():
        assert torch.equal(value.nan_to_num(-1.5), expected[name].nan_to_num(-1.5)), name
    return {}


@pytest.mark.parametrize("rule", ["spectral edge", "sgd edge"])
def test_a_single_rank_is_as_without(two, rule):
    two(alone_in_a_group, RULES[rule])


def counted(options: dict[str, Any]) -> list[list[int]]:
    """On every rank: the sizes of the sums of each step."""
    model, criterion = network(), nn.CrossEntropyLoss()
    ddp = DistributedDataParallel(model)
    optimizer = ConjSGD(ddp.parameters(), model=ddp, loss=criterion, **OPTIONS, **options)
    sizes: list[list[int]] = []
    original = distributed.all_reduce

    def counting(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes[-1].append(tensor.numel())
        return original(tensor, *args, **kwargs)

    distributed.all_reduce = counting
    try:
        for x, y in batches(5, 6):
            sizes.append([])
            optimizer.zero_grad()
            criterion(ddp(x), y).backward()
            optimizer.step()
    finally:
        distributed.all_reduce = original
    return sizes


def test_how_often_ranks_wait_for_each_other(two):
    numbers = sum(p.numel() for p in network().parameters())
    found, _ = two(counted, {})
    measuring = [7, numbers, 3, 6]  # the batch, the halves, their response, the trial
    assert found == [measuring, measuring, measuring, [7], [7]]
    found, _ = two(counted, {"direction": "sgd"})
    # The batch, the halves, the response, two curvature products with a word of each rank.
    measuring = [7, numbers, 3, numbers + 1, numbers + 1]
    assert found == [measuring, measuring, measuring, [7], [7]]
    assert two(counted, RULES["spectral constant"])[0] == [[]] * 5


# Batch norm.


def normed() -> dict[str, Any]:
    """On every rank: one step with batch norm, and what it changed."""
    model, criterion = network("batch norm"), nn.CrossEntropyLoss()
    ddp = DistributedDataParallel(model)
    optimizer = ConjSGD(ddp.parameters(), model=ddp, loss=criterion, weight_decay=0.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    ((x, y, _),) = dealt(batches(1, 12), 2)[distributed.get_rank()][0]
    criterion(ddp(x), y).backward()
    optimizer.step()
    size = optimizer.param_groups[0]["step_size"]
    u = {name: (before[name] - p.detach()) / size for name, p in model.named_parameters()}
    again = network("batch norm")
    for module in again.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.track_running_stats = False
            module.running_mean = module.running_var = None
    _, moved = torch.func.jvp(lambda p: torch.func.functional_call(again, p, (x,)), (before,), (u,))
    moved = moved - moved.mean(-1, keepdim=True)
    found = left(model, optimizer)
    return found | {"square": moved.square().sum(-1).mean().item(), "trust": optimizer._trust_only}


def test_batch_norm_leaves_the_trust_region(two):
    found = two(normed)
    squares = [f.pop("square") for f in found]
    assert all(f["trust"] for f in found)
    change = same(found)["statistics change"]
    assert_close(change, torch.tensor(squares).double().mean().sqrt(), rtol=1e-5, atol=0)
    assert abs(squares[0] - squares[1]) > 1e-3 * squares[0]


def test_batch_norm_run(two):
    data = dealt(batches(6, 12), 2)
    found = same(two(ddp_run, {}, data, kind="batch norm"))
    assert all(value.isfinite().all() for name, value in found.items() if "model" in name)


# Faults.


def planted(where: str, at: int) -> dict[str, Any]:
    """On every rank: a run in which rank 1 has something that is not finite in one step."""
    model, criterion = network(), nn.CrossEntropyLoss()
    ddp = DistributedDataParallel(model)
    optimizer = ConjSGD(ddp.parameters(), model=ddp, loss=criterion, **OPTIONS)
    rank = distributed.get_rank()
    steps = dealt(batches(6, 8), 2)[rank]
    for number, ((x, y, _),) in enumerate(steps):
        before = left(model, optimizer)
        planting = number == at and rank == 1
        optimizer.zero_grad()
        if planting and where == "gradient":
            x = x.clone()
            x[0, 0] = torch.inf
        outputs = ddp(x)
        if planting and where == "loss":
            # Said to the optimizer alone: the gradients are finite.
            targets = torch.full((len(x), 3), torch.nan, dtype=torch.float64)
            optimizer.observe(outputs, targets)
            nn.functional.cross_entropy(outputs, y).backward()
        else:
            criterion(outputs, y).backward()
        with warnings.catch_warnings(record=True):
            warnings.simplefilter("always")
            optimizer.step()
        if number == at:
            after = left(model, optimizer)
            for name, value in before.items():
                if name == "statistics skipped":
                    assert after[name] == 1
                else:
                    assert torch.equal(
                        torch.as_tensor(value).nan_to_num(-1.5),
                        torch.as_tensor(after[name]).nan_to_num(-1.5),
                    ), name
    return left(model, optimizer)


@pytest.mark.parametrize("where", ["gradient", "loss"])
@pytest.mark.parametrize("at", [1, 4])
def test_what_is_not_finite_on_one_rank_skips_the_step_on_all(two, where, at):
    found = same(two(planted, where, at))
    assert found["statistics skipped"] == 1
    assert found["statistics steps"] == 5


def refusals() -> None:
    """On every rank: what is refused, with its reason."""
    model, criterion = network(), nn.CrossEntropyLoss()
    ddp = DistributedDataParallel(model)
    x, y = batches(1, 4)[0]
    x = x + distributed.get_rank()
    optimizer = ConjSGD(ddp.parameters(), model=ddp, loss=criterion)
    before = [p.detach().clone() for p in model.parameters()]
    criterion(model(x), y).backward()  # not through the wrapper
    with pytest.raises(RuntimeError, match=r"gradients of the 2 ranks differ: they were not aver"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    optimizer.zero_grad()
    criterion(ddp(x), y).backward()
    optimizer.step()
    # torch leaves the mark of Join on a wrapper that was in it.
    joined = DistributedDataParallel(model)
    with distributed.algorithms.join.Join([joined]):
        criterion(joined(x), y).backward()
        with pytest.raises(RuntimeError, match=r"under .*Join, whose ranks take different numbers"):
            optimizer.step()
    ledger = ConvergenceLedger(model, criterion, x, y, whole=True)
    optimizer = ConjSGD(ddp.parameters(), model=ddp, loss=criterion, ledger=ledger)
    criterion(ddp(x), y).backward()
    with pytest.raises(RuntimeError, match="ledger records steps of one process, but 2 ranks"):
        optimizer.step()
    other = nn.Sequential(nn.Linear(5, 3), nn.SyncBatchNorm(3)).double()
    world = distributed.group.WORLD  # as a wrapper takes such a model on a GPU only
    options = {"model": other, "loss": criterion, "process_group": world}
    with pytest.raises(RuntimeError, match=r"SyncBatchNorm.*use BatchNorm, or step_rule='const"):
        ConjSGD(other.parameters(), **options)
    ConjSGD(other.parameters(), **options, step_rule="constant")
    alone = distributed.new_group([0])
    if distributed.get_rank() == 1:
        with pytest.raises(ValueError, match="process 1 is not in the process group"):
            ConjSGD(model.parameters(), model=model, loss=criterion, process_group=alone)


def test_refuses_what_cannot_be(two):
    two(refusals)


def test_refuses_a_group_without_processes():
    model = network()
    with pytest.raises(ValueError, match=r"torch\.distributed is not initialised; call"):
        ConjSGD(model.parameters(), model=model, loss=nn.CrossEntropyLoss(), process_group=object())


TIMEOUT = 4.0  # seconds


def failing(rank: int, how: str, file: str, results: Any) -> None:
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=TIMEOUT)
    distributed.init_process_group(
        "gloo", f"file://{file}", timeout=timeout, rank=rank, world_size=2
    )
    model, criterion = network(), nn.CrossEntropyLoss()
    ddp = DistributedDataParallel(model)
    options = {"warmup": 1} if "at an ordinary step" in how else {}
    optimizer = ConjSGD(ddp.parameters(), model=ddp, loss=criterion, **options)

    def fail(*_: Any) -> None:
        if "hangs" in how:
            time.sleep(100)
        os._exit(7)

    for number, (x, y) in enumerate(batches(4, 8)):
        optimizer.zero_grad()
        criterion(ddp(x), y).backward()
        before = [p.detach().clone() for p in model.parameters()]
        if number == 2 and rank == 1:
            if "in a measurement" in how:
                model[2].register_forward_hook(fail)
                optimizer.step()
            fail()  # between its backward and its step
        began = time.monotonic()
        try:
            optimizer.step()
        except RuntimeError as error:
            kept = all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
            results.put((number, kept, str(error), time.monotonic() - began))
            os._exit(0)


MORE = ["hangs at an ordinary step", "dies in a measurement", "hangs in a measurement"]


@pytest.mark.parametrize(
    "how", ["dies", "hangs", *(pytest.param(how, marks=pytest.mark.slow) for how in MORE)]
)
def test_a_rank_that_fails(tmp_path, how):
    """The other has torch's own error, no later than the timeout, and its weights as they were."""
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    processes = [
        context.Process(target=failing, args=(r, how, str(tmp_path / "init"), results))
        for r in range(2)
    ]
    try:
        for process in processes:
            process.start()
        processes[0].join(60)
        assert processes[0].exitcode == 0
        if "dies" in how:
            processes[1].join(60)
            assert processes[1].exitcode == 7
        number, kept, message, seconds = results.get()
        assert number == 2
        assert kept
        assert "gloo" in message.lower() or "connection" in message.lower()
        assert seconds < 2 * TIMEOUT
        if "hangs" in how:
            assert seconds > TIMEOUT / 2
    finally:
        for process in processes:
            process.kill()


# State, observe, batch sizes.


def resumed(options: dict[str, Any]) -> dict[str, Any]:
    """On every rank: a run that is broken off and resumed, against the unbroken one."""
    rank = distributed.get_rank()
    data, criterion = dealt(batches(9, 8), 2)[rank], nn.CrossEntropyLoss()
    found = []
    for cut in (None, 4):
        model = network()
        ddp = DistributedDataParallel(model)
        optimizer = ConjSGD(ddp.parameters(), model=ddp, loss=criterion, **OPTIONS, **options)
        train(model, optimizer, criterion, data[:cut], ddp)
        if cut is not None:
            state, weights = optimizer.state_dict(), model.state_dict()
            model = network()
            model.load_state_dict(weights)
            ddp = DistributedDataParallel(model)
            optimizer = ConjSGD(ddp.parameters(), model=ddp, loss=criterion, **OPTIONS, **options)
            optimizer.load_state_dict(state)
            train(model, optimizer, criterion, data[cut:], ddp)
        found.append(left(model, optimizer))
    same(found)
    return found[0]


@pytest.mark.parametrize("rule", ["spectral edge", "sgd edge"])
def test_resumes(two, rule):
    same(two(resumed, RULES[rule]))


def observed() -> dict[str, Any]:
    """On every rank: a run whose loss is not computed by the criterion."""
    model, criterion = network(), nn.CrossEntropyLoss()
    ddp = DistributedDataParallel(model)
    optimizer = ConjSGD(ddp.parameters(), model=ddp, loss=criterion, **OPTIONS)
    for ((x, y, _),) in dealt(batches(5, 8), 2)[distributed.get_rank()]:
        optimizer.zero_grad()
        outputs = ddp(x)
        optimizer.observe(outputs, y)
        nn.functional.cross_entropy(outputs, y).backward()
        optimizer.step()
    return left(model, optimizer)


def test_observe(two):
    data = batches(5, 8)
    agree(same(two(observed)), alone_run({}, whole(data)))


def advised(rule: str) -> Any:
    """On every rank: a run with a sampler that follows a batch rule."""
    x, y = batches(1, 240)[0]
    model, criterion = network(), nn.CrossEntropyLoss()
    ddp = DistributedDataParallel(model)
    optimizer = ConjSGD(
        ddp.parameters(), model=ddp, loss=criterion, warmup=4, measure_every=2, batch_rule=rule
    )
    sampler = AdaptiveBatchSampler(range(240), optimizer, 4, every=2, patience=1, max_batch_size=64)
    sizes = []
    for _ in range(2):
        for rows in sampler:
            optimizer.zero_grad()
            criterion(ddp(x[rows]), y[rows]).backward()
            optimizer.step()
            sizes.append((len(rows), optimizer.status().batch_size))
    return left(model, optimizer), sizes, optimizer.recommended_batch_size()


@pytest.mark.parametrize("rule", ["correlation", "work"])
def test_batch_sizes_are_those_of_all_ranks(two, rule):
    (zero, sizes, advice), (one, others, other_advice) = two(advised, rule)
    same([zero, one])
    joint = [a + b for (a, _), (b, _) in zip(sizes, others, strict=True)]
    assert joint == [m for _, m in sizes] == [m for _, m in others]
    assert len(set(joint)) > 1
    if rule == "correlation":  # times differ, but the sampler follows those of rank 0
        assert advice == other_advice


def test_recommends_what_one_process_would(two):
    def run_alone() -> int | None:
        model, criterion = network(), nn.CrossEntropyLoss()
        optimizer = ConjSGD(
            model.parameters(), model=model, loss=criterion, batch_rule="correlation"
        )
        train(model, optimizer, criterion, whole(batches(5, 10)))
        return optimizer.recommended_batch_size()

    expected = run_alone()
    assert expected is not None
    assert two(recommendation) == [expected, expected]


def recommendation() -> int | None:
    """On every rank: what is recommended after a run."""
    model, criterion = network(), nn.CrossEntropyLoss()
    ddp = DistributedDataParallel(model)
    optimizer = ConjSGD(ddp.parameters(), model=ddp, loss=criterion, batch_rule="correlation")
    train(model, optimizer, criterion, dealt(batches(5, 10), 2)[distributed.get_rank()], ddp)
    return optimizer.recommended_batch_size()
