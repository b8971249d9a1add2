"""Noise from the ranks of a process group, against the same parts in one process."""

import datetime
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, multiprocessing, nn
from torch.testing import assert_close

from conjopt.measure import GradientNoise, noise_from_parts, noise_from_ranks

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="torch has no distributed")
SHAPES = {"a": (3, 2), "b": (5,), "c": ()}
SIZES = [4, 1, 7]
LIMIT = datetime.timedelta(seconds=60)


def part(rank: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return {
        name: 3 + torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for name, shape in SHAPES.items()
    }


def in_one_process(ranks: int, sizes: list[int], population: int | None = None) -> GradientNoise:
    g = torch.stack([torch.cat([t.flatten() for t in part(r).values()]) for r in range(ranks)])
    return noise_from_parts(g @ g.T, sizes, population=population)


def refused(message: str, *args: Any, **kwargs: Any) -> None:
    with pytest.raises(ValueError, match=message):
        noise_from_ranks(*args, **kwargs)


def run(rank: int, ranks: int, file: str) -> None:
    """What every process does; an error of one fails the test."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", f"file://{file}", timeout=LIMIT, rank=rank, world_size=ranks
    )
    try:
        mine = part(rank)
        for sizes in (SIZES[:ranks], [2] * ranks):
            for population in (None, 40):
                found = noise_from_ranks(mine, sizes[rank], population=population)
                expected = in_one_process(ranks, sizes, population)
                assert_close(found.mean_square, expected.mean_square, rtol=1e-13, atol=0)
                assert_close(found.noise, expected.noise, rtol=1e-13, atol=0)
                assert found.batch_size == sum(sizes)
        kept = part(rank)
        assert all(torch.equal(mine[name], kept[name]) for name in kept)
        # By name, whatever the order; half precision is summed in float32.
        other = dict(reversed(mine.items())) if rank else mine
        found = noise_from_ranks(other, SIZES[rank])
        expected = in_one_process(ranks, SIZES[:ranks])
        assert_close(found.noise, expected.noise, rtol=1e-13, atol=0)
        half = noise_from_ranks(list(part(rank, torch.bfloat16).values()), SIZES[rank])
        assert half.noise.dtype == torch.float32
        assert_close(half.noise.double(), expected.noise, rtol=0.05, atol=0)
        # Mean and noise of large gradients that differ little keep their digits.
        near = [1e3 + 1e-3 * t.float() for t in mine.values()]
        both = [torch.zeros(12) for _ in range(ranks)]
        distributed.all_gather(both, torch.cat([t.flatten() for t in near]))
        g = torch.stack(both).double()
        close = noise_from_parts(g @ g.T, SIZES[:ranks])
        h = torch.tensor(SIZES[:ranks]).double()
        apart = (g - h @ g / h.sum()).square().sum(1)
        exact = h @ apart / (ranks - 1)
        found = noise_from_ranks(near, SIZES[rank])
        assert_close(found.noise.double(), exact, rtol=0.2, atol=0)
        assert_close(found.mean_square.double(), close.mean_square, rtol=1e-6, atol=0)
        # What one rank cannot take, all of them refuse.
        refused("at least 1 in each", mine, 3 - rank if rank < ranks - 1 else 0)
        refused("gradients of .*12.* numbers", mine if rank else [mine["a"]], 2)
        refused("population=5 and a batch", mine, 4, population=5)
        alone = distributed.new_group([0])
        if rank == 0:
            refused("expected at least 2", mine, 4, alone)
        else:
            refused("is not in the group", mine, 4, alone)
        if ranks == 3:
            pair = distributed.new_group([0, 2])
            if rank != 1:
                found = noise_from_ranks(mine, SIZES[rank], pair)
                g = torch.stack(
                    [torch.cat([t.flatten() for t in part(r).values()]) for r in (0, 2)]
                )
                assert_close(
                    found.noise, noise_from_parts(g @ g.T, [4, 7]).noise, rtol=1e-13, atol=0
                )
        distributed.barrier()
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_ranks_are_parts(ranks: int, tmp_path: Path):
    context = multiprocessing.spawn(run, (ranks, str(tmp_path / "init")), nprocs=ranks, join=False)
    assert context is not None
    try:
        # False until all have ended, as they do one by one; raises what one of them raised.
        limit = time.monotonic() + 120
        while not context.join(timeout=10):
            assert time.monotonic() < limit
    finally:
        for process in context.processes:
            process.kill()


def test_without_a_process_group():
    model = nn.Linear(2, 1)
    with pytest.raises(RuntimeError, match="init_process_group first, or use noise_from_parts"):
        noise_from_ranks([torch.zeros_like(p) for p in model.parameters()], 4)
