"""Ranks joined under DistributedDataParallel, against one process on the joined batch."""

import datetime
import traceback
import warnings

import pytest
import torch
from torch import distributed, multiprocessing, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from conjopt.regularizers import ConditionalEntropy, OutputCodingRate, WithinClassScatter

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="torch has no distributed")
KINDS = {
    "entropy": ConditionalEntropy,
    "rate": OutputCodingRate,
    "scatter": WithinClassScatter,
}
CASES = [
    (name, queue, soft, sizes)
    for name in KINDS
    for queue, soft, sizes in [
        (0, False, (6, 6)),
        (0, True, (6, 6)),
        (10, False, (6, 6)),
        (0, False, (3, 8)),
        (0, False, (1, 8)),
        (0, False, (0, 8)),
        (20, True, (3, 8)),
    ]
]


def data(step, sizes):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(sum(sizes), 5, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (sum(sizes),), generator=generator)
    y[1] = -100
    return x, y


def train(name, queue, soft, sizes, rank=None):
    """Values, gradients and the queue of three steps: of one rank, or of the joined batch."""
    torch.manual_seed(0)
    network = model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    group = None
    if rank is not None:
        model, group = DistributedDataParallel(network), distributed.group.WORLD
    term = KINDS[name](1.0, queue=queue, group=group)
    found = []
    for step in range(3):
        x, y = data(step, sizes)
        if rank is not None:
            x, y = x.split(sizes)[rank], y.split(sizes)[rank]
        targets = F.one_hot(y.clamp(min=0), 3).double() if soft else y
        network.zero_grad()
        value = term(model(x), targets)
        value.backward()
        found.append(value.detach())
        found += [p.grad.clone() for p in network.parameters()]
    if queue:
        order = term.queue.rows[:, 0].argsort()  # padding differs in place, not in what counts
        found += [term.queue.rows[order][term.queue.mass[order] > 0]]
    return [t.numpy() for t in found]


def serve(rank, file, results):
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    limit = datetime.timedelta(seconds=60)
    distributed.init_process_group("gloo", f"file://{file}", timeout=limit, rank=rank, world_size=2)
    try:
        found = {case: train(*case, rank=rank) for case in CASES}
        bad = OutputCodingRate(group=distributed.group.WORLD)
        bad._warned = True
        outputs = torch.randn(4, 3, requires_grad=True)
        scale = torch.nan if rank == 0 else 1.0
        bad(outputs * scale, torch.zeros(4, dtype=torch.int64)).backward()
        found["skipped"] = (int(bad.skipped), float(outputs.grad.abs().sum()))
        results.put((rank, found, None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
    distributed.barrier()
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    file = str(tmp_path_factory.mktemp("ranks") / "init")
    processes = [context.Process(target=serve, args=(rank, file, results)) for rank in range(2)]
    for process in processes:
        process.start()
    found = {}
    for _ in processes:
        rank, value, error = results.get(timeout=120)
        assert error is None, error
        found[rank] = value
    for process in processes:
        process.join(30)
    return [found[0], found[1]]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_joined_ranks_are_one_process_on_the_joined_batch(case, ranks):
    first, second = (found[case] for found in ranks)
    _, queue, _, sizes = case
    one = train(*case)
    if queue and sizes[0] != sizes[1]:
        # Rows that fill up the smaller batch take places in the queue: one large enough has room.
        first, second, one = first[:-1], second[:-1], one[:-1]
        first, second, one = (
            first[: len(first) // 3],
            second[: len(second) // 3],
            one[: len(one) // 3],
        )
    for ours, others, expected in zip(first, second, one, strict=True):
        assert (ours == others).all()
        assert_close(torch.as_tensor(ours), torch.as_tensor(expected), rtol=1e-9, atol=1e-11)


def test_a_row_that_is_not_finite_stops_the_term_on_all_ranks(ranks):
    assert [found["skipped"][0] for found in ranks] == [1, 1]
    assert ranks[1]["skipped"][1] == 0
