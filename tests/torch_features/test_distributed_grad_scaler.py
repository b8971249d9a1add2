"""`torch.amp.GradScaler` under DistributedDataParallel: who skips a step, and who does not."""

from typing import Any

import pytest
import torch
from test_distributed_data_parallel import RULES, batches, bits, dealt, left, network, same
from torch import distributed, nn
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel

from conjopt import ConjSGD

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="torch has no distributed")
OPTIONS = {"warmup": 3, "measure_every": 3}


def scaled_run(
    rule: str,
    scale: float | None = None,
    overflows: tuple[int, ...] = (),
    clip: float | None = None,
    skips: tuple[int, ...] = (),
) -> dict[str, Any]:
    """On every rank: a run under a scaler, in which rank 1 overflows at some steps."""
    model, criterion = network(), nn.CrossEntropyLoss()
    ddp = DistributedDataParallel(model)
    optimizer = ConjSGD(ddp.parameters(), model=ddp, loss=criterion, **OPTIONS, **RULES[rule])
    scaler = GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
    rank = distributed.get_rank()
    for number, ((x, y, _),) in enumerate(dealt(batches(9, 8), 2)[rank]):
        if number in skips:
            continue
        optimizer.zero_grad()
        handle = None
        if number in overflows and rank == 1:
            handle = model[2].weight.register_hook(lambda gradient: gradient * torch.inf)
        scaler.scale(criterion(ddp(x), y)).backward()
        if handle is not None:
            handle.remove()
        if clip is not None:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        before = left(model, optimizer)
        scaler.step(optimizer)
        scaler.update()
        if number in overflows:
            same([before, left(model, optimizer)])
    return left(model, optimizer) | {"scale": scaler.get_scale()}


def scales(found: list[dict[str, Any]]) -> list[float]:
    return [of_rank.pop("scale") for of_rank in found]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("clip", [None, 0.05])
def test_a_power_of_two_changes_nothing(two, rule, clip):
    found, expected = two(scaled_run, rule, 1024.0, (), clip), two(scaled_run, rule, None, (), clip)
    assert scales(found) == [1024.0, 1024.0]
    scales(expected)
    bits(found, expected)


@pytest.mark.parametrize("rule", ["spectral edge", "sgd edge", "sgd constant"])
@pytest.mark.parametrize("overflows", [(0,), (2, 4), (5,)])
def test_an_overflow_on_one_rank_skips_the_step_on_all(two, rule, overflows):
    """And leaves no trace: the run is one without these batches."""
    found = two(scaled_run, rule, 1024.0, overflows)
    expected = two(scaled_run, rule, None, (), None, overflows)
    assert scales(found) == [1024.0 / 2 ** len(overflows)] * 2
    scales(expected)
    bits(found, expected)
    assert same(found)["statistics skipped"] == 0  # the scaler's, not the optimizer's


def test_any_other_scale_changes_no_more_than_rounding(two):
    found, expected = two(scaled_run, "sgd edge", 1000.0), two(scaled_run, "sgd edge")
    for runs in (found, expected):
        scales(runs)
    close = {name: torch.as_tensor(value) for name, value in same(expected).items()}
    for name, value in same(found).items():
        # The scaler's reciprocal is of single precision.
        torch.testing.assert_close(value, close[name], rtol=1e-4, atol=1e-5, equal_nan=True)
