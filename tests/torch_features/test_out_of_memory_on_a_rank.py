"""Memory that runs out on one rank of several: all of them take the same step, and none waits."""

import warnings
from typing import Any

import pytest
import torch
from test_distributed_data_parallel import RULES, agree, batches, dealt, left, network, same
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from conjopt import ConjSGD
from conjopt.measure.replay import REPLAYING
from conjopt.optim.measuring import Found

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="torch has no distributed")
OPTIONS = {"warmup": 4, "measure_every": 3}


def run(
    rule: str,
    at: int,
    failing: list[int] | None = None,
    after: int = 0,
    *,
    measure: bool = True,
    kind: str = "plain",
    most: int = 0,
) -> dict[str, Any]:
    """On every rank: a run in which some run out of memory at one step, or none measures at it."""
    model, criterion = network(kind), nn.CrossEntropyLoss()
    ddp = DistributedDataParallel(model)
    optimizer = ConjSGD(ddp.parameters(), model=ddp, loss=criterion, **{**OPTIONS, **RULES[rule]})
    rank, planted, replays, measured = distributed.get_rank(), False, 0, optimizer._measure

    def hook(module: nn.Module, args: Any) -> None:
        nonlocal replays
        if REPLAYING.get():
            replays += 1
            if planted and replays > after and len(args[0]) > most:
                raise torch.OutOfMemoryError("CUDA out of memory.")

    model[0].register_forward_pre_hook(hook)
    told = []
    for number, ((x, y, _),) in enumerate(dealt(batches(8, 12), 2)[rank]):
        planted, replays = number == at and rank in (failing or []), 0
        optimizer._measure = measured if measure or number != at else lambda *_: None
        optimizer.zero_grad()
        criterion(ddp(x), y).backward()
        before = [p.detach().clone() for p in model.parameters()]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
        told += [str(warning.message)[:25] for warning in caught]
        if number == at:
            still = all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))
    return left(model, optimizer) | {"told": told, "still": still, "at": optimizer._memory.chunks}


def without_what_differs(found: list[dict[str, Any]]) -> tuple[list[list[str]], list[bool]]:
    for of_rank in found:
        del of_rank["at"]
    return [f.pop("told") for f in found], [f.pop("still") for f in found]


@pytest.mark.parametrize("at", [0, 2, 5])
@pytest.mark.parametrize(
    ("rule", "failing", "after"),
    [
        ("spectral edge", [1], 0),
        ("spectral edge", [0], 0),  # whose samples are not those that are looked at
        ("spectral edge", [0, 1], 0),
        ("sgd edge", [1], 0),
        ("sgd edge", [0], 1),  # in the first product
        ("sgd edge", [1], 3),  # in the second
        ("sgd smoothness", [0], 2),
    ],
)
def test_no_rank_measures_where_one_cannot(two, rule, at, failing, after):
    """Bit for bit a run in which none does at this step; chunks come later."""
    found = two(run, rule, at, failing, after)
    expected = two(run, rule, at, measure=False)
    assert [f["at"] for f in found] == [2 if rank in failing else 1 for rank in range(2)]
    told, _ = without_what_differs(found)
    without_what_differs(expected)
    assert [len(t) for t in told] == [int(rank in failing) for rank in range(2)]
    assert all(t == "ConjSGD ran out of memory" for ts in told for t in ts)
    # Later measurements of the rank are in chunks, which round otherwise.
    agree(same(found), expected[0])
    assert same(found)["statistics skipped"] == 0


@pytest.mark.parametrize("kind", ["plain", "batch norm"])
@pytest.mark.parametrize("failing", [[0], [1]])
def test_a_step_that_one_rank_cannot_try(two, kind, failing):
    after = 1 if kind == "plain" else 2
    found = two(run, "spectral edge", 2, failing, after, kind=kind)
    told, still = without_what_differs(found)
    assert sum(map(len, told)) == 1
    assert still == [False, False]
    same(found)


def test_batch_norm(two):
    found = two(run, "spectral edge", 2, [1], kind="batch norm")
    expected = two(run, "spectral edge", 2, measure=False, kind="batch norm")
    for runs in (found, expected):
        without_what_differs(runs)
    agree(same(found), expected[0])


def as_on_a_device(*args: Any, **kwargs: Any) -> dict[str, Any]:
    """On every rank: a run that asks for no value, as on a device."""
    kept = ConjSGD._given_up, ConjSGD._gate, Found.nothing
    ConjSGD._given_up = lambda self, finite: False  # type: ignore[method-assign]
    ConjSGD._gate = lambda self, finite: finite  # type: ignore[method-assign]
    Found.nothing = False  # type: ignore[assignment,misc]
    try:
        return run(*args, **kwargs)
    finally:
        ConjSGD._given_up, ConjSGD._gate, Found.nothing = kept  # type: ignore[misc]


@pytest.mark.parametrize(
    ("rule", "failing", "after"),
    [("spectral edge", [1], 0), ("spectral edge", [0], 0), ("sgd edge", [0], 2)],
)
def test_a_device_gives_up_the_step_on_all_ranks(two, rule, failing, after):
    found = two(as_on_a_device, rule, 2, failing, after)
    _, still = without_what_differs(found)
    assert still == [True, True]
    assert same(found)["statistics skipped"] == 1
    assert all(value.isfinite().all() for name, value in same(found).items() if "model" in name)
