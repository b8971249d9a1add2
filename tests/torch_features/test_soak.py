"""Long runs: changing batch sizes, evaluations and checkpoints in between; nothing grows or drifts.

Memory is looked at whenever a checkpoint was taken up, so that the same things are alive.
"""

import gc
import io
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from loop import RULES, equal, parameters
from processes import Processes
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from conjopt import AdaptiveBatchSampler, ConjSGD
from conjopt.optim.batch_rule import Recommendation
from conjopt.optim.sampler import Part

SAMPLES = 480
LONG = {"steps": 20_000, "stretch": 500}
SHORT = {"steps": 240, "stretch": 30}


def samples() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(SAMPLES, 4, generator=generator)
    noise = 0.5 * torch.randn(SAMPLES, 3, generator=generator)
    return x, (x[:, :3] + noise).argmax(1)


class Cycling:
    """Asks the optimizer for its advice, and gives sizes that go round."""

    SIZES = 16, 48, 8, 96, 30

    def __init__(self, optimizer: ConjSGD) -> None:
        self.optimizer = optimizer

    def batch_advice(self, population: int | None, **options: Any) -> Recommendation:
        self.optimizer.batch_advice(population, **options)
        turn = self.optimizer.status().step // 40
        return Recommendation(self.SIZES[turn % len(self.SIZES)], "their turn", urgent=True)


class Run:
    """Everything that a checkpoint is of, one object for a run of one process or of one rank."""

    def __init__(self, rule: str) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)
        )
        several = distributed.is_initialized()
        self.call = DistributedDataParallel(self.model) if several else self.model
        self.criterion = nn.CrossEntropyLoss()
        options: dict[str, Any] = {"batch_rule": "correlation", "average": 0.1, **RULES[rule]}
        if rule == "sgd":  # micro-batches, so that gradients are accumulated
            options["data_floor"] = 0.01
        self.optimizer = ConjSGD(
            self.call.parameters(), model=self.call, loss=self.criterion, **options
        )
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(self.optimizer, 1000)
        self.data = TensorDataset(*samples())
        self.sampler = AdaptiveBatchSampler(
            self.data,
            Cycling(self.optimizer),
            batch_size=16,
            min_batch_size=4,
            max_batch_size=96,
            micro_batch_size=24 if rule == "sgd" else None,
        )
        self.stream: Iterator[tuple[Tensor, Tensor, Part]] | None = None
        self.sizes: set[int] = set()

    def batches(self) -> Iterator[tuple[Tensor, Tensor, Part]]:
        """Epochs of changing batch sizes, each after an evaluation."""
        # A generator of its own, as a loader draws a number whenever it begins.
        loader = DataLoader(self.data, batch_sampler=self.sampler, generator=torch.Generator())
        while True:
            self.evaluate()
            for (x, y), part in self.sampler.parts(loader):
                yield x, y, part

    def train(self, steps: int) -> None:
        self.stream = self.batches() if self.stream is None else self.stream
        while steps:
            x, y, part = next(self.stream)
            (self.criterion(self.call(x), y) * part.share).backward()
            if part.last:
                self.optimizer.step()
                self.optimizer.zero_grad()
                self.schedule.step()
                self.sizes.add(self.sampler.batch_size)
                steps -= 1

    def evaluate(self) -> float:
        x, y = samples()
        self.model.eval()
        with torch.no_grad(), self.optimizer.averaged():
            loss = self.criterion(self.model(x), y).item()
        str(self.optimizer.status())
        self.model.train()
        return loss

    PARTS = ("model", "optimizer", "schedule", "sampler")

    def save(self) -> bytes:
        file = io.BytesIO()
        state = {name: getattr(self, name).state_dict() for name in self.PARTS}
        torch.save({**state, "random": torch.get_rng_state()}, file)
        return file.getvalue()

    def load(self, saved: bytes) -> None:
        state = torch.load(io.BytesIO(saved), weights_only=True)
        for name in self.PARTS:
            getattr(self, name).load_state_dict(state[name])
        torch.set_rng_state(state["random"])


def alive() -> dict[str, int]:
    """What there is: tensors, objects of Python, and the memory of the process in KiB."""
    gc.collect()
    objects = gc.get_objects()
    found = {"tensors": sum(issubclass(type(o), Tensor) for o in objects), "objects": len(objects)}
    del objects
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmRSS"))
        found["kib"] = int(line.split()[1])
    return found


