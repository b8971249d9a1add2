"""`torch.compile` around, inside and in place of DistributedDataParallel."""

from typing import Any

import pytest
import torch
from test_distributed_data_parallel import RULES, batches, bits, dealt, left, network, train
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from conjopt import ConjSGD

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="torch has no distributed")
OPTIONS = {"warmup": 3, "measure_every": 3}


def compiled_run(rule: str, what: str) -> dict[str, Any]:
    """On every rank: a run, with something compiled in it."""
    torch._dynamo.reset()
    model, criterion = network(), nn.CrossEntropyLoss()
    eager = {"backend": "eager"}
    inner = torch.compile(model, **eager) if what == "inner module" else model
    if what == "inner module in place":
        model.compile(**eager)
    ddp = DistributedDataParallel(inner)
    call = torch.compile(ddp, **eager) if what.startswith("wrapper") else ddp
    if what == "in place":
        ddp.compile(**eager)
    given = {"wrapper, given": call, "wrapper, module given": model}.get(what, ddp)
    optimizer = ConjSGD(ddp.parameters(), model=given, loss=criterion, **OPTIONS, **RULES[rule])
    train(model, optimizer, criterion, dealt(batches(7, 8), 2)[distributed.get_rank()], call)
    torch._dynamo.reset()
    return left(model, optimizer)


WAYS = [
    "inner module",
    "inner module in place",
    "in place",
    "wrapper",
    "wrapper, given",
    "wrapper, module given",
]


@pytest.mark.parametrize("what", ["inner module", "wrapper, given"])
def test_the_run_is_that_without(two, what):
    bits(two(compiled_run, "spectral edge", what), two(compiled_run, "spectral edge", "nothing"))


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["spectral edge", "sgd edge", "spectral constant"])
@pytest.mark.parametrize("what", WAYS)
def test_whatever_is_compiled_the_run_is_the_same(two, rule, what):
    bits(two(compiled_run, rule, what), two(compiled_run, rule, "nothing"))