def soak(rule: str, steps: int, stretch: int) -> dict[str, Any]:
    """A run that goes on in a fresh optimizer after each stretch; what it left behind."""
    began, run, seen = time.perf_counter(), Run(rule), []
    resumed_alike = True
    for _ in range(0, steps, stretch):
        run.train(stretch)
        saved, sizes = run.save(), run.sizes
        run.train(7)  # the unbroken one, and the one that goes on from it
        unbroken = parameters(run.model)
        run = Run(rule)
        run.load(saved)
        run.train(7)
        resumed_alike &= equal(unbroken, parameters(run.model))
        run.sizes |= sizes
        del unbroken, saved, sizes
        seen.append(alive())
    return {
        "resumed_alike": resumed_alike,
        "alive": seen,
        "sizes": sorted(run.sizes),
        "loss": run.evaluate(),
        "status": str(run.optimizer.status()),
        "skipped": run.optimizer.status().skipped_steps,
        "steps": run.optimizer.status().step,
        "changes": len(run.sampler.history),
        "parameters": [p.numpy() for p in parameters(run.model)],
        "seconds": time.perf_counter() - began,
    }


def report(found: dict[str, Any]) -> None:
    left_out = ("status", "parameters", "alive")
    print({name: value for name, value in found.items() if name not in left_out})
    print(found["alive"][:: max(1, len(found["alive"]) // 10)])


def check(found: dict[str, Any], steps: int) -> None:
    assert found["resumed_alike"]
    assert found["steps"] >= steps
    assert found["skipped"] == 0
    assert found["sizes"] == sorted(Cycling.SIZES)
    assert found["changes"] > steps / 50
    assert found["loss"] < 0.8  # 1.1 at chance
    # Of what a step leaves, some depends on whether it measured; so halves are compared.
    settled = found["alive"][len(found["alive"]) // 4 :]
    before, after = settled[: len(settled) // 2], settled[len(settled) // 2 :]
    grown = {name: max(a[name] for a in after) - max(b[name] for b in before) for name in after[0]}
    assert grown["tensors"] <= 0, settled
    # The sampler keeps the changes of its size, a few objects each.
    assert grown["objects"] <= 50 + 8 * found["changes"], settled
    # A leak grows in every stretch; once in a while the allocator takes some memory more.
    sizes = [alive.get("kib", 0) for alive in settled]
    jumps = [b - a for a, b in itertools.pairwise(sizes)]
    assert sizes[-1] - sizes[0] - max(jumps) < 2048, settled


MEASURING = ["spectral", "sgd"]


@pytest.mark.parametrize("rule", MEASURING)
def test_some_hundred_steps(rule):
    check(soak(rule, **SHORT), SHORT["steps"])


@pytest.mark.slow
@pytest.mark.parametrize("rule", MEASURING)
def test_twenty_thousand_steps(rule):
    found = soak(rule, **LONG)
    report(found)
    check(found, LONG["steps"])


@pytest.mark.parametrize("rule", RULES)
def test_a_step_leaves_no_cycles_that_hold_tensors(rule):
    """Memory is free as soon as a step is over, not at the next garbage collection."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    criterion, (x, y) = nn.CrossEntropyLoss(), samples()
    optimizer = ConjSGD(
        model.parameters(), model=model, loss=criterion, warmup=3, measure_every=2, **RULES[rule]
    )

    def step(number):
        rows = slice(number % 20, number % 20 + 10)
        optimizer.zero_grad()
        criterion(model(x[rows]).flatten(1), y[rows]).backward()
        optimizer.step()

    for number in range(6):
        step(number)
    gc.collect()
    gc.disable()
    try:
        before = sum(issubclass(type(o), Tensor) for o in gc.get_objects())
        for number in range(20):
            step(number)
        after = sum(issubclass(type(o), Tensor) for o in gc.get_objects())
    finally:
        gc.enable()
    assert after == before


# Two processes.


def soak_together(two: Processes, rule: str, steps: int, stretch: int, limit: float) -> None:
    found = two(soak, rule, steps, stretch, limit=limit)
    for of_rank in found:
        report(of_rank)
        check(of_rank, steps)
    first, second = found
    for p, q in zip(first["parameters"], second["parameters"], strict=True):
        assert (p == q).all()
    assert first["status"] == second["status"]
    assert first["sizes"] == second["sizes"]


@pytest.mark.skipif(not distributed.is_available(), reason="torch has no distributed")
def test_two_processes_for_some_hundred_steps(two):
    soak_together(two, "spectral", **SHORT, limit=120)


@pytest.mark.slow
@pytest.mark.skipif(not distributed.is_available(), reason="torch has no distributed")
@pytest.mark.parametrize("rule", MEASURING)
def test_two_processes_for_twenty_thousand_steps(two, rule):
    soak_together(two, rule, **LONG, limit=1200)
